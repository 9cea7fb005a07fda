//! The keyring's file: JSON, in the clear or sealed under a passphrase.
//!
//! ```json
//! { "format": "reseal-keyring", "version": 1, "keys": [ { "name": …, "created": …, "key": …, "check": … } ] }
//! { "format": "reseal-keyring", "version": 1, "sealed": { "kdf": "argon2id", "memory_kib": …, "passes": …, "lanes": …,
//!                                                         "salt": …, "content": … } }
//! ```
//!
//! `content` is nonce ‖ ciphertext ‖ tag over the list of `keys`, with version and KDF parameters as associated data. Bytes are in
//! lower-case hex. Unknown fields are refused: a change of the format is a new version.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::keys::{self, Entry, Keys};
use crate::kdf::{Cost, KdfParams, SALT_LEN};
use crate::seal::{self, Label};
use crate::{KeyBytes, KmsError, Secret};

/// Largest file: [`keys::MAX_KEYS`] entries fit, sealed and in hex.
pub(crate) const MAX_FILE: u64 = 12 * 1024 * 1024;

const FORMAT: &str = "reseal-keyring";
const VERSION: u64 = 1;
const KDF: &str = "argon2id";

/// What is read first, from a file of any version.
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
    #[serde(skip_serializing_if = "Option::is_none")]
    keys: Option<Vec<Entry>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sealed: Option<SealedFields>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedFields {
    kdf: String,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    #[serde(with = "hex::serde")]
    salt: [u8; SALT_LEN],
    #[serde(with = "hex::serde")]
    content: Vec<u8>,
}

/// A file's content, as far as it can be known without the passphrase.
pub(crate) enum Content {
    Plain(Keys),
    Sealed(Sealed),
}

/// Keys under a passphrase.
pub(crate) struct Sealed {
    pub(crate) kdf: KdfParams,
    content: Vec<u8>,
}

impl Sealed {
    /// The list of keys as bytes, none if `key` is wrong or a byte differs.
    fn open(&self, key: &KeyBytes) -> Option<Secret> {
        seal::open(key, Label::SealedKeyring, &[&header(&self.kdf)], &self.content)
    }

    /// The keys; `denied` is the error if they don't open.
    pub(crate) fn keys(&self, path: &Path, key: &KeyBytes, denied: KmsError) -> Result<Keys, KmsError> {
        let opened = self.open(key).ok_or(denied)?;
        let entries = serde_json::from_slice(&opened).map_err(|error| unreadable(path, &error))?;
        keys::from_entries(entries).map_err(|what| corrupt(path, what))
    }
}

/// A passphrase's key and the parameters that it was made with.
pub(crate) struct Unlocked {
    pub(crate) kdf: KdfParams,
    pub(crate) key: KeyBytes,
}

pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Content, KmsError> {
    let header: Header = serde_json::from_slice(bytes).map_err(|error| unreadable(path, &error))?;
    if header.format != FORMAT {
        return Err(corrupt(path, "it does not say that it is a keyring"));
    }
    if header.version != VERSION {
        return Err(KmsError::KeyringVersion { path: path.to_owned(), found: header.version, known: VERSION });
    }
    let document: Document = serde_json::from_slice(bytes).map_err(|error| unreadable(path, &error))?;
    match (document.keys, document.sealed) {
        (Some(entries), None) => keys::from_entries(entries).map(Content::Plain).map_err(|what| corrupt(path, what)),
        (None, Some(fields)) => sealed(path, fields).map(Content::Sealed),
        _ => Err(corrupt(path, "it has to have either keys or sealed")),
    }
}

fn sealed(path: &Path, fields: SealedFields) -> Result<Sealed, KmsError> {
    let SealedFields { kdf, memory_kib, passes, lanes, salt, content } = fields;
    let cost = Cost { memory_kib, passes, lanes };
    if kdf != KDF || !cost.is_acceptable() {
        return Err(corrupt(path, "its passphrase parameters are out of bounds"));
    }
    let kdf = KdfParams { cost, salt };
    Ok(Sealed { kdf, content })
}

/// The file, in the clear.
pub(crate) fn encode_plain(keys: &Keys) -> Secret {
    let document =
        Document { format: FORMAT.to_owned(), version: VERSION, keys: Some(keys::to_entries(keys)), sealed: None };
    let mut bytes = keys::buffer(keys.len());
    write_json(&mut bytes, &document);
    bytes
}

/// The file, sealed under a passphrase.
pub(crate) fn encode_sealed(keys: &Keys, unlocked: &Unlocked) -> Result<Secret, KmsError> {
    let mut list = keys::buffer(keys.len());
    write_json(&mut list, &keys::to_entries(keys));
    let Unlocked { kdf, key } = unlocked;
    let content = seal::seal(key, Label::SealedKeyring, &[&header(kdf)], &list)?;
    let document = Document {
        format: FORMAT.to_owned(),
        version: VERSION,
        keys: None,
        sealed: Some(SealedFields {
            kdf: KDF.to_owned(),
            memory_kib: kdf.cost.memory_kib,
            passes: kdf.cost.passes,
            lanes: kdf.cost.lanes,
            salt: kdf.salt,
            content,
        }),
    };
    let mut bytes = keys::buffer(2 * keys.len());
    write_json(&mut bytes, &document);
    Ok(bytes)
}

/// What the seal vouches for beside the keys.
fn header(kdf: &KdfParams) -> Vec<u8> {
    let Cost { memory_kib, passes, lanes } = kdf.cost;
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for number in [memory_kib, passes, lanes] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&kdf.salt);
    bytes
}

fn write_json<T: Serialize>(bytes: &mut Vec<u8>, value: &T) {
    serde_json::to_writer_pretty(&mut *bytes, value).expect("own types have a JSON form, and memory takes it");
    bytes.push(b'\n');
}

/// Tells a file that ends too early from one that is wrong. Of the parser's message only the place is kept: its text may quote a key.
fn unreadable(path: &Path, error: &serde_json::Error) -> KmsError {
    if error.is_eof() {
        return KmsError::KeyringTruncated { path: path.to_owned() };
    }
    corrupt(path, format!("line {} column {}", error.line(), error.column()))
}

fn corrupt(path: &Path, what: impl Into<String>) -> KmsError {
    KmsError::KeyringCorrupt { path: path.to_owned(), what: what.into() }
}
