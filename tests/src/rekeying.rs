//! Gives a tenant new keys by hand, one step after the other, from `docs/FORMAT.md` alone: so that a test can stop between
//! any two of them and look.
//!
//! ```text
//! begin: record with a new master and epoch → each pack as its next generation, each sealed object anew → end: the old key goes
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use hkdf::Hkdf;
use reseal_kms::{Keyring, Kms};
use reseal_store::{Local, Store};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::site::Site;

const RECORD: u8 = 6;
const RECORD_KEY: &str = "tenants/default/tenant.json";
const LIMIT: usize = 16 << 20;
const TAG: usize = 16;
const TRAILER: usize = 128;
const HEADER: usize = 128;
const LENGTHS_ORDINAL: u32 = 0xFFFF_FFFF;
const IDS_ORDINAL: u32 = 0xFFFF_FFFE;

type Key = [u8; 32];

/// The default tenant of a site on its way to other keys.
pub struct Rekeying {
    store: Local,
    keyring: Keyring,
    /// Vault and tenant.
    scope: Vec<u8>,
    deks: BTreeMap<u32, Key>,
    epoch: u32,
    generation: u64,
}

fn random<const N: usize>() -> [u8; N] {
    reseal_vault::random().unwrap()
}

fn unhex(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn nonce(ordinal: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[8..].copy_from_slice(&ordinal.to_be_bytes());
    nonce
}

fn seal(key: &Key, ordinal: u32, aad: &[u8], plain: &[u8]) -> Vec<u8> {
    let cipher = Aes256Gcm::new_from_slice(key).unwrap();
    cipher.encrypt(&nonce(ordinal).into(), Payload { msg: plain, aad }).unwrap()
}

fn open(key: &Key, ordinal: u32, aad: &[u8], sealed: &[u8]) -> Vec<u8> {
    let cipher = Aes256Gcm::new_from_slice(key).unwrap();
    cipher.decrypt(&nonce(ordinal).into(), Payload { msg: sealed, aad }).unwrap()
}

impl Rekeying {
    /// Reads the tenant's keys; nothing is changed yet.
    pub fn new(site: &Site) -> Rekeying {
        Rekeying::with_keyring(site, &site.keyring)
    }

    /// The same with a keyring elsewhere.
    pub fn with_keyring(site: &Site, keyring: &Path) -> Rekeying {
        let store = Local::new(&site.vault);
        let keyring = Keyring::open(keyring, |_| unreachable!("it has no passphrase")).unwrap();
        let vault: Value = serde_json::from_slice(&store.get("reseal.json", LIMIT).unwrap()).unwrap();
        let record: Value = serde_json::from_slice(&store.get(RECORD_KEY, LIMIT).unwrap()).unwrap();
        let scope = [unhex(&vault["vault_id"]), unhex(&record["tenant_id"])].concat();
        let mut rekeying = Rekeying { store, keyring, scope, deks: BTreeMap::new(), epoch: 0, generation: 0 };
        let (_, _, secrets) = rekeying.record();
        rekeying.learn(&secrets);
        rekeying
    }

    fn learn(&mut self, secrets: &Value) {
        let dek = |dek: &Value| (u32::try_from(dek["epoch"].as_u64().unwrap()).unwrap(), array(&unhex(&dek["key"]), 0));
        self.deks = secrets["deks"].as_array().unwrap().iter().map(dek).collect();
        self.epoch = u32::try_from(secrets["current_epoch"].as_u64().unwrap()).unwrap();
    }

    /// The key of one object.
    fn derive(&self, secret: &Key, salt: &Key, kind: u8, id: &[u8]) -> Key {
        let mut key = [0; 32];
        let info = [b"reseal/1 object key", &self.scope[..], &[kind], id].concat();
        Hkdf::<Sha256>::new(Some(salt), secret).expand(&info, &mut key).unwrap();
        key
    }

    /// Associated data of an object that is sealed as one piece.
    fn header_aad(&self, header: &[u8]) -> Vec<u8> {
        [&1u16.to_le_bytes()[..], &self.scope, header].concat()
    }

    fn context(&self) -> Vec<u8> {
        [b"reseal/1 master", &self.scope[..]].concat()
    }

    /// The record as bytes and as JSON, and what is sealed in it.
    fn record(&self) -> (Vec<u8>, Value, Value) {
        let bytes = self.store.get(RECORD_KEY, LIMIT).unwrap();
        let record: Value = serde_json::from_slice(&bytes).unwrap();
        let kek = record["kms"]["key"].as_str().unwrap();
        let payload = self.keyring.unwrap(kek, &self.context(), &unhex(&record["wrapped"])).unwrap();
        let key = self.derive(&array(&payload, 48), &array(&unhex(&record["salt"]), 0), RECORD, &self.scope[16..]);
        let aad = self.header_aad(&record["generation"].as_u64().unwrap().to_le_bytes());
        let secrets = serde_json::from_slice(&open(&key, 0, &aad, &unhex(&record["sealed"]))).unwrap();
        (bytes, record, secrets)
    }

    /// Puts the record's next generation in its place, under a new master, with other secrets.
    fn replace_record(&mut self, change: impl FnOnce(&mut Value)) {
        let (old, mut record, mut secrets) = self.record();
        change(&mut secrets);
        self.learn(&secrets);
        self.generation = record["generation"].as_u64().unwrap() + 1;
        let (master, salt): (Key, Key) = (random(), random());
        let payload = [b"RSLMASTR", &self.scope[..], &self.generation.to_le_bytes(), &master].concat();
        let wrapped = self.keyring.wrap(record["kms"]["key"].as_str().unwrap(), &self.context(), &payload).unwrap();
        let key = self.derive(&master, &salt, RECORD, &self.scope[16..]);
        let aad = self.header_aad(&self.generation.to_le_bytes());
        let sealed = seal(&key, 0, &aad, &serde_json::to_vec(&secrets).unwrap());
        record["generation"] = json!(self.generation);
        for (field, bytes) in [("wrapped", &wrapped), ("salt", &salt.to_vec()), ("sealed", &sealed)] {
            record[field] = json!(hex::encode(bytes));
        }
        self.store.replace(RECORD_KEY, &old, &serde_json::to_vec(&record).unwrap()).unwrap();
    }

    /// Replaces the record: a new key for what is sealed from now on, beside those that there are.
    pub fn begin(&mut self) {
        self.replace_record(|secrets| {
            let epoch = secrets["current_epoch"].as_u64().unwrap() + 1;
            let new = json!({ "epoch": epoch, "key": hex::encode(random::<32>()) });
            secrets["deks"].as_array_mut().unwrap().push(new);
            secrets["current_epoch"] = json!(epoch);
        });
    }

    /// Replaces the record: only the newest key stays.
    pub fn end(&mut self) {
        self.replace_record(|secrets| {
            let current = secrets["current_epoch"].clone();
            secrets["deks"].as_array_mut().unwrap().retain(|dek| dek["epoch"] == current);
        });
    }

    /// Seals a manifest, tombstone or note anew, in its place.
    pub fn reseal(&self, key: &str) {
        let old = self.store.get(key, LIMIT).unwrap();
        let (header, sealed) = old.split_at(HEADER);
        let (kind, id) = (header[10], &header[16..32]);
        let object_key = self.derive(&self.deks[&u32_at(header, 12)], &array(header, 32), kind, id);
        let plain = open(&object_key, 0, &self.header_aad(header), sealed);
        let (mut header, salt): (Vec<u8>, Key) = (header.to_vec(), random());
        header[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        header[32..64].copy_from_slice(&salt);
        header[84..92].copy_from_slice(&self.generation.to_le_bytes());
        let object_key = self.derive(&self.deks[&self.epoch], &salt, kind, id);
        let sealed = seal(&object_key, 0, &self.header_aad(&header), &plain);
        self.store.replace(key, &old, &[header, sealed].concat()).unwrap();
    }

    fn blob_aad(&self, kind: u8, id: &[u8], generation: u32, ordinal: u32, length: usize) -> Vec<u8> {
        let numbers = [generation, ordinal, u32::try_from(length).unwrap()].map(u32::to_le_bytes).concat();
        [&1u16.to_le_bytes()[..], &self.scope, &[kind], id, &numbers].concat()
    }

    /// Writes the next generation of a pack, beside the one that there is; its key.
    pub fn write_next(&self, key: &str) -> String {
        let old = self.store.get(key, LIMIT).unwrap();
        let trailer = &old[old.len() - TRAILER..];
        let (kind, id, generation) = (trailer[10], &trailer[16..32], u32_at(trailer, 12));
        let (count, salt): (u32, Key) = (u32_at(trailer, 36), random());
        let old_key = self.derive(&self.deks[&u32_at(trailer, 32)], &array(trailer, 56), kind, id);
        let new_key = self.derive(&self.deks[&self.epoch], &salt, kind, id);
        let rewrite = |ordinal: u32, sealed: &[u8]| {
            let aad = |generation| self.blob_aad(kind, id, generation, ordinal, sealed.len() - TAG);
            let plain = open(&old_key, ordinal, &aad(generation), sealed);
            (seal(&new_key, ordinal, &aad(generation + 1), &plain), plain)
        };
        let lengths_at = old.len() - TRAILER - (count as usize * 4 + TAG);
        let ids_at = lengths_at - (count as usize * 32 + TAG);
        let (lengths, plain_lengths) = rewrite(LENGTHS_ORDINAL, &old[lengths_at..old.len() - TRAILER]);
        let mut new = Vec::new();
        for ordinal in 0..count {
            let length = u32_at(&plain_lengths, ordinal as usize * 4) as usize;
            let at = new.len();
            if length > 0 {
                new.extend(rewrite(ordinal, &old[at..at + length]).0);
            }
        }
        new.extend(rewrite(IDS_ORDINAL, &old[ids_at..lengths_at]).0);
        new.extend(lengths);
        let mut trailer = trailer.to_vec();
        trailer[12..16].copy_from_slice(&(generation + 1).to_le_bytes());
        trailer[32..36].copy_from_slice(&self.epoch.to_le_bytes());
        trailer[56..88].copy_from_slice(&salt);
        new.extend(&trailer[..88]);
        let digest = blake3::hash(&new);
        new.extend(digest.as_bytes());
        new.extend(b"1KCAPLSR");
        let (name, _) = key.rsplit_once('.').unwrap();
        let next = format!("{name}.{}", generation + 1);
        self.store.create(&next, &new).unwrap();
        next
    }

    /// Puts the next generation of a pack in its place; its key.
    pub fn rewrite(&self, key: &str) -> String {
        let next = self.write_next(key);
        self.store.delete(key).unwrap();
        next
    }

    /// Does an object of the tenant as is due.
    pub fn renew(&self, key: &str) {
        if key.contains("/packs/") {
            self.rewrite(key);
        } else if key.contains("/vms/") {
            self.reseal(key);
        }
    }

    /// From the beginning to the end.
    pub fn all(site: &Site) {
        let mut rekeying = Rekeying::new(site);
        rekeying.begin();
        site.objects().iter().for_each(|key| rekeying.renew(key));
        rekeying.end();
    }
}
