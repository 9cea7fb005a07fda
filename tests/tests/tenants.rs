//! Tenants whose keys are in a real KMS: OpenBao, PyKMIP, the keyring; rotation, moving, erasure, and what happens when a KMS
//! is down or a record was exchanged.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_format::names::TenantName;
use reseal_format::time::Timestamp;
use reseal_kms::Keyring;
use reseal_tests::faults::{Fault, Operation, Plan, Watched};
use reseal_tests::mounting::{Mounted, is_mounted};
use reseal_tests::process::{Run, signal};
use reseal_tests::random::Random;
use reseal_tests::site::{Site, copy_folder};
use reseal_vault::Record;
use reseal_vault::heads::Heads;
use serde_json::{Value, json};

use servers::bao::{Bao, shared};
use servers::pki::Pki;
use servers::pykmip::PyKmip;
use servers::{Config, free_port, private_file};

/// Bytes of a test disk.
const DISK: usize = 300_000;

/// Writes a disk whose content depends on the seed.
fn disk(site: &Site, seed: u64) -> (PathBuf, Vec<u8>) {
    let path = site.disk(&format!("{seed}.raw"));
    let content = Random::new(seed).bytes(DISK);
    fs::write(&path, &content).unwrap();
    (path, content)
}

/// Runs `reseal` for a tenant.
fn of<A: AsRef<OsStr>>(site: &Site, tenant: &str, arguments: impl IntoIterator<Item = A>) -> Run {
    site.reseal_of(tenant, arguments)
}

/// Makes a vault and its first tenant.
fn init(site: &Site, tenant: &str) -> Value {
    of(site, tenant, ["init", "--no-recovery", "--json"]).ok().json()
}

/// Makes a further tenant.
fn add(site: &Site, tenant: &str) -> Value {
    site.reseal(["tenant", "add", tenant, "--no-recovery", "--json"]).ok().json()
}

fn backup(site: &Site, tenant: &str, seed: u64) -> Vec<u8> {
    let (path, content) = disk(site, seed);
    of(site, tenant, ["backup", "vm", path.to_str().unwrap()]).ok();
    content
}

/// Everything of the tenant authenticates, and its newest point is this.
#[track_caller]
fn assert_opens(site: &Site, tenant: &str, content: &[u8]) {
    of(site, tenant, ["verify"]).ok();
    let out = site.path("restored.raw");
    of(site, tenant, ["restore", "--disk", "disk-0", "vm@latest", out.to_str().unwrap()]).ok();
    assert!(fs::read(&out).unwrap() == content, "the disk of {tenant} differs");
    fs::remove_file(&out).unwrap();
}

/// Every command that needs the tenant's keys fails like this.
#[track_caller]
fn all_fail(site: &Site, tenant: &str, status: i32, said: &[&str]) {
    let (path, _) = disk(site, 1);
    let folder = site.path("not-mounted");
    fs::create_dir_all(&folder).unwrap();
    let restored = site.path("never.raw");
    let (path, folder, out) = (path.to_str().unwrap(), folder.to_str().unwrap(), restored.to_str().unwrap());
    for words in [
        &["list"][..],
        &["show", "vm@1"],
        &["verify"],
        &["backup", "vm", path],
        &["restore", "--disk", "disk-0", "vm@1", out],
        &["mount", folder],
        &["rekey", "--kek"],
        &["tenant", "show"],
        &["tenant", "set", tenant, "--quota", "1G"],
    ] {
        of(site, tenant, words).fails(status, said);
    }
    assert!(!restored.exists());
}

