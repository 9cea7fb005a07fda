//! Builds a disk's index from its clusters, in order. A node that maps the same as the parent's is not written again.
//!
//! Where clusters are taken as the parent maps them, whole subtrees are taken with one entry, so that the cost follows from
//! what changed and not from the disk's size.

use std::ops::Range;
use std::sync::Arc;

use reseal_format::geometry::{ClusterIndex, FANOUT, FANOUT_U64, cluster_count, clusters_below, root_level};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::{Disk, Root};
use reseal_vault::{PackWriter, Tenant, VaultError, Wait};

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
    /// Whether it has been given a child.
    begun: bool,
}

/// Where nodes are written.
pub(crate) struct Sink<'a> {
    pub nodes: &'a mut NodeStore,
    pub finisher: &'a Finisher,
}

/// Builds the index of one disk.
pub(crate) struct IndexWriter<'a> {
    known: &'a Known,
    parent: Option<&'a Disk>,
    open: Vec<Open>,
    root: Option<BlobRef>,
    /// Clusters in the disk.
    clusters: u64,
    used: u64,
    /// Used clusters of the parent, where its subtrees may be kept: less those of the leaves that are looked at.
    kept: u64,
    /// Leaves below this one were looked at or kept whole.
    looked: u64,
}

impl<'a> IndexWriter<'a> {
    /// An index of a disk of `length` bytes. `keeps` says that clusters of `parent` may be kept: then each cluster of the
    /// disk has to be told of, be it set, kept or cleared, and both disks have to be of one length.
    pub(crate) fn new(known: &'a Known, parent: Option<&'a Disk>, length: u64, keeps: bool) -> IndexWriter<'a> {
        let open = || Open { number: 0, children: vec![None; FANOUT], begun: false };
        let kept = parent.filter(|_| keeps).map_or(0, |parent| parent.used_clusters);
        IndexWriter {
            known,
            parent,
            open: (0..=root_level(length)).map(|_| open()).collect(),
            root: None,
            clusters: cluster_count(length),
            used: 0,
            kept,
            looked: 0,
        }
    }

    /// Maps a cluster that is no hole. Clusters come in ascending order.
    pub(crate) fn set(
        &mut self,
        cluster: ClusterIndex,
        place: BlobRef,
        sink: &mut Sink<'_>,
    ) -> Result<(), BackupError> {
        self.look(cluster.leaf())?;
        self.used += 1;
        self.put(0, cluster.0, Some(place), sink)
    }

    /// Maps clusters as the parent maps them.
    pub(crate) fn keep(&mut self, clusters: Range<u64>, sink: &mut Sink<'_>) -> Result<(), BackupError> {
        let mut at = clusters.start;
        while at < clusters.end {
            let whole = |level: u8| {
                let span = clusters_below(level);
                at.is_multiple_of(span) && (at + span <= clusters.end || clusters.end == self.clusters)
            };
            let top = u8::try_from(self.open.len() - 1).unwrap_or(u8::MAX);
            at = match (0..top).rev().find(|&level| whole(level)) {
                Some(level) => self.keep_subtree(at, level, sink)?,
                None => self.keep_in_leaf(at..clusters.end, sink)?,
            };
        }
        Ok(())
    }

    /// Takes the parent's whole subtree of that level at a cluster; where it ends.
    fn keep_subtree(&mut self, at: u64, level: u8, sink: &mut Sink<'_>) -> Result<u64, BackupError> {
        let span = clusters_below(level);
        let place = self.parent_node(at, level + 1)?.and_then(|node| node.get(ClusterIndex(at).slot(level + 1)));
        // What is open below belongs before this.
        for lower in 0..=usize::from(level) {
            self.close(lower, sink)?;
        }
        self.put(usize::from(level) + 1, at / span, place, sink)?;
        self.looked = (at + span) / FANOUT_U64;
        Ok(at + span)
    }

    /// Takes the parent's clusters up to the end of the leaf; where that is.
    fn keep_in_leaf(&mut self, clusters: Range<u64>, sink: &mut Sink<'_>) -> Result<u64, BackupError> {
        let end = (clusters.start - clusters.start % FANOUT_U64 + FANOUT_U64).min(clusters.end);
        self.look(ClusterIndex(clusters.start).leaf())?;
        if let Some(leaf) = self.parent_node(clusters.start, 0)? {
            for cluster in clusters.start..end {
                if let Some(place) = leaf.get(ClusterIndex(cluster).slot(0)) {
                    self.used += 1;
                    self.put(0, cluster, Some(place), sink)?;
                }
            }
        }
        Ok(end)
    }

    /// Leaves clusters out that are holes now.
    pub(crate) fn clear(&mut self, clusters: Range<u64>) -> Result<(), BackupError> {
        let (first, last) = (ClusterIndex(clusters.start).leaf(), ClusterIndex(clusters.end.saturating_sub(1)).leaf());
        (first..=last).try_for_each(|leaf| self.look(leaf))
    }

    /// A leaf that is not kept whole: its clusters are counted anew.
    fn look(&mut self, leaf: u64) -> Result<(), BackupError> {
        if self.kept > 0 && leaf >= self.looked {
            self.looked = leaf + 1;
            if let Some(node) = self.parent_node(leaf * FANOUT_U64, 0)? {
                let used = (0..FANOUT).filter(|&slot| !node.is_hole(slot)).count() as u64;
                self.kept = self.kept.saturating_sub(used);
            }
        }
        Ok(())
    }

    /// The parent's node of that level which leads to a cluster.
    fn parent_node(&self, cluster: u64, level: u8) -> Result<Option<Arc<IndexNode>>, BackupError> {
        let Some(parent) = self.parent else { return Ok(None) };
        match self.known.tree.ancestor(parent, ClusterIndex(cluster), level, Wait::May) {
            Ok(found) => Ok(found.map(|(_, node)| node)),
            Err(e) if e.damaged_object().is_some() => Err(BackupError::Distrusted { why: format!("{e}") }),
            Err(e) => Err(e.into()),
        }
    }

    /// Puts a child into the node of that level that has it; the node before it, if it is another, is complete.
    fn put(
        &mut self,
        level: usize,
        child: u64,
        place: Option<BlobRef>,
        sink: &mut Sink<'_>,
    ) -> Result<(), BackupError> {
        let number = child / FANOUT_U64;
        if self.open[level].number != number {
            self.close(level, sink)?;
            self.open[level].number = number;
        }
        self.open[level].begun = true;
        self.open[level].children[usize::try_from(child % FANOUT_U64).unwrap_or(0)] = place;
        Ok(())
    }

    /// Writes the open node of a level, unless it is empty or the parent's is the same, and tells the level above.
    fn close(&mut self, level: usize, sink: &mut Sink<'_>) -> Result<(), BackupError> {
        if !std::mem::take(&mut self.open[level].begun) {
            return Ok(());
        }
        let number = self.open[level].number;
        let depth = u8::try_from(level).unwrap_or(u8::MAX);
        let node = IndexNode::from_children(depth, &self.open[level].children);
        self.open[level].children.fill(None);
        let place = match node.is_empty() {
            true => None,
            false => match self.same_in_parent(&node, number)? {
                Some(place) => Some(place),
                None => Some(sink.nodes.write(&node, sink.finisher)?),
            },
        };
        if level + 1 == self.open.len() {
            self.root = place;
            return Ok(());
        }
        self.put(level + 1, number, place, sink)
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
    pub(crate) fn finish(mut self, sink: &mut Sink<'_>) -> Result<(Option<Root>, u64), BackupError> {
        for level in 0..self.open.len() {
            self.close(level, sink)?;
        }
        Ok((self.root.map(Root::from), self.used + self.kept))
    }
}
