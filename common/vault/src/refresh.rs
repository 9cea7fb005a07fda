//! A process that runs for long learns that its tenant has new keys.
//!
//! ```text
//! an unknown epoch, or time to look → record of a later generation? → the KMS unwraps it → other keys → tried again
//! ```
//!
//! Keys are replaced as a whole: whoever has got hold of some keeps those until it is done. Only one thread at a time asks
//! the KMS, and a KMS that fails is left alone for a while, for every read of a mount may need it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use reseal_format::FormatError;
use reseal_format::layout;
use reseal_format::seal::MAX_OBJECT;
use reseal_format::tenant::{KmsRef, TenantKeys};
use reseal_format::vaultfile::{MAX_VAULT_FILE, VaultFile};
use reseal_kms::Kms;
use reseal_kms::kit::KitContents;

use crate::heads::record_rollback;
use crate::record::Record;
use crate::{Tenant, VaultError};

/// How long a KMS that failed is not asked again.
const PAUSE: Duration = Duration::from_secs(2);
/// How long a failure stands for that of the thread that asks at this moment: longer than a KMS mostly takes to fail, and
/// not so long that it says nothing about now.
const RECENT: Duration = Duration::from_secs(60);
/// How often something that is replaced while it is read is read: it is replaced once for each new generation of keys.
pub(crate) const ROUNDS: usize = 4;

/// What was unlocked of a record.
pub(crate) struct Unlocked {
    pub(crate) keys: Arc<TenantKeys>,
    pub(crate) kms: KmsRef,
}

impl Unlocked {
    fn generation(&self) -> u64 {
        self.keys.record_generation()
    }
}

/// What opens a tenant's record, and the next one too.
pub(crate) enum Opener {
    Kms(Arc<dyn Kms>),
    /// A recovery kit, in the place of the KMS.
    Kit(KitContents),
}

impl Opener {
    fn keys(&self, record: &Record) -> Result<TenantKeys, VaultError> {
        match self {
            Opener::Kms(kms) => record.unlock_keys(&**kms),
            Opener::Kit(kit) => record.keys_with(kit),
        }
    }

    /// Refuses a record that needs another KMS than the one that this process has.
    fn check(&self, record: &Record) -> Result<(), VaultError> {
        match self {
            Opener::Kms(kms) if kms.kind() != record.kms().kind => {
                let (wanted, given) = (record.kms().kind.clone(), kms.kind().to_owned());
                Err(VaultError::MovedKms { tenant: record.name().clone(), wanted, given })
            }
            _ => Ok(()),
        }
    }
}

/// Why the KMS did not give new keys, and when.
pub(crate) struct Failure {
    at: Instant,
    error: Arc<VaultError>,
}

impl Tenant {
    /// Has the KMS unwrap the tenant's record again if that was replaced since; whether there are other keys now.
    ///
    /// Of several that call it at once, one asks the KMS, and all have what came of that. A KMS that failed a moment ago is
    /// not asked: then the error is that of before.
    pub fn refresh(&self) -> Result<bool, VaultError> {
        self.refresh_since(self.record_generation())
    }

    /// Whether an error of [`Tenant::refresh`] means that the tenant is no more: it was erased, or is gone from a vault that is
    /// there.
    pub fn is_lost(&self, error: &VaultError) -> bool {
        match error {
            VaultError::Erased { .. } => true,
            VaultError::NoTenant { .. } | VaultError::Missing { .. } => {
                self.store.get(layout::VAULT_FILE, MAX_VAULT_FILE).is_ok_and(|bytes| {
                    VaultFile::decode(&bytes).is_ok_and(|file| file.vault_id == self.keys().scope().vault)
                })
            }
            _ => false,
        }
    }

    /// While the data keys are being changed: makes durable that the record says so. Who replaced it may have died before it was,
    /// and nothing may be sealed under a key that a power cut could take back.
    pub fn settle_new_epoch(&self) -> Result<(), VaultError> {
        match self.keys().epochs().count() {
            0 | 1 => Ok(()),
            _ => Ok(self.store.settle(&layout::tenant(&self.name))?),
        }
    }

    /// Sees to keys of a later generation than `known`; whether there are any.
    fn refresh_since(&self, known: u64) -> Result<bool, VaultError> {
        // Before the record is read, which then can't be older.
        let held = self.unlocked();
        if held.generation() > known {
            return Ok(true);
        }
        let record = self.read_again(&held)?;
        if record.generation() == held.generation() {
            return Ok(false);
        }
        let _turn = self.take_turn()?;
        if self.record_generation() >= record.generation() {
            return Ok(true);
        }
        match self.recent_failure(PAUSE) {
            Some(failure) => Err(failure),
            None => self.unlock_again(record, &held),
        }
    }

