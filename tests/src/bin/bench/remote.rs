//! Two sites on this machine: what the wire costs a backup, what is sent where nothing changed, and how much of a long line is used.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use reseal_tests::random::Random;
use reseal_tests::remote::{Proxy, Sites, long_line};

use crate::Result;
use crate::contender::Contender;
use crate::host::{self, Disks};
use crate::live::{Figure, median};
use crate::plan::Plan;
use crate::process;
use crate::reseal::Reseal;
use crate::samples::Samples;

/// Of the speed of a local backup.
const OF_LOCAL: f64 = 0.6;
/// Of the bytes in use, in percent.
const MOST_SENT: f64 = 0.2;
/// One way, and bytes a second.
const DELAY: Duration = Duration::from_millis(50);
const RATE: u64 = 25_000_000;
const OF_LINE: f64 = 0.8;
/// Bytes of unique data that are sent over the long line.
const UNIQUE: usize = 384 << 20;

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: two sites");
    samples.remote.clear();
    let base = disks.path("base");
    let (first, sites) = beside_local(plan, &base)?;
    samples.remote.push(first);
    samples.remote.push(unchanged(&sites, &base)?);
    samples.remote.push(long(plan)?);
    Ok(())
}

/// `reseal backup` at the source, by way of a port.
fn backup(sites: &Sites, port: u16, vm: &str, disk: &Path) -> Command {
    let enrolment = sites.enrolled(port);
    let words = [OsStr::new("--repo"), enrolment.as_os_str(), "backup".as_ref(), vm.as_ref(), disk.as_os_str()];
    sites.source.command("reseal", words)
}

/// A first backup into this machine's own vault and over the wire, in turns; and the sites of the last round.
fn beside_local(plan: &Plan, disk: &Path) -> Result<(Figure, Sites)> {
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    let mut reseal = Reseal::at(plan, "reseal-remote");
    let mut last = None;
    for _ in 0..plan.rounds.max(3) {
        host::warm(disk)?;
        reseal.renew()?;
        local.push(process::run(reseal.command().args(["backup", "web01"]).arg(disk))?.seconds);
        drop(last.take());
        let sites = Sites::new();
        remote.push(process::run(&mut backup(&sites, sites.port, "web01", disk))?.seconds);
        last = Some(sites);
    }
    let (local, remote) = (median(local), median(remote));
    let figure = Figure {
        what: "a first backup of the Debian disk over TLS on this machine, which does both ends, by the speed of the local one".to_owned(),
        bound: format!("at least {OF_LOCAL} ×"),
        measured: format!("{:.2} ×: {remote:.2} s beside {local:.2} s", local / remote),
        met: Some(local / remote >= OF_LOCAL),
    };
    Ok((figure, last.ok_or("no round was taken")?))
}

/// The same disk once more, without a word of what changed.
fn unchanged(sites: &Sites, disk: &Path) -> Result<Figure> {
    let proxy = Proxy::new(sites.port);
    let seconds = process::run(&mut backup(sites, proxy.port, "web01", disk))?.seconds;
    let used = fs::metadata(disk)?.blocks() * 512;
    let percent = proxy.sent() as f64 / used as f64 * 100.0;
    Ok(Figure {
        what: "bytes that the second backup of the unchanged disk sends, of those in use".to_owned(),
        bound: format!("under {MOST_SENT} %"),
        measured: format!("{percent:.3} %: {} KB of {} MB, in {seconds:.2} s", proxy.sent() / 1000, used / 1_000_000),
        met: Some(percent < MOST_SENT),
    })
}

/// Unique data over a line that is long and narrow, from the start of the program to its end.
fn long(plan: &Plan) -> Result<Figure> {
    let disk = plan.work.join("unique.raw");
    fs::write(&disk, Random::new(77).bytes(UNIQUE))?;
    let mut reached = Vec::new();
    for _ in 0..plan.rounds.max(3) {
        let sites = Sites::new();
        let proxy = Proxy::new(long_line(sites.port, DELAY, RATE));
        let seconds = process::run(&mut backup(&sites, proxy.port, "web01", &disk))?.seconds;
        reached.push(proxy.sent() as f64 / seconds / RATE as f64);
    }
    fs::remove_file(&disk)?;
    let reached = median(reached);
    Ok(Figure {
        what: format!(
            "a line of 100 ms there and back and 200 Mbit/s, {} MiB of unique data, from start to end",
            UNIQUE >> 20
        ),
        bound: format!("at least {:.0} % of the line", OF_LINE * 100.0),
        measured: format!("{:.0} %", reached * 100.0),
        met: Some(reached >= OF_LINE),
    })
}
