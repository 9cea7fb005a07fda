//! What the tenant's restore points need: marked from each manifest, also from one beside a tombstone while somebody reads it.

use std::collections::{BTreeMap, BTreeSet};

use reseal_format::layout::{self, PointFile, parse_point_file};
use reseal_format::names::VmName;
use reseal_store::StoreError;
use reseal_vault::{Chain, PointName, State, Tenant, Tree, VaultError};

use crate::walk::{Collector, Needed};

/// What was found of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Marked,
    /// It has a tombstone, and nothing else that counts.
    Forgotten,
    /// It can't be opened.
    Damaged,
}

/// What stands in a VM's folder.
#[derive(Debug, Default)]
struct Numbers {
    manifests: BTreeSet<u32>,
    tombstones: BTreeSet<u32>,
}

/// Marks in the making.
pub(super) struct Marks<'a> {
    tenant: &'a Tenant,
    tree: &'a Tree,
    collector: Collector,
    seen: BTreeMap<VmName, BTreeMap<u32, Seen>>,
    /// Restore points that are to be there.
    pub points: u64,
    /// What was forgotten and is read, and by whom.
    pub read: BTreeMap<String, String>,
    /// What is missing or can't be opened, so that nobody knows what it needs.
    pub damaged: BTreeMap<String, String>,
    /// Whether nothing may be changed.
    is_dry: bool,
}

