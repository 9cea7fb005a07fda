//! `reseal verify`

use std::time::Duration;

use reseal_cli::{CommonArgs, Failure, Opened, Output, Progress, Status, counted, hold_keys, human_bytes, parse_size};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_site::certificate::now;
use reseal_vault::{Pins, PointSpec, Points, random, tenants, vault_id};
use reseal_writer::repair::Repaired;
use reseal_writer::scrub::Scrub;
use reseal_writer::span;
use reseal_writer::status::Verdicts;
use reseal_writer::throttle::Throttle;
use reseal_writer::verify::{Part, Report, Verify, What};

use serde::Serialize;

use super::repair::RepairArgs;
use super::{cores, repair};

/// Arguments of `verify`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A VM, or VM@latest, VM@NUMBER or VM@TIME; without it, every object of the tenant
    #[arg(value_name = "VM|POINT")]
    what: Option<String>,
    /// Of packs only so many percent, chosen anew each time; all else is read
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    sample: Option<f64>,
    /// Of packs only what restore points have added that are no older than this, such as 24h or 7d; all else is read
    #[arg(long, value_name = "SPAN", value_parser = span::parse, conflicts_with = "sample")]
    since: Option<Duration>,
    /// Needs no key and asks no KMS: looks for rot in all objects of all tenants, by the digests that packs have in clear
    #[arg(long, conflicts_with_all = ["what", "since", "repair_from"])]
    no_keys: bool,
    /// Reads at most so many bytes of packs a second, as 50M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    limit_rate: Option<u64>,
    #[command(flatten)]
    repair: RepairArgs,
}

/// What is told of a verification, and of what was mended.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    report: &'a Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    repair: &'a Option<Repaired>,
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent = text.trim_end_matches('%').parse().ok().filter(|percent| *percent > 0.0 && *percent <= 100.0);
    percent.ok_or_else(|| format!("{text:?} is no percentage: more than 0, and up to 100"))
}

impl Args {
    fn part(&self) -> Result<Part, Failure> {
        Ok(match (self.sample, self.since) {
            (Some(percent), _) => Part::Sample { percent, seed: u64::from_le_bytes(random()?) },
            (None, Some(span)) => {
                let span = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
                Part::Since(Timestamp(now().0.saturating_sub(span)))
            }
            (None, None) => Part::All,
        })
    }
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let output = common.output();
    let part = args.part()?;
    let progress = Progress::bytes(output, "verify", 0);
    let result = match args.no_keys {
        true => without_keys(common, args, part, &progress).map(|report| (report, None)),
        false => with_keys(common, args, part, &progress),
    };
    progress.finish();
    let (report, repaired) = result?;
    told(output, args, &report, &repaired)
}

fn without_keys(common: &CommonArgs, args: &Args, part: Part, progress: &Progress) -> Result<Report, Failure> {
    let (store, repo) = common.vault()?;
    vault_id(&*store, &repo)?;
    let tenants = tenants(&*store)?;
    let (expect, read) = (|bytes| progress.expect(bytes), |bytes| progress.add(bytes));
    let throttle = args.limit_rate.map(Throttle::new);
    Ok(Scrub { store, part, threads: cores(), throttle, expect: &expect, progress: &read }.run(&tenants)?)
}

fn with_keys(
    common: &CommonArgs,
    args: &Args,
    part: Part,
    progress: &Progress,
) -> Result<(Report, Option<Repaired>), Failure> {
    let opened = common.open()?;
    let what = args.what(&opened)?;
    let other = args.repair.open(common, &opened)?;
    let _lease = hold_keys(&opened.tenant, "verify".to_owned(), Pins::All);
    let (report, repaired) = match &other {
        Some(from) => {
            let (report, repaired) =
                repair::run(&opened, from, (&what, part), args.limit_rate, common.output(), progress)?;
            (report, Some(repaired))
        }
        None => {
            let verify = Verify::new(opened.tenant.clone(), &opened.heads, &opened.paths.state);
            let verify = verify.of_part(part, args.limit_rate.map(Throttle::new));
            (verify.run(&what, cores(), |bytes| progress.expect(bytes), &|bytes| progress.add(bytes))?, None)
        }
    };
    let verdicts = Verdicts::of_tenant(&opened.paths.state, &opened.tenant.keys().scope());
    if let Err(e) = verdicts.note(&what, part, &report) {
        common.output().warn(format!("`reseal status` will not know of this: {e}"));
    }
    Ok((report, repaired))
}

fn told(output: Output, args: &Args, report: &Report, repair: &Option<Repaired>) -> Result<(), Failure> {
    output.json(&Document { report, repair });
    if let Some(repaired) = repair {
        repair::told(output, repaired);
    }
    for damage in &report.damaged {
        let hurts = match (damage.hurts.is_empty(), args.no_keys) {
            (false, _) => format!("hurts {}", damage.hurts.join(", ")),
            (true, true) => "which restore points it hurts, `reseal verify` with the keys tells".to_owned(),
            (true, false) => "hurts no restore point".to_owned(),
        };
        let why = repair.as_ref().and_then(|repaired| repaired.not_mended.get(&damage.object));
        let why = why.map_or(String::new(), |why| format!("\n         {why}"));
        output.complain(format!("DAMAGED  {}\n         {}\n         {hurts}{why}", damage.object, damage.what));
    }
    let read = format!(
        "{}, {}, {}, {} read",
        counted(report.points, "restore point"),
        counted(report.packs, "pack"),
        counted(report.blobs, "blob"),
        human_bytes(report.bytes)
    );
    if report.damaged.is_empty() {
        let seen = match args.no_keys {
            true => "no rot found",
            false => "all right",
        };
        output.say(format!("{seen}: {read}"));
        return Ok(());
    }
    let count = counted(report.damaged.len(), "damaged object");
    let message = match repair {
        Some(Repaired { mended, .. }) => {
            format!("{count} left ({read}), {} mended", mended.len())
        }
        None => format!(
            "{count} ({read}); with the keys, `--repair-from` mends packs from a second vault; put other files back from a copy of this one"
        ),
    };
    Err(Failure::new(Status::Damaged, message))
}

impl Args {
    fn what(&self, opened: &Opened) -> Result<What, Failure> {
        let Some(text) = &self.what else { return Ok(What::Everything) };
        Ok(match PointSpec::parse(text) {
            // A VM's name may look like a point; if there is such a VM, that is what was meant.
            Ok(spec) if !named_like(&opened.tenant.vms()?, text) => {
                let point = opened.tenant.resolve(&spec)?;
                What::Point(spec.vm, point.manifest.number)
            }
            _ => What::Vm(VmName::new(text).map_err(|e| Failure::of(Status::Usage, &e))?),
        })
    }
}

fn named_like(vms: &[VmName], text: &str) -> bool {
    vms.iter().any(|vm| vm.as_str() == text)
}
