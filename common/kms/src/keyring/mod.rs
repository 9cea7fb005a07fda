//! The keyring: the embedded KMS, a local file outside the vault, for one machine and for trying things out.
//!
//! Modules in reading order: `keys` (the keys in memory), `file` (their JSON form), `wrapping` (what a KEK does), and here the
//! keyring itself, which is those three under a lock.
//!
//! An open keyring holds no keys: each operation reads the file again and wipes what it read. So a key that another process
//! imported is there at once, and one that it destroyed is gone at once.

mod file;
mod keys;
#[cfg(test)]
mod tests;
mod wrapping;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use self::file::{Content, MAX_FILE, Unlocked};
use self::keys::{Kek, Keys, MAX_KEYS};
use crate::kdf::{Cost, KdfParams};
use crate::private_file::{self, LOCK_PATIENCE, Lock};
use crate::{KeyBytes, KeyName, Kms, KmsError, NamedKey, Passphrase, Secret};

/// A local file with KEKs, see the module.
///
/// It opens only if it belongs to this user and nobody else has any access. Under a passphrase it is sealed as a whole; the
/// passphrase's key stays in memory while the keyring is open.
pub struct Keyring {
    path: PathBuf,
    unlocked: Option<Unlocked>,
    patience: Duration,
}

/// What [`Keyring::list`] tells of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its name.
    pub name: KeyName,
    /// When it was made or imported here, in seconds since 1970.
    pub created: u64,
}

/// What [`Keyring::import`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Keys that were not there before.
    pub added: Vec<KeyName>,
    /// Keys that were there, and are the same.
    pub already: Vec<KeyName>,
}

/// Whether the keyring at `path` is sealed under a passphrase.
pub fn is_passphrase_protected(path: &Path) -> Result<bool, KmsError> {
    Ok(matches!(read_content(path)?, Content::Sealed(_)))
}

/// What a keyring wrapped under a key that is at hand outside of one, if that key opens it.
pub(crate) fn unwrap_with(key: &NamedKey, context: &[u8], wrapped: &[u8]) -> Option<Secret> {
    let sealed = wrapping::parse(&key.name, wrapped).ok()?;
    wrapping::unwrap(&key.name, &key.key, context, sealed)
}

impl Keyring {
    /// Makes an empty keyring, and the folders above it for this user only. An existing one is never touched.
    pub fn create(path: &Path, passphrase: Option<&Passphrase>) -> Result<Self, KmsError> {
        Self::create_at_cost(path, passphrase, Cost::RECOMMENDED)
    }

    fn create_at_cost(path: &Path, passphrase: Option<&Passphrase>, cost: Cost) -> Result<Self, KmsError> {
        let path = std::path::absolute(path).map_err(private_file::failed("create", path))?;
        private_file::make_parents(&path)?;
        let keyring = Self { unlocked: unlock_anew(passphrase, cost)?, path, patience: LOCK_PATIENCE };
        let _lock = keyring.lock()?;
        let bytes = encode(&Keys::new(), keyring.unlocked.as_ref())?;
        if private_file::write_new(&keyring.path, &keyring.staged(), &bytes)? {
            Ok(keyring)
        } else {
            Err(KmsError::KeyringExists { path: keyring.path.clone() })
        }
    }

