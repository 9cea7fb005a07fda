//! Holding restore points, and forgetting those that nobody holds.
//!
//! ```text
//! hold:   note → is there a tombstone? then the note goes again
//! forget: alone → held? → tombstone → held now? then the tombstone goes again → does nobody read it? → manifest deleted
//! ```
//!
//! So of two who hold and forget one point at a time at least one sees the other; both may give up, but no point that somebody was told is
//! held is forgotten.
//!
//! Architecture invariant: nothing but the manifest is deleted here. What it led to is freed by who knows that nothing else leads there;
//! and as long as a manifest is there, with a tombstone or without, what it leads to must stay.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use reseal_format::FormatError;
use reseal_format::dated_note::DatedKind;
use reseal_format::hold_note::Hold;
use reseal_format::layout;
use reseal_format::manifest::{MAX_TEXT, Manifest, Tombstone, clipped};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_store::{Lease, StoreError};

use crate::leases::{Held, Holder};
use crate::notes::{Name, NoteNames, now};
use crate::points::is_fence;
use crate::tenant::random;
use crate::{Point, Tenant, VaultError};

/// A hold that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldPoint {
    pub since: Timestamp,
    pub reason: Option<String>,
}

/// How long another process that forgets is waited for: each point takes it some milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(50);

/// What is left of a restore point that has a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// The tombstone, so that what the point led to may go.
    Tombstone,
    /// All of it, for as long as these read it.
    Read(Vec<Held>),
    /// All of it, for the storage does not let go of the manifest, as a lock does; what it said.
    Kept(String),
}

fn name(point: &Manifest) -> String {
    format!("{}@{}", point.vm, point.number)
}

impl Tenant {
    /// Holds a point, so that nothing forgets it, or no longer; durable when it returns.
    pub fn set_hold(&self, point: &Manifest, hold: &Hold) -> Result<(), VaultError> {
        let id = self.put_note(point, DatedKind::Hold.name(), hold.content())?;
        match self.tombstone(&point.vm, point.number) {
            Err(VaultError::Store(StoreError::NotFound(_))) => Ok(()),
            // Also one that can't be opened: whatever it is, the point is not there for who lists it.
            other => {
                self.drop_note(&point.vm, point.number, id)?;
                other?;
                Err(VaultError::NoPoint { vm: point.vm.clone(), point: name(point) })
            }
        }
    }

    /// Since when a point is held, and why, if it is.
    pub fn hold_of(&self, point: &Manifest, names: &NoteNames) -> Result<Option<HeldPoint>, VaultError> {
        let found = self.latest_note(point, names, DatedKind::Hold, |number| number == point.number, Hold::of)?;
        let counts = found.filter(|(note, hold)| hold.held && note.point_id == point.point_id);
        Ok(counts.map(|(note, hold)| HeldPoint { since: note.created, reason: hold.reason }))
    }

    /// Of the numbers that are asked about those that are held, told without their manifests, which may be damaged. A note that can't be opened
    /// counts.
    pub fn held_numbers(&self, vm: &VmName, asked: impl Fn(u32) -> bool) -> Result<BTreeSet<u32>, VaultError> {
        let names = self.note_names(vm)?;
        let (mut told, mut held) = (BTreeSet::new(), BTreeSet::new());
        for Name { number, id, .. } in names.latest(DatedKind::Hold, asked) {
            if told.contains(&number) {
                continue;
            }
            let counts = match self.note(vm, number, id) {
                Err(VaultError::Store(StoreError::NotFound(_))) => continue,
                Err(e) if e.damaged_object().is_some() => true,
                note => Hold::of(&note?).map_or(true, |hold| hold.held),
            };
            told.insert(number);
            if counts {
                held.insert(number);
            }
        }
        Ok(held)
    }

    /// Ends the hold of a number whose manifest can't be opened.
    pub fn release_damaged(&self, vm: &VmName, number: u32) -> Result<(), VaultError> {
        for Name { id, .. } in self.note_names(vm)?.latest(DatedKind::Hold, |of| of == number) {
            self.drop_note(vm, number, id)?;
        }
        Ok(())
    }

    /// An error if a point is held.
    pub fn check_not_held(&self, point: &Manifest) -> Result<(), VaultError> {
        match self.hold_of(point, &self.note_names(&point.vm)?)? {
            None => Ok(()),
            Some(HeldPoint { since, reason }) => Err(VaultError::Held { point: name(point), since, reason }),
        }
    }

