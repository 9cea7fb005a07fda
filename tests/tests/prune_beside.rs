//! Writers, a prune, copies and mounts at once, for a while: nobody is in anybody's way, and nothing that should be there is missed.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reseal_tests::beside::{Made, Seen, StopOnDrop, is_forgotten, read_mounted, write};
use reseal_tests::random::{Random, soak};
use reseal_tests::site::Site;

/// Seconds; ten times as long for each unit of a soak. On a busy machine up to so many times as long, until enough has happened.
const TIME: u64 = 20;
const LONGER: u32 = 6;
const NAP: Duration = Duration::from_millis(50);
/// How long a reader waits until what he reads was forgotten, and then until that was pruned.
const PATIENCE: Duration = Duration::from_secs(10);

/// Until it is told to stop.
fn again(stop: &AtomicBool, mut what: impl FnMut()) {
    while !stop.load(Ordering::Relaxed) {
        what();
    }
}

/// Waits for something, but not for long, nor when all is over; whether it has come.
fn comes(stop: &AtomicBool, what: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while !what() {
        if stop.load(Ordering::Relaxed) || began.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(NAP);
    }
    true
}

#[test]
fn writers_prunes_copies_and_mounts_go_on_beside_each_other() {
    let (site, other) = (Site::new(), Site::new());
    let (stop, made) = (AtomicBool::new(false), Made::default());
    let (stop, made) = (&stop, &made);
    let counts = [(); 4].map(|()| AtomicU32::new(0));
    let [prunes, freed, read, outlived] = &counts;
    // Prunes that freed something, mounts that were read, and some of these of what had been forgotten and pruned by then.
    let happened = || [freed, read, outlived].map(|count| count.load(Ordering::Relaxed));
    let is_enough = || made.count() > 5 && happened().iter().zip([1, 2, 0]).all(|(count, least)| *count > least);
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
        scope.spawn(move || {
            let _ended = ended_too;
            again(stop, || {
                let run = pruner.reseal(["prune", "--json", "--grace", "60s", "--min-unused", "10"]);
                // What was made and forgotten while it waited it can't tell of: it says so, removes nothing, and is to be run again.
                if run.status == Some(1) {
                    run.fails(1, &["the vault was changed while it was pruned"]);
                    return;
                }
                let pruned = run.ok().json();
                assert_eq!(pruned["fenced"], serde_json::json!([]));
                freed.fetch_add(u32::from(pruned["freed"].as_u64().unwrap() > 0), Ordering::Relaxed);
                prunes.fetch_add(1, Ordering::Relaxed);
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
            let (tenant, mut random) = (reader.tenant(), Random::new(5));
            again(stop, || {
                // Three stay, of which the oldest is the next to be forgotten: that one is held open until it is, and pruned.
                let newer = random.index(3);
                let folder = format!("mnt-{}", random.number());
                let Some(number) = made.recent("a", newer) else { return thread::sleep(NAP) };
                let mut was_pruned = false;
                let meanwhile = || {
                    if newer == 2 && comes(stop, || is_forgotten(&tenant, "a", number)) {
                        // One that had begun before does not count.
                        let before = prunes.load(Ordering::Relaxed);
                        was_pruned = comes(stop, || prunes.load(Ordering::Relaxed) > before + 1);
                    }
                };
                match read_mounted(reader, made, ("a", number), &folder, meanwhile) {
                    Seen::Right => {
                        read.fetch_add(1, Ordering::Relaxed);
                        outlived.fetch_add(u32::from(was_pruned), Ordering::Relaxed);
                    }
                    Seen::Forgotten => {}
                    Seen::Late => panic!("a@{number} was not mounted in time"),
                }
            });
        });
        let (began, time) = (Instant::now(), Duration::from_secs(TIME * u64::from(soak())));
        let is_over = || began.elapsed() > time && (is_enough() || began.elapsed() > time * LONGER);
        while !stop.load(Ordering::Relaxed) && !is_over() {
            thread::sleep(NAP);
        }
        stop.store(true, Ordering::Relaxed);
    });
    site.verify();
    other.verify();
    site.reseal(["prune", "--min-unused", "1"]).ok();
    site.verify();
    let (points, copies) = (made.check(&site), made.check_copies(&other));
    let [freed, read, outlived] = happened();
    let what = format!(
        "{} backups, {freed} prunes that freed something, {read} mounts that were read, {outlived} of them of what was forgotten \
         and pruned meanwhile; {points} points and {copies} copies stay",
        made.count()
    );
    eprintln!("{what}");
    assert!(is_enough() && points > 0 && copies > 0, "{what}");
}
