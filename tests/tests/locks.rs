//! A vault whose objects are locked: what each run locks, what prune leaves, and what one who has the bucket's keys can't do.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reseal_format::time::Timestamp;
use reseal_tests::mounting::Mounted;
use reseal_tests::owner::{Owner, Version};
use reseal_tests::process::{Run, run};
use reseal_tests::random::Random;
use reseal_tests::seaweed::shared;
use reseal_tests::site::Site;

const MIB: usize = 1 << 20;
const DAY: i64 = 24 * 3600 * 1000;

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis().try_into().unwrap()
}

fn in_seconds(seconds: i64) -> String {
    let until = Timestamp((now() / 1000 + seconds) * 1000).to_rfc3339();
    until.replace(".000", "")
}

/// A vault whose tenant locks what it writes for so many days, with one disk.
fn locked(name: &str, days: &str, mode: &str) -> (Site, Owner, Vec<u8>) {
    let (site, owner) = shared().locked_site(name);
    site.reseal(["init", "--no-recovery"]).ok();
    set_lock(&site, &["--lock", days, "--lock-mode", mode]).ok();
    let content = Random::new(7).bytes(12 * MIB);
    fs::write(site.disk("a"), &content).unwrap();
    (site, owner, content)
}

fn set_lock(site: &Site, words: &[&str]) -> Run {
    site.reseal(["tenant", "set", "default"].iter().chain(words))
}

/// Versions of packs, manifests and records; what hides them is none.
fn of_points(owner: &Owner) -> Vec<Version> {
    let is_one = |version: &Version| {
        let key = &version.key;
        !version.is_marker
            && (key.contains("/packs/")
                || [".manifest", "tenant.json", "reseal.json"].iter().any(|end| key.ends_with(end)))
    };
    owner.versions("").into_iter().filter(is_one).collect()
}

/// The same, without what was replaced.
fn newest(owner: &Owner) -> Vec<Version> {
    of_points(owner).into_iter().filter(|version| version.is_latest).collect()
}

/// Days, rounded down, for which the newest versions are locked at least.
fn locked_days(owner: &Owner) -> i64 {
    let until = newest(owner).into_iter().map(|version| {
        let until = owner.locked_until(&version).unwrap_or_else(|| panic!("{} is not locked", version.key));
        Timestamp::parse(&until).unwrap().0
    });
    (until.min().unwrap() - now()) / DAY
}

/// The disk's content at a point.
fn content_of(site: &Site, point: &str) -> Vec<u8> {
    let to = site.path("restored");
    let _ = fs::remove_file(&to);
    site.restore(point, "disk-0", &to).ok();
    fs::read(to).unwrap()
}

/// The site with its vault as it is now, and with its keys; a while later.
fn as_of_now(site: &Site) -> Site {
    std::thread::sleep(Duration::from_secs(2));
    let then = in_seconds(0);
    std::thread::sleep(Duration::from_secs(2));
    let mut past = site.elsewhere();
    fs::create_dir(past.keyring.parent().unwrap()).unwrap();
    fs::copy(&site.keyring, &past.keyring).unwrap();
    past.vault = format!("{}?as-of={then}", site.vault.display()).into();
    past
}

/// Removes what hides an object, and what was put in its place, so that what was locked is there again.
fn undo(owner: &Owner, locked: &[Version]) {
    for version in owner.versions("") {
        let is_ours = locked.iter().any(|ours| ours.id == version.id);
        let has_ours = locked.iter().any(|ours| ours.key == version.key);
        if has_ours && !is_ours {
            assert!(owner.delete(&version.key, Some(&version.id)), "{version:?}");
        }
    }
}

