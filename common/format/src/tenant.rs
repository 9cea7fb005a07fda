//! The tenant record: which KMS key wraps the tenant's master, and what the master seals.
//!
//! ```text
//! tenant.json { tenant id, generation, kms { kind, key }, wrapped, salt, sealed }
//! wrapped = KMS(KEK, magic ‖ vault id ‖ tenant id ‖ generation ‖ master)
//! sealed  = AES-256-GCM(HKDF(master, salt), JSON { name, features, DEKs by epoch, current epoch, dedup secret, quota, objectives, retention, lock })
//! ```
//!
//! A record is replaced by its [`Successor`], of the next generation: its master wrapped anew, its secrets sealed anew, and
//! every field that this version does not know. An erased tenant's record holds neither.

use std::collections::BTreeMap;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use zeroize::{Zeroize, Zeroizing};

use crate::fields::{Borrowed, Unknown, unknown};
use crate::ids::{TenantId, VaultId};
use crate::keys::{DedupSecret, Dek, KEY, Kind, Master, ONLY_ORDINAL, Scope, header_aad, nonce, object_key};
use crate::lock::LockRule;
use crate::names::{TenantName, VmName};
use crate::objectives::Objectives;
use crate::retention::{Policies, Policy};
use crate::time::Timestamp;
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
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
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
    /// When the tenant was erased; then nothing is wrapped or sealed here. Not authenticated, and not needed to be: whoever
    /// can write it can as well remove the record.
    #[serde(default)]
    pub erased: Option<Timestamp>,
    #[serde(skip)]
    unknown: Unknown,
    #[serde(skip)]
    unknown_of_kms: Unknown,
}

/// The fields of a record, and of its `kms`, that this version knows.
const KNOWN: [&str; 8] = ["format", "tenant_id", "generation", "kms", "wrapped", "salt", "sealed", "erased"];
const KNOWN_OF_KMS: [&str; 2] = ["kind", "key"];

/// A record as it is written: what is known in this order, then what is not.
#[derive(Serialize)]
struct RecordText<'a> {
    format: u16,
    tenant_id: TenantId,
    generation: u64,
    kms: KmsText<'a>,
    #[serde(with = "hex::serde")]
    wrapped: &'a [u8],
    #[serde(with = "hex::serde")]
    salt: &'a [u8],
    #[serde(with = "hex::serde")]
    sealed: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    erased: Option<Timestamp>,
    #[serde(flatten)]
    unknown: &'a Unknown,
}

#[derive(Serialize)]
struct KmsText<'a> {
    kind: &'a str,
    key: &'a str,
    #[serde(flatten)]
    unknown: &'a Unknown,
}

/// The unlocked keys of a tenant.
pub struct TenantKeys {
    scope: Scope,
    current: u32,
    deks: BTreeMap<u32, Dek>,
    dedup: DedupSecret,
    record_generation: u64,
    /// KEK that a rotation left behind, perhaps not yet retired.
    previous_kek: Option<String>,
    /// A feature that this program would need in order to write.
    lacks_to_write: Option<String>,
    quota: Option<u64>,
    objectives: Objectives,
    policies: Policies,
    lock: Option<LockRule>,
}

impl TenantKeys {
    /// The first keys of a new tenant, from fresh random bytes.
    pub fn new(scope: Scope, dek: Dek, dedup: DedupSecret) -> TenantKeys {
        let deks = BTreeMap::from([(1, dek)]);
        TenantKeys {
            scope,
            current: 1,
            deks,
            dedup,
            record_generation: 1,
            previous_kek: None,
            lacks_to_write: None,
            quota: None,
            objectives: Objectives::default(),
            policies: Policies::default(),
            lock: None,
        }
    }

    /// The same, of a tenant whose packs may have at most so many bytes.
    #[must_use]
    pub fn with_quota(self, quota: Option<u64>) -> TenantKeys {
        TenantKeys { quota, ..self }
    }

    /// Vault and tenant.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The epoch under which new objects are sealed.
    pub fn current_epoch(&self) -> u32 {
        self.current
    }

