//! The parts of NBD, as a client and a server read them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reseal_proto::nbd::serve::{Facts, Listed, ServerHandshake, Step, TlsTerms};
use reseal_proto::nbd::{
    BlockSize, BlockStatus, ClientFlags, ErrorChunk, ExportFlags, Greeting, Hole, OptionHeader, OptionReply,
    OptionReplyHeader, OptionRequest, Reply, Request,
};

/// A server's whole handshake with what a client says.
fn serve(mut bytes: &[u8]) {
    let mut machine = ServerHandshake::new(TlsTerms::Offered);
    let mut step = machine.advance(&[]);
    loop {
        step = match step {
            Ok(Step::Read(length)) => {
                let Some((now, rest)) = bytes.split_at_checked(length) else { return };
                bytes = rest;
                machine.advance(now)
            }
            Ok(Step::Send(_) | Step::StartTls) => machine.advance(&[]),
            Ok(Step::Open(name)) => machine.opened(Ok(Facts {
                name,
                description: None,
                size: 1 << 20,
                flags: ExportFlags::HAS_FLAGS,
                block_size: BlockSize::DEFAULT,
                changed_since: Some("07/vm@1/disk".into()),
            })),
            Ok(Step::List) => machine.listed(Ok(vec![Listed { name: "disk".into(), description: String::new() }])),
            Ok(Step::Done(_) | Step::End) | Err(_) => return,
        };
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((part, bytes)) = bytes.split_first() else { return };
    match part % 9 {
        0 => drop(Greeting::decode(bytes)),
        1 => drop(ClientFlags::decode(bytes)),
        2 => drop(OptionReplyHeader::decode(bytes)),
        3 => {
            if let Ok(header) = OptionHeader::decode(bytes) {
                drop(OptionRequest::decode(header.kind, bytes));
            }
        }
        4 => drop(Reply::decode(bytes).map(|reply| match reply {
            Reply::Simple { .. } => {}
            Reply::Chunk(chunk) => drop(ErrorChunk::decode(chunk.kind, bytes)),
        })),
        5 => drop((Hole::decode(bytes), BlockStatus::decode(bytes))),
        6 => drop(Request::decode(bytes)),
        7 => serve(bytes),
        _ => {
            if let Some((kind, data)) = bytes.split_first_chunk::<4>() {
                drop(OptionReply::decode(u32::from_be_bytes(*kind), data));
            }
        }
    }
});
