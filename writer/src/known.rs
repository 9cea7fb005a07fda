//! Have we got it? The parent's cluster at the same place first, then the tenant's other packs.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use reseal_format::condemned::Condemned;
use reseal_format::geometry::{CLUSTER_U64, ClusterIndex, FANOUT, FANOUT_U64, cluster_count};
use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::manifest::Disk;
use reseal_vault::{Packs, Tree, VaultError, Wait};

use crate::changes::merged;
use crate::lookup::Lookup;

/// What a tenant has already. Shared by all threads of a backup.
pub(crate) struct Known {
    pub packs: Arc<Packs>,
    pub tree: Arc<Tree>,
    /// `None` where there is no lookup to be had: then only unchanged clusters are recognised.
    pub lookup: Option<Lookup>,
    /// Blobs that a verification found damaged: their id table is right, but they are not.
    pub damaged: HashSet<(PackId, u32)>,
    /// What a prune is about to remove.
    pub condemned: Condemned,
}

impl Known {
    /// Whether the blob there has that id. What can't be read, or was found damaged, is not known: it will be stored
    /// again, so that points from then on are whole. Only a backup that can't have the tenant's new keys must not go on.
    fn confirms(&self, place: BlobRef, id: &BlobId) -> Result<bool, VaultError> {
        if self.damaged.contains(&(place.pack, place.ordinal)) {
            return Ok(false);
        }
        match self.packs.blob_id(place) {
            Err(e @ VaultError::NoNewKeys { .. }) => Err(e),
            found => Ok(found.is_ok_and(|found| found.as_ref() == Some(id))),
        }
    }

    /// Bytes of a disk that may not be taken as a restore point maps them, for what they map to was found damaged, or can't
    /// be looked up. Costs nothing where no damage is known.
    pub(crate) fn not_to_be_kept(&self, disk: &Disk) -> Result<Vec<Range<u64>>, VaultError> {
        let mut areas: Vec<Range<u64>> = Vec::new();
        if self.damaged.is_empty() {
            return Ok(areas);
        }
        let clusters = cluster_count(disk.length);
        for leaf in 0..clusters.div_ceil(FANOUT_U64) {
            let first = leaf * FANOUT_U64;
            match self.tree.leaf(disk, leaf, Wait::May) {
                Ok(None) => {}
                Ok(Some(node)) => {
                    let hurt = |blob: BlobRef| self.damaged.contains(&(blob.pack, blob.ordinal));
                    let hurt = (0..FANOUT).zip(first..).filter(|&(slot, _)| node.get(slot).is_some_and(hurt));
                    areas.extend(hurt.map(|(_, cluster)| cluster * CLUSTER_U64..(cluster + 1) * CLUSTER_U64));
                }
                Err(e) if e.damaged_object().is_some() => {
                    areas.push(first * CLUSTER_U64..(first + FANOUT_U64) * CLUSTER_U64);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(merged(areas))
    }

    /// A blob of that id in any pack of the tenant.
    pub(crate) fn find(&self, id: &BlobId) -> Result<Option<BlobRef>, VaultError> {
        self.find_where(id, |_| true)
    }

    /// The same among places that count.
    pub(crate) fn find_where(
        &self,
        id: &BlobId,
        counts: impl FnOnce(BlobRef) -> bool,
    ) -> Result<Option<BlobRef>, VaultError> {
        let found = self.lookup.as_ref().and_then(|lookup| lookup.find(id).ok().flatten());
        let stays = |place: &BlobRef| !self.condemned.contains(place.pack, place.ordinal);
        let Some(place) = found.filter(stays).filter(|place| counts(*place)) else { return Ok(None) };
        Ok(self.confirms(place, id)?.then_some(place))
    }
}

/// The same disk in the parent, seen by one thread, which goes through it in order.
pub(crate) struct ParentDisk<'a> {
    known: &'a Known,
    disk: Option<&'a Disk>,
    leaf: Option<(u64, Option<Arc<IndexNode>>)>,
}

impl<'a> ParentDisk<'a> {
    pub(crate) fn new(known: &'a Known, disk: Option<&'a Disk>) -> ParentDisk<'a> {
        ParentDisk { known, disk, leaf: None }
    }

    /// The parent's blob of a cluster; `None` if that was a hole, or there was no such disk or cluster.
    pub(crate) fn blob(&mut self, cluster: ClusterIndex) -> Result<Option<BlobRef>, VaultError> {
        let Some(disk) = self.disk else { return Ok(None) };
        let number = cluster.leaf();
        if self.leaf.as_ref().is_none_or(|(leaf, _)| *leaf != number) {
            self.leaf = Some((number, self.read_leaf(disk, cluster)?));
        }
        let leaf = self.leaf.as_ref().and_then(|(_, leaf)| leaf.as_ref());
        Ok(leaf.and_then(|leaf| leaf.get(cluster.slot(0))))
    }

    /// A damaged index of the parent must not stop the next backup: its clusters count as not known.
    fn read_leaf(&self, disk: &Disk, cluster: ClusterIndex) -> Result<Option<Arc<IndexNode>>, VaultError> {
        if cluster.first_byte() >= disk.length {
            return Ok(None);
        }
        match self.known.tree.leaf(disk, cluster.leaf(), Wait::May) {
            Err(e) if e.damaged_object().is_some() => Ok(None),
            other => other,
        }
    }

    /// Whether the parent's blob there has that id.
    pub(crate) fn confirms(&self, place: BlobRef, id: &BlobId) -> Result<bool, VaultError> {
        self.known.confirms(place, id)
    }
}
