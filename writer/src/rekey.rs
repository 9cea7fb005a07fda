//! Everything that a tenant has is sealed again under its newest DEK, while mounts and backups go on.
//!
//! ```text
//! the record has a DEK of a new epoch → who may still seal under an old one? → packs: next generation, then the old one goes
//!   → manifests, tombstones, notes: replaced → those who were at work have ended → what they sealed → nothing is left
//! ```
//!
//! What is done is seen in the objects themselves, so whoever goes on after an interruption needs no other memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use reseal_format::seal::{MAX_OBJECT, check, reseal};
use reseal_store::{Lease, StoreError};
use reseal_vault::{Epochs, Held, ObjectSeal, PackFile, PackSeal, Packs, Tenant, VaultError, random};
use serde::Serialize;

use crate::BackupError;
use crate::at_work::still;
use crate::generations::{self, Removal};
use crate::rewrite::{Rewriting, tables_open};
use crate::spread::spread;
use crate::throttle::Throttle;

/// How often is looked whether a process that may still seal under an old DEK has ended.
const NAP: Duration = Duration::from_millis(500);

/// What seals everything again.
pub struct Rekey<'a> {
    pub tenant: Arc<Tenant>,
    /// The one lease of who rewrites packs.
    pub under: &'a dyn Lease,
    pub workers: usize,
    /// For what is read.
    pub throttle: Option<Throttle>,
    /// Told how many bytes there will be more than was known before.
    pub expect: &'a (dyn Fn(u64) + Sync),
    /// Told of bytes that are sealed again.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Told what the administrator should know meanwhile.
    pub say: &'a (dyn Fn(&str) + Sync),
}

/// What was done, and what could not be.
#[derive(Debug, Default, Serialize)]
pub struct Resealed {
    pub packs: u64,
    /// Manifests, tombstones and notes.
    pub objects: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Old generations of packs that were removed.
    pub removed: u64,
    /// Old generations that the storage does not let go of, as an object lock does: nothing reads them any more.
    pub held_back: BTreeMap<String, String>,
    /// What is in use and could not be replaced, for the storage refuses.
    pub refused: BTreeMap<String, String>,
    /// What is damaged, so that it can't be sealed again.
    pub damaged: BTreeMap<String, String>,
}

impl Resealed {
    /// Whether nothing that is in use needs a DEK of an older epoch.
    pub fn is_complete(&self) -> bool {
        self.refused.is_empty() && self.damaged.is_empty()
    }
}

