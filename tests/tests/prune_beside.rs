//! Writers, a prune, copies and mounts at once, for a while: nobody is in anybody's way, and nothing that should be there is missed.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reseal_tests::beside::{StopOnDrop, write};
use reseal_tests::library::vm;
use reseal_tests::mounting::Mounted;
use reseal_tests::random::{Random, soak};
use reseal_tests::site::Site;
use reseal_vault::Points;

const MIB: usize = 1 << 20;
/// Seconds; ten times as long for each unit of a soak.
const TIME: u64 = 20;

/// Until it is told to stop.
fn again(stop: &AtomicBool, mut what: impl FnMut()) {
    while !stop.load(Ordering::Relaxed) {
        what();
    }
}

#[test]
fn writers_prunes_copies_and_mounts_go_on_beside_each_other() {
    let (site, other) = (Site::new(), Site::new());
    let (stop, made) = (AtomicBool::new(false), AtomicU32::new(0));
    let (stop, made) = (&stop, &made);
    let freed = AtomicU32::new(0);
    thread::scope(|scope| {
        // One that fails ends the others.
        let ended = || StopOnDrop(stop);
        for (nth, name) in ["a", "b"].into_iter().enumerate() {
            let (site, ended) = (&site, ended());
            scope.spawn(move || {
                let _ended = ended;
                write(site, name, 4, nth as u64, stop, made);
            });
        }
        let (pruner, ended_too) = (&site, ended());
        let freed = &freed;
        scope.spawn(move || {
            let _ended = ended_too;
            again(stop, || {
                let pruned = pruner.reseal(["prune", "--json", "--grace", "60s", "--min-unused", "10"]).ok().json();
                assert_eq!(pruned["fenced"], serde_json::json!([]));
                freed.fetch_add(u32::from(pruned["freed"].as_u64().unwrap() > 0), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(200));
            });
        });
        let (copier, target, ended_too) = (&site, &other, ended());
        scope.spawn(move || {
            let _ended = ended_too;
            again(stop, || {
                let to = ["--to", target.vault.to_str().unwrap(), "--to-keyring", target.keyring.to_str().unwrap()];
                copier.reseal([&["copy"], &to[..]].concat()).ok();
                target.reseal(["forget", "--all", "--keep-last", "2"]).ok();
                target.reseal(["prune", "--grace", "60s"]).ok();
                thread::sleep(Duration::from_millis(300));
            });
        });
        let (reader, ended_too) = (&site, ended());
        scope.spawn(move || {
            let _ended = ended_too;
            let mut random = Random::new(5);
            again(stop, || {
                let tenant = reader.tenant();
                let Some(number) = tenant.chain(&vm("a")).unwrap().live().next_back() else { return };
                let point = format!("a@{number}");
                // It may be forgotten before it is mounted.
                let Ok(mounted) = Mounted::try_new(reader, &format!("mnt-{}", random.number()), &[&point]) else {
                    return;
                };
                let Ok(Some(newest)) = tenant.newest_point(&vm("a"), &tenant.chain(&vm("a")).unwrap()) else { return };
                let disk = mounted.path.join(format!("a/{}/disk-0.raw", newest.manifest.created));
                if let Ok(read) = fs::read(disk) {
                    assert_eq!(read.len(), 4 * MIB);
                }
            });
        });
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(TIME * u64::from(soak())) && !stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
    site.verify();
    other.verify();
    site.reseal(["prune", "--min-unused", "1"]).ok();
    site.verify();
    let (made, freed) = (made.load(Ordering::Relaxed), freed.load(Ordering::Relaxed));
    eprintln!("{made} backups beside {freed} prunes that freed something");
    assert!(made > 5 && freed > 1, "{made} backups beside {freed} prunes that freed something");
}
