//! Which restore point of the other vault is a copy of which of ours, and what all of ours need.

use std::collections::{BTreeMap, BTreeSet};

use reseal_format::ids::PointId;
use reseal_format::manifest::{Disk, Manifest};
use reseal_format::names::VmName;
use reseal_vault::heads::Heads;
use reseal_vault::{Point, State, Tenant, Tree, VaultError};

use crate::BackupError;
use crate::walk::{Collector, Needed};

/// What is known of our restore points.
pub(super) struct Pairs {
    /// Of ours and of the copy, without definitions.
    pub points: Vec<(Manifest, Manifest)>,
    /// What all of ours need, copied or not.
    pub needed: Needed,
    /// Whether that is all: no manifest and no index node is missing or damaged.
    pub is_whole: bool,
}

impl Pairs {
    pub(super) fn of(ours: &Tenant, heads: &Heads, theirs: &Tenant, tree: &Tree) -> Result<Pairs, BackupError> {
        let mut pairs = Pairs { points: Vec::new(), needed: Needed::new(), is_whole: true };
        let mut collector = Collector::default();
        let mut vms = BTreeSet::from_iter(ours.vms()?);
        vms.extend(heads.known_vms()?);
        for vm in vms {
            let (chain, rollback) = heads.chain(ours, &vm)?;
            pairs.is_whole &= rollback.is_none();
            let mut copies = copies(theirs, &vm)?;
            for (number, state) in chain.numbers() {
                let manifest = match ours.point(&vm, number) {
                    Ok(point) => point.manifest,
                    Err(VaultError::NoPoint { .. }) => {
                        pairs.is_whole &= state == State::Forgotten;
                        continue;
                    }
                    Err(e) if e.damaged_object().is_some() => {
                        pairs.is_whole = false;
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                };
                collector.disks(tree, &manifest.disks)?;
                if let Some(copy) = copies.remove(&manifest.point_id).filter(|copy| is_copy(&manifest, copy)) {
                    let bare = |manifest| Manifest { definition: None, ..manifest };
                    pairs.points.push((bare(manifest), bare(copy)));
                }
            }
        }
        collector.check()?;
        pairs.is_whole &= collector.broken.is_empty();
        pairs.needed = collector.needed;
        Ok(pairs)
    }
}

/// The restore points of a VM in the other vault. What is damaged there is of no use.
fn copies(theirs: &Tenant, vm: &VmName) -> Result<BTreeMap<PointId, Manifest>, VaultError> {
    let mut copies = BTreeMap::new();
    for number in theirs.chain(vm)?.live() {
        match theirs.point(vm, number) {
            Ok(Point { manifest, .. }) => _ = copies.insert(manifest.point_id, manifest),
            Err(VaultError::NoPoint { .. }) => {}
            Err(e) if e.damaged_object().is_some() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(copies)
}

/// Whether all that a copy takes over is the same in both.
fn is_copy(ours: &Manifest, theirs: &Manifest) -> bool {
    let facts = |disk: &Disk| (disk.name.clone(), disk.length, disk.used_clusters);
    (ours.point_id, ours.created, &ours.vm) == (theirs.point_id, theirs.created, &theirs.vm)
        && ours.definition == theirs.definition
        && ours.disks.iter().map(facts).eq(theirs.disks.iter().map(facts))
}
