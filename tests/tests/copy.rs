//! A second vault: what is copied to it is right, under other keys, and only what is missing; whatever is forgotten, damaged or
//! interrupted on either side.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use reseal_format::manifest::Manifest;
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::process::Run;
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::Site;
use reseal_vault::Holder;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// A vault and another one, each with its own keyring and state.
struct Pair {
    site: Site,
    other: Site,
    /// What the disks of each point are, in their order.
    contents: Vec<Vec<u8>>,
}

impl Pair {
    fn new() -> Pair {
        Pair { site: Site::new(), other: Site::new(), contents: Vec::new() }
    }

    /// The next restore point of `web`, in which so much from there on is other bytes.
    fn backup(&mut self, from: usize, length: usize) -> Value {
        let mut content = self.contents.last().cloned().unwrap_or_else(|| {
            let mut content = Random::new(1).bytes(6 * MIB + 777);
            content[MIB..2 * MIB].fill(0);
            content
        });
        let seed = self.contents.len() as u64 + 10;
        content[from..from + length].copy_from_slice(&Random::new(seed).bytes(length));
        let path = self.site.disk("web.raw");
        fs::write(&path, &content).unwrap();
        let definition = self.site.path("web.xml");
        fs::write(&definition, format!("<domain><name>web {seed}</name></domain>")).unwrap();
        let words = ["backup", "--json", "web", path.to_str().unwrap(), "--definition", definition.to_str().unwrap()];
        let made = self.site.reseal(words).ok().json();
        self.contents.push(content);
        made
    }

    fn words(&self, more: &[&str]) -> Vec<String> {
        let to = ["--to", self.other.vault.to_str().unwrap(), "--to-keyring", self.other.keyring.to_str().unwrap()];
        [&["copy", "--json"], &to[..], more].concat().into_iter().map(str::to_owned).collect()
    }

    fn run(&self, more: &[&str]) -> Run {
        self.site.reseal(self.words(more))
    }

    /// Copies; the points that were, as `VM@NUMBER` here and there, and what was stored for them.
    fn copy(&self, more: &[&str]) -> Vec<(String, String, u64)> {
        let lines = self.run(more).ok().json_lines();
        let copied = lines.iter().filter(|line| line["event"] == "copied");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        copied
            .map(|line| (text(&line["point"]), text(&line["to"]), line["stats"]["stored"].as_u64().unwrap()))
            .collect()
    }

    fn manifest(site: &Site, number: u32) -> Manifest {
        site.tenant().point(&vm("web"), number).unwrap().manifest
    }

    /// The points of the copy are those, of the source's numbers.
    #[track_caller]
    fn check(&self, points: &[(u32, usize)]) {
        let report = self.other.verify();
        assert_eq!(report["points"], points.len());
        let tenant = self.other.tenant();
        for &(number, of) in points {
            let read = LibraryDisk::open(&tenant, "web", number, "disk-0").unwrap().all().unwrap();
            assert!(read == self.contents[of - 1], "web@{number} of the copy is not web@{of}");
        }
    }
}

