//! The comparison: reseal beside the tools that users would pick instead, on one bootable Debian disk and its next days.
//!
//!     bench [--rounds N] [--only NAME,…] [--output FILE]     measures all, interleaved, and writes docs/BENCHMARKS.md
//!     bench live [--output FILE]                             measures live sources again, beside the last samples
//!     bench rekey [--output FILE]                            measures the rotation of keys again, likewise
//!     bench remote [--output FILE]                           measures two sites again, likewise
//!     bench tenants [--output FILE]                          measures many tenants at once again, likewise
//!     bench recovery [--output FILE]                         measures instant recovery again, likewise
//!     bench prune [--output FILE]                            measures giving back space again, likewise
//!     bench objects [--output FILE]                          measures a vault in an object store again, likewise
//!     bench report [--output FILE]                           writes the document again from the last samples
//!
//! The modules, in the order of the data's path: `plan` says what to run, `host` finds the machine, disks and programs,
//! `process` runs a program and weighs it, `contender` is what each tool can do (one module each: `reseal`, `restic`,
//! `rustic`, `borg`, `luks`, `null`), `round` takes a round's figures with `reads` and `trace`, `memory`,
//! `live`, `rekey`, `remote`, `tenants`, `recovery`, `prune` and `objects` the cases of reseal alone, `samples` keeps them, `targets` judges them, `report` writes them down.

mod borg;
mod contender;
mod fakefs;
mod host;
mod live;
mod luks;
mod memory;
mod null;
mod objects;
mod plan;
mod process;
mod prune;
mod reads;
mod recovery;
mod rekey;
mod remote;
mod report;
mod reseal;
mod restic;
mod round;
mod rustic;
mod samples;
mod targets;
mod tenants;
mod trace;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use host::Disks;
use plan::Plan;
use samples::Samples;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        // The bench starts itself for these: a file system must be a process of its own, as the others are.
        Some("null-fs") => fakefs::serve_constant(&arguments[1..]),
        Some("log-reads") => fakefs::serve_logged(&arguments[1..]),
        Some("pass-fs") => fakefs::serve_passed(&arguments[1..]),
        Some("nbd-null") => live::read_into_nothing(&arguments[1..]),
        Some("live") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, live::take)),
        Some("rekey") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, rekey::take)),
        Some("remote") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, remote::take)),
        Some("tenants") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, tenants::take)),
        Some("recovery") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, recovery::take)),
        Some("objects") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, objects::take)),
        Some("prune") => Plan::parse(&arguments[1..]).and_then(|plan| measure_again(&plan, prune::take)),
        Some("report") => {
            Plan::parse(&arguments[1..]).and_then(|plan| report::write(&plan, &Samples::load(&plan.work)?))
        }
        _ => Plan::parse(&arguments).and_then(|plan| measure(&plan)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A machine that is less idle than this, in percent, before a tool's turn does something else.
const BUSY: f64 = 90.0;

fn measure(plan: &Plan) -> Result<()> {
    host::require_root()?;
    std::fs::create_dir_all(&plan.work)?;
    host::unmount_below(&plan.work);
    let taken = measure_all(plan);
    // Also after a failure: nothing stays mounted.
    host::unmount_below(&plan.work);
    let samples = taken?;
    samples.save(&plan.work)?;
    report::write(plan, &samples)
}

fn measure_all(plan: &Plan) -> Result<Samples> {
    let disks = host::prepare(plan)?;
    let trace = trace::Trace::recorded(plan, &disks)?;
    let mut samples = Samples::begin(&disks, &trace);
    let mut contenders = contender::all(plan, &mut samples);
    for round in 0..plan.rounds {
        // Each round begins with another tool, so that none always runs on the same heels.
        let count = contenders.len().max(1);
        contenders.rotate_left(round % count);
        for contender in &mut contenders {
            if samples.failed(contender.name()) {
                continue;
            }
            eprintln!("bench: round {} of {}: {}", round + 1, plan.rounds, contender.name());
            samples.idle_percent = samples.idle_percent.min(host::idle_percent()?);
            if samples.idle_percent < BUSY {
                eprintln!("bench: others are at work on this machine: the figures will be worth little");
            }
            let began = Instant::now();
            if let Err(error) = round::take(plan, &disks, &trace, contender.as_mut(), round, &mut samples) {
                eprintln!("bench: {} left out: {error}", contender.name());
                samples.leave_out(contender.name(), &error.to_string());
            }
            eprintln!("bench: … {:.0} s", began.elapsed().as_secs_f64());
        }
        samples.save(&plan.work)?;
    }
    memory::take(plan, &disks, &mut samples)?;
    live::take(plan, &disks, &mut samples)?;
    rekey::take(plan, &disks, &mut samples)?;
    remote::take(plan, &disks, &mut samples)?;
    tenants::take(plan, &disks, &mut samples)?;
    recovery::take(plan, &disks, &mut samples)?;
    prune::take(plan, &disks, &mut samples)?;
    objects::take(plan, &disks, &mut samples)?;
    Ok(samples)
}

/// Takes the cases of reseal alone again, and keeps all else that was measured before, if anything was.
fn measure_again(plan: &Plan, take: fn(&Plan, &Disks, &mut Samples) -> Result<()>) -> Result<()> {
    host::require_root()?;
    let disks = host::prepare(plan)?;
    std::fs::create_dir_all(&plan.work)?;
    let mut samples = match Samples::load(&plan.work) {
        Ok(samples) => samples,
        Err(_) => {
            let mut samples = Samples::begin(&disks, &trace::Trace::recorded(plan, &disks)?);
            contender::all(plan, &mut samples);
            samples
        }
    };
    take(plan, &disks, &mut samples)?;
    samples.save(&plan.work)?;
    report::write(plan, &samples)
}
