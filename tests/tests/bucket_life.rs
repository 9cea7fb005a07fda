//! Those who work on a vault in an object store: who dies, stands still, is cut off, or comes by another way.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use reseal_format::hold_note::Hold;
use reseal_tests::beside::{Made, Seen, StopOnDrop, read_mounted, unchanged, until_done, write};
use reseal_tests::faults::{Operation, Watched};
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::model::ReadDisk as _;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Running, signal};
use reseal_tests::random::{Random, soak};
use reseal_tests::remote::{Authority, Sites};
use reseal_tests::s3_proxy::S3Proxy;
use reseal_tests::seaweed::{Seaweed, shared};
use reseal_tests::site::{Site, files_below};
use serde_json::json;

const MIB: usize = 1 << 20;
/// Seconds in which everything happens at once; and those of a soak, ten times so many for each of its units: half an hour. On a busy
/// machine up to so many times as long, until enough has happened.
const TIME: u64 = 60;
const SOAK: u64 = 180;
const LONGER: u32 = 3;

fn content(seed: u64, mib: usize) -> Vec<u8> {
    Random::new(seed).bytes(mib * MIB)
}

fn backup(site: &Site, name: &str, content: &[u8]) -> serde_json::Value {
    let disk = site.disk(name);
    fs::write(&disk, content).unwrap();
    site.backup(name, &disk)
}

#[track_caller]
fn read(site: &Site, name: &str, number: u32, wanted: &[u8]) {
    let read = LibraryDisk::open(&site.tenant(), name, number, "disk-0").unwrap().all().unwrap();
    assert!(read == wanted, "{name}@{number} differs");
}

#[test]
fn a_mount_keeps_what_it_read_and_believes_nothing_of_it() {
    let seaweed = shared();
    let proxy = S3Proxy::before(seaweed.port());
    let mut site = seaweed.site_at("mounts", proxy.port());
    let cache = site.path("cache");
    site.variables.insert("RESEAL_STORE_CACHE".into(), cache.to_str().unwrap().into());
    site.reseal(["init", "--no-recovery"]).ok();
    let disk = content(1, 24);
    backup(&site, "web", &disk);
    let whole = |name: &str| {
        let mounted = Mounted::new(&site, name, &[]);
        let file = mounted.disk(&site, "web", 1, "disk-0");
        let (before, _) = proxy.count();
        let mut bytes = vec![0; disk.len()];
        file.read(0, &mut bytes);
        assert!(bytes == disk, "{name}");
        drop(file);
        let asked = proxy.count().0 - before;
        mounted.umount(&site).ok();
        asked
    };
    let cold = whole("cold");
    assert!(cold < 100, "neighbours are read together: {cold} requests for 384 clusters");
    let kept: u64 = files_below(&cache).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(kept > disk.len() as u64, "all of it is kept: {kept}");
    assert!(files_below(&cache).iter().all(|path| !contains(&fs::read(path).unwrap(), &disk[MIB..MIB + 64])));
    let warm = whole("warm");
    assert!(warm <= 2, "it outlives the process: {warm}");
    // Rot, a file of something else, and one that is cut.
    let mut random = Random::new(4);
    for (nth, path) in files_below(&cache).into_iter().enumerate() {
        let mut file = fs::File::options().read(true).write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        for _ in 0..40 {
            let at = random.below(length.max(1));
            let mut byte = [0];
            file.seek(SeekFrom::Start(at)).unwrap();
            file.read_exact(&mut byte).unwrap();
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(&[byte[0] ^ 0x10]).unwrap();
        }
        if nth % 2 == 1 {
            file.set_len(length / 2).unwrap();
        }
    }
    let rotten = whole("rotten");
    assert!(rotten > warm, "what is not as it was is asked for again: {rotten}");
    // Without a place for it everything works as well.
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, "no folder").unwrap();
    assert!(whole("none") > 10);
    fs::remove_file(&cache).unwrap();
    site.variables.insert("RESEAL_STORE_CACHE_SIZE".into(), "1M".into());
    let mounted = Mounted::new(&site, "small", &[]);
    let mut bytes = vec![0; disk.len()];
    mounted.disk(&site, "web", 1, "disk-0").read(0, &mut bytes);
    assert!(bytes == disk);
    let blocks = |path: &std::path::PathBuf| std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
    let kept: u64 = files_below(&cache).iter().map(|path| blocks(path) * 512).sum();
    assert!(kept < 8 * MIB as u64, "{kept}");
    mounted.umount(&site).ok();
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// A backup that goes on until it is told.
fn slow_backup(site: &Site, name: &str, content: &[u8]) -> Running {
    let disk = site.disk(name);
    fs::write(&disk, content).unwrap();
    let running = site.start(["backup", name, "--limit-rate", "1M", disk.to_str().unwrap()]);
    let lease =
        || site.tenant().leases().unwrap().iter().any(|held| held.to_string().contains(&format!("backup of {name}")));
    let began = Instant::now();
    while !lease() {
        assert!(began.elapsed() < Duration::from_secs(20) && !running.has_ended(), "it does not begin");
        sleep(Duration::from_millis(50));
    }
    sleep(Duration::from_secs(2));
    running
}

