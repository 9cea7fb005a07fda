//! `reseal tenant set`: what a tenant may store, how old its newest restore points may be, which of them stay, and for how long they are
//! locked. Each replaces its record.

use reseal_cli::{CommonArgs, Failure, Status, counted, human_bytes, of_tenant, parse_size};
use reseal_format::lock::{LockMode, LockRule, MAX_LOCK_DAYS};
use reseal_format::names::{TenantName, VmName};
use reseal_format::objectives::Objective;
use reseal_format::retention::{Policy, Retention};
use reseal_kms::Kms;
use reseal_vault::{Holdings, Record, VaultError};
use reseal_writer::span;
use serde_json::json;

use super::human_quota;
use crate::commands::keep::{KEEP_RULES, KeepArgs, options};

/// Arguments of `tenant set`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(
    ["quota", "objective", "no_objective", "lock", "no_lock", "keep_all", "keep_as_tenant"]).args(KEEP_RULES))]
pub(super) struct Args {
    name: String,
    /// Bytes that its packs may have, as 500G or 2T, or none
    #[arg(long, value_name = "SIZE|none", value_parser = Allowance::parse, conflicts_with = "vm")]
    quota: Option<Allowance>,
    /// How old the newest restore point of its VMs may be, as 24h, 90m or 7d; of one VM also `tenant`: as that of the tenant
    #[arg(long, value_name = "TIME", value_parser = parse_objective)]
    objective: Option<Objective>,
    /// They may be as old as they like; of one VM whatever the tenant's objective is
    #[arg(long, conflicts_with = "objective")]
    no_objective: bool,
    /// Has what its restore points lead to be locked in the object store, for at least so many days after each was made; in a bucket that
    /// was made with Object Lock
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_LOCK_DAYS)), conflicts_with = "vm")]
    lock: Option<u16>,
    /// How firm: nobody can shorten a lock; or whom the object store allows to bypass it can
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Firmness::Compliance, requires = "lock")]
    lock_mode: Firmness,
    /// Locks nothing from now on; what is locked stays so
    #[arg(long, conflicts_with_all = ["lock", "vm"])]
    no_lock: bool,
    #[command(flatten)]
    keep: KeepArgs,
    /// Nothing is forgotten by itself; of one VM whatever the tenant's policy is
    #[arg(long, conflicts_with_all = KEEP_RULES)]
    keep_all: bool,
    /// Of one VM: what the tenant's policy keeps
    #[arg(long, requires = "vm", conflicts_with = "keep_all", conflicts_with_all = KEEP_RULES)]
    keep_as_tenant: bool,
    /// Of this VM only
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
}

impl Args {
    /// What the `--keep` options say, if there are any.
    fn retention(&self) -> Option<Retention> {
        let policy = self.keep.policy();
        match (self.keep_all, self.keep_as_tenant) {
            (true, _) => Some(Retention::All),
            (_, true) => Some(Retention::Unsaid),
            _ => (!policy.is_empty()).then_some(Retention::By(policy)),
        }
    }
}

/// What `--lock-mode` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Firmness {
    Compliance,
    Governance,
}

/// What `--quota` says: bytes, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Allowance(Option<u64>);

impl Allowance {
    fn parse(text: &str) -> Result<Allowance, String> {
        match text {
            "none" => Ok(Allowance(None)),
            size => parse_size(size).map(|bytes| Allowance(Some(bytes))),
        }
    }
}

fn parse_objective(text: &str) -> Result<Objective, String> {
    match text {
        "tenant" => Ok(Objective::Unsaid),
        time => span::parse(time).map(|span| Objective::Within(span.as_secs())),
    }
}

pub(super) fn human_objective(seconds: Option<u64>) -> String {
    seconds.map_or_else(|| "none".to_owned(), |seconds| span::show(std::time::Duration::from_secs(seconds)))
}

pub(super) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let usage = |e: &dyn std::error::Error| Failure::of(Status::Usage, e);
    let name = TenantName::new(&args.name).map_err(|e| usage(&e))?;
    let is_objective = args.objective.is_some() || args.no_objective;
    let is_lock = args.lock.is_some() || args.no_lock;
    let retention = args.retention();
    if [args.quota.is_some(), is_objective, is_lock, retention.is_some()]
        .into_iter()
        .filter(|is_asked| *is_asked)
        .count()
        > 1
    {
        let message =
            "one thing at a time: --quota, or --objective or --no-objective, or --lock or --no-lock, or --keep options";
        return Err(Failure::new(Status::Usage, message));
    }
    if args.quota.is_none() && !is_objective && !is_lock && retention.is_none() {
        let message = "a policy that keeps nothing is none: give a --keep option a number, or --keep-all";
        return Err(Failure::new(Status::Usage, message));
    }
    if let Some(Allowance(quota)) = args.quota {
        return set_quota(common, &name, quota);
    }
    if is_lock {
        let mode = match args.lock_mode {
            Firmness::Compliance => LockMode::Compliance,
            Firmness::Governance => LockMode::Governance,
        };
        return set_lock(common, &name, args.lock.map(|days| LockRule { days, mode }));
    }
    let vm = args.vm.as_deref().map(VmName::new).transpose().map_err(|e| usage(&e))?;
    if let Some(retention) = retention {
        return set_retention(common, &name, vm.as_ref(), retention);
    }
    let objective = args.objective.unwrap_or(Objective::Exempt);
    if objective == Objective::Unsaid && vm.is_none() {
        let message = "--objective tenant: that is for one VM, with --vm; the tenant's own goes with --no-objective";
        return Err(Failure::new(Status::Usage, message));
    }
    set_objective(common, &name, vm.as_ref(), objective)
}