    /// The epochs of which there is a DEK, in their order.
    pub fn epochs(&self) -> impl Iterator<Item = u32> + '_ {
        self.deks.keys().copied()
    }

    /// The KEK that wrapped the master before the newest rotation: until it is retired it still opens the old record.
    pub fn previous_kek(&self) -> Option<&str> {
        self.previous_kek.as_deref()
    }

    /// Bytes that the tenant's packs may have, if there is a limit.
    pub fn quota(&self) -> Option<u64> {
        self.quota
    }

    /// How old the newest restore points of its VMs may be.
    pub fn objectives(&self) -> &Objectives {
        &self.objectives
    }

    /// Which restore points its VMs keep.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// How what it writes is locked in an object store.
    pub fn lock(&self) -> Option<LockRule> {
        self.lock
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
    /// Sealed, for whoever rotates destroys it: a key's name that the storage could exchange would be another tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous_kek: Option<String>,
    /// Sealed, so that the storage can't change it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    /// The same: whoever could change it could keep a restore point that is late from being noticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    objective: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    vm_objectives: BTreeMap<VmName, Option<u64>>,
    /// The same: whoever could change it could have restore points forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retention: Option<Policy>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    vm_retention: BTreeMap<VmName, Option<Policy>>,
    /// The same: whoever could change it could have what is written not be locked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lock: Option<LockRule>,
}

/// Names of fields, for whoever changes the sealed part as text.
const PREVIOUS_KEK: &str = "previous_kek";
const CURRENT_EPOCH: &str = "current_epoch";
const DEKS: &str = "deks";
const QUOTA: &str = "quota";
const OBJECTIVE: &str = "objective";
const VM_OBJECTIVES: &str = "vm_objectives";
const RETENTION: &str = "retention";
const VM_RETENTION: &str = "vm_retention";
const LOCK: &str = "lock";

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
            previous_kek: None,
            quota: keys.quota,
            objective: keys.objectives.tenant,
            vm_objectives: keys.objectives.vms.clone(),
            retention: keys.policies.tenant.clone(),
            vm_retention: keys.policies.vms.clone(),
            lock: keys.lock,
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
            erased: None,
            unknown: Unknown::new(),
            unknown_of_kms: Unknown::new(),
        };
        record.seal(&keys.scope, master, &plain);
        record
    }

    fn seal(&mut self, scope: &Scope, master: &Master, plain: &[u8]) {
        let (cipher, aad) = self.cipher(scope, master);
        let sealed = cipher.encrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: plain, aad: &aad });
        self.sealed = sealed.expect("a record is far below the limit of AES-GCM");
    }

    fn cipher(&self, scope: &Scope, master: &Master) -> (Aes256Gcm, Vec<u8>) {
        let key = object_key(master.expose(), &self.salt, scope, Kind::Record, self.tenant_id.as_bytes());
        let cipher = Aes256Gcm::new_from_slice(key.as_ref()).expect("AES-256 takes a key of 32 bytes");
        (cipher, header_aad(scope, &self.generation.to_le_bytes()))
    }

    /// The bytes of the object.
    pub fn encode(&self) -> Vec<u8> {
        let kms = KmsText { kind: &self.kms.kind, key: &self.kms.key, unknown: &self.unknown_of_kms };
        let text = RecordText {
            format: self.format,
            tenant_id: self.tenant_id,
            generation: self.generation,
            kms,
            wrapped: &self.wrapped,
            salt: &self.salt,
            sealed: &self.sealed,
            erased: self.erased,
            unknown: &self.unknown,
        };
        let mut text = serde_json::to_vec_pretty(&text).unwrap_or_default();
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
        #[derive(Deserialize)]
        struct Kms<'a> {
            #[serde(borrow)]
            kms: &'a RawValue,
        }
        let mut record: TenantRecord = serde_json::from_slice(bytes).map_err(malformed)?;
        record.unknown = unknown(bytes, &KNOWN).map_err(malformed)?;
        let kms: Kms<'_> = serde_json::from_slice(bytes).map_err(malformed)?;
        record.unknown_of_kms = unknown(kms.kms.get().as_bytes(), &KNOWN_OF_KMS).map_err(malformed)?;
        Ok(record)
    }

    /// Checks every field of the unwrapped payload: the master.
    pub fn master(&self, scope: &Scope, payload: &[u8]) -> Result<Master, FormatError> {
        let payload: &[u8; PAYLOAD] =
            payload.try_into().map_err(|_| FormatError::Malformed("the unwrapped payload has a wrong length"))?;
        if &payload[0..8] != PAYLOAD_MAGIC {
            return Err(FormatError::Malformed("the unwrapped payload is not a master"));
        }
        if &payload[8..24] != scope.vault.as_bytes() {
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
        Ok(Master::from_bytes(master))
    }

    /// Opens what the master seals.
    fn open_sealed(&self, scope: &Scope, master: &Master) -> Result<Zeroizing<Vec<u8>>, FormatError> {
        let (cipher, aad) = self.cipher(scope, master);
        let plain = cipher.decrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: &self.sealed, aad: &aad });
        Ok(Zeroizing::new(plain.map_err(|_| FormatError::Authentication)?))
    }

    /// Checks every field of the unwrapped payload, opens what the master seals, and checks that it is of the tenant of
    /// that name.
    pub fn unlock(&self, vault: VaultId, name: &TenantName, payload: &[u8]) -> Result<TenantKeys, FormatError> {
        let scope = Scope { vault, tenant: self.tenant_id };
        let plain = self.open_sealed(&scope, &self.master(&scope, payload)?)?;
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
            previous_kek: secrets.previous_kek,
            lacks_to_write: secrets.required_to_write.first().map(|feature| shorten(feature)),
            quota: secrets.quota,
            objectives: Objectives { tenant: secrets.objective, vms: secrets.vm_objectives },
            policies: Policies { tenant: secrets.retention, vms: secrets.vm_retention },
            lock: secrets.lock,
        };
        keys.dek(keys.current)?;
        Ok(keys)
    }

    /// What replaces this record, from the payload that the KMS unwrapped.
    pub fn successor(&self, vault: VaultId, name: &TenantName, payload: &[u8]) -> Result<Successor<'_>, FormatError> {
        let scope = Scope { vault, tenant: self.tenant_id };
        self.unlock(vault, name, payload)?.check_writable()?;
        let master = self.master(&scope, payload)?;
        let plain = self.open_sealed(&scope, &master)?;
        Ok(Successor { record: self, generation: self.next_generation()?, scope, master, plain })
    }

    /// The record of this tenant after it was erased. Which key wrapped its master is still said.
    pub fn erase(&self, when: Timestamp) -> Result<TenantRecord, FormatError> {
        Ok(TenantRecord {
            generation: self.next_generation()?,
            wrapped: Vec::new(),
            salt: [0; KEY],
            sealed: Vec::new(),
            erased: Some(when),
            ..self.clone()
        })
    }

    fn next_generation(&self) -> Result<u64, FormatError> {
        self.generation.checked_add(1).ok_or(FormatError::Malformed("its generation is the highest there is"))
    }
}

