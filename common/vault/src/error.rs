//! What can go wrong with a vault; each error names its object, and what to do where that is known.

use std::io::ErrorKind;
use std::sync::Arc;

use reseal_format::FormatError;
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::KmsError;
use reseal_store::StoreError;

/// What was to be added when a quota stood in the way, if anything was.
fn and_more(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!(" and would get {bytes} more") }
}

/// What a caller does about an error; the command line turns it into an exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Something went wrong that is none of the others.
    Failed,
    /// What was asked for does not exist or makes no sense.
    Usage,
    /// Data failed authentication, or is missing.
    Damaged,
    /// The store or the KMS did not answer; trying again may help.
    Unreachable,
}

/// A failed operation on a vault.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// Only for callers that asked not to wait.
    #[error("reading would have to wait")]
    WouldBlock,
    #[error(
        "{repo} is no vault: it has no reseal.json. Is its file system mounted, and --repo right? `reseal init` makes a new vault"
    )]
    NotAVault { repo: String },
    #[error("{repo} holds a vault already")]
    VaultExists { repo: String },
    #[error("the vault has no tenant {tenant}; `reseal tenant add` makes one; or name another")]
    NoTenant { tenant: TenantName },
    #[error("the vault has a tenant {tenant} already; `reseal key export` writes a recovery kit of it")]
    TenantExists { tenant: TenantName },
    #[error("there is no VM {vm}; `reseal list` shows what there is")]
    NoVm { vm: VmName },
    #[error(
        "{point} is held since {since}{}: it is not forgotten. `reseal hold {point} --release` ends that",
        reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
    )]
    Held { point: String, since: Timestamp, reason: Option<String> },
    #[error("there is no restore point {point}; `reseal list {vm}` shows what there is")]
    NoPoint { vm: VmName, point: String },
    #[error("{text:?} is no restore point: write VM@latest, VM@NUMBER or VM@TIME as `reseal list` prints it")]
    BadPoint { text: String },
    #[error("{object} {source}")]
    Damaged { object: String, source: FormatError },
    #[error("{object} is missing: {why}")]
    Missing { object: String, why: &'static str },
    #[error(
        "{what} is {now}, but {seen} was seen before: the vault was rolled back or restored from an older copy. \
         If that was you, repeat with --accept-rollback; otherwise treat the vault as tampered with"
    )]
    Rollback { what: String, seen: u64, now: u64 },
    #[error(
        "another backup of {vm} committed restore point {number} while this one ran; nothing is lost, run it again"
    )]
    LostRace { vm: VmName, number: u32 },
    #[error(
        "a prune gave up waiting for the backup that was to make {vm}@{number}: that number stays unused, run it again. \
         `reseal prune --grace` says how long a prune waits"
    )]
    Fenced { vm: VmName, number: u32 },
    #[error("the vault was changed while it was pruned: {what}. Nothing was removed; run it again")]
    ChangedMeanwhile { what: String },
    #[error(
        "the keys of tenant {tenant} are wrapped by a KMS of kind {wanted:?}, but {given:?} is configured for it: nothing \
         was asked there. Name its KMS under [tenants] in the KMS configuration (--kms-config, RESEAL_KMS_CONFIG)"
    )]
    OtherKms { tenant: TenantName, wanted: String, given: String },
    #[error(
        "the keys of tenant {tenant} are wrapped by a KMS of kind {wanted:?} now, but this process began with one of kind \
         {given:?}: nothing was asked there. Start it anew when the KMS configuration names the tenant's new KMS"
    )]
    MovedKms { tenant: TenantName, wanted: String, given: String },
    /// Shared by all that needed them at that moment.
    #[error("tenant {tenant} has new keys, which can't be had: {source}")]
    NoNewKeys { tenant: TenantName, source: Arc<VaultError> },
    #[error(
        "tenant {tenant} was erased at {when}: its keys are destroyed, and its restore points can't be read any more. If \
         nobody erased it, restore tenant.json from a copy of the vault"
    )]
    Erased { tenant: TenantName, when: Timestamp },
    #[error(
        "the KMS has no key {key}, which the record of tenant {tenant} names, and this machine has not begun to destroy it: \
         nothing was erased. If that key was destroyed elsewhere, repeat with --key-is-gone; otherwise look in the KMS for \
         the tenant's key, and who changed the record"
    )]
    NotErased { tenant: TenantName, key: String },
    #[error("the KMS still opens the record of tenant {tenant} after its key {key} was destroyed: it is not erased")]
    StillOpens { tenant: TenantName, key: String },
    #[error(
        "what the KMS wrapped for tenant {tenant} under the key {key} opens as something else: the record stays as it is"
    )]
    NotWrapped { tenant: TenantName, key: String },
    #[error(
        "tenant {tenant} has a quota of {quota} bytes, its packs have {used}{}: nothing was committed, and earlier restore \
         points are as they were. `reseal tenant set {tenant} --quota SIZE` gives it more (or `--quota none`); what was \
         stored so far counts, and the next backup uses it", and_more(*more)
    )]
    OverQuota { tenant: TenantName, quota: u64, used: u64, more: u64 },
    #[error(
        "tenant {tenant} has {most} VMs with an objective of their own, as many as there may be: give the tenant one for all \
         (`reseal tenant set {tenant} --objective`), and take back those that are like it (`--vm VM --objective tenant`)"
    )]
    ManyObjectives { tenant: TenantName, most: usize },
    #[error(
        "tenant {tenant} has {most} VMs that keep restore points by a policy of their own, as many as there may be: give the tenant \
         one for all, and take back those that are like it (`--vm VM --keep-as-tenant`)"
    )]
    ManyPolicies { tenant: TenantName, most: usize },
    #[error(
        "the recovery kit made {made} is of tenant {of} in the vault {vault}, not of what is here as tenant {tenant}: take that \
         tenant's kit, or correct --repo and --tenant"
    )]
    OtherKit { tenant: TenantName, of: String, vault: String, made: String },
    #[error(
        "the recovery kit made {made} is older than the keys of tenant {tenant}: its master does not open generation \
         {generation} of the record. Take a kit from after the last `reseal rekey --data`; if there was none since {made}, the \
         record is damaged: restore tenant.json from a copy of the vault"
    )]
    OldKit { tenant: TenantName, generation: u64, made: String },
    #[error(
        "the recovery kit made {made} is of version 1 and has no master, only a key of the keyring as it was then: `reseal key \
         import` brings that back, and opens the tenant unless the key was rotated since"
    )]
    KitWithoutMaster { made: String },
    #[error(
        "tenant {tenant} still has restore points ({points}), so it is not removed; `reseal tenant erase` destroys its keys"
    )]
    NotEmptyTenant { tenant: TenantName, points: usize },
    #[error("tenant {tenant}: {who} is at work; wait for its end, or end it")]
    Busy { tenant: TenantName, who: String },
    #[error(transparent)]
    Kms(#[from] KmsError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("can't keep what was seen in {path}: {source}; set RESEAL_STATE to a folder that is yours")]
    State { path: String, source: std::io::Error },
    /// Another site, which has the keys, could not do what it was asked.
    #[error("{message}")]
    Elsewhere { message: String, class: Class },
    #[error("{0} holds other files; a new vault needs a folder that is empty, or does not exist yet")]
    NotEmpty(String),
    #[error("the system gives no random bytes")]
    Random,
}

