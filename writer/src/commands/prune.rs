//! `reseal prune`

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use reseal_cli::{
    CommonArgs, Failure, Opened, Output, Status, counted, hold_keys, human_bytes, human_duration, parse_size,
};
use reseal_vault::{Holder, Pins, PointName, Points};
use reseal_writer::prune::{Prune, Pruned};
use reseal_writer::span;
use reseal_writer::throttle::Throttle;
use serde_json::json;

use super::cores;
use super::failures::Failures;
use super::forgetting::{Ended, Run, Telling};

/// Arguments of `prune`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only says what would be forgotten by the tenant's policies, and what would be freed
    #[arg(long)]
    dry_run: bool,
    /// Forgets nothing; the tenant's policies are for the next time
    #[arg(long)]
    no_forget: bool,
    /// How long it waits for backups that began before it. Those that still run then can't end: they fail, and are to be run again
    #[arg(long, value_name = "SPAN", default_value = "24h", value_parser = span::parse)]
    grace: Duration,
    /// Packs of which at least so much is unused are rewritten, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=100))]
    min_unused: u8,
    /// Reads at most so much of packs that are rewritten, as 10G, or all: those first that free most for it, the rest the next time
    /// [default: a 32nd part of what is stored, and at least 64M]
    #[arg(long, value_name = "SIZE|all", value_parser = parse_most)]
    max_rewrite: Option<u64>,
    /// Goes on although manifests or index nodes are missing or can't be opened: what only they need is removed, so that they can't be
    /// put back from a copy
    #[arg(long)]
    despite_damage: bool,
    /// Reads at most so many bytes a second of packs that are rewritten, as 50M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    limit_rate: Option<u64>,
}

fn parse_most(text: &str) -> Result<u64, String> {
    if text == "all" { Ok(u64::MAX) } else { parse_size(text) }
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let (began, output) = (Instant::now(), common.output());
    // What it marks from does not change: what an earlier one, or a mount, has read of an object store is not asked for again.
    let opened = CommonArgs { is_reader: true, ..common.clone() }.open()?;
    let tenant = &opened.tenant;
    let _lease = hold_keys(tenant, "prune".to_owned(), Pins::Nothing);
    let prune = Prune {
        tenant: tenant.clone(),
        grace: args.grace,
        percent: args.min_unused,
        most_read: args.max_rewrite,
        workers: cores(),
        throttle: args.limit_rate.map(Throttle::new),
        despite_damage: args.despite_damage,
        say: &|text| output.warn(text),
    };
    for vm in opened.heads.known_vms()? {
        // A vault that was rolled back may lack what its restore points need, and is nothing to remove from.
        opened.heads.whole_chain(&**tenant, &vm)?;
    }
    let Ended { forgotten, kept: _, failed } = match args.no_forget {
        true => Ended { forgotten: BTreeSet::new(), kept: 0, failed: Failures::new(output) },
        false => by_policies(output, &opened, args.dry_run)?,
    };
    // One at a time rewrites packs; and who changes the data keys meanwhile waits.
    let alone = tenant.rekey_lease(&Holder::this_process("prune".to_owned()))?;
    let pruned = match args.dry_run {
        true => prune.look(&forgotten)?,
        false => {
            tenant.refresh()?;
            tenant.settle_new_epoch()?;
            prune.run(&*alone)?
        }
    };
    told(output, &pruned, &forgotten, began.elapsed());
    end(output, args, &pruned)?;
    failed.end()
}

/// Forgets what the tenant's policies do not keep. What is wrong with one VM does not stop the others.
fn by_policies(output: Output, opened: &Opened, is_dry: bool) -> Result<Ended, Failure> {
    let tenant = &opened.tenant;
    let keys = tenant.keys();
    let policies = keys.policies();
    let mut run = Run::new(output, Telling::Gone, opened, is_dry, "policy of the tenant")?;
    for vm in Points::vms(&**tenant)? {
        let Some(policy) = policies.of(&vm).filter(|policy| !policy.is_empty()) else { continue };
        if let Some(rule) = policy.unknown() {
            let message = format!(
                "{vm}: this version does not know the rule {rule:?} of its policy, so nothing of it is forgotten"
            );
            run.wrong(Failure::new(Status::Failed, format!("{message}; use a newer reseal")));
            continue;
        }
        run.apply(&vm, policy)?;
    }
    Ok(run.end())
}