/// A record's next generation in the making.
pub struct Successor<'a> {
    record: &'a TenantRecord,
    generation: u64,
    scope: Scope,
    master: Master,
    /// What is sealed, as it was written.
    plain: Zeroizing<Vec<u8>>,
}

impl Successor<'_> {
    /// Another master, and a DEK of the next epoch, under which all is sealed from then on. What older epochs have sealed
    /// still opens.
    pub fn set_next_epoch(&mut self, master: Master, dek: &Dek) -> Result<(), FormatError> {
        let secrets: Secrets = parse_secrets(&self.plain)?;
        let exhausted = || FormatError::Malformed("it has as many DEK epochs as a record may hold");
        let highest = secrets.deks.iter().map(|dek| dek.epoch).max().unwrap_or(0);
        let epoch = highest.checked_add(1).filter(|_| secrets.deks.len() < MAX_EPOCHS).ok_or_else(exhausted)?;
        let mut deks = self.deks_as_written()?;
        let new = secret_json(&SecretDek { epoch, key: SecretHex::of(dek.expose()) })?;
        deks.push(parse_secrets(&new)?);
        let (deks, epoch) = (secret_json(&deks)?, secret_json(&epoch)?);
        let changed = [(DEKS, Some(parse_secrets(&deks)?)), (CURRENT_EPOCH, Some(parse_secrets(&epoch)?))];
        self.plain = with_fields(&self.plain, &changed)?;
        self.master = master;
        Ok(())
    }

    /// No DEK of any epoch but the current one: nothing may need them any more.
    pub fn drop_old_epochs(&mut self) -> Result<(), FormatError> {
        let secrets: Secrets = parse_secrets(&self.plain)?;
        // The same list, so in the same order.
        let kept = self
            .deks_as_written()?
            .into_iter()
            .zip(&secrets.deks)
            .filter(|(_, dek)| dek.epoch == secrets.current_epoch);
        let deks = secret_json(&kept.map(|(text, _)| text).collect::<Vec<_>>())?;
        self.plain = with_fields(&self.plain, &[(DEKS, Some(parse_secrets(&deks)?))])?;
        Ok(())
    }

    /// The DEKs with all that was written of them.
    fn deks_as_written(&self) -> Result<Vec<&RawValue>, FormatError> {
        let fields: Borrowed<'_> = parse_secrets(&self.plain)?;
        parse_secrets(fields.get(DEKS).map_or("[]", |deks| deks.get()).as_bytes())
    }

    /// What the KMS is to wrap.
    pub fn payload(&self) -> Zeroizing<Vec<u8>> {
        master_payload(&self.scope, self.generation, &self.master)
    }

    /// From then on the tenant's packs may have at most so many bytes, or as many as they like.
    pub fn set_quota(&mut self, quota: Option<u64>) -> Result<(), FormatError> {
        self.set(QUOTA, quota.as_ref())
    }

    /// From then on what it writes is locked so.
    pub fn set_lock(&mut self, lock: Option<LockRule>) -> Result<(), FormatError> {
        self.set(LOCK, lock.as_ref())
    }

    /// From then on the newest restore points of its VMs may be that old.
    pub fn set_objectives(&mut self, objectives: &Objectives) -> Result<(), FormatError> {
        self.set_for_all_and_some((OBJECTIVE, objectives.tenant.as_ref()), (VM_OBJECTIVES, &objectives.vms))
    }

    /// From then on its VMs keep these restore points.
    pub fn set_policies(&mut self, policies: &Policies) -> Result<(), FormatError> {
        self.set_for_all_and_some((RETENTION, policies.tenant.as_ref()), (VM_RETENTION, &policies.vms))
    }

    fn set_for_all_and_some<T: Serialize>(
        &mut self,
        (of_all, all): (&str, Option<&T>),
        (of_some, some): (&str, &BTreeMap<VmName, Option<T>>),
    ) -> Result<(), FormatError> {
        self.set(of_all, all)?;
        self.set(of_some, (!some.is_empty()).then_some(some))
    }

    /// Gives a field of the sealed part another value, or none.
    fn set<T: Serialize>(&mut self, field: &str, value: Option<&T>) -> Result<(), FormatError> {
        let json = value.map(secret_json).transpose()?;
        let json = json.as_ref().map(|json| parse_secrets(json)).transpose()?;
        self.plain = with_fields(&self.plain, &[(field, json)])?;
        Ok(())
    }

    /// The record, with what the KMS made of the payload under the key that `kms` names, and the KEK that this leaves
    /// behind, if it has another name in the same KMS.
    pub fn record(
        &self,
        kms: KmsRef,
        wrapped: Vec<u8>,
        salt: [u8; KEY],
        previous_kek: Option<&str>,
    ) -> Result<TenantRecord, FormatError> {
        let malformed = |_| FormatError::Malformed("the record's secrets do not parse");
        let previous = previous_kek.map(serde_json::value::to_raw_value).transpose().map_err(malformed)?;
        let plain = with_fields(&self.plain, &[(PREVIOUS_KEK, previous.as_deref())])?;
        let mut record =
            TenantRecord { generation: self.generation, kms, wrapped, salt, sealed: Vec::new(), ..self.record.clone() };
        record.seal(&self.scope, &self.master, &plain);
        Ok(record)
    }
}