impl VaultError {
    /// What a caller does about it.
    pub fn class(&self) -> Class {
        match self {
            VaultError::NotAVault { .. }
            | VaultError::VaultExists { .. }
            | VaultError::NoTenant { .. }
            | VaultError::TenantExists { .. }
            | VaultError::NoVm { .. }
            | VaultError::NoPoint { .. }
            | VaultError::LostRace { .. }
            | VaultError::Fenced { .. }
            | VaultError::ChangedMeanwhile { .. }
            | VaultError::Held { .. }
            | VaultError::OtherKms { .. }
            | VaultError::MovedKms { .. }
            | VaultError::NotErased { .. }
            | VaultError::StillOpens { .. }
            | VaultError::NotWrapped { .. }
            | VaultError::OverQuota { .. }
            | VaultError::ManyObjectives { .. }
            | VaultError::ManyPolicies { .. }
            | VaultError::OtherKit { .. }
            | VaultError::KitWithoutMaster { .. }
            | VaultError::NotEmptyTenant { .. }
            | VaultError::Busy { .. }
            | VaultError::State { .. }
            | VaultError::NotEmpty(_)
            | VaultError::Random => Class::Failed,
            VaultError::BadPoint { .. } => Class::Usage,
            VaultError::Damaged { .. } | VaultError::Missing { .. } => Class::Damaged,
            VaultError::Rollback { .. } | VaultError::Erased { .. } | VaultError::OldKit { .. } => Class::Damaged,
            VaultError::WouldBlock => Class::Unreachable,
            VaultError::NoNewKeys { source, .. } => source.class(),
            VaultError::Elsewhere { class, .. } => *class,
            VaultError::Kms(error) => match error.class() {
                reseal_kms::Class::Unreachable => Class::Unreachable,
                reseal_kms::Class::Damaged => Class::Damaged,
                reseal_kms::Class::Usage => Class::Usage,
                reseal_kms::Class::Failed => Class::Failed,
            },
            VaultError::Store(error) => match error {
                StoreError::NotFound(_) | StoreError::NotAFile(_) => Class::Damaged,
                StoreError::TooLong { .. } | StoreError::Short { .. } => Class::Damaged,
                StoreError::Exists(_) | StoreError::Changed(_) | StoreError::Full(_) => Class::Failed,
                StoreError::Lost(_) | StoreError::Unconditional => Class::Failed,
                StoreError::NoLocks | StoreError::Locked { .. } | StoreError::Past(_) => Class::Failed,
                StoreError::Io { source, .. } => match source.kind() {
                    // Trying again changes nothing.
                    ErrorKind::PermissionDenied
                    | ErrorKind::ReadOnlyFilesystem
                    | ErrorKind::InvalidInput
                    | ErrorKind::InvalidData => Class::Failed,
                    _ => Class::Unreachable,
                },
            },
        }
    }

    /// Adds the object's name to what is wrong with its bytes.
    pub(crate) fn damaged(object: impl Into<String>) -> impl FnOnce(FormatError) -> VaultError {
        let object = object.into();
        move |source| VaultError::Damaged { object, source }
    }

    /// The object that is damaged or missing, if it is that.
    pub fn damaged_object(&self) -> Option<&str> {
        match self {
            VaultError::Damaged { object, .. } | VaultError::Missing { object, .. } => Some(object),
            VaultError::Elsewhere { message, class: Class::Damaged } => Some(message),
            VaultError::Store(
                StoreError::NotFound(key)
                | StoreError::NotAFile(key)
                | StoreError::TooLong { key, .. }
                | StoreError::Short { key, .. },
            ) => Some(key),
            _ => None,
        }
    }
}
