//! `reseal rekey`: other keys for the same data.

use std::path::PathBuf;
use std::time::Instant;

use reseal_cli::{CommonArgs, Detach, Failure, Found, Side, Status, human_duration, of_tenant, parse_size, split};
use reseal_format::names::TenantName;
use reseal_kms::Kms;
use reseal_kms::config::KEYRING;
use reseal_vault::Record;
use serde_json::json;

use super::kit::{KitArgs, NewKit, keyring_keys};
use super::new_tenant::{open_or_make_keyring, refuse_inside};
use super::rekey_data;

/// Arguments of `rekey`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["kek", "data", "to_kms"]))]
pub(crate) struct Args {
    /// Makes new material for the tenant's key in its KMS, wraps the master anew, and retires the old. No data moves
    #[arg(long)]
    kek: bool,
    /// Makes a new master and a new data key, seals everything again under them, and destroys the old ones. Mounts and
    /// backups go on. May be interrupted at any time; the next call goes on
    #[arg(long)]
    data: bool,
    /// Seals at most so many bytes a second again, as 50M or 1G
    #[arg(long, value_name = "BYTES", value_parser = parse_size, requires = "data")]
    pub(crate) limit_rate: Option<u64>,
    /// Returns when the new keys are in use, and goes on in the background
    #[arg(long, requires = "data")]
    pub(crate) background: bool,
    /// Where a rekey in the background says how it ended, and what went wrong
    #[arg(long, value_name = "FILE", requires = "background")]
    pub(crate) log: Option<PathBuf>,
    /// Wraps the master under a new key in another KMS of the configuration, or in the keyring. No data moves
    #[arg(long, value_name = "NAME|keyring")]
    to_kms: Option<String>,
    /// Destroys the key in the KMS that the tenant leaves
    #[arg(long, requires = "to_kms")]
    destroy_key: bool,
    #[command(flatten)]
    pub(crate) kit: KitArgs,
    /// Begins without a new recovery kit, though those from before open nothing then
    #[arg(long, requires = "data", conflicts_with = "recovery")]
    pub(crate) no_recovery: bool,
}

/// With `--background`, the process that goes on is split off before anything else is done.
pub(crate) fn split_off(args: &Args) -> Result<Side, Failure> {
    // SAFETY: `main` calls this before anything starts a thread.
    unsafe { split(args.log.as_deref()) }
        .map_err(|e| Failure::new(Status::Failed, format!("can't go to the background: {e}")))
}

pub(crate) fn run(common: &CommonArgs, args: &Args, detach: Option<Detach>) -> Result<(), Failure> {
    let found = common.find(&common.tenant()?)?;
    match &args.to_kms {
        Some(target) => move_to(common, &found, target, args),
        None if args.data => rekey_data::run(common, &found, args, detach),
        None => rotate(common, &found, args),
    }
}

/// Writes the kit before the old key goes. Kits from before open the tenant too, for the master stays; this one also has the
/// key of the keyring.
fn write_new_kit(
    common: &CommonArgs,
    found: &Found,
    kit: Option<&NewKit>,
    record: &Record,
    kms: &dyn Kms,
) -> Result<(), Failure> {
    let Some(kit) = kit else { return Ok(()) };
    let name = record.name();
    let write = || {
        let master = record.master(kms).map_err(|e| of_tenant(name, e))?;
        let keys = keyring_keys(common, record.kms())?;
        kit.write(&found.repo, name, &record.scope(), kms.kind(), &master, keys)
    };
    write().map_err(|failure| {
        let hint = "the record is wrapped under the new key already: run this again";
        Failure::new(failure.status, format!("{}; {hint}", failure.message))
    })
}