impl<'a> Marks<'a> {
    pub(super) fn new(tenant: &'a Tenant, tree: &'a Tree, is_dry: bool) -> Marks<'a> {
        Marks {
            tenant,
            tree,
            collector: Collector::default(),
            seen: BTreeMap::new(),
            points: 0,
            read: BTreeMap::new(),
            damaged: BTreeMap::new(),
            is_dry,
        }
    }

    /// What is needed.
    pub(super) fn needed(&self) -> &Needed {
        &self.collector.needed
    }

    fn numbers(&self, vm: &VmName) -> Result<Numbers, VaultError> {
        let mut numbers = Numbers::default();
        let folder = layout::vm(self.tenant.name(), vm);
        for entry in self.tenant.store().list(&folder)? {
            match parse_point_file(&entry.name) {
                Some(PointFile::Manifest(number)) => _ = numbers.manifests.insert(number),
                Some(PointFile::Tombstone(number)) => _ = numbers.tombstones.insert(number),
                None => {}
            }
        }
        Ok(numbers)
    }

    /// Deletes manifests beside tombstones, unless somebody reads them.
    pub(super) fn finish_forgotten(&mut self) -> Result<(), VaultError> {
        let mut forgetting = None;
        for vm in self.tenant.vms()? {
            let Numbers { manifests, tombstones } = self.numbers(&vm)?;
            for &number in manifests.intersection(&tombstones) {
                let forgetting = match &forgetting {
                    Some(forgetting) => forgetting,
                    None => forgetting.insert(self.tenant.forgetting()?),
                };
                match forgetting.finish(&vm, number) {
                    // Its maker took it back, for the point is held.
                    Err(VaultError::Store(StoreError::NotFound(_)) | VaultError::Held { .. }) => {}
                    // Whatever it hides must stay.
                    Err(e) if e.damaged_object().is_some() => self.damage(&e),
                    other => _ = other?,
                }
            }
        }
        Ok(())
    }

    /// Marks from all that is there. `without` are points that count as forgotten.
    pub(super) fn mark(&mut self, without: &BTreeSet<PointName>) -> Result<(), VaultError> {
        for vm in self.tenant.vms()? {
            let Numbers { manifests, tombstones } = self.numbers(&vm)?;
            let last = manifests.last().max(tombstones.last()).copied().unwrap_or(0);
            if manifests.union(&tombstones).count() != last as usize {
                self.check_gaps(&vm, &self.tenant.chain(&vm)?);
            }
            for &number in tombstones.difference(&manifests) {
                self.see(&vm, number, Seen::Forgotten);
            }
            for &number in &manifests {
                if without.contains(&PointName { vm: vm.clone(), number }) {
                    self.see(&vm, number, Seen::Forgotten);
                } else if !tombstones.contains(&number) {
                    self.live(&vm, number)?;
                } else {
                    self.read(&vm, number)?;
                }
            }
        }
        self.check_nodes()
    }

    /// Marks from what was made since. Nobody may have forgotten meanwhile what was not marked: somebody may have taken it for the
    /// parent of what he makes.
    pub(super) fn mark_new(&mut self) -> Result<(), VaultError> {
        for vm in self.tenant.vms()? {
            let Numbers { manifests, tombstones } = self.numbers(&vm)?;
            let seen = self.seen.get(&vm).cloned().unwrap_or_default();
            for &number in tombstones.difference(&manifests).filter(|number| !seen.contains_key(number)) {
                if !self.tenant.tombstone(&vm, number)?.fenced {
                    return Err(changed(&vm, number));
                }
                self.see(&vm, number, Seen::Forgotten);
            }
            for &number in manifests.iter().filter(|number| !seen.contains_key(number)) {
                let seen = match tombstones.contains(&number) {
                    true => self.open(&vm, number)?,
                    false => self.live(&vm, number)?,
                };
                if seen == Seen::Forgotten {
                    return Err(changed(&vm, number));
                }
            }
        }
        self.check_nodes()
    }

    fn see(&mut self, vm: &VmName, number: u32, seen: Seen) {
        self.seen.entry(vm.clone()).or_default().insert(number, seen);
    }

    /// A manifest beside a tombstone: somebody reads it, or it is about to go.
    fn read(&mut self, vm: &VmName, number: u32) -> Result<(), VaultError> {
        let by: Vec<_> = self.tenant.pinned(vm, number)?.iter().map(ToString::to_string).collect();
        if !by.is_empty() {
            self.read.insert(format!("{vm}@{number}"), by.join("; "));
        } else if self.is_dry {
            match self.tenant.tombstone(vm, number) {
                Err(e) if e.damaged_object().is_some() => self.damage(&e),
                other => {
                    other?;
                    self.see(vm, number, Seen::Forgotten);
                    return Ok(());
                }
            }
        }
        self.open(vm, number).map(drop)
    }

    fn live(&mut self, vm: &VmName, number: u32) -> Result<Seen, VaultError> {
        let seen = self.open(vm, number)?;
        self.points += u64::from(seen == Seen::Marked);
        Ok(seen)
    }

    /// Opens a manifest, and marks what it needs.
    fn open(&mut self, vm: &VmName, number: u32) -> Result<Seen, VaultError> {
        let seen = match self.tenant.point(vm, number) {
            Ok(point) => {
                for disk in &point.manifest.disks {
                    self.collector.disk(self.tree, disk)?;
                }
                Seen::Marked
            }
            // A fence whose maker died, or it was forgotten a moment ago.
            Err(VaultError::NoPoint { .. }) => {
                if !self.is_dry {
                    self.tenant.settle_fence(vm, number)?;
                }
                Seen::Forgotten
            }
            Err(e) if e.damaged_object().is_some() => {
                self.damage(&e);
                Seen::Damaged
            }
            Err(e) => return Err(e),
        };
        self.see(vm, number, seen);
        Ok(seen)
    }

    /// A number that has nothing had a manifest, which may be put back.
    fn check_gaps(&mut self, vm: &VmName, chain: &Chain) {
        for (number, _) in chain.numbers().filter(|(_, state)| *state == State::Missing) {
            let object = layout::manifest(self.tenant.name(), vm, number);
            let what = format!("{object} is missing, and no tombstone says that {vm}@{number} was forgotten");
            self.damaged.insert(object, what);
        }
    }

    /// Forgotten points, by VM.
    pub(super) fn forgotten(&self) -> impl Iterator<Item = (&VmName, BTreeSet<u32>)> {
        self.seen.iter().map(|(vm, seen)| {
            let forgotten = seen.iter().filter(|(_, seen)| **seen == Seen::Forgotten);
            (vm, forgotten.map(|(number, _)| *number).collect())
        })
    }

    fn damage(&mut self, error: &VaultError) {
        if let Some(object) = error.damaged_object() {
            self.damaged.insert(object.to_owned(), error.to_string());
        }
    }

    /// What could not be read for another reason than damage says nothing, and must not look like it.
    fn check_nodes(&mut self) -> Result<(), VaultError> {
        let is_other = |(_, error): &(&_, &VaultError)| error.damaged_object().is_none();
        if let Some(place) = self.collector.broken.iter().find(is_other).map(|(place, _)| *place)
            && let Some(error) = self.collector.broken.remove(&place)
        {
            return Err(error);
        }
        for error in self.collector.broken.values() {
            if let Some(object) = error.damaged_object() {
                self.damaged.insert(object.to_owned(), error.to_string());
            }
        }
        Ok(())
    }
}

fn changed(vm: &VmName, number: u32) -> VaultError {
    VaultError::ChangedMeanwhile { what: format!("{vm}@{number} was made and forgotten") }
}