#[test]
fn where_nothing_can_be_locked_that_is_refused() {
    let folder = Site::new();
    let run = set_lock(&folder, &["--lock", "30"]);
    run.fails(1, &["objects can't be locked here"]);
    let bucket = shared().site("unlocked");
    set_lock(&bucket, &["--lock", "30"]).fails(1, &["made with Object Lock"]);
    for wrong in [&["--lock", "0"][..], &["--lock", "99999"], &["--lock", "x"], &["--lock", "3", "--no-lock"]] {
        set_lock(&bucket, wrong).fails(2, &[]);
    }
    let shown = bucket.reseal(["tenant", "show", "--json"]).ok().json();
    assert!(shown["lock"].is_null());
}

#[test]
fn what_a_point_leads_to_is_locked_and_each_run_locks_it_for_longer() {
    let (site, owner, content) = locked("runs", "8", "compliance");
    let first = site.backup("vm", &site.disk("a"));
    let until = Timestamp::parse(first["locked_until"].as_str().unwrap()).unwrap();
    // A quarter more than it must.
    assert!((9 * DAY..=10 * DAY).contains(&(until.0 - now())), "{first}");
    assert_eq!(locked_days(&owner), 9);
    // No run finds a lease, or what it was before it was renewed.
    let leases: Vec<_> =
        owner.versions("").into_iter().filter(|v| v.key.contains("/leases/") && v.is_latest && !v.is_marker).collect();
    assert_eq!(leases, []);
    // Another VM shares what is there, and its word is for itself.
    let mut other = content.clone();
    other[5 * MIB..6 * MIB].fill(3);
    fs::write(site.disk("b"), &other).unwrap();
    site.backup("other", &site.disk("b"));
    // The rule is for longer now, so all is locked anew, though only little is new.
    set_lock(&site, &["--lock", "100"]).ok();
    let mut changed = content.clone();
    changed[9 * MIB..10 * MIB].fill(4);
    fs::write(site.disk("a"), &changed).unwrap();
    let second = site.backup("vm", &site.disk("a"));
    let until = Timestamp::parse(second["locked_until"].as_str().unwrap()).unwrap();
    assert!((124 * DAY..=125 * DAY).contains(&(until.0 - now())), "{second}");
    let days = |version: &Version| {
        Timestamp::parse(&owner.locked_until(version).unwrap()).map(|until| (until.0 - now()) / DAY).unwrap()
    };
    let (mut long, mut short) = (Vec::new(), Vec::new());
    for version in newest(&owner) {
        match days(&version) {
            124 | 125 => long.push(version),
            9 | 10 => short.push(version),
            other => panic!("{version:?} for {other} days"),
        }
    }
    // What is of the other VM alone, and what only the one before needs, stays locked as it was.
    let manifests = |of: &[Version]| of.iter().filter(|version| version.key.ends_with(".manifest")).count();
    assert_eq!((manifests(&long), manifests(&short)), (1, 2), "{long:?} {short:?}");
    // The clusters of both restore points, the new index, the vault's file and the tenant's record.
    assert_eq!((long.len(), short.len()), (6, 5), "{long:?} {short:?}");
    // The next one finds all as it should be: what it shares is not locked again.
    let third = site.backup("vm", &site.disk("a"));
    assert!(third["locked_until"].as_str() <= second["locked_until"].as_str(), "{third}");
    assert!(content_of(&site, "vm@1") == content && content_of(&site, "vm@2") == changed);
    site.verify();
    let shown = site.reseal(["show", "vm@2"]).ok().stdout;
    assert!(shown.contains("locked      until "), "{shown}");
    // What is locked in compliance mode stays so, though the rule is softer.
    set_lock(&site, &["--lock", "200", "--lock-mode", "governance"]).ok();
    let soft = site.backup("vm", &site.disk("a"));
    assert!(soft["locked_until"].as_str() > second["locked_until"].as_str(), "{soft}");
    // Without a rule nothing more is locked.
    set_lock(&site, &["--no-lock"]).ok();
    let fourth = site.backup("vm", &site.disk("b"));
    assert!(fourth["locked_until"].is_null());
}

