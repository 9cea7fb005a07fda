//! Where in the other vault a blob of ours is: both indexes of a disk are walked side by side.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use reseal_format::geometry::{FANOUT, root_level};
use reseal_format::ids::PackId;
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::manifest::{Disk, Manifest};
use reseal_vault::{Tree, VaultError, Wait};

use super::patient::Patient;
use crate::walk::Place;

/// So many places in the other vault are known of a blob: where one is damaged there, another may not be.
const MOST: usize = 4;

/// A place in the other vault.
#[derive(Debug, Clone)]
pub(super) struct There {
    pub blob: BlobRef,
    /// The restore point that it is of, as it is called there.
    pub point: Arc<str>,
}

/// An index node of ours that is lost.
pub(super) struct LostNode {
    pub level: u8,
    pub there: Vec<There>,
}

/// What was found for blobs that are lacking.
#[derive(Default)]
pub(super) struct Found {
    pub clusters: BTreeMap<Place, Vec<There>>,
    pub nodes: BTreeMap<Place, LostNode>,
}

/// A search for all that is lacking.
pub(super) struct Search<'a> {
    ours: &'a Tree,
    theirs: &'a Tree,
    patients: BTreeMap<PackId, &'a Patient<'a>>,
    /// Nodes that were met together. What several restore points share on both sides is walked once.
    seen: HashSet<(Place, Place)>,
    pub found: Found,
}

fn place(blob: BlobRef) -> Place {
    (blob.pack, blob.ordinal)
}

fn add(known: &mut Vec<There>, blob: BlobRef, point: &Arc<str>) {
    if known.len() < MOST && known.iter().all(|there| place(there.blob) != place(blob)) {
        known.push(There { blob, point: point.clone() });
    }
}

/// A node, unless it is damaged.
fn whole(tree: &Tree, blob: BlobRef, level: u8) -> Result<Option<Arc<IndexNode>>, VaultError> {
    match tree.node(blob, level, Wait::May) {
        Ok(node) => Ok(Some(node)),
        Err(e) => crate::verify_pack::damage(e).map(|_| None),
    }
}

impl<'a> Search<'a> {
    pub(super) fn new(ours: &'a Tree, theirs: &'a Tree, patients: &'a [Patient<'a>]) -> Search<'a> {
        let patients = patients.iter().map(|patient| (patient.id, patient)).collect();
        Search { ours, theirs, patients, seen: HashSet::new(), found: Found::default() }
    }

    /// Looks in a restore point and its copy, which have the same disks.
    pub(super) fn point(&mut self, ours: &Manifest, theirs: &Manifest) -> Result<(), VaultError> {
        let name: Arc<str> = format!("{}@{}", theirs.vm, theirs.number).into();
        ours.disks.iter().zip(&theirs.disks).try_for_each(|(ours, theirs)| self.disk(ours, theirs, &name))
    }

    fn disk(&mut self, ours: &Disk, theirs: &Disk, point: &Arc<str>) -> Result<(), VaultError> {
        match (ours.root, theirs.root) {
            (Some(our), Some(their)) => self.node(our.into(), their.into(), root_level(ours.length), point),
            _ => Ok(()),
        }
    }

    fn lacks(&self, blob: BlobRef) -> bool {
        self.patients.get(&blob.pack).is_some_and(|patient| patient.lacks(blob.ordinal))
    }

    fn node(&mut self, our: BlobRef, their: BlobRef, level: u8, point: &Arc<str>) -> Result<(), VaultError> {
        if !self.seen.insert((place(our), place(their))) {
            return Ok(());
        }
        if self.lacks(our) {
            let lost = self.found.nodes.entry(place(our)).or_insert_with(|| LostNode { level, there: Vec::new() });
            if lost.level == level {
                add(&mut lost.there, their, point);
            }
        }
        let Some(ours) = whole(self.ours, our, level)? else { return Ok(()) };
        let Some(theirs) = whole(self.theirs, their, level)? else { return Ok(()) };
        for slot in 0..FANOUT {
            let (Some(our), Some(their)) = (ours.get(slot), theirs.get(slot)) else { continue };
            if level > 0 {
                self.node(our, their, level - 1, point)?;
            } else if self.lacks(our) {
                add(self.found.clusters.entry(place(our)).or_default(), their, point);
            }
        }
        Ok(())
    }
}
