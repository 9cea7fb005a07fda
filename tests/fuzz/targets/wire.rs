//! Messages between two sites, of either side: what decodes is encoded to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reseal_proto::wire::{FromSource, FromTarget, HEADER_LENGTH, Header, Side, VERSION};

fuzz_target!(|bytes: &[u8]| {
    let Some((side, bytes)) = bytes.split_first() else { return };
    let side = if side & 1 == 0 { Side::Source } else { Side::Target };
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LENGTH>() else { return };
    let Ok(header) = Header::decode(side, *header) else { return };
    let Some(payload) = rest.get(..header.payload()) else { return };
    let message = &bytes[..HEADER_LENGTH + payload.len()];
    let again = match side {
        // Of another version no more than that is read.
        Side::Source => FromSource::decode(header, payload)
            .ok()
            .filter(|message| !matches!(message, FromSource::Hello(hello) if hello.version != VERSION))
            .map(|message| message.encode()),
        Side::Target => FromTarget::decode(header, payload)
            .ok()
            .filter(|message| !matches!(message, FromTarget::Welcome(welcome) if welcome.version != VERSION))
            .map(|message| message.encode()),
    };
    if let Some(again) = again {
        assert!(again == message, "{message:x?} was encoded as {again:x?}");
    }
});
