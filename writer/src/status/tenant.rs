//! How things stand with a tenant of a vault that is at hand.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use reseal_cli::{Failure, Status, counted};
use reseal_format::keys::Scope;
use reseal_format::layout;
use reseal_format::names::{TenantName, VmName};
use reseal_format::objectives::Objective;
use reseal_format::tenant::KmsRef;
use reseal_format::time::Timestamp;
use reseal_store::Store;
use reseal_vault::heads::Heads;
use reseal_vault::{Booted, Holdings, NoteNames, Point, Points, State, Tenant, VaultError, holders};

use super::results::{Results, VmResults};
use super::verdicts::{Verdict, Verdicts};
use super::{Attempt, Problem, boot};

/// A tenant.
#[derive(Debug, Clone)]
pub struct TenantReport {
    pub tenant: TenantName,
    /// When it was erased.
    pub erased: Option<Timestamp>,
    /// Why it could not be opened: then only what needs no keys is known.
    pub closed: Option<Failure>,
    /// Which KMS key wraps its master, as far as the record could be read.
    pub kms: Option<KmsRef>,
    /// Generation of its record.
    pub generation: u64,
    /// The epoch under which new objects are sealed.
    pub epoch: Option<u32>,
    pub rekey: Option<RekeyState>,
    pub quota: Option<u64>,
    /// What the quota counts, bytes of all objects, packs, VMs and points that were not forgotten.
    pub used: u64,
    pub bytes: u64,
    pub packs: usize,
    pub points: usize,
    /// Who is at work.
    pub at_work: Vec<String>,
    /// What the last verification of everything found.
    pub verified: Option<Verdict>,
    pub vms: Vec<VmReport>,
    /// What is wrong with the tenant as a whole.
    pub problems: Vec<Problem>,
}

/// A change of the data keys that is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RekeyState {
    Running,
    Interrupted,
}

/// A VM.
#[derive(Debug, Clone)]
pub struct VmReport {
    pub vm: VmName,
    /// Points that were not forgotten.
    pub points: usize,
    pub newest: Option<Newest>,
    /// How old it may be, in seconds.
    pub objective: Option<u64>,
    /// Whether it is older than that, or there is none.
    pub late: bool,
    pub last: Option<Attempt>,
    pub verified: Option<Verdict>,
    /// What became of the last boot that was tried.
    pub boot: Option<Booted>,
    /// Where to look for that.
    notes: NoteNames,
    pub problems: Vec<Problem>,
}

/// A VM's newest point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Newest {
    pub number: u32,
    pub created: Timestamp,
    /// Seconds.
    pub age: u64,
    /// What its backup read, and stored.
    pub read: u64,
    pub stored: u64,
}

/// Seconds from a moment until now; none where it lies ahead.
pub fn age(created: Timestamp, now: Timestamp) -> u64 {
    u64::try_from((now.0 - created.0) / 1000).unwrap_or(0)
}

/// What is wrong with a VM's newest point, if it is too old.
pub(super) fn lateness(vm: &VmName, age: Option<u64>, objective: Option<u64>) -> Option<Problem> {
    let objective = objective?;
    let within = crate::span::show(Duration::from_secs(objective));
    let what = match age {
        Some(age) if age <= objective => return None,
        Some(age) => {
            let age = crate::span::show(Duration::from_secs(age));
            format!("{vm} is late: its newest restore point is {age} old, its objective is {within}")
        }
        None => format!("{vm} is late: it has no restore point, its objective is {within}"),
    };
    Some(Problem::new(Status::Failed, what))
}

/// What is wrong if the last attempt made nothing.
pub(super) fn failure(vm: &VmName, last: Option<&Attempt>) -> Option<Problem> {
    let last = last.filter(|last| last.status != 0)?;
    let why = last.message.as_deref().unwrap_or("it is not known why");
    // That it failed is a fact that is known; whatever the reason was, it is none of this moment.
    Some(Problem::new(Status::Failed, format!("the last backup of {vm} made nothing: {why}")))
}

