//! Requests of one client, worked on by several threads.
//!
//! The threads take turns: one receives, and when it has a request leaves its place to the next and works on it. So no request
//! is handed over, a client that sends more than is worked on is held back by its own socket, and replies leave in any order.
//!
//! Leaving one's place wakes another thread, which costs as much as a small read does. A client that waits for each reply before it sends
//! more is answered by one thread, which keeps its place as long as the disk can give the bytes at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reseal_proto::nbd::serve::{ALLOCATION_ID, CHANGES_ID};
use reseal_proto::nbd::{
    BlockStatus, CHUNK_LENGTH, Chunk, ChunkKind, Command, CommandFlags, Descriptor, Errno, ErrorChunk, HOLE_LENGTH,
    Hole, OFFSET_LENGTH, REQUEST_LENGTH, Reply, Request, SIMPLE_LENGTH, Violation, state,
};
use reseal_vault::wipe::Buffer;

use super::budget::{Budget, Share};
use super::negotiate::Opened;
use super::stream::{Receiving, Sending, Stream};
use super::{Change, DiskError, MAX_READ, Owner, ServeError, Service, Stretch};

/// Most stretches of one answer about holes. A client asks again for the rest.
const MAX_STRETCHES: usize = 4096;
/// Reads of so much are looked at for holes: shorter ones are sent as they are.
const WORTH_A_HOLE: u32 = 4096;
/// After so many requests, none of which came while another was worked on, a client counts as one that waits for its replies.
const PROOF: u32 = 16;
/// Longest read that is answered by who receives; others wait for that long.
const AT_ONCE: u32 = 128 << 10;
/// A thread's buffer that had to grow beyond this is given back after the reply.
const KEPT: usize = 1 << 20;

/// An open export, and the way to its client.
pub(super) struct Session<'a> {
    stream: &'a Stream,
    incoming: Mutex<Incoming>,
    /// Requests whose replies were not begun.
    under_way: AtomicUsize,
    sending: Mutex<Sending>,
    opened: &'a Opened,
    owner: &'a dyn Owner,
    patience: Duration,
    max_read: u32,
    budget: Budget,
    /// The first thing that went wrong.
    failure: Mutex<Option<ServeError>>,
}

struct Incoming {
    receiving: Receiving,
    /// Requests since one came while another was worked on.
    alone: u32,
    /// No more requests are taken.
    over: bool,
}

