//! An NBD client with one request on its way, and nothing between it and the socket: what the reads of a boot are replayed with.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use reseal_proto::nbd::handshake::{ClientHandshake, Step, Wanted};
use reseal_proto::nbd::{ChunkKind, Command, CommandFlags, OFFSET_LENGTH, REPLY_START, Reply, Request};

use crate::Result;
use crate::trace::Trace;

/// The reads of a boot, one after the other; in seconds, without what opening the export takes.
pub(super) fn replay(socket: &Path, trace: &Trace) -> Result<f64> {
    let mut socket = opened(socket)?;
    let mut buffer = vec![0; trace.longest()];
    let began = Instant::now();
    for &(offset, length) in trace.reads() {
        read(&mut socket, offset, &mut buffer[..length])?;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn opened(path: &Path) -> Result<UnixStream> {
    let mut socket = UnixStream::connect(path)?;
    let mut handshake = ClientHandshake::new(Wanted { export: String::new(), tls: false, contexts: Vec::new() });
    let mut input = Vec::new();
    loop {
        let step = handshake.advance(&input)?;
        input.clear();
        match step {
            Step::Read(length) => {
                input.resize(length, 0);
                socket.read_exact(&mut input)?;
            }
            Step::Send(bytes) => socket.write_all(&bytes)?,
            Step::StartTls => return Err("TLS that nobody asked for".into()),
            Step::Done(_) => return Ok(socket),
        }
    }
}

fn read(socket: &mut UnixStream, offset: u64, out: &mut [u8]) -> Result<()> {
    let (command, flags, length) = (Command::Read, CommandFlags::NONE, u32::try_from(out.len())?);
    socket.write_all(&Request { command, flags, cookie: 1, offset, length }.encode())?;
    loop {
        let mut head = [0; 64];
        socket.read_exact(&mut head[..REPLY_START])?;
        let length = Reply::length(head[..REPLY_START].try_into()?)?;
        socket.read_exact(&mut head[REPLY_START..length])?;
        let chunk = match Reply::decode(&head[..length])? {
            Reply::Simple { error, .. } if error != reseal_proto::nbd::Errno::NONE => {
                return Err("a read failed".into());
            }
            Reply::Simple { .. } => return Ok(socket.read_exact(out)?),
            Reply::Chunk(chunk) => chunk,
        };
        let payload = chunk.length as usize;
        match chunk.kind {
            ChunkKind::Data if (OFFSET_LENGTH..=OFFSET_LENGTH + out.len()).contains(&payload) => {
                let mut at = [0; OFFSET_LENGTH];
                socket.read_exact(&mut at)?;
                let from = usize::try_from(u64::from_be_bytes(at).saturating_sub(offset))?;
                let part = out.get_mut(from..from + payload - OFFSET_LENGTH).ok_or("data that nobody asked for")?;
                socket.read_exact(part)?;
            }
            // Zeros: nobody looks at them here.
            ChunkKind::Hole | ChunkKind::None => socket.read_exact(&mut head[..payload.min(64)])?,
            _ => return Err("a read failed".into()),
        }
        if chunk.done {
            return Ok(());
        }
    }
}
