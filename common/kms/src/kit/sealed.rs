//! A kit as it is kept: an age file, armored or not, or a sheet that was typed in again.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use age::armor::ArmoredReader;
use age::{DecryptError, Decryptor, scrypt};
use zeroize::Zeroizing;

use super::lock::{MAX_WORK_FACTOR, secret};
use super::{KitContents, KitKey, MAX_FILE, corrupt, document, sheet};
use crate::{KmsError, Secret, private_file};

/// How an age file begins, armored or not: a file named by mistake is told from a damaged kit.
const BEGINNINGS: [&[u8]; 2] = [b"-----BEGIN AGE ENCRYPTED FILE-----", b"age-encryption.org/"];

/// A kit that was read, and not opened yet.
#[derive(Debug)]
pub struct SealedKit {
    path: PathBuf,
    /// The age file.
    bytes: Vec<u8>,
}

impl SealedKit {
    /// Reads a kit in any of its forms. A sheet that was not copied right is refused by the lines that are wrong.
    pub fn read(path: &Path) -> Result<Self, KmsError> {
        let file = private_file::read(path, MAX_FILE)?;
        let file = file.ok_or_else(|| KmsError::KitMissing { path: path.to_owned() })?;
        let bytes = match is_age(&file) {
            true => file.to_vec(),
            false => sheet::decode(path, &file)?.ok_or_else(|| KmsError::NotAKit { path: path.to_owned() })?,
        };
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Whether a passphrase opens it; otherwise an identity does.
    pub fn is_under_passphrase(&self) -> Result<bool, KmsError> {
        Ok(decryptor(&self.path, &self.bytes)?.is_scrypt())
    }

    /// Opens it.
    pub fn open(&self, key: &KitKey) -> Result<KitContents, KmsError> {
        document::decode(&self.path, &open(&self.path, &self.bytes, key)?)
    }

    /// The kit as text to print, see [`sheet`]. `printed` is the date that stands there.
    pub fn sheet(&self, printed: &str) -> Result<String, KmsError> {
        let under_passphrase = self.is_under_passphrase()?;
        let mut binary = Vec::with_capacity(self.bytes.len());
        let mut reader = ArmoredReader::new(self.bytes.as_slice());
        reader.read_to_end(&mut binary).map_err(|_| corrupt(&self.path, "its armor"))?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        Ok(sheet::encode(&binary, &name, printed, under_passphrase))
    }
}

/// Whether bytes claim to be an age file.
pub(super) fn is_age(file: &[u8]) -> bool {
    let text = file.trim_ascii_start();
    BEGINNINGS.iter().any(|beginning| text.starts_with(beginning))
}

type AgeReader<'a> = BufReader<ArmoredReader<BufReader<&'a [u8]>>>;

fn decryptor<'a>(path: &Path, bytes: &'a [u8]) -> Result<Decryptor<AgeReader<'a>>, KmsError> {
    let reader = BufReader::new(ArmoredReader::new(bytes));
    Decryptor::new_buffered(reader).map_err(|error| refused(path, error))
}

pub(super) fn open(path: &Path, bytes: &[u8], key: &KitKey) -> Result<Secret, KmsError> {
    let decryptor = decryptor(path, bytes)?;
    let is_scrypt = decryptor.is_scrypt();
    let opened = match key {
        KitKey::Passphrase(_) if !is_scrypt => return Err(KmsError::KitNeedsIdentity { path: path.to_owned() }),
        KitKey::Identities(_) if is_scrypt => return Err(KmsError::KitNeedsPassphrase { path: path.to_owned() }),
        KitKey::Passphrase(passphrase) => {
            let mut identity = scrypt::Identity::new(secret(passphrase));
            identity.set_max_work_factor(MAX_WORK_FACTOR);
            decryptor.decrypt(std::iter::once(&identity as &dyn age::Identity))
        }
        KitKey::Identities(identities) => {
            decryptor.decrypt(identities.iter().map(|identity| identity as &dyn age::Identity))
        }
    };
    let mut reader = opened.map_err(|error| refused(path, error))?;
    // The plaintext is shorter than the file, so this never grows.
    let mut plaintext = Zeroizing::new(Vec::with_capacity(bytes.len() + 1));
    reader.read_to_end(&mut plaintext).map_err(|_| corrupt(path, "its content fails authentication"))?;
    Ok(plaintext)
}

/// What age's refusal means here.
fn refused(path: &Path, error: DecryptError) -> KmsError {
    let path = path.to_owned();
    match error {
        DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed => KmsError::KitWrongPassphrase { path },
        DecryptError::NoMatchingKeys => KmsError::KitOtherRecipients { path },
        DecryptError::ExcessiveWork { required, .. } => {
            KmsError::KitTooCostly { path, required, limit: MAX_WORK_FACTOR }
        }
        DecryptError::InvalidHeader | DecryptError::InvalidMac => corrupt(&path, "its header"),
        DecryptError::Io(_) => corrupt(&path, "its armor or header"),
        _ => KmsError::NotAKit { path },
    }
}