#[test]
fn who_stands_still_is_fenced_and_who_died_is_not_waited_for_long() {
    let site = shared().site("still");
    let known = content(1, 2);
    backup(&site, "old", &known);
    site.reseal(["forget", "old@1"]).ok();
    let stopped = slow_backup(&site, "stopped", &[&known[..], &content(5, 8)].concat());
    let killed = slow_backup(&site, "killed", &[&known[..], &content(6, 8)].concat());
    signal(stopped.id(), libc::SIGSTOP);
    killed.kill();
    // The grace is a day, but nothing is heard of them.
    let began = Instant::now();
    let run = site.reseal(["prune", "--json"]).ok();
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    let pruned = run.json();
    let mut fenced: Vec<_> =
        pruned["fenced"].as_array().unwrap().iter().map(|of| of.as_str().unwrap().to_owned()).collect();
    fenced.sort();
    assert_eq!(fenced, ["killed@1", "stopped@1"], "{run:#?}");
    assert!(pruned["freed"].as_u64().unwrap() >= 2 * MIB as u64 && run.stderr.contains("not heard of"), "{run:#?}");
    signal(stopped.id(), libc::SIGCONT);
    let ended = stopped.wait().expect(&[1]);
    assert!(ended.stderr.contains("lease") || ended.stderr.contains("prune gave up"), "{ended:#?}");
    site.verify();
    assert!(site.tenant().leases().unwrap().is_empty());
    assert_eq!(backup(&site, "stopped", &known)["number"], 2);
    site.verify();
}

#[test]
fn a_prune_that_stood_still_does_nothing_any_more() {
    let site = shared().site("pruning");
    for seed in 1..6 {
        backup(&site, "web", &content(seed, 2));
    }
    site.reseal(["forget", "web", "--keep-last", "1"]).ok();
    // One that waits for somebody who is at work, so that it can be stopped.
    let slow = slow_backup(&site, "slow", &content(9, 14));
    let prune = site.start(["prune"]);
    sleep(Duration::from_secs(3));
    signal(prune.id(), libc::SIGSTOP);
    slow.wait().ok();
    sleep(Duration::from_secs(10));
    let pruned = site.reseal(["prune", "--json"]).ok().json();
    assert!(pruned["freed"].as_u64().unwrap() > 7 * MIB as u64, "{pruned}");
    signal(prune.id(), libc::SIGCONT);
    prune.wait().fails(1, &["lease", "lost", "begin again"]);
    site.verify();
    read(&site, "web", 5, &content(5, 2));
    read(&site, "slow", 1, &content(9, 14));
}

/// Somebody has ended the leases of one who stood still just before he made something: by then the keys may be others.
#[test]
fn what_was_made_under_a_lease_that_was_ended_is_taken_back() {
    let site = shared().site("taken");
    backup(&site, "web", &content(1, 1));
    let store = Arc::new(Watched::new(site.store()));
    let tenant = site.tenant_in(store.clone()).unwrap();
    let elsewhere = site.store();
    store.meanwhile(move |operation, key| {
        if operation == Operation::Finish && (key.ends_with(".note") || key.ends_with(".forgotten")) {
            let folder = "tenants/default/leases/";
            elsewhere
                .list(folder)
                .unwrap()
                .iter()
                .for_each(|lease| elsewhere.delete(&format!("{folder}{}", lease.name)).unwrap());
        }
    });
    let point = tenant.point(&vm("web"), 1).unwrap();
    let held = tenant.set_hold(&point.manifest, &Hold { held: true, reason: None }).unwrap_err();
    assert!(held.to_string().contains("was lost"), "{held}");
    let forgotten = tenant.forgetting().unwrap().forget(&point, "a test").unwrap_err();
    assert!(forgotten.to_string().contains("was lost"), "{forgotten}");
    let left = |folder: &str| site.store().list(folder).unwrap().into_iter().filter(|entry| !entry.is_folder).count();
    assert_eq!((left("tenants/default/vms/web/"), left("tenants/default/vms/web/notes/")), (1, 0));
    site.verify();
    site.reseal(["forget", "web@1"]).ok();
}