#[test]
fn copies_and_what_is_mended_are_locked_too() {
    let (target, owner, content) = locked("copies", "8", "compliance");
    let source = Site::new();
    fs::write(source.disk("a"), &content).unwrap();
    source.backup("vm", &source.disk("a"));
    let (to, keyring) = (target.vault.to_str().unwrap(), target.keyring.to_str().unwrap());
    run(source.command("reseal", ["copy", "--to", to, "--to-keyring", keyring]).envs(&target.variables)).ok();
    assert_eq!(locked_days(&owner), 9);
    // Somebody with the bucket's keys puts another object in a pack's place, which hides what is locked.
    let pack = newest(&owner).into_iter().find(|version| version.key.contains("/packs/")).unwrap();
    assert!(owner.put(&pack.key, b"no pack"));
    target.reseal(["verify"]).expect(&[3]);
    let (from, keyring) = (source.vault.to_str().unwrap(), source.keyring.to_str().unwrap());
    target.reseal(["verify", "--repair-from", from, "--repair-keyring", keyring]).ok();
    target.verify();
    assert!(content_of(&target, "vm@1") == content);
    let packs = |of: Vec<Version>| of.into_iter().filter(|version| version.key.contains("/packs/")).collect::<Vec<_>>();
    let mended = packs(newest(&owner)).into_iter().find(|version| version.key.ends_with(".1")).unwrap();
    assert!(owner.locked_until(&mended).is_some(), "{mended:?} is not locked");
}

#[test]
fn what_is_locked_outlives_forgetting_and_prune_and_goes_after_that() {
    let (site, owner, content) = locked("pruned", "1", "governance");
    site.backup("vm", &site.disk("a"));
    fs::write(site.disk("a"), Random::new(8).bytes(12 * MIB)).unwrap();
    site.backup("vm", &site.disk("a"));
    let before = of_points(&owner);
    let forgotten = site.reseal(["forget", "vm@1"]).ok().stdout;
    assert!(forgotten.contains("its space stays") && forgotten.contains("is locked until"), "{forgotten}");
    let dry = site.reseal(["prune", "--dry-run", "--json"]).ok().json();
    assert_eq!((dry["freed"].as_u64(), dry["locked_points"].as_u64()), (Some(0), Some(1)), "{dry}");
    let told = site.reseal(["prune"]).ok().stdout;
    assert!(told.contains("what 1 forgotten restore point led to: kept by the object store until"), "{told}");
    let run = site.reseal(["prune", "--json"]).ok().json();
    assert_eq!((dry["locked_until"].is_string(), &dry["locked_until"]), (true, &run["locked_until"]));
    assert_eq!(
        (run["freed"].as_u64(), run["locked_points"].as_u64(), &run["held_back"]),
        (Some(0), Some(1), &serde_json::json!({}))
    );
    assert_eq!(of_points(&owner), before);
    site.reseal(["restore", "vm@1", "x"]).fails(1, &[]);
    // The tombstone is not locked. Without it the point is there again.
    let is_tombstone = |version: &&Version| version.key.ends_with(".forgotten") && version.is_latest;
    let tombstone = owner.versions("").iter().find(is_tombstone).cloned().unwrap();
    assert!(owner.delete(&tombstone.key, None));
    assert!(content_of(&site, "vm@1") == content);
    site.verify();
    // When the locks end, all goes that nothing needs: no version of it is left.
    site.reseal(["forget", "vm@1"]).ok();
    let soon = in_seconds(2);
    for version in newest(&owner) {
        assert!(!owner.shorten(&version, "GOVERNANCE", &soon, false), "without the right to bypass it");
        assert!(owner.shorten(&version, "GOVERNANCE", &soon, true), "{version:?}");
    }
    std::thread::sleep(Duration::from_secs(4));
    let run = site.reseal(["prune", "--json"]).ok().json();
    assert!(run["freed"].as_u64().unwrap() > 10 << 20 && run["locked"].as_u64() == Some(0), "{run}");
    let left = of_points(&owner);
    let gone: Vec<_> = before.iter().filter(|version| !left.contains(version)).collect();
    assert!(gone.iter().any(|version| version.key.ends_with("00000001.manifest")) && gone.len() >= 3, "{gone:?}");
    let keys: Vec<_> = owner.versions("").into_iter().map(|version| version.key).collect();
    assert!(gone.iter().all(|version| !keys.contains(&version.key)), "nothing hides them: they are gone");
    site.verify();
    assert!(content_of(&site, "vm@2") == Random::new(8).bytes(12 * MIB));
}