/// The objects that differ from before, by key.
fn changed(site: &Site, before: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let now = site.contents();
    let differs = |key: &&String| now.get(*key) != before.get(*key);
    let mut keys: Vec<_> = now.keys().chain(before.keys()).filter(differs).cloned().collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Which file holds each object, and when it was last changed.
fn files(site: &Site) -> BTreeMap<String, (u64, i64, i64)> {
    let file = |key: String| {
        let about = fs::metadata(site.vault.join(&key)).unwrap();
        (key, (about.ino(), about.ctime(), about.ctime_nsec()))
    };
    site.objects().into_iter().map(file).collect()
}

/// The objects that were written since, or are no more.
fn touched(site: &Site, before: &BTreeMap<String, (u64, i64, i64)>) -> Vec<String> {
    let now = files(site);
    let keys: BTreeSet<_> = now.keys().chain(before.keys()).filter(|key| now.get(*key) != before.get(*key)).collect();
    keys.into_iter().cloned().collect()
}

fn record_of(site: &Site, tenant: &str) -> PathBuf {
    site.folder_of(tenant).join("tenant.json")
}

/// Another machine with the same vault, keys and configuration, which has seen nothing.
fn newcomer(site: &Site) -> Site {
    let mut other = site.elsewhere();
    other.keyring.clone_from(&site.keyring);
    other.kms_config.clone_from(&site.kms_config);
    other
}

#[test]
fn three_tenants_of_two_kms_open_again_after_both_were_down() {
    let (mut bao, pki) = (Bao::start(), Pki::new());
    let mut kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let config = Config::default().bao("site-bao", &bao).bao("other-bao", &bao).kmip("hsm", &pki, &kmip);
    config.tenant("acme = \"site-bao\"").tenant("globex = \"other-bao\"").tenant("initech = \"hsm\"").write(&mut site);

    let made = init(&site, "acme");
    assert_eq!((&made["kms"], &made["kind"], &made["keyring"]), (&json!("site-bao"), &json!("vault"), &json!(null)));
    assert_eq!(
        (add(&site, "globex")["kind"].as_str(), add(&site, "initech")["kind"].as_str()),
        (Some("vault"), Some("kmip"))
    );
    assert!(!site.keyring.exists(), "no tenant needs one");

    let tenants = ["acme", "globex", "initech"];
    let contents: Vec<_> = (10..).zip(tenants).map(|(seed, tenant)| backup(&site, tenant, seed)).collect();
    let listed = site.reseal(["tenant", "list", "--json"]).ok().json_lines();
    let kinds: Vec<_> = listed.iter().map(|line| (line["kms"].as_str().unwrap(), line["points"].as_u64())).collect();
    assert_eq!(kinds, [("site-bao", Some(1)), ("other-bao", Some(1)), ("hsm", Some(1))]);

    let mounts: Vec<_> = tenants
        .map(|tenant| Mounted::new(&site, &format!("mnt-{tenant}"), &["--tenant", tenant]))
        .into_iter()
        .collect();
    bao.kill();
    kmip.stop();
    let bao_at = format!("localhost:{}", bao.port());
    all_fail(&site, "acme", 4, &["tenant acme", &bao_at, "try again"]);
    all_fail(&site, "initech", 4, &["tenant initech", &format!("127.0.0.1:{}", kmip.port()), "try again"]);
    // They hold their keys.
    for (mounted, content) in mounts.into_iter().zip(&contents) {
        assert!(fs::read(mounted.path.join("vm/latest/disk-0.raw")).unwrap() == *content);
        mounted.umount(&site);
    }
    bao.start_again();
    of(&site, "globex", ["list"]).fails(4, &["tenant globex", "is sealed", "unseal it"]);
    bao.unseal();
    kmip.run();
    for (tenant, content) in tenants.iter().zip(&contents) {
        assert_opens(&site, tenant, content);
    }
}

#[test]
fn a_kek_is_rotated_and_one_object_is_replaced() {
    let (bao, pki) = (shared(), Pki::new());
    let kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let config = Config::default().bao("bao", bao).kmip("hsm", &pki, &kmip);
    config.tenant("acme = \"bao\"").tenant("initech = \"hsm\"").write(&mut site);
    init(&site, "acme");
    add(&site, "initech");
    add(&site, "local");
    // What wraps its master says how an old record fails once its key is gone: by another key, or an older version.
    for (tenant, points, old_opens) in [
        ("acme", 100, "no longer allowed to decrypt"),
        ("initech", 2, "has no key"),
        ("local", 2, "not in the keyring"),
    ] {
        let mut content = Vec::new();
        for seed in 0..points {
            content = backup(&site, tenant, seed % 3);
        }
        let old_record = fs::read(record_of(&site, tenant)).unwrap();
        let (before, files) = (site.contents(), files(&site));
        let began = Instant::now();
        let rotated = of(&site, tenant, ["rekey", "--kek", "--json"]).ok();
        println!("{tenant}, {points} restore points: {:?}", began.elapsed());
        let told = rotated.json();
        let only = format!("tenants/{tenant}/tenant.json");
        assert_eq!((changed(&site, &before), &told["objects"]), (vec![only.clone()], &json!([only])));
        assert_eq!(touched(&site, &files), [only], "nothing else was written, not even with the same bytes");
        assert_eq!(told["generation"], 2);
        assert!(rotated.stderr.is_empty(), "{rotated:#?}");
        assert_opens(&site, tenant, &content);
        assert_opens(&newcomer(&site), tenant, &content);

        let new_record = fs::read(record_of(&site, tenant)).unwrap();
        fs::write(record_of(&site, tenant), &old_record).unwrap();
        all_fail(&site, tenant, 3, &["the generation of the tenant record is 1, but 2 was seen", "rolled back"]);
        // Who has seen nothing can't know; but the old key opens nothing any more.
        let refused = of(&newcomer(&site), tenant, ["list"]).expect(&[3, 4]);
        assert!(refused.stderr.contains(old_opens), "{refused:#?}");
        // A generation that was only written over does not help.
        let text = String::from_utf8(old_record).unwrap().replace("\"generation\": 1", "\"generation\": 9");
        fs::write(record_of(&site, tenant), text).unwrap();
        of(&site, tenant, ["list"]).expect(&[3, 4]);
        fs::write(record_of(&site, tenant), &new_record).unwrap();
        of(&site, tenant, ["rekey", "--kek"]).ok();
        assert_opens(&site, tenant, &content);
        let shown = of(&site, tenant, ["tenant", "show", "--json"]).ok().json();
        assert_eq!(
            (&shown["generation"], &shown["points"], &shown["epochs"]),
            (&json!(3), &json!(points), &json!([1]))
        );
    }
}

/// Killed at any moment, the record is the old or the new one, and some key opens it.
#[test]
fn a_rotation_that_is_killed_leaves_a_tenant_that_opens() {
    let site = Site::new();
    let content = backup(&site, "default", 5);
    let mut generations = BTreeSet::new();
    for step in 0u32..80 {
        let running = site.start(["rekey", "--kek"]);
        sleep(Duration::from_micros(250) * step);
        running.kill();
        let shown = site.reseal(["tenant", "show", "--json"]).ok().json();
        generations.insert(shown["generation"].as_u64().unwrap());
    }
    assert!(generations.len() > 3, "some should have come to their end: {generations:?}");
    assert_opens(&site, "default", &content);
    // One that comes to its end retires what those before it left.
    let old = fs::read(record_of(&site, "default")).unwrap();
    site.reseal(["rekey", "--kek"]).ok();
    fs::write(record_of(&site, "default"), old).unwrap();
    let mut other = site.elsewhere();
    other.keyring.clone_from(&site.keyring);
    other.reseal(["list"]).fails(4, &["is not in the keyring"]);
}

fn keyring(site: &Site) -> Keyring {
    Keyring::open(&site.keyring, |_| Err(io::ErrorKind::NotFound.into())).unwrap()
}

/// The tenant's record in a store whose next replacement goes wrong like this.
fn record_that_meets(site: &Site, fault: Option<Fault>) -> Record {
    let store = Arc::new(Watched::new(site.store()));
    let plan = |fault| Plan { operation: Some(Operation::Replace), after: 0, lasting: false, fault };
    store.plan(fault.map(plan));
    Record::read(store, "vault", &TenantName::new("default").unwrap()).unwrap()
}

/// However much a tenant has: its record is read and replaced, and nothing else is looked at.
#[test]
fn a_rotation_reads_two_objects_and_replaces_one() {
    let site = Site::new();
    for seed in 0..3 {
        backup(&site, "default", seed);
    }
    let store = Arc::new(Watched::new(site.store()));
    let record = Record::read(store.clone(), "vault", &TenantName::new("default").unwrap()).unwrap();
    let (keyring, key) = (keyring(&site), record.key());
    let rewrapped = record.rotate(&keyring).unwrap();
    rewrapped.record.retire(&rewrapped.old, &keyring).unwrap();
    let asked: Vec<_> = store.take_log();
    let asked: Vec<_> = asked.iter().map(|(operation, key)| (*operation, key.as_str())).collect();
    let expected =
        [(Operation::Get, "reseal.json"), (Operation::Get, key.as_str()), (Operation::Replace, key.as_str())];
    assert_eq!(asked, expected);
}

const LOST: [Fault; 2] = [Fault::Lies, Fault::Fails(io::ErrorKind::ConnectionReset)];

/// Whether the record was replaced or not, when nobody knows: no key is lost, and the next rotation leaves one key.
#[test]
fn a_replacement_whose_answer_was_lost_loses_no_key() {
    for fault in LOST {
        let site = Site::new();
        let content = backup(&site, "default", 5);
        let keyring = keyring(&site);
        assert!(record_that_meets(&site, Some(fault)).rotate(&keyring).is_err());
        assert_opens(&site, "default", &content);
        // Interrupted before the old key was retired.
        record_that_meets(&site, None).rotate(&keyring).unwrap();
        assert_opens(&site, "default", &content);
        assert!(keyring.list().unwrap().len() > 1);
        site.reseal(["rekey", "--kek"]).ok();
        let left: Vec<_> = keyring.list().unwrap().into_iter().map(|key| key.name.to_string()).collect();
        assert_eq!(left, [site.tenant().kms().key.clone()]);
        assert_opens(&site, "default", &content);
    }
}

/// The key is destroyed, but the record does not say so yet: this machine knows what it began, another one asks.
#[test]
fn an_erasure_that_was_interrupted_is_repeated() {
    for fault in LOST {
        let site = Site::new();
        backup(&site, "default", 5);
        site.reseal(["rekey", "--kek"]).ok();
        let keyring = keyring(&site);
        let record = record_that_meets(&site, Some(fault));
        let heads = Heads::new(&site.state, &record.scope(), false);
        assert!(record.erase(&keyring, &heads, Timestamp(1), false).is_err());
        assert_eq!(keyring.list().unwrap(), []);
        let erase = |site: &Site| site.reseal(["tenant", "erase", "default", "--yes", "default"]);
        if matches!(fault, Fault::Lies) {
            erase(&site).fails(3, &["was erased"]);
        } else {
            erase(&newcomer(&site)).fails(1, &["nothing was erased", "--key-is-gone"]);
            erase(&site).ok();
        }
        all_fail(&site, "default", 3, &["was erased"]);
    }
}

/// Two at once: one replaces the record, the other says so or comes after it; no key that is needed goes.
#[test]
fn rotations_at_once_lose_no_key() {
    let site = Site::new();
    let content = backup(&site, "default", 5);
    for _ in 0..5 {
        let running: Vec<_> = (0..4).map(|_| site.start(["rekey", "--kek"])).collect();
        let ended: Vec<_> = running.into_iter().map(|one| one.wait().expect(&[0, 1, 3, 4])).collect();
        assert!(ended.iter().any(|run| run.status == Some(0)), "{ended:#?}");
        site.reseal(["list"]).ok();
    }
    assert_opens(&site, "default", &content);
}

#[test]
fn a_record_that_names_another_kind_of_kms_sends_nothing_there() {
    let mut site = Site::new();
    backup(&site, "default", 5);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let token = private_file(&site.path("token"), "s.secret\n");
    let port = listener.local_addr().unwrap().port();
    Config::default().plain("bao", port, &token).tenant("default = \"bao\"").write(&mut site);
    all_fail(&site, "default", 1, &["tenant default", "\"keyring\"", "\"vault\"", "--kms-config"]);
    assert!(listener.accept().is_err(), "something was sent");
    // The other way round, no passphrase is asked and no keyring needed.
    let record = record_of(&site, "default");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"keyring\"", "\"vault\"")).unwrap();
    site.kms_config = None;
    fs::remove_file(&site.keyring).unwrap();
    all_fail(&site, "default", 1, &["\"vault\"", "\"keyring\"", "--kms-config"]);
    // A key of another name, where the configuration names one.
    Config::default()
        .plain("bao", port, &token)
        .tenant("default = { kms = \"bao\", key = \"this-one\" }")
        .write(&mut site);
    all_fail(&site, "default", 2, &["this-one", "nothing was sent"]);
    assert!(listener.accept().is_err(), "something was sent");
}

