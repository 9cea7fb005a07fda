//! `reseal forget`

use reseal_cli::{CommonArgs, Failure, Status, counted};
use reseal_format::names::VmName;
use reseal_vault::{Point, PointSpec, Points};
use serde_json::json;

use super::forgetting::{Ended, Run, Telling};
use super::keep::KeepArgs;

/// Arguments of `forget`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Restore points: VM@latest, VM@NUMBER or VM@TIME; or, with a --keep option, VMs
    #[arg(value_name = "POINT|VM", required_unless_present = "all")]
    what: Vec<String>,
    /// Applies the --keep options to each VM of the tenant by itself
    #[arg(long, conflicts_with = "what")]
    all: bool,
    #[command(flatten)]
    keep: KeepArgs,
    /// Only says what would be forgotten, and why the rest stays
    #[arg(long)]
    dry_run: bool,
    /// Kept with what is left of each restore point
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let policy = args.keep.policy();
    let usage = |text: &str| Failure::new(Status::Usage, text);
    if policy.is_empty() && (args.all || args.what.iter().any(|what| !what.contains('@'))) {
        return Err(usage(
            "what is to stay? Say which restore points go, as VM@NUMBER, or which of a VM's stay, such as --keep-daily 14",
        ));
    }
    let specs = match policy.is_empty() {
        true => args.what.iter().map(|what| PointSpec::parse(what)).collect::<Result<Vec<_>, _>>()?,
        false => Vec::new(),
    };
    let names = args.what.iter().filter(|_| specs.is_empty());
    let names = names.map(|name| VmName::new(name).map_err(|e| Failure::of(Status::Usage, &e)));
    let mut vms = names.collect::<Result<Vec<_>, _>>()?;
    let opened = common.open()?;
    if args.all {
        vms = Points::vms(&*opened.tenant)?;
    }
    let (output, reason) = (common.output(), args.reason.as_deref().unwrap_or("reseal forget"));
    let mut run = Run::new(output, Telling::All, &opened, args.dry_run, reason)?;
    // All are found before the first goes.
    let mut found: Vec<Point> = Vec::new();
    for spec in &specs {
        opened.heads.whole_chain(&*opened.tenant, &spec.vm)?;
        let point = opened.tenant.resolve(spec)?;
        if found.iter().all(|other| other.manifest.point_id != point.manifest.point_id) {
            found.push(point);
        }
    }
    for point in &found {
        run.forget(point)?;
    }
    for vm in &vms {
        run.apply(vm, &policy)?;
    }
    let Ended { forgotten, kept, failed } = run.end();
    let would = if args.dry_run { "would be forgotten" } else { "forgotten" };
    let points = counted(forgotten.len(), "restore point");
    let stay = if kept == 0 { String::new() } else { format!(", {kept} kept") };
    output.say(format!("{points} {would}{stay}"));
    output.json(&json!({ "event": "summary", "forgotten": forgotten.len(), "kept": kept, "dry_run": args.dry_run }));
    failed.end()
}
