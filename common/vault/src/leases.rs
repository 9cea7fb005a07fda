//! Who is at work on a tenant's objects, and who has its keys.
//!
//! Whoever seals objects takes a lease first and reads the tenant record then. So who changes the record, and looks at the
//! leases after that, knows all who may still seal as the record before it said: those who have one of these leases.
//! No clock is in it: a lease ends with its process.
//!
//! Whoever only reads, but for long, has a lease of another kind: nobody waits for it but who erases the tenant, and nothing is
//! pruned that it says it reads.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::ids::LeaseId;
use reseal_format::layout;
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_store::{Lease, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::tenant::random;
use crate::{Point, Tenant, VaultError};

/// Longest lease that is read.
const MAX_LEASE: usize = 4096;
/// As much of a text in it as is shown.
const SHOWN: usize = 120;

/// What a process says of itself, in clear. It is for people, but for what a prune has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it does, such as `backup of web01`.
    pub what: String,
    pub host: String,
    pub pid: u32,
    pub since: Timestamp,
    /// The restore point that it will make, if it does: a prune which has waited long enough sees to it that it can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub makes: Option<PointName>,
    /// What it reads, so that it is not pruned.
    #[serde(default)]
    pub pins: Pins,
}

/// A restore point, which may not exist yet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PointName {
    pub vm: VmName,
    pub number: u32,
}

impl fmt::Display for PointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.vm, self.number)
    }
}

/// Restore points that a process reads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pins {
    /// Whichever it is asked for; also of one who says nothing.
    #[default]
    All,
    Point(PointName),
    Nothing,
}

impl Pins {
    fn has(&self, vm: &VmName, number: u32) -> bool {
        match self {
            Pins::All => true,
            Pins::Point(point) => (&point.vm, point.number) == (vm, number),
            Pins::Nothing => false,
        }
    }
}

impl Holder {
    /// What this process says.
    pub fn this_process(what: String) -> Holder {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Holder {
            what,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id(),
            since: Timestamp(i64::try_from(since.as_millis()).unwrap_or(0)),
            makes: None,
            pins: Pins::All,
        }
    }

    /// Who is making that restore point.
    pub fn making(self, vm: VmName, number: u32) -> Holder {
        Holder { makes: Some(PointName { vm, number }), ..self }
    }

    /// Who reads these and no others.
    pub fn pinning(self, pins: Pins) -> Holder {
        Holder { pins, ..self }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever can write to the storage can write anything here.
        let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(SHOWN).collect::<String>();
        write!(f, "{} (process {} on {}, since {})", shown(&self.what), self.pid, shown(&self.host), self.since)
    }
}

/// A lease that some process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    key: String,
    /// `None` if it says nothing that can be read.
    pub holder: Option<Holder>,
}

impl Held {
    /// What stands there; whether it is held is another question.
    fn read(store: &dyn Store, key: &str) -> Held {
        let holder = store.get(key, MAX_LEASE).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Held { key: key.to_owned(), holder }
    }

    /// The restore point that it is making, if it says so.
    pub fn makes(&self) -> Option<&PointName> {
        self.holder.as_ref()?.makes.as_ref()
    }

    fn has_pinned(&self, vm: &VmName, number: u32) -> bool {
        self.holder.as_ref().is_none_or(|holder| holder.pins.has(vm, number))
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.holder {
            Some(holder) => holder.fmt(f),
            None => write!(f, "a process that says nothing of itself ({})", self.key),
        }
    }
}

/// The leases of those who seal that are held now. What processes that died have left is removed.
pub(crate) fn leases(store: &dyn Store, tenant: &TenantName) -> Result<Vec<Held>, VaultError> {
    held(store, tenant, |name| Some(layout::lease(tenant, layout::parse_lease_file(name)?)))
}

/// The leases of those who only read that are held now. What processes that died have left is removed.
fn readers(store: &dyn Store, tenant: &TenantName) -> Result<Vec<Held>, VaultError> {
    held(store, tenant, |name| Some(layout::reader_lease(tenant, layout::parse_reader_file(name)?)))
}

/// All who say that they have the tenant's keys. What processes that died have left is removed.
pub fn holders(store: &dyn Store, tenant: &TenantName) -> Result<Vec<Held>, VaultError> {
    let rekey = layout::rekey_lease(tenant);
    held(store, tenant, |name| {
        let sealer = layout::parse_lease_file(name).map(|id| layout::lease(tenant, id));
        let reader = || layout::parse_reader_file(name).map(|id| layout::reader_lease(tenant, id));
        sealer.or_else(reader).or_else(|| rekey.ends_with(&format!("/{name}")).then(|| rekey.clone()))
    })
}

fn held(store: &dyn Store, tenant: &TenantName, key: impl Fn(&str) -> Option<String>) -> Result<Vec<Held>, VaultError> {
    let mut held = Vec::new();
    for entry in store.list(&layout::leases(tenant))? {
        let Some(key) = key(&entry.name) else { continue };
        // Read before it is asked for: it may go in between, but not come.
        let lease = Held::read(store, &key);
        if store.is_held(&key)? {
            held.push(lease);
        }
    }
    Ok(held)
}

fn text_of(holder: &Holder) -> Vec<u8> {
    serde_json::to_vec(holder).unwrap_or_default()
}

