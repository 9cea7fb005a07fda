//! Locks: what a tenant's restore points lead to can't be removed for a while, whoever has the keys of the object store.
//!
//! ```text
//! pack, manifest:      locked from their beginning on
//! a restore point:     what it shares with others is locked anew before it is committed, and its manifest says until when
//! another generation:  as long as the one that it replaces
//! ```
//!
//! A manifest's word is believed by the next restore point, which locks anew only what is not among what the one before it leads to, as
//! long as all that is locked for long enough. So a run asks for few locks, and every so often for all.

use reseal_format::ids::PackId;
use reseal_format::layout;
use reseal_format::lock::{LockMode as Mode, LockRule, Locked};
use reseal_format::time::Timestamp;
use reseal_kms::Kms;
use reseal_store::{Lock, LockMode, Store, StoreError, Upload};

use crate::record::Record;
use crate::{Packs, Tenant, VaultError};

/// The locks of a restore point in the making.
#[derive(Debug, Clone, Copy)]
pub struct Locks {
    rule: LockRule,
    /// When it was begun, in milliseconds by the store's clock.
    began: i64,
}

/// What has to be locked before a restore point is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToLock {
    /// All that it leads to, and not only what it does not share with the one before it.
    pub is_all: bool,
    /// Also what was made for it.
    pub own_too: bool,
    /// How all is locked then.
    pub locked: Locked,
}

/// How often is looked for the newest generation of a pack that is rewritten again and again.
const ROUNDS: usize = 4;

fn mode(mode: Mode) -> LockMode {
    match mode {
        Mode::Compliance => LockMode::Compliance,
        Mode::Governance => LockMode::Governance,
    }
}

impl Locks {
    /// Until when all is locked that was made since it was begun.
    fn fresh(self) -> i64 {
        self.began + self.rule.usual_ms()
    }

    /// What has to be locked, if what it shares with the restore point before it is locked until then.
    fn to_lock(self, now: i64, before: Option<Locked>) -> ToLock {
        let (least, anew) = (now + self.rule.least_ms(), now + self.rule.usual_ms());
        // So long a backup that what it made at first has to be locked again.
        let own_too = self.fresh() < least;
        let is_firm = |mode| self.rule.mode == Mode::Governance || mode == Mode::Compliance;
        let shared = before.filter(|before| is_firm(before.mode)).map_or(0, |before| before.until.0);
        let is_all = own_too || shared < least;
        let until = if own_too { anew } else { self.fresh().min(if is_all { anew } else { shared }) };
        let locked = Locked { until: Timestamp(until / 1000 * 1000), mode: self.rule.mode };
        ToLock { is_all, own_too, locked }
    }
}

impl Tenant {
    fn now_ms(&self) -> Result<i64, VaultError> {
        Ok(self.store.time()?.saturating_mul(1000))
    }

    /// How a rule locks what is made now.
    fn lock_by(&self, rule: LockRule) -> Result<Lock, VaultError> {
        Ok(Lock { until: (self.now_ms()? + rule.usual_ms()) / 1000, mode: mode(rule.mode) })
    }

    /// How what is made now is locked, if the tenant has a rule.
    fn lock_now(&self) -> Result<Option<Lock>, VaultError> {
        self.keys().lock().map(|rule| self.lock_by(rule)).transpose()
    }

    /// Starts an object that restore points lead to.
    pub(crate) fn upload(&self, key: &str) -> Result<Box<dyn Upload>, VaultError> {
        let mut upload = self.store.upload(key)?;
        if let Some(lock) = self.lock_now()? {
            upload.lock(lock)?;
        }
        Ok(upload)
    }

    /// Starts the next generation of a pack; it stays locked for as long as the one that it is made of.
    pub fn upload_next(&self, key: &str, of: &str) -> Result<Box<dyn Upload>, VaultError> {
        let mut upload = self.store.upload(key)?;
        if let Some(lock) = longest(self.lock_now()?, lock_that_ends(&*self.store, of)?) {
            upload.lock(lock)?;
        }
        Ok(upload)
    }

    /// Replaces an object, which stays locked for as long as it was before.
    pub fn replace_locked(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), VaultError> {
        Ok(replace(&*self.store, key, expected, new)?)
    }

    /// Locks a generation of a pack for as long as one that it has replaced: that may have been locked meanwhile.
    pub fn lock_as(&self, key: &str, replaced: &str) -> Result<(), VaultError> {
        match lock_that_ends(&*self.store, replaced)? {
            Some(lock) => Ok(self.store.lock(key, lock)?),
            None => Ok(()),
        }
    }

    /// Begins a restore point; `None` if what it leads to is not locked.
    pub fn locks(&self) -> Result<Option<Locks>, VaultError> {
        match self.keys().lock() {
            Some(rule) => Ok(Some(Locks { rule, began: self.now_ms()? })),
            None => Ok(None),
        }
    }