/// Ends the connection if its thread panics, so that the others do not wait for ever.
struct EndOnPanic<'a>(&'a Stream);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.endpoint().shut_down();
        }
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(
        service: &'a Service,
        stream: &'a Stream,
        opened: &'a Opened,
        receiving: Receiving,
        sending: Sending,
    ) -> Session<'a> {
        let max_read = service.limits.max_read.min(MAX_READ);
        let in_flight = service.limits.in_flight.max(max_read as usize);
        Session {
            stream,
            incoming: Mutex::new(Incoming { receiving, alone: 0, over: false }),
            under_way: AtomicUsize::new(0),
            sending: Mutex::new(sending),
            opened,
            owner: &*service.owner,
            patience: service.limits.patience,
            max_read,
            budget: Budget::new(in_flight),
            failure: Mutex::new(None),
        }
    }

    /// Works with so many threads, of which the caller's is one, until the client has gone.
    pub(super) fn run(self, threads: usize) -> Result<(), ServeError> {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                let helper = std::thread::Builder::new().name("nbd".into());
                if helper.spawn_scoped(scope, || self.work()).is_err() {
                    // Slower is better than not at all.
                    break;
                }
            }
            self.work();
        });
        self.stream.close(&mut self.sending.lock());
        self.failure.into_inner().map_or(Ok(()), Err)
    }

    fn work(&self) {
        let _end = EndOnPanic(self.stream);
        let mut buffer = Buffer::default();
        loop {
            match self.turn(&mut buffer) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    self.failure.lock().get_or_insert(e);
                    self.stream.endpoint().shut_down();
                    return;
                }
            }
        }
    }

    /// Takes the place of who receives, and answers requests until it was left; false when no more come.
    fn turn(&self, buffer: &mut Buffer) -> Result<bool, ServeError> {
        let mut incoming = self.incoming.lock();
        loop {
            let Some((request, share)) = self.next(&mut incoming, buffer)? else { return Ok(false) };
            let others = self.under_way.fetch_add(1, Ordering::Relaxed);
            let is_alone = others == 0 && !incoming.receiving.has_more();
            incoming.alone = if is_alone { incoming.alone.saturating_add(1) } else { 0 };
            if incoming.alone < PROOF || !self.read_at_once(&request, buffer)? {
                drop(incoming);
                self.work_on(&request, share, buffer)?;
                return Ok(true);
            }
            if self.stream.endpoint().has_input() {
                incoming.alone = 0;
            }
        }
    }

    fn work_on(&self, request: &Request, share: Option<Share<'_>>, buffer: &mut Buffer) -> Result<(), ServeError> {
        let done = self.answer(request, buffer);
        if request.length as usize > KEPT {
            *buffer = Buffer::default();
        }
        drop(share);
        done
    }

    /// The next request, and room for what it reads. What it writes is in `buffer`.
    fn next(
        &self,
        incoming: &mut Incoming,
        buffer: &mut Buffer,
    ) -> Result<Option<(Request, Option<Share<'_>>)>, ServeError> {
        if incoming.over {
            return Ok(None);
        }
        // Whatever goes wrong below, nothing after it can be understood.
        incoming.over = true;
        let Some(bytes) = incoming.receiving.take::<REQUEST_LENGTH>(self.stream)? else { return Ok(None) };
        let request = Request::decode(&bytes)?;
        let share = match request.command {
            Command::Disconnect => return Ok(None),
            Command::Write => {
                if request.length > MAX_READ {
                    let (length, max) = (request.length.into(), MAX_READ.into());
                    return Err(Violation::TooLong { what: "a write", length, max }.into());
                }
                let length = request.length as usize;
                match self.check(&request) {
                    Ok(()) => {
                        let share = self.budget.take(length);
                        incoming.receiving.fill_with(self.stream, buffer.take(length))?;
                        Some(share)
                    }
                    Err(_) => {
                        incoming.receiving.skip(self.stream, length)?;
                        None
                    }
                }
            }
            Command::Read if request.length <= self.max_read => Some(self.budget.take(request.length as usize)),
            _ => None,
        };
        incoming.over = false;
        Ok(Some((request, share)))
    }

    fn answer(&self, request: &Request, buffer: &mut Buffer) -> Result<(), ServeError> {
        if let Err(errno) = self.check(request) {
            return self.refuse(request, errno);
        }
        let (disk, offset, length) = (&*self.opened.disk, request.offset, u64::from(request.length));
        let is_empty = length == 0;
        match request.command {
            Command::Read => self.read(request, buffer),
            Command::BlockStatus => self.block_status(request),
            Command::Write if is_empty => self.written(request, "write", Ok(())),
            Command::Write => self.written(request, "write", disk.write(offset, buffer.take(request.length as usize))),
            Command::WriteZeroes if is_empty => self.written(request, "make zeros of", Ok(())),
            // Blocks are never written in place, so room that is kept would be of no use to who asks for no hole.
            Command::WriteZeroes => self.written(request, "make zeros of", disk.zero(offset, length)),
            Command::Trim if is_empty => self.written(request, "trim", Ok(())),
            Command::Trim => self.written(request, "trim", disk.trim(offset, length)),
            Command::Flush => self.done(request, "flush", disk.flush()),
            Command::Cache if is_empty => self.simple(request, Errno::NONE),
            Command::Cache => self.done(request, "cache", disk.cache(offset, length)),
            Command::Disconnect | Command::Other(_) => self.simple(request, Errno::INVAL),
        }
    }

    /// Answers what has changed the disk; first it is made durable, if the client wants that.
    fn written(&self, request: &Request, action: &str, done: Result<(), DiskError>) -> Result<(), ServeError> {
        let durable = match request.flags.contains(CommandFlags::FUA) {
            true => done.and_then(|()| self.opened.disk.flush()),
            false => done,
        };
        self.done(request, action, durable)
    }

    fn done(&self, request: &Request, action: &str, done: Result<(), DiskError>) -> Result<(), ServeError> {
        match done {
            Ok(()) => self.simple(request, Errno::NONE),
            Err(e) => self.fail(request, action, &e),
        }
    }

    /// What is wrong with a request.
    fn check(&self, request: &Request) -> Result<(), Errno> {
        let agreed = self.opened.agreed;
        let is_writable = self.opened.disk.is_writable();
        let writes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && !is_writable {
            return Err(Errno::PERM);
        }
        let allowed = match request.command {
            Command::Read if !agreed.structured => CommandFlags::NONE,
            command => command.allowed(),
        };
        // Where it is offered at all, any command may have it.
        let allowed = if is_writable { allowed.with(CommandFlags::FUA) } else { allowed };
        if !allowed.contains(request.flags) {
            return Err(Errno::INVAL);
        }
        let end = request.offset.checked_add(request.length.into());
        let is_inside = end.is_some_and(|end| end <= self.opened.disk.length());
        let fits = match request.command {
            Command::Read => request.length <= self.max_read && is_inside,
            Command::Write | Command::WriteZeroes if !is_inside => return Err(Errno::NOSPC),
            Command::Write | Command::WriteZeroes => true,
            Command::Cache | Command::Trim => is_inside,
            Command::BlockStatus => (agreed.allocation || agreed.changes) && request.length > 0 && is_inside,
            Command::Flush => true,
            Command::Disconnect | Command::Other(_) => false,
        };
        if fits { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn read(&self, request: &Request, buffer: &mut Buffer) -> Result<(), ServeError> {
        let length = request.length as usize;
        if length == 0 {
            return match self.opened.agreed.structured {
                true => self.chunk(request, ChunkKind::None, &[]),
                false => self.simple(request, Errno::NONE),
            };
        }
        let disk = &*self.opened.disk;
        let offset = request.offset;
        if self.opened.agreed.structured && request.length >= WORTH_A_HOLE {
            match disk.stretches(offset, request.length.into(), 1) {
                Ok(found) if is_all_hole(&found, request.length) => {
                    let hole = Hole { offset, length: request.length };
                    self.chunk(request, ChunkKind::Hole, &hole.encode())?;
                    self.owner.sent(HOLE_LENGTH as u64);
                    return Ok(());
                }
                Ok(_) => {}
                Err(e) => return self.fail(request, "read", &e),
            }
        }
        let (reply, head) = self.reply_to_read(request, buffer);
        match disk.read(offset, &mut reply[head..]) {
            Ok(()) => self.send_data(reply, length),
            Err(e) => self.fail(request, "read", &e),
        }
    }

    /// Answers a short read, if that needs no waiting; false if it was not answered.
    fn read_at_once(&self, request: &Request, buffer: &mut Buffer) -> Result<bool, ServeError> {
        let is_short = (1..=AT_ONCE).contains(&request.length);
        if request.command != Command::Read || !is_short || self.check(request).is_err() {
            return Ok(false);
        }
        let (reply, head) = self.reply_to_read(request, buffer);
        match self.opened.disk.try_read(request.offset, &mut reply[head..]) {
            None => return Ok(false),
            Some(Ok(())) => self.send_data(reply, request.length as usize)?,
            Some(Err(e)) => self.fail(request, "read", &e)?,
        }
        Ok(true)
    }

    /// The reply to a read, without its data, and where these begin: it goes out in one piece.
    fn reply_to_read<'b>(&self, request: &Request, buffer: &'b mut Buffer) -> (&'b mut [u8], usize) {
        let (cookie, length) = (request.cookie, request.length as usize);
        let mut head = [0; CHUNK_LENGTH + OFFSET_LENGTH];
        let head = match self.opened.agreed.structured {
            true => {
                let length = u32::try_from(length + OFFSET_LENGTH).unwrap_or(u32::MAX);
                let chunk = Chunk { done: true, kind: ChunkKind::Data, cookie, length };
                head[..CHUNK_LENGTH].copy_from_slice(&Reply::Chunk(chunk).encode());
                head[CHUNK_LENGTH..].copy_from_slice(&request.offset.to_be_bytes());
                &head[..]
            }
            false => {
                head[..SIMPLE_LENGTH].copy_from_slice(&Reply::Simple { error: Errno::NONE, cookie }.encode());
                &head[..SIMPLE_LENGTH]
            }
        };
        let reply = buffer.take(head.len() + length);
        reply[..head.len()].copy_from_slice(head);
        (reply, head.len())
    }

    fn send_data(&self, reply: &[u8], length: usize) -> Result<(), ServeError> {
        self.send(reply)?;
        self.owner.sent(length as u64);
        Ok(())
    }

    fn block_status(&self, request: &Request) -> Result<(), ServeError> {
        let most = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { MAX_STRETCHES };
        let (agreed, disk) = (self.opened.agreed, &*self.opened.disk);
        let (offset, length) = (request.offset, u64::from(request.length));
        let mut known = Vec::with_capacity(2);
        if agreed.allocation {
            match disk.stretches(offset, length, most) {
                Ok(found) => {
                    known.push((ALLOCATION_ID, descriptors(found.iter().map(allocation), request.length, most)))
                }
                Err(e) => return self.fail(request, "find the holes of", &e),
            }
        }
        if agreed.changes {
            match disk.changes(offset, length, most) {
                Ok(found) => known.push((CHANGES_ID, descriptors(found.iter().map(change), request.length, most))),
                Err(e) => return self.fail(request, "find the changes of", &e),
            }
        }
        if known.iter().any(|(_, descriptors)| descriptors.is_empty()) {
            return self.fail(request, "look at", &DiskError::io("nothing is known of what is there"));
        }
        // All chunks at once, so that no other reply comes between them.
        let mut reply = Vec::new();
        let last = known.len() - 1;
        for (nth, (context, descriptors)) in known.into_iter().enumerate() {
            let payload = BlockStatus { context, descriptors }.encode();
            let (kind, cookie) = (ChunkKind::BlockStatus, request.cookie);
            let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            reply.extend(Reply::Chunk(Chunk { done: nth == last, kind, cookie, length }).encode());
            reply.extend(payload);
        }
        self.send(&reply)
    }

    /// Tells the client that it failed, and the owner why.
    fn fail(&self, request: &Request, action: &str, error: &DiskError) -> Result<(), ServeError> {
        let (name, offset) = (self.opened.disk.name(), request.offset);
        let end = offset.saturating_add(request.length.into());
        self.owner.failed(&format!("can't {action} bytes {offset} to {end} of {name}: {error}"));
        self.refuse(request, error.errno)
    }

    fn refuse(&self, request: &Request, error: Errno) -> Result<(), ServeError> {
        let in_chunks = matches!(request.command, Command::Read | Command::BlockStatus);
        match in_chunks && self.opened.agreed.structured {
            true => {
                let error = ErrorChunk { error, text: String::new(), offset: None };
                self.chunk(request, ChunkKind::Error, &error.encode())
            }
            false => self.simple(request, error),
        }
    }

    fn simple(&self, request: &Request, error: Errno) -> Result<(), ServeError> {
        self.send(&Reply::Simple { error, cookie: request.cookie }.encode())
    }

    /// A reply of one chunk.
    fn chunk(&self, request: &Request, kind: ChunkKind, payload: &[u8]) -> Result<(), ServeError> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut reply = Reply::Chunk(Chunk { done: true, kind, cookie: request.cookie, length }).encode();
        reply.extend(payload);
        self.send(&reply)
    }

    /// Sends the reply to a request.
    fn send(&self, reply: &[u8]) -> Result<(), ServeError> {
        // Before the client can know of it, and send the next.
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        self.stream.send(&mut self.sending.lock(), reply, self.patience)
    }
}

