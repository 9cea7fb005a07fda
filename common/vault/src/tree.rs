//! From a disk's cluster to its blob: at most four nodes, each cached.

use std::sync::Arc;

use reseal_format::geometry::{ClusterIndex, FANOUT_U64, clusters_below, root_level};
use reseal_format::ids::PackId;
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::Disk;

use crate::cache::{Cache, Weigh};
use crate::{Packs, VaultError, Wait};

impl Weigh for IndexNode {
    fn weight(&self) -> usize {
        self.memory()
    }
}

/// A node and where it stands, or how many clusters the missing subtree spans.
type Descent = Result<(BlobRef, Arc<IndexNode>), u64>;

/// The index trees of a tenant's disks.
pub struct Tree {
    packs: Arc<Packs>,
    /// Nodes are shared by the restore points that did not change them, so they are cached by where they stand.
    nodes: Cache<(PackId, u32), Arc<IndexNode>>,
}

impl Tree {
    /// A reader that keeps at most about so many bytes of nodes.
    pub fn new(packs: Arc<Packs>, cache_bytes: usize) -> Tree {
        Tree { packs, nodes: Cache::new(cache_bytes) }
    }

    /// Keeps at most about so many bytes of nodes from now on.
    pub fn resize_cache(&self, bytes: usize) {
        self.nodes.resize(bytes);
    }

    /// Bytes of nodes that it keeps now.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.nodes.bytes()
    }

    /// The packs that it reads from.
    pub fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    /// The node at that place, which must be of that level.
    pub fn node(&self, blob: BlobRef, level: u8, wait: Wait) -> Result<Arc<IndexNode>, VaultError> {
        let place = (blob.pack, blob.ordinal);
        if let Some(node) = self.nodes.get(&place).filter(|node| node.level() == level) {
            return Ok(node);
        }
        let mut content = Vec::new();
        self.packs.read_blob(Kind::IndexPack, blob, wait, &mut content)?;
        let node = IndexNode::decompress(&content).and_then(|bytes| IndexNode::decode(&bytes, level));
        let object = || format!("index node {} of pack {}", blob.ordinal, blob.pack);
        let node = Arc::new(node.map_err(|source| VaultError::Damaged { object: object(), source })?);
        self.nodes.put(place, node.clone());
        Ok(node)
    }

    /// Goes down from a disk's root to the node of that level that leads to a cluster. `Err` in the inner result is how
    /// many clusters the missing subtree spans.
    fn descend(&self, disk: &Disk, cluster: ClusterIndex, level: u8, wait: Wait) -> Result<Descent, VaultError> {
        let root_level = root_level(disk.length);
        let Some(root) = disk.root else { return Ok(Err(clusters_below(root_level))) };
        let mut place = root.into();
        let mut node = self.node(place, root_level, wait)?;
        while node.level() > level {
            match node.get(cluster.slot(node.level())) {
                Some(child) => place = child,
                None => return Ok(Err(clusters_below(node.level() - 1))),
            }
            node = self.node(place, node.level() - 1, wait)?;
        }
        Ok(Ok((place, node)))
    }

    /// The node of a disk that leads to a cluster at that level, and where it stands; `None` if it is a hole, or if the
    /// disk's tree is not that high.
    pub fn ancestor(
        &self,
        disk: &Disk,
        cluster: ClusterIndex,
        level: u8,
        wait: Wait,
    ) -> Result<Option<(BlobRef, Arc<IndexNode>)>, VaultError> {
        if level > root_level(disk.length) || cluster.first_byte() >= disk.length {
            return Ok(None);
        }
        Ok(self.descend(disk, cluster, level, wait)?.ok())
    }

    /// The leaf of that number of a disk, counted from its start; `None` if all its clusters are holes.
    pub fn leaf(&self, disk: &Disk, leaf: u64, wait: Wait) -> Result<Option<Arc<IndexNode>>, VaultError> {
        let first = ClusterIndex(leaf * FANOUT_U64);
        Ok(self.descend(disk, first, 0, wait)?.ok().map(|(_, leaf)| leaf))
    }

    /// The blob of a cluster as the vault has it now: a node that was made again from another vault may lead elsewhere than before.
    pub(crate) fn blob_anew(&self, disk: &Disk, cluster: ClusterIndex) -> Result<Option<BlobRef>, VaultError> {
        let mut level = root_level(disk.length);
        let mut place = disk.root.map(BlobRef::from);
        // From the top: what the old nodes lead to may be gone.
        while let Some(blob) = place {
            self.packs.renew(blob)?;
            self.nodes.remove(&(blob.pack, blob.ordinal));
            place = self.node(blob, level, Wait::May)?.get(cluster.slot(level));
            if level == 0 {
                break;
            }
            level -= 1;
        }
        Ok(place)
    }

    /// The blob of a cluster; `None` if it is a hole.
    pub fn blob(&self, disk: &Disk, cluster: ClusterIndex, wait: Wait) -> Result<Option<BlobRef>, VaultError> {
        Ok(self.leaf(disk, cluster.leaf(), wait)?.and_then(|leaf| leaf.get(cluster.slot(0))))
    }

    /// The first cluster from `from` on, below `end`, that is a hole (`want_hole`) or is not; `None` if there is none.
    /// Subtrees that are holes are stepped over whole.
    pub fn next(
        &self,
        disk: &Disk,
        from: ClusterIndex,
        end: u64,
        want_hole: bool,
    ) -> Result<Option<ClusterIndex>, VaultError> {
        let mut at = from.0;
        while at < end {
            let (leaf, span) = match self.descend(disk, ClusterIndex(at), 0, Wait::May)? {
                Ok((_, leaf)) => (Some(leaf), FANOUT_U64),
                Err(span) => (None, span),
            };
            let stop = (at - at % span + span).min(end);
            match leaf {
                None if want_hole => return Ok(Some(ClusterIndex(at))),
                None => at = stop,
                Some(leaf) => {
                    let found = (at..stop).find(|&c| leaf.is_hole(ClusterIndex(c).slot(0)) == want_hole);
                    match found {
                        Some(cluster) => return Ok(Some(ClusterIndex(cluster))),
                        None => at = stop,
                    }
                }
            }
        }
        Ok(None)
    }
}