/// Takes a lease that only one process may have.
pub(crate) fn exclusive(
    store: &dyn Store,
    tenant: &TenantName,
    key: &str,
    holder: &Holder,
) -> Result<Box<dyn Lease>, VaultError> {
    loop {
        match store.lease(key, &text_of(holder)) {
            Err(StoreError::Exists(_)) => {}
            other => return Ok(other?),
        }
        let busy = busy(store, tenant, key);
        if store.is_held(key)? {
            return Err(busy);
        }
    }
}

fn busy(store: &dyn Store, tenant: &TenantName, key: &str) -> VaultError {
    VaultError::Busy { tenant: tenant.clone(), who: Held::read(store, key).to_string() }
}

impl Tenant {
    /// Takes a lease, before the record is read on which the work relies.
    pub fn lease(&self, holder: &Holder) -> Result<Box<dyn Lease>, VaultError> {
        // What those that died have left goes when somebody else comes.
        self.leases()?;
        let key = layout::lease(&self.name, LeaseId::from_bytes(random()?));
        let lease = self.store.lease(&key, &text_of(holder))?;
        self.check_stays()?;
        Ok(lease)
    }

    /// Refuses to begin where the tenant is about to be removed. Asked after a lease was taken: who removes takes his before
    /// he looks for others, so one of the two sees the other.
    fn check_stays(&self) -> Result<(), VaultError> {
        let key = layout::remove_lease(&self.name);
        match self.store.is_held(&key)? {
            true => Err(busy(&*self.store, &self.name, &key)),
            false => Ok(()),
        }
    }

    /// Takes the lease of a process that reads for long. None where the storage takes nothing: reading needs no more than
    /// reading.
    pub fn reader_lease(&self, holder: &Holder) -> Option<Box<dyn Lease>> {
        // What those that died have left goes when somebody else comes.
        holders(&*self.store, &self.name).ok()?;
        let key = layout::reader_lease(&self.name, LeaseId::from_bytes(random().ok()?));
        self.store.lease(&key, &text_of(holder)).ok()
    }

    /// Takes a lease on a restore point, so that it is not pruned while it is read. An error if it was forgotten before.
    pub fn pin(&self, point: PointName, what: String) -> Result<Option<Box<dyn Lease>>, VaultError> {
        let lease = self.reader_lease(&Holder::this_process(what).pinning(Pins::Point(point.clone())));
        // Who forgets makes a tombstone first and looks for leases then, so one of the two sees the other.
        match self.is_forgotten(&point.vm, point.number)? {
            true => Err(VaultError::NoPoint { point: point.to_string(), vm: point.vm }),
            false => Ok(lease),
        }
    }

    /// Takes a lease on this point, or on all: see [`Tenant::pin`].
    pub fn pin_point(&self, point: Option<&Point>, what: String) -> Result<Option<Box<dyn Lease>>, VaultError> {
        match point.map(|point| &point.manifest) {
            Some(of) => self.pin(PointName { vm: of.vm.clone(), number: of.number }, what),
            None => Ok(self.reader_lease(&Holder::this_process(what))),
        }
    }

    /// Who reads a restore point now, as far as they say.
    pub fn pinned(&self, vm: &VmName, number: u32) -> Result<Vec<Held>, VaultError> {
        let mut readers = readers(&*self.store, &self.name)?;
        readers.retain(|held| held.has_pinned(vm, number));
        Ok(readers)
    }

    /// Takes the one lease of who rewrites packs: who changes the data keys, prunes, or mends what is damaged. It stands beside the others, and is not one of [`Tenant::leases`].
    pub fn rekey_lease(&self, holder: &Holder) -> Result<Box<dyn Lease>, VaultError> {
        let lease = exclusive(&*self.store, &self.name, &layout::rekey_lease(&self.name), holder)?;
        self.check_stays()?;
        Ok(lease)
    }

    /// Takes the one lease of who forgets restore points. It stands beside the others, and is not one of [`Tenant::leases`].
    pub(crate) fn forget_lease(&self, holder: &Holder) -> Result<Box<dyn Lease>, VaultError> {
        exclusive(&*self.store, &self.name, &layout::forget_lease(&self.name), holder)
    }

    /// The leases that are held now. What processes that died have left is removed.
    pub fn leases(&self) -> Result<Vec<Held>, VaultError> {
        leases(&*self.store, &self.name)
    }

    /// Whether a lease is still held.
    pub fn is_held(&self, lease: &Held) -> Result<bool, VaultError> {
        match self.store.is_held(&lease.key) {
            Err(StoreError::NotFound(_)) => Ok(false),
            other => Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lease_says_is_shown_without_control_characters_and_cut() {
        let holder = Holder {
            what: "x\u{1b}[2J\n".repeat(99),
            host: "h\r".into(),
            pid: 7,
            since: Timestamp(1_795_501_907_123),
            ..Holder::this_process(String::new())
        };
        let shown = holder.to_string();
        assert!(shown.starts_with("x[2Jx[2J") && shown.contains("(process 7 on h, since 2026-"), "{shown}");
        assert!(shown.len() < 300 && !shown.contains(|c: char| c.is_control()), "{shown}");
    }
}
