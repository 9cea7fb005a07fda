//! The keys of a keyring in memory, and as entries of its file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::secret::key_hex;
use crate::{KeyBytes, KeyName, Secret, seal};

/// Most keys of one keyring. A provider with more tenants has a KMS.
pub(crate) const MAX_KEYS: usize = 10_000;

/// Room for one entry as indented JSON: the longest name, a key in hex, and what is around them.
const ENTRY_ROOM: usize = 512;

/// A KEK and when it was made, in seconds since 1970.
#[derive(Debug)]
pub(crate) struct Kek {
    pub(crate) created: u64,
    pub(crate) key: KeyBytes,
}

/// All KEKs by name.
pub(crate) type Keys = BTreeMap<KeyName, Kek>;

/// A KEK as the file has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    name: KeyName,
    created: u64,
    #[serde(with = "key_hex")]
    key: KeyBytes,
    /// Tells a flipped bit in this file from a wrong key, see [`seal::key_check`].
    #[serde(with = "hex::serde")]
    check: [u8; 8],
}

pub(crate) fn to_entries(keys: &Keys) -> Vec<Entry> {
    keys.iter()
        .map(|(name, kek)| Entry {
            name: name.clone(),
            created: kek.created,
            key: kek.key.duplicate(),
            check: seal::key_check(name, kek.created, &kek.key),
        })
        .collect()
}

/// The keys of these entries, or what is wrong with them.
pub(crate) fn from_entries(entries: Vec<Entry>) -> Result<Keys, String> {
    if entries.len() > MAX_KEYS {
        return Err(format!("{} keys, at most {MAX_KEYS} are allowed", entries.len()));
    }
    let mut keys = Keys::new();
    for Entry { name, created, key, check } in entries {
        if seal::key_check(&name, created, &key) != check {
            return Err(format!("the check value of the key {name} does not match"));
        }
        if keys.contains_key(&name) {
            return Err(format!("the key {name} is there twice"));
        }
        keys.insert(name, Kek { created, key });
    }
    Ok(keys)
}

/// Room for `keys` entries, so that a buffer with keys in it never grows and leaves pieces behind.
pub(crate) fn buffer(keys: usize) -> Secret {
    Zeroizing::new(Vec::with_capacity((keys + 1) * ENTRY_ROOM))
}
