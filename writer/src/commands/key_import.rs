//! `reseal key import`: a tenant has a key again, from its recovery kit.
//!
//! A key of a keyring that still opens the tenant's record is brought into the keyring, and the vault stays as it is. Where
//! there is none, for the KMS is gone or the key was rotated, the master in the kit is wrapped under a new key, and the record
//! replaced.

use std::path::PathBuf;

use reseal_cli::{CommonArgs, Failure, Found, Status, of_kit, of_tenant};
use reseal_format::names::TenantName;
use reseal_kms::Kms;
use reseal_kms::config::KEYRING;
use reseal_kms::kit::KitContents;
use reseal_vault::{Record, VaultError};
use serde_json::json;

use super::new_tenant::{open_or_make_keyring, refuse_inside};
use super::rekey::entry;

/// Arguments of `key import`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The recovery kit, or a sheet with one that was typed or scanned in again
    file: PathBuf,
    /// The KMS of the configuration, or the keyring, that gets a new key if the tenant's is lost [default: the one that the
    /// configuration gives the tenant]
    #[arg(long, value_name = "NAME|keyring")]
    to_kms: Option<String>,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    common.refuse_recovery_kit()?;
    let kit = common.read_kit(&args.file)?;
    if common.repo.as_deref().is_none_or(str::is_empty) {
        if kit.keys.is_empty() || args.to_kms.is_some() {
            let message = format!(
                "{} holds no key of a keyring to be brought back: to wrap the tenant's master under a new key, give the vault \
                 with --repo (it was at {} when the kit was made); to read only, give --recovery-kit to other commands",
                args.file.display(),
                kit.repo
            );
            return Err(Failure::new(Status::Usage, message));
        }
        return bring_keys(common, &kit);
    }
    let name = TenantName::new(&kit.tenant).map_err(|e| Failure::of(Status::Damaged, &e))?;
    let (store, repo) = common.vault()?;
    if let Err(VaultError::NoTenant { .. }) = Record::read(store, &repo, &name) {
        // `tenant add`, the remedy for a name that was typed wrong, would be none here.
        let message = format!(
            "{} is of tenant {name} in the vault {}, which was at {} when it was made, and {repo} has no such tenant: correct \
             --repo",
            args.file.display(),
            kit.vault_id,
            kit.repo
        );
        return Err(Failure::new(Status::Failed, message));
    }
    let found = common.find(&name)?;
    let of = |e| of_kit(&args.file, e);
    found.record.check_kit(&kit).map_err(of)?;
    let to_keyring = args.to_kms.as_deref().is_none_or(|kms| kms == KEYRING);
    if to_keyring && found.record.is_opened_by_kek_of(&kit, KEYRING).map_err(of)? {
        bring_keys(common, &kit)?;
        return say_entry(common, &name, KEYRING);
    }
    wrap_anew(common, &found, &kit, args)
}

/// Brings the kit's keys into the keyring.
fn bring_keys(common: &CommonArgs, kit: &KitContents) -> Result<(), Failure> {
    let path = common.paths()?.keyring;
    if let Some(repo) = &common.repo {
        refuse_inside(repo, &path, "the keyring", "RESEAL_KEYRING")?;
    }
    let keyring = open_or_make_keyring(common, &path, false)?;
    let imported = keyring.import(&kit.keys)?;
    let output = common.output();
    output.json(&json!({
        "keyring": path, "added": imported.added, "already": imported.already, "tenant": kit.tenant, "repo": kit.repo,
        "objects": [],
    }));
    output.say(format!(
        "keyring {}: {} keys added, {} were there",
        path.display(),
        imported.added.len(),
        imported.already.len()
    ));
    output.say(format!("\nNext (the vault was at {} when the kit was made):", kit.repo));
    output.say(format!("  export RESEAL_REPO=VAULT RESEAL_TENANT={}\n  reseal list", kit.tenant));
    Ok(())
}

/// Wraps the kit's master under a new key.
fn wrap_anew(common: &CommonArgs, found: &Found, kit: &KitContents, args: &Args) -> Result<(), Failure> {
    let (record, name) = (&found.record, found.record.name());
    // Before a keyring is made or a KMS is asked.
    record.keys_with(kit).map_err(|e| of_kit(&args.file, e))?;
    let config = common.kms_config()?;
    let given = config.kms_of(name.as_str());
    let target = args.to_kms.as_deref().unwrap_or(given);
    let configured = if target == given { config.for_tenant(name.as_str())? } else { None };
    let path = common.paths()?.keyring;
    let (to, keyring): (Box<dyn Kms>, _) = match configured {
        Some(kms) => (kms, None),
        None if target == KEYRING => {
            refuse_inside(&found.repo, &path, "the keyring", "RESEAL_KEYRING")?;
            (Box::new(open_or_make_keyring(common, &path, false)?), Some(&path))
        }
        None => (config.open(target)?, None),
    };
    let output = common.output();
    let document = |generation, key: &str, objects: &[String]| {
        json!({
            "keyring": keyring, "added": [], "already": [], "tenant": name, "repo": kit.repo, "kms": target,
            "kind": to.kind(), "key": key, "generation": generation, "objects": objects, "config": entry(name, target),
            "old_kind": record.kms().kind, "old_key": record.kms().key,
        })
    };
    // An earlier call may have been interrupted, or nothing be lost at all.
    if record.kms().kind == to.kind() && record.unlock_keys(&*to).is_ok() {
        output.json(&document(record.generation(), &record.kms().key, &[]));
        output.say(format!("the KMS {target} opens tenant {name}: nothing was changed"));
        return say_entry(common, name, target);
    }
    let rewrapped = record.adopt(kit, &*to).map_err(|e| {
        let is_kms = matches!(e, VaultError::Kms(_));
        let failure = of_tenant(name, e);
        let hint =
            "; nothing was changed. If that KMS is gone for good, name another with --to-kms, or --to-kms keyring";
        Failure::new(failure.status, format!("{}{}", failure.message, if is_kms { hint } else { "" }))
    })?;
    let (new, old) = (&rewrapped.record, &rewrapped.old);
    found.heads.remember(new.generation(), &[])?;
    output.json(&document(new.generation(), &new.kms().key, &[new.key()]));
    output.say(format!("key         {} in the KMS {target} ({})", new.kms().key, new.kms().kind));
    output.say(format!("record      generation {}", new.generation()));
    output.say(format!("replaced    1 object, {}", new.key()));
    output.say("kits        open the tenant as before");
    output.say(format!(
        "\nThe key {} ({}) opens older copies of the record still, should it come back: destroy it then.",
        old.key, old.kind
    ));
    output.say("Every other machine that opens this tenant needs the new key: its KMS configuration, or the keyring.");
    say_entry(common, name, target)
}

/// Says what to change where the configuration gives the tenant another KMS.
fn say_entry(common: &CommonArgs, name: &TenantName, target: &str) -> Result<(), Failure> {
    let config = common.kms_config()?;
    if config.kms_of(name.as_str()) != target {
        common.output().say(format!(
            "\nNothing opens until you change [tenants] in {} to have:\n\n    {}\n",
            config.path().display(),
            entry(name, target)
        ));
    }
    Ok(())
}
