//! `reseal rekey --data`: everything is sealed again under a new key, whatever is interrupted and whoever works meanwhile.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use reseal_format::names::TenantName;
use reseal_kms::Keyring;
use reseal_tests::library::backup;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::system;
use reseal_tests::random::Random;
use reseal_tests::rekeying::Rekeying;
use reseal_tests::site::{Site, copy_folder};
use reseal_vault::{Holder, Tenant};
use serde_json::{Value, json};

/// Several packs' worth, so that a rekey can be met in the middle.
const DISK: usize = 150 << 20;

/// A vault with restore points of two VMs, and what they hold.
struct Filled {
    site: Site,
    points: Vec<(&'static str, u32, Vec<u8>)>,
}

impl Filled {
    fn new(length: usize) -> Filled {
        let site = Site::new();
        let mut points = Vec::new();
        let mut random = Random::new(77);
        for vm in ["web01", "db01"] {
            let path = site.disk(vm);
            let mut content = random.bytes(length / 2);
            for number in 1..=2 {
                // The second shares most with the first.
                random.fill(&mut content[..length / 10]);
                fs::write(&path, &content).unwrap();
                site.backup(vm, &path);
                points.push((vm, number, content.clone()));
            }
        }
        Filled { site, points }
    }

    #[track_caller]
    fn assert_all_there(&self) {
        self.site.verify();
        for (vm, number, content) in &self.points {
            let to = self.site.path("restored.raw");
            self.site.restore(&format!("{vm}@{number}"), "disk-0", &to).ok();
            assert!(fs::read(&to).unwrap() == *content, "{vm}@{number}");
            fs::remove_file(&to).unwrap();
        }
    }

