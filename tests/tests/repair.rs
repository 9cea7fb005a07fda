//! What is damaged in a vault is mended with what a copy has: whatever is wrong with the packs, and however it ends.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_store::Store;
use reseal_tests::faults::{Fault, Plan, Watched};
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::model::ReadDisk;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Run, Running};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::{Site, copy_folder};
use reseal_vault::Holder;
use reseal_writer::BackupError;
use reseal_writer::repair::{Repair, Repaired};
use reseal_writer::verify::{Part, Report, What};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
/// Bytes of a trailer.
const TRAILER: usize = 128;

/// A vault and its copy, each with its own keyring and state.
struct Copied {
    site: Site,
    other: Site,
    /// What the disk of each point of `web` is.
    contents: Vec<Vec<u8>>,
}

impl Copied {
    fn new() -> Copied {
        Copied { site: Site::new(), other: Site::new(), contents: Vec::new() }
    }

    /// Three restore points of one VM, one of another that has the same clusters, one of two disks, and their copies.
    fn usual() -> Copied {
        let mut copied = Copied::new();
        for nth in 0..3 {
            copied.backup(nth * MIB + 5, MIB / 2);
        }
        copied.site.backup("db", &copied.site.disk("web.raw"));
        let [root, data] = [("root", 1), ("data", 9)].map(|(name, seed)| {
            let path = copied.site.disk(name);
            fs::write(&path, Random::new(seed).bytes(300_000)).unwrap();
            (name.to_owned(), path)
        });
        copied.site.backup_disks("app", &[root, data]);
        copied.copy();
        copied
    }

    /// The next restore point of `web`, in which so much from there on is other bytes.
    fn backup(&mut self, from: usize, length: usize) -> Value {
        let mut content = self.contents.last().cloned().unwrap_or_else(|| {
            let mut content = Random::new(1).bytes(4 * MIB + 777);
            content[MIB..2 * MIB].fill(0);
            content
        });
        let seed = self.contents.len() as u64 + 10;
        content[from..from + length].copy_from_slice(&Random::new(seed).bytes(length));
        let path = self.site.disk("web.raw");
        fs::write(&path, &content).unwrap();
        self.contents.push(content);
        self.site.backup("web", &path)
    }

    fn copy(&self) {
        let to = ["--to", self.other.vault.to_str().unwrap(), "--to-keyring", self.other.keyring.to_str().unwrap()];
        self.site.reseal([&["copy"], &to[..]].concat()).ok();
    }

    fn words(&self, more: &[&str]) -> Vec<String> {
        let (vault, keyring) = (self.other.vault.to_str().unwrap(), self.other.keyring.to_str().unwrap());
        let from = ["verify", "--json", "--repair-from", vault, "--repair-keyring", keyring];
        [&from[..], more].concat().into_iter().map(str::to_owned).collect()
    }

    fn start(&self, more: &[&str]) -> Running {
        self.site.start(self.words(more))
    }

    fn run(&self, more: &[&str]) -> Run {
        self.site.reseal(self.words(more))
    }

    /// Repairs, after which all is right; the objects that were written.
    #[track_caller]
    fn repair(&self) -> Vec<Value> {
        let report = self.run(&[]).ok().json();
        assert_eq!(report["damaged"], json!([]), "{report}");
        assert_eq!(report["repair"]["not_mended"], json!({}));
        report["repair"]["mended"].as_array().unwrap().clone()
    }

    /// Repairs, after which no restore point is hurt; what is damaged and not needed any more goes. The objects that were written.
    #[track_caller]
    fn repair_and_prune(&self) -> Vec<Value> {
        let report = self.run(&[]).expect(&[0, 3]).json();
        for damage in report["damaged"].as_array().unwrap() {
            assert_eq!(damage["hurts"], json!([]), "{report}");
            let why = report["repair"]["not_mended"][damage["object"].as_str().unwrap()].as_str().unwrap();
            assert!(why.contains("reseal prune"), "{report}");
        }
        self.site.reseal(["prune"]).ok();
        report["repair"]["mended"].as_array().unwrap().clone()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.site.vault.join(key)
    }

    /// The keys of all packs.
    fn packs(&self) -> Vec<String> {
        self.site.objects().into_iter().filter(|key| key.contains("/packs/")).collect()
    }

