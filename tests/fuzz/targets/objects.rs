//! What a vault gives before anything of it is authenticated, and what is inside of what was.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use reseal_format::frames::{FrameDecoder, Frames};
use reseal_format::geometry::CLUSTER;
use reseal_format::index::IndexNode;
use reseal_format::layout::{parse_lease_file, parse_note_file, parse_pack_file, parse_point_file};
use reseal_format::pack::{TRAILER, Trailer};
use reseal_format::tenant::TenantRecord;
use reseal_format::time::Timestamp;
use reseal_format::vaultfile::VaultFile;

thread_local! {
    static DECODER: RefCell<(FrameDecoder, Vec<u8>)> =
        RefCell::new((FrameDecoder::new().expect("memory"), vec![0; CLUSTER]));
}

fuzz_target!(|bytes: &[u8]| {
    let Some((part, bytes)) = bytes.split_first() else { return };
    match part % 6 {
        0 => drop(VaultFile::decode(bytes)),
        1 => drop(TenantRecord::decode(bytes)),
        2 => {
            if let Some((trailer, rest)) = bytes.split_first_chunk::<TRAILER>() {
                let length = rest.first_chunk::<8>().map_or(1 << 20, |length| u64::from_le_bytes(*length));
                drop(Trailer::decode(trailer, length));
            }
        }
        3 => {
            if let Some((level, node)) = bytes.split_first() {
                drop(IndexNode::decode(node, *level));
            }
        }
        4 => DECODER.with_borrow_mut(|(decoder, out)| {
            if let Ok(frames) = Frames::parse(bytes) {
                for nth in 0..frames.shift().count() {
                    let _ = decoder.decode_frame(&frames, nth, &mut out[..frames.shift().bytes()]);
                }
            }
            let _ = decoder.decode(bytes, out);
        }),
        _ => {
            if let Ok(text) = std::str::from_utf8(bytes) {
                let _ = (parse_point_file(text), parse_note_file(text), parse_lease_file(text), parse_pack_file(text));
                let _ = Timestamp::parse(text);
            }
        }
    }
});
