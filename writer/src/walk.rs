//! Walks index trees: which blobs do restore points need, and which points does a damaged blob hurt?

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use reseal_format::FormatError;
use reseal_format::geometry::{FANOUT, root_level};
use reseal_format::ids::PackId;
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::Disk;
use reseal_format::ordinals::Ordinals;
use reseal_vault::{Tree, VaultError, Wait};

use crate::BackupError;
use crate::spread::spread;
use crate::verify_pack::damage;

/// What restore points need of a pack.
#[derive(Clone)]
pub(crate) struct Need {
    /// What an index node that leads there takes it for.
    pub kind: Kind,
    /// As an index node remembers it.
    pub generation: u32,
    pub ordinals: Ordinals,
}

/// Packs that are needed.
pub(crate) type Needed = BTreeMap<PackId, Need>;

/// A blob's place, whatever the generation.
pub(crate) type Place = (PackId, u32);

/// Index nodes that could not be read, by where they stand.
pub(crate) type Broken = BTreeMap<Place, VaultError>;

/// Collects what disks need. Nodes that several points share are walked once.
#[derive(Default)]
pub(crate) struct Collector {
    pub needed: Needed,
    pub broken: Broken,
}

/// Nodes that are read at a time: enough to hide the delay of an object store behind one another.
const WALKERS: usize = 16;
/// Nodes between which nothing is done but reading.
const BATCH: usize = 256;

impl Collector {
    /// Fails only where keys can't be had.
    pub(crate) fn disks<'d>(
        &mut self,
        tree: &Tree,
        disks: impl IntoIterator<Item = &'d Disk>,
    ) -> Result<(), BackupError> {
        // The last one first, so that not many wait: a node's children come before its neighbours.
        let mut waiting: Vec<(BlobRef, u8)> = Vec::new();
        for disk in disks {
            if let Some(root) = disk.root.map(BlobRef::from).filter(|root| self.need(*root, Kind::IndexPack)) {
                waiting.push((root, root_level(disk.length)));
            }
        }
        while !waiting.is_empty() {
            let batch = waiting.split_off(waiting.len().saturating_sub(BATCH));
            let found = Mutex::new((&mut *self, &mut waiting));
            spread(&batch, WALKERS, &AtomicBool::new(false), |(blob, level)| {
                let node = tree.node(*blob, *level, Wait::May);
                let (collector, waiting) = &mut *found.lock();
                match node {
                    Ok(node) => collector.node(&node, *level, waiting),
                    Err(e @ VaultError::NoNewKeys { .. }) => return Err(e.into()),
                    Err(e) => _ = collector.broken.insert((blob.pack, blob.ordinal), e),
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Fails where a node could not be read, and that says nothing about the node.
    pub(crate) fn check(&mut self) -> Result<(), VaultError> {
        for (place, error) in std::mem::take(&mut self.broken) {
            self.broken.insert(place, damage(error)?);
        }
        Ok(())
    }

    /// Whether it was not needed before.
    fn need(&mut self, blob: BlobRef, kind: Kind) -> bool {
        let new = || Need { kind, generation: blob.generation, ordinals: Ordinals::default() };
        let need = self.needed.entry(blob.pack).or_insert_with(new);
        if need.kind != kind {
            // A pack can't be both: whoever reads it as the other kind gets this error.
            let mixed = FormatError::Mismatch("it is needed as an index node and as a cluster");
            let object = format!("pack {}", blob.pack);
            self.broken.insert((blob.pack, blob.ordinal), VaultError::Damaged { object, source: mixed });
        }
        need.generation = blob.generation.max(need.generation);
        need.ordinals.insert(blob.ordinal)
    }

    fn node(&mut self, node: &IndexNode, level: u8, waiting: &mut Vec<(BlobRef, u8)>) {
        for child in (0..FANOUT).filter_map(|slot| node.get(slot)) {
            match level {
                0 => _ = self.need(child, Kind::DataPack),
                _ if self.need(child, Kind::IndexPack) => waiting.push((child, level - 1)),
                _ => {}
            }
        }
    }
}

/// Finds what of the damage a disk reaches. Nodes that several points share are walked once.
pub(crate) struct Tracer<'a> {
    tree: &'a Tree,
    /// Whether a blob is damaged, and by which of the damages.
    damage_of: &'a dyn Fn(Place) -> Option<usize>,
    below: HashMap<Place, Rc<Vec<usize>>>,
}

impl<'a> Tracer<'a> {
    pub(crate) fn new(tree: &'a Tree, damage_of: &'a dyn Fn(Place) -> Option<usize>) -> Tracer<'a> {
        Tracer { tree, damage_of, below: HashMap::new() }
    }

    /// Which damages hurt a disk.
    pub(crate) fn disk(&mut self, disk: &Disk) -> Rc<Vec<usize>> {
        match disk.root {
            Some(root) => self.node(root.into(), root_level(disk.length)),
            None => Rc::default(),
        }
    }

    fn node(&mut self, blob: BlobRef, level: u8) -> Rc<Vec<usize>> {
        let place = (blob.pack, blob.ordinal);
        if let Some(known) = self.below.get(&place) {
            return known.clone();
        }
        let mut found: Vec<usize> = (self.damage_of)(place).into_iter().collect();
        if let Ok(node) = self.tree.node(blob, level, Wait::May) {
            for child in (0..FANOUT).filter_map(|slot| node.get(slot)) {
                match level {
                    0 => found.extend((self.damage_of)((child.pack, child.ordinal))),
                    _ => found.extend(&*self.node(child, level - 1)),
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        let found = Rc::new(found);
        self.below.insert(place, found.clone());
        found
    }
}
