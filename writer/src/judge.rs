//! What becomes of clusters whose hashes are known: they are as the parent has them, the tenant has them, or they are needed.
//!
//! Right of ┃, for ids are keyed: a site that sends asks another for this, and is then told no more than what is needed.

use reseal_format::geometry::ClusterIndex;
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;

use crate::BackupError;
use crate::known::{Known, ParentDisk};
use crate::plan::{Task, Unit};

/// BLAKE3 of a cluster; `None` for one that is all zeros.
pub(crate) type ClusterHash = Option<blake3::Hash>;

/// What is to become of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All zeros.
    Hole,
    /// The same as the parent's.
    Unchanged(BlobRef),
    /// Changed, but it is there already.
    Known(BlobRef),
    /// Its content is needed.
    Needed(BlobId),
}

/// Where a cluster that is not the parent's may be found. `None` if nowhere.
pub(crate) type Find<'a> = dyn FnMut(&BlobId) -> Result<Option<BlobRef>, BackupError> + 'a;

/// Decides about the clusters of one disk, in order.
pub(crate) struct Judge<'a> {
    known: &'a Known,
    parent: ParentDisk<'a>,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(known: &'a Known, parent: ParentDisk<'a>) -> Judge<'a> {
        Judge { known, parent }
    }

    pub(crate) fn known(&self) -> &'a Known {
        self.known
    }

    /// Decides about the clusters of a unit, whose task is to read or to check.
    pub(crate) fn judge(
        &mut self,
        unit: Unit,
        hashes: &[ClusterHash],
        find: &mut Find<'_>,
    ) -> Result<Vec<Verdict>, BackupError> {
        let clusters = hashes.iter().zip(unit.first..).map(|(hash, at)| (hash.as_ref(), ClusterIndex(at)));
        match unit.task {
            Task::Check => clusters.map(|(hash, at)| self.check(at, hash)).collect(),
            _ => clusters.map(|(hash, at)| self.decide(at, hash, find)).collect(),
        }
    }

    fn id(&self, hash: &blake3::Hash) -> BlobId {
        self.known.packs.tenant().keys().dedup().blob_id(hash)
    }

    fn decide(
        &mut self,
        cluster: ClusterIndex,
        hash: Option<&blake3::Hash>,
        find: &mut Find<'_>,
    ) -> Result<Verdict, BackupError> {
        let Some(hash) = hash else { return Ok(Verdict::Hole) };
        let id = self.id(hash);
        if let Some(place) = self.parent.blob(cluster)?
            && self.parent.confirms(place, &id)?
        {
            return Ok(Verdict::Unchanged(place));
        }
        Ok(find(&id)?.map_or(Verdict::Needed(id), Verdict::Known))
    }

    /// Decides about a cluster that is said to be as the parent has it.
    fn check(&mut self, cluster: ClusterIndex, hash: Option<&blake3::Hash>) -> Result<Verdict, BackupError> {
        let before = self.parent.blob(cluster)?;
        let found = match hash {
            None => before.is_none().then_some(Verdict::Hole),
            Some(hash) => match before {
                Some(place) if self.parent.confirms(place, &self.id(hash))? => Some(Verdict::Unchanged(place)),
                _ => None,
            },
        };
        found.ok_or_else(|| BackupError::Distrusted {
            why: format!("the bytes from {} on, said to be unchanged, are others", cluster.first_byte()),
        })
    }
}
