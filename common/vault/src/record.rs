//! A tenant's record: read, unlocked, and replaced by its next generation.
//!
//! Before a KMS is asked for anything, the record can say which KMS it needs, and which generation it is.

use std::sync::Arc;

use reseal_format::FormatError;
use reseal_format::ids::VaultId;
use reseal_format::keys::Scope;
use reseal_format::layout;
use reseal_format::names::TenantName;
use reseal_format::tenant::{KmsRef, MAX_RECORD, TenantKeys, TenantRecord};
use reseal_format::time::Timestamp;
use reseal_kms::{KeyName, Kms, Secret};
use reseal_store::{Store, StoreError};

use crate::locks;
use crate::refresh::{Opener, Unlocked};
use crate::tenant::{expect_no_tenant, kms_context, vault_id};
use crate::{Tenant, VaultError};

/// A tenant record as it was read. Nothing in it is trusted before a KMS has unwrapped it.
pub struct Record {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) name: TenantName,
    pub(crate) vault: VaultId,
    pub(crate) record: TenantRecord,
    /// The object, byte for byte: what a replacement must find.
    pub(crate) bytes: Vec<u8>,
}

impl Record {
    /// Reads the record, also of a tenant that was erased.
    pub fn read(store: Arc<dyn Store>, repo: &str, name: &TenantName) -> Result<Record, VaultError> {
        let vault = vault_id(&*store, repo)?;
        Record::in_vault(store, vault, name)
    }

    /// The same where the vault is known already.
    pub(crate) fn in_vault(store: Arc<dyn Store>, vault: VaultId, name: &TenantName) -> Result<Record, VaultError> {
        let key = layout::tenant_record(name);
        let bytes = match store.get(&key, MAX_RECORD) {
            Err(StoreError::NotFound(_)) => {
                expect_no_tenant(&*store, name)?;
                return Err(VaultError::NoTenant { tenant: name.clone() });
            }
            other => other?,
        };
        let record = TenantRecord::decode(&bytes).map_err(VaultError::damaged(&key))?;
        Ok(Record { store, name: name.clone(), vault, record, bytes })
    }

    /// The tenant's name.
    pub fn name(&self) -> &TenantName {
        &self.name
    }

    /// Vault and tenant.
    pub fn scope(&self) -> Scope {
        Scope { vault: self.vault, tenant: self.record.tenant_id }
    }

    /// Its generation, as it says.
    pub fn generation(&self) -> u64 {
        self.record.generation
    }

    /// Which KMS key wraps the master, as it says.
    pub fn kms(&self) -> &KmsRef {
        &self.record.kms
    }

    /// When the tenant was erased, if it says so.
    pub fn erased(&self) -> Option<Timestamp> {
        self.record.erased
    }

    /// Key of the object.
    pub fn key(&self) -> String {
        layout::tenant_record(&self.name)
    }

    /// Refuses a tenant that was erased.
    pub fn check_live(&self) -> Result<(), VaultError> {
        match self.record.erased {
            Some(when) => Err(VaultError::Erased { tenant: self.name.clone(), when }),
            None => Ok(()),
        }
    }

    /// Refuses a KMS of another kind before anything is sent to it, and a tenant that was erased.
    pub fn check_kind(&self, kind: &str) -> Result<(), VaultError> {
        self.check_live()?;
        if self.record.kms.kind != kind {
            let (tenant, wanted) = (self.name.clone(), self.record.kms.kind.clone());
            return Err(VaultError::OtherKms { tenant, wanted, given: kind.to_owned() });
        }
        Ok(())
    }

    /// The name of the KEK.
    pub(crate) fn kek(&self) -> Result<KeyName, VaultError> {
        // A name that was typed wrong is the user's mistake; one that was read is damage.
        let named = KeyName::parse(&self.record.kms.key);
        let named = named.map_err(|_| FormatError::Malformed("no KMS key has such a name"));
        named.map_err(VaultError::damaged(self.key()))
    }

    /// What a KMS binds the wrapped master to.
    pub(crate) fn context(&self) -> Vec<u8> {
        kms_context(&self.scope())
    }

    /// Has the KMS unwrap the payload.
    pub(crate) fn unwrap(&self, kms: &dyn Kms) -> Result<Secret, VaultError> {
        self.check_kind(kms.kind())?;
        Ok(kms.unwrap(self.kek()?.as_str(), &self.context(), &self.record.wrapped)?)
    }

    /// Has the KMS unwrap the master, and opens the tenant's keys.
    pub fn unlock_keys(&self, kms: &dyn Kms) -> Result<TenantKeys, VaultError> {
        let payload = self.unwrap(kms)?;
        self.keys(&payload)
    }

    /// The same for a tenant that is used for a while: the KMS is asked again when its record was replaced.
    pub fn unlock(&self, kms: Arc<dyn Kms>) -> Result<Tenant, VaultError> {
        let keys = self.unlock_keys(&*kms)?;
        Ok(self.opened(keys, Opener::Kms(kms)))
    }

    /// The keys that an unwrapped payload opens.
    pub(crate) fn keys(&self, payload: &[u8]) -> Result<TenantKeys, VaultError> {
        self.record.unlock(self.vault, &self.name, payload).map_err(VaultError::damaged(self.key()))
    }

    pub(crate) fn opened(&self, keys: TenantKeys, opener: Opener) -> Tenant {
        let unlocked = Unlocked { keys: Arc::new(keys), kms: self.record.kms.clone() };
        Tenant::new(self.store.clone(), self.name.clone(), opener, unlocked)
    }

    /// Puts the next generation in the place of this one, if this one is what the vault holds.
    pub(crate) fn replace(&self, next: TenantRecord) -> Result<Record, VaultError> {
        let bytes = next.encode();
        locks::replace(&*self.store, &self.key(), &self.bytes, &bytes)?;
        let (store, name, vault) = (self.store.clone(), self.name.clone(), self.vault);
        Ok(Record { store, name, vault, record: next, bytes })
    }

    /// Whether the vault holds this generation for certain, byte for byte.
    pub fn is_current(&self) -> bool {
        self.store.get(&self.key(), MAX_RECORD).is_ok_and(|now| now == self.bytes)
    }

    /// Makes durable that the vault holds this generation: who replaced it may have died before it was.
    pub fn settle(&self) -> Result<(), VaultError> {
        Ok(self.store.settle(&layout::tenant(&self.name))?)
    }
}
