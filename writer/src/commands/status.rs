//! `reseal status`

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use reseal_cli::{CommonArgs, DEFAULT_TENANT, Failure, Found, Output, Status, counted, human_bytes, of_tenant};
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_vault::{Booted, Record, VaultError, tenants};
use reseal_writer::span;
use reseal_writer::status::{Attempt, RekeyState, Report, SiteReport, TenantReport, Verdict, VmReport, age, metrics};
use std::time::Duration;

/// Arguments of `status`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this VM
    vm: Option<String>,
    /// All tenants of the vault; those that can't be opened are named
    #[arg(long, conflicts_with = "vm")]
    all_tenants: bool,
    /// Prints metrics for Prometheus; or writes them to a file, which is replaced whole, as the node exporter's textfile
    /// collector reads it
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-", conflicts_with = "json")]
    metrics: Option<PathBuf>,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let output = common.output();
    common.refuse_recovery_kit()?;
    let vm = args.vm.as_deref().map(VmName::new).transpose().map_err(|e| Failure::of(Status::Usage, &e))?;
    let repo = common.repo()?;
    let report = match Path::new(&repo).is_file() {
        true => of_site(common, args, Path::new(&repo), vm.as_ref())?,
        false => of_vault(common, args, vm.as_ref())?,
    };
    match &args.metrics {
        Some(path) if path == Path::new("-") => print!("{}", metrics::text(&report)),
        Some(path) => write(path, &metrics::text(&report))?,
        None => {
            let report_time = report.time;
            output.json(&report.json());
            report.tenants.iter().for_each(|report| show_tenant(output, report, report_time));
            report.site.iter().for_each(|report| show_site(output, report));
        }
    }
    let problems = report.problems();
    let Some(status) = report.status() else { return Ok(()) };
    // One is what the command ends with.
    if let [problem] = &problems[..] {
        return Err(Failure::new(status, problem.what.clone()));
    }
    for problem in &problems {
        match args.metrics {
            Some(_) => output.warn(&problem.what),
            None => output.complain(format!("{}  {}", word(problem.status), problem.what)),
        }
    }
    Err(Failure::new(status, format!("{} things are not as they should be", problems.len())))
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Damaged => "DAMAGED    ",
        Status::Unreachable => "UNREACHABLE",
        Status::Failed | Status::Usage => "ATTENTION  ",
    }
}

/// Replaces a file whole, so that whoever reads it never finds half of it.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let replace = || -> std::io::Result<()> {
        // Others may read it: it is for the exporter.
        let mut file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o644).open(&new)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&new, path)
    };
    replace().map_err(|e| Failure::new(Status::Failed, format!("can't write {}: {e}", path.display())))
}

fn of_site(common: &CommonArgs, args: &Args, enrolment: &Path, vm: Option<&VmName>) -> Result<Report, Failure> {
    if args.all_tenants {
        let message = "--all-tenants: an enrolment file is of one tenant; that is asked where the vault is";
        return Err(Failure::new(Status::Usage, message));
    }
    let mut report = Report::of_site(enrolment, &common.paths()?.state)?;
    if let Some(site) = &mut report.site {
        let given = common.tenant()?;
        if given != site.tenant && common.tenant != DEFAULT_TENANT {
            let message = format!("--tenant {given}: the enrolment file is of tenant {}", site.tenant);
            return Err(Failure::new(Status::Usage, message));
        }
        vm.map_or(Ok(()), |vm| site.only(vm))?;
    }
    Ok(report)
}

fn of_vault(common: &CommonArgs, args: &Args, vm: Option<&VmName>) -> Result<Report, Failure> {
    let mut report = Report::of_vault();
    let (store, repo) = common.vault()?;
    let names = match args.all_tenants {
        true => tenants(&*store)?,
        false => vec![common.tenant()?],
    };
    if names.is_empty() {
        // That nothing is wrong with nothing must not be said of a folder in which no vault is mounted.
        Record::read(store, &repo, &common.tenant()?)?;
    }
    for name in names {
        match of_one(common, &name, report.time) {
            Ok(tenant) => report.tenants.push(tenant),
            // A folder in which nothing is any more.
            Err(VaultError::NoTenant { .. }) if args.all_tenants => {}
            Err(e) => return Err(e.into()),
        }
    }
    if let (Some(vm), [tenant]) = (vm, &mut report.tenants[..]) {
        tenant.only(vm)?;
    }
    Ok(report)
}

/// One tenant: opened, or why not.
fn of_one(common: &CommonArgs, name: &TenantName, now: Timestamp) -> Result<TenantReport, VaultError> {
    let closed = |why: Failure| -> Result<TenantReport, VaultError> {
        let (store, repo) = match common.vault() {
            Ok(vault) => vault,
            Err(_) => return Err(VaultError::NoTenant { tenant: name.clone() }),
        };
        let paths = common.paths();
        let record = match Record::read(store.clone(), &repo, name) {
            Err(e @ (VaultError::NoTenant { .. } | VaultError::NotAVault { .. })) => return Err(e),
            other => other.ok(),
        };
        let scope = record.as_ref().map(Record::scope);
        let state = paths.map(|paths| paths.state).unwrap_or_default();
        let mut report = TenantReport::closed(&*store, name, scope.as_ref(), &state, why)?;
        if let Some(record) = record {
            report.kms = Some(record.kms().clone());
            report.generation = record.generation();
            report.erased = record.erased();
            if report.erased.is_some() {
                // Somebody wanted that: it is no fault that it does not open.
                report.closed = None;
                report.problems.clear();
                report.vms.clear();
            }
        }
        Ok(report)
    };
    let Found { record, heads, paths, .. } = match common.find(name) {
        Ok(found) => found,
        Err(why) => return closed(why),
    };
    let opened = common.kms_of(&record).and_then(|kms| record.unlock(kms).map_err(|e| of_tenant(name, e)));
    match opened {
        Ok(tenant) => TenantReport::of(&tenant, &heads, &paths.state, now).or_else(|e| closed(e.into())),
        Err(why) => closed(why),
    }
}