/// Replaces the tenant's record by what `next` makes of it, and remembers that.
fn replaced(
    common: &CommonArgs,
    name: &TenantName,
    next: impl FnOnce(&Record, &dyn Kms) -> Result<Record, VaultError>,
) -> Result<Record, Failure> {
    let found = common.find(name)?;
    let kms = common.kms_of(&found.record)?;
    let new = next(&found.record, &*kms).map_err(|e| of_tenant(name, e))?;
    found.heads.remember(new.generation(), &[])?;
    Ok(new)
}

fn set_quota(common: &CommonArgs, name: &TenantName, quota: Option<u64>) -> Result<(), Failure> {
    let new = replaced(common, name, |record, kms| record.set_quota(kms, quota))?;
    let output = common.output();
    let used = Holdings::of(&*common.vault()?.0, name)?.pack_bytes;
    output.json(&json!({
        "tenant": name, "quota": quota, "used": used, "generation": new.generation(), "objects": [new.key()],
    }));
    output.say(format!("quota       {}, used {}", human_quota(quota), human_bytes(used)));
    output.say(format!("record      generation {}", new.generation()));
    if quota.is_some_and(|quota| quota < used) {
        output.warn(format!(
            "tenant {name} has more already ({used} bytes): what it has stays readable, but no backup of it begins"
        ));
    }
    Ok(())
}

fn set_objective(
    common: &CommonArgs,
    name: &TenantName,
    vm: Option<&VmName>,
    objective: Objective,
) -> Result<(), Failure> {
    let new = replaced(common, name, |record, kms| record.set_objective(kms, vm, objective))?;
    let output = common.output();
    let (seconds, said) = match objective {
        Objective::Within(seconds) => (Some(seconds), human_objective(Some(seconds))),
        Objective::Exempt => (None, human_objective(None)),
        Objective::Unsaid => (None, "as the tenant's".to_owned()),
    };
    output.json(&json!({
        "tenant": name, "vm": vm, "objective": seconds, "generation": new.generation(), "objects": [new.key()],
    }));
    let of = vm.map(|vm| format!(" for {vm}")).unwrap_or_default();
    output.say(format!("objective   {said}{of}"));
    output.say(format!("record      generation {}", new.generation()));
    Ok(())
}

/// How what is written is locked, for people.
pub(super) fn human_lock(rule: Option<LockRule>) -> String {
    rule.map_or_else(|| "none".to_owned(), |rule| format!("{}, {}", counted(rule.days, "day"), rule.mode.name()))
}

fn set_lock(common: &CommonArgs, name: &TenantName, rule: Option<LockRule>) -> Result<(), Failure> {
    let new = replaced(common, name, |record, kms| record.set_lock(kms, rule))?;
    let output = common.output();
    output.json(&json!({ "tenant": name, "lock": rule, "generation": new.generation(), "objects": [new.key()] }));
    output.say(format!("lock        {}", human_lock(rule)));
    output.say(format!("record      generation {}; from the next restore points on", new.generation()));
    Ok(())
}

/// What is kept, for people.
pub(super) fn human_retention(policy: Option<&Policy>) -> String {
    policy.map_or_else(|| "all: nothing is forgotten by itself".to_owned(), options)
}

fn set_retention(
    common: &CommonArgs,
    name: &TenantName,
    vm: Option<&VmName>,
    retention: Retention,
) -> Result<(), Failure> {
    let new = replaced(common, name, |record, kms| record.set_retention(kms, vm, retention.clone()))?;
    let output = common.output();
    let (policy, said) = match retention {
        Retention::By(policy) => (json!(policy), human_retention(Some(&policy))),
        Retention::All => (json!(null), human_retention(None)),
        Retention::Unsaid => (json!("tenant"), "as the tenant's".to_owned()),
    };
    output.json(&json!({
        "tenant": name, "vm": vm, "retention": policy, "generation": new.generation(), "objects": [new.key()],
    }));
    let of = vm.map(|vm| format!(" for {vm}")).unwrap_or_default();
    output.say(format!("keeps       {said}{of}"));
    output.say(format!("record      generation {}; `reseal prune` applies it", new.generation()));
    Ok(())
}
