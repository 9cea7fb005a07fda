//! Many tenants send at once to one server: whether it serves them alike, and what memory it takes.

use std::fs;
use std::thread;
use std::time::Instant;

use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, Identity, Sites};

use crate::Result;
use crate::host::Disks;
use crate::live::Figure;
use crate::plan::Plan;
use crate::samples::Samples;

const TENANTS: usize = 50;
/// What each sends: enough that starting a program is a small part of it.
const DISK: usize = 32 << 20;
/// How many times as long as the fastest the slowest may take.
const MOST: f64 = 3.0;

pub(crate) fn take(_: &Plan, _: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: many tenants");
    samples.tenants.clear();
    let authority = Authority::new();
    let names: Vec<String> = (0..TENANTS).map(|nth| format!("tenant-{nth}")).collect();
    let identities: Vec<Identity> = names.iter().map(|_| authority.issue(|_| {})).collect();
    let clients: Vec<_> =
        names.iter().zip(&identities).map(|(name, of)| (of.clone(), name.as_str(), "append", "[\"*\"]")).collect();
    let mut sites = Sites::configured(authority, &clients, "", &|target| {
        names.iter().for_each(|name| drop(target.reseal(["tenant", "add", name, "--no-recovery"]).ok()));
    });
    let mut words = Vec::new();
    for (nth, identity) in identities.iter().enumerate() {
        let disk = sites.source.disk(&format!("disk-{nth}"));
        fs::write(&disk, Random::new(nth as u64).bytes(DISK))?;
        let enrolment = sites.enrolment(&format!("{nth}.reseal"), identity, &sites.authority, sites.port);
        words.push([enrolment.display().to_string(), disk.display().to_string()]);
    }
    let source = &sites.source;
    let began = Instant::now();
    let seconds: Vec<f64> = thread::scope(|scope| {
        let one = |[enrolment, disk]: &[String; 2]| {
            let running = source.start(["--repo", enrolment, "--json", "backup", "vm", disk]);
            scope.spawn(move || {
                running.wait().ok();
                began.elapsed().as_secs_f64()
            })
        };
        let sources: Vec<_> = words.iter().map(one).collect();
        sources.into_iter().map(|source| source.join().map_err(|_| "a source failed".into())).collect::<Result<_>>()
    })?;
    let (fastest, slowest) =
        (seconds.iter().copied().fold(f64::MAX, f64::min), seconds.iter().copied().fold(0.0, f64::max));
    let peak = sites.stop().ok().peak_kib >> 10;
    samples.tenants.push(Figure {
        what: format!("{TENANTS} tenants send {} MiB each at once, sources and server on this machine", DISK >> 20),
        bound: format!("the slowest at most {MOST:.0} × the fastest"),
        measured: format!("{fastest:.1} s to {slowest:.1} s, {:.2} ×", slowest / fastest),
        met: Some(slowest <= MOST * fastest),
    });
    samples.tenants.push(Figure {
        what: "memory of the server meanwhile, at most".into(),
        bound: "reported".into(),
        measured: format!("{peak} MiB"),
        met: None,
    });
    Ok(())
}
