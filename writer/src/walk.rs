//! Walks index trees: which blobs do restore points need, and which points does a damaged blob hurt?

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use reseal_format::geometry::{FANOUT, root_level};
use reseal_format::ids::PackId;
use reseal_format::index::BlobRef;
use reseal_format::manifest::Disk;
use reseal_format::pack::MAX_BLOBS;
use reseal_vault::{Tree, VaultError, Wait};

/// A set of ordinals of one pack, one bit each.
#[derive(Clone)]
pub(crate) struct Ordinals(Vec<u64>);

impl Default for Ordinals {
    fn default() -> Ordinals {
        Ordinals(vec![0; MAX_BLOBS as usize / 64])
    }
}

impl Ordinals {
    pub(crate) fn insert(&mut self, ordinal: u32) {
        self.0[ordinal as usize / 64] |= 1 << (ordinal % 64);
    }

    pub(crate) fn contains(&self, ordinal: u32) -> bool {
        self.0[ordinal as usize / 64] >> (ordinal % 64) & 1 == 1
    }
}

/// Packs that are needed, with the generation that an index remembers and the ordinals of their blobs.
pub(crate) type Needed = BTreeMap<PackId, (u32, Ordinals)>;

/// A blob's place, whatever the generation.
pub(crate) type Place = (PackId, u32);

/// Index nodes that could not be read, by where they stand.
pub(crate) type Broken = BTreeMap<Place, VaultError>;

/// Collects what disks need. Nodes that several points share are walked once.
#[derive(Default)]
pub(crate) struct Collector {
    pub needed: Needed,
    pub broken: Broken,
    seen: HashSet<Place>,
}

impl Collector {
    pub(crate) fn disk(&mut self, tree: &Tree, disk: &Disk) {
        if let Some(root) = disk.root {
            self.node(tree, root.into(), root_level(disk.length));
        }
    }

    fn need(&mut self, blob: BlobRef) {
        let (generation, ordinals) =
            self.needed.entry(blob.pack).or_insert_with(|| (blob.generation, Ordinals::default()));
        *generation = blob.generation.max(*generation);
        ordinals.insert(blob.ordinal);
    }

    fn node(&mut self, tree: &Tree, blob: BlobRef, level: u8) {
        self.need(blob);
        let place = (blob.pack, blob.ordinal);
        if !self.seen.insert(place) {
            return;
        }
        let node = match tree.node(blob, level, Wait::May) {
            Ok(node) => node,
            Err(e) => return drop(self.broken.insert(place, e)),
        };
        for child in (0..FANOUT).filter_map(|slot| node.get(slot)) {
            match level {
                0 => self.need(child),
                _ => self.node(tree, child, level - 1),
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
