//! `boot --check`: whether a restore point boots. What became of it is kept in the vault, and nothing else of it anywhere.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use reseal_cli::{CommonArgs, Failure, Output, Status, harden, human_duration};
use reseal_format::verdict_note::{BootVerdict, Expectation};
use reseal_mountfs::boot::{BootError, Forward, Host, Machine, Network, Qemu, RunFolder, Tie};
use reseal_mountfs::boot_check::{Check, Checked};
use reseal_mountfs::journal::Journal;
use serde::Serialize;

use super::arguments::{BootArgs, failure};
use super::session::{Attended, Served, attend};

/// Who says so, in the verdict.
const PROGRAM: &str = concat!("reseal ", env!("CARGO_PKG_VERSION"));

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// Checks whether it boots: without a network, on an overlay that nobody keeps. Then the VM is ended, and what became of it is noted
    /// in the vault
    #[arg(
        long,
        conflicts_with_all = [
            "overlay", "one_time", "network", "forward", "console", "define", "print", "background", "shutdown_timeout",
        ]
    )]
    pub(super) check: bool,
    /// What the guest has to do: console:TEXT, which its serial console shows; agent, the guest agent answers; tcp:PORT, it takes a
    /// connection there, on an address that it has by DHCP
    #[arg(long, value_name = "WHAT", default_value = "console:login:", requires = "check")]
    pub(super) expect: Expectation,
    /// How long it may take
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 300,
        requires = "check",
        value_parser = clap::value_parser!(u32).range(1..=86_400)
    )]
    timeout: u32,
}

impl CheckArgs {
    /// What the guest has of a network: nothing; or, to be reached at a port, an adapter that leads nowhere else.
    pub(super) fn network(&self) -> (Network, Vec<Forward>) {
        match self.expect {
            // QEMU chooses the port on this side.
            Expectation::Tcp(guest) => {
                let host = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                (Network::User { restricted: true }, vec![Forward { host, guest }])
            }
            Expectation::Console(_) | Expectation::Agent => (Network::None, Vec::new()),
        }
    }
}

/// What `--json` says.
#[derive(Serialize)]
struct Said<'a> {
    event: &'static str,
    point: &'a str,
    passed: bool,
    expected: String,
    took_ms: u64,
    reason: Option<&'a str>,
}

/// A QEMU that is ended, however this does.
struct Ended(Qemu);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// Checks a restore point.
pub(super) fn run(common: &CommonArgs, arguments: &BootArgs) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let journal = Arc::new(Journal::new());
    let (attended, wanted) = attend(common, arguments, &journal)?;
    let Attended { opened, point, .. } = &attended;
    let name = attended.name();
    let (machine, host) = arguments.machine(point, output)?;
    let (mut served, folder) = Served::start(opened, point, arguments, &journal)?;
    let is_stopped = || wanted.end.load(Ordering::Relaxed) > 0 || wanted.is_erased.load(Ordering::Relaxed);
    let checked = watch(common, arguments, &machine, &host, &folder, is_stopped);
    match &checked {
        Ok(Some(Checked { verdict, .. })) if verdict.passed => served.reading.over(),
        // It did not boot, so what it read says nothing.
        _ => served.reading.forget(),
    }
    // Whatever became of it, nothing stays behind.
    let ended = served.end();
    let removed = folder.remove().map_err(|e| failure(&e));
    let checked = checked.map_err(|e| failure(&e))?;
    ended?;
    removed?;
    let Some(Checked { verdict, lines }) = checked else {
        return Err(Failure::new(Status::Failed, format!("the check of {name} was stopped; nothing is noted of it")));
    };
    opened.tenant.note_boot(&point.manifest, &verdict)?;
    tell(output, &name, &verdict, &lines)
}

/// Starts the VM, watches it, and ends it.
fn watch(
    common: &CommonArgs,
    arguments: &BootArgs,
    machine: &Machine,
    host: &Host,
    folder: &RunFolder,
    is_stopped: impl Fn() -> bool,
) -> Result<Option<Checked>, BootError> {
    let command = arguments.command(machine, host, folder, common.allow_swap)?;
    let tie = Tie { terminal: false, life: true };
    let mut qemu = Ended(Qemu::start(&command, folder, host.firmware.as_ref(), tie)?);
    let timeout = Duration::from_secs(arguments.check.timeout.into());
    let check = Check::begin(&mut qemu.0, folder, &arguments.check.expect, timeout)?;
    Ok(check.run(PROGRAM, is_stopped))
}

fn tell(output: Output, point: &str, verdict: &BootVerdict, lines: &[String]) -> Result<(), Failure> {
    let took = human_duration(Duration::from_millis(verdict.took_ms));
    output.json(&Said {
        event: "checked",
        point,
        passed: verdict.passed,
        expected: verdict.expected.to_string(),
        took_ms: verdict.took_ms,
        reason: verdict.reason.as_deref(),
    });
    match &verdict.reason {
        None => {
            output.say(format!("{point} boots: {} after {took}", verdict.expected));
            Ok(())
        }
        Some(reason) => {
            // What the guest says may be anybody's secret: it is for who sits here, and for no file that output goes to.
            let shown = match (lines, std::io::stderr().is_terminal()) {
                ([], _) => "its console showed nothing",
                (_, false) => "on a terminal, this command shows the last lines of its console",
                (lines, true) => {
                    lines.iter().for_each(|line| eprintln!("  {line}"));
                    "above are the last lines of its console"
                }
            };
            Err(Failure::new(Status::Failed, format!("{point} does not boot: {reason}; {shown}")))
        }
    }
}