    /// The record as it stands in the vault, if it can be what follows the one that was unlocked.
    fn read_again(&self, held: &Unlocked) -> Result<Record, VaultError> {
        let record = Record::in_vault(self.store.clone(), held.keys.scope().vault, &self.name)?;
        if record.scope() != held.keys.scope() {
            let other = FormatError::Mismatch("it is the record of another tenant than this process has opened");
            return Err(VaultError::damaged(record.key())(other));
        }
        record.check_live()?;
        let (seen, now) = (held.generation(), record.generation());
        if now < seen {
            return Err(record_rollback(seen, now));
        }
        if now > seen {
            self.opener.check(&record)?;
        }
        Ok(record)
    }

    /// The right to ask the KMS. Nobody waits for a thread that asks one which has just failed.
    fn take_turn(&self) -> Result<MutexGuard<'_, ()>, VaultError> {
        if let Some(turn) = self.turn.try_lock() {
            return Ok(turn);
        }
        match self.recent_failure(RECENT) {
            Some(failure) => Err(failure),
            None => Ok(self.turn.lock()),
        }
    }

    fn recent_failure(&self, age: Duration) -> Option<VaultError> {
        let failure = self.failure.lock();
        let recent = failure.as_ref().filter(|failure| failure.at.elapsed() < age);
        recent.map(|failure| self.no_new_keys(failure.error.clone()))
    }

    fn no_new_keys(&self, source: Arc<VaultError>) -> VaultError {
        VaultError::NoNewKeys { tenant: self.name.clone(), source }
    }

    /// Asks the KMS and replaces the keys.
    fn unlock_again(&self, mut record: Record, held: &Unlocked) -> Result<bool, VaultError> {
        let mut round = 1;
        loop {
            let error = match self.opener.keys(&record) {
                Ok(keys) => {
                    *self.unlocked.write() = Arc::new(Unlocked { keys: Arc::new(keys), kms: record.kms().clone() });
                    *self.failure.lock() = None;
                    return Ok(true);
                }
                Err(error) => error,
            };
            // What it was wrapped under may have been retired by a rotation since it was read.
            let now = self.read_again(held)?;
            if now.generation() == record.generation() || round == ROUNDS {
                let error = Arc::new(error);
                *self.failure.lock() = Some(Failure { at: Instant::now(), error: error.clone() });
                return Err(self.no_new_keys(error));
            }
            record = now;
            round += 1;
        }
    }

    /// Opens something with the keys. Where it is sealed under an epoch that they lack, the tenant may have got new keys
    /// since: then it is opened with those. That they can't be had is no damage of the object.
    pub fn with_keys<T>(
        &self,
        object: &str,
        open: impl Fn(&TenantKeys) -> Result<T, FormatError>,
    ) -> Result<T, VaultError> {
        loop {
            let keys = self.keys();
            let opened = open(&keys);
            if !matches!(opened, Err(FormatError::UnknownEpoch(_))) || !self.has_newer_than(&keys)? {
                return opened.map_err(VaultError::damaged(object));
            }
        }
    }

    fn has_newer_than(&self, keys: &TenantKeys) -> Result<bool, VaultError> {
        self.refresh_since(keys.record_generation()).map_err(|e| match e {
            e @ VaultError::NoNewKeys { .. } => e,
            e => self.no_new_keys(Arc::new(e)),
        })
    }

    /// Reads an object that is sealed as one piece, and opens it.
    pub(crate) fn open_sealed<T>(
        &self,
        key: &str,
        open: impl Fn(&TenantKeys, &[u8]) -> Result<T, FormatError>,
    ) -> Result<T, VaultError> {
        let mut object = self.store.get(key, MAX_OBJECT)?;
        let mut round = 1;
        loop {
            let opened = self.with_keys(key, |keys| open(keys, &object));
            let Err(VaultError::Damaged { source: FormatError::UnknownEpoch(_), .. }) = opened else { return opened };
            // It may have been sealed anew since it was read, and its old key be gone.
            let now = self.store.get(key, MAX_OBJECT)?;
            if now == object || round == ROUNDS {
                return opened;
            }
            object = now;
            round += 1;
        }
    }
}