    /// Everything verifies, each pack is there once, and each point is what it was.
    #[track_caller]
    fn check(&self) {
        self.site.verify();
        let packs = self.packs();
        let ids: BTreeSet<_> = packs.iter().map(|key| key.rsplit_once('.').unwrap().0).collect();
        assert_eq!(ids.len(), packs.len(), "a damaged generation is there still: {packs:?}");
        assert_eq!(self.site.unfinished(), Vec::<PathBuf>::new());
        self.check_points("web", &(1..=self.contents.len()).collect::<Vec<_>>());
        let data = self.site.disk("data");
        if data.exists() {
            let disk = LibraryDisk::open(&self.site.tenant(), "app", 1, "data").unwrap();
            assert!(disk.all().unwrap() == fs::read(data).unwrap(), "app@1 is not what it was");
        }
    }

    #[track_caller]
    fn check_points(&self, name: &str, points: &[usize]) {
        let tenant = self.site.tenant();
        for &number in points {
            let disk = LibraryDisk::open(&tenant, name, u32::try_from(number).unwrap(), "disk-0").unwrap();
            assert!(disk.all().unwrap() == self.contents[number - 1], "{name}@{number} is not what it was");
        }
    }
}

fn damaged(report: &Value) -> BTreeSet<String> {
    report["damaged"].as_array().unwrap().iter().map(|damage| damage["object"].as_str().unwrap().to_owned()).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// What may become of a pack; `None`: it is gone.
fn harms(whole: &[u8]) -> BTreeMap<&'static str, Option<Vec<u8>>> {
    let length = whole.len();
    let number = |at: usize| u32::from_le_bytes(whole[length - TRAILER + at..][..4].try_into().unwrap()) as usize;
    let (count, blobs) = (number(36), number(40));
    let ids = blobs + count * 32 + 16;
    let flipped = |at: usize| {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 0x10;
        Some(bytes)
    };
    let mut overwritten = whole.to_vec();
    Random::new(7).fill(&mut overwritten[blobs / 3..blobs / 2]);
    [
        ("a blob", flipped(blobs / 2)),
        ("the table of ids", flipped(blobs + 3)),
        ("the table of lengths", flipped(ids + 3)),
        ("the salt", flipped(length - TRAILER + 60)),
        ("the digest", flipped(length - 30)),
        ("overwritten", Some(overwritten)),
        ("cut off", Some(whole[..length / 2].to_vec())),
        ("cut by a byte", Some(whole[..length - 1].to_vec())),
        ("longer", Some([whole, &[0; 100]].concat())),
        ("empty", Some(Vec::new())),
        ("zeros", Some(vec![0; length])),
        ("missing", None),
    ]
    .into()
}

fn harm(path: &PathBuf, bytes: Option<&Vec<u8>>) {
    match bytes {
        Some(bytes) => fs::write(path, bytes).unwrap(),
        None => fs::remove_file(path).unwrap(),
    }
}

#[test]
fn whatever_is_wrong_with_a_pack_it_is_mended() {
    let copied = Copied::usual();
    let [data, index] = [1, 2].map(|kind| copied.site.packs(kind).len());
    for kind in [1, 2] {
        for nth in 0..[data, index][kind - 1] {
            let names: Vec<_> = harms(&fs::read(copied.path(&copied.site.packs(1)[0])).unwrap()).into_keys().collect();
            for what in names {
                // Which has another generation each time.
                let key = &copied.site.packs(u8::try_from(kind).unwrap())[nth];
                let whole = fs::read(copied.path(key)).unwrap();
                harm(&copied.path(key), harms(&whole)[what].as_ref());
                let found = copied.site.reseal(["verify", "--json"]).expect(&[3]).json();
                let (pack, _) = key.rsplit_once('.').unwrap();
                assert!(damaged(&found).iter().all(|key| key.starts_with(pack)), "{what}: {found}");
                let mended = copied.repair();
                assert_eq!(mended.len(), 1, "{key}, {what}: {mended:?}");
                let (pack, generation) = key.rsplit_once('.').unwrap();
                // Of one that is missing only the index remembers a generation.
                let before = if what == "missing" { 0 } else { generation.parse::<u32>().unwrap() };
                assert_eq!(mended[0]["object"], format!("{pack}.{}", before + 1), "{what}");
                assert_eq!(mended[0]["hurt"], found["damaged"][0]["hurts"], "{what}");
                let is_mild = ["the table of ids", "the digest"].contains(&what);
                assert_eq!(mended[0]["blobs"].as_u64().unwrap() == 0, is_mild, "{key}, {what}: {mended:?}");
                copied.check();
            }
        }
    }
    // The data is there once, as before.
    assert_eq!([1, 2].map(|kind| copied.site.packs(kind).len()), [data, index]);
    let before = copied.site.contents();
    assert_eq!(copied.repair(), [] as [Value; 0]);
    assert!(copied.site.contents() == before, "nothing is done where nothing is wrong");
    copied.site.reseal(["prune"]).ok();
    copied.check();
}

