//! Space that is given back: what that reads of a long chain of which most was forgotten, and what memory it takes where there is much.

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use reseal_tests::process::Running;
use reseal_tests::random::Random;
use reseal_tests::site::{Site, files_below};
use reseal_tests::synthetic::Synthetic;
use serde_json::Value;

use crate::Result;
use crate::host::Disks;
use crate::live::Figure;
use crate::plan::Plan;
use crate::process;
use crate::samples::Samples;

/// Restore points of the chain, and how many of them stay.
const POINTS: usize = 1000;
const STAY: usize = 100;
/// Clusters of its disk, and how many are others in each point: in runs, nine of ten in a tenth of the disk.
const CLUSTERS: usize = 160 * 1024;
const CHANGED: usize = 64;
const RUN: usize = 8;
/// Bytes of a cluster as it is stored: what half of the Debian disk's are.
const STORED: usize = 24 << 10;
/// Of what is stored it may read so much, in percent.
const MOST_READ: f64 = 5.0;

/// Clusters of the large tenant, each of so few bytes that what is about them is most.
const LARGE: usize = 10_000_000;
const SMALL: usize = 32;
const MOST_MIB: f64 = 300.0;

pub(crate) fn take(_: &Plan, _: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: pruning");
    samples.prune.clear();
    samples.prune.extend(chain()?);
    samples.prune.push(large()?);
    Ok(())
}

fn bytes(site: &Site) -> Result<u64> {
    files_below(&site.vault).iter().map(|path| Ok(fs::metadata(path)?.len())).sum()
}

/// What a prune took.
struct Cost {
    report: Value,
    /// Bytes, of files and of all else.
    read: u64,
    seconds: f64,
    peak_mib: f64,
}

fn pruned(site: &Site, arguments: &[&str]) -> Result<Cost> {
    let began = Instant::now();
    let running: Running = site.start([&["prune", "--json"], arguments].concat());
    let peak_mib = process::peak_until_end(&running);
    let seconds = began.elapsed().as_secs_f64();
    // It was not waited for yet, so the kernel still knows.
    let io = fs::read_to_string(format!("/proc/{}/io", running.id()))?;
    let read =
        io.lines().find_map(|line| line.strip_prefix("rchar: ")).ok_or("the kernel does not count what is read")?;
    let read = read.trim().parse()?;
    Ok(Cost { report: running.wait().ok().json(), read, seconds, peak_mib })
}

fn chain() -> Result<Vec<Figure>> {
    let site = Site::new();
    let mut vm = Synthetic::new(site.tenant(), "web", CLUSTERS, STORED);
    let mut random = Random::new(7);
    vm.point((0..CLUSTERS).step_by(4));
    for _ in 1..POINTS {
        let runs = (0..CHANGED / RUN).map(|_| {
            let part = if random.below(10) == 0 { CLUSTERS } else { CLUSTERS / 10 };
            random.index(part - RUN)
        });
        let changed: BTreeSet<usize> = runs.flat_map(|from| from..from + RUN).collect();
        vm.point(changed);
    }
    let before = bytes(&site)?;
    site.reseal(["forget", "web", "--keep-last", &STAY.to_string()]).ok();
    let Cost { report, read, seconds, peak_mib } = pruned(&site, &[])?;
    let percent = read as f64 * 100.0 / before as f64;
    let after = bytes(&site)?;
    let rest = pruned(&site, &["--max-rewrite", "all"])?;
    let rewritten = bytes(&site)?;
    let again = pruned(&site, &[])?;
    // The same with one more restore point.
    vm.point(0..CHANGED);
    let one_more = pruned(&site, &[])?;
    let of_after = |read: u64| read as f64 * 100.0 / rewritten as f64;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    Ok(vec![
        Figure {
            what: format!(
                "`prune` of a chain of {POINTS} restore points of which {} were forgotten: what it reads",
                POINTS - STAY
            ),
            bound: format!("at most {MOST_READ:.0} % of what is stored"),
            measured: format!("{percent:.2} %"),
            met: Some(percent <= MOST_READ),
        },
        Figure {
            what: "… what it frees, and how long it takes".to_owned(),
            bound: "reported".to_owned(),
            measured: format!(
                "{:.2} of {:.2} GiB, {} packs removed and {} rewritten, in {seconds:.1} s; peak memory {peak_mib:.0} MiB",
                gib(before - after),
                gib(before),
                report["removed"],
                report["rewritten"]
            ),
            met: None,
        },
        Figure {
            what: "… the rest with `--max-rewrite all`".to_owned(),
            bound: "reported".to_owned(),
            measured: format!(
                "{:.2} GiB more, {} packs rewritten, in {:.1} s, {:.1} % read",
                gib(after - rewritten),
                rest.report["rewritten"],
                rest.seconds,
                rest.read as f64 * 100.0 / before as f64
            ),
            met: None,
        },
        Figure {
            what: "… and when there is nothing to do: manifests, index nodes and tables are read again".to_owned(),
            bound: "reported".to_owned(),
            measured: format!(
                "{:.2} s, {:.2} % read; after one more restore point {:.2} s, {:.2} %",
                again.seconds,
                of_after(again.read),
                one_more.seconds,
                of_after(one_more.read)
            ),
            met: None,
        },
    ])
}

fn large() -> Result<Figure> {
    let site = Site::new();
    let mut vm = Synthetic::new(site.tenant(), "web", LARGE, SMALL);
    vm.point(0..LARGE);
    // Half of it in pieces all over, so that each pack is to be rewritten.
    vm.point((0..LARGE).filter(|cluster| cluster % 8 < 5));
    drop(vm);
    site.reseal(["forget", "web@1"]).ok();
    let Cost { report, seconds, peak_mib: mib, .. } = pruned(&site, &["--max-rewrite", "all"])?;
    Ok(Figure {
        what: format!("`prune` of a tenant of {} million clusters: peak memory", LARGE / 1_000_000),
        bound: format!("at most {MOST_MIB:.0} MiB"),
        measured: format!(
            "{mib:.0} MiB; {} packs removed and {} rewritten in {seconds:.1} s",
            report["removed"], report["rewritten"]
        ),
        met: Some(mib <= MOST_MIB),
    })
}
