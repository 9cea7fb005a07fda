//! One thread's work on a unit: read, hash, have it looked up, compress what is needed.

use crossbeam_channel::{Receiver, Sender};
use reseal_format::frames::{DEFAULT_LEVEL, FrameEncoder, FrameShift};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, is_zero};
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;
use zeroize::Zeroizing;

use crate::BackupError;
use crate::judge::{ClusterHash, Judge, Verdict};
use crate::plan::{Task, Unit};
use crate::remote::Asker;
use crate::source::FileSource;
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
    /// Units to read from a file.
    File(Receiver<Unit>, &'a FileSource),
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
        Ok(Worker { inbox, buffer: Buffer::default(), right, encoder: encoder.map_err(failed)? })
    }

    /// Gets the next unit and does what there is to do about each of its clusters; `None` when there is none left.
    pub(crate) fn work(&mut self) -> Option<Result<Done, BackupError>> {
        let unit = match &self.inbox {
            Inbox::File(units, file) => {
                let unit = units.recv().ok()?;
                if unit.task == Task::Check {
                    match file.is_hole(unit.first * CLUSTER_U64, unit.length(file.length())) {
                        Ok(true) => return Some(self.check_hole(unit, file.length())),
                        Ok(false) => {}
                        Err(e) => return Some(Err(e)),
                    }
                }
                self.buffer.resize(unit.length(file.length()), 0);
                if let Err(e) = file.read_at(unit.first * CLUSTER_U64, &mut self.buffer) {
                    return Some(Err(e));
                }
                unit
            }
            Inbox::Nbd(filled, pool) => match filled.recv().ok()? {
                Ok(read) => {
                    // The other end may have gone because nothing is left to read.
                    let _ = pool.send(std::mem::replace(&mut self.buffer, read.buffer));
                    read.tag
                }
                Err(e) => return Some(Err(e.into())),
            },
        };
        Some(self.hash_and_decide(unit))
    }

    /// Decides about clusters that are said to be unchanged and are a hole: zeros need not be read to be checked.
    fn check_hole(&mut self, unit: Unit, length: u64) -> Result<Done, BackupError> {
        let hashes: Vec<ClusterHash> = (0..unit.count).map(|_| None).collect();
        self.decide(unit, unit.length(length) as u64, &hashes)
    }

    fn hash_and_decide(&mut self, unit: Unit) -> Result<Done, BackupError> {
        let read = self.buffer.len() as u64;
        // The last cluster of a disk may be partly past its end, where it counts as zeros.
        let whole = self.buffer.len().next_multiple_of(CLUSTER);
        self.buffer.resize(whole, 0);
        let hashes: Vec<_> = self.buffer.chunks_exact(CLUSTER).map(hash).collect();
        self.decide(unit, read, &hashes)
    }

    /// Decides by the hashes. The buffer holds those clusters that are no holes, each at its place in the unit.
    fn decide(&mut self, unit: Unit, read: u64, hashes: &[ClusterHash]) -> Result<Done, BackupError> {
        let (encoder, buffer) = (&mut self.encoder, &self.buffer);
        let clusters = match &mut self.right {
            Right::Here(judge) => {
                let known = judge.known();
                let verdicts = judge.judge(unit, hashes, &mut |id| Ok(known.find(id)?))?;
                let become_of = |(nth, verdict)| match verdict {
                    Verdict::Hole => Cluster::Hole,
                    Verdict::Unchanged(place) => Cluster::Unchanged(place),
                    Verdict::Known(place) => Cluster::Known(place),
                    Verdict::Needed(id) => Cluster::New { id, frames: encode(encoder, buffer, nth) },
                };
                verdicts.into_iter().enumerate().map(become_of).collect()
            }
            Right::There(asker) => {
                let needed = asker.offer(unit, hashes)?;
                let needed = (0..hashes.len()).filter(|nth| needed >> nth & 1 == 1);
                let frames: Vec<_> = needed.map(|nth| encode(encoder, buffer, nth)).collect();
                if !frames.is_empty() {
                    asker.send(unit, frames)?;
                }
                Vec::new()
            }
        };
        Ok(Done { unit, read, clusters })
    }
}

fn hash(bytes: &[u8]) -> ClusterHash {
    (!is_zero(bytes)).then(|| blake3::hash(bytes))
}

/// Compresses the nth cluster of a unit.
fn encode(encoder: &mut FrameEncoder, unit: &[u8], nth: usize) -> Vec<u8> {
    // Most clusters shrink to less than half; a larger one grows its vector once.
    let mut frames = Vec::with_capacity(CLUSTER / 2);
    encoder.encode(&unit[nth * CLUSTER..][..CLUSTER], &mut frames);
    frames
}
