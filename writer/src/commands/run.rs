//! `reseal run`

use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use reseal_cli::{CommonArgs, Failure, Output, Status, human_bytes, human_duration};
use reseal_site::Enrolment;
use reseal_writer::jobs::{Command, Ended, Event, Job, JobFile, Launch, Made, Outcome, Run, Summary};
use reseal_writer::span;
use reseal_writer::status::Results;
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Arguments of `run`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which VMs are backed up from where, and how, TOML
    #[arg(value_name = "JOBS.toml")]
    file: PathBuf,
    /// Only the jobs of these names
    #[arg(value_name = "JOB")]
    jobs: Vec<String>,
    /// Only checks the file
    #[arg(long)]
    check: bool,
    /// Only says what would be done
    #[arg(long, conflicts_with = "check")]
    dry_run: bool,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let output = common.output();
    let file = JobFile::read(&args.file, &check)?;
    let objectives = file.objectives();
    let file = file.only(&args.jobs)?;
    let mut common = common.clone();
    common.repo = file.repo.clone().or(common.repo);
    if let Some(tenant) = &file.tenant {
        common.tenant = tenant.as_str().to_owned();
    }
    common.refuse_recovery_kit()?;
    common.repo()?;
    let launch = Launch { program: "/proc/self/exe".into(), common: words_of(&common) };
    if args.check {
        output.json(&json!({ "file": args.file, "jobs": file.jobs.len() }));
        output.say(format!("all right: {} jobs, {} at once", file.jobs.len(), file.parallel));
        return Ok(());
    }
    if args.dry_run {
        file.jobs.iter().for_each(|job| foretell(output, &launch, job));
        return Ok(());
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        let caught = signal_hook::flag::register(signal, stop.clone());
        caught.map_err(|e| Failure::new(Status::Failed, format!("can't catch signals: {e}")))?;
    }
    let path = std::fs::canonicalize(&args.file);
    let path = path.map_err(|e| Failure::new(Status::Usage, format!("{}: {e}", args.file.display())))?;
    let state = common.paths()?.state;
    let results = match results(&common, &state) {
        Ok(results) => Some(results),
        // Each job will say so itself, and is tried again.
        Err(failure) if failure.status == Status::Unreachable => None,
        Err(failure) => return Err(failure),
    };
    let tell = |job: &Job, event: Event<'_>| tell(output, job, &event);
    let summary = Run { path, file, objectives, launch, state: &state, results, stop: &stop, tell: &tell }.run()?;
    finish(output, summary)
}

/// Whether `backup` takes what a job says.
fn check(job: &Job) -> Result<(), String> {
    let words = ["reseal", "backup"].map(OsString::from).into_iter().chain(job.words());
    match crate::Cli::try_parse_from(words) {
        Ok(_) => Ok(()),
        // The first paragraph says what is wrong, the rest how the command is used.
        Err(e) => Err(e.to_string().split("\n\n").next().unwrap_or_default().replace('\n', " ")),
    }
}

/// What all commands take, as words.
fn words_of(common: &CommonArgs) -> Vec<OsString> {
    let mut words = Vec::new();
    let mut say = |option: &str, value: Option<OsString>| {
        if let Some(value) = value {
            words.push(OsString::from(format!("--{option}")));
            words.push(value);
        }
    };
    say("repo", common.repo.clone().map(OsString::from));
    say("tenant", Some(OsString::from(&common.tenant)));
    say("keyring", common.keyring.clone().map(PathBuf::into));
    say("keyring-passphrase-file", common.keyring_passphrase_file.clone().map(PathBuf::into));
    say("kms-config", common.kms_config.clone().map(PathBuf::into));
    say("state", common.state.clone().map(PathBuf::into));
    let flags = [("--accept-rollback", common.accept_rollback), ("--allow-swap", common.allow_swap)];
    words.extend(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| OsString::from(flag)));
    words
}

/// Where the results of the vault's VMs are kept on this machine.
fn results(common: &CommonArgs, state: &Path) -> Result<Results, Failure> {
    let repo = common.repo()?;
    match Path::new(&repo).is_file() {
        true => Ok(Results::of_site(state, &Enrolment::read(Path::new(&repo))?)),
        false => Ok(Results::of_tenant(state, &common.find(&common.tenant()?)?.record.scope())),
    }
}

