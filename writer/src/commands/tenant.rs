//! `reseal tenant`: the customers of a vault.

mod set;

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_cli::{CommonArgs, Failure, Found, Status, counted, human_bytes, of_tenant, parse_size};
use reseal_format::names::TenantName;
use reseal_site::certificate::now;
use reseal_store::Store;
use reseal_vault::heads::tenant_folder;
use reseal_vault::{Count, Epochs, Held, Holdings, Record, VaultError, VmHoldings, holders, tenants};
use serde_json::{Value, json};

use super::clients::{self, EnrollArgs, ServerArgs};
use super::init::report_tenant;
use super::kit::KitArgs;
use super::new_tenant::{EscrowArgs, NewTenant};

/// How long an erasure waits for those who have the keys: they look every three seconds, and a mount takes a moment to end.
const HOLDERS_PATIENCE: Duration = Duration::from_secs(15);

/// Longest line that is read as a confirmation.
const MAX_LINE: u64 = 1024;

/// Arguments of `tenant`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Makes a tenant in the vault, with a key of its own in the KMS that the configuration gives it
    Add {
        /// Its name, which the storage can see
        name: String,
        #[command(flatten)]
        escrow: EscrowArgs,
        /// Bytes that its packs may have, as 500G or 2T [default: no limit]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        quota: Option<u64>,
    },
    /// Lists the tenants; no KMS is asked
    List {
        /// Shows the quotas too, for which the KMS of every tenant is asked
        #[arg(long)]
        quotas: bool,
    },
    /// Shows a tenant's key, epochs, VMs, sizes and quota
    Show {
        /// Its name [default: the one of --tenant]
        name: Option<String>,
    },
    /// Changes what a tenant may store, how old its newest restore points may be, which of them stay, or how long they are locked
    Set(set::Args),
    /// Removes a tenant that has no restore points, or that was erased
    Remove {
        name: String,
        /// Destroys its key in the KMS as well
        #[arg(long)]
        destroy_key: bool,
    },
    /// Destroys a tenant's key in its KMS for good: nobody can read its restore points any more
    Erase {
        name: String,
        /// The tenant's name once more, instead of typing it when asked
        #[arg(long, value_name = "NAME")]
        yes: Option<String>,
        /// Goes on where the KMS has no such key, because it was destroyed elsewhere
        #[arg(long)]
        key_is_gone: bool,
    },
    /// Makes an enrolment file with which a site may send to a tenant; no KMS is asked
    Enroll {
        /// The tenant
        #[arg(value_name = "TENANT")]
        of: String,
        #[command(flatten)]
        enroll: Box<EnrollArgs>,
    },
    /// Lists the clients that may come
    Clients {
        /// Those of one tenant only
        #[arg(value_name = "TENANT")]
        of: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Takes a client's certificates back; its connections end
    Revoke {
        /// The tenant
        #[arg(value_name = "TENANT")]
        of: String,
        client: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let named = |name: &str| TenantName::new(name).map_err(|e| Failure::of(Status::Usage, &e));
    match args.action {
        Action::Add { name, escrow, quota } => add(common, named(&name)?, &escrow.kit, quota),
        Action::List { quotas } => list(common, quotas),
        Action::Show { name } => show(common, name.as_deref().map_or_else(|| common.tenant(), named)?),
        Action::Set(args) => set::run(common, &args),
        Action::Remove { name, destroy_key } => remove(common, &named(&name)?, destroy_key),
        Action::Erase { name, yes, key_is_gone } => erase(common, &named(&name)?, yes.as_deref(), key_is_gone),
        Action::Enroll { of, enroll } => clients::enroll(common, named(&of)?, *enroll),
        Action::Clients { of, server } => {
            clients::list(common, of.as_deref().map(named).transpose()?.as_ref(), &server)
        }
        Action::Revoke { of, client, server } => clients::take_away(common, &named(&of)?, &client, &server),
    }
}

fn add(common: &CommonArgs, name: TenantName, kit: &KitArgs, quota: Option<u64>) -> Result<(), Failure> {
    let (store, repo) = common.vault()?;
    let mut tenant = NewTenant::prepare(common, &repo, name.clone(), kit, false)?;
    tenant.quota = quota;
    let made = tenant.make(&*store, &repo)?;
    common.output().json(&json!({
        "tenant": name, "kms": made.kms, "kind": made.kind, "key": made.key, "keyring": made.keyring,
        "recovery_kit": kit.recovery, "quota": quota,
    }));
    report_tenant(common, name.as_str(), &made, kit.recovery.as_deref());
    Ok(())
}

/// What can be said of a tenant without its keys.
fn summary(record: &Record, holdings: &Holdings) -> Value {
    json!({
        "tenant": record.name(),
        "tenant_id": record.scope().tenant,
        "kind": record.kms().kind,
        "key": record.kms().key,
        "generation": record.generation(),
        "erased": record.erased().map(|when| when.to_rfc3339()),
        "vms": holdings.vms.len(),
        "points": holdings.points(),
        "packs": holdings.packs,
        "used": holdings.pack_bytes,
        "bytes": holdings.bytes,
    })
}

fn list(common: &CommonArgs, quotas: bool) -> Result<(), Failure> {
    let output = common.output();
    let (store, repo) = common.vault()?;
    let config = common.kms_config()?;
    let mut failed: Option<Failure> = None;
    let mut shown = 0;
    for name in tenants(&*store)? {
        let read =
            Record::read(store.clone(), &repo, &name).and_then(|record| Ok((Holdings::of(&*store, &name)?, record)));
        let (holdings, record) = match read {
            Ok(read) => read,
            // A folder in which nothing is any more.
            Err(VaultError::NoTenant { .. }) => continue,
            // Each is named; the last one ends the command.
            Err(e) => {
                if let Some(before) = failed.replace(e.into()) {
                    output.warn(before.message);
                }
                continue;
            }
        };
        if shown == 0 {
            let header = ["TENANT", "KMS", "KEY", "VMS", "POINTS", "SIZE", "USED"];
            output.say(row(header.map(str::to_owned), quotas.then_some("QUOTA")));
        }
        shown += 1;
        let kms = config.kms_of(name.as_str());
        let mut document = summary(&record, &holdings);
        document["kms"] = json!(kms);
        let quota = match quotas && record.erased().is_none() {
            true => match common.find(&name).and_then(|found| quota_of(common, &found)) {
                Ok(quota) => {
                    document["quota"] = json!(quota);
                    human_quota(quota)
                }
                Err(e) => {
                    if let Some(before) = failed.replace(e) {
                        output.warn(before.message);
                    }
                    "?".to_owned()
                }
            },
            false => String::new(),
        };
        output.json(&document);
        let key = match record.erased() {
            Some(when) => format!("erased {when}"),
            None => record.kms().key.clone(),
        };
        let (vms, points) = (holdings.vms.len().to_string(), holdings.points().to_string());
        let (size, used) = (human_bytes(holdings.bytes), human_bytes(holdings.pack_bytes));
        output.say(row(
            [name.to_string(), kms.to_owned(), key, vms, points, size, used],
            quotas.then_some(quota.as_str()),
        ));
    }
    if shown == 0 && failed.is_none() {
        output.say("no tenants yet; make one with `reseal tenant add NAME`");
    }
    failed.map_or(Ok(()), Err)
}

fn row([tenant, kms, key, vms, points, size, used]: [String; 7], quota: Option<&str>) -> String {
    let row = format!("{tenant:<24} {kms:<16} {key:<32} {vms:>6} {points:>7} {size:>10} {used:>10}");
    match quota {
        Some(quota) => format!("{row} {quota:>10}"),
        None => row,
    }
}

/// The quota of a tenant whose KMS is to be asked.
fn quota_of(common: &CommonArgs, found: &Found) -> Result<Option<u64>, Failure> {
    let kms = common.kms_of(&found.record)?;
    let keys = found.record.unlock_keys(&*kms).map_err(|e| of_tenant(found.record.name(), e))?;
    Ok(keys.quota())
}

pub(super) fn human_quota(quota: Option<u64>) -> String {
    quota.map_or_else(|| "none".to_owned(), human_bytes)
}

fn show(common: &CommonArgs, name: TenantName) -> Result<(), Failure> {
    let output = common.output();
    let found = common.find(&name)?;
    let tenant = common.unlock(&found.record)?;
    let keys = tenant.keys();
    found.heads.remember(found.record.generation(), &[])?;
    let holdings = Holdings::of(&*common.vault()?.0, &name)?;
    let config = common.kms_config()?;
    let epochs: Vec<u32> = keys.epochs().collect();
    let mut document = summary(&found.record, &holdings);
    document["kms"] = json!(config.kms_of(name.as_str()));
    document["vault_id"] = json!(found.record.scope().vault);
    document["epoch"] = json!(keys.current_epoch());
    document["epochs"] = json!(epochs);
    // More than one epoch: a change of the data keys was begun, and is not done.
    let rekey = match epochs.len() {
        0 | 1 => None,
        _ => Some(Epochs::of(&tenant)?.counts()),
    };
    if let Some(counts) = &rekey {
        let count =
            |(epoch, count): (&u32, &Count)| json!({ "epoch": epoch, "objects": count.objects, "bytes": count.bytes });
        document["rekey"] = counts.iter().map(count).collect();
    }
    document["quota"] = json!(keys.quota());
    document["objective"] = json!(keys.objectives().tenant);
    document["vm_objectives"] = json!(keys.objectives().vms);
    document["lock"] = json!(keys.lock());
    document["retention"] = json!(keys.policies().tenant);
    document["vm_retention"] = json!(keys.policies().vms);
    let vm = |vm: &VmHoldings| json!({ "vm": vm.name, "points": vm.points, "forgotten": vm.forgotten });
    document["vm_list"] = holdings.vms.iter().map(vm).collect();
    output.json(&document);
    output.say(format!("tenant      {name}"));
    output.say(format!("id          {}", found.record.scope().tenant));
    let reference = found.record.kms();
    output.say(format!("KMS         {} ({}), key {}", config.kms_of(name.as_str()), reference.kind, reference.key));
    output.say(format!("record      generation {}", found.record.generation()));
    let all = epochs.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    output.say(format!("DEK epochs  {all}; new objects under {}", keys.current_epoch()));
    if let Some(counts) = &rekey {
        output.say(format!(
            "rekey       {}; `reseal rekey --data` goes on with it",
            how_far(counts, keys.current_epoch())
        ));
    }
    for vm in &holdings.vms {
        output.say(format!("VM          {}: {}, {} forgotten", vm.name, counted(vm.points, "point"), vm.forgotten));
    }
    output.say(format!("points      {}", holdings.points()));
    output.say(format!("stored      {} in {}", human_bytes(holdings.bytes), counted(holdings.packs, "pack")));
    output.say(format!("quota       {}, used {}", human_quota(keys.quota()), human_bytes(holdings.pack_bytes)));
    output.say(format!("objective   {}", set::human_objective(keys.objectives().tenant)));
    for (vm, objective) in &keys.objectives().vms {
        output.say(format!("objective   {} for {vm}", set::human_objective(*objective)));
    }
    output.say(format!("lock        {}", set::human_lock(keys.lock())));
    output.say(format!("keeps       {}", set::human_retention(keys.policies().tenant.as_ref())));
    for (vm, policy) in &keys.policies().vms {
        output.say(format!("keeps       {} for {vm}", set::human_retention(policy.as_ref())));
    }
    Ok(())
}

/// How much of a tenant is sealed under the newest DEK.
fn how_far(counts: &BTreeMap<u32, Count>, newest: u32) -> String {
    let all: u64 = counts.values().map(|count| count.bytes).sum();
    let done = counts.get(&newest).copied().unwrap_or_default();
    let left = counts.iter().filter(|(epoch, _)| **epoch != newest).map(|(_, count)| count.objects).sum::<u64>();
    // Per cent of bytes: what takes the time.
    let percent = (u128::from(done.bytes) * 100).checked_div(all.into()).unwrap_or(100);
    let (done, all, left) = (human_bytes(done.bytes), human_bytes(all), counted(left, "object"));
    format!("{percent} % done ({done} of {all}), {left} left under older keys")
}

fn remove(common: &CommonArgs, name: &TenantName, destroy_key: bool) -> Result<(), Failure> {
    let found = common.find(name)?;
    let (record, state) = (&found.record, tenant_folder(&found.paths.state, &found.record.scope()));
    let key = record.kms().key.clone();
    let kms = match record.erased() {
        Some(_) => None,
        None => {
            let kms = common.kms_of(record)?;
            // It must be this tenant's key, not one whose name somebody wrote there.
            record.unlock_keys(&*kms).map_err(|e| of_tenant(name, e))?;
            Some(kms)
        }
    };
    let objects = record.remove()?;
    let _ = std::fs::remove_dir_all(state);
    let destroyed = match kms.filter(|_| destroy_key) {
        Some(kms) => {
            kms.destroy(&key).map_err(|e| {
                let failure = of_tenant(name, e.into());
                let hint = format!("the tenant is removed; destroy its key {key} in the KMS yourself");
                Failure::new(failure.status, format!("{}; {hint}", failure.message))
            })?;
            true
        }
        None => false,
    };
    let output = common.output();
    output.json(&json!({ "tenant": name, "objects": objects, "key": key, "key_destroyed": destroyed }));
    output.say(format!("removed tenant {name}: {}", counted(objects, "object")));
    if record.erased().is_none() {
        output.say(match destroyed {
            true => format!("destroyed its key {key}"),
            false => format!("its key {key} is still in the KMS; nothing needs it now"),
        });
    }
    Ok(())
}

fn erase(common: &CommonArgs, name: &TenantName, yes: Option<&str>, key_is_gone: bool) -> Result<(), Failure> {
    let output = common.output();
    let found = common.find(name)?;
    let kms = common.kms_of(&found.record)?;
    let store: Arc<dyn Store> = common.vault()?.0;
    confirm(name, &Holdings::of(&*store, name)?, yes)?;
    let erased = found.record.erase(&*kms, &found.heads, now(), key_is_gone).map_err(|e| of_tenant(name, e))?;
    // Keyed ids only, which nothing can use any more. What was seen stays, so that an old record is noticed.
    let _ = std::fs::remove_dir_all(tenant_folder(&found.paths.state, &found.record.scope()).join("lookup"));
    let left = wait_for_holders(&*store, name).map_err(|failure| {
        let message = format!("tenant {name} is erased, but who has its keys can't be seen: {}", failure.message);
        Failure::new(failure.status, message)
    })?;
    let shown: Vec<_> = left.iter().map(ToString::to_string).collect();
    output.json(&json!({
        "tenant": name, "keys_destroyed": erased.keys, "generation": erased.generation, "still_have_keys": shown,
    }));
    output.say(format!("erased tenant {name}: the KMS has shown that it does not open its keys any more"));
    for key in &erased.keys {
        output.say(format!("destroyed key {key}"));
    }
    if !left.is_empty() {
        return Err(Failure::new(
            Status::Failed,
            format!(
                "tenant {name} is erased, but not all processes that have its keys have ended: end them yourself: {}",
                shown.join("; ")
            ),
        ));
    }
    output.say("no mount, restore, verification, backup or rekey has its keys any more");
    output.say(
        "\nCopies open it still: recovery kits with copies of the vault, backups of the KMS or of the keyring. Its objects stay \
         until `reseal tenant remove`.",
    );
    Ok(())
}

/// Waits until those who have a tenant's keys have seen that it is erased; who has not.
fn wait_for_holders(store: &dyn Store, tenant: &TenantName) -> Result<Vec<Held>, Failure> {
    let end = Instant::now() + HOLDERS_PATIENCE;
    loop {
        let held = holders(store, tenant)?;
        if held.is_empty() || Instant::now() > end {
            return Ok(held);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The name has to be typed: there is no way back.
fn confirm(name: &TenantName, holdings: &Holdings, yes: Option<&str>) -> Result<(), Failure> {
    let usage = |what: String| Failure::new(Status::Usage, what);
    let typed = match yes {
        Some(yes) => yes.to_owned(),
        None if std::io::stdin().is_terminal() => {
            let points = holdings.points();
            let mut stderr = std::io::stderr().lock();
            let _ = write!(
                stderr,
                "This destroys the keys of tenant {name}, so that its restore points ({points}) can never be read again.\n\
                 Type the tenant's name to go on: "
            );
            let _ = stderr.flush();
            let mut line = String::new();
            let read = std::io::stdin().lock().take(MAX_LINE).read_line(&mut line);
            read.map_err(|e| usage(format!("can't read from the terminal: {e}; nothing was erased")))?;
            line.trim_end_matches(['\n', '\r']).to_owned()
        }
        None => return Err(usage(format!("to erase tenant {name} for good, repeat with --yes and its name"))),
    };
    match typed == name.as_str() {
        true => Ok(()),
        false => Err(usage(format!("that is not the name of tenant {name}; nothing was erased"))),
    }
}
