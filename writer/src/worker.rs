//! One thread's work on a unit: read, hash, look up, compress.

use reseal_format::frames::{DEFAULT_LEVEL, FrameEncoder, FrameShift};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, ClusterIndex, is_zero};
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;
use zeroize::Zeroizing;

use crate::BackupError;
use crate::known::{Known, ParentDisk};
use crate::plan::{UNIT, Unit};
use crate::source::Source;

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

/// What a thread keeps between units.
pub(crate) struct Worker<'a> {
    source: &'a Source,
    buffer: Zeroizing<Vec<u8>>,
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
        source: &'a Source,
        known: &'a Known,
        parent: ParentDisk<'a>,
        encoding: Encoding,
    ) -> Result<Worker<'a>, BackupError> {
        let encoder = FrameEncoder::new(encoding.shift, encoding.level);
        let failed = |source| BackupError::Source { path: "zstd".into(), action: "get the working memory of", source };
        let buffer = Zeroizing::new(vec![0; CLUSTER * usize::try_from(UNIT).unwrap_or(1)]);
        let decider = Decider { known, parent, encoder: encoder.map_err(failed)? };
        Ok(Worker { source, buffer, decider })
    }

    /// Reads a unit and decides about each of its clusters.
    pub(crate) fn work(&mut self, unit: Unit) -> Result<Done, BackupError> {
        let start = unit.first * CLUSTER_U64;
        let read = (unit.count * CLUSTER_U64).min(self.source.length() - start);
        let length = usize::try_from(read).unwrap_or(usize::MAX);
        self.source.read_at(start, &mut self.buffer[..length])?;
        // The last cluster of a disk may be partly past its end, where it counts as zeros.
        let whole = length.next_multiple_of(CLUSTER);
        self.buffer[length..whole].fill(0);
        let Worker { buffer, decider, .. } = self;
        let clusters = buffer[..whole].chunks_exact(CLUSTER).zip(unit.first..);
        let clusters: Result<Vec<_>, _> =
            clusters.map(|(bytes, cluster)| decider.decide(ClusterIndex(cluster), bytes)).collect();
        Ok(Done { unit, read, clusters: clusters? })
    }
}

impl Decider<'_> {
    fn decide(&mut self, cluster: ClusterIndex, bytes: &[u8]) -> Result<Cluster, BackupError> {
        if is_zero(bytes) {
            return Ok(Cluster::Hole);
        }
        let id = self.known.packs.tenant().keys().dedup().id_of(bytes);
        if let Some(place) = self.parent.blob(cluster)?
            && self.parent.confirms(place, &id)
        {
            return Ok(Cluster::Unchanged(place));
        }
        if let Some(place) = self.known.find(&id) {
            return Ok(Cluster::Known(place));
        }
        // Most clusters shrink to less than half; a larger one grows its vector once.
        let mut frames = Vec::with_capacity(CLUSTER / 2);
        self.encoder.encode(bytes, &mut frames);
        Ok(Cluster::New { id, frames })
    }
}