#[test]
fn a_configuration_that_is_wrong_or_missing_is_said_so() {
    let mut site = Site::new();
    site.kms_config = Some(site.path("none.toml"));
    site.reseal(["list"]).fails(2, &["none.toml", "no such file"]);
    fs::write(site.path("none.toml"), "[tenants]\ndefault = \"nowhere\"\n").unwrap();
    site.reseal(["list"]).fails(2, &["none.toml", "line 2", "[kms.nowhere]"]);
    fs::write(site.path("none.toml"), "[tenants]\nother = \"keyring\"\n").unwrap();
    site.reseal(["list"]).ok();
    site.reseal(["rekey", "--to-kms", "nowhere"]).fails(2, &["[kms.nowhere]"]);
}

/// Whatever is moved between tenants: nothing of the one opens as the other's.
#[test]
fn one_tenants_objects_never_open_as_anothers() {
    let mut site = Site::bare();
    Config::default().bao("bao", shared()).tenant("acme = \"bao\"").tenant("globex = \"bao\"").write(&mut site);
    init(&site, "acme");
    add(&site, "globex");
    let (acme, globex) = (backup(&site, "acme", 20), backup(&site, "globex", 21));
    let (a, g) = (site.folder_of("acme"), site.folder_of("globex"));
    let kept = site.path("kept");
    copy_folder(&g, &kept);
    let restore = || {
        fs::remove_dir_all(&g).unwrap();
        copy_folder(&kept, &g);
    };

    // The other's record in this one's folder; the folder under the other's name.
    fs::copy(a.join("tenant.json"), g.join("tenant.json")).unwrap();
    of(&site, "globex", ["list"]).fails(3, &["another tenant's record"]);
    of(&newcomer(&site), "globex", ["list"]).fails(3, &["another tenant's record"]);
    restore();
    copy_folder(&a, &site.folder_of("evil"));
    fs::write(site.path("kms.toml"), fs::read_to_string(site.path("kms.toml")).unwrap() + "evil = \"bao\"\n").unwrap();
    of(&site, "evil", ["list"]).fails(3, &["another tenant's record"]);
    fs::remove_dir_all(site.folder_of("evil")).unwrap();

    // The other's manifest and packs.
    for what in ["vms/vm/00000001.manifest", "packs"] {
        let (from, to) = (a.join(what), g.join(what));
        match to.is_dir() {
            true => fs::remove_dir_all(&to).unwrap(),
            false => fs::remove_file(&to).unwrap(),
        }
        copy_folder(&from, &to);
        of(&site, "globex", ["verify"]).fails(3, &[]);
        let out = site.path("out.raw");
        of(&site, "globex", ["restore", "--disk", "disk-0", "vm@1", out.to_str().unwrap()]).fails(3, &[]);
        restore();
    }
    assert_opens(&site, "acme", &acme);
    assert_opens(&site, "globex", &globex);
    // Equal disks are stored for each: nobody learns from sizes what another has.
    let (path, _) = disk(&site, 20);
    let stored = of(&site, "globex", ["backup", "--json", "vm", path.to_str().unwrap()]).ok().json();
    assert!(stored["stats"]["new"].as_u64().unwrap() >= DISK as u64, "{stored}");
}

