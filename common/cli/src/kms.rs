//! Which KMS keeps a tenant's key, as the operator's configuration says: one of those it describes, or the keyring.

use std::sync::Arc;

use reseal_format::names::TenantName;
use reseal_kms::config::KEYRING;
use reseal_kms::{Kms, KmsConfig};
use reseal_vault::{Record, VaultError};

use crate::{CommonArgs, Failure};

impl CommonArgs {
    /// The operator's KMS configuration. One that is named must be there; without the default one, all tenants use the keyring.
    pub fn kms_config(&self) -> Result<KmsConfig, Failure> {
        match (&self.kms_config, self.paths()?.kms_config) {
            (Some(given), _) => Ok(KmsConfig::load(given)?),
            (None, Some(default)) => Ok(KmsConfig::load_if_there(&default)?),
            (None, None) => Ok(KmsConfig::default()),
        }
    }

    /// The KMS that the configuration gives a tenant. One of another kind than the record names is refused before anything
    /// is sent to it, and before a passphrase is asked.
    pub fn kms_of(&self, record: &Record) -> Result<Arc<dyn Kms>, Failure> {
        record.check_live()?;
        self.refuse_recovery_kit()?;
        match self.kms_config()?.for_tenant(record.name().as_str())? {
            Some(kms) => {
                record.check_kind(kms.kind())?;
                Ok(kms.into())
            }
            None => {
                record.check_kind(KEYRING)?;
                Ok(Arc::new(self.open_keyring()?))
            }
        }
    }
}

/// Says whose keys a KMS does not give.
pub fn of_tenant(tenant: &TenantName, error: VaultError) -> Failure {
    let is_kms = matches!(error, VaultError::Kms(_));
    let failure = Failure::from(error);
    match is_kms {
        true => Failure::new(failure.status, format!("the keys of tenant {tenant}: {}", failure.message)),
        false => failure,
    }
}
