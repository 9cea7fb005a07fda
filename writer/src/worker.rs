//! One thread's work on a unit: read, hash, have it looked up, compress what is needed.
//!
//! Where another site looks it up, that takes a while. The thread does not wait: it offers the next unit, and goes on with this
//! one when the answer is there.

use crossbeam_channel::{Receiver, Sender};
use reseal_format::frames::{DEFAULT_LEVEL, FrameEncoder, FrameShift};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, is_zero};
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;
use zeroize::Zeroizing;

use crate::BackupError;
use crate::judge::{ClusterHash, Judge, Verdict};
use crate::plan::{Task, Unit};
use crate::remote::{Answered, Asker, Next, Offered};
use crate::source::Still;
use reseal_nbd::{NbdError, Read};

/// Bytes of a disk on their way.
pub(crate) type Buffer = Zeroizing<Vec<u8>>;

/// How clusters become frames.
#[derive(Debug, Clone, Copy)]
pub struct Encoding {
    pub shift: FrameShift,
    pub level: i32,
}

impl Encoding {
    /// What reseal writes unless a measurement wants something else.
    pub const DEFAULT: Encoding = Encoding { shift: FrameShift::DEFAULT, level: DEFAULT_LEVEL };
}

/// What became of a cluster.
pub(crate) enum Cluster {
    /// All zeros.
    Hole,
    /// The same as the parent's.
    Unchanged(BlobRef),
    /// Changed, but the tenant has it already.
    Known(BlobRef),
    /// Not known; its frames, compressed.
    New { id: BlobId, frames: Vec<u8> },
}

/// What a worker has of the other side of ┃.
pub(crate) enum Right<'a> {
    /// It is in this process.
    Here(Judge<'a>),
    /// It is at another site.
    There(Asker<'a>),
}

impl Right<'_> {
    /// What is to be done next: a unit, or an answer. `None` when nothing more comes.
    fn next<T>(&mut self, units: &Receiver<T>) -> Option<Next<T>> {
        match self {
            Right::Here(_) => units.recv().ok().map(Next::Unit),
            Right::There(asker) => asker.next(units),
        }
    }
}

/// A unit whose clusters were looked at.
pub(crate) struct Done {
    pub unit: Unit,
    /// Bytes read.
    pub read: u64,
    /// None where another site has what is needed of them.
    pub clusters: Vec<Cluster>,
}

/// Where a worker gets units from.
pub(crate) enum Inbox<'a> {
    /// Units to read from where the disk lies.
    Still(Receiver<Unit>, &'a dyn Still),
    /// Units that were read from an NBD export, and where their buffers go back to.
    Nbd(Receiver<Result<Read<Unit>, NbdError>>, Sender<Buffer>),
}

