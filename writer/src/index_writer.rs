//! Builds a disk's index from its clusters, in order. A node that maps the same as the parent's is not written again.

use reseal_format::geometry::{ClusterIndex, FANOUT, FANOUT_U64, clusters_below, root_level};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::{Disk, Root};
use reseal_vault::{PackWriter, Tenant, VaultError, Wait};
use std::sync::Arc;

use crate::BackupError;
use crate::finisher::Finisher;
use crate::known::Known;

/// Seals index nodes into packs. One for all disks of a restore point.
pub(crate) struct NodeStore {
    tenant: Arc<Tenant>,
    writer: PackWriter,
}

impl NodeStore {
    pub(crate) fn new(tenant: Arc<Tenant>) -> NodeStore {
        NodeStore { writer: PackWriter::new(tenant.clone(), Kind::IndexPack), tenant }
    }

    fn write(&mut self, node: &IndexNode, finisher: &Finisher) -> Result<BlobRef, BackupError> {
        let plain = node.encode();
        let id = self.tenant.keys().dedup().id_of(&plain);
        let failed = |source| BackupError::Source { path: "an index node".into(), action: "compress", source };
        let mut content = IndexNode::compress(&plain).map_err(failed)?;
        let (place, full) = self.writer.add(id, &mut content)?;
        if let Some(pack) = full {
            finisher.submit(pack, false)?;
        }
        Ok(place)
    }

    /// Hands over the pack that is not full.
    pub(crate) fn close(&mut self, finisher: &Finisher) -> Result<(), BackupError> {
        match self.writer.take_last() {
            Some(pack) => finisher.submit(pack, false),
            None => Ok(()),
        }
    }
}

/// The node of a level that is being filled.
struct Open {
    /// Counted from the start of the disk.
    number: u64,
    children: Vec<Option<BlobRef>>,
}

/// Builds the index of one disk.
pub(crate) struct IndexWriter<'a> {
    known: &'a Known,
    parent: Option<&'a Disk>,
    open: Vec<Open>,
    root: Option<BlobRef>,
    used: u64,
}

impl<'a> IndexWriter<'a> {
    pub(crate) fn new(known: &'a Known, parent: Option<&'a Disk>, length: u64) -> IndexWriter<'a> {
        let open = || Open { number: 0, children: vec![None; FANOUT] };
        IndexWriter { known, parent, open: (0..=root_level(length)).map(|_| open()).collect(), root: None, used: 0 }
    }

    /// Maps a cluster that is no hole. Clusters come in ascending order.
    pub(crate) fn set(
        &mut self,
        cluster: ClusterIndex,
        place: BlobRef,
        nodes: &mut NodeStore,
        finisher: &Finisher,
    ) -> Result<(), BackupError> {
        self.used += 1;
        self.put(0, cluster.0, Some(place), nodes, finisher)
    }

    /// Puts a child into the node of that level that has it; the node before it, if it is another, is complete.
    fn put(
        &mut self,
        level: usize,
        child: u64,
        place: Option<BlobRef>,
        nodes: &mut NodeStore,
        finisher: &Finisher,
    ) -> Result<(), BackupError> {
        let number = child / FANOUT_U64;
        if self.open[level].number != number {
            self.close(level, nodes, finisher)?;
            self.open[level].number = number;
        }
        self.open[level].children[usize::try_from(child % FANOUT_U64).unwrap_or(0)] = place;
        Ok(())
    }

    /// Writes the open node of a level, unless it is empty or the parent's is the same, and tells the level above.
    fn close(&mut self, level: usize, nodes: &mut NodeStore, finisher: &Finisher) -> Result<(), BackupError> {
        let number = self.open[level].number;
        let depth = u8::try_from(level).unwrap_or(u8::MAX);
        let node = IndexNode::from_children(depth, &self.open[level].children);
        self.open[level].children.fill(None);
        let place = match node.is_empty() {
            true => None,
            false => match self.same_in_parent(&node, number)? {
                Some(place) => Some(place),
                None => Some(nodes.write(&node, finisher)?),
            },
        };
        if level + 1 == self.open.len() {
            self.root = place;
            return Ok(());
        }
        self.put(level + 1, number, place, nodes, finisher)
    }

    fn same_in_parent(&self, node: &IndexNode, number: u64) -> Result<Option<BlobRef>, VaultError> {
        let Some(parent) = self.parent else { return Ok(None) };
        let first = ClusterIndex(number * clusters_below(node.level()));
        match self.known.tree.ancestor(parent, first, node.level(), Wait::May) {
            Ok(found) => Ok(found.filter(|(_, theirs)| theirs.same_children(node)).map(|(place, _)| place)),
            // What is damaged is written anew.
            Err(e) if e.damaged_object().is_some() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Completes the tree: its root, and how many clusters it maps.
    pub(crate) fn finish(
        mut self,
        nodes: &mut NodeStore,
        finisher: &Finisher,
    ) -> Result<(Option<Root>, u64), BackupError> {
        for level in 0..self.open.len() {
            self.close(level, nodes, finisher)?;
        }
        Ok((self.root.map(Root::from), self.used))
    }
}
