//! What the tenant's restore points need: marked from each manifest, also from one beside a tombstone while somebody reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use reseal_format::layout::{self, PointFile, parse_point_file};
use reseal_format::names::VmName;
use reseal_store::StoreError;
use reseal_vault::{Chain, Left, PointName, State, Tenant, Tree, VaultError};

use crate::BackupError;
use crate::spread::spread;
use crate::walk::{Collector, Needed, Place, Tracer};

/// Manifests that are opened at a time: enough to hide the delay of an object store behind one another.
const OPENERS: usize = 16;
/// Manifests that are kept until what they need is marked.
const TOGETHER: usize = 256;

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
    /// Restore points that were forgotten, and whose manifests the storage does not let go of.
    pub locked_points: u64,
    /// Until when, in seconds since 1970, as far as that is known.
    pub locked_until: Option<i64>,
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
            locked_points: 0,
            locked_until: None,
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
                    other => {
                        if let Left::Kept(_) = other? {
                            self.locked_points += 1;
                            self.note_lock(&vm, number)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Marks from all that is there. `without` are points that count as forgotten.
    pub(super) fn mark(&mut self, without: &BTreeSet<PointName>) -> Result<(), BackupError> {
        let mut there = Vec::new();
        for vm in self.tenant.vms()? {
            let numbers = self.numbers(&vm)?;
            self.check_held(&vm, &numbers)?;
            let Numbers { manifests, tombstones } = numbers;
            let last = manifests.last().max(tombstones.last()).copied().unwrap_or(0);
            if manifests.union(&tombstones).count() != last as usize {
                self.check_gaps(&vm, &self.tenant.chain(&vm)?);
            }
            for &number in tombstones.difference(&manifests) {
                self.see(&vm, number, Seen::Forgotten);
            }
            for &number in &manifests {
                let point = PointName { vm: vm.clone(), number };
                if without.contains(&point) {
                    self.see(&vm, number, Seen::Forgotten);
                } else if !tombstones.contains(&number) {
                    there.push((point, true));
                } else if self.is_to_be_marked(&vm, number)? {
                    there.push((point, false));
                }
            }
        }
        self.open(&there)?;
        Ok(self.check_nodes()?)
    }

    /// Marks from what was made since. Nobody may have forgotten meanwhile what was not marked: somebody may have taken it for the
    /// parent of what he makes.
    pub(super) fn mark_new(&mut self) -> Result<(), BackupError> {
        for vm in self.tenant.vms()? {
            let Numbers { manifests, tombstones } = self.numbers(&vm)?;
            let seen = self.seen.get(&vm).cloned().unwrap_or_default();
            for &number in tombstones.difference(&manifests).filter(|number| !seen.contains_key(number)) {
                if !self.tenant.tombstone(&vm, number)?.fenced {
                    return Err(changed(&vm, number).into());
                }
                self.see(&vm, number, Seen::Forgotten);
            }
            let new = manifests.iter().filter(|number| !seen.contains_key(number));
            let new: Vec<_> =
                new.map(|&number| (PointName { vm: vm.clone(), number }, !tombstones.contains(&number))).collect();
            self.open(&new)?;
            let seen = self.seen.get(&vm);
            let is_forgotten = |number| seen.and_then(|seen| seen.get(&number)) == Some(&Seen::Forgotten);
            if let Some((point, _)) = new.iter().find(|(point, _)| is_forgotten(point.number)) {
                return Err(changed(&vm, point.number).into());
            }
        }
        Ok(self.check_nodes()?)
    }

    /// Whether the storage says that it does not let go of a manifest; until when is kept.
    fn note_lock(&mut self, vm: &VmName, number: u32) -> Result<bool, VaultError> {
        let lock = self.tenant.store().lock_of(&layout::manifest(self.tenant.name(), vm, number))?;
        self.locked_until = self.locked_until.max(lock.map(|lock| lock.until));
        Ok(lock.is_some())
    }

    fn see(&mut self, vm: &VmName, number: u32, seen: Seen) {
        self.seen.entry(vm.clone()).or_default().insert(number, seen);
    }

    /// Whether a manifest beside a tombstone counts: somebody reads it, or it is about to go.
    fn is_to_be_marked(&mut self, vm: &VmName, number: u32) -> Result<bool, VaultError> {
        let by: Vec<_> = self.tenant.pinned(vm, number)?.iter().map(ToString::to_string).collect();
        if !by.is_empty() {
            self.read.insert(format!("{vm}@{number}"), by.join("; "));
        } else if self.is_dry && self.note_lock(vm, number)? {
            self.locked_points += 1;
        } else if self.is_dry {
            match self.tenant.tombstone(vm, number) {
                Err(e) if e.damaged_object().is_some() => self.damage(&e),
                other => {
                    other?;
                    self.see(vm, number, Seen::Forgotten);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Opens manifests, and marks what they need. Those of which it is said count as restore points that are to be there.
    fn open(&mut self, points: &[(PointName, bool)]) -> Result<(), BackupError> {
        for points in points.chunks(TOGETHER) {
            let opened = Mutex::new(Vec::new());
            spread(points, OPENERS, &AtomicBool::new(false), |(PointName { vm, number }, counts)| {
                let point = self.tenant.point(vm, *number);
                opened.lock().push((vm, *number, *counts, point));
                Ok(())
            })?;
            let mut disks = Vec::new();
            for (vm, number, counts, point) in opened.into_inner() {
                let seen = match point {
                    Ok(point) => {
                        disks.extend(point.manifest.disks);
                        self.points += u64::from(counts);
                        Seen::Marked
                    }
                    Err(e) => self.not_opened(vm, number, e)?,
                };
                self.see(vm, number, seen);
            }
            self.collector.disks(self.tree, &disks)?;
        }
        Ok(())
    }

    fn not_opened(&mut self, vm: &VmName, number: u32, error: VaultError) -> Result<Seen, VaultError> {
        match error {
            // A fence whose maker died, or it was forgotten a moment ago.
            VaultError::NoPoint { .. } => {
                if !self.is_dry {
                    self.tenant.settle_fence(vm, number)?;
                }
                Ok(Seen::Forgotten)
            }
            error if error.damaged_object().is_some() => {
                self.damage(&error);
                Ok(Seen::Damaged)
            }
            error => Err(error),
        }
    }

    /// A number that has nothing had a manifest, which may be put back.
    fn check_gaps(&mut self, vm: &VmName, chain: &Chain) {
        for (number, _) in chain.numbers().filter(|(_, state)| *state == State::Missing) {
            let object = layout::manifest(self.tenant.name(), vm, number);
            let what = format!("{object} is missing, and no tombstone says that {vm}@{number} was forgotten");
            self.damaged.insert(object, what);
        }
    }

    /// Restore points that are held and of which not all was marked, each with what is damaged: who goes on despite damage must not give them
    /// up.
    pub(super) fn held(&self) -> Result<BTreeMap<String, String>, BackupError> {
        let mut held = BTreeMap::new();
        // What could not be read then counts, whether it can be now or not.
        let broken: Vec<_> = self.collector.broken.iter().collect();
        let damage_of = |place: Place| broken.binary_search_by_key(&place, |(place, _)| **place).ok();
        let mut tracer = Tracer::new(self.tree, &damage_of);
        for vm in self.tenant.vms()? {
            for number in self.tenant.held_numbers(&vm, |_| true)? {
                let seen = self.seen.get(&vm).and_then(|seen| seen.get(&number)).copied();
                let point = self.tenant.point(&vm, number);
                let hurt = match (seen, point) {
                    (Some(Seen::Forgotten), _) => None,
                    (Some(Seen::Damaged), _) => Some("its manifest can't be opened".to_owned()),
                    (_, Ok(point)) => {
                        let found = point.manifest.disks.iter().find_map(|disk| tracer.disk(disk).first().copied());
                        found.map(|nth| broken[nth].1.to_string())
                    }
                    // Forgotten meanwhile.
                    (Some(Seen::Marked), Err(VaultError::NoPoint { .. })) => None,
                    (None, Err(VaultError::NoPoint { .. })) => Some("its manifest is missing".to_owned()),
                    (_, Err(e)) if e.damaged_object().is_some() => Some(e.to_string()),
                    (_, Err(e)) => return Err(e.into()),
                };
                held.extend(hurt.map(|hurt| (format!("{vm}@{number}"), hurt)));
            }
        }
        Ok(held)
    }

    /// A number that is held and has nothing had a manifest, too, also where none comes after it.
    fn check_held(&mut self, vm: &VmName, numbers: &Numbers) -> Result<(), VaultError> {
        let is_gone = |number| !numbers.manifests.contains(&number) && !numbers.tombstones.contains(&number);
        for number in self.tenant.held_numbers(vm, is_gone)? {
            // It may have been made since.
            if !matches!(self.tenant.point(vm, number), Err(VaultError::NoPoint { .. })) {
                continue;
            }
            let object = layout::manifest(self.tenant.name(), vm, number);
            let what = format!("{object} is missing, and {vm}@{number} is held");
            self.damaged.insert(object, what);
        }
        Ok(())
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