#[test]
fn many_at_once_are_mended_while_restore_points_are_read() {
    let mut copied = Copied::usual();
    let tenant = copied.site.tenant();
    let open: Vec<_> = (1..=3).map(|number| LibraryDisk::open(&tenant, "web", number, "disk-0").unwrap()).collect();
    for disk in &open {
        disk.all().unwrap();
    }
    let mut random = Random::new(3);
    for key in copied.packs() {
        let whole = fs::read(copied.path(&key)).unwrap();
        let harms = harms(&whole);
        harm(&copied.path(&key), harms.values().nth(random.index(harms.len())).unwrap().as_ref());
    }
    assert!(copied.site.reseal(["verify"]).expect(&[3]).stdout.contains("DAMAGED"));
    assert_eq!(copied.site.reseal(["status", "--json"]).expect(&[3]).status, Some(3));
    let mended = copied.repair_and_prune();
    assert!(mended.len() >= 5, "{mended:?}");
    let from: BTreeSet<_> = mended.iter().flat_map(|mended| strings(&mended["from"])).collect();
    assert!(
        !from.is_empty() && from.iter().all(|point| point.starts_with("web@") || ["app@1", "db@1"].contains(point)),
        "{from:?}"
    );
    copied.check();
    assert_eq!(copied.site.reseal(["status", "--json"]).expect(&[0, 3]).json()["tenants"][0]["verified"]["damaged"], 0);
    for (disk, content) in open.iter().zip(&copied.contents) {
        assert!(disk.all().unwrap() == *content, "who read before reads on");
    }
    let to = copied.site.disk("restored");
    copied.site.restore("web@2", "disk-0", &to).ok();
    assert!(fs::read(to).unwrap() == copied.contents[1]);
    // What was mended is relied on again, and copied from.
    assert_eq!(copied.backup(0, 0)["stats"]["new"], 0);
    copied.copy();
    copied.other.verify();
}

/// Who has the tables of a pack still reads in it what nobody else can: where that led to may be gone since it was made again.
#[test]
fn who_has_read_what_is_lost_by_now_reads_on_when_it_was_made_again() {
    let copied = Copied::usual();
    let tenant = copied.site.tenant();
    let open: Vec<_> = (1..=3).map(|number| LibraryDisk::open(&tenant, "web", number, "disk-0").unwrap()).collect();
    for disk in &open {
        disk.all().unwrap();
    }
    for (kind, what) in [(1, "cut off"), (2, "the table of lengths")] {
        for key in copied.site.packs(kind) {
            let whole = fs::read(copied.path(&key)).unwrap();
            harm(&copied.path(&key), harms(&whole)[what].as_ref());
        }
    }
    copied.repair_and_prune();
    copied.check();
    for (disk, content) in open.iter().zip(&copied.contents) {
        assert!(disk.all().unwrap() == *content);
    }
}

