//! The recovery kit: what opens a tenant's backups when the machine with the keyring is gone.
//!
//! An age file under a passphrase, ASCII-armored so that it can be printed and typed or scanned in again. Nothing stands before
//! or after the armor: `age -d KIT` opens it without this program, and shows the JSON below.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;

use age::armor::{ArmoredReader, ArmoredWriter, Format};
use age::secrecy::SecretString;
use age::{DecryptError, Decryptor, Encryptor, scrypt};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::secret::key_hex;
use crate::{KeyBytes, KeyName, KmsError, NamedKey, Passphrase, Secret, private_file};

/// Largest file that is read.
const MAX_FILE: u64 = 1024 * 1024;

/// Most keys of one kit. Together with [`MAX_TEXT`] it keeps every kit far below [`MAX_FILE`].
const MAX_KEYS: usize = 1000;

/// Longest text of a field.
const MAX_TEXT: usize = 4096;

/// Room for the JSON of one key, and for the six texts should JSON escape each byte of them, so that the buffer never grows and
/// leaves pieces behind.
const KEY_ROOM: usize = 512;
const TEXT_ROOM: usize = 6 * 6 * MAX_TEXT + 4096;

/// log2 of the scrypt cost of a new kit: 256 MiB, under a second on a server, and what `age` itself takes. Fixed, not measured on
/// this machine: the one that recovers may be smaller.
const WORK_FACTOR: u8 = 18;

/// Highest cost that is accepted: 1 GiB. A hostile kit must not take the machine's memory.
const MAX_WORK_FACTOR: u8 = 20;

/// How an age file begins, armored or not: a file named by mistake is told from a damaged kit.
const BEGINNINGS: [&[u8]; 2] = [b"-----BEGIN AGE ENCRYPTED FILE-----", b"age-encryption.org/"];

const FORMAT: &str = "reseal-recovery-kit";
const VERSION: u64 = 1;

/// Read by whoever opens a kit with `age` years later.
const NOTE: &str = "Keys of a reseal tenant. On a machine with access to the vault: reseal key import KIT. Keep secret: with the vault, this opens all backups.";

/// What a kit holds: the keys, and what to use them for.
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
    /// The kind of KMS that the keys come from, see [`crate::Kms::kind`].
    pub kms: String,
    /// The tenant's KEKs.
    pub keys: Vec<NamedKey>,
}

impl KitContents {
    /// What a kit must be, checked before it is written and after it was read.
    fn check(&self) -> Result<(), &'static str> {
        let texts = [&self.made, &self.vault_id, &self.repo, &self.tenant, &self.tenant_id, &self.kms];
        if texts.iter().any(|text| text.is_empty() || text.len() > MAX_TEXT) {
            return Err("each field needs 1 to 4096 bytes");
        }
        if self.keys.is_empty() || self.keys.len() > MAX_KEYS {
            return Err("it needs 1 to 1000 keys");
        }
        let names: BTreeSet<&KeyName> = self.keys.iter().map(|key| &key.name).collect();
        if names.len() != self.keys.len() {
            return Err("the name of a key is there twice");
        }
        Ok(())
    }
}

/// What is read first, from a kit of any version.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u64,
    note: String,
    made: String,
    vault_id: String,
    repo: String,
    tenant: String,
    tenant_id: String,
    kms: String,
    keys: Vec<KeyEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: KeyName,
    #[serde(with = "key_hex")]
    key: KeyBytes,
}

/// Writes a kit to a new file that only this user may read. An existing file is never overwritten.
pub fn write_kit(path: &Path, kit: &KitContents, passphrase: &Passphrase) -> Result<(), KmsError> {
    write_at_cost(path, kit, passphrase, WORK_FACTOR)
}

fn write_at_cost(path: &Path, kit: &KitContents, passphrase: &Passphrase, work_factor: u8) -> Result<(), KmsError> {
    let exists = || KmsError::KitExists { path: path.to_owned() };
    // Before the second that scrypt takes; what decides is the creation below.
    if path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    kit.check().map_err(|what| KmsError::KitInvalid { path: path.to_owned(), what })?;
    let armored = seal(&encode(kit), passphrase, work_factor).map_err(private_file::failed("encrypt", path))?;
    let mut suffix = [0; 4];
    getrandom::fill(&mut suffix).map_err(KmsError::Random)?;
    let staged = private_file::beside(path, &format!(".new-{}", hex::encode(suffix)));
    match private_file::write_new(path, &staged, &armored)? {
        true => Ok(()),
        false => Err(exists()),
    }
}

/// Opens a kit. One that was re-encrypted with `age` or `rage` under a passphrase opens too, armored or not.
pub fn read_kit(path: &Path, passphrase: &Passphrase) -> Result<KitContents, KmsError> {
    let file = private_file::read(path, MAX_FILE)?;
    let file = file.ok_or_else(|| KmsError::KitMissing { path: path.to_owned() })?;
    decode(path, &open(path, &file, passphrase)?)
}

