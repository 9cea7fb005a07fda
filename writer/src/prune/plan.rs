//! Which packs go, and which are worth rewriting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use reseal_format::condemned::{Blobs, Condemned};
use reseal_format::ids::PackId;
use reseal_format::layout;
use reseal_format::ordinals::Ordinals;
use reseal_format::pack::TARGET_BYTES;
use reseal_store::Lock;
use reseal_vault::{PackFile, Packs, VaultError};

use crate::BackupError;
use crate::generations::{Listed, by_pack, key};
use crate::rewrite::open_anew;
use crate::spread::spread;
use crate::walk::{Need, Needed};

/// Usually no more is read of packs that are rewritten than one part of so many of what is stored, or this.
const USUAL_PART: u64 = 32;
const USUAL_LEAST: u64 = TARGET_BYTES;

/// What is to become of the packs.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What is about to go.
    pub condemned: Condemned,
    /// Packs of which nothing is needed.
    pub unneeded: Vec<Listed>,
    /// Packs that are mostly unused, or that another prune was about to rewrite or remove.
    pub mostly_unused: Vec<Listed>,
    /// Packs that stay as they are, but have older generations.
    pub superseded: Vec<Listed>,
    pub sizes: Sizes,
    /// Packs that are needed, and can't be opened or are missing.
    pub damaged: BTreeMap<String, String>,
    /// Whether one of these, or one that is locked, is what another prune was about to rewrite or remove.
    pub leaves_begun: bool,
}

/// Bytes of packs.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Sizes {
    /// Of all that were listed.
    pub all: u64,
    /// That nothing needs, in packs that are mostly used.
    pub unused: u64,
    /// That nothing needs, in packs that are mostly unused and left for the next time.
    pub postponed: u64,
    /// That nothing needs, in packs that the object store does not let go of yet.
    pub locked: u64,
    /// Until when, in seconds since 1970.
    pub locked_until: Option<i64>,
    /// That will be freed.
    pub to_free: u64,
}

impl Sizes {
    fn lock(&mut self, bytes: u64, lock: Lock) {
        self.locked += bytes;
        self.locked_until = self.locked_until.max(Some(lock.until));
    }
}

fn lock_of(packs: &Packs, file: &PackFile) -> Result<Option<Lock>, VaultError> {
    let tenant = packs.tenant();
    Ok(tenant.store().lock_of(&key(tenant, file))?)
}

/// A pack without the older generations that are locked; and those.
fn without_locked(packs: &Packs, pack: &Listed) -> Result<(Listed, Vec<(PackFile, Lock)>), VaultError> {
    let (mut older, mut locked) = (Vec::new(), Vec::new());
    for file in &pack.older {
        match lock_of(packs, file)? {
            Some(lock) => locked.push((*file, lock)),
            None => older.push(*file),
        }
    }
    Ok((Listed { newest: pack.newest, older }, locked))
}

/// Which blobs of a pack nothing needs.
struct Unused {
    ordinals: Ordinals,
    bytes: u64,
    /// Of those that are needed.
    rest: u64,
    /// Whether there is something that another prune has condemned.
    is_begun: bool,
}

impl Unused {
    fn of(packs: &Packs, file: PackFile, need: &Need, begun: &Condemned) -> Result<Unused, VaultError> {
        let handle = match packs.open_listed(file) {
            // What is kept of it may be, and not what is in the store.
            Err(e) if e.damaged_object().is_some() => open_anew(packs, file)?,
            handle => handle?,
        };
        let (mut ordinals, mut bytes) = (Ordinals::default(), 0);
        let is_there = |ordinal: &u32| handle.lengths().place(*ordinal).is_some();
        let is_begun = (0..handle.lengths().count()).filter(is_there).any(|ordinal| begun.contains(file.id, ordinal));
        for ordinal in (0..handle.lengths().count()).filter(|ordinal| !need.ordinals.contains(*ordinal)) {
            if let Some((_, length)) = handle.lengths().place(ordinal) {
                ordinals.insert(ordinal);
                bytes += length as u64;
            }
        }
        Ok(Unused { ordinals, bytes, is_begun, rest: handle.trailer().blob_bytes.saturating_sub(bytes) })
    }

    fn is_at_least(&self, percent: u8) -> bool {
        self.bytes > 0 && self.bytes * 100 >= (self.bytes + self.rest) * u64::from(percent)
    }

    /// What is read to free a byte, in millionths.
    fn price(&self) -> u64 {
        self.rest.saturating_mul(1_000_000) / self.bytes.max(1)
    }
}

