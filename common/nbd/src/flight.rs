//! What is under way on a connection, and what of it has arrived.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use crossbeam_channel::Sender;
use reseal_proto::nbd::{BlockStatus, Command, CommandFlags, Descriptor, Request as WireRequest};

use crate::connection::Facts;
use crate::coverage::{Coverage, Misfit};
use crate::extents::Area;
use crate::{Extent, NbdError, Read, Request};

/// Bytes that are asked for at once: larger requests go through the caches of the processor, smaller ones cost more messages.
const PIECE: usize = 256 << 10;
/// How often a connection may break with the same request under way, before it counts as the reason.
pub(crate) const MAX_TRIES: u32 = 10;

/// A request of the caller, until it is answered.
pub(crate) enum Job<T> {
    Read {
        read: Read<T>,
        /// Pieces that are not there yet.
        left: usize,
        /// What became of a piece that the server could not read.
        failed: Option<NbdError>,
    },
    Status {
        area: Area,
        answer: Sender<Result<Vec<Extent>, NbdError>>,
    },
}

/// Part of a job: what one request asks.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) job: usize,
    pub(crate) ask: Ask,
    /// How many connections were lost with it.
    pub(crate) tries: u32,
    /// Why the server can't do it; its reply may still have more chunks.
    failed: Option<NbdError>,
}

#[derive(Debug)]
pub(crate) enum Ask {
    /// Bytes of the job's buffer.
    Data {
        range: Range<usize>,
        offset: u64,
        arrived: Coverage,
    },
    Status {
        offset: u64,
        length: u32,
        allocation: Option<Vec<Descriptor>>,
        dirty: Option<Vec<Descriptor>>,
    },
}

impl Ask {
    /// Bytes of the export that it is about, for messages.
    pub(crate) fn bytes(&self) -> Range<u64> {
        match self {
            Ask::Data { range, offset, .. } => *offset..*offset + range.len() as u64,
            Ask::Status { offset, length, .. } => *offset..*offset + u64::from(*length),
        }
    }

    pub(crate) fn action(&self) -> &'static str {
        match self {
            Ask::Data { .. } => "read",
            Ask::Status { .. } => "say what is in",
        }
    }
}

/// All that a pump has taken and not answered.
pub(crate) struct Flights<T> {
    jobs: Vec<Option<Job<T>>>,
    free: Vec<usize>,
    /// Not sent yet, or to be sent again.
    waiting: VecDeque<Piece>,
    under_way: HashMap<u64, Piece>,
    next_cookie: u64,
}

/// What a server can't mean.
pub(crate) type Nonsense = String;