    fn back_up_more(&mut self, vm: &'static str, seed: u64) {
        let (path, content) = (self.site.disk("more"), Random::new(seed).bytes(3 << 20));
        fs::write(&path, &content).unwrap();
        let made = self.site.backup(vm, &path);
        self.points.push((vm, u32::try_from(made["number"].as_u64().unwrap()).unwrap(), content));
    }
}

fn show(site: &Site) -> Value {
    site.reseal(["tenant", "show", "--json"]).ok().json()
}

/// The epochs that the objects are sealed under, as trailers and headers say.
fn epochs_in_clear(site: &Site) -> Vec<u32> {
    let mut epochs: Vec<u32> = site
        .contents()
        .iter()
        .filter_map(|(key, bytes)| epoch_at(key, bytes.len()).map(|at| (bytes, at)))
        .map(|(bytes, at)| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
        .collect();
    epochs.sort_unstable();
    epochs.dedup();
    epochs
}

/// Where an object says its epoch.
fn epoch_at(key: &str, length: usize) -> Option<usize> {
    match () {
        () if key.contains("/packs/") => Some(length - 128 + 32),
        () if key.contains("/vms/") => Some(12),
        () => None,
    }
}

/// What somebody has who kept the old record: the storage as it is now, the KEK, and the record from before.
#[track_caller]
fn assert_old_record_opens_nothing(site: &Site, old_record: &[u8], old_keyring: &[u8]) {
    let mut thief = Site::bare();
    thief.vault = thief.path("copy");
    copy_folder(&site.vault, &thief.vault);
    thief.keyring = thief.path("keyring.json");
    fs::write(&thief.keyring, old_keyring).unwrap();
    fs::set_permissions(&thief.keyring, fs::Permissions::from_mode(0o600)).unwrap();
    thief.reseal(["list"]).fails(4, &["is not in the keyring"]);
    fs::write(thief.tenant_folder().join("tenant.json"), old_record).unwrap();
    assert_eq!(show(&thief)["epochs"], json!([1]), "the old record itself opens");
    // Also where each object is made to say that it is of the old epoch.
    for patched in [false, true] {
        for (key, mut bytes) in thief.contents() {
            if let Some(at) = epoch_at(&key, bytes.len()).filter(|_| patched) {
                bytes[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
                fs::write(thief.vault.join(&key), bytes).unwrap();
            }
        }
        let report = thief.reseal(["verify", "--json"]).expect(&[3]).json();
        let sealed = thief.objects().iter().filter(|key| epoch_at(key, 1000).is_some()).count();
        assert_eq!(report["damaged"].as_array().unwrap().len(), sealed, "patched: {patched}");
        assert_eq!((&report["points"], &report["blobs"]), (&json!(0), &json!(0)), "patched: {patched}");
    }
}

/// Reads all disks of a mount again and again until it is told to stop; each time they must be what they are.
fn read_all(mounted: &Path, points: &[(PathBuf, &[u8])], stop: &AtomicBool, times: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        for (path, content) in points {
            let read = fs::read(mounted.join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(read == *content, "{}", path.display());
        }
        times.fetch_add(1, Ordering::Relaxed);
        // So that not everything comes from the kernel's cache.
        let _ = fs::write("/proc/sys/vm/drop_caches", "1");
    }
}

#[test]
fn killed_three_times_with_a_mount_reading_all_along() {
    let mut filled = Filled::new(DISK);
    let old_record = fs::read(filled.site.tenant_folder().join("tenant.json")).unwrap();
    let old_keyring = fs::read(&filled.site.keyring).unwrap();
    let mounted = Mounted::new(&filled.site, "mnt", &["--cache-size", "1M"]);
    let paths: Vec<_> = filled
        .points
        .iter()
        .map(|(vm, number, content)| {
            let point = mounted.point(&filled.site, vm, *number);
            (point.join("disk-0.raw").strip_prefix(&mounted.path).unwrap().to_owned(), content.clone())
        })
        .collect();
    let (stop, times) = (AtomicBool::new(false), AtomicU64::new(0));
    let killed = thread::scope(|scope| {
        let points: Vec<_> = paths.iter().map(|(path, content)| (path.clone(), content.as_slice())).collect();
        let (stop, times, mounted) = (&stop, &times, &mounted.path);
        let reader = scope.spawn(move || read_all(mounted, &points, stop, times));
        let mut killed = 0;
        let site = &filled.site;
        for nth in 0..3 {
            let packs = site.objects().len();
            // Slow enough to be met at work.
            let running = site.start(["rekey", "--data", "--no-recovery", "--limit-rate", "40M"]);
            let began = Instant::now();
            while !running.has_ended() && began.elapsed() < Duration::from_millis(700 + 400 * nth) {
                sleep(Duration::from_millis(10));
            }
            killed += u32::from(running.kill().status.is_none());
            assert!(site.objects().len() + 1 >= packs, "nothing is lost");
            let shown = show(site);
            assert_eq!(
                (&shown["epochs"], &shown["epoch"]),
                (&json!([1, 2]), &json!(2)),
                "it is resumed, not begun anew"
            );
        }
        let before = times.load(Ordering::Relaxed);
        site.reseal(["rekey", "--data"]).ok();
        let began = Instant::now();
        while times.load(Ordering::Relaxed) < before + 2 && !reader.is_finished() && began.elapsed().as_secs() < 30 {
            sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        killed
    });
    assert_eq!(killed, 3, "all three should have been at work");
    assert!(times.load(Ordering::Relaxed) >= 3, "the mount was read all along");
    assert_eq!(epochs_in_clear(&filled.site), [2]);
    let shown = show(&filled.site);
    // The KEK, the new epoch, the end of the old one.
    assert_eq!((&shown["epochs"], &shown["generation"], &shown["rekey"]), (&json!([2]), &json!(4), &json!(null)));
    filled.assert_all_there();
    assert_old_record_opens_nothing(&filled.site, &old_record, &old_keyring);
    filled.back_up_more("web01", 5);
    // The mount was made before: it also shows what is sealed under the new key only.
    let latest = mounted.path.join("web01/latest/disk-0.raw");
    let began = Instant::now();
    while fs::read(&latest).unwrap() != filled.points.last().unwrap().2 {
        assert!(began.elapsed() < Duration::from_secs(20), "the new point does not appear");
        sleep(Duration::from_millis(100));
    }
    mounted.umount(&filled.site);
}

/// A backup that began under the old key may still seal under it: it is waited for, and what it made is sealed again.
#[test]
fn backups_that_began_before_or_meanwhile_are_kept() {
    let mut filled = Filled::new(20 << 20);
    let (early, late) = (Random::new(8).bytes(12 << 20), Random::new(9).bytes(6 << 20));
    let site = &filled.site;
    fs::write(site.disk("early"), &early).unwrap();
    fs::write(site.disk("late"), &late).unwrap();
    let path = |name| site.disk(name).to_str().unwrap().to_owned();
    let running = site.start(["backup", "--limit-rate", "4M", "early", &path("early")]);
    let began = Instant::now();
    // Not the one of a process that only has the keys.
    let seals = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().to_str().unwrap().ends_with(".lease");
    while !fs::read_dir(site.tenant_folder().join("leases")).is_ok_and(|mut entries| entries.any(seals)) {
        assert!(began.elapsed() < Duration::from_secs(10), "the backup does not begin");
        sleep(Duration::from_millis(5));
    }
    sleep(Duration::from_millis(100));
    let rekey = site.start(["rekey", "--data", "--no-recovery", "--json"]);
    while show(site)["epoch"] != json!(2) {
        assert!(began.elapsed() < Duration::from_secs(10), "the rekey does not begin");
    }
    site.reseal(["backup", "late", &path("late")]).ok();
    assert!(!running.has_ended() && !rekey.has_ended(), "the one waits for the other");
    site.reseal(["rekey", "--data", "--no-recovery"]).fails(1, &["rekey --data (process", "is at work"]);
    site.reseal(["tenant", "remove", "default"]).fails(1, &["(process", "is at work"]);
    running.wait().ok();
    let done = rekey.wait().ok();
    assert!(done.stderr.contains("waiting for the end of what began with the old keys: backup of early"), "{done:?}");
    assert_eq!((&done.json()["epoch"], &done.json()["resumed"]), (&json!(2), &json!(false)));
    assert_eq!(epochs_in_clear(site), [2]);
    assert_eq!(fs::read_dir(site.tenant_folder().join("leases")).unwrap().count(), 0);
    filled.points.extend([("early", 1, early), ("late", 1, late)]);
    filled.assert_all_there();
}

/// A process that opened the tenant before and takes its lease afterwards seals under the new key.
#[test]
fn who_takes_a_lease_later_reads_the_record_then() {
    let site = Site::new();
    let keyring = || Keyring::open(&site.keyring, |_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
    let early = site.tenant();
    fs::write(site.disk("d"), Random::new(3).bytes(1 << 20)).unwrap();
    site.backup("vm", &site.disk("d"));
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert_eq!(early.keys().current_epoch(), 1);
    let lease = early.lease(&Holder::this_process("test".into())).unwrap();
    assert!(early.refresh().unwrap());
    assert_eq!((early.keys().current_epoch(), early.leases().unwrap().len()), (2, 1));
    drop(lease);
    assert_eq!(early.leases().unwrap(), []);
    let name = TenantName::new("default").unwrap();
    let fresh = Tenant::open(site.store(), "vault", &name, std::sync::Arc::new(keyring())).unwrap();
    assert_eq!(fresh.keys().epochs().collect::<Vec<_>>(), [2]);
}

/// chattr +i refuses what a lock on an object refuses: to change it and to remove it.
struct Locked(PathBuf);

impl Locked {
    fn new(path: PathBuf) -> Locked {
        system("chattr", &["+i", path.to_str().unwrap()]);
        Locked(path)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        system("chattr", &["-i", self.0.to_str().unwrap()]);
    }
}

#[test]
fn what_a_lock_holds_back_is_reported() {
    let filled = Filled::new(4 << 20);
    let site = &filled.site;
    let pack = site.packs(1)[0].clone();
    let manifest = "tenants/default/vms/web01/00000001.manifest";
    {
        let _locked = Locked::new(site.vault.join(manifest));
        site.reseal(["rekey", "--data", "--no-recovery"])
            .fails(1, &[manifest, "does not let 1 object of", "old data key is not destroyed"]);
        assert_eq!(epochs_in_clear(site), [1, 2]);
        let shown = show(site);
        assert_eq!((&shown["epochs"], shown["rekey"][0]["objects"].as_u64()), (&json!([1, 2]), Some(1)));
        let text = site.reseal(["tenant", "show"]).ok().stdout;
        assert!(text.contains("% done") && text.contains("1 object left under older keys"), "{text}");
        filled.assert_all_there();
    }
    site.reseal(["rekey", "--data"]).ok();
    filled.assert_all_there();

    let pack = pack.replace(".0", ".1");
    let lock = Locked::new(site.vault.join(&pack));
    let done = site.reseal(["rekey", "--data", "--no-recovery", "--json"]).ok();
    assert!(done.stderr.contains(&pack) && done.stderr.contains("does not let go of it"), "{done:?}");
    assert_eq!(done.json()["resealed"]["held_back"].as_object().unwrap().keys().collect::<Vec<_>>(), [&pack]);
    assert_eq!(show(site)["epochs"], json!([3]));
    assert!(site.vault.join(&pack).exists());
    // It is no damage, for another generation has taken its place.
    filled.assert_all_there();
    drop(lock);
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert!(!site.vault.join(&pack).exists());
    filled.assert_all_there();
}

#[test]
fn damage_keeps_the_old_key_and_the_rest_goes_on() {
    let filled = Filled::new(4 << 20);
    let site = &filled.site;
    let (pack, manifest) = (site.packs(1)[0].clone(), "tenants/default/vms/db01/00000002.manifest".to_owned());
    let kept: Vec<_> =
        [&pack, &manifest].map(|key| (site.vault.join(key), fs::read(site.vault.join(key)).unwrap())).into();
    for (path, bytes) in &kept {
        let mut damaged = bytes.clone();
        damaged[200] ^= 1;
        fs::write(path, damaged).unwrap();
    }
    let failed = site
        .reseal(["rekey", "--data", "--no-recovery", "--json"])
        .fails(3, &[&pack, &manifest, "old data key is not destroyed"]);
    assert_eq!(failed.json()["resealed"]["damaged"].as_object().unwrap().len(), 2, "{failed:?}");
    assert_eq!(show(site)["epochs"], json!([1, 2]));
    for (path, bytes) in &kept {
        fs::write(path, bytes).unwrap();
    }
    site.reseal(["rekey", "--data"]).ok();
    assert_eq!((show(site)["epochs"].clone(), epochs_in_clear(site)), (json!([2]), vec![2]));
    filled.assert_all_there();
}

#[test]
fn in_the_background_it_returns_once_the_new_keys_are_in_use() {
    let filled = Filled::new(60 << 20);
    let site = &filled.site;
    let log = site.path("rekey.log");
    let words =
        ["rekey", "--data", "--no-recovery", "--limit-rate", "20M", "--background", "--log", log.to_str().unwrap()];
    let said = site.reseal(words).ok();
    assert!(said.stdout.contains("in the background"), "{said:?}");
    assert_eq!(show(site)["epoch"], json!(2));
    let began = Instant::now();
    let mut shares = Vec::new();
    while show(site)["epochs"] != json!([2]) {
        shares.extend(show(site)["rekey"][1]["bytes"].as_u64());
        assert!(began.elapsed() < Duration::from_secs(40), "{}", fs::read_to_string(&log).unwrap());
        sleep(Duration::from_millis(100));
    }
    assert!(shares.is_sorted() && shares.first() < shares.last(), "it was seen to go on: {shares:?}");
    let began = Instant::now();
    while !fs::read_to_string(&log).unwrap().contains("the older ones are destroyed") {
        assert!(began.elapsed() < Duration::from_secs(10), "{}", fs::read_to_string(&log).unwrap());
        sleep(Duration::from_millis(20));
    }
    filled.assert_all_there();
    // What can't begin says so on the terminal, and with its status.
    fs::remove_file(&site.keyring).unwrap();
    site.reseal(["rekey", "--data", "--no-recovery", "--background"]).fails(4, &["keyring"]);
}

/// A new master makes kits from before useless, so a new one is written before it is in use.
#[test]
fn kits_are_renewed_before_the_master_is() {
    let filled = Filled::new(4 << 20);
    let site = &filled.site;
    let secret = site.path("passphrase");
    fs::write(&secret, "correct horse battery staple\n").unwrap();
    let kit = |name: &str| site.path(name).to_str().unwrap().to_owned();
    let with = ["--recovery-passphrase-file", secret.to_str().unwrap()];
    let run = |words: &[&str]| site.reseal([words, &with].concat());
    run(&["key", "export", &kit("old.age")]).ok();
    run(&["list", "--recovery-kit", &kit("old.age")]).ok();
    let record = fs::read(site.tenant_folder().join("tenant.json")).unwrap();
    site.reseal(["rekey", "--data"]).fails(2, &["--recovery FILE", "--no-recovery"]);
    run(&["rekey", "--data", "--recovery", &kit("old.age")]).fails(2, &["old.age", "exists already"]);
    assert_eq!(fs::read(site.tenant_folder().join("tenant.json")).unwrap(), record, "nothing was begun");
    let told = run(&["rekey", "--data", "--recovery", &kit("new.age"), "--json"]).ok().json();
    assert_eq!(told["recovery_kit"], json!(kit("new.age")));
    run(&["list", "--recovery-kit", &kit("old.age")]).fails(3, &["old.age", "older than the keys of tenant default"]);
    // Nor does the KEK that it holds.
    let mut finder = site.elsewhere();
    finder.keyring = finder.path("keyring.json");
    finder
        .reseal([&["key", "import", &kit("old.age")][..], &with].concat())
        .fails(3, &["old.age", "older than the keys"]);
    finder.reseal(["list"]).expect(&[1, 4]);
    // The keyring is lost.
    fs::remove_file(&site.keyring).unwrap();
    run(&["verify", "--recovery-kit", &kit("new.age")]).ok();
    run(&["key", "import", &kit("new.age")]).ok();
    filled.assert_all_there();
}

/// What is clear in a pack or manifest is believed by nobody who is about to destroy a key.
#[test]
fn what_claims_to_be_done_has_to_open() {
    let filled = Filled::new(4 << 20);
    let site = &filled.site;
    let keys = [site.packs(1)[0].clone(), "tenants/default/vms/db01/00000002.manifest".to_owned()];
    for key in &keys {
        let path = site.vault.join(key);
        let right = fs::read(&path).unwrap();
        let at = epoch_at(key, right.len()).unwrap();
        let (old, coming) = (right[at], right[at] + 1);
        let mut lying = right.clone();
        lying[at] = coming;
        fs::write(&path, &lying).unwrap();
        site.reseal(["rekey", "--data", "--no-recovery"]).fails(3, &[key, "old data key is not destroyed"]);
        assert_eq!(show(site)["epochs"], json!([old, coming]));
        // So what is right, from a copy, still opens.
        fs::write(&path, &right).unwrap();
        site.reseal(["rekey", "--data"]).ok();
        assert_eq!(show(site)["epochs"], json!([coming]));
        filled.assert_all_there();
        // The pack has another name now.
        assert!(key.ends_with(".manifest") || !path.exists());
    }
}

/// It reads the record after it has taken its lease.
#[test]
fn a_backup_that_began_before_seals_under_the_new_key() {
    let site = Site::new();
    fs::write(site.disk("d"), Random::new(3).bytes(1 << 20)).unwrap();
    let tenant = site.tenant();
    let mut rekeying = Rekeying::new(&site);
    rekeying.begin();
    assert_eq!(tenant.keys().current_epoch(), 1);
    backup(&tenant, &site.heads(&tenant), "vm", &site.disk("d")).unwrap();
    assert_eq!(epochs_in_clear(&site), [2]);
}