fn show_tenant(output: Output, report: &TenantReport, now: Timestamp) {
    output.say(format!("tenant {}", report.tenant));
    if let Some(when) = report.erased {
        return output.say(format!("  erased at {}", when.to_rfc3339()));
    }
    if let Some(kms) = &report.kms {
        let state = match (&report.closed, report.epoch) {
            (None, Some(epoch)) => format!("opens it; record generation {}, DEK epoch {epoch}", report.generation),
            _ => "does not open it".to_owned(),
        };
        output.say(format!("  keys     {} {}: {state}", kms.kind, kms.key));
    }
    if let Some(rekey) = report.rekey {
        let state = match rekey {
            RekeyState::Running => "a change of the data keys runs",
            RekeyState::Interrupted => "a change of the data keys was interrupted",
        };
        output.say(format!("  rekey    {state}"));
    }
    let quota = report.quota.map(|quota| format!(" of {}", human_bytes(quota))).unwrap_or_default();
    let (used, packs) = (human_bytes(report.used), counted(report.packs, "pack"));
    let (points, vms) = (counted(report.points, "restore point"), counted(report.vms.len(), "VM"));
    output.say(format!("  stored   {used}{quota} in {packs}; {points} of {vms}"));
    if let Some(verdict) = &report.verified {
        output.say(format!("  verified {}", show_verdict(Some(verdict))));
    }
    for who in &report.at_work {
        output.say(format!("  at work  {who}"));
    }
    if report.closed.is_none() && !report.vms.is_empty() {
        let header = ["VM", "POINT", "AGE", "OBJECTIVE", "LAST RESULT", "VERIFIED", "BOOT"];
        output.say(row(header.map(str::to_owned)));
        report.vms.iter().for_each(|vm| output.say(vm_row(vm, now)));
    }
}

fn row([vm, point, age, objective, last, verified, boot]: [String; 7]) -> String {
    format!("  {vm:<24} {point:>8} {age:>10} {objective:>10}  {last:<32} {verified:<35} {boot}").trim_end().to_owned()
}

fn show_span(seconds: Option<u64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |seconds| span::show(Duration::from_secs(seconds)))
}

fn vm_row(report: &VmReport, now: Timestamp) -> String {
    let number = report.newest.map_or_else(|| "none".to_owned(), |newest| newest.number.to_string());
    let age = show_span(report.newest.map(|newest| newest.age));
    let last = show_attempt(report.last.as_ref());
    let verified = show_verdict(report.verified.as_ref());
    let boot = show_boot(report.boot.as_ref(), now);
    row([report.vm.to_string(), number, age, show_span(report.objective), last, verified, boot])
}

fn show_attempt(attempt: Option<&Attempt>) -> String {
    match attempt {
        None => "-".to_owned(),
        Some(attempt) if attempt.status == 0 => format!("done {}", attempt.time),
        Some(attempt) => format!("failed {}", attempt.time),
    }
}

fn show_verdict(verdict: Option<&Verdict>) -> String {
    match verdict {
        None => "never here".to_owned(),
        Some(verdict) if verdict.damaged == 0 => format!("all right {}", verdict.time),
        Some(verdict) => format!("DAMAGED {}", verdict.time),
    }
}

fn show_boot(booted: Option<&Booted>, now: Timestamp) -> String {
    let Some(booted) = booted else { return "-".to_owned() };
    let ago = span::show(Duration::from_secs(age(booted.time, now)));
    let word = if booted.verdict.passed { "passed" } else { "FAILED" };
    format!("{word} of {}, {ago} ago", booted.number)
}

fn show_site(output: Output, report: &SiteReport) {
    output.say(format!("tenant {} at {}", report.tenant, report.address));
    output.say(format!("  server   {}", if report.server.is_ok() { "answers" } else { "does not take us" }));
    let days = report.seconds_left / 86_400;
    output.say(format!("  expires  {} ({days} days)", report.certificate.expires.to_rfc3339()));
    if !report.vms.is_empty() {
        let header = ["VM", "POINT", "AGE", "OBJECTIVE", "LAST RESULT", "", ""];
        output.say(row(header.map(str::to_owned)));
    }
    for vm in &report.vms {
        let number = vm.done.as_ref().and_then(|done| done.number);
        let number = number.map_or_else(|| "none".to_owned(), |number| number.to_string());
        let last = show_attempt(vm.last.as_ref());
        output.say(row([
            vm.vm.to_string(),
            number,
            show_span(vm.age),
            show_span(vm.objective),
            last,
            String::new(),
            String::new(),
        ]));
    }
}