#[test]
fn an_older_restore_point_of_the_copy_is_enough_and_what_it_lacks_stays_as_it_is() {
    let mut copied = Copied::new();
    copied.backup(5, MIB / 2);
    let old = copied.site.packs(1);
    copied.copy();
    copied.backup(2 * MIB, MIB);
    let new: Vec<_> = copied.site.packs(1).into_iter().filter(|key| !old.contains(key)).collect();
    copied.site.reseal(["hold", "web@1"]).ok();
    for key in [&old[0], &new[0]] {
        fs::write(copied.path(key), []).unwrap();
    }
    let run = copied.run(&[]);
    let report = run.json();
    run.fails(3, &["1 damaged object left", "1 mended"]);
    assert_eq!(damaged(&report), [new[0].clone()].into());
    assert_eq!(report["damaged"][0]["hurts"], json!(["web@2"]));
    let why = report["repair"]["not_mended"][&new[0]].as_str().unwrap();
    assert!(why.contains("no restore point of the other vault"), "{why}");
    assert_eq!(strings(&report["repair"]["mended"][0]["from"]), ["web@1"]);
    copied.check_points("web", &[1]);
    assert!(copied.path(&new[0]).exists(), "what is not replaced is not removed");
    let before = copied.site.contents();
    assert_eq!(copied.run(&[]).expect(&[3]).json()["repair"]["mended"], json!([]));
    assert_eq!(before, copied.site.contents(), "where nothing is gained nothing is written");
    // The point and its tombstone: then nothing needs what is damaged.
    copied.site.reseal(["forget", "web@2"]).ok();
    let report = copied.run(&[]).expect(&[3]).json();
    assert!(report["repair"]["not_mended"][&new[0]].as_str().unwrap().contains("reseal prune"), "{report}");
    copied.site.reseal(["prune"]).ok();
    copied.site.verify();
}

#[test]
fn what_is_damaged_in_both_stays_damaged_until_one_is_whole() {
    let copied = Copied::usual();
    let largest = |site: &Site| {
        let length = |key: &String| fs::metadata(site.vault.join(key)).unwrap().len();
        site.packs(1).into_iter().max_by_key(length).unwrap()
    };
    let (ours, theirs) = (largest(&copied.site), largest(&copied.other));
    let their_bytes = fs::read(copied.other.vault.join(&theirs)).unwrap();
    let mut flipped = their_bytes.clone();
    flipped[3 * MIB / 4] ^= 1;
    fs::write(copied.other.vault.join(&theirs), flipped).unwrap();
    // One cluster is nowhere; all others are in the copy.
    for (what, is_there) in [("many blobs", true), ("missing", false)] {
        let key = copied.packs().into_iter().find(|key| key.starts_with(ours.rsplit_once('.').unwrap().0)).unwrap();
        let there = fs::read(copied.path(&key)).unwrap();
        let bytes = is_there.then(|| {
            let mut bytes = there.clone();
            (1000..3 * MIB).step_by(MIB / 16).for_each(|at| bytes[at] ^= 1);
            bytes
        });
        harm(&copied.path(&key), bytes.as_ref());
        let report = copied.run(&[]).expect(&[3]).json();
        let mended = report["repair"]["mended"].as_array().unwrap();
        assert_eq!(mended.len(), 1, "{what}: {report}");
        assert_eq!(damaged(&report), [mended[0]["object"].as_str().unwrap().to_owned()].into(), "{what}: {report}");
        assert_eq!(copied.path(&key).exists(), bytes.is_some(), "{what}: the damaged one stays, if there is one");
        // All but one cluster can be read.
        let tenant = copied.site.tenant();
        let disk = LibraryDisk::open(&tenant, "web", 3, "disk-0").unwrap();
        let read = |at: usize| {
            let mut cluster = vec![0; 65_536];
            let is_read = disk.try_read(at as u64, &mut cluster).is_ok();
            assert!(!is_read || cluster == copied.contents[2][at..at + 65_536], "{what}: wrong bytes are served");
            is_read
        };
        let unread = (0..4 * MIB).step_by(65_536).filter(|at| !read(*at)).count();
        assert!(unread <= 1, "{what}: {unread} clusters can't be read");
        let again = copied.run(&[]).expect(&[3]).json();
        assert_eq!(again["repair"]["mended"], json!([]), "{what}");
        // The copy is whole again.
        fs::write(copied.other.vault.join(&theirs), &their_bytes).unwrap();
        assert_eq!(copied.repair().len(), 1, "{what}");
        copied.check();
        let mut flipped = their_bytes.clone();
        flipped[3 * MIB / 4] ^= 1;
        fs::write(copied.other.vault.join(&theirs), flipped).unwrap();
    }
}