/// One thing to be done.
#[derive(Clone, Copy)]
enum Job<'a> {
    Pack(&'a PackSeal),
    Object(&'a ObjectSeal),
    /// An old generation of a pack, of which there is a higher one.
    Remove(PackFile, &'a PackSeal),
}

impl Rekey<'_> {
    /// Seals again what is not sealed under the newest DEK. When it returns, nobody can seal under an older one any more.
    pub fn run(&self) -> Result<Resealed, BackupError> {
        // After the record was changed: who is not among these reads it as it is now.
        let mut at_work = self.tenant.leases()?;
        let mut all = Resealed::default();
        self.round(&mut all)?;
        self.wait_for(&mut at_work)?;
        let epochs = loop {
            let (done, epochs) = self.round(&mut all)?;
            if done == 0 {
                break epochs;
            }
        };
        self.check(&epochs, &mut all)?;
        Ok(all)
    }

    /// Trailers and headers are clear, so what they say proves nothing: before a key is destroyed, what is said to be sealed
    /// under the newest one has to open with it.
    fn check(&self, epochs: &Epochs, all: &mut Resealed) -> Result<(), BackupError> {
        let packs = Packs::new(self.tenant.clone(), 0);
        let all = Mutex::new(all);
        for pack in &epochs.packs {
            is_whole(&packs, pack.file, &all)?;
        }
        for ObjectSeal { key, .. } in &epochs.objects {
            let object = match self.tenant.store().get(key, MAX_OBJECT) {
                Err(StoreError::NotFound(_)) => continue, // forgotten in between
                other => other.map_err(VaultError::from)?,
            };
            if let Err(e) = self.tenant.with_keys(key, |keys| check(keys, &object)) {
                note(e, &all)?;
            }
        }
        Ok(())
    }

    /// Waits until all of these have ended.
    fn wait_for(&self, at_work: &mut Vec<Held>) -> Result<(), BackupError> {
        let mut said = false;
        loop {
            *at_work = still(&self.tenant, std::mem::take(at_work), self.under, self.say, &mut |_| ())?;
            if at_work.is_empty() {
                return Ok(());
            }
            if !said {
                for lease in at_work.iter() {
                    (self.say)(&format!("waiting for the end of what began with the old keys: {lease}"));
                }
                said = true;
            }
            thread::sleep(NAP);
        }
    }

    /// Goes through all there is once; how much of it was done, and what there was before.
    fn round(&self, all: &mut Resealed) -> Result<(usize, Epochs), BackupError> {
        let keys = self.tenant.keys();
        let epochs = Epochs::of(&self.tenant)?;
        let packs = Packs::new(self.tenant.clone(), 0);
        let newest: BTreeMap<_, _> = epochs.packs.iter().map(|pack| (pack.file.id, pack)).collect();
        let older = epochs.superseded.iter().filter_map(|old| Some(Job::Remove(*old, newest.get(&old.id)?)));
        let old_packs = epochs.packs.iter().filter(|pack| pack.epoch != keys.current_epoch()).map(Job::Pack);
        let old_objects = epochs.objects.iter().filter(|object| object.epoch != keys.current_epoch()).map(Job::Object);
        let jobs: Vec<_> = older.chain(old_packs).chain(old_objects).collect();
        let bytes = jobs.iter().map(|job| match job {
            Job::Pack(pack) => pack.file.length,
            Job::Object(object) => object.length,
            Job::Remove(..) => 0,
        });
        (self.expect)(bytes.sum());
        // What the round before could not do, this one tries again.
        (all.held_back, all.refused, all.damaged) = Default::default();
        for error in &epochs.unknown {
            if let Some(object) = error.damaged_object() {
                all.damaged.insert(object.to_owned(), error.to_string());
            }
        }
        let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        let shared = Mutex::new(all);
        spread(&jobs, self.workers, &stop, |job| {
            let is_done = match job {
                Job::Pack(pack) => self.pack(&packs, pack, &stop, &shared),
                Job::Object(object) => self.object(object, &stop, &shared),
                Job::Remove(old, newest) => match is_whole(&packs, newest.file, &shared) {
                    Ok(true) => self.remove(*old, newest.file, &shared),
                    other => other,
                },
            };
            done.fetch_add(usize::from(is_done?), Ordering::Relaxed);
            Ok(())
        })?;
        Ok((done.into_inner(), epochs))
    }

    /// Seals a pack again as its next generation, and removes the old one.
    fn pack(
        &self,
        packs: &Packs,
        pack: &PackSeal,
        stop: &AtomicBool,
        all: &Mutex<&mut Resealed>,
    ) -> Result<bool, VaultError> {
        let rewriting = Rewriting { packs, throttle: self.throttle.as_ref(), stop, progress: self.progress };
        let generation = match rewriting.next_generation(pack.file, &|_| true) {
            Ok(Some(next)) => next.generation,
            Ok(None) => return Ok(false),
            Err(e) => return note(e, all),
        };
        // Whoever reads the pack finds the next generation before this one is gone.
        if !is_whole(packs, PackFile { generation, ..pack.file }, all)? {
            return Ok(false);
        }
        {
            let mut all = all.lock();
            all.packs += 1;
            all.bytes += pack.file.length;
        }
        self.remove(pack.file, PackFile { generation, ..pack.file }, all)?;
        Ok(true)
    }

    /// Removes a generation of a pack that another one has replaced; whether it is gone.
    fn remove(&self, old: PackFile, by: PackFile, all: &Mutex<&mut Resealed>) -> Result<bool, VaultError> {
        match generations::remove(&self.tenant, &old, Some(&by))? {
            Removal::Done => {
                all.lock().removed += 1;
                return Ok(true);
            }
            Removal::WasGone => {}
            Removal::HeldBack(why) => _ = all.lock().held_back.insert(generations::key(&self.tenant, &old), why),
        }
        Ok(false)
    }

    /// Seals a manifest, tombstone or note again, in its place.
    fn object(&self, object: &ObjectSeal, stop: &AtomicBool, all: &Mutex<&mut Resealed>) -> Result<bool, VaultError> {
        let ObjectSeal { key, length, .. } = object;
        if let Some(throttle) = &self.throttle {
            throttle.take(*length, stop);
        }
        let store = self.tenant.store();
        let resealed = store.get(key, MAX_OBJECT).map_err(VaultError::from).and_then(|old| {
            let new = reseal(&self.tenant.keys(), &old, random()?);
            let new = new.map_err(|source| VaultError::Damaged { object: key.clone(), source })?;
            self.tenant.replace_locked(key, &old, &new)
        });
        (self.progress)(*length);
        match resealed {
            // Somebody else was faster; the next round sees what it is now. One that is gone was forgotten.
            Err(VaultError::Store(StoreError::Changed(_) | StoreError::NotFound(_))) => Ok(true),
            Err(VaultError::Store(e)) if e.is_refused() => {
                all.lock().refused.insert(key.clone(), e.to_string());
                Ok(false)
            }
            Err(e) => note(e, all),
            Ok(()) => {
                let mut all = all.lock();
                all.objects += 1;
                all.bytes += length;
                Ok(true)
            }
        }
    }
}

/// Before an old generation goes, both tables of the new one must open.
fn is_whole(packs: &Packs, new: PackFile, all: &Mutex<&mut Resealed>) -> Result<bool, VaultError> {
    match tables_open(packs, new) {
        Ok(()) => Ok(true),
        Err(e) => note(e, all),
    }
}

/// Damage is reported, and does not stop the rest; what else went wrong does.
fn note(error: VaultError, all: &Mutex<&mut Resealed>) -> Result<bool, VaultError> {
    let unreadable = match &error {
        // A medium that can't be read there, not a store that can't be reached.
        VaultError::Store(StoreError::Io { key, action: "read", source })
            if source.raw_os_error() == Some(libc::EIO) =>
        {
            Some(key.as_str())
        }
        _ => None,
    };
    match error.damaged_object().or(unreadable) {
        Some(object) => {
            all.lock().damaged.insert(object.to_owned(), error.to_string());
            Ok(false)
        }
        None => Err(error),
    }
}