#[test]
fn what_was_erased_opens_never_again_and_others_do() {
    let (bao, pki) = (shared(), Pki::new());
    let kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let config = Config::default().bao("bao", bao).kmip("hsm", &pki, &kmip);
    config.tenant("acme = \"bao\"").tenant("globex = \"bao\"").tenant("initech = \"hsm\"").write(&mut site);
    init(&site, "acme");
    for tenant in ["globex", "initech", "local"] {
        add(&site, tenant);
    }
    let globex = backup(&site, "globex", 31);
    for tenant in ["acme", "initech", "local"] {
        let content = backup(&site, tenant, 30);
        site.reseal(["tenant", "erase", tenant]).fails(2, &[tenant, "--yes"]);
        site.reseal(["tenant", "erase", tenant, "--yes", "globex"]).fails(2, &["nothing was erased"]);
        assert_opens(&site, tenant, &content);
        of(&site, tenant, ["rekey", "--kek"]).ok();
        let (before, old) = (site.contents(), fs::read(record_of(&site, tenant)).unwrap());
        let mounted = Mounted::new(&site, "mnt", &["--tenant", tenant]);
        let slow = site.disk("slow.raw");
        fs::write(&slow, Random::new(40).bytes(64 << 20)).unwrap();
        let words = ["--tenant", tenant, "backup", "slow", slow.to_str().unwrap(), "--limit-rate", "3M"];
        let running = site.start(words);
        let leases = || fs::read_dir(site.folder_of(tenant).join("leases")).unwrap().count();
        let began = Instant::now();
        while leases() < 3 {
            assert!(began.elapsed() < Duration::from_secs(10), "the backup does not begin");
            sleep(Duration::from_millis(10));
        }
        let erased = site.reseal(["tenant", "erase", tenant, "--yes", tenant, "--json"]).ok().json();
        // When it returns, nobody has the keys any more.
        assert_eq!((&erased["still_have_keys"], leases()), (&json!([]), 0));
        running.wait().fails(3, &["was erased", "this process ends"]);
        let key = serde_json::from_slice::<Value>(&old).unwrap()["kms"]["key"].clone();
        assert!(erased["keys_destroyed"].as_array().unwrap().contains(&key), "{erased}");
        // What the backup had begun goes with the next one.
        let changed: Vec<_> = changed(&site, &before).into_iter().filter(|key| !key.starts_with("tmp/")).collect();
        assert_eq!(changed, [format!("tenants/{tenant}/tenant.json")]);
        assert!(!is_mounted(&mounted.path), "the mount of {tenant} goes on");
        drop(mounted);
        all_fail(&site, tenant, 3, &[tenant, "was erased"]);
        all_fail(&newcomer(&site), tenant, 3, &[tenant, "was erased"]);
        site.reseal(["tenant", "erase", tenant, "--yes", tenant]).fails(3, &["was erased"]);
        // The old record put back: this machine knows, and for another one there is no key.
        let new = fs::read(record_of(&site, tenant)).unwrap();
        fs::write(record_of(&site, tenant), &old).unwrap();
        all_fail(&site, tenant, 3, &["rolled back"]);
        all_fail(&newcomer(&site), tenant, 4, &[tenant]);
        fs::write(record_of(&site, tenant), &new).unwrap();
        let listed = site.reseal(["tenant", "list", "--json"]).ok().json_lines();
        assert!(listed.iter().all(|line| line["erased"].is_string() == (line["tenant"] == tenant)), "{listed:#?}");
        assert_opens(&site, "globex", &globex);

        site.reseal(["tenant", "remove", tenant]).ok();
        assert!(!site.folder_of(tenant).exists());
        add(&site, tenant);
        let anew = backup(&site, tenant, 32);
        assert_opens(&site, tenant, &anew);
    }
}

