//! One thread's work on a unit: read, hash, look up, compress.

use crossbeam_channel::{Receiver, Sender};
use reseal_format::frames::{DEFAULT_LEVEL, FrameEncoder, FrameShift};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, ClusterIndex, is_zero};
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;
use zeroize::Zeroizing;

use crate::BackupError;
use crate::known::{Known, ParentDisk};
use crate::nbd::{NbdError, Read};
use crate::plan::{Task, Unit};
use crate::source::FileSource;

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

/// A unit whose clusters were looked at.
pub(crate) struct Done {
    pub unit: Unit,
    /// Bytes read.
    pub read: u64,
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
    decider: Decider<'a>,
}

/// Decides about one cluster after the other.
struct Decider<'a> {
    known: &'a Known,
    parent: ParentDisk<'a>,
    encoder: FrameEncoder,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        inbox: Inbox<'a>,
        known: &'a Known,
        parent: ParentDisk<'a>,
        encoding: Encoding,
    ) -> Result<Worker<'a>, BackupError> {
        let encoder = FrameEncoder::new(encoding.shift, encoding.level);
        let failed = |source| BackupError::Source { path: "zstd".into(), action: "get the working memory of", source };
        let decider = Decider { known, parent, encoder: encoder.map_err(failed)? };
        Ok(Worker { inbox, buffer: Buffer::default(), decider })
    }

    /// Gets the next unit and decides about each of its clusters; `None` when there is none left.
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
        Some(self.decide(unit))
    }

    /// Decides about clusters that are said to be unchanged and are a hole: zeros need not be read to be checked.
    fn check_hole(&mut self, unit: Unit, length: u64) -> Result<Done, BackupError> {
        let clusters = (unit.first..unit.first + unit.count).map(|at| self.decider.check_zeros(ClusterIndex(at)));
        Ok(Done { unit, read: unit.length(length) as u64, clusters: clusters.collect::<Result<_, _>>()? })
    }

    fn decide(&mut self, unit: Unit) -> Result<Done, BackupError> {
        let read = self.buffer.len() as u64;
        // The last cluster of a disk may be partly past its end, where it counts as zeros.
        let whole = self.buffer.len().next_multiple_of(CLUSTER);
        self.buffer.resize(whole, 0);
        let mut clusters = Vec::with_capacity(usize::try_from(unit.count).unwrap_or(0));
        for (bytes, at) in self.buffer.chunks_exact(CLUSTER).zip(unit.first..) {
            let at = ClusterIndex(at);
            clusters.push(match unit.task {
                Task::Check => self.decider.check(at, bytes)?,
                _ => self.decider.decide(at, bytes)?,
            });
        }
        Ok(Done { unit, read, clusters })
    }
}

impl Decider<'_> {
    fn decide(&mut self, cluster: ClusterIndex, bytes: &[u8]) -> Result<Cluster, BackupError> {
        if is_zero(bytes) {
            return Ok(Cluster::Hole);
        }
        let id = self.known.packs.tenant().keys().dedup().id_of(bytes);
        if let Some(place) = self.parent.blob(cluster)?
            && self.parent.confirms(place, &id)?
        {
            return Ok(Cluster::Unchanged(place));
        }
        if let Some(place) = self.known.find(&id)? {
            return Ok(Cluster::Known(place));
        }
        // Most clusters shrink to less than half; a larger one grows its vector once.
        let mut frames = Vec::with_capacity(CLUSTER / 2);
        self.encoder.encode(bytes, &mut frames);
        Ok(Cluster::New { id, frames })
    }

    /// Decides about a cluster that is said to be as the parent has it.
    fn check(&mut self, cluster: ClusterIndex, bytes: &[u8]) -> Result<Cluster, BackupError> {
        if is_zero(bytes) {
            return self.check_zeros(cluster);
        }
        let id = self.known.packs.tenant().keys().dedup().id_of(bytes);
        match self.parent.blob(cluster)? {
            Some(place) if self.parent.confirms(place, &id)? => Ok(Cluster::Unchanged(place)),
            _ => Err(distrusted(cluster)),
        }
    }

    /// The same for one of zeros.
    fn check_zeros(&mut self, cluster: ClusterIndex) -> Result<Cluster, BackupError> {
        match self.parent.blob(cluster)? {
            None => Ok(Cluster::Hole),
            Some(_) => Err(distrusted(cluster)),
        }
    }
}

fn distrusted(cluster: ClusterIndex) -> BackupError {
    BackupError::Distrusted {
        why: format!("the bytes from {} on, said to be unchanged, are others", cluster.first_byte()),
    }
}
