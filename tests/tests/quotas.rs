//! What a tenant may store: a backup that would exceed it ends before its commit, and takes nothing away.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use reseal_format::names::TenantName;
use reseal_kms::Keyring;
use reseal_tests::process::Run;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use reseal_vault::Record;
use serde_json::{Value, json};

use servers::bao::shared;
use servers::{Config, free_port, private_file};

const MIB: usize = 1 << 20;

/// Writes a disk that does not compress.
fn disk(site: &Site, seed: u64, length: usize) -> PathBuf {
    let path = site.disk(&format!("{seed}-{length}.raw"));
    fs::write(&path, Random::new(seed).bytes(length)).unwrap();
    path
}

fn backup(site: &Site, vm: &str, disk: &Path) -> Run {
    site.reseal_of("acme", ["backup", "--json", vm, disk.to_str().unwrap()])
}

fn set(site: &Site, quota: &str) -> Run {
    site.reseal(["tenant", "set", "acme", "--quota", quota, "--json"])
}

fn show(site: &Site) -> Value {
    site.reseal_of("acme", ["tenant", "show", "--json"]).ok().json()
}

/// Bytes of the tenant's packs, as the file system has them.
fn used(site: &Site) -> u64 {
    let packs = site.objects().into_iter().filter(|key| key.starts_with("tenants/acme/packs/"));
    packs.map(|key| fs::metadata(site.vault.join(key)).unwrap().len()).sum()
}

/// A site whose tenant `acme` is in the keyring, with a quota.
fn site(quota: &str) -> Site {
    let site = Site::new();
    site.reseal(["tenant", "add", "acme", "--no-recovery", "--quota", quota]).ok();
    site
}

#[track_caller]
fn over(run: Run, site: &Site, quota: usize) {
    let quota = format!("quota of {quota} bytes");
    let run = run.fails(1, &["tenant acme", &quota, "reseal tenant set acme --quota", "nothing was committed"]);
    let (_, said) = run.stderr.split_once("its packs have ").unwrap();
    let said: u64 = said.split([' ', ':']).next().unwrap().parse().unwrap();
    // The pack of index nodes, which is small, may have been stored after that was said.
    assert!((said..said + 64_000).contains(&used(site)), "{} bytes are used: {run:#?}", used(site));
}

#[test]
fn a_backup_over_the_quota_ends_before_its_commit_and_hurts_nothing() {
    let site = site("70M");
    let small = disk(&site, 1, MIB);
    backup(&site, "one", &small).ok();
    assert_eq!((show(&site)["quota"].as_u64(), show(&site)["used"].as_u64()), (Some(70 << 20), Some(used(&site))));
    let before = site.contents();
    // One pack of it fits, the next does not.
    let large = disk(&site, 2, 80 * MIB);
    over(backup(&site, "two", &large), &site, 70 * MIB);
    assert!(used(&site) <= 70 << 20 && used(&site) > 60 << 20, "{}", used(&site));
    assert!(before.iter().all(|(key, bytes)| fs::read(site.vault.join(key)).unwrap() == *bytes));
    assert!(site.unfinished().is_empty(), "{:?}", site.unfinished());
    let shown = show(&site);
    assert_eq!((&shown["points"], &shown["used"]), (&json!(1), &json!(used(&site))));
    // What is known already takes nothing, and the others are none of its business.
    assert_eq!(backup(&site, "one", &small).ok().json()["stats"]["stored"], 0);
    site.backup("two", &large);
    site.reseal_of("acme", ["verify"]).ok();

    let told = set(&site, "1G").ok();
    assert_eq!((&told.json()["quota"], &told.stderr), (&json!(1 << 30), &String::new()));
    let point = backup(&site, "two", &large).ok().json();
    let stored = point["stats"]["stored"].as_u64().unwrap();
    assert!(stored > 14 << 20 && stored < 20 << 20, "what was stored before is used: {stored}");
    let out = site.path("out.raw");
    site.reseal_of("acme", ["restore", "--disk", "disk-0", "two@1", out.to_str().unwrap()]).ok();
    assert!(fs::read(out).unwrap() == fs::read(large).unwrap());
}

