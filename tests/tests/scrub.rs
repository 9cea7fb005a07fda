//! Verifications of a part, and those without keys: what they read, what they find, and what they can't.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// A VM of three restore points, each with another MiB of five.
fn site() -> Site {
    let site = Site::new();
    let path = site.disk("disk.raw");
    let mut content = Random::new(9).bytes(5 * MIB);
    for seed in 0..3 {
        content[seed * MIB..(seed + 1) * MIB].copy_from_slice(&Random::new(100 + seed as u64).bytes(MIB));
        fs::write(&path, &content).unwrap();
        site.backup("web", &path);
    }
    site
}

fn verify(site: &Site, words: &[&str]) -> Value {
    site.reseal([&["verify", "--json"], words].concat()).expect(&[0, 3]).json()
}

fn damaged(report: &Value) -> BTreeSet<String> {
    report["damaged"].as_array().unwrap().iter().map(|damage| damage["object"].as_str().unwrap().to_owned()).collect()
}

fn flip(path: &PathBuf, at: usize) -> Vec<u8> {
    let whole = fs::read(path).unwrap();
    let mut bytes = whole.clone();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
    whole
}

#[test]
fn rot_is_found_without_any_key() {
    let mut site = site();
    site.reseal(["tenant", "add", "acme", "--no-recovery"]).ok();
    let path = site.disk("disk.raw");
    site.reseal_of("acme", ["backup", "db", path.to_str().unwrap()]).ok();
    let whole = verify(&site, &[]);
    // Whoever looks has neither keyring nor state.
    let keyring = std::mem::replace(&mut site.keyring, PathBuf::from("/nowhere/keyring.json"));
    site.reseal(["verify"]).expect(&[1, 2, 4]);
    let report = verify(&site, &["--no-keys"]);
    assert_eq!((&report["damaged"], &report["points"]), (&json!([]), &json!(4)));
    assert!(report["bytes"].as_u64() > whole["bytes"].as_u64(), "of both tenants: {report}");
    assert!(site.reseal(["verify", "--no-keys"]).ok().stdout.contains("no rot found: 4 restore points"));
    let mut random = Random::new(1);
    for key in site.objects().into_iter().filter(|key| key.contains("/packs/")) {
        let path = site.vault.join(&key);
        let length = fs::read(&path).unwrap().len();
        // Anywhere but in the digest's last bytes, which say "pack" and nothing else.
        for at in [0, length / 2, length - 1, length - 129, length - 100, random.index(length)] {
            let whole = flip(&path, at);
            let run = site.reseal(["verify", "--no-keys"]);
            assert!(run.stdout.contains(&key) && run.stdout.contains("with the keys"), "{key} byte {at}: {run:?}");
            run.fails(3, &["1 damaged object"]);
            fs::write(&path, whole).unwrap();
        }
        for cut in [0, 60, length / 2, length - 1] {
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(damaged(&verify(&site, &["--no-keys"])), [key.clone()].into(), "cut at {cut}");
            fs::write(&path, whole).unwrap();
        }
    }
    let manifest = "tenants/default/vms/web/00000002.manifest".to_owned();
    let path = site.vault.join(&manifest);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 100, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        assert_eq!(damaged(&verify(&site, &["--no-keys"])), [manifest.clone()].into(), "cut at {cut}");
    }
    fs::write(&path, &whole).unwrap();
    // What has no digest in clear, only keys tell.
    flip(&path, whole.len() - 5);
    assert_eq!(damaged(&verify(&site, &["--no-keys"])), BTreeSet::new());
    site.keyring = keyring;
    assert_eq!(damaged(&verify(&site, &[])), [manifest].into());
}