/// Which packs are worth rewriting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Worth {
    /// Those of which at least so many percent are unused.
    pub percent: u8,
    /// As long as not more is read of them than this; `None`: what is usual.
    pub most: Option<u64>,
}

impl Worth {
    fn most(self, sizes: &Sizes) -> u64 {
        self.most.unwrap_or_else(|| (sizes.all / USUAL_PART).max(USUAL_LEAST))
    }
}

impl Plan {
    /// Compares what there is with what is needed.
    pub(super) fn new(
        packs: &Packs,
        listed: Vec<PackFile>,
        needed: &Needed,
        begun: &Condemned,
        worth: Worth,
        threads: usize,
    ) -> Result<Plan, BackupError> {
        let listed = by_pack(listed);
        let plan = Mutex::new(Plan::default());
        let candidates = Mutex::new(Vec::new());
        spread(&listed, threads, &AtomicBool::new(false), |pack| {
            let file = pack.newest;
            let (pack, locked_older) = &without_locked(packs, pack)?;
            let older: u64 = pack.older.iter().map(|file| file.length).sum();
            let found = needed.get(&file.id).map(|need| Unused::of(packs, file, need, begun)).transpose();
            let goes = match &found {
                Ok(None) => Some(file.length),
                Ok(Some(unused)) => (unused.is_begun || unused.is_at_least(worth.percent)).then_some(unused.bytes),
                Err(_) => None,
            };
            // What is locked is not rewritten either: it would stay beside what takes its place.
            let lock = goes.map(|_| lock_of(packs, &file)).transpose()?.flatten();
            let mut plan = plan.lock();
            plan.sizes.all += file.length + older;
            for (file, lock) in locked_older {
                plan.sizes.all += file.length;
                plan.sizes.lock(file.length, *lock);
            }
            if let (Some(bytes), Some(lock)) = (goes, lock) {
                plan.sizes.lock(bytes, lock);
                plan.leaves_begun |= begun.of(file.id).is_some();
                plan.leave(pack);
                return Ok(());
            }
            match found {
                Ok(None) => {
                    plan.sizes.to_free += file.length + older;
                    plan.condemned.add(file.id, Blobs::All);
                    plan.unneeded.push(pack.clone());
                    return Ok(());
                }
                Ok(Some(unused)) if goes.is_some() => {
                    candidates.lock().push((pack.clone(), unused));
                    return Ok(());
                }
                Ok(Some(unused)) => plan.sizes.unused += unused.bytes,
                Err(e) => match e.damaged_object() {
                    // Who reads it says what is wrong with it; here it only stays.
                    Some(object) => {
                        plan.leaves_begun |= begun.of(file.id).is_some();
                        plan.damaged.insert(object.to_owned(), e.to_string());
                        return Ok(());
                    }
                    None => return Err(e.into()),
                },
            }
            plan.leave(pack);
            Ok(())
        })?;
        let (mut plan, mut candidates) = (plan.into_inner(), candidates.into_inner());
        let present: BTreeSet<PackId> = listed.iter().map(|pack| pack.newest.id).collect();
        for (id, need) in needed.iter().filter(|(id, _)| !present.contains(id)) {
            // One that was rewritten while all were listed may have been missed.
            if packs.newest(*id)?.is_none() {
                let object = layout::pack(packs.tenant().name(), *id, need.generation);
                let what = format!("{object} is missing");
                plan.damaged.insert(object, what);
            }
        }
        // Those first that free most for what is read of them.
        candidates.sort_by_key(|(pack, unused)| (unused.price(), pack.newest.id));
        let most = worth.most(&plan.sizes);
        let mut read = 0;
        for (pack, unused) in candidates {
            // What was begun is of no more than a prune may read.
            read += if unused.is_begun { 0 } else { unused.rest };
            if read > most && !unused.is_begun {
                plan.sizes.postponed += unused.bytes;
                plan.leave(&pack);
                continue;
            }
            plan.sizes.to_free += unused.bytes + pack.older.iter().map(|file| file.length).sum::<u64>();
            plan.condemned.add(pack.newest.id, Blobs::Some(unused.ordinals));
            plan.mostly_unused.push(pack);
        }
        Ok(plan)
    }

    /// A pack that stays as it is.
    fn leave(&mut self, pack: &Listed) {
        if !pack.older.is_empty() {
            self.sizes.to_free += pack.older.iter().map(|file| file.length).sum::<u64>();
            self.superseded.push(pack.clone());
        }
    }
}