#[test]
fn a_thief_of_the_buckets_keys_hides_what_is_locked_and_removes_nothing() {
    let (site, owner, content) = locked("stolen", "1", "compliance");
    site.backup("vm", &site.disk("a"));
    let locked = newest(&owner);
    let past = as_of_now(&site);
    for version in &locked {
        assert!(!owner.delete(&version.key, Some(&version.id)), "{} was removed", version.key);
        assert!(!owner.shorten(version, "COMPLIANCE", &in_seconds(2), true));
        assert!(!owner.shorten(version, "GOVERNANCE", &in_seconds(2), true));
        // What he can do: put something else in its place, and hide it.
        assert!(owner.put(&version.key, b"ransom"));
    }
    site.reseal(["verify"]).fails(3, &[]);
    for version in &locked {
        assert!(owner.delete(&version.key, None));
    }
    site.reseal(["list"]).fails(1, &[]);
    // As it was before: all can be read and copied, and nothing changed.
    past.verify();
    let listed = past.reseal(["list", "vm"]).ok().stdout;
    assert!(listed.contains("vm@1"), "{listed}");
    assert!(content_of(&past, "vm@1") == content);
    let mounted = Mounted::new(&past, "mnt", &[]);
    assert!(fs::read(mounted.point(&past, "vm", 1).join("disk-0.raw")).unwrap() == content);
    mounted.umount(&past).ok();
    let disk = site.disk("a");
    let backup = ["backup", "vm", disk.to_str().unwrap()];
    for change in [&["forget", "vm@1"][..], &backup, &["tenant", "set", "default", "--no-lock"]] {
        past.reseal(change).fails(1, &["the vault is shown as it was"]);
    }
    let saved = Site::new();
    let (to, keyring) = (saved.vault.to_str().unwrap(), saved.keyring.to_str().unwrap());
    past.reseal(["copy", "--to", to, "--to-keyring", keyring]).ok();
    assert!(content_of(&saved, "vm@1") == content);
    undo(&owner, &locked);
    site.verify();
    assert!(content_of(&site, "vm@1") == content);
}

#[test]
fn a_thief_of_the_servers_shell_forgets_all_and_changes_the_keys_and_frees_nothing() {
    let (site, owner, content) = locked("shell", "1", "compliance");
    site.backup("vm", &site.disk("a"));
    let locked = newest(&owner);
    let past = as_of_now(&site);
    set_lock(&site, &["--no-lock"]).ok();
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    site.reseal(["forget", "vm@1"]).ok();
    site.reseal(["prune", "--grace", "1s", "--min-unused", "1"]).ok();
    let left = of_points(&owner);
    let is_left = |version: &Version| left.iter().any(|left| left.id == version.id);
    assert!(locked.iter().all(is_left), "{locked:?} {left:?}");
    site.reseal(["show", "vm@1"]).fails(1, &[]);
    // With the keys of then all is as it was, whatever was made since.
    past.verify();
    assert!(content_of(&past, "vm@1") == content);
    // With those of now, once no tombstone says that it was forgotten.
    let tombstones = owner.versions("").into_iter().filter(|version| version.key.ends_with(".forgotten"));
    for version in tombstones.filter(|version| !version.is_marker) {
        assert!(owner.delete(&version.key, Some(&version.id)));
    }
    site.verify();
    assert!(content_of(&site, "vm@1") == content);
}
