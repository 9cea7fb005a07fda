//! `reseal copy`

use std::path::PathBuf;
use std::time::Instant;

use reseal_cli::{
    CommonArgs, Failure, Opened, Progress, Status, counted, hold_keys, human_bytes, human_duration, parse_size,
};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_vault::{Pins, Points};
use reseal_writer::copy::{Copy, Outcome};
use reseal_writer::verify::{Part, Verify, What};
use serde_json::json;

use super::cores;
use super::failures::Failures;
use super::other_vault::OtherVault;

/// Arguments of `copy`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Copies these VMs; without names all that the tenant has
    #[arg(value_name = "VM")]
    vms: Vec<String>,
    /// The vault that is copied from [default: --repo]
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// The vault that is copied to
    #[arg(long, value_name = "URL")]
    to: String,
    /// The tenant there [default: --tenant]
    #[arg(long, value_name = "NAME")]
    to_tenant: Option<String>,
    /// The embedded KMS of the vault that is copied to [default: --keyring]
    #[arg(long, value_name = "FILE")]
    to_keyring: Option<PathBuf>,
    /// Reads its passphrase from the first line of a file
    #[arg(long, value_name = "FILE")]
    to_keyring_passphrase_file: Option<PathBuf>,
    /// Which KMS keeps which tenant's key of the vault that is copied to [default: --kms-config]
    #[arg(long, value_name = "FILE")]
    to_kms_config: Option<PathBuf>,
    /// Does not read back what was stored
    #[arg(long)]
    no_verify: bool,
    /// Only says what would be copied
    #[arg(long)]
    dry_run: bool,
    /// Reads at most so many bytes a second, as 50M or 1G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    limit_rate: Option<u64>,
}

impl Args {
    fn source(&self, common: &CommonArgs) -> CommonArgs {
        CommonArgs { repo: self.from.clone().or_else(|| common.repo.clone()), ..common.clone() }
    }

    fn target(&self, common: &CommonArgs) -> Result<Opened, Failure> {
        let other = OtherVault {
            repo: &self.to,
            tenant: &self.to_tenant,
            keyring: &self.to_keyring,
            keyring_passphrase_file: &self.to_keyring_passphrase_file,
            kms_config: &self.to_kms_config,
        };
        other.open(common)
    }
}

/// Readers of a vault in an object store.
const FAR: usize = 8;

/// What was done.
#[derive(Default)]
struct Counts {
    copied: u64,
    stored: u64,
    left_out: u64,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let (began, output) = (Instant::now(), common.output());
    let names = args.vms.iter().map(|name| VmName::new(name).map_err(|e| Failure::of(Status::Usage, &e)));
    let mut vms = names.collect::<Result<Vec<_>, _>>()?;
    let from: Opened = args.source(common).open()?;
    let to = args.target(common)?;
    let (source, target) = (from.tenant.keys().scope(), to.tenant.keys().scope());
    if source == target {
        return Err(Failure::new(Status::Usage, "--to is the tenant that is copied from"));
    }
    let _leases = [
        hold_keys(&from.tenant, format!("copy to {}", args.to), Pins::Nothing),
        hold_keys(&to.tenant, format!("copy from {}", from.repo), Pins::Nothing),
    ];
    if vms.is_empty() {
        vms = Points::vms(&*from.tenant)?;
    }
    let progress = Progress::bytes(output, "copy", 0);
    let copy = Copy {
        from: from.tenant.clone(),
        from_heads: &from.heads,
        to: to.tenant.clone(),
        to_heads: &to.heads,
        state: to.paths.state.clone(),
        // Where the store is far, they mostly wait for it.
        workers: if from.tenant.store().is_far() { cores().max(FAR) } else { cores() },
        limit_rate: args.limit_rate,
        progress: &|bytes| progress.add(bytes),
        expect: &|bytes| progress.expect(bytes),
        say: &|text| output.warn(text),
    };
    let mut counts = Counts::default();
    let mut failed = Failures::new(output);
    for vm in &vms {
        let missing = match copy.missing(vm) {
            Ok(missing) => missing,
            // One that has only tombstones, say: the others can be copied all the same.
            Err(e) if vms.len() > 1 && e.status() != Status::Unreachable => {
                failed.add(e.into());
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        if args.dry_run {
            counts.copied += missing.count() as u64;
            for number in missing.numbers() {
                output.say(format!("{vm}@{number} would be copied"));
                output.json(&json!({ "event": "would_be_copied", "point": format!("{vm}@{number}") }));
            }
            continue;
        }
        let mut first: Option<Timestamp> = None;
        copy.run(missing, &mut |outcome| match outcome {
            Outcome::Copied { number, made } => {
                let (manifest, stats) = (&made.manifest, made.manifest.stats);
                first.get_or_insert(manifest.created);
                counts.copied += 1;
                counts.stored += stats.stored;
                let (of, to) = (format!("{vm}@{number}"), format!("{vm}@{}", manifest.number));
                output.json(&json!({
                    "event": "copied", "point": of, "to": to, "time": manifest.created.to_string(), "stats": stats,
                }));
                output.say(format!(
                    "{of} {} is {to}: read {}, stored {}",
                    manifest.created,
                    human_bytes(stats.read),
                    human_bytes(stats.stored)
                ));
                if let Some(e) = made.not_remembered {
                    output.warn(format!("{to} is made, but this machine could not remember it: {e}"));
                }
            }
            Outcome::LeftOut { number, error } => {
                counts.left_out += 1;
                output
                    .json(&json!({ "event": "left_out", "point": format!("{vm}@{number}"), "why": error.to_string() }));
                output.warn(format!("{vm}@{number} is left out: {error}"));
            }
        })?;
        if let Some(first) = first.filter(|_| !args.no_verify) {
            // What these have added, and nothing else.
            let verify = Verify::new(to.tenant.clone(), &to.heads, &to.paths.state).of_part(Part::Since(first), None);
            let report = verify.run(&What::Vm(vm.clone()), cores(), |_| {}, &|_| {})?;
            if let Some(damage) = report.damaged.first() {
                let message = format!("{} of the copy is not as it was stored: {}", damage.object, damage.what);
                failed.add(Failure::new(Status::Damaged, message));
            }
        }
    }
    progress.finish();
    let Counts { copied, stored, left_out } = counts;
    output.json(&json!({
        "event": "summary", "copied": copied, "stored": stored, "left_out": left_out, "dry_run": args.dry_run,
    }));
    let points = counted(copied, "restore point");
    output.say(match args.dry_run {
        true => format!("{points} would be copied"),
        false => {
            let (stored, took) = (human_bytes(stored), human_duration(began.elapsed()));
            format!("{points} copied, {stored} stored, in {took}")
        }
    });
    if failed.is_empty() && left_out > 0 {
        let left_out = counted(left_out, "damaged restore point");
        let message = format!("{left_out} left out; later ones were copied");
        failed.add(Failure::new(Status::Damaged, message));
    }
    failed.end()
}
