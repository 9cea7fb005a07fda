//! The tenant record: which KMS key wraps the tenant's master, and what the master seals.
//!
//! ```text
//! tenant.json { tenant id, generation, kms { kind, key }, wrapped, salt, sealed }
//! wrapped = KMS(KEK, magic ‖ vault id ‖ tenant id ‖ generation ‖ master)
//! sealed  = AES-256-GCM(HKDF(master, salt), JSON { name, features, DEKs by epoch, current epoch, dedup secret })
//! ```

use std::collections::BTreeMap;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::ids::{TenantId, VaultId};
use crate::keys::{DedupSecret, Dek, KEY, Kind, Master, ONLY_ORDINAL, Scope, header_aad, nonce, object_key};
use crate::names::TenantName;
use crate::{FORMAT_VERSION, FormatError};

/// Longest tenant record that is read.
pub const MAX_RECORD: usize = 1 << 20;
/// Bytes of the payload that the KEK wraps.
const PAYLOAD: usize = 8 + 16 + 16 + 8 + KEY;
const PAYLOAD_MAGIC: &[u8; 8] = b"RSLMASTR";
/// Most DEK epochs of a record: one is live, and those that a rotation has not yet replaced.
const MAX_EPOCHS: usize = 1024;

/// Which KMS key wraps the master. The operator's configuration must say the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KmsRef {
    pub kind: String,
    pub key: String,
}

/// The record as it stands in the vault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    format: u16,
    pub tenant_id: TenantId,
    /// Grows with each replacement of the record.
    pub generation: u64,
    pub kms: KmsRef,
    #[serde(with = "hex::serde")]
    pub wrapped: Vec<u8>,
    #[serde(with = "hex::serde")]
    salt: [u8; KEY],
    #[serde(with = "hex::serde")]
    sealed: Vec<u8>,
}

/// The unlocked keys of a tenant.
pub struct TenantKeys {
    scope: Scope,
    current: u32,
    deks: BTreeMap<u32, Dek>,
    dedup: DedupSecret,
    record_generation: u64,
    /// A feature that this program would need in order to write.
    lacks_to_write: Option<String>,
}

impl TenantKeys {
    /// The first keys of a new tenant, from fresh random bytes.
    pub fn new(scope: Scope, dek: Dek, dedup: DedupSecret) -> TenantKeys {
        let deks = BTreeMap::from([(1, dek)]);
        TenantKeys { scope, current: 1, deks, dedup, record_generation: 1, lacks_to_write: None }
    }

    /// Vault and tenant.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The epoch under which new objects are sealed.
    pub fn current_epoch(&self) -> u32 {
        self.current
    }

    /// Generation of the record that they came from.
    pub fn record_generation(&self) -> u64 {
        self.record_generation
    }

    /// Refuses to seal anything where the record demands what this program does not know of whoever writes.
    pub(crate) fn check_writable(&self) -> Result<(), FormatError> {
        match &self.lacks_to_write {
            Some(feature) => Err(FormatError::Feature(feature.clone())),
            None => Ok(()),
        }
    }

    /// The DEK of an epoch.
    pub fn dek(&self, epoch: u32) -> Result<&Dek, FormatError> {
        self.deks.get(&epoch).ok_or(FormatError::UnknownEpoch(epoch))
    }

    /// Key of the tenant's blob ids.
    pub fn dedup(&self) -> &DedupSecret {
        &self.dedup
    }
}

impl std::fmt::Debug for TenantKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TenantKeys({:?}, epoch {}, redacted)", self.scope, self.current)
    }
}

/// The sealed part, as JSON. Keys are hexadecimal here for as long as it takes to seal or parse them.
#[derive(Serialize, Deserialize)]
struct Secrets {
    /// The tenant's name: so that two tenants' folders can't be exchanged.
    tenant: TenantName,
    /// Features that a program must know to read, or to write, what this tenant has. This version knows none. Unlike
    /// those of `reseal.json` they are authenticated, and can be added with a new generation of the record.
    #[serde(default)]
    required_features: Vec<String>,
    #[serde(default)]
    required_to_write: Vec<String>,
    current_epoch: u32,
    deks: Vec<SecretDek>,
    dedup: SecretHex,
}

#[derive(Serialize, Deserialize)]
struct SecretDek {
    epoch: u32,
    key: SecretHex,
}

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct SecretHex(String);

impl Drop for SecretHex {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl SecretHex {
    fn of(bytes: &[u8; KEY]) -> SecretHex {
        SecretHex(hex::encode(bytes))
    }