#[test]
fn all_of_a_quota_may_be_used_and_below_it_no_backup_begins() {
    let site = site("1T");
    let (small, other) = (disk(&site, 1, MIB), disk(&site, 2, MIB));
    backup(&site, "vm", &small).ok();
    let exact = used(&site);
    assert_eq!(set(&site, &exact.to_string()).ok().stderr, "");
    assert_eq!(backup(&site, "vm", &small).ok().json()["stats"]["stored"], 0, "it adds nothing");
    over(backup(&site, "vm", &other), &site, usize::try_from(exact).unwrap());
    assert_eq!(used(&site), exact, "a pack that does not fit is not stored");

    let warned = set(&site, &(exact - 1).to_string()).ok();
    assert!(warned.stderr.contains(&format!("has more already ({exact} bytes)")), "{warned:#?}");
    over(backup(&site, "vm", &small), &site, usize::try_from(exact - 1).unwrap());
    for words in [&["verify"][..], &["list"], &["show", "vm@2"], &["rekey", "--kek"]] {
        site.reseal_of("acme", words).ok();
    }
    assert_eq!(show(&site)["quota"], exact - 1, "a new key changes nothing of it");
    assert_eq!(set(&site, "none").ok().json()["quota"], Value::Null);
    backup(&site, "vm", &other).ok();
    let shown = show(&site);
    assert_eq!((&shown["quota"], &shown["used"], &shown["points"]), (&Value::Null, &json!(used(&site)), &json!(3)));
}

/// Each would fit, both do not: never both are committed, and what the other stored is not lost.
#[test]
fn of_two_backups_at_once_not_both_exceed_the_quota() {
    let site = site("5M");
    let (one, two) = (disk(&site, 1, 3 * MIB), disk(&site, 2, 3 * MIB));
    let start = |vm: &str, disk: &Path| {
        let words = ["--tenant", "acme", "backup", "--limit-rate", "2M", vm, disk.to_str().unwrap()];
        site.start(words)
    };
    let running = [start("one", &one), start("two", &two)];
    let ended = running.map(|run| run.wait().expect(&[0, 1]));
    let done = ended.iter().filter(|run| run.status == Some(0)).count();
    assert!(done < 2, "{ended:#?}");
    for run in ended.iter().filter(|run| run.status == Some(1)) {
        assert!(run.stderr.contains("tenant acme") && run.stderr.contains("quota of 5242880 bytes"), "{run:#?}");
    }
    assert_eq!(show(&site)["points"], done);
    set(&site, "none").ok();
    let stored = used(&site);
    for (vm, disk) in [("one", &one), ("two", &two)] {
        backup(&site, vm, disk).ok();
    }
    let packs = 2 * 3 * MIB as u64;
    assert!(used(&site) >= packs && used(&site) < packs + (MIB as u64), "{stored} then {}", used(&site));
    site.reseal_of("acme", ["verify"]).ok();
}