fn rotate(common: &CommonArgs, found: &Found, args: &Args) -> Result<(), Failure> {
    let began = Instant::now();
    let (record, name) = (&found.record, found.record.name());
    let kms = common.kms_of(record)?;
    let kit = NewKit::wanted(common, &found.repo, &args.kit)?;
    let of = |e| of_tenant(name, e);
    let rewrapped = record.rotate(&*kms).map_err(of)?;
    let (new, old) = (&rewrapped.record, &rewrapped.old);
    found.heads.remember(new.generation(), &[])?;
    write_new_kit(common, found, kit.as_ref(), new, &*kms)?;
    new.retire(old, &*kms).map_err(|e| not_retired(name, old.key.as_str(), of_tenant(name, e)))?;

    let output = common.output();
    let key = new.kms().key.as_str();
    output.json(&json!({
        "tenant": name, "kind": new.kms().kind, "old_key": old.key, "key": key, "generation": new.generation(),
        "objects": [new.key()], "recovery_kit": args.kit.recovery, "retired_before": rewrapped.finished,
        "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }));
    output.say(match old.key == key {
        true => format!("key         {key}: a new version wraps the master; older ones don't open it any more"),
        false => format!("key         {key}, in the place of {}, which is destroyed", old.key),
    });
    output.say(format!("record      generation {}", new.generation()));
    output.say(format!("replaced    1 object, {}, in {}", new.key(), human_duration(began.elapsed())));
    if new.kms().kind == KEYRING && args.kit.recovery.is_none() {
        output.say("kits        open the tenant still, but those of version 1, which hold the old key only: `reseal key export`");
    }
    Ok(())
}

fn not_retired(tenant: &TenantName, old: &str, failure: Failure) -> Failure {
    let message = format!(
        "{}; the master of tenant {tenant} is wrapped anew already, but the old key {old} is not retired: run `reseal rekey \
         --kek` again",
        failure.message
    );
    Failure::new(failure.status, message)
}

fn move_to(common: &CommonArgs, found: &Found, target: &str, args: &Args) -> Result<(), Failure> {
    let began = Instant::now();
    let (record, name) = (&found.record, found.record.name());
    let config = common.kms_config()?;
    let from = config.kms_of(name.as_str()).to_owned();
    if from == target {
        return Err(Failure::new(Status::Usage, format!("tenant {name} uses the KMS {target} already")));
    }
    record.check_live()?;
    let kit = NewKit::wanted(common, &found.repo, &args.kit)?;
    let to: Box<dyn Kms> = match target {
        KEYRING => {
            let path = common.paths()?.keyring;
            refuse_inside(&found.repo, &path, "the keyring", "RESEAL_KEYRING")?;
            Box::new(open_or_make_keyring(common, &path, false)?)
        }
        _ => config.open(target)?,
    };
    let entry = entry(name, target);
    let finish = format!("[tenants] in {} to have:\n\n    {entry}\n", config.path().display());
    // An earlier call may have been interrupted, or the configuration not been changed since.
    if record.kms().kind == to.kind() && record.unlock_keys(&*to).is_ok() {
        common.output().json(&json!({
            "tenant": name, "kms": target, "kind": to.kind(), "key": record.kms().key, "generation": record.generation(),
            "objects": [], "config": entry,
        }));
        write_new_kit(common, found, kit.as_ref(), record, &*to)?;
        common.output().say(format!("tenant {name} was moved to the KMS {target} already. Change {finish}"));
        return match args.destroy_key {
            // No record says any more which key that was.
            true => Err(Failure::new(
                Status::Failed,
                format!("the key that tenant {name} had in the KMS {from} is not destroyed: destroy it there yourself"),
            )),
            false => Ok(()),
        };
    }
    let kms = common.kms_of(record)?;
    let of = |e| of_tenant(name, e);
    let rewrapped = record.move_to(&*kms, &*to).map_err(of)?;
    let (new, old) = (&rewrapped.record, &rewrapped.old);
    found.heads.remember(new.generation(), &[])?;
    write_new_kit(common, found, kit.as_ref(), new, &*to)?;
    let destroyed = args.destroy_key.then(|| kms.destroy(&old.key));
    let output = common.output();
    output.json(&json!({
        "tenant": name, "kms": target, "kind": new.kms().kind, "key": new.kms().key, "generation": new.generation(),
        "objects": [new.key()], "config": entry, "old_kms": from, "old_kind": old.kind, "old_key": old.key,
        "old_key_destroyed": matches!(destroyed, Some(Ok(()))), "recovery_kit": args.kit.recovery,
        "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }));
    output.say(format!("key         {} in the KMS {target} ({})", new.kms().key, new.kms().kind));
    output.say(format!("record      generation {}", new.generation()));
    output.say(format!("replaced    1 object, {}, in {}", new.key(), human_duration(began.elapsed())));
    output.say(format!("\nNothing opens until you change {finish}"));
    let there = format!("the key {} in the KMS {from}", old.key);
    match destroyed {
        Some(Ok(())) => output.say(format!("destroyed {there}")),
        Some(Err(e)) => {
            let failure = of(e.into());
            let message = format!("{}; the tenant is moved, destroy {there} yourself", failure.message);
            return Err(Failure::new(failure.status, message));
        }
        None => {
            output.say(format!("{there} opens older copies of the record still: destroy it when nothing needs them"))
        }
    }
    Ok(())
}

/// The line of the configuration that gives a tenant this KMS.
pub(crate) fn entry(tenant: &TenantName, kms: &str) -> String {
    let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let quoted = || serde_json::to_string(tenant).unwrap_or_default();
    let key = if tenant.as_str().chars().all(is_bare) { tenant.to_string() } else { quoted() };
    format!("{key} = \"{kms}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_to_write_is_toml() {
        let line = |name: &str| entry(&TenantName::new(name).unwrap(), "hsm");
        assert_eq!(line("acme"), "acme = \"hsm\"");
        assert_eq!(line("acme & co"), "\"acme & co\" = \"hsm\"");
        assert_eq!(line("a\"b\\"), r#""a\"b\\" = "hsm""#);
    }
}