/// What a thread keeps between units.
pub(crate) struct Worker<'a> {
    inbox: Inbox<'a>,
    buffer: Buffer,
    right: Right<'a>,
    encoder: FrameEncoder,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(inbox: Inbox<'a>, right: Right<'a>, encoding: Encoding) -> Result<Worker<'a>, BackupError> {
        let encoder = FrameEncoder::new(encoding.shift, encoding.level);
        let failed = |source| BackupError::Source { path: "zstd".into(), action: "get the working memory of", source };
        if let (Inbox::Nbd(_, pool), Right::There(_)) = (&inbox, &right) {
            // Nobody may wait for the one that this worker has in hand when it fails.
            let _ = pool.send(Buffer::default());
        }
        Ok(Worker { inbox, buffer: Buffer::default(), right, encoder: encoder.map_err(failed)? })
    }

    /// Does what is there to be done, until a unit is; `None` when there is none left.
    pub(crate) fn work(&mut self) -> Option<Result<Done, BackupError>> {
        loop {
            let done = match self.next()? {
                Ok(Next::Unit((unit, read))) => self.take_up(unit, read),
                Ok(Next::Answered(answered)) => self.send(answered).map(Some),
                Err(e) => Err(e),
            };
            if let Some(done) = done.transpose() {
                return Some(done);
            }
        }
    }

    /// An answer, or a unit and how much of it was read: it is in the buffer, which is empty if it is known to be a hole.
    fn next(&mut self) -> Option<Result<Next<(Unit, u64)>, BackupError>> {
        let unit = match &self.inbox {
            Inbox::Still(units, _) => match self.right.next(units)? {
                Next::Unit(unit) => self.read(unit).map(|read| (unit, read)),
                Next::Answered(answered) => return Some(Ok(Next::Answered(answered))),
            },
            Inbox::Nbd(filled, pool) => match self.right.next(filled)? {
                Next::Unit(Ok(read)) => {
                    let before = std::mem::replace(&mut self.buffer, read.buffer);
                    if let Right::Here(_) = self.right {
                        // The other end may have gone because nothing is left to read.
                        let _ = pool.send(before);
                    }
                    Ok((read.tag, self.buffer.len() as u64))
                }
                Next::Unit(Err(e)) => Err(e.into()),
                Next::Answered(answered) => return Some(Ok(Next::Answered(answered))),
            },
        };
        Some(unit.map(Next::Unit))
    }

    /// Reads a unit from where the disk lies.
    fn read(&mut self, unit: Unit) -> Result<u64, BackupError> {
        let Inbox::Still(_, disk) = &self.inbox else { return Err(BackupError::Thread) };
        let (at, length) = (unit.first * CLUSTER_U64, unit.length(disk.length()));
        // Zeros need not be read to be checked.
        let is_hole = unit.task == Task::Check && disk.is_hole(at, length)?;
        if let Right::There(asker) = &self.right {
            self.buffer = asker.buffer();
        }
        self.buffer.resize(if is_hole { 0 } else { length }, 0);
        disk.read_at(at, &mut self.buffer)?;
        Ok(length as u64)
    }

    /// Hashes the unit in the buffer, and decides about it, or has another site do so.
    fn take_up(&mut self, unit: Unit, read: u64) -> Result<Option<Done>, BackupError> {
        // The last cluster of a disk may be partly past its end, where it counts as zeros.
        let whole = self.buffer.len().next_multiple_of(CLUSTER);
        self.buffer.resize(whole, 0);
        let hashes: Vec<ClusterHash> = match whole {
            0 => (0..unit.count).map(|_| None).collect(),
            _ => self.buffer.chunks_exact(CLUSTER).map(hash).collect(),
        };
        let (encoder, buffer) = (&mut self.encoder, &self.buffer);
        match &mut self.right {
            Right::Here(judge) => {
                let known = judge.known();
                let verdicts = judge.judge(unit, &hashes, &mut |id| Ok(known.find(id)?))?;
                let become_of = |(nth, verdict)| match verdict {
                    Verdict::Hole => Cluster::Hole,
                    Verdict::Unchanged(place) => Cluster::Unchanged(place),
                    Verdict::Known(place) => Cluster::Known(place),
                    Verdict::Needed(id) => {
                        // Most clusters shrink to less than half; a larger one grows its vector once.
                        let mut frames = Vec::with_capacity(CLUSTER / 2);
                        encoder.encode(cluster(buffer, nth), &mut frames);
                        Cluster::New { id, frames }
                    }
                };
                let clusters = verdicts.into_iter().enumerate().map(become_of).collect();
                Ok(Some(Done { unit, read, clusters }))
            }
            Right::There(asker) => {
                let buffer = std::mem::take(&mut self.buffer);
                asker.offer(unit, read, buffer, &hashes)?;
                Ok(None)
            }
        }
    }

    /// Sends what is needed of a unit that was offered.
    fn send(&mut self, answered: Answered) -> Result<Done, BackupError> {
        let Right::There(asker) = &self.right else { return Err(BackupError::Thread) };
        let (encoder, Answered { offered, needed }) = (&mut self.encoder, answered);
        asker.send(&offered, needed, |nth, out| encoder.encode(cluster(&offered.buffer, nth), out))?;
        let Offered { unit, read, buffer, .. } = offered;
        match &self.inbox {
            Inbox::Still(..) => asker.give_back(buffer),
            Inbox::Nbd(_, pool) => drop(pool.send(buffer)),
        }
        Ok(Done { unit, read, clusters: Vec::new() })
    }
}

fn hash(bytes: &[u8]) -> ClusterHash {
    (!is_zero(bytes)).then(|| blake3::hash(bytes))
}

/// The nth cluster of a unit.
fn cluster(unit: &[u8], nth: usize) -> &[u8] {
    &unit[nth * CLUSTER..][..CLUSTER]
}