#[test]
fn a_sample_reads_a_part_of_the_packs_and_another_one_each_time() {
    let site = site();
    let all = verify(&site, &[]);
    let packs = all["packs"].as_u64().unwrap();
    assert!(packs >= 6);
    assert_eq!(verify(&site, &["--sample", "100"])["bytes"], all["bytes"]);
    assert_eq!(verify(&site, &["--sample", "0.001"])["packs"], 1, "at least one");
    let status =
        |site: &Site| site.reseal(["status", "--json"]).expect(&[0, 3]).json()["tenants"][0]["verified"].clone();
    let before = status(&site);
    // Each pack is met sooner or later, and what is damaged in it found.
    let data = site.packs(1);
    let object = data.iter().max_by_key(|key| fs::metadata(site.vault.join(key)).unwrap().len()).unwrap();
    let whole = flip(&site.vault.join(object), 1000);
    let part = (packs * 3).div_ceil(10);
    for tries in 0.. {
        let report = verify(&site, &["--sample", "30%"]);
        assert_eq!(report["points"], 3, "all manifests are opened");
        assert_eq!(report["packs"], part);
        if report["damaged"] != json!([]) {
            assert_eq!(damaged(&report), [object.clone()].into());
            assert_eq!(report["damaged"][0]["hurts"], json!(["web@1", "web@2", "web@3"]));
            break;
        }
        assert!(tries < 60, "30 % of the packs never have this one");
    }
    assert_ne!(status(&site), before, "damage is known from then on");
    fs::write(site.vault.join(object), whole).unwrap();
    let known = status(&site);
    verify(&site, &["--sample", "100"]);
    assert_eq!(status(&site), known, "a part that is whole says nothing about the rest");
    // A pack that is missing is missed, whether it is in the sample or not.
    fs::remove_file(site.vault.join(object)).unwrap();
    assert_eq!(damaged(&verify(&site, &["--sample", "0.001"])), [object.clone()].into());
}

#[test]
fn what_new_restore_points_have_added_is_read_and_nothing_else() {
    let site = site();
    let all = verify(&site, &[])["bytes"].as_u64().unwrap();
    assert_eq!(verify(&site, &["--since", "1h"])["blobs"], verify(&site, &["web"])["blobs"], "all are new");
    let path = site.disk("disk.raw");
    // Longer than what follows takes.
    std::thread::sleep(Duration::from_millis(6100));
    let nothing = verify(&site, &["--since", "1s"]);
    assert_eq!((&nothing["points"], &nothing["packs"], &nothing["bytes"]), (&json!(3), &json!(0), &json!(0)));
    let mut content = fs::read(&path).unwrap();
    content[4 * MIB..].copy_from_slice(&Random::new(500).bytes(MIB));
    fs::write(&path, content).unwrap();
    let before: BTreeSet<String> = site.objects().into_iter().collect();
    site.backup("web", &path);
    let added: Vec<String> =
        site.objects().into_iter().filter(|key| key.contains("/packs/") && !before.contains(key)).collect();
    let report = verify(&site, &["--since", "6s"]);
    assert_eq!(report["packs"], added.len());
    let bytes = report["bytes"].as_u64().unwrap();
    assert!(bytes > MIB as u64 && bytes < MIB as u64 * 5 / 4 && bytes < all / 3, "{report}");
    // Damage elsewhere is for another verification.
    let old: Vec<String> = site.packs(1).into_iter().filter(|key| !added.contains(key)).collect();
    flip(&site.vault.join(&old[0]), 100);
    assert_eq!(damaged(&verify(&site, &["--since", "6s"])), BTreeSet::new());
    let new = site.packs(1).into_iter().find(|key| added.contains(key)).unwrap();
    flip(&site.vault.join(&new), 100);
    assert_eq!(damaged(&verify(&site, &["--since", "6s"])), [new].into());
}

#[test]
fn a_rate_is_held_and_wrong_words_are_named() {
    let site = site();
    let began = Instant::now();
    site.reseal(["verify", "--limit-rate", "4M"]).ok();
    assert!(began.elapsed() >= Duration::from_millis(1500), "8 MiB at 4 MiB a second");
    let began = Instant::now();
    site.reseal(["verify", "--no-keys", "--limit-rate", "4M"]).ok();
    assert!(began.elapsed() >= Duration::from_millis(1500));
    for words in [
        &["--sample", "0"][..],
        &["--sample", "101"],
        &["--sample", "x"],
        &["--since", "5"],
        &["--since", "1h", "--sample", "5"],
        &["--no-keys", "web"],
        &["--no-keys", "--since", "1h"],
    ] {
        site.reseal([&["verify"], words].concat()).expect(&[2]);
    }
    let nothing = Site::bare();
    nothing.reseal(["verify", "--no-keys"]).fails(1, &["is no vault"]);
}
