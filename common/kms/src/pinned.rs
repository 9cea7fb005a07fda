//! A KMS that serves one key only: the one that the operator's configuration names for a tenant.

use std::path::PathBuf;

use crate::{KeyName, Kms, KmsError, Secret};

/// Refuses every other key before anything is sent.
pub(crate) struct Pinned {
    pub(crate) kms: Box<dyn Kms>,
    pub(crate) key: KeyName,
    pub(crate) tenant: String,
    /// The configuration, for errors.
    pub(crate) path: PathBuf,
}

impl Pinned {
    fn check(&self, key: &str) -> Result<(), KmsError> {
        if KeyName::parse(key)? == self.key {
            return Ok(());
        }
        let what = format!(
            "the tenant {} uses the key {} and no other, so nothing was sent for the key {key}: correct the \
             file, or look who changed the tenant's record",
            self.tenant, self.key
        );
        Err(KmsError::Config { path: self.path.clone(), what })
    }
}

impl Kms for Pinned {
    fn kind(&self) -> &'static str {
        self.kms.kind()
    }

    /// Makes the key of the configuration, whatever name is asked for: names are for the KMS to choose.
    fn create(&self, name: &str) -> Result<KeyName, KmsError> {
        KeyName::parse(name)?;
        let made = self.kms.create(self.key.as_str())?;
        self.check(made.as_str())?;
        Ok(made)
    }

    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
        self.check(key)?;
        self.kms.wrap(key, context, payload)
    }

    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError> {
        self.check(key)?;
        self.kms.unwrap(key, context, wrapped)
    }

    fn destroy(&self, key: &str) -> Result<(), KmsError> {
        self.check(key)?;
        self.kms.destroy(key)
    }

    /// Only where the name stays: another one would first have to stand in the configuration.
    fn rotate(&self, key: &str) -> Result<KeyName, KmsError> {
        self.check(key)?;
        let name = self.kms.rotate(key)?;
        if name == self.key {
            return Ok(name);
        }
        // Nothing was wrapped under it yet.
        let _ = self.kms.destroy(name.as_str());
        let what = format!(
            "the tenant {} uses the key {} and no other, but this KMS makes a new key to rotate: take `key` out of the \
             tenant's entry, then try again",
            self.tenant, self.key
        );
        Err(KmsError::Config { path: self.path.clone(), what })
    }

    fn retire(&self, old: &str, new: &str, context: &[u8], wrapped: &[u8]) -> Result<(), KmsError> {
        self.check(old)?;
        self.check(new)?;
        self.kms.retire(old, new, context, wrapped)
    }
}