/// Who has the keys and does not end is named: the erasure does not claim what it can't show.
#[test]
fn a_process_that_does_not_end_is_named_by_the_erasure() {
    let site = Site::new();
    let content = backup(&site, "default", 5);
    let mounted = Mounted::new(&site, "mnt", &[]);
    signal(mounted.process(), libc::SIGSTOP);
    let erased = site.reseal(["tenant", "erase", "default", "--yes", "default", "--json"]);
    signal(mounted.process(), libc::SIGCONT);
    let erased = erased.fails(1, &["is erased", "end them yourself", "mount at", &mounted.process().to_string()]);
    assert_eq!(erased.json()["still_have_keys"].as_array().unwrap().len(), 1);
    assert!(!content.is_empty());
    site.reseal(["list"]).fails(3, &["was erased"]);
    let began = Instant::now();
    while is_mounted(&mounted.path) {
        assert!(began.elapsed() < Duration::from_secs(20), "it ends once it can");
        sleep(Duration::from_millis(50));
    }
}

/// A key is destroyed only if it is known to be the tenant's.
#[test]
fn a_record_that_names_anothers_key_destroys_nothing() {
    let site = Site::new();
    add(&site, "other");
    let (content, other) = (backup(&site, "default", 5), backup(&site, "other", 6));
    let record = |tenant| record_of(&site, tenant);
    let key =
        |tenant| serde_json::from_slice::<Value>(&fs::read(record(tenant)).unwrap()).unwrap()["kms"]["key"].clone();
    let (own, others) = (key("default"), key("other"));
    let text = fs::read_to_string(record("default")).unwrap();
    let evil = |name: &str| fs::write(record("default"), text.replace(own.as_str().unwrap(), name)).unwrap();
    let erase = || site.reseal(["tenant", "erase", "default", "--yes", "default"]);
    evil(others.as_str().unwrap());
    erase().fails(3, &["does not open"]);
    site.reseal(["tenant", "remove", "default", "--destroy-key"]).fails(3, &["does not open"]);
    site.reseal(["rekey", "--kek"]).fails(3, &["does not open"]);
    evil("no-such-key");
    erase().fails(1, &["no-such-key", "nothing was erased", "--key-is-gone"]);
    fs::write(record("default"), &text).unwrap();
    assert_opens(&site, "default", &content);
    assert_opens(&site, "other", &other);
}