/// The quota is sealed; another one is another generation of the record, under the same key.
#[test]
fn whoever_holds_the_storage_can_not_change_a_quota() {
    let mut site = Site::bare();
    Config::default().bao("bao", shared()).tenant("acme = \"bao\"").write(&mut site);
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    backup(&site, "vm", &disk(&site, 1, 10_000)).ok();
    let record = site.folder_of("acme").join("tenant.json");
    let (before, old) = (site.contents(), fs::read_to_string(&record).unwrap());
    let told = set(&site, "1K").ok().json();
    assert_eq!((&told["generation"], &told["objects"]), (&json!(2), &json!(["tenants/acme/tenant.json"])));
    let changed: Vec<_> = site.contents().into_iter().filter(|(key, bytes)| before.get(key) != Some(bytes)).collect();
    assert_eq!(changed.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["tenants/acme/tenant.json"]);
    let new = fs::read_to_string(&record).unwrap();
    assert!(!new.contains("quota"), "{new}");
    let key = |text: &str| serde_json::from_str::<Value>(text).unwrap()["kms"]["key"].clone();
    assert_eq!(key(&new), key(&old));
    over(backup(&site, "vm", &disk(&site, 2, 10_000)), &site, 1024);

    // A field in clear is nobody's quota.
    fs::write(&record, new.replacen('{', "{\n  \"quota\": 1099511627776,", 1)).unwrap();
    assert_eq!(show(&site)["quota"], 1024);
    fs::write(&record, &old).unwrap();
    backup(&site, "vm", &disk(&site, 2, 10_000)).fails(3, &["rolled back"]);
    fs::write(&record, &new).unwrap();
    site.reseal_of("acme", ["rekey", "--to-kms", "keyring"]).ok();
    Config::default().bao("bao", shared()).write(&mut site);
    assert_eq!(show(&site)["quota"], 1024, "it moves with the tenant");
}

#[test]
fn a_new_quota_leaves_an_interrupted_rotation_to_be_finished() {
    let site = site("1G");
    let keyring = Keyring::open(&site.keyring, |_| Err(io::ErrorKind::NotFound.into())).unwrap();
    let keys = || keyring.list().unwrap().len();
    let own = keys();
    let record = Record::read(site.store(), "vault", &TenantName::new("acme").unwrap()).unwrap();
    record.rotate(&keyring).unwrap();
    assert_eq!(keys(), own + 1, "the old key is not retired yet");
    set(&site, "2G").ok();
    assert_eq!((keys(), show(&site)["generation"].as_u64()), (own + 1, Some(3)));
    site.reseal_of("acme", ["rekey", "--kek"]).ok();
    assert_eq!(keys(), own);
}

#[test]
fn a_list_shows_quotas_where_they_are_asked_for() {
    let mut site = Site::new();
    Config::default().bao("bao", shared()).tenant("acme = \"bao\"").write(&mut site);
    site.reseal(["tenant", "add", "acme", "--no-recovery", "--quota", "3G"]).ok();
    let token = private_file(&site.path("token"), "s.secret\n");
    let listed = |site: &Site, words: &[&str]| site.reseal([&["tenant", "list", "--json"], words].concat());
    let plain = listed(&site, &[]).ok().json_lines();
    assert!(plain.iter().all(|line| line["used"] == 0 && line.get("quota").is_none()), "{plain:#?}");
    let quotas: Vec<_> =
        listed(&site, &["--quotas"]).ok().json_lines().iter().map(|line| line["quota"].clone()).collect();
    assert_eq!(quotas, [json!(3_u64 << 30), Value::Null]);
    let table = site.reseal(["tenant", "list", "--quotas"]).ok().stdout;
    assert!(table.contains("QUOTA") && table.contains("3.0 GiB") && table.contains("none"), "{table}");
    // One that can't be asked hides no other.
    Config::default().plain("bao", free_port(), &token).tenant("acme = \"bao\"").write(&mut site);
    let partly = listed(&site, &["--quotas"]).fails(4, &["tenant acme", "can't be reached"]).json_lines();
    assert_eq!(partly.len(), 2);
    assert!(partly[0].get("quota").is_none() && partly[1]["quota"].is_null(), "{partly:#?}");
    listed(&site, &[]).ok();
}

#[test]
fn a_size_that_is_none_is_refused() {
    let site = site("1G");
    for wrong in ["0", "5X", "-1", "", "99999999999T"] {
        set(&site, wrong).expect(&[2]);
        site.reseal(["tenant", "add", "other", "--no-recovery", "--quota", wrong]).expect(&[2]);
    }
    site.reseal(["tenant", "set", "acme"]).fails(2, &["--quota"]);
    site.reseal(["tenant", "set", "nobody", "--quota", "1G"]).fails(1, &["no tenant nobody"]);
    assert_eq!(show(&site)["quota"], 1 << 30);
}