fn is_all_hole(found: &[Stretch], length: u32) -> bool {
    matches!(found, [Stretch { length: found, hole: true }, ..] if *found >= u64::from(length))
}

fn allocation(stretch: &Stretch) -> (u64, u32) {
    (stretch.length, if stretch.hole { state::HOLE | state::ZERO } else { 0 })
}

fn change(change: &Change) -> (u64, u32) {
    (change.length, if change.changed { state::DIRTY } else { 0 })
}

/// Lengths and flags as descriptors: neighbours that are alike become one, and nothing reaches beyond what was asked for.
fn descriptors(found: impl Iterator<Item = (u64, u32)>, length: u32, most: usize) -> Vec<Descriptor> {
    let mut descriptors: Vec<Descriptor> = Vec::new();
    let mut left = length;
    for (length, flags) in found {
        let length = u32::try_from(length).unwrap_or(u32::MAX).min(left);
        left -= length;
        let is_full = descriptors.len() == most;
        match descriptors.last_mut() {
            _ if length == 0 => break,
            Some(last) if last.flags == flags => last.length += length,
            _ if is_full => break,
            _ => descriptors.push(Descriptor { length, flags }),
        }
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_merged_and_cut() {
        let stretch = |length, hole| Stretch { length, hole };
        let found = [stretch(4, true), stretch(4, true), stretch(2, false), stretch(1 << 40, true)];
        let zero = state::HOLE | state::ZERO;
        let of = |length, flags| Descriptor { length, flags };
        let descriptors = |found: &[Stretch], length, most| descriptors(found.iter().map(allocation), length, most);
        assert_eq!(descriptors(&found, 100, 10), [of(8, zero), of(2, 0), of(90, zero)]);
        assert_eq!(descriptors(&found, 100, 1), [of(8, zero)]);
        assert_eq!(descriptors(&found, 6, 10), [of(6, zero)]);
        assert_eq!(descriptors(&found, 8, 10), [of(8, zero)]);
        assert_eq!(descriptors(&[], 8, 10), []);
    }

    #[test]
    fn only_a_hole_of_all_is_a_hole() {
        assert!(is_all_hole(&[Stretch { length: 8, hole: true }], 8));
        assert!(!is_all_hole(&[Stretch { length: 7, hole: true }], 8));
        assert!(!is_all_hole(&[Stretch { length: 8, hole: false }], 8));
        assert!(!is_all_hole(&[], 8));
    }
}