fn seal(plaintext: &[u8], passphrase: &Passphrase, work_factor: u8) -> std::io::Result<Vec<u8>> {
    let mut recipient = scrypt::Recipient::new(secret(passphrase));
    recipient.set_work_factor(work_factor);
    let encryptor = Encryptor::with_recipients(std::iter::once(&recipient as &dyn age::Recipient))
        .map_err(std::io::Error::other)?;
    let armor = ArmoredWriter::wrap_output(Vec::new(), Format::AsciiArmor)?;
    let mut writer = encryptor.wrap_output(armor)?;
    writer.write_all(plaintext)?;
    writer.finish()?.finish()
}

fn open(path: &Path, file: &[u8], passphrase: &Passphrase) -> Result<Secret, KmsError> {
    let text = file.trim_ascii_start();
    if !BEGINNINGS.iter().any(|beginning| text.starts_with(beginning)) {
        return Err(KmsError::NotAKit { path: path.to_owned() });
    }
    let reader = ArmoredReader::new(file);
    let decryptor = Decryptor::new_buffered(std::io::BufReader::new(reader)).map_err(|error| refused(path, error))?;
    if !decryptor.is_scrypt() {
        return Err(KmsError::NotAKit { path: path.to_owned() });
    }
    let mut identity = scrypt::Identity::new(secret(passphrase));
    identity.set_max_work_factor(MAX_WORK_FACTOR);
    let mut reader =
        decryptor.decrypt(std::iter::once(&identity as &dyn age::Identity)).map_err(|error| refused(path, error))?;
    // The plaintext is shorter than the file, so this never grows.
    let mut plaintext = Zeroizing::new(Vec::with_capacity(file.len() + 1));
    reader.read_to_end(&mut plaintext).map_err(|_| corrupt(path, "its content fails authentication"))?;
    Ok(plaintext)
}

/// What age's refusal means here.
fn refused(path: &Path, error: DecryptError) -> KmsError {
    let path = path.to_owned();
    match error {
        DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed => KmsError::KitWrongPassphrase { path },
        DecryptError::ExcessiveWork { required, .. } => {
            KmsError::KitTooCostly { path, required, limit: MAX_WORK_FACTOR }
        }
        DecryptError::InvalidHeader | DecryptError::InvalidMac => corrupt(&path, "its header"),
        DecryptError::Io(_) => corrupt(&path, "its armor or header"),
        _ => KmsError::NotAKit { path },
    }
}

fn encode(kit: &KitContents) -> Secret {
    let document = Document {
        format: FORMAT.to_owned(),
        version: VERSION,
        note: NOTE.to_owned(),
        made: kit.made.clone(),
        vault_id: kit.vault_id.clone(),
        repo: kit.repo.clone(),
        tenant: kit.tenant.clone(),
        tenant_id: kit.tenant_id.clone(),
        kms: kit.kms.clone(),
        keys: kit
            .keys
            .iter()
            .map(|NamedKey { name, key }| KeyEntry { name: name.clone(), key: key.duplicate() })
            .collect(),
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(TEXT_ROOM + kit.keys.len() * KEY_ROOM));
    serde_json::to_writer_pretty(&mut *bytes, &document).expect("own types have a JSON form, and memory takes it");
    bytes.push(b'\n');
    bytes
}

fn decode(path: &Path, bytes: &[u8]) -> Result<KitContents, KmsError> {
    // Of the parser's message only the place is kept: its text may quote a key.
    let unreadable =
        |error: serde_json::Error| corrupt(path, &format!("line {} column {}", error.line(), error.column()));
    let header: Header = serde_json::from_slice(bytes).map_err(unreadable)?;
    if header.format != FORMAT {
        return Err(KmsError::NotAKit { path: path.to_owned() });
    }
    if header.version != VERSION {
        return Err(KmsError::KitVersion { path: path.to_owned(), found: header.version, known: VERSION });
    }
    let document: Document = serde_json::from_slice(bytes).map_err(unreadable)?;
    let kit = KitContents {
        made: document.made,
        vault_id: document.vault_id,
        repo: document.repo,
        tenant: document.tenant,
        tenant_id: document.tenant_id,
        kms: document.kms,
        keys: document.keys.into_iter().map(|KeyEntry { name, key }| NamedKey { name, key }).collect(),
    };
    kit.check().map_err(|what| corrupt(path, what))?;
    Ok(kit)
}

fn corrupt(path: &Path, what: &str) -> KmsError {
    KmsError::KitCorrupt { path: path.to_owned(), what: what.to_owned() }
}

/// age keeps its own copy, and wipes it.
fn secret(passphrase: &Passphrase) -> SecretString {
    SecretString::from(passphrase.expose())
}
