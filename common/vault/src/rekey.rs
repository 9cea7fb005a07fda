//! Other keys for a tenant: each step replaces its record.
//!
//! Rotating the KEK, and moving the tenant to another KMS, wrap the master anew; nothing else in the vault changes.
//!
//! ```text
//! rotate: unwrap old → new key → wrap → replace the record ┃ remember the generation → retire the old key
//! ```
//!
//! That may be interrupted anywhere: left of ┃ the old record stands and the old key opens it; right of ┃ the new record
//! stands and names, sealed, the key that is still to be retired. The next rotation retires that first.
//!
//! Changing the data keys begins with a new master and a DEK of the next epoch, and ends without the older DEKs. In between
//! everything is sealed again (`writer/rekey.rs`); a record with more than one epoch says that this is not done.

use reseal_format::FormatError;
use reseal_format::keys::{Dek, Master};
use reseal_format::tenant::{KmsRef, Successor};
use reseal_kms::{KeyName, Kms};
use reseal_store::StoreError;

use crate::VaultError;
use crate::record::Record;
use crate::tenant::{random, random_key};

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
        let keys = self.keys(payload)?;
        let Some(previous) = keys.previous_kek() else { return Ok(None) };
        self.settle()?;
        kms.retire(previous, self.kek()?.as_str(), &self.context(), &self.record.wrapped)?;
        Ok(Some(previous.to_owned()))
    }

    pub(crate) fn rewrap(
        &self,
        payload: &[u8],
        kms: &dyn Kms,
        new: &KeyName,
        made: bool,
        previous: Option<&str>,
    ) -> Result<Record, VaultError> {
        let result = self.replaced(payload, kms, new, previous, |_| Ok(()));
        let not_replaced = |e: &VaultError| matches!(e, VaultError::Store(StoreError::Changed(_))) || self.is_current();
        if made && result.as_ref().is_err_and(not_replaced) {
            // Nothing needs the new key. If it can't be destroyed, what counts is the error that led here.
            let _ = kms.destroy(new.as_str());
        }
        result
    }

    /// Replaces the record by its next generation, wrapped by `new`, with what `change` makes of it.
    fn replaced(
        &self,
        payload: &[u8],
        kms: &dyn Kms,
        new: &KeyName,
        previous: Option<&str>,
        change: impl FnOnce(&mut Successor<'_>) -> Result<(), FormatError>,
    ) -> Result<Record, VaultError> {
        let damaged = || VaultError::damaged(self.key());
        let mut next = self.record.successor(self.vault, &self.name, payload).map_err(damaged())?;
        change(&mut next).map_err(damaged())?;
        let (context, payload) = (self.context(), next.payload());
        let wrapped = kms.wrap(new.as_str(), &context, &payload)?;
        if *kms.unwrap(new.as_str(), &context, &wrapped)? != *payload {
            return Err(VaultError::NotWrapped { tenant: self.name.clone(), key: new.to_string() });
        }
        let reference = KmsRef { kind: kms.kind().into(), key: new.to_string() };
        self.replace(next.record(reference, wrapped, random()?, previous).map_err(damaged())?)
    }

    /// Replaces what the master seals, and perhaps the master; the KEK stays, and so does the name of one that is still to be
    /// retired.
    pub(crate) fn change(
        &self,
        kms: &dyn Kms,
        change: impl FnOnce(&mut Successor<'_>) -> Result<(), FormatError>,
    ) -> Result<Record, VaultError> {
        let payload = self.unwrap(kms)?;
        let keys = self.keys(&payload)?;
        self.replaced(&payload, kms, &self.kek()?, keys.previous_kek(), change)
    }

    /// Begins to change the data keys: from now on all is sealed under a DEK of the next epoch, and another master seals
    /// that. What older epochs have sealed still opens.
    pub fn next_epoch(&self, kms: &dyn Kms, master: Master) -> Result<Record, VaultError> {
        let dek = Dek::from_bytes(random_key()?);
        self.change(kms, |next| next.set_next_epoch(master, &dek))
    }

    /// Ends a change of the data keys: destroys the DEKs of all epochs but the current one. What they have sealed does not
    /// open any more, so nothing may be left that is needed.
    pub fn end_old_epochs(&self, kms: &dyn Kms) -> Result<Record, VaultError> {
        self.change(kms, |next| next.drop_old_epochs())
    }

    /// Ends a rotation: from now on the old key, or its old versions, opens no record before this one. It may be repeated.
    pub fn retire(&self, old: &KmsRef, kms: &dyn Kms) -> Result<(), VaultError> {
        Ok(kms.retire(&old.key, self.kek()?.as_str(), &self.context(), &self.record.wrapped)?)
    }
}