/// Parses what is sealed, or a part of it.
fn parse_secrets<'a, T: Deserialize<'a>>(plain: &'a [u8]) -> Result<T, FormatError> {
    serde_json::from_slice(plain).map_err(|_| FormatError::Malformed("the record's secrets do not parse"))
}

/// JSON that is wiped.
fn secret_json(value: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, FormatError> {
    // With its whole capacity reserved, so that no part of it is moved and left behind unwiped.
    let mut json = Zeroizing::new(Vec::with_capacity(MAX_RECORD));
    serde_json::to_writer(&mut *json, value)
        .map_err(|_| FormatError::Malformed("the record's secrets do not parse"))?;
    Ok(json)
}

/// The sealed part with other values of these fields, or without them. All others stay as they were written.
fn with_fields(plain: &[u8], changed: &[(&str, Option<&RawValue>)]) -> Result<Zeroizing<Vec<u8>>, FormatError> {
    let mut fields: Borrowed<'_> = parse_secrets(plain)?;
    for (name, value) in changed {
        match value {
            Some(value) => fields.insert((*name).to_owned(), value),
            None => fields.remove(*name),
        };
    }
    secret_json(&fields)
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

    /// Those keys after the DEK was changed: the old one is still there.
    pub(crate) fn keys_of_next_epoch(nth: u8) -> TenantKeys {
        let mut keys = keys(nth);
        keys.deks.insert(2, Dek::from_bytes(Zeroizing::new([0xD3; KEY])));
        TenantKeys { current: 2, record_generation: 2, ..keys }
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
    fn a_successor_has_the_same_keys_and_keeps_what_is_not_known() {
        let keys = keys(1);
        let payload = record(&keys).1;
        // Digits that a parser's own numbers would not keep.
        let exact = "123456789012345678901234567890.10";
        let mut text: serde_json::Value = serde_json::from_slice(
            &changed(&keys, |secrets| {
                secrets["policies"] = serde_json::json!({ "keep": [7, "days"] });
            })
            .encode(),
        )
        .unwrap();
        text["later"] = serde_json::json!({ "exact": "EXACT" });
        text["kms"]["region"] = serde_json::json!("eu");
        let text = text.to_string().replace("\"EXACT\"", exact);
        let old = TenantRecord::decode(text.as_bytes()).unwrap();
        let kms = KmsRef { kind: "keyring".into(), key: "k2".into() };

        let next = old.successor(keys.scope.vault, &acme(), &payload).unwrap();
        let new_payload = next.payload();
        let new = next.record(kms.clone(), vec![4, 5], [0xCC; KEY], Some("k")).unwrap();
        let encoded = new.encode();
        let new = TenantRecord::decode(&encoded).unwrap();
        assert_eq!((new.generation, &new.kms, &new.wrapped), (2, &kms, &vec![4, 5]));
        let written = String::from_utf8(encoded).unwrap();
        assert!(written.contains(exact) && written.contains("\"region\": \"eu\""), "{written}");
        let unlocked = new.unlock(keys.scope.vault, &acme(), &new_payload).unwrap();
        assert_eq!((unlocked.dek(1).unwrap().expose(), unlocked.previous_kek()), (&[0xD1; KEY], Some("k")));
        assert_eq!(unlocked.record_generation(), 2);
        assert!(new.unlock(keys.scope.vault, &acme(), &payload).is_err(), "the old payload");
        assert!(old.unlock(keys.scope.vault, &acme(), &new_payload).is_err(), "the old record");

        let master = Master::from_bytes(Zeroizing::new([0xAA; KEY]));
        let sealed: serde_json::Value =
            serde_json::from_slice(&new.open_sealed(&keys.scope, &master).unwrap()).unwrap();
        assert_eq!(sealed["policies"], serde_json::json!({ "keep": [7, "days"] }));
        // A move to another KMS leaves nothing to be retired in this one.
        let moved = new.successor(keys.scope.vault, &acme(), &new_payload).unwrap();
        let payload = moved.payload();
        let moved = moved.record(kms, vec![6], [0xDD; KEY], None).unwrap();
        assert_eq!(moved.unlock(keys.scope.vault, &acme(), &payload).unwrap().previous_kek(), None);
    }

    #[test]
    fn a_new_epoch_has_a_new_master_and_the_old_one_goes_when_it_is_told_to() {
        let keys = keys(1);
        let payload = record(&keys).1;
        let old = changed(&keys, |secrets| secrets["deks"][0]["made"] = serde_json::json!("2026"));
        let (vault, kms) = (keys.scope.vault, KmsRef { kind: "keyring".into(), key: "k".into() });
        let mut next = old.successor(vault, &acme(), &payload).unwrap();
        let master = || Master::from_bytes(Zeroizing::new([0xAB; KEY]));
        next.set_next_epoch(master(), &Dek::from_bytes(Zeroizing::new([0xD3; KEY]))).unwrap();
        let both_payload = next.payload();
        assert_eq!(both_payload[48..], [0xAB; KEY]);
        let both = next.record(kms.clone(), vec![4], [0xCC; KEY], None).unwrap();
        let unlocked = both.unlock(vault, &acme(), &both_payload).unwrap();
        assert_eq!((unlocked.current_epoch(), unlocked.epochs().collect::<Vec<_>>()), (2, vec![1, 2]));
        assert_eq!(
            (unlocked.dek(1).unwrap().expose(), unlocked.dek(2).unwrap().expose()),
            (&[0xD1; KEY], &[0xD3; KEY])
        );
        let with_old_master = master_payload(&keys.scope, 2, &Master::from_bytes(Zeroizing::new([0xAA; KEY])));
        assert!(both.unlock(vault, &acme(), &with_old_master).is_err(), "the old master");
        let text = String::from_utf8(both.open_sealed(&keys.scope, &master()).unwrap().to_vec()).unwrap();
        assert!(text.contains("\"made\":\"2026\""), "{text}");

        let mut next = both.successor(vault, &acme(), &both_payload).unwrap();
        next.drop_old_epochs().unwrap();
        let payload = next.payload();
        let one = next.record(kms, vec![5], [0xDD; KEY], None).unwrap().unlock(vault, &acme(), &payload).unwrap();
        assert_eq!((one.current_epoch(), one.epochs().collect::<Vec<_>>(), one.record_generation()), (2, vec![2], 3));
        assert_eq!(one.dek(1).unwrap_err(), FormatError::UnknownEpoch(1));
    }

    #[test]
    fn a_quota_is_sealed_and_stays_until_it_is_changed() {
        let keys = keys(1).with_quota(Some(5 << 40));
        let (record, payload) = record(&keys);
        let unlock = |record: &TenantRecord, payload: &[u8]| record.unlock(keys.scope.vault, &acme(), payload).unwrap();
        assert_eq!(unlock(&record, &payload).quota(), Some(5 << 40));
        assert!(!String::from_utf8(record.encode()).unwrap().contains("quota"), "it would be in clear");
        let next = |record: &TenantRecord, payload: &[u8], change: &dyn Fn(&mut Successor<'_>)| {
            let mut next = record.successor(keys.scope.vault, &acme(), payload).unwrap();
            change(&mut next);
            let payload = next.payload();
            (next.record(record.kms.clone(), vec![4], [0xCC; KEY], Some("old")).unwrap(), payload)
        };
        let (kept, payload) = next(&record, &payload, &|_| {});
        assert_eq!(unlock(&kept, &payload).quota(), Some(5 << 40));
        let (changed, payload) = next(&kept, &payload, &|next| next.set_quota(Some(7)).unwrap());
        let unlocked = unlock(&changed, &payload);
        assert_eq!((unlocked.quota(), unlocked.previous_kek()), (Some(7), Some("old")));
        assert_eq!(unlocked.dek(1).unwrap().expose(), &[0xD1; KEY]);
        let (lifted, payload) = next(&changed, &payload, &|next| next.set_quota(None).unwrap());
        assert_eq!(unlock(&lifted, &payload).quota(), None);
    }

    #[test]
    fn objectives_are_sealed_and_stay_until_they_are_changed() {
        let keys = keys(1).with_quota(Some(5 << 40));
        let (record, payload) = record(&keys);
        let unlock = |record: &TenantRecord, payload: &[u8]| record.unlock(keys.scope.vault, &acme(), payload).unwrap();
        assert_eq!(*unlock(&record, &payload).objectives(), Objectives::default());
        let next = |record: &TenantRecord, payload: &[u8], objectives: Option<&Objectives>| {
            let mut next = record.successor(keys.scope.vault, &acme(), payload).unwrap();
            if let Some(objectives) = objectives {
                next.set_objectives(objectives).unwrap();
            }
            let payload = next.payload();
            (next.record(record.kms.clone(), vec![4], [0xCC; KEY], None).unwrap(), payload)
        };
        let vm = |name: &str| VmName::new(name).unwrap();
        let vms = BTreeMap::from([(vm("db"), Some(3_600)), (vm("old \"1\""), None)]);
        let set = Objectives { tenant: Some(86_400), vms };
        let (changed, payload) = next(&record, &payload, Some(&set));
        assert!(!String::from_utf8(changed.encode()).unwrap().contains("objective"), "it would be in clear");
        let (kept, payload) = next(&changed, &payload, None);
        let unlocked = unlock(&kept, &payload);
        assert_eq!((unlocked.objectives(), unlocked.quota()), (&set, Some(5 << 40)));
        let (lifted, payload) = next(&kept, &payload, Some(&Objectives::default()));
        assert_eq!(*unlock(&lifted, &payload).objectives(), Objectives::default());
        let master = lifted.master(&keys.scope, &payload).unwrap();
        let sealed = lifted.open_sealed(&keys.scope, &master).unwrap();
        assert!(!String::from_utf8(sealed.to_vec()).unwrap().contains("objective"), "what is not set is not written");
    }

    #[test]
    fn as_many_objectives_as_there_may_be_fit_a_record() {
        let keys = keys(1);
        let (record, payload) = record(&keys);
        let vms =
            (0..crate::objectives::MAX_VM_OBJECTIVES).map(|nth| (format!("{:\"<76}{nth:04}", ""), Some(u64::MAX)));
        let vms = vms.map(|(name, seconds)| (VmName::new(&name).unwrap(), seconds)).collect();
        let mut next = record.successor(keys.scope.vault, &acme(), &payload).unwrap();
        next.set_objectives(&Objectives { tenant: Some(u64::MAX), vms }).unwrap();
        let length = next.record(record.kms.clone(), vec![4], [0xCC; KEY], None).unwrap().encode().len();
        // And beside them what as many DEKs as a record may hold take.
        assert!(length + MAX_EPOCHS * 2 * 100 < MAX_RECORD, "{length}");
    }

    #[test]
    fn policies_are_sealed_stay_until_they_are_changed_and_fit_a_record_beside_all_else() {
        let keys = keys(1);
        let (record, payload) = record(&keys);
        let most = Policy {
            last: u32::MAX,
            hourly: u32::MAX,
            daily: u32::MAX,
            weekly: u32::MAX,
            monthly: u32::MAX,
            yearly: u32::MAX,
            within: Some(u64::MAX),
            ..Policy::default()
        };
        let name = |nth| VmName::new(&format!("{:\"<76}{nth:04}", "")).unwrap();
        let vms = (0..crate::retention::MAX_VM_POLICIES).map(|nth| (name(nth), Some(most.clone()))).collect();
        let set = Policies { tenant: Some(most.clone()), vms };
        let mut next = record.successor(keys.scope.vault, &acme(), &payload).unwrap();
        next.set_policies(&set).unwrap();
        let objectives = (0..crate::objectives::MAX_VM_OBJECTIVES).map(|nth| (name(nth), Some(u64::MAX))).collect();
        next.set_objectives(&Objectives { tenant: Some(u64::MAX), vms: objectives }).unwrap();
        let payload = next.payload();
        let changed = next.record(record.kms.clone(), vec![4], [0xCC; KEY], None).unwrap();
        let encoded = changed.encode();
        assert!(encoded.len() + MAX_EPOCHS * 2 * 100 < MAX_RECORD, "{}", encoded.len());
        assert!(!String::from_utf8(encoded).unwrap().contains("retention"), "it would be in clear");
        assert_eq!(*changed.unlock(keys.scope.vault, &acme(), &payload).unwrap().policies(), set);
        let mut next = changed.successor(keys.scope.vault, &acme(), &payload).unwrap();
        next.set_policies(&Policies::default()).unwrap();
        let payload = next.payload();
        let lifted = next.record(record.kms.clone(), vec![4], [0xCC; KEY], None).unwrap();
        assert_eq!(*lifted.unlock(keys.scope.vault, &acme(), &payload).unwrap().policies(), Policies::default());
    }

    #[test]
    fn nothing_is_replaced_by_who_may_not_write() {
        let keys = keys(1);
        let (record, payload) = record(&keys);
        let next = |record: &TenantRecord| record.successor(keys.scope.vault, &acme(), &payload).map(drop);
        assert_eq!(next(&record), Ok(()));
        let lacking = changed(&keys, |secrets| secrets["required_to_write"] = serde_json::json!(["y"]));
        assert_eq!(next(&lacking), Err(FormatError::Feature("y".into())));
    }

    #[test]
    fn an_erased_record_holds_nothing_that_opens() {
        let keys = keys(1);
        let (record, payload) = record(&keys);
        let erased = record.erase(Timestamp(7)).unwrap();
        let back = TenantRecord::decode(&erased.encode()).unwrap();
        assert_eq!(back, erased);
        assert_eq!((back.erased, back.generation, back.wrapped.len()), (Some(Timestamp(7)), 2, 0));
        assert!(back.unlock(keys.scope.vault, &acme(), &payload).is_err());
        let last = TenantRecord { generation: u64::MAX, ..record };
        assert!(last.erase(Timestamp(7)).is_err());
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