#[test]
fn a_copy_is_the_same_under_other_keys_and_only_what_is_missing_is_copied() {
    let mut pair = Pair::new();
    for nth in 0..3 {
        pair.backup(nth * MIB + 5, MIB / 2);
    }
    pair.run(&["nobody"]).fails(1, &["there is no VM nobody"]);
    let other = pair.other.vault.to_str().unwrap();
    pair.run(&["--to-tenant", "nobody"]).fails(1, &[&format!("{other}: "), "no tenant nobody"]);
    let planned = pair.run(&["--dry-run"]).ok().json_lines();
    assert_eq!(planned.len(), 4);
    assert!(pair.other.reseal(["list", "--json"]).ok().json_lines().is_empty());
    let copied = pair.copy(&[]);
    let names: Vec<_> = copied.iter().map(|(from, to, _)| (from.as_str(), to.as_str())).collect();
    assert_eq!(names, [("web@1", "web@1"), ("web@2", "web@2"), ("web@3", "web@3")]);
    assert!(copied[0].2 > 5 * MIB as u64 && copied[1].2 < MIB as u64 && copied[2].2 < MIB as u64, "{copied:?}");
    pair.check(&[(1, 1), (2, 2), (3, 3)]);
    for number in 1..=3 {
        let [here, there] = [&pair.site, &pair.other].map(|site| Pair::manifest(site, number));
        assert_eq!((here.point_id, here.created), (there.point_id, there.created));
        assert_eq!((&here.definition, &here.warnings), (&there.definition, &there.warnings));
        assert_ne!(here.vm_id, there.vm_id);
        assert_eq!(here.disks[0].source, there.disks[0].source);
        assert_eq!(here.disks[0].used_clusters, there.disks[0].used_clusters);
        let claim = there.disks[0].claim.as_ref();
        assert_eq!(claim.map(|claim| claim.method.as_str()), (number > 1).then_some("copy"));
        assert!(claim.is_none_or(|claim| claim.changed < MIB as u64), "only what differs was read");
    }
    // Not a byte of one vault is in the other.
    let [here, there] = [&pair.site, &pair.other].map(|site| site.contents());
    assert!(here.keys().filter(|key| key.contains("/packs/")).all(|key| !there.contains_key(key)));
    assert!(pair.other.reseal(["list"]).ok().stdout.contains(&Pair::manifest(&pair.site, 2).created.to_string()));

    assert_eq!(pair.copy(&[]), []);
    pair.backup(4 * MIB, 100);
    pair.site.backup("db", &pair.site.disk("web.raw"));
    let copied = pair.copy(&["web"]);
    assert!(copied.len() == 1 && copied[0].2 < MIB as u64 / 4, "{copied:?}");
    let copied = pair.copy(&[]);
    assert!(copied.len() == 1 && copied[0].0 == "db@1" && copied[0].2 < MIB as u64 / 4, "the same content: {copied:?}");
    assert_eq!(pair.other.verify()["points"], 5);
    // Without the first vault, its keys or its state it is a vault like others, which has kept its own policy.
    fs::remove_dir_all(&pair.site.vault).unwrap();
    pair.other.reseal(["forget", "web", "--keep-last", "1"]).ok();
    pair.other.reseal(["prune"]).ok();
    let to = pair.other.disk("restored");
    pair.other.restore("web@latest", "disk-0", &to).ok();
    assert!(fs::read(to).unwrap() == pair.contents[3]);
}

#[test]
fn each_side_forgets_what_it_likes() {
    let mut pair = Pair::new();
    for nth in 0..3 {
        pair.backup(nth * MIB, 100);
    }
    pair.copy(&[]);
    // The copy's newest is forgotten there, and does not come again; the next is compared with what is left.
    pair.other.reseal(["forget", "web@3", "web@1"]).ok();
    pair.backup(4 * MIB, 100);
    assert_eq!(
        pair.copy(&[]).iter().map(|(from, to, _)| (from.as_str(), to.as_str())).collect::<Vec<_>>(),
        [("web@4", "web@4")]
    );
    pair.check(&[(2, 2), (4, 4)]);
    // Here what was copied last is forgotten, and pruned.
    pair.backup(5 * MIB, 100);
    pair.site.reseal(["forget", "web@1", "web@2", "web@3", "web@4"]).ok();
    pair.site.reseal(["prune", "--min-unused", "1"]).ok();
    let copied = pair.copy(&[]);
    assert_eq!((copied.len(), copied[0].0.as_str()), (1, "web@5"));
    assert!(copied[0].2 < MIB as u64 / 2, "it has nearly all: {copied:?}");
    pair.check(&[(2, 2), (4, 4), (5, 5)]);
    pair.other.reseal(["forget", "web@2", "web@4", "web@5"]).ok();
    pair.other.reseal(["prune"]).ok();
    assert_eq!(pair.copy(&[]), []);
    pair.backup(0, 100);
    assert_eq!(pair.copy(&[]).len(), 1);
    pair.check(&[(6, 6)]);
    // A number that was given up is no copy.
    let tenant = pair.other.tenant();
    let under = tenant.rekey_lease(&Holder::this_process("prune".to_owned())).unwrap();
    tenant.fence(&vm("web"), 7, &*under).unwrap();
    drop(under);
    pair.backup(MIB, 100);
    assert_eq!(pair.copy(&[])[0].1, "web@8");
    pair.check(&[(6, 6), (8, 7)]);
}

