//! Rotating the KEK of a tenant, and moving the tenant to another KMS. Both wrap the master anew and replace the record;
//! nothing else in the vault changes.
//!
//! ```text
//! rotate: unwrap old → new key → wrap → replace the record ┃ remember the generation → retire the old key
//! ```
//!
//! It may be interrupted anywhere: left of ┃ the old record stands and the old key opens it; right of ┃ the new record
//! stands and names, sealed, the key that is still to be retired. The next rotation retires that first.

use reseal_format::tenant::KmsRef;
use reseal_kms::{KeyName, Kms};
use reseal_store::StoreError;

use crate::VaultError;
use crate::record::Record;
use crate::tenant::random;

/// What wrapping anew did.
pub struct Rewrapped {
    /// The record as it is now.
    pub record: Record,
    /// What wrapped the master before.
    pub old: KmsRef,
    /// The key that a rotation before this one had left behind, and that is retired now.
    pub finished: Option<String>,
}

impl Record {
    /// Makes new material for the KEK and wraps the master under it. The old one still opens the old record until
    /// [`Record::retire`].
    pub fn rotate(&self, kms: &dyn Kms) -> Result<Rewrapped, VaultError> {
        let old = self.kek()?;
        // Before anything is made: what can't be opened can't be wrapped anew.
        let payload = self.unwrap(kms)?;
        let finished = self.finish_rotation(&payload, kms)?;
        let new = kms.rotate(old.as_str())?;
        let previous = (new != old).then_some(old.as_str());
        let record = self.rewrap(&payload, kms, &new, previous.is_some(), previous)?;
        Ok(Rewrapped { record, old: self.record.kms.clone(), finished })
    }

    /// Wraps the master under a new key of another KMS.
    pub fn move_to(&self, from: &dyn Kms, to: &dyn Kms) -> Result<Rewrapped, VaultError> {
        let payload = self.unwrap(from)?;
        let finished = self.finish_rotation(&payload, from)?;
        let new = to.create(KeyName::for_tenant(self.name.as_str())?.as_str())?;
        let record = self.rewrap(&payload, to, &new, true, None)?;
        Ok(Rewrapped { record, old: self.record.kms.clone(), finished })
    }

    /// Retires the key that a rotation before this one has left behind, if there is any. Its name comes from what the master
    /// seals: a name that the storage could exchange would be another tenant's key.
    fn finish_rotation(&self, payload: &[u8], kms: &dyn Kms) -> Result<Option<String>, VaultError> {
        let keys = self.record.unlock(self.vault, &self.name, payload).map_err(VaultError::damaged(self.key()))?;
        let Some(previous) = keys.previous_kek() else { return Ok(None) };
        self.settle()?;
        kms.retire(previous, self.kek()?.as_str(), &self.context(), &self.record.wrapped)?;
        Ok(Some(previous.to_owned()))
    }

    fn rewrap(
        &self,
        payload: &[u8],
        kms: &dyn Kms,
        new: &KeyName,
        made: bool,
        previous: Option<&str>,
    ) -> Result<Record, VaultError> {
        let result = self.replaced(payload, kms, new, previous);
        let not_replaced = |e: &VaultError| matches!(e, VaultError::Store(StoreError::Changed(_))) || self.is_current();
        if made && result.as_ref().is_err_and(not_replaced) {
            // Nothing needs the new key. If it can't be destroyed, what counts is the error that led here.
            let _ = kms.destroy(new.as_str());
        }
        result
    }

    fn replaced(
        &self,
        payload: &[u8],
        kms: &dyn Kms,
        new: &KeyName,
        previous: Option<&str>,
    ) -> Result<Record, VaultError> {
        let damaged = || VaultError::damaged(self.key());
        let next = self.record.successor(self.vault, &self.name, payload).map_err(damaged())?;
        let (context, payload) = (self.context(), next.payload());
        let wrapped = kms.wrap(new.as_str(), &context, &payload)?;
        if *kms.unwrap(new.as_str(), &context, &wrapped)? != *payload {
            return Err(VaultError::NotWrapped { tenant: self.name.clone(), key: new.to_string() });
        }
        let reference = KmsRef { kind: kms.kind().into(), key: new.to_string() };
        self.replace(next.record(reference, wrapped, random()?, previous).map_err(damaged())?)
    }

    /// Ends a rotation: from now on the old key, or its old versions, opens no record before this one. It may be repeated.
    pub fn retire(&self, old: &KmsRef, kms: &dyn Kms) -> Result<(), VaultError> {
        Ok(kms.retire(&old.key, self.kek()?.as_str(), &self.context(), &self.record.wrapped)?)
    }
}