#[test]
fn clusters_are_believed_only_if_they_are_the_ones() {
    let mut copied = Copied::new();
    copied.backup(0, 100);
    // Another backup of the same disk is no copy, whatever it is called.
    copied.other.backup("web", &copied.site.disk("web.raw"));
    let key = copied.site.packs(1)[0].clone();
    let whole = fs::read(copied.path(&key)).unwrap();
    harm(&copied.path(&key), harms(&whole)["a blob"].as_ref());
    let run = copied.run(&[]).expect(&[3]);
    assert_eq!(run.json()["repair"]["mended"], json!([]));
    assert!(fs::read(copied.path(&key)).unwrap() != whole && copied.packs().contains(&key));

    // One that says it is a copy, and has other bytes: our table of ids tells.
    let liar = Site::new();
    let point = copied.site.tenant().point(&vm("web"), 1).unwrap().manifest;
    let path = liar.disk("web.raw");
    let mut content = Random::new(2).bytes(copied.contents[0].len());
    content[MIB..2 * MIB].fill(0);
    fs::write(&path, content).unwrap();
    pretend(&liar, &path, &point);
    let copied = Copied { other: liar, ..copied };
    let run = copied.run(&[]).expect(&[3]);
    assert_eq!(run.json()["repair"]["mended"], json!([]));
    fs::write(copied.path(&key), whole).unwrap();
    copied.check();
}

/// Makes a restore point that has id and time of another one.
fn pretend(site: &Site, disk: &std::path::Path, of: &reseal_format::manifest::Manifest) {
    use reseal_tests::library::backup_as;
    use reseal_writer::backup::CopyOf;
    let (tenant, name) = (site.tenant(), of.disks[0].name.clone());
    let heads = site.heads(&tenant);
    let copy_of = CopyOf { point: of.point_id, created: of.created, warnings: Vec::new() };
    let made = backup_as(&tenant, &heads, of.vm.clone(), name, disk, Some(copy_of)).unwrap();
    assert_eq!(made.disks[0].used_clusters, of.disks[0].used_clusters);
}

/// A disk whose index has two levels, and everything that it was stored in.
#[test]
fn an_index_is_made_again_with_all_that_is_below() {
    let mut copied = Copied::new();
    let mut content = vec![0; 200 * MIB];
    for nth in 0..6 {
        let at = nth * 37 * MIB;
        content[at..at + MIB].copy_from_slice(&Random::new(nth as u64).bytes(MIB));
    }
    let path = copied.site.disk("web.raw");
    for nth in 0..2 {
        content[nth * 100 * MIB + 3 * MIB..][..MIB / 4].copy_from_slice(&Random::new(50).bytes(MIB / 4));
        fs::write(&path, &content).unwrap();
        copied.site.backup("web", &path);
        copied.contents.push(content.clone());
    }
    copied.copy();
    let bytes =
        |copied: &Copied| copied.packs().iter().map(|key| fs::metadata(copied.path(key)).unwrap().len()).sum::<u64>();
    let before = bytes(&copied);
    for kinds in [&[2][..], &[1], &[1, 2]] {
        for key in kinds.iter().flat_map(|kind| copied.site.packs(*kind)) {
            fs::remove_file(copied.path(&key)).unwrap();
        }
        assert!(!copied.repair().is_empty());
        copied.check();
        copied.site.reseal(["prune", "--min-unused", "1"]).ok();
        copied.check();
        let after = bytes(&copied);
        assert!(after < before + before / 8, "{kinds:?}: {before} bytes have become {after}");
    }
    // A leaf whose clusters are damaged too.
    for key in copied.packs() {
        let mut bytes = fs::read(copied.path(&key)).unwrap();
        bytes[10] ^= 1;
        fs::write(copied.path(&key), bytes).unwrap();
    }
    copied.repair_and_prune();
    copied.check();
}

/// A cluster below the lost index is damaged in the copy: nothing is written for it, however often it is tried.
#[test]
fn an_index_that_can_not_be_made_again_leaves_nothing_behind() {
    let mut copied = Copied::new();
    copied.backup(0, 100);
    copied.copy();
    let theirs = copied.other.vault.join(&copied.other.packs(1)[0]);
    let whole = fs::read(&theirs).unwrap();
    harm(&theirs, harms(&whole)["a blob"].as_ref());
    for key in copied.packs() {
        fs::remove_file(copied.path(&key)).unwrap();
    }
    let before = copied.site.contents();
    for _ in 0..2 {
        let report = copied.run(&[]).expect(&[3]).json();
        assert_eq!(report["repair"]["mended"], json!([]));
        assert_eq!(report["damaged"][0]["hurts"], json!(["web@1"]));
        assert!(copied.site.contents() == before);
    }
    fs::write(theirs, whole).unwrap();
    copied.repair();
    copied.check();
}

