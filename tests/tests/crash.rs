//! The writer is killed at any moment: what was there stays, what comes next works and reuses what was stored.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::library::LibraryDisk;
use reseal_tests::model::{DiskFile, ModelDisk};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::{Site, files_below};

const DISK: usize = 40 << 20;

fn write_disk(site: &Site, name: &str, seed: u64, length: usize) -> (PathBuf, Vec<u8>) {
    let path = site.disk(name);
    let content = Random::new(seed).bytes(length);
    fs::write(&path, &content).unwrap();
    (path, content)
}

/// How long a backup of a third of the disk takes here, at best.
fn usual_time() -> Duration {
    let site = Site::new();
    let (disk, _) = write_disk(&site, "d.raw", 1, DISK / 3);
    let took = |nth: u32| {
        let began = Instant::now();
        site.backup(&format!("vm-{nth}"), &disk);
        fs::write(&disk, Random::new(100 + u64::from(nth)).bytes(DISK / 3)).unwrap();
        began.elapsed()
    };
    (0..3).map(took).min().unwrap()
}

/// Starts a backup and kills it after a while; whether it was still running.
fn kill_backup(site: &Site, disk: &str, after: Duration) -> bool {
    let running = site.start(["backup", "vm", disk]);
    sleep(after);
    running.kill().status.is_none()
}

#[test]
fn killed_at_random_moments_every_earlier_point_stays() {
    let usual = usual_time();
    let mut killed = 0;
    for seed in seeds(8) {
        let mut random = Random::new(seed);
        let site = Site::new();
        let (disk, mut content) = write_disk(&site, "d.raw", seed, DISK);
        let mut points = Vec::new();
        site.backup("vm", &disk);
        points.push(content.clone());
        for _ in 0..3 {
            // A third of the disk is new each time.
            let at = random.index(DISK - DISK / 3);
            random.fill(&mut content[at..at + DISK / 3]);
            fs::write(&disk, &content).unwrap();
            let after = usual.mul_f64(random.below(100) as f64 / 100.0);
            killed += u32::from(kill_backup(&site, disk.to_str().unwrap(), after));
            let listed = site.reseal(["list", "--json", "vm"]).ok().json_lines().len();
            assert!((points.len()..=points.len() + 1).contains(&listed), "seed {seed:#x}");
            points.resize(listed, content.clone());
            site.verify();
            site.backup("vm", &disk);
            points.push(content.clone());
            assert_eq!(site.unfinished(), Vec::<PathBuf>::new(), "seed {seed:#x}");
        }
        let tenant = site.tenant();
        for (number, point) in (1..).zip(&points) {
            let read = LibraryDisk::open(&tenant, "vm", number, "disk-0").unwrap().all().unwrap();
            assert!(read == *point, "seed {seed:#x}: vm@{number} differs");
        }
        site.verify();
    }
    assert!(killed >= 6, "many kills should meet a running backup: {killed} did");
}

/// From the first instruction to the end, in small steps: nothing that a backup does leaves a vault that stops the next.
#[test]
fn killed_at_every_moment_the_next_backup_works() {
    let site = Site::new();
    let (disk, content) = write_disk(&site, "d.raw", 2, 3 << 20);
    let disk = disk.to_str().unwrap();
    for step in 0u32..60 {
        kill_backup(&site, disk, Duration::from_micros(400) * step);
        site.reseal(["list"]).ok();
    }
    site.backup("vm", disk.as_ref());
    assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    let points = site.verify()["points"].as_u64().unwrap();
    let tenant = site.tenant();
    for number in 1..=u32::try_from(points).unwrap() {
        assert!(LibraryDisk::open(&tenant, "vm", number, "disk-0").unwrap().all().unwrap() == content);
    }
}

/// `init` too: run again, it ends with a vault that works.
#[test]
fn a_killed_init_can_be_repeated_or_was_done() {
    for step in 0u32..40 {
        let site = Site::bare();
        let running = site.start(["init", "--no-recovery"]);
        sleep(Duration::from_micros(250) * step);
        running.kill();
        let again = site.reseal(["init", "--no-recovery"]).expect(&[0, 1]);
        if again.status == Some(1) {
            assert!(again.stderr.contains("tenant default already"), "{again:#?}");
        }
        let (disk, _) = write_disk(&site, "d.raw", 3, 100_000);
        site.backup("vm", &disk);
        site.verify();
        assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    }
}

/// A backup of several packs that is killed late: the packs that were full are found by the next one.
#[test]
fn what_an_aborted_backup_stored_is_reused() {
    let site = Site::new();
    // Three packs and a half: far more than are ever waiting to be finished.
    let length = 224u64 << 20;
    let disk = site.disk("d.raw");
    let file = DiskFile::create(&disk, length);
    let mut random = Random::new(4);
    for at in (0..length).step_by(4 << 20) {
        file.write(at, &random.bytes(4 << 20));
    }
    drop(file);
    let running = site.start(["backup", "vm", disk.to_str().unwrap()]);
    let began = Instant::now();
    while files_below(&site.tenant_folder().join("packs")).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "no pack was finished");
        sleep(Duration::from_millis(1));
    }
    assert_eq!(running.kill().status, None, "it was still running");
    let left: u64 = files_below(&site.tenant_folder().join("packs")).iter().map(|p| p.metadata().unwrap().len()).sum();
    // Also with a lookup that never heard of it, as on another machine.
    fs::remove_dir_all(&site.state).unwrap();
    let stats = site.backup("vm", &disk)["stats"].clone();
    let stored = stats["stored"].as_u64().unwrap();
    assert!(stored + left < length + (1 << 20), "of {left} bytes that were there, {stored} were stored again");
    assert!(stored < length - (50 << 20), "{stored}");
    assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    site.verify();
}

/// What a writer that died left is swept; what a living one writes is not.
#[test]
fn a_sweep_spares_a_backup_that_is_running() {
    let site = Site::new();
    let (disk, _) = write_disk(&site, "d.raw", 5, DISK);
    let (small, _) = write_disk(&site, "s.raw", 6, 100_000);
    fs::create_dir_all(site.vault.join("tmp")).unwrap();
    let dead = site.vault.join("tmp/0123456789abcdef0123456789abcdef");
    let foreign = site.vault.join("tmp/of somebody else");
    fs::write(&dead, "left behind").unwrap();
    fs::write(&foreign, "precious").unwrap();
    let running = site.start(["backup", "--json", "big", disk.to_str().unwrap()]);
    for nth in 0..10 {
        site.backup(&format!("small-{nth}"), &small);
    }
    running.wait().ok();
    assert!(!dead.exists() && foreign.exists());
    assert_eq!(site.verify()["points"], 11);
}

/// The machine's memory of the vault is cut off or garbage: that is said, and starting anew is the remedy.
#[test]
fn a_damaged_memory_of_the_vault_is_said_so() {
    let site = Site::new();
    let (disk, content) = write_disk(&site, "d.raw", 7, 100_000);
    site.backup("vm", &disk);
    let seen = files_below(&site.state).into_iter().find(|path| path.ends_with("seen.json")).unwrap();
    for garbage in [&b""[..], b"{\"record_gen", b"\xff\xff"] {
        fs::write(&seen, garbage).unwrap();
        site.reseal(["list"]).fails(1, &["seen.json", "remove it"]);
    }
    fs::remove_file(&seen).unwrap();
    site.reseal(["list"]).ok();
    let mut model = ModelDisk::new(content.len() as u64);
    model.write(0, &content);
    model.assert_same(&LibraryDisk::open(&site.tenant(), "vm", 1, "disk-0").unwrap(), "after all that");
}