impl TenantReport {
    /// What is known without keys: from listings, and from what this machine remembers.
    fn new(
        store: &dyn Store,
        tenant: &TenantName,
        scope: Option<&Scope>,
        state: &Path,
    ) -> Result<TenantReport, VaultError> {
        let holdings = Holdings::of(store, tenant)?;
        let results = scope.map(|scope| Results::of_tenant(state, scope).all()).unwrap_or_default();
        let verdicts = scope.map(|scope| Verdicts::of_tenant(state, scope));
        let verified = verdicts.as_ref().and_then(Verdicts::whole);
        let mut names: BTreeSet<&VmName> = holdings.vms.iter().map(|vm| &vm.name).collect();
        // One without points and without a job was tried once, perhaps under a name that was typed wrong.
        names.extend(results.iter().filter(|results| results.has_job()).map(|results| &results.vm));
        let vm = |vm: &VmName| {
            let held = holdings.vms.iter().find(|held| held.name == *vm);
            let verified = verdicts.as_ref().and_then(|verdicts| verdicts.of_vm(vm, verified.as_ref()));
            let known = results.iter().find(|known| known.vm == *vm);
            let mut report = VmReport::new(vm, held.map_or(0, |held| held.points), known, verified);
            report.notes = held.map(|held| held.notes.clone()).unwrap_or_default();
            report
        };
        let vms = names.into_iter().map(vm).collect();
        let at_work = holders(store, tenant)?.iter().map(ToString::to_string).collect();
        let mut problems = Vec::new();
        if let Some(verdict) = verified.as_ref().filter(|verdict| verdict.damaged > 0) {
            let (count, time) = (counted(verdict.damaged, "damaged object"), verdict.time.to_rfc3339());
            let what = format!("the verification of {time} found {count}: `reseal verify` names them");
            problems.push(Problem::new(Status::Damaged, what));
        }
        Ok(TenantReport {
            tenant: tenant.clone(),
            erased: None,
            closed: None,
            kms: None,
            generation: 0,
            epoch: None,
            rekey: None,
            quota: None,
            used: holdings.pack_bytes,
            bytes: holdings.bytes,
            packs: holdings.packs,
            points: holdings.points(),
            at_work,
            verified,
            vms,
            problems,
        })
    }

    /// A tenant whose keys are at hand.
    pub fn of(tenant: &Tenant, heads: &Heads, state: &Path, now: Timestamp) -> Result<TenantReport, VaultError> {
        let (keys, store) = (tenant.keys(), tenant.store());
        let scope = keys.scope();
        let mut report = TenantReport::new(&**store, tenant.name(), Some(&scope), state)?;
        report.kms = Some(tenant.kms());
        report.generation = keys.record_generation();
        report.epoch = Some(keys.current_epoch());
        report.quota = keys.quota();
        if keys.epochs().count() > 1 {
            let standing = store.standing(&layout::rekey_lease(tenant.name()));
            let running = standing.is_ok_and(|standing| standing.is_some_and(|standing| !standing.is_silent));
            report.rekey = Some(if running { RekeyState::Running } else { RekeyState::Interrupted });
            if !running {
                let what = "a change of the data keys was interrupted: `reseal rekey --data` goes on with it";
                report.problems.push(Problem::new(Status::Failed, what));
            }
        }
        if let Some(quota) = keys.quota().filter(|quota| report.used > *quota) {
            let what = format!("it stores {} bytes, more than its quota of {quota}: no backup begins", report.used);
            report.problems.push(Problem::new(Status::Failed, what));
        }
        // One that vanished whole, and one that was never backed up, are asked for too.
        let mut others: Vec<VmName> = heads.known_vms()?;
        others.extend(keys.objectives().vms.iter().filter(|(_, own)| own.is_some()).map(|(vm, _)| vm.clone()));
        for vm in others {
            if !report.vms.iter().any(|known| known.vm == vm) {
                report.vms.push(VmReport::new(&vm, 0, None, None));
            }
        }
        report.vms.sort_by(|a, b| a.vm.cmp(&b.vm));
        let mut seen = Vec::with_capacity(report.vms.len());
        for vm in &mut report.vms {
            match keys.objectives().of(&vm.vm) {
                Objective::Within(seconds) => vm.objective = Some(seconds),
                Objective::Exempt => vm.objective = None,
                // What its job says, if it has one here.
                Objective::Unsaid => {}
            }
            if let Err(e) = vm.look(tenant, heads, now) {
                vm.problems.push(Problem::of(&e.into()));
            }
            seen.extend(vm.newest.map(|newest| (vm.vm.clone(), newest.number)));
            if vm.last.as_ref().is_some_and(|last| vm.newest.is_some_and(|newest| newest.created > last.time)) {
                // Another machine has made one since: what failed here is over.
                let over = failure(&vm.vm, vm.last.as_ref());
                vm.problems.retain(|problem| Some(problem) != over.as_ref());
            }
            // Where it is not known whether there is a newer one, something worse is said.
            let unknown = vm.newest.is_none() && !vm.problems.is_empty();
            let late = lateness(&vm.vm, vm.newest.map(|newest| newest.age), vm.objective).filter(|_| !unknown);
            vm.late = late.is_some();
            vm.problems.extend(late);
        }
        heads.remember(keys.record_generation(), &seen)?;
        Ok(report)
    }

