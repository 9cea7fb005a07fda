//! Crypto-erase: the KEK is destroyed, and the wrapped master goes from the record.
//!
//! ```text
//! unlock (it is this tenant's key) → remember the key → destroy it → prove that it opens nothing → replace the record
//! ```
//!
//! The record's name of the key can be exchanged by whoever holds the storage. So a key is destroyed only after it has
//! opened the record, or if this machine remembers that it had when an erasure before this one was interrupted.

use reseal_format::time::Timestamp;
use reseal_kms::Kms;

use crate::VaultError;
use crate::heads::Heads;
use crate::record::Record;

/// How an erasure went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erased {
    /// The keys that are destroyed.
    pub keys: Vec<String>,
    /// Generation of the record that says so.
    pub generation: u64,
}

impl Record {
    /// Destroys the tenant's KEK for good, and what is wrapped under it. May be repeated until it succeeds.
    ///
    /// With `key_is_gone`, a key that the KMS does not have is taken as destroyed, whoever did that.
    pub fn erase(
        &self,
        kms: &dyn Kms,
        heads: &Heads,
        when: Timestamp,
        key_is_gone: bool,
    ) -> Result<Erased, VaultError> {
        let key = self.kek()?.to_string();
        let mut keys = vec![key.clone()];
        match self.unlock_keys(kms) {
            Ok(unlocked) => {
                keys.extend(unlocked.previous_kek().map(str::to_owned));
                heads.begin_erasure(&keys)?;
            }
            Err(VaultError::Kms(e)) if e.is_key_missing() => {
                let begun = heads.erasure()?;
                match begun.contains(&key) {
                    true => keys = begun,
                    false if key_is_gone => {}
                    false => return Err(VaultError::NotErased { tenant: self.name.clone(), key }),
                }
            }
            Err(e) => return Err(e),
        }
        // The one that opens the record goes last: as long as it is there, this can begin anew.
        for key in keys.iter().rev() {
            match kms.destroy(key) {
                Err(e) if !e.is_key_missing() => return Err(e.into()),
                _ => {}
            }
        }
        self.prove_closed(kms, &key)?;
        let record = self.replace(self.record.erase(when).map_err(VaultError::damaged(self.key()))?)?;
        heads.remember(record.generation(), &[])?;
        heads.begin_erasure(&[])?;
        Ok(Erased { keys, generation: record.generation() })
    }

    /// The KMS has to show that it does not open the record any more.
    fn prove_closed(&self, kms: &dyn Kms, key: &str) -> Result<(), VaultError> {
        match kms.unwrap(key, &self.context(), &self.record.wrapped) {
            Err(e) if e.is_key_missing() || e.is_not_opened() => Ok(()),
            Err(e) => Err(e.into()),
            Ok(_) => Err(VaultError::StillOpens { tenant: self.name.clone(), key: key.to_owned() }),
        }
    }
}