#[test]
fn what_is_no_copy_is_not_mixed_with_copies() {
    let mut pair = Pair::new();
    pair.backup(0, 100);
    pair.other.backup("web", &pair.site.disk("web.raw"));
    pair.run(&[]).fails(1, &["is no copy", "--to-tenant"]);
    pair.other.reseal(["tenant", "add", "copies", "--no-recovery"]).ok();
    let run = pair.run(&["--to-tenant", "copies"]).ok();
    assert_eq!(run.json_lines()[0]["to"], "web@1");
    let shown = pair.other.reseal_of("copies", ["list", "--json"]).ok().json_lines();
    assert_eq!(shown.len(), 1);
    // To itself, to nothing, with the wrong keys.
    let vault = pair.site.vault.to_str().unwrap();
    pair.site.reseal(["copy", "--to", vault]).fails(2, &["is the tenant that is copied from"]);
    pair.site.reseal(["copy"]).expect(&[2]);
    pair.site.reseal(["copy", "--to", "/nowhere/at/all"]).expect(&[1, 4]);
    let without_keys = ["copy", "--to", pair.other.vault.to_str().unwrap()];
    pair.site.reseal(without_keys).fails(4, &["is not in the keyring"]);
    // From the other side: the same command in the other folder.
    let from = ["copy", "--json", "--from", vault, "--keyring", pair.site.keyring.to_str().unwrap()];
    let to = ["--to", pair.other.vault.to_str().unwrap(), "--to-keyring", pair.other.keyring.to_str().unwrap()];
    let run = pair.other.reseal([&from[..], &to, &["--to-tenant", "copies"]].concat()).ok();
    assert_eq!(run.json_lines()[0]["copied"], json!(0));
}

#[test]
fn what_is_damaged_is_left_out_and_the_rest_is_copied() {
    let mut pair = Pair::new();
    pair.backup(0, 100);
    let before: Vec<String> = pair.site.packs(1);
    pair.backup(2 * MIB, MIB);
    let new: Vec<PathBuf> = pair
        .site
        .packs(1)
        .into_iter()
        .filter(|key| !before.contains(key))
        .map(|key| pair.site.vault.join(key))
        .collect();
    // All of what was new in web@2 is other bytes in web@3.
    pair.backup(2 * MIB, MIB);
    let mut bytes = fs::read(&new[0]).unwrap();
    bytes[5000] ^= 1;
    fs::write(&new[0], bytes).unwrap();
    let run = pair.run(&[]);
    let lines = run.json_lines();
    run.fails(3, &["1 damaged restore point left out", "web@2 is left out"]);
    assert_eq!((&lines[1]["event"], &lines[1]["point"]), (&json!("left_out"), &json!("web@2")));
    pair.check(&[(1, 1), (2, 3)]);
    assert_eq!(pair.copy(&[]), []);
    // A manifest that does not open.
    let manifest = pair.site.tenant_folder().join("vms/web/00000003.manifest");
    let whole = fs::read(&manifest).unwrap();
    let mut bytes = whole.clone();
    bytes[200] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    pair.run(&[]).expect(&[1, 3]);
    fs::write(&manifest, whole).unwrap();
    pair.backup(0, 100);
    assert_eq!(pair.copy(&[]).len(), 1);
}

#[test]
fn a_copy_that_is_killed_goes_on_where_it_was() {
    for seed in seeds(5) {
        let mut pair = Pair::new();
        for nth in 0..4 {
            pair.backup(nth * MIB, MIB / 2);
        }
        let mut random = Random::new(seed);
        for _ in 0..3 {
            let running = pair.site.start(pair.words(&[]));
            sleep(Duration::from_micros(random.below(150_000)));
            running.kill();
            pair.other.verify();
        }
        pair.copy(&[]);
        pair.check(&[(1, 1), (2, 2), (3, 3), (4, 4)]);
        // What was stored for nothing was used, or is given back.
        pair.other.reseal(["prune", "--min-unused", "1"]).ok();
        let bytes = |site: &Site| -> u64 {
            let packs = site.objects().into_iter().filter(|key| key.contains("/packs/"));
            packs.map(|key| fs::metadata(site.vault.join(key)).unwrap().len()).sum()
        };
        let (here, there) = (bytes(&pair.site), bytes(&pair.other));
        assert!(there < here + here / 8, "{there} bytes for {here}");
    }
}
