//! `reseal forget`

use std::time::Duration;

use reseal_cli::{CommonArgs, Failure, Opened, Output, Status};
use reseal_format::names::VmName;
use reseal_vault::{Forgetting, Left, Point, PointSpec, Points, VaultError};
use reseal_writer::retention::{Candidate, Policy};
use reseal_writer::span;
use serde_json::json;

use super::point_name;

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

/// What stays. A restore point that one of these keeps, or that is held, is not forgotten.
#[derive(clap::Args)]
struct KeepArgs {
    /// The newest N
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// The newest of each of N hours (of UTC, as all these)
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: u32,
    /// The newest of each of N days
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,
    /// The newest of each of N weeks, from Monday on
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,
    /// The newest of each of N months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: u32,
    /// The newest of each of N years
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_yearly: u32,
    /// All that are no older than this, such as 48h or 2w, when the VM's newest is made
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    keep_within: Option<Duration>,
}

impl KeepArgs {
    fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
        }
    }
}

/// How it goes.
struct Run<'a> {
    output: Output,
    opened: &'a Opened,
    /// None where nothing is to be forgotten.
    forgetting: Option<Forgetting<'a>>,
    reason: &'a str,
    /// What went wrong last; what came before was said.
    failed: Option<Failure>,
    forgotten: usize,
    kept: usize,
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
    let forgetting = if args.dry_run { None } else { Some(opened.tenant.forgetting()?) };
    let (output, reason) = (common.output(), args.reason.as_deref().unwrap_or("reseal forget"));
    let mut run = Run { output, opened: &opened, forgetting, reason, failed: None, forgotten: 0, kept: 0 };
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
    run.end()
}

impl Run<'_> {
    fn wrong(&mut self, failure: Failure) {
        if let Some(before) = self.failed.replace(failure) {
            self.output.warn(before.message);
        }
    }

    /// What is wrong with one point does not stop the others; a vault that does not answer does.
    fn or_wrong<T>(&mut self, result: Result<T, VaultError>) -> Result<Option<T>, Failure> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.damaged_object().is_some() || matches!(e, VaultError::Held { .. }) => {
                self.wrong(e.into());
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn told(&self, point: &Point, action: &str, reasons: &[String]) {
        let (name, time) = (point_name(point), point.manifest.created);
        let why = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
        self.output.say(format!("{name:<24} {time}  {}{why}", action.replace('_', " ")));
        self.output.json(&json!({ "event": action, "point": name, "time": time.to_string(), "reasons": reasons }));
    }

    fn forget(&mut self, point: &Point) -> Result<(), Failure> {
        let tenant = &self.opened.tenant;
        let done = match &self.forgetting {
            Some(forgetting) => forgetting.forget(point, self.reason).map(|left| ("forgotten", left)),
            None => tenant.check_not_held(&point.manifest).map(|()| ("would_be_forgotten", Left::Tombstone)),
        };
        if let Some((action, left)) = self.or_wrong(done)? {
            self.forgotten += 1;
            let reading = match left {
                Left::Tombstone => Vec::new(),
                Left::Read(by) => by.iter().map(|held| format!("its space stays while it is read: {held}")).collect(),
            };
            self.told(point, action, &reading);
        }
        Ok(())
    }

    fn apply(&mut self, vm: &VmName, policy: &Policy) -> Result<(), Failure> {
        let (tenant, heads) = (&self.opened.tenant, &self.opened.heads);
        let chain = heads.whole_chain(&**tenant, vm)?;
        if chain.last() == 0 {
            return Err(VaultError::NoVm { vm: vm.clone() }.into());
        }
        let names = tenant.note_names(vm)?;
        let (mut points, mut candidates) = (Vec::new(), Vec::new());
        for number in chain.live() {
            let looked_at = tenant.point(vm, number).and_then(|point| {
                let held = tenant.hold_of(&point.manifest, &names)?.is_some();
                Ok((point, held))
            });
            // Nothing is known of one that can't be opened, so it stays.
            let Some((point, held)) = self.or_wrong(looked_at)? else { continue };
            candidates.push(Candidate { number, created: point.manifest.created, held });
            points.push(point);
        }
        for (point, (_, why)) in points.iter().zip(policy.judge(&candidates)) {
            if why.is_empty() {
                self.forget(point)?;
            } else {
                self.kept += 1;
                self.told(point, "kept", &why.iter().map(ToString::to_string).collect::<Vec<_>>());
            }
        }
        Ok(())
    }

    fn end(self) -> Result<(), Failure> {
        let (forgotten, kept) = (self.forgotten, self.kept);
        let would = if self.forgetting.is_some() { "forgotten" } else { "would be forgotten" };
        let points = if forgotten == 1 { "restore point" } else { "restore points" };
        let stay = if kept == 0 { String::new() } else { format!(", {kept} kept") };
        self.output.say(format!("{forgotten} {points} {would}{stay}"));
        self.output.json(
            &json!({ "event": "summary", "forgotten": forgotten, "kept": kept, "dry_run": self.forgetting.is_none() }),
        );
        self.failed.map_or(Ok(()), Err)
    }
}
