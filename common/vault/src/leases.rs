//! Who is at work on a tenant's objects, and who has its keys.
//!
//! Whoever seals objects takes a lease first and reads the tenant record then. So who changes the record, and looks at the
//! leases after that, knows all who may still seal as the record before it said: those who have one of these leases.
//! No clock is in it: in a folder a lease ends with its process. In an object store it can only be silent, which tells little: before such
//! a process counts as ended, what it may still make is fenced and its lease is removed. Whoever relies on his lease looks for it after what
//! he did, so one of the two sees the other.
//!
//! Whoever only reads, but for long, has a lease of another kind: nobody waits for it but who erases the tenant, and nothing is
//! pruned that it says it reads.

use std::fmt;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reseal_format::ids::LeaseId;
use reseal_format::layout;
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_store::{Lease, LeaseUse, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::tenant::random;
use crate::{Point, Tenant, VaultError};

/// How often one that is silent is tried to be taken over: another one may be faster, and die.
const ROUNDS: usize = 8;
const NAP: Duration = Duration::from_millis(100);
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
    /// Whether nothing was heard of the process for so long that it has probably ended.
    pub is_silent: bool,
}

impl Held {
    /// What stands there, if somebody has it.
    fn find(store: &dyn Store, key: &str) -> Result<Option<Held>, VaultError> {
        let standing = store.standing(key)?;
        Ok(standing.map(|standing| Held {
            key: key.to_owned(),
            holder: serde_json::from_slice(&standing.bytes).ok(),
            is_silent: standing.is_silent,
        }))
    }

    /// Ends it, if it is silent and whatever its process might still do is of no account; whether that is so.
    pub(crate) fn end(&self, store: &dyn Store, is_nothing_left: bool) -> Result<bool, VaultError> {
        let is_reader = self.key.rsplit('/').next().is_some_and(|name| layout::parse_reader_file(name).is_some());
        Ok(self.is_silent && (is_reader || is_nothing_left) && store.end(&self.key)?)
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
            Some(holder) => holder.fmt(f)?,
            None => write!(f, "a process that says nothing of itself ({})", self.key)?,
        }
        match self.is_silent {
            true => f.write_str(", which was not heard of for long"),
            false => Ok(()),
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
        if let Some(key) = key(&entry.name) {
            held.extend(Held::find(store, &key)?);
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
    let mut round = 0;
    loop {
        // Takes the place of one that is silent.
        match store.lease(key, &text_of(holder), LeaseUse::Changing) {
            Err(StoreError::Exists(_)) => {}
            other => return Ok(other?),
        }
        match Held::find(store, key)? {
            Some(held) if !held.is_silent || round >= ROUNDS => return Err(busy(tenant, &held)),
            Some(_) => sleep(NAP),
            None => {}
        }
        round += 1;
    }
}

fn busy(tenant: &TenantName, held: &Held) -> VaultError {
    VaultError::Busy { tenant: tenant.clone(), who: held.to_string() }
}

impl Tenant {
    /// Takes a lease, before the record is read on which the work relies.
    pub fn lease(&self, holder: &Holder) -> Result<Box<dyn Lease>, VaultError> {
        // What those that died have left goes when somebody else comes.
        self.leases()?;
        let key = layout::lease(&self.name, LeaseId::from_bytes(random()?));
        let lease = self.store.lease(&key, &text_of(holder), LeaseUse::Changing)?;
        self.check_stays()?;
        Ok(lease)
    }

    /// Refuses to begin where the tenant is about to be removed. Asked after a lease was taken: who removes takes his before
    /// he looks for others, so one of the two sees the other.
    fn check_stays(&self) -> Result<(), VaultError> {
        match Held::find(&*self.store, &layout::remove_lease(&self.name))? {
            // One who stood still must not go on removing.
            Some(held) if !held.is_silent || !self.store.end(&held.key)? => Err(busy(&self.name, &held)),
            _ => Ok(()),
        }
    }

    /// Takes the lease of a process that reads for long. None where the storage takes nothing: reading needs no more than
    /// reading.
    pub fn reader_lease(&self, holder: &Holder) -> Option<Box<dyn Lease>> {
        // What those that died have left goes when somebody else comes.
        holders(&*self.store, &self.name).ok()?;
        let key = layout::reader_lease(&self.name, LeaseId::from_bytes(random().ok()?));
        self.store.lease(&key, &text_of(holder), LeaseUse::Reading).ok()
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
        let (silent, mut readers): (Vec<_>, Vec<_>) =
            readers(&*self.store, &self.name)?.into_iter().partition(|held| held.is_silent);
        for held in silent {
            // One who only reads loses nothing but what he reads. Unless he was heard of again.
            if !self.store.end(&held.key)? {
                readers.push(held);
            }
        }
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

    /// What a lease says now; `None` where it has ended.
    pub fn find_again(&self, lease: &Held) -> Result<Option<Held>, VaultError> {
        Held::find(&*self.store, &lease.key)
    }

    /// Sees to it that nothing counts any more which a silent process might do, and ends its lease. `under` is the lease of who does.
    pub fn end_silent(&self, lease: &Held, under: &dyn Lease) -> Result<Silenced, VaultError> {
        let mut fenced = None;
        if let Some(point) = lease.makes() {
            if self.fence(&point.vm, point.number, under)? {
                fenced = Some(point.clone());
            } else if self.chain(&point.vm)?.last() < point.number {
                return Ok(Silenced::No);
            }
        }
        match self.store.end(&lease.key)? {
            true => Ok(Silenced::Yes(fenced)),
            false => Ok(Silenced::No),
        }
    }
}

/// What became of a silent process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Silenced {
    /// It changes nothing that counts any more. With the restore point that it won't make, if it had not made that.
    Yes(Option<PointName>),
    /// It was heard of again, or can't be fenced: it is still to be waited for.
    No,
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