    fn bytes(&self) -> Result<Zeroizing<[u8; KEY]>, FormatError> {
        let mut bytes = Zeroizing::new([0; KEY]);
        hex::decode_to_slice(&self.0, bytes.as_mut())
            .map_err(|_| FormatError::Malformed("a key in the tenant record has a wrong length"))?;
        Ok(bytes)
    }
}

/// The payload that the KEK wraps.
pub fn master_payload(scope: &Scope, generation: u64, master: &Master) -> Zeroizing<Vec<u8>> {
    let mut payload = Zeroizing::new(Vec::with_capacity(PAYLOAD));
    payload.extend_from_slice(PAYLOAD_MAGIC);
    payload.extend_from_slice(scope.vault.as_bytes());
    payload.extend_from_slice(scope.tenant.as_bytes());
    payload.extend_from_slice(&generation.to_le_bytes());
    payload.extend_from_slice(master.expose());
    payload
}

impl TenantRecord {
    /// The record of a new tenant: `wrapped` is what the KMS made of [`master_payload`] for generation 1.
    pub fn new(
        keys: &TenantKeys,
        name: &TenantName,
        master: &Master,
        salt: [u8; KEY],
        kms: KmsRef,
        wrapped: Vec<u8>,
    ) -> TenantRecord {
        let secrets = Secrets {
            tenant: name.clone(),
            required_features: Vec::new(),
            required_to_write: Vec::new(),
            current_epoch: keys.current,
            deks: keys.deks.iter().map(|(&epoch, dek)| SecretDek { epoch, key: SecretHex::of(dek.expose()) }).collect(),
            dedup: SecretHex::of(keys.dedup.expose()),
        };
        // With its whole capacity reserved, so that no part of it is moved and left behind unwiped.
        let mut plain = Zeroizing::new(Vec::with_capacity(1024 + secrets.deks.len() * 128));
        serde_json::to_writer(&mut *plain, &secrets).expect("numbers and text always serialize");
        let mut record = TenantRecord {
            format: FORMAT_VERSION,
            tenant_id: keys.scope.tenant,
            generation: keys.record_generation,
            kms,
            wrapped,
            salt,
            sealed: Vec::new(),
        };
        let (cipher, aad) = record.cipher(&keys.scope, master);
        let sealed = cipher.encrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: &plain, aad: &aad });
        record.sealed = sealed.expect("a record is far below the limit of AES-GCM");
        record
    }

    fn cipher(&self, scope: &Scope, master: &Master) -> (Aes256Gcm, Vec<u8>) {
        let key = object_key(master.expose(), &self.salt, scope, Kind::Record, self.tenant_id.as_bytes());
        let cipher = Aes256Gcm::new_from_slice(key.as_ref()).expect("AES-256 takes a key of 32 bytes");
        (cipher, header_aad(scope, &self.generation.to_le_bytes()))
    }

    /// The bytes of the object.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Parses. Nothing in it is trusted before the KMS has unwrapped its payload.
    pub fn decode(bytes: &[u8]) -> Result<TenantRecord, FormatError> {
        if bytes.len() > MAX_RECORD {
            return Err(FormatError::Malformed("longer than a tenant record may be"));
        }
        #[derive(Deserialize)]
        struct Version {
            format: u16,
        }
        let malformed = |_| FormatError::Malformed("not the JSON of a tenant record");
        let version: Version = serde_json::from_slice(bytes).map_err(malformed)?;
        if version.format != FORMAT_VERSION {
            return Err(FormatError::Version { found: version.format });
        }
        serde_json::from_slice(bytes).map_err(malformed)
    }

    /// Checks every field of the unwrapped payload, opens what the master seals, and checks that it is of the tenant of
    /// that name.
    pub fn unlock(&self, vault: VaultId, name: &TenantName, payload: &[u8]) -> Result<TenantKeys, FormatError> {
        let scope = Scope { vault, tenant: self.tenant_id };
        let payload: &[u8; PAYLOAD] =
            payload.try_into().map_err(|_| FormatError::Malformed("the unwrapped payload has a wrong length"))?;
        if &payload[0..8] != PAYLOAD_MAGIC {
            return Err(FormatError::Malformed("the unwrapped payload is not a master"));
        }
        if &payload[8..24] != vault.as_bytes() {
            return Err(FormatError::Mismatch("the wrapped master is of another vault"));
        }
        if &payload[24..40] != self.tenant_id.as_bytes() {
            return Err(FormatError::Mismatch("the wrapped master is of another tenant"));
        }
        if payload[40..48] != self.generation.to_le_bytes() {
            return Err(FormatError::Mismatch("the wrapped master is of another generation of the record"));
        }
        let mut master = Zeroizing::new([0; KEY]);
        master.copy_from_slice(&payload[48..]);
        let (cipher, aad) = self.cipher(&scope, &Master::from_bytes(master));
        let plain = cipher.decrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: &self.sealed, aad: &aad });
        let plain = Zeroizing::new(plain.map_err(|_| FormatError::Authentication)?);
        let secrets: Secrets =
            serde_json::from_slice(&plain).map_err(|_| FormatError::Malformed("the record's secrets do not parse"))?;
        if secrets.tenant != *name {
            return Err(FormatError::Mismatch("it is another tenant's record"));
        }
        refuse_unknown(&secrets.required_features)?;
        if secrets.deks.len() > MAX_EPOCHS {
            return Err(FormatError::Malformed("more DEK epochs than a record may hold"));
        }
        let deks: Result<BTreeMap<_, _>, FormatError> =
            secrets.deks.iter().map(|dek| Ok((dek.epoch, Dek::from_bytes(dek.key.bytes()?)))).collect();
        let keys = TenantKeys {
            scope,
            current: secrets.current_epoch,
            deks: deks?,
            dedup: DedupSecret::from_bytes(secrets.dedup.bytes()?),
            record_generation: self.generation,
            lacks_to_write: secrets.required_to_write.first().map(|feature| shorten(feature)),
        };
        keys.dek(keys.current)?;
        Ok(keys)
    }
}