fn foretell(output: Output, launch: &Launch, job: &Job) {
    let policy = &job.policy;
    let backup: Vec<_> = launch.common.iter().cloned().chain(["backup".into()]).chain(job.words()).collect();
    let backup: Vec<_> = backup.iter().map(|word| word.to_string_lossy()).collect();
    let words = |command: &Option<Command>| command.as_ref().map(|command| command.words.clone());
    output.json(&json!({
        "job": job.name, "vm": job.vm, "before": words(&policy.before), "backup": backup, "after": words(&policy.after),
        "objective": policy.objective, "retries": policy.retries,
    }));
    let quoted = |words: &[String]| words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" ");
    let mut text = format!("{}:", job.name);
    let mut line = |what: &str, words: String| text.push_str(&format!("\n  {what:<8} {words}"));
    if let Some(command) = &policy.before {
        line("before", quoted(&command.words));
    }
    line("backup", quoted(&backup.iter().map(|word| format!("{word}")).collect::<Vec<_>>()));
    if let Some(command) = &policy.after {
        line("after", quoted(&command.words));
    }
    line("retries", format!("{}, the first after {}", policy.retries, span::show(policy.retry_pause)));
    output.say(text);
}

/// An event as `--json` prints it, one a line. Stable: fields are only ever added.
fn tell(output: Output, job: &Job, event: &Event<'_>) {
    let document = |event: &str, more: Value| {
        let mut document = json!({ "event": event, "job": job.name, "vm": job.vm });
        if let (Some(document), Value::Object(more)) = (document.as_object_mut(), more) {
            document.extend(more);
        }
        output.json(&document);
    };
    match event {
        Event::Begun => document("begun", json!({})),
        Event::Warned(warning) => {
            document("warning", json!({ "message": warning }));
            output.warn(format!("{}: {warning}", job.name));
        }
        Event::Again { failure, pause } => {
            document("again", json!({ "message": failure.message, "pause": pause.as_secs() }));
            output.warn(format!("{}: {}; trying again in {}", job.name, failure.message, span::show(*pause)));
        }
        Event::Ended(ended) => {
            let failure = ended.failure();
            let point = match &ended.outcome {
                Outcome::Done(made) => made.point.clone(),
                _ => Value::Null,
            };
            document(
                "ended",
                json!({
                    "result": ended.outcome.word(),
                    "status": failure.map_or(0, |failure| failure.status as u8),
                    "message": failure.map(|failure| &failure.message),
                    "attempts": ended.attempts,
                    "duration_ms": u64::try_from(ended.took.as_millis()).unwrap_or(u64::MAX),
                    "point": point,
                }),
            );
            say(output, job, ended);
        }
    }
}

fn say(output: Output, job: &Job, ended: &Ended) {
    let name = &job.name;
    match &ended.outcome {
        Outcome::Done(made) => output.say(format!("{name}: {}, in {}", point(job, made), human_duration(ended.took))),
        Outcome::Failed(failure) => {
            let attempts =
                if ended.attempts > 1 { format!(" after {} attempts", ended.attempts) } else { String::new() };
            output.complain(format!("{name}: FAILED{attempts}: {}", failure.message));
        }
        Outcome::Skipped(failure) => output.complain(format!("{name}: SKIPPED: {}", failure.message)),
    }
    if let Some(failure) = &ended.after {
        output.complain(format!("{name}: {}", failure.message));
    }
}

fn point(job: &Job, made: &Made) -> String {
    let point = &made.point;
    let mut text = format!("{}@{}", job.vm, point["number"]);
    if let Some(time) = point["time"].as_str() {
        let _ = write!(text, " {time}");
    }
    for (nth, what) in ["read", "changed", "new", "stored", "sent"].iter().enumerate() {
        if let Some(bytes) = point["stats"][what].as_u64() {
            let _ = write!(text, "{} {what} {}", if nth == 0 { ":" } else { "," }, human_bytes(bytes));
        }
    }
    text
}

fn finish(output: Output, summary: Summary) -> Result<(), Failure> {
    let Summary { done, failed, skipped, worst } = summary;
    let status = worst.map_or(0, |status| status as u8);
    output.json(&json!({ "event": "summary", "done": done, "failed": failed, "skipped": skipped, "status": status }));
    match worst {
        None => output.say(format!("all {done} jobs are done")),
        Some(status) => {
            let message = format!("{done} jobs are done, {failed} failed, {skipped} were skipped");
            return Err(Failure::new(status, message));
        }
    }
    Ok(())
}