    /// Opens a keyring. `passphrase` is asked, with the path to show, only if the keyring is sealed, and once.
    pub fn open(path: &Path, passphrase: impl FnOnce(&Path) -> io::Result<Passphrase>) -> Result<Self, KmsError> {
        // Links are followed once, here: a change replaces the file, and must not replace the link.
        let path = match path.canonicalize() {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(KmsError::KeyringMissing { path: path.to_owned() });
            }
            Err(error) => return Err(private_file::failed("open", path)(error)),
        };
        let unlocked = match read_content(&path)? {
            Content::Plain(_) => None,
            Content::Sealed(sealed) => {
                let asked = passphrase(&path)
                    .map_err(|source| KmsError::PassphraseUnavailable { path: path.clone(), source })?;
                let key = sealed.kdf.derive(&asked)?;
                sealed.keys(&path, &key, KmsError::WrongPassphrase { path: path.clone() })?;
                Some(Unlocked { kdf: sealed.kdf, key })
            }
        };
        Ok(Self { path, unlocked, patience: LOCK_PATIENCE })
    }

    /// Where the file is, as an absolute path: it stays valid when a daemon changes its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and ages of all keys, in the order of their names.
    pub fn list(&self) -> Result<Vec<KeyInfo>, KmsError> {
        let info = |(name, kek): (KeyName, Kek)| KeyInfo { name, created: kek.created };
        Ok(self.load()?.keys.into_iter().map(info).collect())
    }

    /// The keys of these names, for a recovery kit. All, or an error that names the first missing one.
    pub fn export(&self, names: &[&str]) -> Result<Vec<NamedKey>, KmsError> {
        let mut keys = self.load()?.keys;
        let mut take = |name: &&str| {
            let name = KeyName::parse(name)?;
            match keys.remove(&name) {
                Some(kek) => Ok(NamedKey { name, key: kek.key }),
                None => Err(self.missing(&name)),
            }
        };
        names.iter().map(&mut take).collect()
    }

    /// Adds keys of a recovery kit. One that is there already stays; if one has the name of a different key, nothing is changed.
    pub fn import(&self, keys: &[NamedKey]) -> Result<Imported, KmsError> {
        let mut imported = Imported::default();
        self.update(|own| {
            for NamedKey { name, key } in keys {
                match own.get(name) {
                    Some(kek) if kek.key == *key => imported.already.push(name.clone()),
                    Some(_) => {
                        return Err(KmsError::KeyConflict { path: self.path.clone(), key: name.to_string() });
                    }
                    None => {
                        own.insert(name.clone(), Kek { created: now(), key: key.duplicate() });
                        imported.added.push(name.clone());
                    }
                }
            }
            Ok(())
        })?;
        Ok(imported)
    }

    /// Sets, changes or, with none, removes the passphrase. Copies made before still open with the old one.
    pub fn set_passphrase(&mut self, passphrase: Option<&Passphrase>) -> Result<(), KmsError> {
        self.set_passphrase_at_cost(passphrase, Cost::RECOMMENDED)
    }

    fn set_passphrase_at_cost(&mut self, passphrase: Option<&Passphrase>, cost: Cost) -> Result<(), KmsError> {
        let unlocked = unlock_anew(passphrase, cost)?;
        let _lock = self.lock()?;
        let loaded = self.load()?;
        self.replace(&encode(&loaded.keys, unlocked.as_ref())?)?;
        self.unlocked = unlocked;
        Ok(())
    }

    /// Reads the file as it is now.
    fn load(&self) -> Result<Loaded, KmsError> {
        let path = || self.path.clone();
        match read_content(&self.path)? {
            Content::Plain(keys) => Ok(Loaded { keys, sealed: false }),
            Content::Sealed(sealed) => match &self.unlocked {
                // The key is known to be right for these parameters, so what does not open now is damaged.
                Some(unlocked) if unlocked.kdf == sealed.kdf => {
                    let what = "its seal is broken".to_owned();
                    let keys =
                        sealed.keys(&self.path, &unlocked.key, KmsError::KeyringCorrupt { path: path(), what })?;
                    Ok(Loaded { keys, sealed: true })
                }
                _ => Err(KmsError::PassphraseChanged { path: path() }),
            },
        }
    }

    /// Changes the keys under the lock, from what the file has at that moment, and keeps its form, sealed or in the clear.
    fn update(&self, change: impl FnOnce(&mut Keys) -> Result<(), KmsError>) -> Result<(), KmsError> {
        let _lock = self.lock()?;
        let Loaded { mut keys, sealed } = self.load()?;
        let before = keys.len();
        change(&mut keys)?;
        if keys.len() > MAX_KEYS {
            return Err(KmsError::KeyringFull { path: self.path.clone(), limit: MAX_KEYS });
        }
        // Keys are added or removed, never altered, so their number tells whether there is anything to write.
        if keys.len() == before {
            return Ok(());
        }
        let unlocked = self.unlocked.as_ref().filter(|_| sealed);
        self.replace(&encode(&keys, unlocked)?)
    }

    fn lock(&self) -> Result<Lock, KmsError> {
        let lock = Lock::acquire(&private_file::beside(&self.path, ".lock"), self.patience)?;
        // What a writer that was killed left behind holds keys, and is in the way. Nobody else is writing now.
        match std::fs::remove_file(self.staged()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(private_file::failed("remove", &self.staged())(error))
            }
            _ => Ok(lock),
        }
    }

    fn replace(&self, bytes: &[u8]) -> Result<(), KmsError> {
        private_file::replace(&self.path, &self.staged(), bytes)
    }

    /// Where a new file is written before it takes the place of the old one. Only the holder of the lock touches it.
    fn staged(&self) -> PathBuf {
        private_file::beside(&self.path, ".new")
    }

    fn missing(&self, name: &KeyName) -> KmsError {
        KmsError::KeyMissing { path: self.path.clone(), key: name.to_string() }
    }

    /// One key, for one operation.
    fn key(&self, name: &KeyName) -> Result<KeyBytes, KmsError> {
        match self.load()?.keys.remove(name) {
            Some(kek) => Ok(kek.key),
            None => Err(self.missing(name)),
        }
    }
}