#[test]
fn copies_go_to_a_bucket_and_come_back() {
    let (site, other) = (shared().site("second"), Site::new());
    backup(&other, "web", &content(1, 3));
    backup(&other, "web", &[content(2, 1), content(1, 3)[MIB..].to_vec()].concat());
    let copy = |from: &Site, to: &Site| {
        let mut command = from.command(
            "reseal",
            ["copy", "--to", to.vault.to_str().unwrap(), "--to-keyring", to.keyring.to_str().unwrap()],
        );
        reseal_tests::process::run(command.envs(&site.variables)).ok();
    };
    copy(&other, &site);
    site.verify();
    read(&site, "web", 2, &[content(2, 1), content(1, 3)[MIB..].to_vec()].concat());
    let third = Site::new();
    copy(&site, &third);
    third.verify();
    read(&third, "web", 1, &content(1, 3));
    // Mended from the bucket.
    let pack = third.packs(1).remove(0);
    fs::remove_file(third.vault.join(pack)).unwrap();
    let words =
        ["verify", "--repair-from", site.vault.to_str().unwrap(), "--repair-keyring", site.keyring.to_str().unwrap()];
    let mut command = third.command("reseal", words);
    reseal_tests::process::run(command.envs(&site.variables)).ok();
    third.verify();
    read(&third, "web", 1, &content(1, 3));
}

#[test]
fn a_prune_asks_for_what_is_new_since_the_one_before() {
    let seaweed = shared();
    let proxy = S3Proxy::before(seaweed.port());
    let mut site = seaweed.site_at("prunes", proxy.port());
    let cache = site.path("cache");
    site.variables.insert("RESEAL_STORE_CACHE".into(), cache.to_str().unwrap().into());
    // No lease is renewed meanwhile: that is a request, too.
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "600".into());
    site.reseal(["init", "--no-recovery"]).ok();
    let mut disk = content(1, 8);
    for nth in 0..8 {
        disk[nth * MIB..][..MIB / 2].copy_from_slice(&content(100 + nth as u64, 1)[..MIB / 2]);
        backup(&site, "web", &disk);
    }
    let prune = || {
        let before = proxy.count().0;
        site.reseal(["prune", "--json"]).ok();
        proxy.count().0 - before
    };
    let (first, second) = (prune(), prune());
    // Each of 16 packs has a table, and index nodes of half of them are read; what is left are listings, and the manifests.
    assert!(first > second + 12, "{first} requests, then {second}");
    disk[7 * MIB..].copy_from_slice(&content(9, 1));
    backup(&site, "web", &disk);
    let third = prune();
    assert!(third < second + 12, "{first} requests, then {second}, then {third}");
    // What is kept is not believed: behind what a file says of itself, all is others' bytes.
    for path in files_below(&cache) {
        let length = path.metadata().unwrap().len();
        let file = fs::File::options().write(true).open(&path).unwrap();
        (8192..length).step_by(512).for_each(|at| file.write_all_at(&[0x55], at).unwrap());
    }
    site.reseal(["forget", "web", "--keep-last", "2"]).ok();
    let pruned = site.reseal(["prune", "--json", "--min-unused", "1"]).ok().json();
    assert!(pruned["freed"].as_u64().unwrap() > MIB as u64 && pruned["bad_packs"] == json!({}), "{pruned}");
    site.verify();
    read(&site, "web", 9, &disk);
}

#[test]
fn another_site_sends_to_a_vault_in_a_bucket() {
    let authority = Authority::new();
    let client = authority.issue(|_| {});
    let clients = [(client, "default", "append", "[\"*\"]")];
    let mut sites = Sites::at(shared().site("served"), authority, &clients, "");
    let disk = sites.source.disk("web");
    for seed in 1..4 {
        fs::write(&disk, [content(seed, 1), content(77, 3)].concat()).unwrap();
        let words = sites.words(sites.port, "web", &[disk.to_str().unwrap()]);
        sites.source.reseal(words).ok();
    }
    sites.stop().ok();
    sites.target.verify();
    read(&sites.target, "web", 2, &[content(2, 1), content(77, 3)].concat());
}

#[test]
fn a_store_that_fails_now_and_then_is_asked_again() {
    let seaweed = shared();
    let proxy = S3Proxy::before(seaweed.port());
    let mut site = seaweed.site_at("moody", proxy.port());
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "30".into());
    proxy.faults(60);
    site.reseal(["init", "--no-recovery"]).ok();
    for seed in 1..5 {
        backup(&site, "web", &[content(seed, 1), content(99, 4)].concat());
        if seed > 2 {
            site.reseal(["forget".to_owned(), format!("web@{}", seed - 1)]).ok();
            site.reseal(["prune", "--min-unused", "1"]).ok();
        }
    }
    site.verify();
    let mounted = Mounted::new(&site, "mnt", &[]);
    let mut bytes = vec![0; 5 * MIB];
    mounted.disk(&site, "web", 4, "disk-0").read(0, &mut bytes);
    assert!(bytes == [content(4, 1), content(99, 4)].concat());
    mounted.umount(&site).ok();
    let (requests, met) = proxy.count();
    assert!(met > 10, "{met} of {requests} requests met a fault");
}

