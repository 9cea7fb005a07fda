//! The parts of NBD, as a client and a server read them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reseal_proto::nbd::{
    BlockStatus, ClientFlags, ErrorChunk, Greeting, Hole, OptionHeader, OptionReply, OptionReplyHeader, OptionRequest,
    Reply, Request,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((part, bytes)) = bytes.split_first() else { return };
    match part % 8 {
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
        _ => {
            if let Some((kind, data)) = bytes.split_first_chunk::<4>() {
                drop(OptionReply::decode(u32::from_be_bytes(*kind), data));
            }
        }
    }
});