    /// What has to be locked before a restore point is committed, if what it shares with the one before it is locked until then.
    pub fn to_lock(&self, locks: Locks, before: Option<Locked>) -> Result<ToLock, VaultError> {
        let to_lock = locks.to_lock(self.now_ms()?, before);
        // What was made by another rule than it was begun by is not locked as it says.
        let is_changed = self.keys().lock() != Some(locks.rule);
        Ok(ToLock { is_all: to_lock.is_all || is_changed, own_too: to_lock.own_too || is_changed, ..to_lock })
    }

    /// Locks what every restore point needs: the vault's file and the tenant's record.
    pub fn lock_records(&self, locks: Locks) -> Result<(), VaultError> {
        let lock = self.lock_by(locks.rule)?;
        for key in [layout::VAULT_FILE.to_owned(), layout::tenant_record(&self.name)] {
            self.store.lock(&key, lock)?;
        }
        Ok(())
    }
}

impl Packs {
    /// Locks that generation of a pack, or the newest if it was rewritten meanwhile.
    pub fn lock(&self, locks: Locks, id: PackId, generation: u32) -> Result<(), VaultError> {
        let tenant = self.tenant();
        let lock = tenant.lock_by(locks.rule)?;
        let mut generation = generation;
        for _ in 0..ROUNDS {
            match tenant.store.lock(&layout::pack(&tenant.name, id, generation), lock) {
                Err(StoreError::NotFound(_)) => {}
                other => return Ok(other?),
            }
            generation = self.newest(id)?.map_or(generation, |newest| newest.generation);
        }
        Err(VaultError::Missing {
            object: layout::pack(&tenant.name, id, generation),
            why: "no generation of this pack is in the vault; restore it from a copy",
        })
    }
}

/// The lock of an object, if there is a moment when it ends.
fn lock_that_ends(store: &dyn Store, key: &str) -> Result<Option<Lock>, StoreError> {
    Ok(store.lock_of(key)?.filter(|lock| lock.until < i64::MAX))
}

/// Replaces an object, which stays locked for as long as it was before.
pub(crate) fn replace(store: &dyn Store, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
    match lock_that_ends(store, key)? {
        Some(lock) => store.replace_locked(key, expected, new, lock),
        None => store.replace(key, expected, new),
    }
}

/// That of two which lasts longer; as firm as the firmer.
fn longest(one: Option<Lock>, other: Option<Lock>) -> Option<Lock> {
    let (Some(one), Some(other)) = (one, other) else { return one.or(other) };
    let is_firm = [one, other].iter().any(|lock| lock.mode == LockMode::Compliance);
    let mode = if is_firm { LockMode::Compliance } else { LockMode::Governance };
    Some(Lock { until: one.until.max(other.until), mode })
}

impl Record {
    /// Has all that the tenant writes from now on be locked so, or not at all. Where the object store does not keep locks, that is refused.
    pub fn set_lock(&self, kms: &dyn Kms, rule: Option<LockRule>) -> Result<Record, VaultError> {
        if let Some(rule) = rule {
            self.store.probe_locks(mode(rule.mode))?;
        }
        self.change(kms, |next| next.set_lock(rule))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600 * 1000;

    #[test]
    fn all_is_locked_anew_where_what_is_shared_is_not_locked_for_long_enough() {
        let rule = |mode| LockRule { days: 8, mode };
        let locks = Locks { rule: rule(Mode::Compliance), began: 0 };
        let locked = |days: i64, mode| Locked { until: Timestamp(days * DAY), mode };
        let firm = |days| Some(locked(days, Mode::Compliance));
        let all = |own_too, days| ToLock { is_all: true, own_too, locked: locked(days, Mode::Compliance) };
        let new = |days| ToLock { is_all: false, own_too: false, locked: locked(days, Mode::Compliance) };
        assert_eq!(locks.to_lock(0, None), all(false, 10));
        assert_eq!(locks.to_lock(0, firm(8)), new(8));
        assert_eq!(locks.to_lock(DAY, firm(8)), all(false, 10));
        // A backup that takes so long that what it made at first is not locked for long enough any more.
        assert_eq!(locks.to_lock(2 * DAY, firm(99)), new(10));
        assert_eq!(locks.to_lock(3 * DAY, firm(99)), all(true, 13));
        // What is locked less firmly than it is to be.
        assert_eq!(locks.to_lock(0, Some(locked(99, Mode::Governance))), all(false, 10));
        let soft = Locks { rule: rule(Mode::Governance), began: 0 };
        assert!(!soft.to_lock(0, firm(99)).is_all && !soft.to_lock(0, Some(locked(99, Mode::Governance))).is_all);
    }

    #[test]
    fn of_two_locks_the_longer_counts_and_the_firmer() {
        let short = Lock { until: 1, mode: LockMode::Compliance };
        let long = Lock { until: 2, mode: LockMode::Governance };
        assert_eq!(longest(Some(short), Some(long)), Some(Lock { until: 2, mode: LockMode::Compliance }));
        assert_eq!([longest(None, Some(long)), longest(Some(short), None)], [Some(long), Some(short)]);
    }
}