/// A prune or a change of keys died after it had written the next generation, which was damaged then.
#[test]
fn what_another_generation_has_needs_no_copy() {
    let copied = Copied::usual();
    let length = |key: &String| fs::metadata(copied.path(key)).unwrap().len();
    let key = copied.site.packs(1).into_iter().max_by_key(length).unwrap();
    let whole = fs::read(copied.path(&key)).unwrap();
    copied.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    let newest = key.replace(".0", ".1");
    let again = fs::read(copied.path(&newest)).unwrap();
    // The one before, under a key that is gone, is of no use.
    fs::write(copied.path(&key), &whole).unwrap();
    harm(&copied.path(&newest), harms(&again)["overwritten"].as_ref());
    let mended = copied.repair();
    assert_eq!((mended.len(), &mended[0]["object"]), (1, &json!(key.replace(".0", ".2"))));
    copied.check();
    // One under the same key is, and whoever died is made up for.
    let newest = key.replace(".0", ".2");
    let good = fs::read(copied.path(&newest)).unwrap();
    harm(&copied.path(&newest), harms(&good)["overwritten"].as_ref());
    assert_eq!(copied.repair().len(), 1);
    let newest = key.replace(".0", ".3");
    let better = fs::read(copied.path(&newest)).unwrap();
    fs::write(copied.path(&key.replace(".0", ".2")), &good).unwrap();
    harm(&copied.path(&newest), harms(&better)["overwritten"].as_ref());
    let mended = copied.repair();
    assert_eq!((mended.len(), &mended[0]["blobs"]), (1, &json!(0)));
    copied.check();
    fs::write(copied.path(&newest), &better).unwrap();
    let run = copied.run(&[]).ok().json();
    assert_eq!(run["repair"]["removed"], json!([newest]));
    copied.check();
}

#[test]
fn it_may_be_killed_at_any_moment() {
    for seed in seeds(6) {
        let copied = Copied::usual();
        let mut random = Random::new(seed);
        for key in copied.packs() {
            if random.below(3) > 0 {
                let whole = fs::read(copied.path(&key)).unwrap();
                let harms = harms(&whole);
                harm(&copied.path(&key), harms.values().nth(random.index(harms.len())).unwrap().as_ref());
            }
        }
        for _ in 0..4 {
            let running = copied.start(&[]);
            sleep(Duration::from_micros(random.below(200_000)));
            running.kill();
            // Nothing that could be read can't be any more, and nothing wrong is served.
            copied.site.reseal(["verify", "--json"]).expect(&[0, 3]);
        }
        copied.repair_and_prune();
        assert_eq!(copied.repair(), [] as [Value; 0]);
        copied.site.store().sweep().unwrap();
        copied.check();
    }
}

#[test]
fn backups_and_mounts_go_on_meanwhile() {
    for seed in seeds(4) {
        let mut copied = Copied::usual();
        let mut random = Random::new(seed);
        let mounted = Mounted::new(&copied.site, "mnt", &[]);
        let disk = mounted.disk(&copied.site, "web", 1, "disk-0");
        for key in copied.site.packs(1) {
            let whole = fs::read(copied.path(&key)).unwrap();
            let harms = harms(&whole);
            harm(&copied.path(&key), harms.values().nth(random.index(harms.len())).unwrap().as_ref());
        }
        let running = copied.start(&[]);
        sleep(Duration::from_micros(random.below(100_000)));
        copied.backup(random.index(3 * MIB), MIB / 2);
        running.wait().expect(&[0, 3]);
        copied.repair_and_prune();
        let mut read = vec![0; copied.contents[0].len()];
        disk.read(0, &mut read);
        assert!(read == copied.contents[0], "seed {seed:#x}");
        drop(disk);
        mounted.umount(&copied.site);
        copied.check();
    }
}

/// A small vault in which something is wrong with one pack of each kind, and all of a copy.
fn small() -> Copied {
    let mut copied = Copied { contents: vec![Random::new(1).bytes(400_000)], ..Copied::new() };
    for nth in 0..2 {
        copied.backup(nth * 200_000, 150_000);
    }
    copied.contents.remove(0);
    copied.copy();
    let [data, index] = [1, 2].map(|kind| copied.site.packs(kind));
    let whole = fs::read(copied.path(&data[0])).unwrap();
    harm(&copied.path(&data[0]), harms(&whole)["overwritten"].as_ref());
    fs::remove_file(copied.path(&data[1])).unwrap();
    fs::write(copied.path(&index[0]), []).unwrap();
    copied
}

