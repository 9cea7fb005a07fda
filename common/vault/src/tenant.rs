//! Making a vault and its tenants; a tenant that is unlocked.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use reseal_format::ids::{TenantId, VaultId};
use reseal_format::keys::{DedupSecret, Dek, Master, Scope};
use reseal_format::layout;
use reseal_format::names::TenantName;
use reseal_format::tenant::{KmsRef, MAX_RECORD, TenantKeys, TenantRecord, master_payload};
use reseal_format::vaultfile::{MAX_VAULT_FILE, VaultFile};
use reseal_kms::{KeyName, Kms};
use reseal_store::{Store, StoreError};
use zeroize::Zeroizing;

use crate::VaultError;
use crate::record::Record;
use crate::refresh::{Failure, Opener, Unlocked};

/// Random bytes from the system.
pub fn random<const N: usize>() -> Result<[u8; N], VaultError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| VaultError::Random)?;
    Ok(bytes)
}

pub(crate) fn random_key() -> Result<Zeroizing<[u8; 32]>, VaultError> {
    let mut key = Zeroizing::new([0; 32]);
    getrandom::fill(key.as_mut()).map_err(|_| VaultError::Random)?;
    Ok(key)
}

/// The master of a tenant that is to be.
pub fn random_master() -> Result<Master, VaultError> {
    Ok(Master::from_bytes(random_key()?))
}

/// Refuses to go on without a record that must have been there, for what it is the head of still is.
fn expect_none(store: &dyn Store, folders: &[String], object: &str) -> Result<(), VaultError> {
    for folder in folders {
        // Looked for once more, for it is made before what belongs to it: perhaps just now.
        let made = |store: &dyn Store| !matches!(store.read_tail(object, 0), Err(StoreError::NotFound(_)));
        if !store.list(folder)?.is_empty() && !made(store) {
            let why = "what belongs to it is there, so it was removed; restore it from a copy of the vault";
            return Err(VaultError::Missing { object: object.to_owned(), why });
        }
    }
    Ok(())
}

fn expect_no_vault(store: &dyn Store) -> Result<(), VaultError> {
    expect_none(store, &[layout::TENANTS.to_owned()], layout::VAULT_FILE)
}

pub(crate) fn expect_no_tenant(store: &dyn Store, tenant: &TenantName) -> Result<(), VaultError> {
    expect_none(store, &[layout::vms(tenant), layout::packs(tenant)], &layout::tenant_record(tenant))
}

/// Makes a vault, or tells that there is one.
pub fn create_vault(store: &dyn Store, repo: &str) -> Result<VaultId, VaultError> {
    if let Err(StoreError::NotFound(_)) = store.get(layout::VAULT_FILE, MAX_VAULT_FILE) {
        expect_no_vault(store)?;
    }
    // A vault in a folder with other things in it would be taken for theirs, and they for its own.
    let mut found = store.list("")?;
    // What a fresh file system has, and what an `init` that was killed leaves.
    found.retain(|entry| entry.name != "lost+found" && entry.name != "tmp");
    if found.iter().any(|entry| entry.name == layout::VAULT_FILE) {
        return Err(VaultError::VaultExists { repo: repo.into() });
    }
    if !found.is_empty() {
        return Err(VaultError::NotEmpty(repo.into()));
    }
    store.probe()?;
    let id = VaultId::from_bytes(random()?);
    match store.create(layout::VAULT_FILE, &VaultFile::new(id).encode()) {
        Ok(()) => Ok(id),
        Err(StoreError::Exists(_)) => Err(VaultError::VaultExists { repo: repo.into() }),
        Err(e) => Err(e.into()),
    }
}

/// The id of the vault in a store, which is an error where there is none.
pub fn vault_id(store: &dyn Store, repo: &str) -> Result<VaultId, VaultError> {
    let bytes = match store.get(layout::VAULT_FILE, MAX_VAULT_FILE) {
        Err(StoreError::NotFound(_)) => {
            expect_no_vault(store)?;
            return Err(VaultError::NotAVault { repo: repo.into() });
        }
        other => other?,
    };
    Ok(VaultFile::decode(&bytes).map_err(VaultError::damaged(layout::VAULT_FILE))?.vault_id)
}

/// What a KMS binds a wrapped master to.
pub(crate) fn kms_context(scope: &Scope) -> Vec<u8> {
    [&b"reseal/1 master"[..], scope.vault.as_bytes(), scope.tenant.as_bytes()].concat()
}