fn told(output: Output, pruned: &Pruned, forgotten: &BTreeSet<PointName>, took: Duration) {
    let mut document = json!(pruned);
    document["forgotten"] = forgotten.iter().map(ToString::to_string).collect();
    output.json(&document);
    let would = if pruned.dry_run { "would be " } else { "" };
    let (removed, rewritten) = (counted(pruned.removed, "pack"), pruned.rewritten);
    output.say(format!(
        "freed       {}: {removed} {would}removed, {rewritten} {would}rewritten, in {}",
        human_bytes(pruned.freed),
        human_duration(took)
    ));
    let unused = |bytes: u64, why: &str| match bytes {
        0 => String::new(),
        bytes => format!("; {} of that is unused, in packs that {why}", human_bytes(bytes)),
    };
    let postponed = unused(pruned.postponed, "are rewritten the next time (--max-rewrite)");
    let unused = unused(pruned.unused, "are mostly used (--min-unused)");
    let stay = human_bytes(pruned.before.saturating_sub(pruned.freed));
    output.say(format!("stays       {stay} for {}{unused}{postponed}", counted(pruned.points, "restore point")));
    let unneeded = (pruned.locked > 0).then(|| format!("{} that nothing needs", human_bytes(pruned.locked)));
    let forgotten = counted(pruned.locked_points, "forgotten restore point");
    let forgotten = (pruned.locked_points > 0).then(|| format!("what {forgotten} led to"));
    let locked: Vec<_> = unneeded.into_iter().chain(forgotten).collect();
    if !locked.is_empty() {
        let until = pruned.locked_until.as_ref().map(|until| format!(" until {until} at the latest"));
        let (locked, until) = (locked.join(", and "), until.unwrap_or_default());
        output.say(format!("locked      {locked}: kept by the object store{until}"));
    }
    for (point, by) in &pruned.read {
        output.say(format!("stays       {point}, which is forgotten, while it is read: {by}"));
    }
    for point in &pruned.fenced {
        output.say(format!("given up    {point}: its backup took longer than --grace, and has to be run again"));
    }
    for (pack, why) in &pruned.held_back {
        output.warn(format!("{pack} is not needed, but the storage does not let go of it: {why}"));
    }
}

fn end(output: Output, args: &Args, pruned: &Pruned) -> Result<(), Failure> {
    if let Some(who) = pruned.at_work.first() {
        let message =
            format!("nothing was removed, for it may still be relied on by {who}: wait for its end, or end it");
        return Err(Failure::new(Status::Failed, message));
    }
    if let Some((point, what)) = pruned.held.first_key_value() {
        let message = format!(
            "{point} is held, and what it needs can't be told: {what}. Nothing was removed, and --despite-damage does not override that. Put it back \
             from a copy of the vault; or give it up: `reseal hold {point} --release`"
        );
        return Err(Failure::new(Status::Damaged, message));
    }
    let (mut first, mut more) = (None, 0);
    for what in pruned.damaged.values().chain(pruned.bad_packs.values()) {
        more += usize::from(first.is_some());
        first.get_or_insert(what);
    }
    let Some(what) = first else { return Ok(()) };
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    let and_then = match (pruned.damaged.is_empty(), args.despite_damage) {
        (true, _) => "It stays as it is, and all else was pruned; `reseal verify` tells which restore points are hurt",
        (false, true) => {
            let what = pruned.damaged.values().cloned().collect::<Vec<_>>().join("; ");
            let would = if pruned.dry_run { "would be" } else { "was" };
            output.warn(format!("{what}. What only that needs {would} removed"));
            return match pruned.bad_packs.values().next() {
                None => Ok(()),
                Some(bad) => Err(Failure::new(Status::Damaged, format!("{bad}. It stays as it is"))),
            };
        }
        (false, false) => {
            "What it needs can't be told, so nothing was removed. Put it back from a copy of the vault; or give it up with \
             --despite-damage. `reseal verify` tells which restore points are hurt"
        }
    };
    Err(Failure::new(Status::Damaged, format!("{what}{more}. {and_then}")))
}