impl Kms for Keyring {
    fn kind(&self) -> &'static str {
        "keyring"
    }

    fn create(&self, name: &str) -> Result<KeyName, KmsError> {
        let name = KeyName::parse(name)?;
        let key = KeyBytes::random()?;
        self.update(|keys| {
            if keys.contains_key(&name) {
                return Err(KmsError::KeyExists { path: self.path.clone(), key: name.to_string() });
            }
            keys.insert(name.clone(), Kek { created: now(), key });
            Ok(())
        })?;
        Ok(name)
    }

    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
        let name = KeyName::parse(key)?;
        crate::kms::check_lengths(context, payload)?;
        wrapping::wrap(&name, &self.key(&name)?, context, payload)
    }

    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError> {
        let name = KeyName::parse(key)?;
        crate::kms::check_lengths(context, &[])?;
        let sealed = wrapping::parse(&name, wrapped)?;
        wrapping::unwrap(&name, &self.key(&name)?, context, sealed)
            .ok_or_else(|| KmsError::Unwrap { path: self.path.clone(), key: name.to_string() })
    }

    /// The old file's blocks stay on the disk until they are used again: who must destroy a key for certain keeps the keyring
    /// under a passphrase, or uses a KMS.
    fn destroy(&self, key: &str) -> Result<(), KmsError> {
        let name = KeyName::parse(key)?;
        self.update(|keys| keys.remove(&name).map(drop).ok_or_else(|| self.missing(&name)))
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring")
            .field("path", &self.path)
            .field("sealed", &self.unlocked.is_some())
            .finish_non_exhaustive()
    }
}

/// What the file has at one moment.
struct Loaded {
    keys: Keys,
    sealed: bool,
}

fn read_content(path: &Path) -> Result<Content, KmsError> {
    let bytes = private_file::read_private(path, MAX_FILE)?;
    let bytes = bytes.ok_or_else(|| KmsError::KeyringMissing { path: path.to_owned() })?;
    file::decode(path, &bytes)
}

fn encode(keys: &Keys, unlocked: Option<&Unlocked>) -> Result<Secret, KmsError> {
    match unlocked {
        Some(unlocked) => file::encode_sealed(keys, unlocked),
        None => Ok(file::encode_plain(keys)),
    }
}

/// The key of a new passphrase, under a new salt.
fn unlock_anew(passphrase: Option<&Passphrase>, cost: Cost) -> Result<Option<Unlocked>, KmsError> {
    let Some(passphrase) = passphrase else {
        return Ok(None);
    };
    let kdf = KdfParams::fresh(cost)?;
    let key = kdf.derive(passphrase)?;
    Ok(Some(Unlocked { kdf, key }))
}

/// Seconds since 1970, for people to read: nothing is decided by it.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