/// Prunes. While it waits for one who left his lease, others may make and forget a point.
fn pruned(site: &Site, min_unused: &str) -> serde_json::Value {
    let words = ["prune", "--json", "--min-unused", min_unused];
    until_done(site, &words, &["is at work", "run it again"], Duration::from_secs(90)).json()
}

#[test]
fn two_writers_a_prune_and_a_mount_go_on_while_the_engine_is_killed_and_started_again() {
    let seaweed = Seaweed::start();
    let mut site = seaweed.site("busy");
    // A command that ends while the engine is away leaves its lease, and a prune waits that long; live ones must survive a restart.
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "25".into());
    let cache = site.path("cache");
    site.variables.insert("RESEAL_STORE_CACHE".into(), cache.to_str().unwrap().into());
    // One restore point that nobody forgets, of what the others have at first, and write over and forget.
    let kept = unchanged(3);
    assert_eq!(backup(&site, "kept", &kept)["number"], 1);
    let (stop, made) = (AtomicBool::new(false), Made::default());
    made.add("kept", 1, &kept);
    let [freed, of_kept, of_others, kills, restarts] = &[(); 5].map(|()| AtomicU32::new(0));
    let (site, stop, made) = (&site, &stop, &made);
    let happened = || [freed, of_kept, of_others, restarts].map(|count| count.load(Ordering::Relaxed));
    let is_enough = || made.count() > 6 && happened().iter().all(|count| *count > 1);
    thread::scope(|scope| {
        for (nth, name) in ["a", "b"].into_iter().enumerate() {
            scope.spawn(move || {
                let _ended = StopOnDrop(stop);
                write(site, name, 3, nth as u64, stop, made);
            });
        }
        scope.spawn(|| {
            let _ended = StopOnDrop(stop);
            while !stop.load(Ordering::Relaxed) {
                let pruned = pruned(site, "10");
                assert_eq!(pruned["fenced"], json!([]));
                freed.fetch_add(u32::from(pruned["freed"].as_u64().unwrap() > 0), Ordering::Relaxed);
                sleep(Duration::from_millis(300));
            }
        });
        scope.spawn(|| {
            let _ended = StopOnDrop(stop);
            let mut random = Random::new(5);
            // It is pinned, so all of it can be read, whatever becomes of the engine meanwhile.
            let mut mount = |name: &str, number: u32| {
                let (folder, pause) = (format!("mnt-{}", random.number()), random.below(1500));
                let before = restarts.load(Ordering::Relaxed);
                let seen = read_mounted(site, made, (name, number), &folder, || sleep(Duration::from_millis(pause)));
                // One that was killed and had not been started again when this began, or was killed since.
                let was_away = kills.load(Ordering::Relaxed) > before;
                assert!(
                    seen != Seen::Late || was_away,
                    "{name}@{number} was not mounted in time, though the engine was there"
                );
                seen
            };
            let count =
                |seen: Seen, right: &AtomicU32| right.fetch_add(u32::from(seen == Seen::Right), Ordering::Relaxed);
            for nth in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let seen = mount("kept", 1);
                assert_ne!(seen, Seen::Forgotten, "nobody may forget kept@1");
                count(seen, of_kept);
                // Three stay, of which the oldest is the next to be forgotten.
                if let Some(number) = made.recent("a", nth % 3) {
                    count(mount("a", number), of_others);
                }
            }
        });
        let began = Instant::now();
        let time = Duration::from_secs(if soak() > 1 { SOAK * u64::from(soak()) } else { TIME });
        let is_over = || began.elapsed() > time && (is_enough() || began.elapsed() > time * LONGER);
        let mut next = Duration::from_secs(8);
        while !stop.load(Ordering::Relaxed) && !is_over() {
            if began.elapsed() > next {
                kills.fetch_add(1, Ordering::Relaxed);
                seaweed.kill();
                sleep(Duration::from_secs(1));
                seaweed.start_again();
                restarts.fetch_add(1, Ordering::Relaxed);
                next += Duration::from_secs(12);
            }
            sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
    site.verify();
    pruned(site, "1");
    site.verify();
    let points = made.check(site);
    let [freed, of_kept, of_others, restarts] = happened();
    let what = format!(
        "{} backups, {freed} prunes that freed something, {of_kept} mounts of what is kept and {of_others} of others that were read, \
         {restarts} restarts of the engine; {points} points stay",
        made.count()
    );
    eprintln!("{what}");
    assert!(is_enough() && points > 1, "{what}");
}
