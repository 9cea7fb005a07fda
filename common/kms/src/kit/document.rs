//! The JSON of a kit.

use std::path::Path;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{KitContents, MAX_TEXT, corrupt};
use crate::secret::key_hex;
use crate::{KeyBytes, KeyName, KmsError, NamedKey, Secret};

/// Room for the JSON of one key, and for the six texts should JSON escape each byte of them, so that the buffer never grows and
/// leaves pieces behind.
pub(super) const KEY_ROOM: usize = 512;
pub(super) const TEXT_ROOM: usize = 6 * 6 * MAX_TEXT + 4096;

const FORMAT: &str = "reseal-recovery-kit";

/// Since version 2 a kit has the tenant's master, and keys only of a keyring. Version 1 had keys only.
const VERSION: u64 = 2;

/// Read by whoever opens a kit with `age` years later.
const NOTE: &str = "Keys of a reseal tenant. On a machine with access to the vault: reseal list --recovery-kit KIT, or reseal key import KIT. Keep secret: with the vault, this opens all backups.";

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
    #[serde(default)]
    master: Option<MasterHex>,
    keys: Vec<KeyEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct MasterHex(#[serde(with = "key_hex")] KeyBytes);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: KeyName,
    #[serde(with = "key_hex")]
    key: KeyBytes,
}

pub(super) fn encode(kit: &KitContents, master: &KeyBytes) -> Secret {
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
        master: Some(MasterHex(master.duplicate())),
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

pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<KitContents, KmsError> {
    // Of the parser's message only the place is kept: its text may quote a key.
    let unreadable =
        |error: serde_json::Error| corrupt(path, &format!("line {} column {}", error.line(), error.column()));
    let header: Header = serde_json::from_slice(bytes).map_err(unreadable)?;
    if header.format != FORMAT {
        return Err(KmsError::NotAKit { path: path.to_owned() });
    }
    if !(1..=VERSION).contains(&header.version) {
        return Err(KmsError::KitVersion { path: path.to_owned(), found: header.version, known: VERSION });
    }
    let document: Document = serde_json::from_slice(bytes).map_err(unreadable)?;
    match (document.version, &document.master) {
        (1, None) | (VERSION, Some(_)) => {}
        (1, Some(_)) => return Err(corrupt(path, "a master in a kit of version 1")),
        _ => return Err(corrupt(path, "it has no master")),
    }
    let kit = KitContents {
        made: document.made,
        vault_id: document.vault_id,
        repo: document.repo,
        tenant: document.tenant,
        tenant_id: document.tenant_id,
        kms: document.kms,
        master: document.master.map(|MasterHex(master)| master),
        keys: document.keys.into_iter().map(|KeyEntry { name, key }| NamedKey { name, key }).collect(),
    };
    kit.check().map_err(|what| corrupt(path, what))?;
    Ok(kit)
}
