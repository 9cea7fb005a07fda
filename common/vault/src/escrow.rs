//! A tenant opened by its recovery kit: the master in it opens what the record seals, whatever has become of the KMS.
//!
//! ```text
//! kit → is it of this tenant? → payload, as the KEK would have given it → keys
//!                                                     └ wrap under a new key → replace the record
//! ```
//!
//! What a kit says is checked as what a KMS unwraps is: against vault, tenant and generation of the record, and by opening
//! what the master seals.

use reseal_format::FormatError;
use reseal_format::keys::Master;
use reseal_format::tenant::{TenantKeys, master_payload};
use reseal_kms::kit::KitContents;
use reseal_kms::{KeyName, Kms, Secret};
use zeroize::Zeroizing;

use crate::record::Record;
use crate::refresh::Opener;
use crate::rekey::Rewrapped;
use crate::{Tenant, VaultError};

impl Record {
    /// Has the KMS unwrap the master, for a recovery kit. It has opened the record.
    pub fn master(&self, kms: &dyn Kms) -> Result<Master, VaultError> {
        let payload = self.unwrap(kms)?;
        self.keys(&payload)?;
        self.record.master(&self.scope(), &payload).map_err(VaultError::damaged(self.key()))
    }

    /// The master of a kit, for another kit. It has opened the record.
    pub fn master_of(&self, kit: &KitContents) -> Result<Master, VaultError> {
        let payload = self.payload_of(kit)?;
        self.record.master(&self.scope(), &payload).map_err(VaultError::damaged(self.key()))
    }

    /// Opens the tenant's keys with the master of a kit. No KMS is asked.
    pub fn keys_with(&self, kit: &KitContents) -> Result<TenantKeys, VaultError> {
        self.keys(&self.payload_of(kit)?)
    }

    /// The same for a tenant that is used for a while, also where its record is replaced, unless by one with another master.
    pub fn unlock_with(&self, kit: KitContents) -> Result<Tenant, VaultError> {
        Ok(self.opened(self.keys_with(&kit)?, Opener::Kit(kit)))
    }

    /// Whether a KEK in the kit is the one that wraps the master in this record: a keyring with it opens the tenant.
    pub fn is_opened_by_kek_of(&self, kit: &KitContents, kind: &str) -> Result<bool, VaultError> {
        self.check_kit(kit)?;
        if self.record.kms.kind != kind {
            return Ok(false);
        }
        let payload = kit.unwrap(&self.record.kms.key, &self.context(), &self.record.wrapped);
        Ok(payload.is_some_and(|payload| self.keys(&payload).is_ok()))
    }

    /// Wraps the master of a kit under a new key, for a KMS that is gone or a key that is lost, and replaces the record.
    pub fn adopt(&self, kit: &KitContents, kms: &dyn Kms) -> Result<Rewrapped, VaultError> {
        let payload = self.payload_of(kit)?;
        let new = kms.create(KeyName::for_tenant(self.name.as_str())?.as_str())?;
        let record = self.rewrap(&payload, kms, &new, true, None)?;
        Ok(Rewrapped { record, old: self.record.kms.clone(), finished: None })
    }

    /// Refuses the kit of another tenant, and a tenant that was erased.
    pub fn check_kit(&self, kit: &KitContents) -> Result<(), VaultError> {
        self.check_live()?;
        let scope = self.scope();
        if kit.vault_id != scope.vault.to_string() || kit.tenant_id != scope.tenant.to_string() {
            let (of, vault, made) = (kit.tenant.clone(), kit.vault_id.clone(), kit.made.clone());
            return Err(VaultError::OtherKit { tenant: self.name.clone(), of, vault, made });
        }
        Ok(())
    }

    /// The payload as the KEK wraps it, from the master of a kit which opens what this record seals.
    fn payload_of(&self, kit: &KitContents) -> Result<Secret, VaultError> {
        self.check_kit(kit)?;
        let made = || kit.made.clone();
        let Some(master) = &kit.master else { return Err(VaultError::KitWithoutMaster { made: made() }) };
        let master = Master::from_bytes(Zeroizing::new(*master.expose()));
        let payload = master_payload(&self.scope(), self.generation(), &master);
        match self.record.unlock(self.vault, &self.name, &payload) {
            Ok(_) => Ok(payload),
            Err(FormatError::Authentication) => {
                let (tenant, generation) = (self.name.clone(), self.generation());
                Err(VaultError::OldKit { tenant, generation, made: made() })
            }
            Err(e) => Err(VaultError::damaged(self.key())(e)),
        }
    }
}
