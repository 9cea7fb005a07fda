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
use reseal_format::lock::{LockMode as Mode, LockRule};
use reseal_format::time::Timestamp;
use reseal_kms::Kms;
use reseal_store::{Lock, LockMode, StoreError, Upload};

use crate::record::Record;
use crate::{Tenant, VaultError};

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
    /// Until when all is locked then.
    pub until: Timestamp,
}

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
    fn to_lock(self, now: i64, before: Option<Timestamp>) -> ToLock {
        let (least, anew) = (now + self.rule.least_ms(), now + self.rule.usual_ms());
        // So long a backup that what it made at first has to be locked again.
        let own_too = self.fresh() < least;
        let shared = before.map_or(0, |Timestamp(until)| until);
        let is_all = own_too || shared < least;
        let until = if own_too { anew } else { self.fresh().min(if is_all { anew } else { shared }) };
        ToLock { is_all, own_too, until: Timestamp(until / 1000 * 1000) }
    }
}

impl Tenant {
    fn now_ms(&self) -> Result<i64, VaultError> {
        Ok(self.store.time()?.saturating_mul(1000))
    }

    fn lock_from(&self, rule: LockRule, now_ms: i64) -> Lock {
        Lock { until: (now_ms + rule.usual_ms()) / 1000, mode: mode(rule.mode) }
    }

    /// How what is made now is locked, if the tenant has a rule.
    fn lock_now(&self) -> Result<Option<Lock>, VaultError> {
        match self.keys().lock() {
            Some(rule) => Ok(Some(self.lock_from(rule, self.now_ms()?))),
            None => Ok(None),
        }
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
        if let Some(lock) = longest(self.lock_now()?, self.lock_that_ends(of)?) {
            upload.lock(lock)?;
        }
        Ok(upload)
    }

    /// The lock of an object, if there is a moment when it ends.
    fn lock_that_ends(&self, key: &str) -> Result<Option<Lock>, VaultError> {
        Ok(self.store.lock_of(key)?.filter(|lock| lock.until < i64::MAX))
    }

    /// Replaces an object, which stays locked for as long as the one before.
    pub fn replace_locked(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), VaultError> {
        let before = self.lock_that_ends(key)?;
        self.store.replace(key, expected, new)?;
        Ok(before.map_or(Ok(()), |lock| self.store.lock(key, lock))?)
    }

    /// Begins a restore point; `None` if what it leads to is not locked.
    pub fn locks(&self) -> Result<Option<Locks>, VaultError> {
        match self.keys().lock() {
            Some(rule) => Ok(Some(Locks { rule, began: self.now_ms()? })),
            None => Ok(None),
        }
    }

    /// What has to be locked before a restore point is committed, if what it shares with the one before it is locked until then.
    pub fn to_lock(&self, locks: Locks, before: Option<Timestamp>) -> Result<ToLock, VaultError> {
        Ok(locks.to_lock(self.now_ms()?, before))
    }

    /// Locks what every restore point needs: the vault's file and the tenant's record.
    pub fn lock_records(&self, locks: Locks) -> Result<(), VaultError> {
        let lock = self.lock_from(locks.rule, self.now_ms()?);
        for key in [layout::VAULT_FILE.to_owned(), layout::tenant_record(&self.name)] {
            self.store.lock(&key, lock)?;
        }
        Ok(())
    }

    /// Locks that generation of a pack, or the newest if it was rewritten meanwhile.
    pub fn lock_pack(&self, locks: Locks, id: PackId, generation: u32) -> Result<(), VaultError> {
        let lock = self.lock_from(locks.rule, self.now_ms()?);
        match self.store.lock(&layout::pack(&self.name, id, generation), lock) {
            Err(StoreError::NotFound(_)) => {}
            other => return Ok(other?),
        }
        let shelf = self.store.list(&layout::pack_shelf(&self.name, id))?;
        let newest =
            shelf.iter().filter_map(|entry| layout::parse_pack_file(&entry.name)).filter(|(of, _)| *of == id).max();
        let Some((_, generation)) = newest else {
            return Err(VaultError::Missing {
                object: layout::pack(&self.name, id, generation),
                why: "no generation of this pack is in the vault; restore it from a copy",
            });
        };
        Ok(self.store.lock(&layout::pack(&self.name, id, generation), lock)?)
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
        let locks = Locks { rule: LockRule { days: 8, mode: Mode::Compliance }, began: 0 };
        let day = |days: i64| Timestamp(days * DAY);
        let all = |own_too, until| ToLock { is_all: true, own_too, until: day(until) };
        assert_eq!(locks.to_lock(0, None), all(false, 10));
        assert_eq!(locks.to_lock(0, Some(day(8))), ToLock { is_all: false, own_too: false, until: day(8) });
        assert_eq!(locks.to_lock(DAY, Some(day(8))), all(false, 10));
        // A backup that takes so long that what it made at first is not locked for long enough any more.
        assert_eq!(locks.to_lock(2 * DAY, Some(day(99))), ToLock { is_all: false, own_too: false, until: day(10) });
        assert_eq!(locks.to_lock(3 * DAY, Some(day(99))), all(true, 13));
    }

    #[test]
    fn of_two_locks_the_longer_counts_and_the_firmer() {
        let short = Lock { until: 1, mode: LockMode::Compliance };
        let long = Lock { until: 2, mode: LockMode::Governance };
        assert_eq!(longest(Some(short), Some(long)), Some(Lock { until: 2, mode: LockMode::Compliance }));
        assert_eq!([longest(None, Some(long)), longest(Some(short), None)], [Some(long), Some(short)]);
    }
}