#[test]
fn only_a_tenant_without_points_is_removed() {
    let site = Site::new();
    add(&site, "other");
    let content = backup(&site, "other", 6);
    site.reseal(["tenant", "remove", "other"]).fails(1, &["other", "restore points (1)"]);
    assert_opens(&site, "other", &content);
    site.reseal(["tenant", "remove", "nobody"]).fails(1, &["no tenant nobody"]);
    let keys = |site: &Site| fs::read_to_string(&site.keyring).unwrap().matches("\"name\"").count();
    assert_eq!(keys(&site), 2);
    site.reseal(["tenant", "remove", "default"]).ok();
    assert!(!site.tenant_folder().exists());
    assert_eq!(keys(&site), 2, "a key goes only if that is asked for");
    add(&site, "default");
    site.reseal(["tenant", "remove", "default", "--destroy-key"]).ok();
    assert_eq!(keys(&site), 2);
    let listed = site.reseal(["tenant", "list", "--json"]).ok().json_lines();
    assert_eq!(listed.len(), 1);
    assert_opens(&site, "other", &content);
}

#[test]
fn a_tenant_moves_to_another_kms_without_its_data() {
    let (bao, pki) = (shared(), Pki::new());
    let kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let mut config = Config::default().bao("bao", bao).bao("second", bao).kmip("hsm", &pki, &kmip);
    config.write(&mut site);
    init(&site, "acme");
    let content = backup(&site, "acme", 40);
    site.reseal(["--tenant", "acme", "rekey", "--to-kms", "keyring"]).fails(2, &["already"]);
    for (nth, target) in ["bao", "second", "hsm", "keyring"].into_iter().enumerate() {
        let before = site.contents();
        let words = ["rekey", "--to-kms", target, "--json"];
        let moved = match target {
            "second" => of(&site, "acme", [&words[..], &["--destroy-key"]].concat()),
            _ => of(&site, "acme", words),
        };
        let moved = moved.ok().json();
        assert_eq!(changed(&site, &before), ["tenants/acme/tenant.json"]);
        assert_eq!((&moved["generation"], &moved["old_key_destroyed"]), (&json!(nth + 2), &json!(target == "second")));
        // Until the operator has changed the configuration.
        of(&site, "acme", ["list"]).expect(&[1, 4]);
        let again = of(&site, "acme", words).ok().json();
        assert_eq!((&again["objects"], &again["config"]), (&json!([]), &moved["config"]), "it may be repeated");
        config = config.only_tenant(moved["config"].as_str().unwrap());
        config.write(&mut site);
        assert_opens(&site, "acme", &content);
    }
    of(&site, "acme", ["rekey", "--kek"]).ok();
    assert_opens(&site, "acme", &content);
}

/// What answers where a KMS should be is nothing, or nobody.
#[test]
fn a_kms_that_never_answers_is_given_up_in_time() {
    let mut site = Site::bare();
    let token = private_file(&site.path("token"), "s.secret\n");
    Config::default().plain("bao", free_port(), &token).tenant("acme = \"bao\"").write(&mut site);
    of(&site, "acme", ["init", "--no-recovery"]).fails(4, &["tenant acme", "vault at", "can't be reached"]);
}