    /// Begins to forget restore points: one process at a time does. Another one that does is waited for a while.
    pub fn forgetting(&self) -> Result<Forgetting<'_>, VaultError> {
        let holder = Holder::this_process("forgetting restore points".to_owned());
        let began = Instant::now();
        let alone = loop {
            match self.forget_lease(&holder) {
                Err(VaultError::Busy { .. }) if began.elapsed() < PATIENCE => thread::sleep(NAP),
                other => break other?,
            }
        };
        // As for a note: see `put_note`.
        let sealing = self.lease(&holder)?;
        self.refresh()?;
        self.settle_new_epoch()?;
        Ok(Forgetting { tenant: self, leases: [alone, sealing] })
    }
}

/// The one who forgets, for as long as it lives.
pub struct Forgetting<'a> {
    tenant: &'a Tenant,
    leases: [Box<dyn Lease>; 2],
}

impl Forgetting<'_> {
    /// Forgets a point that nobody holds: a tombstone takes the place of its manifest. Its space is free when it is pruned. What one
    /// who died in the midst has begun is finished.
    pub fn forget(&self, point: &Point, reason: &str) -> Result<Left, VaultError> {
        let tenant = self.tenant;
        let manifest = &point.manifest;
        tenant.check_not_held(manifest)?;
        let tombstone = Tombstone {
            vm: manifest.vm.clone(),
            vm_id: manifest.vm_id,
            number: manifest.number,
            point_id: manifest.point_id,
            digest: point.digest,
            parent: manifest.parent,
            reason: clipped(reason, MAX_TEXT),
            created: now(),
            fenced: false,
        };
        let key = layout::tombstone(&tenant.name, &manifest.vm, manifest.number);
        let sealed = tombstone.seal(&tenant.keys(), random()?).map_err(VaultError::damaged(&key))?;
        match tenant.store.create(&key, &sealed) {
            Ok(()) => {
                // Who has ended one of them may have changed the keys since.
                if let Err(e) = self.leases.iter().try_for_each(|lease| lease.check()) {
                    self.leases[0].take_back(&key)?;
                    return Err(e.into());
                }
            }
            Err(StoreError::Exists(_)) => {
                let there = tenant.tombstone(&manifest.vm, manifest.number)?;
                if (there.point_id, there.digest) != (manifest.point_id, point.digest) {
                    let source = FormatError::Mismatch("it is of another restore point than the manifest beside it");
                    return Err(VaultError::Damaged { object: key, source });
                }
            }
            Err(e) => return Err(e.into()),
        }
        if let Err(e) = tenant.check_not_held(manifest) {
            tenant.store.hide(&key)?;
            return Err(e);
        }
        self.delete_manifest(&manifest.vm, manifest.number)
    }

    /// Finishes what one who forgot and died has begun: the manifest that still stands beside a tombstone goes, unless the restore point is
    /// held, or somebody reads it.
    pub fn finish(&self, vm: &VmName, number: u32) -> Result<Left, VaultError> {
        let tenant = self.tenant;
        // One that somebody made up hides a point, and must not be what deletes it.
        let tombstone = tenant.tombstone(vm, number)?;
        let key = layout::manifest(&tenant.name, vm, number);
        let beside = tenant.open_sealed(&key, |keys, object| match is_fence(object) {
            true => Ok(None),
            false => Manifest::open(keys, vm, number, object).map(|(manifest, _)| Some(manifest)),
        });
        match beside {
            Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(Left::Tombstone),
            // The number is forgotten, whatever it was.
            Ok(None) | Err(VaultError::Damaged { .. }) => {}
            // Who died before he looked again whether it is held: he may have been too late.
            Ok(Some(manifest)) if manifest.point_id == tombstone.point_id => {
                if let Err(e) = tenant.check_not_held(&manifest) {
                    if matches!(e, VaultError::Held { .. }) {
                        tenant.store.hide(&layout::tombstone(&tenant.name, vm, number))?;
                    }
                    return Err(e);
                }
            }
            // Nobody was told that it is there: who makes a manifest looks for a tombstone then.
            Ok(Some(_)) => {}
            Err(e) => return Err(e),
        }
        self.delete_manifest(vm, number)
    }

    fn delete_manifest(&self, vm: &VmName, number: u32) -> Result<Left, VaultError> {
        let tenant = self.tenant;
        let readers = tenant.pinned(vm, number)?;
        if !readers.is_empty() {
            return Ok(Left::Read(readers));
        }
        match tenant.store.delete(&layout::manifest(&tenant.name, vm, number)) {
            Ok(()) | Err(StoreError::NotFound(_)) => Ok(Left::Tombstone),
            Err(e) if e.is_refused() => Ok(Left::Kept(e.to_string())),
            Err(e) => Err(e.into()),
        }
    }
}
