//! The recovery kit (escrow): what opens a tenant's backups when the machine with the keyring, or the KMS, is gone.
//!
//! ```text
//! contents → JSON (document) → age, to a passphrase or to recipients (lock) → file (sealed), or paper (sheet)
//! ```
//!
//! An age file, ASCII-armored so that it can be printed and typed or scanned in again. Nothing stands before or after the
//! armor: `age -d KIT` opens it without this program, and shows the JSON. It holds the tenant's master, which opens the
//! tenant's record whatever KMS wraps it there, and the tenant's KEKs, where they are in a keyring.

mod document;
mod lock;
mod sealed;
mod sheet;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::Path;

pub use self::lock::{KitKey, KitLock, Recipient, read_identities, read_recipients};
pub use self::sealed::SealedKit;
use crate::{KeyBytes, KeyName, KmsError, NamedKey, Secret, keyring, private_file};

/// Largest file that is read.
const MAX_FILE: u64 = 1024 * 1024;

/// Most keys of one kit. Together with [`MAX_TEXT`] it keeps every kit far below [`MAX_FILE`].
const MAX_KEYS: usize = 1000;

/// Longest text of a field.
const MAX_TEXT: usize = 4096;

/// What a kit holds: the master and the keys, and what to use them for.
#[derive(Debug, PartialEq, Eq)]
pub struct KitContents {
    /// When it was made (RFC 3339), for people to read.
    pub made: String,
    /// The vault's id.
    pub vault_id: String,
    /// Where the vault was when the kit was made.
    pub repo: String,
    /// The tenant's name.
    pub tenant: String,
    /// The tenant's id.
    pub tenant_id: String,
    /// The kind of KMS that the tenant's key was in, see [`crate::Kms::kind`].
    pub kms: String,
    /// The tenant's master. Kits of version 1 have none.
    pub master: Option<KeyBytes>,
    /// The tenant's KEKs, where they were in a keyring.
    pub keys: Vec<NamedKey>,
}

impl KitContents {
    /// What a kit must be, checked before it is written and after it was read.
    fn check(&self) -> Result<(), &'static str> {
        let texts = [&self.made, &self.vault_id, &self.repo, &self.tenant, &self.tenant_id, &self.kms];
        if texts.iter().any(|text| text.is_empty() || text.len() > MAX_TEXT) {
            return Err("each field needs 1 to 4096 bytes");
        }
        if self.master.is_none() && self.keys.is_empty() {
            return Err("it needs a master or a key");
        }
        if self.keys.len() > MAX_KEYS {
            return Err("it has more than 1000 keys");
        }
        let names: BTreeSet<&KeyName> = self.keys.iter().map(|key| &key.name).collect();
        if names.len() != self.keys.len() {
            return Err("the name of a key is there twice");
        }
        Ok(())
    }

    /// What a keyring wrapped under the name of one of these keys, if that key opens it.
    pub fn unwrap(&self, name: &str, context: &[u8], wrapped: &[u8]) -> Option<Secret> {
        let key = self.keys.iter().find(|key| key.name.as_str() == name)?;
        keyring::unwrap_with(key, context, wrapped)
    }
}

/// Writes a kit to a new file that only this user may read. An existing file is never overwritten.
pub fn write_kit(path: &Path, kit: &KitContents, lock: &KitLock) -> Result<(), KmsError> {
    write_at_cost(path, kit, lock, lock::WORK_FACTOR)
}

fn write_at_cost(path: &Path, kit: &KitContents, lock: &KitLock, work_factor: u8) -> Result<(), KmsError> {
    // Before the second that scrypt takes; what decides is the creation below.
    if path.symlink_metadata().is_ok() {
        return Err(KmsError::KitExists { path: path.to_owned() });
    }
    let invalid = |what| KmsError::KitInvalid { path: path.to_owned(), what };
    kit.check().map_err(invalid)?;
    let Some(master) = &kit.master else { return Err(invalid("it needs the tenant's master")) };
    let plaintext = document::encode(kit, master);
    let armored = lock.seal(&plaintext, work_factor).map_err(private_file::failed("encrypt", path))?;
    write_new(path, &armored)
}

/// Writes the sheet of a kit to a new file that only this user may read.
pub fn write_sheet(path: &Path, sheet: &str) -> Result<(), KmsError> {
    write_new(path, sheet.as_bytes())
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), KmsError> {
    let mut suffix = [0; 4];
    getrandom::fill(&mut suffix).map_err(KmsError::Random)?;
    let staged = private_file::beside(path, &format!(".new-{}", hex::encode(suffix)));
    match private_file::write_new(path, &staged, bytes)? {
        true => Ok(()),
        false => Err(KmsError::KitExists { path: path.to_owned() }),
    }
}

/// Opens a kit: the armored or binary age file as this program, `age` or `rage` wrote it, or a sheet that was typed in again.
pub fn read_kit(path: &Path, key: &KitKey) -> Result<KitContents, KmsError> {
    SealedKit::read(path)?.open(key)
}

fn corrupt(path: &Path, what: &str) -> KmsError {
    KmsError::KitCorrupt { path: path.to_owned(), what: what.to_owned() }
}
