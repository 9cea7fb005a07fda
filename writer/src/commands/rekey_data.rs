//! `reseal rekey --data`: a new master and a new data key, under which everything is sealed again.

use std::sync::Arc;
use std::time::Instant;

use reseal_cli::{
    CommonArgs, Detach, Failure, Found, Output, Progress, Status, counted, end_when_erased, human_bytes,
    human_duration, of_tenant,
};
use reseal_kms::Kms;
use reseal_kms::config::KEYRING;
use reseal_vault::{Holder, Record, Tenant, VaultError, random_master};
use reseal_writer::rekey::{Rekey, Resealed};
use reseal_writer::throttle::Throttle;
use serde_json::json;

use super::cores;
use super::kit::{NewKit, keyring_keys};
use super::rekey::Args;

/// How often the end is tried where the record is replaced by others at the same time.
const TRIES: u32 = 5;

pub(crate) fn run(common: &CommonArgs, found: &Found, args: &Args, detach: Option<Detach>) -> Result<(), Failure> {
    let began = Instant::now();
    let output = common.output();
    let name = found.record.name();
    let kms = common.kms_of(&found.record)?;
    let of = |e| of_tenant(name, e);
    let before = found.record.unlock(kms.clone()).map_err(of)?;
    // One at a time: of two, one could destroy the key that the other still seals under.
    let alone = before.rekey_lease(&Holder::this_process("rekey --data".to_owned()))?;
    // Only now it is sure that nobody else begins or ends one.
    let record = common.find(name)?.record;
    let is_resumed = record.unlock_keys(&*kms).map_err(of)?.epochs().count() > 1;
    if !is_resumed && args.kit.recovery.is_none() && !args.no_recovery {
        return Err(Failure::new(
            Status::Usage,
            "recovery kits from before will open nothing: give --recovery FILE for a new one, or --no-recovery",
        ));
    }
    let kit = NewKit::wanted(common, &found.repo, &args.kit)?;
    let master = match is_resumed {
        true => record.master(&*kms).map_err(of)?,
        false => random_master()?,
    };
    // Kits and copies of the keyring from before hold the KEK: with it, they would open the new master too.
    let record = match !is_resumed && record.kms().kind == KEYRING {
        true => new_kek(found, &record, &*kms).map_err(of)?,
        false => record,
    };
    if let Some(kit) = kit {
        // Before the master is in use: without it there would be a time without a kit.
        let keys = keyring_keys(common, record.kms())?;
        kit.write(&found.repo, name, &record.scope(), kms.kind(), &master, keys)?;
    }
    // From here on, everything new is sealed under the new key.
    let record = match is_resumed {
        true => {
            // Who began it may have died before that was durable.
            record.settle().map_err(of)?;
            record
        }
        false => record.next_epoch(&*kms, master).map_err(|e| not_begun(args, of(e), record.is_current()))?,
    };
    found.heads.remember(record.generation(), &[])?;
    let tenant = Arc::new(record.unlock(kms.clone()).map_err(of)?);
    end_when_erased(&tenant, || false);
    let epoch = tenant.keys().current_epoch();
    output.say(match is_resumed {
        true => format!("tenant {name}: goes on with the change to the data key of epoch {epoch}"),
        false => format!("tenant {name}: new objects are sealed under the data key of epoch {epoch}"),
    });
    if let Some(detach) = detach {
        output.say("everything else is sealed again in the background; `reseal tenant show` tells how far it is");
        detach.detach().map_err(|e| Failure::new(Status::Failed, format!("can't go to the background: {e}")))?;
    }
    let progress = Progress::bytes(output, name.as_str(), 0);
    let rekey = Rekey {
        tenant: tenant.clone(),
        under: &*alone,
        workers: cores(),
        throttle: args.limit_rate.map(Throttle::new),
        expect: &|bytes| progress.expect(bytes),
        progress: &|bytes| progress.add(bytes),
        say: &|text| output.warn(text),
    };
    let resealed = rekey.run();
    progress.finish();
    let resealed = resealed?;
    if !resealed.is_complete() {
        return Err(incomplete(output, &tenant, &resealed));
    }
    let record = end(common, &tenant, &*kms)?;
    found.heads.remember(record.generation(), &[])?;
    output.json(&json!({
        "tenant": name, "epoch": epoch, "generation": record.generation(), "resumed": is_resumed, "resealed": resealed,
        "recovery_kit": args.kit.recovery,
        "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }));
    let (packs, objects, took) =
        (counted(resealed.packs, "pack"), counted(resealed.objects, "other object"), human_duration(began.elapsed()));
    output.say(format!("sealed again  {packs} and {objects}, {}, in {took}", human_bytes(resealed.bytes)));
    output.say(format!("data key      epoch {epoch}; the older ones are destroyed"));
    output.say(format!("record        generation {}", record.generation()));
    for (object, why) in &resealed.held_back {
        output.warn(format!(
            "{object} is replaced, but the storage does not let go of it ({why}): it opens with the old key, which only copies \
             of the old record have. Remove it when its lock ends"
        ));
    }
    Ok(())
}

/// What the kit is worth that was written for a master, if it is not certain that this is in use.
fn not_begun(args: &Args, failure: Failure, is_unchanged: bool) -> Failure {
    let Some(kit) = &args.kit.recovery else { return failure };
    let kit = kit.display();
    let hint = match is_unchanged {
        true => format!("no data key was changed, so remove the kit {kit}: it opens nothing"),
        false => format!("it is not certain whether the keys were changed: keep the kit {kit}, and run this again"),
    };
    Failure::new(failure.status, format!("{}; {hint}", failure.message))
}

/// Another KEK, before there is another master.
fn new_kek(found: &Found, record: &Record, kms: &dyn Kms) -> Result<Record, VaultError> {
    let rewrapped = record.rotate(kms)?;
    found.heads.remember(rewrapped.record.generation(), &[])?;
    rewrapped.record.retire(&rewrapped.old, kms)?;
    Ok(rewrapped.record)
}

/// Destroys the old keys. Others may replace the record at the same time, for another KEK or quota.
fn end(common: &CommonArgs, tenant: &Tenant, kms: &dyn Kms) -> Result<Record, Failure> {
    let name = tenant.name();
    let mut tries = 1;
    loop {
        let record = common.find(name)?.record;
        match record.unlock_keys(kms).map(|keys| keys.epochs().count()) {
            // The answer of the try before was lost.
            Ok(1) if tries > 1 => return Ok(record),
            Ok(_) => {}
            Err(e) => return Err(of_tenant(name, e)),
        }
        match record.end_old_epochs(kms) {
            Err(VaultError::Store(_)) if tries < TRIES => tries += 1,
            other => return other.map_err(|e| of_tenant(name, e)),
        }
    }
}

/// What is in the way, and what to do about it.
fn incomplete(output: Output, tenant: &Tenant, resealed: &Resealed) -> Failure {
    let name = tenant.name();
    output.json(&json!({ "tenant": name, "epoch": tenant.keys().current_epoch(), "resealed": resealed }));
    for (object, why) in resealed.damaged.iter().chain(&resealed.refused) {
        output.warn(format!("{object}: {why}"));
    }
    let old = "so the old data key is not destroyed; all else is sealed under the new one";
    match resealed.damaged.len() {
        0 => Failure::new(
            Status::Failed,
            format!(
                "the storage does not let {} of tenant {name} be replaced, {old}. When the locks end, run this again",
                counted(resealed.refused.len(), "object")
            ),
        ),
        damaged => Failure::new(
            Status::Damaged,
            format!(
                "tenant {name} has {} that can't be sealed again, {old}. `reseal verify` tells which restore points each hurts: \
                 put it back from a copy of the vault, or delete one that hurts none, then run this again",
                counted(damaged, "damaged object")
            ),
        ),
    }
}