/// Repairs in this process, through these stores.
fn repair_in(copied: &Copied, ours: Arc<dyn Store>, theirs: Arc<dyn Store>) -> Result<(Report, Repaired), BackupError> {
    let tenant = copied.site.tenant_in(ours)?;
    let heads = copied.site.heads(&tenant);
    let repair = Repair {
        from: copied.other.tenant_in(theirs)?,
        heads: &heads,
        // There is no lookup: one that a process opens stays open in it.
        state: PathBuf::from("/dev/null/no-lookup"),
        what: What::Everything,
        part: Part::All,
        threads: 1,
        limit_rate: None,
        expect: &|_| (),
        progress: &|_| (),
        say: &|_| (),
        tenant,
    };
    repair.run()
}

/// Clusters of all points that can be read. What is read has to be right.
fn readable(copied: &Copied) -> BTreeSet<(usize, usize)> {
    let tenant = copied.site.tenant();
    let mut readable = BTreeSet::new();
    for (nth, content) in copied.contents.iter().enumerate() {
        let disk = LibraryDisk::open(&tenant, "web", u32::try_from(nth + 1).unwrap(), "disk-0").unwrap();
        for (cluster, bytes) in content.chunks(65_536).enumerate() {
            let mut read = vec![0; bytes.len()];
            if disk.try_read(cluster as u64 * 65_536, &mut read).is_ok() {
                assert!(read == bytes, "web@{} has wrong bytes in cluster {cluster}", nth + 1);
                readable.insert((nth, cluster));
            }
        }
    }
    readable
}

#[test]
fn wherever_it_dies_nothing_is_lost_and_the_next_one_ends_it() {
    let copied = small();
    let before = copied.site.path("before");
    copy_folder(&copied.site.vault, &before);
    let could = readable(&copied);
    assert!(could.len() < 10);
    for (is_ours, lasting, fault) in [
        (true, true, Fault::Fails(ErrorKind::NotConnected)),
        (true, false, Fault::Lies),
        (true, false, Fault::Fails(ErrorKind::StorageFull)),
        (false, true, Fault::Fails(ErrorKind::NotConnected)),
    ] {
        for after in 0.. {
            fs::remove_dir_all(&copied.site.vault).unwrap();
            copy_folder(&before, &copied.site.vault);
            let [ours, theirs] = [&copied.site, &copied.other].map(|site| Arc::new(Watched::new(site.store())));
            let watched = if is_ours { ours.clone() } else { theirs.clone() };
            watched.plan(Some(Plan { operation: None, after, lasting, fault }));
            let result = repair_in(&copied, ours, theirs);
            let happened = watched.happened();
            let log = watched.take_log();
            if let Ok((report, repaired)) = &result {
                assert_eq!(report.damaged.len(), repaired.not_mended.len());
                // A pack may be left that nothing needs any more.
                let is_hurt = report.damaged.iter().any(|damage| !damage.hurts.is_empty());
                assert!(!is_hurt, "a store that fails is no damage: {:?} {report:?}", log.get(after));
            }
            assert!(readable(&copied).is_superset(&could), "after {:?}", log.get(after));
            let (report, _) = repair_in(&copied, copied.site.store(), copied.other.store()).unwrap();
            let hurt: Vec<_> = report.damaged.iter().filter(|damage| !damage.hurts.is_empty()).collect();
            assert!(hurt.is_empty(), "after {:?}: {hurt:?}", log.get(after));
            assert_eq!(readable(&copied).len(), 14);
            if !happened {
                result.unwrap();
                assert!(after > 20, "it has more operations than {after}");
                break;
            }
        }
    }
    copied.site.reseal(["prune"]).ok();
    copied.site.store().sweep().unwrap();
    copied.check();
}