impl<T> Flights<T> {
    pub(crate) fn new() -> Flights<T> {
        Flights {
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            under_way: HashMap::new(),
            next_cookie: 1,
        }
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes a request of the caller, which lies inside of the export. Returns it where no question is needed.
    pub(crate) fn take(&mut self, request: Request<T>, facts: &Facts, contexts: bool) -> Option<Job<T>> {
        match request {
            Request::Read(read) => {
                let minimum = facts.block_size.minimum;
                let most = facts.block_size.maximum - facts.block_size.maximum % minimum;
                let step = PIECE.min(usize::try_from(most).unwrap_or(PIECE));
                let (offset, length) = (read.offset, read.buffer.len());
                if length == 0 {
                    return Some(Job::Read { read, left: 0, failed: None });
                }
                let job = self.keep(Job::Read { read, left: length.div_ceil(step), failed: None });
                for start in (0..length).step_by(step) {
                    let range = start..length.min(start + step);
                    let offset = offset + start as u64;
                    let ask = Ask::Data { range, offset, arrived: Coverage::default() };
                    self.waiting.push_back(Piece { job, ask, tries: 0, failed: None });
                }
            }
            Request::Status { offset, length, answer } => {
                let area = Area::new(offset, length, facts.block_size.minimum);
                if !contexts {
                    return Some(Job::Status { area, answer });
                }
                let job = self.keep(Job::Status { area, answer });
                let ask = Ask::Status { offset: area.start, length: area.asked, allocation: None, dirty: None };
                self.waiting.push_back(Piece { job, ask, tries: 0, failed: None });
            }
        }
        None
    }

    fn keep(&mut self, job: Job<T>) -> usize {
        match self.free.pop() {
            Some(slot) => {
                self.jobs[slot] = Some(job);
                slot
            }
            None => {
                self.jobs.push(Some(job));
                self.jobs.len() - 1
            }
        }
    }

    /// Appends the next request to `out` and counts it as under way.
    pub(crate) fn send_next(&mut self, out: &mut Vec<u8>) {
        let Some(piece) = self.waiting.pop_front() else { return };
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let (command, bytes) = match &piece.ask {
            Ask::Data { .. } => (Command::Read, piece.ask.bytes()),
            Ask::Status { .. } => (Command::BlockStatus, piece.ask.bytes()),
        };
        // A piece has at most PIECE bytes, an area less than 4 GiB.
        let length = u32::try_from(bytes.end - bytes.start).unwrap_or(u32::MAX);
        let request = WireRequest { command, flags: CommandFlags::NONE, cookie, offset: bytes.start, length };
        out.extend(request.encode());
        self.under_way.insert(cookie, piece);
    }

    /// What a reply belongs to.
    pub(crate) fn piece(&self, cookie: u64) -> Result<&Piece, Nonsense> {
        self.under_way.get(&cookie).ok_or_else(|| format!("a reply to a request that was not sent (handle {cookie})"))
    }

    /// The buffer where `length` bytes from `offset` on belong, which have not come before.
    pub(crate) fn place(&mut self, cookie: u64, offset: u64, length: u64) -> Result<&mut [u8], Nonsense> {
        self.piece(cookie)?;
        let Some(Piece { job, ask: Ask::Data { range, offset: from, arrived }, .. }) = self.under_way.get_mut(&cookie)
        else {
            return Err("data in the reply to a question about extents".into());
        };
        let asked = range.len() as u64;
        let inside = offset.checked_sub(*from).filter(|start| *start <= asked && length <= asked - start);
        let part = inside.and_then(|start| Some((usize::try_from(start).ok()?, usize::try_from(length).ok()?)));
        let Some((start, length)) = part else {
            return Err(format!(
                "{length} bytes from {offset} on, in the reply to a read of bytes {from} to {}",
                *from + asked
            ));
        };
        arrived.add(start..start + length).map_err(|misfit| match misfit {
            Misfit::Overlap => format!("the {length} bytes from {offset} on came twice"),
            Misfit::TooManyPieces => "a read was answered in too many small pieces".to_owned(),
        })?;
        let (start, end) = (range.start + start, range.start + start + length);
        match self.jobs.get_mut(*job) {
            Some(Some(Job::Read { read, .. })) => {
                read.buffer.get_mut(start..end).ok_or_else(|| "bytes outside of the buffer".to_owned())
            }
            _ => Err("data for a request that is over".into()),
        }
    }

    /// Takes what one context says. `allocation` and `dirty` are the numbers of the contexts.
    pub(crate) fn status(
        &mut self,
        cookie: u64,
        status: BlockStatus,
        (allocation, dirty): (Option<u32>, Option<u32>),
        facts: &Facts,
    ) -> Result<(), Nonsense> {
        self.piece(cookie)?;
        let Some(Piece { job, ask: Ask::Status { allocation: first, dirty: second, .. }, .. }) =
            self.under_way.get_mut(&cookie)
        else {
            return Err("extents in the reply to a read".into());
        };
        let place = match Some(status.context) {
            id if id == allocation => first,
            id if id == dirty => second,
            _ => return Err(format!("extents of the context {}, which was not selected", status.context)),
        };
        let Some(Some(Job::Status { area, .. })) = self.jobs.get(*job) else {
            return Err("extents for a request that is over".into());
        };
        area.check(&status.descriptors, facts.block_size.minimum, facts.size)?;
        match place.replace(status.descriptors) {
            None => Ok(()),
            Some(_) => Err("the extents of a context came twice".into()),
        }
    }

    /// The server can't do that.
    pub(crate) fn fail(&mut self, cookie: u64, error: NbdError) -> Result<(), Nonsense> {
        self.piece(cookie)?;
        if let Some(piece) = self.under_way.get_mut(&cookie) {
            piece.failed.get_or_insert(error);
        }
        Ok(())
    }

    /// A reply is complete: checks that, and returns the job if it is.
    pub(crate) fn finish(&mut self, cookie: u64, contexts: (bool, bool)) -> Result<Option<Done<T>>, Nonsense> {
        self.piece(cookie)?;
        let Some(piece) = self.under_way.remove(&cookie) else { return Ok(None) };
        match piece.ask {
            Ask::Data { range, arrived, .. } => {
                if piece.failed.is_none() && !arrived.is_whole(range.len()) {
                    return Err("a read was answered without all of its bytes".into());
                }
                if let Some(Some(Job::Read { left, failed, .. })) = self.jobs.get_mut(piece.job) {
                    *left -= 1;
                    *failed = failed.take().or(piece.failed);
                    if *left > 0 {
                        return Ok(None);
                    }
                }
                match self.release(piece.job) {
                    Some(Job::Read { read, failed: None, .. }) => Ok(Some(Done::Read(read))),
                    Some(Job::Read { read, failed: Some(error), .. }) => Ok(Some(Done::Failed(read.tag, error))),
                    _ => Ok(None),
                }
            }
            Ask::Status { allocation, dirty, .. } => {
                if piece.failed.is_none() && (allocation.is_some(), dirty.is_some()) != contexts {
                    return Err("a question about extents was answered without those of every context".into());
                }
                match self.release(piece.job) {
                    Some(Job::Status { area, answer }) => {
                        let extents = || area.extents(allocation.as_deref(), dirty.as_deref());
                        Ok(Some(Done::Status(piece.failed.map_or_else(|| Ok(extents()), Err), answer)))
                    }
                    _ => Ok(None),
                }
            }
        }
    }

    fn release(&mut self, slot: usize) -> Option<Job<T>> {
        let job = self.jobs.get_mut(slot).and_then(Option::take);
        if job.is_some() {
            self.free.push(slot);
        }
        job
    }

    /// The connection is gone: all that was under way has to be sent again, in its old order. An error names what has been
    /// under way too often.
    pub(crate) fn send_again(&mut self) -> Result<(), Range<u64>> {
        let mut again: Vec<_> = self.under_way.drain().collect();
        again.sort_by_key(|(cookie, _)| *cookie);
        again.iter_mut().for_each(|(_, piece)| piece.tries += 1);
        // The first is the one that the server was at.
        if let Some((_, piece)) = again.iter().find(|(_, piece)| piece.tries >= MAX_TRIES) {
            return Err(piece.ask.bytes());
        }
        for (_, mut piece) in again.into_iter().rev() {
            piece.failed = None;
            match &mut piece.ask {
                Ask::Data { arrived, .. } => *arrived = Coverage::default(),
                Ask::Status { allocation, dirty, .. } => (*allocation, *dirty) = (None, None),
            }
            self.waiting.push_front(piece);
        }
        Ok(())
    }

    /// Who waits for extents.
    pub(crate) fn askers(&mut self) -> Vec<Sender<Result<Vec<Extent>, NbdError>>> {
        let jobs = self.jobs.drain(..).flatten();
        jobs.filter_map(|job| if let Job::Status { answer, .. } = job { Some(answer) } else { None }).collect()
    }
}

/// A job that is answered.
pub(crate) enum Done<T> {
    Read(Read<T>),
    Failed(T, NbdError),
    Status(Result<Vec<Extent>, NbdError>, Sender<Result<Vec<Extent>, NbdError>>),
}