/// What was made of a tenant, and what a recovery kit of it must hold.
pub struct MadeTenant {
    /// The KEK's name in its KMS.
    pub key: KeyName,
    /// Vault and tenant.
    pub scope: Scope,
    /// The tenant's master.
    pub master: Master,
}

/// Makes a tenant in the vault, with a new KEK in the KMS.
pub fn create_tenant(
    store: &dyn Store,
    repo: &str,
    tenant: &TenantName,
    kms: &dyn Kms,
    quota: Option<u64>,
) -> Result<MadeTenant, VaultError> {
    let vault = vault_id(store, repo)?;
    match store.get(&layout::tenant_record(tenant), MAX_RECORD) {
        Err(StoreError::NotFound(_)) => expect_no_tenant(store, tenant)?,
        Ok(_) => return Err(VaultError::TenantExists { tenant: tenant.clone() }),
        Err(e) => return Err(e.into()),
    }
    let scope = Scope { vault, tenant: TenantId::from_bytes(random()?) };
    let master = random_master()?;
    let key = kms.create(KeyName::for_tenant(tenant.as_str())?.as_str())?;
    let made = first_record(scope, tenant, &master, kms, &key, quota).and_then(|record| {
        match store.create(&layout::tenant_record(tenant), &record.encode()) {
            Err(StoreError::Exists(_)) => Err(VaultError::TenantExists { tenant: tenant.clone() }),
            other => Ok(other?),
        }
    });
    let nothing_made = || matches!(store.get(&layout::tenant_record(tenant), MAX_RECORD), Err(StoreError::NotFound(_)));
    if made.as_ref().is_err_and(|e| matches!(e, VaultError::TenantExists { .. }) || nothing_made()) {
        // Nothing needs the new key. If it can't be destroyed, what counts is the error that led here.
        let _ = kms.destroy(key.as_str());
    }
    made.map(|()| MadeTenant { key, scope, master })
}

/// The record of a new tenant, with fresh keys.
fn first_record(
    scope: Scope,
    tenant: &TenantName,
    master: &Master,
    kms: &dyn Kms,
    key: &KeyName,
    quota: Option<u64>,
) -> Result<TenantRecord, VaultError> {
    let keys = TenantKeys::new(scope, Dek::from_bytes(random_key()?), DedupSecret::from_bytes(random_key()?));
    let keys = keys.with_quota(quota);
    let payload = master_payload(&scope, keys.record_generation(), master);
    let wrapped = kms.wrap(key.as_str(), &kms_context(&scope), &payload)?;
    let reference = KmsRef { kind: kms.kind().into(), key: key.as_str().into() };
    Ok(TenantRecord::new(&keys, tenant, master, random()?, reference, wrapped))
}

/// A tenant whose keys are unlocked. They are replaced when the tenant gets others: see [`Tenant::refresh`].
pub struct Tenant {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) name: TenantName,
    /// What opened the record, and is asked again for the next one.
    pub(crate) opener: Opener,
    pub(crate) unlocked: RwLock<Arc<Unlocked>>,
    /// Held by the one thread that asks the KMS.
    pub(crate) turn: Mutex<()>,
    /// What became of that, if it was not good.
    pub(crate) failure: Mutex<Option<Failure>>,
}

impl Tenant {
    /// Reads the tenant's record and has the KMS unwrap its master.
    pub fn open(store: Arc<dyn Store>, repo: &str, name: &TenantName, kms: Arc<dyn Kms>) -> Result<Tenant, VaultError> {
        Record::read(store, repo, name)?.unlock(kms)
    }

    pub(crate) fn new(store: Arc<dyn Store>, name: TenantName, opener: Opener, unlocked: Unlocked) -> Tenant {
        let unlocked = RwLock::new(Arc::new(unlocked));
        Tenant { store, name, opener, unlocked, turn: Mutex::default(), failure: Mutex::default() }
    }

    pub(crate) fn unlocked(&self) -> Arc<Unlocked> {
        self.unlocked.read().clone()
    }

    /// Its name.
    pub fn name(&self) -> &TenantName {
        &self.name
    }

    /// Its keys, as they are now.
    pub fn keys(&self) -> Arc<TenantKeys> {
        self.unlocked.read().keys.clone()
    }

    /// Generation of the record that the keys came from.
    pub fn record_generation(&self) -> u64 {
        self.unlocked.read().keys.record_generation()
    }

    /// Where its objects are.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Which KMS key wraps its master.
    pub fn kms(&self) -> KmsRef {
        self.unlocked.read().kms.clone()
    }
}