#[test]
fn one_at_a_time_rewrites_packs_under_the_newest_key() {
    let copied = Copied::usual();
    copied.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    let key = copied.site.packs(1)[0].clone();
    let whole = fs::read(copied.path(&key)).unwrap();
    harm(&copied.path(&key), harms(&whole)["a blob"].as_ref());
    let alone = copied.site.tenant().rekey_lease(&Holder::this_process("a test".into())).unwrap();
    let running = copied.start(&[]);
    sleep(Duration::from_millis(1500));
    assert!(!running.has_ended(), "it waits");
    drop(alone);
    let run = running.wait().ok();
    assert!(run.stderr.contains("waiting") && run.stderr.contains("a test"), "{run:?}");
    let mended = run.json()["repair"]["mended"][0]["object"].as_str().unwrap().to_owned();
    let epoch = |bytes: &[u8]| bytes[bytes.len() - TRAILER + 32];
    let new = fs::read(copied.path(&mended)).unwrap();
    assert_eq!(epoch(&new), epoch(&whole));
    assert_eq!(copied.site.tenant().keys().current_epoch(), u32::from(epoch(&new)));
    copied.check();
    // Where nothing is wrong, nobody is waited for.
    let _alone = copied.site.tenant().rekey_lease(&Holder::this_process("a test".into())).unwrap();
    copied.repair();
}

#[test]
fn a_part_is_mended_and_a_rate_is_held() {
    let copied = Copied::usual();
    let packs = copied.site.packs(1);
    for key in &packs {
        let whole = fs::read(copied.path(key)).unwrap();
        harm(&copied.path(key), harms(&whole)["a blob"].as_ref());
    }
    let began = Instant::now();
    let report = copied.run(&["web@1", "--limit-rate", "4M"]).ok().json();
    assert!(began.elapsed() >= Duration::from_millis(700));
    assert!(!report["repair"]["mended"].as_array().unwrap().is_empty());
    copied.check_points("web", &[1]);
    let report = copied.run(&["--sample", "100"]).ok().json();
    assert_eq!(report["damaged"], json!([]));
    copied.check();
}

#[test]
fn manifests_are_not_mended_and_wrong_words_are_named() {
    let copied = Copied::usual();
    let manifest = "tenants/default/vms/web/00000002.manifest";
    let whole = fs::read(copied.path(manifest)).unwrap();
    let mut bytes = whole.clone();
    bytes[200] ^= 1;
    fs::write(copied.path(manifest), bytes).unwrap();
    let key = copied.site.packs(1)[0].clone();
    fs::remove_file(copied.path(&key)).unwrap();
    let report = copied.run(&[]).expect(&[3]).json();
    assert!(damaged(&report).contains(manifest));
    assert!(report["repair"]["not_mended"][manifest].as_str().unwrap().contains("only packs are mended"), "{report}");
    fs::write(copied.path(manifest), whole).unwrap();
    copied.repair();
    copied.check();

    let (vault, keyring) = (copied.other.vault.to_str().unwrap(), copied.other.keyring.to_str().unwrap());
    let mine = copied.site.vault.to_str().unwrap();
    let files = copied.site.path("files");
    copy_folder(&copied.site.vault, &files);
    for same in [mine, files.to_str().unwrap()] {
        copied.site.reseal(["verify", "--repair-from", same]).fails(2, &["is the tenant that is verified"]);
    }
    copied.site.reseal(["verify", "--no-keys", "--repair-from", vault]).expect(&[2]);
    copied.site.reseal(["verify", "--repair-keyring", keyring]).expect(&[2]);
    copied.site.reseal(["verify", "--repair-from", vault]).fails(4, &["is not in the keyring"]);
    copied.site.reseal(["verify", "--repair-from", "/nowhere/at/all"]).expect(&[1, 4]);
    copied.run(&["--repair-tenant", "nobody"]).fails(1, &[&format!("{vault}: "), "no tenant nobody"]);
    // Another tenant of the other vault has nothing of it.
    copied.other.reseal(["tenant", "add", "empty", "--no-recovery"]).ok();
    fs::remove_file(copied.path(&copied.site.packs(1)[0])).unwrap();
    copied.run(&["--repair-tenant", "empty"]).expect(&[3]);
    let text = copied.site.reseal(copied.words(&[]).into_iter().filter(|word| word != "--json")).ok();
    assert!(text.stdout.contains("MENDED") && text.stdout.contains("all right"), "{text:?}");
    copied.check();
    copied.site.reseal(["copy", "--to", vault, "--to-keyring", keyring, "--to-tenant", "empty"]).ok();
    fs::remove_file(copied.path(&copied.site.packs(1)[0])).unwrap();
    copied.run(&["--repair-tenant", "empty"]).ok();
    copied.check();
}