/// Refuses features that a program must know: this version knows none.
pub(crate) fn refuse_unknown(required: &[String]) -> Result<(), FormatError> {
    match required.first() {
        Some(feature) => Err(FormatError::Feature(shorten(feature))),
        None => Ok(()),
    }
}

/// As much of a feature's name as an error shows.
fn shorten(feature: &str) -> String {
    feature.chars().take(64).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Fixed keys of a tenant of vault `nth`.
    pub(crate) fn keys(nth: u8) -> TenantKeys {
        let scope = Scope { vault: VaultId::from_bytes([nth; 16]), tenant: TenantId::from_bytes([nth + 100; 16]) };
        let dek = Dek::from_bytes(Zeroizing::new([0xD1; KEY]));
        TenantKeys::new(scope, dek, DedupSecret::from_bytes(Zeroizing::new([0xD2; KEY])))
    }

    fn record(keys: &TenantKeys) -> (TenantRecord, Zeroizing<Vec<u8>>) {
        let master = Master::from_bytes(Zeroizing::new([0xAA; KEY]));
        let payload = master_payload(&keys.scope, 1, &master);
        let kms = KmsRef { kind: "keyring".into(), key: "k".into() };
        (TenantRecord::new(keys, &acme(), &master, [0xBB; KEY], kms, vec![1, 2, 3]), payload)
    }

    fn acme() -> TenantName {
        TenantName::new("acme").unwrap()
    }

    /// A record whose sealed part a later version has changed.
    fn changed(keys: &TenantKeys, change: impl Fn(&mut serde_json::Value)) -> TenantRecord {
        let master = Master::from_bytes(Zeroizing::new([0xAA; KEY]));
        let (mut record, _) = record(keys);
        let (cipher, aad) = record.cipher(&keys.scope, &master);
        let nonce = nonce(ONLY_ORDINAL).into();
        let plain = cipher.decrypt(&nonce, Payload { msg: &record.sealed, aad: &aad }).unwrap();
        let mut secrets: serde_json::Value = serde_json::from_slice(&plain).unwrap();
        change(&mut secrets);
        let plain = serde_json::to_vec(&secrets).unwrap();
        record.sealed = cipher.encrypt(&nonce, Payload { msg: &plain, aad: &aad }).unwrap();
        record
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_features_refused() {
        let keys = keys(1);
        let payload = record(&keys).1;
        let unlock = |record: TenantRecord| record.unlock(keys.scope.vault, &acme(), &payload);
        assert!(unlock(changed(&keys, |secrets| secrets["policies"] = serde_json::json!({"keep": 7}))).is_ok());
        let lacking = unlock(changed(&keys, |secrets| secrets["required_features"] = serde_json::json!(["x"])));
        assert_eq!(lacking.unwrap_err(), FormatError::Feature("x".into()));
        let readable = unlock(changed(&keys, |secrets| secrets["required_to_write"] = serde_json::json!(["y"])));
        assert_eq!(readable.unwrap().check_writable(), Err(FormatError::Feature("y".into())));
    }

    #[test]
    fn a_record_unlocks_with_its_own_payload_only() {
        let keys = keys(1);
        let (record, payload) = record(&keys);
        let back = TenantRecord::decode(&record.encode()).unwrap();
        assert_eq!(back, record);
        let unlocked = back.unlock(keys.scope.vault, &acme(), &payload).unwrap();
        assert_eq!(unlocked.dek(1).unwrap().expose(), &[0xD1; KEY]);
        assert_eq!(unlocked.dedup().expose(), &[0xD2; KEY]);
        for at in 0..payload.len() {
            let mut other = payload.clone();
            other[at] ^= 1;
            assert!(back.unlock(keys.scope.vault, &acme(), &other).is_err(), "payload byte {at}");
        }
        assert!(back.unlock(VaultId::from_bytes([9; 16]), &acme(), &payload).is_err());
        let other = TenantName::new("globex").unwrap();
        assert!(back.unlock(keys.scope.vault, &other, &payload).is_err(), "another tenant's folder");
        let moved = TenantRecord { generation: 2, ..record };
        assert!(moved.unlock(keys.scope.vault, &acme(), &payload).is_err(), "generation");
    }

    #[test]
    fn neither_record_nor_debug_shows_a_key() {
        let keys = keys(1);
        let text = String::from_utf8(record(&keys).0.encode()).unwrap() + &format!("{keys:?}");
        for secret in ["d1d1d1d1", "d2d2d2d2", "aaaaaaaa"] {
            assert!(!text.contains(secret));
        }
    }
}