    /// One that can't be opened, or was erased.
    pub fn closed(
        store: &dyn Store,
        tenant: &TenantName,
        scope: Option<&Scope>,
        state: &Path,
        why: Failure,
    ) -> Result<TenantReport, VaultError> {
        let mut report = TenantReport::new(store, tenant, scope, state)?;
        report.problems.push(Problem::of(&why));
        report.closed = Some(why);
        Ok(report)
    }

    /// Makes it one of so many seconds later, in which nothing has happened.
    pub(crate) fn grow_older(&mut self, seconds: u64) {
        for report in &mut self.vms {
            let Some(newest) = &mut report.newest else { continue };
            newest.age = newest.age.saturating_add(seconds);
            report.late = report.objective.is_some_and(|objective| newest.age > objective);
        }
    }

    /// Only this VM, and what is wrong with it or with the tenant.
    pub fn only(&mut self, vm: &VmName) -> Result<(), VaultError> {
        self.vms.retain(|known| known.vm == *vm);
        match self.vms.is_empty() && self.closed.is_none() {
            true => Err(VaultError::NoVm { vm: vm.clone() }),
            false => Ok(()),
        }
    }
}

impl VmReport {
    fn new(vm: &VmName, points: usize, results: Option<&VmResults>, verified: Option<Verdict>) -> VmReport {
        let last = results.and_then(|results| results.last.clone());
        let mut problems: Vec<_> = failure(vm, last.as_ref()).into_iter().collect();
        if let Some(verdict) = verified.as_ref().filter(|verdict| verdict.damaged > 0) {
            let numbers =
                verdict.hurts.get(vm).into_iter().flatten().map(u32::to_string).collect::<Vec<_>>().join(", ");
            let which = if numbers.is_empty() { String::new() } else { format!(" (restore points {numbers})") };
            let what = format!("{vm} is damaged{which}, as the verification of {} found", verdict.time.to_rfc3339());
            problems.push(Problem::new(Status::Damaged, what));
        }
        let objective = results.and_then(VmResults::objective);
        VmReport {
            vm: vm.clone(),
            points,
            newest: None,
            objective,
            late: false,
            last,
            verified,
            boot: None,
            notes: NoteNames::default(),
            problems,
        }
    }

    /// Looks at its chain, and opens its newest point.
    fn look(&mut self, tenant: &Tenant, heads: &Heads, now: Timestamp) -> Result<(), VaultError> {
        let vm = self.vm.clone();
        let (chain, rollback) = heads.chain(tenant, &vm)?;
        if let Some(e) = rollback {
            self.problems.push(Problem::of(&e.into()));
        }
        if let Some((number, _)) = chain.numbers().find(|(_, state)| *state == State::Missing) {
            let what = format!("{vm}@{number} is missing: it was removed without `reseal forget`");
            self.problems.push(Problem::new(Status::Damaged, what));
        }
        let Some(Point { manifest, .. }) = tenant.newest_point(&vm, &chain)? else { return Ok(()) };
        self.newest = Some(Newest {
            number: manifest.number,
            created: manifest.created,
            age: age(manifest.created, now),
            read: manifest.stats.read,
            stored: manifest.stats.stored,
        });
        let live: BTreeSet<u32> = chain.live().collect();
        self.boot = tenant.last_boot(&manifest, &self.notes, |number| live.contains(&number))?;
        self.problems.extend(self.boot.as_ref().and_then(|booted| boot::problem(&vm, booted)));
        Ok(())
    }
}
