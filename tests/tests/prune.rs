//! Space that is given back: all that nothing needs goes, nothing that anybody relies on does, whoever is at work and whenever the
//! prune dies.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_format::dated_note::DatedKind;
use reseal_format::hold_note::Hold;
use reseal_format::ids::PointId;
use reseal_format::layout::parse_pack_file;
use reseal_format::verdict_note::{BootVerdict, Expectation};
use reseal_store::Lease;
use reseal_tests::faults::{Fault, Operation, Plan, Watched};
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Run, Running, signal};
use reseal_tests::random::{Random, seeds};
use reseal_tests::remote::Sites;
use reseal_tests::site::{Site, copy_folder, files_below};
use reseal_vault::{Holder, Pins, State, Tenant, VaultError};
use reseal_writer::BackupError;
use reseal_writer::prune::{Prune, Pruned};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// VMs with restore points, and what their disks were.
struct Life {
    site: Site,
    /// By VM and number, for those that were not forgotten.
    points: Vec<(String, u32, Vec<u8>)>,
}

impl Life {
    fn new() -> Life {
        Life { site: Site::new(), points: Vec::new() }
    }

    fn backup(&mut self, name: &str, content: &[u8]) -> Value {
        let path = self.site.disk(name);
        fs::write(&path, content).unwrap();
        let made = self.site.backup(name, &path);
        self.points.push((name.to_owned(), u32::try_from(made["number"].as_u64().unwrap()).unwrap(), content.to_vec()));
        made
    }

    fn forget(&mut self, name: &str, number: u32) {
        self.site.reseal(["forget", &format!("{name}@{number}")]).ok();
        self.points.retain(|(of, other, _)| (of.as_str(), *other) != (name, number));
    }

    /// Prunes, with these arguments; what `--json` says.
    #[track_caller]
    fn prune(&self, arguments: &[&str]) -> Value {
        self.site.reseal([&["prune", "--json"], arguments].concat()).ok().json()
    }

    /// All is there that should be.
    #[track_caller]
    fn check(&self) {
        let report = self.site.verify();
        assert_eq!(report["points"], self.points.len());
        self.read(&self.site.tenant());
    }

    #[track_caller]
    fn read(&self, tenant: &Arc<Tenant>) {
        for (name, number, content) in &self.points {
            let read = LibraryDisk::open(tenant, name, *number, "disk-0").unwrap().all().unwrap();
            assert!(read == *content, "{name}@{number} differs");
        }
    }

    /// The vault is as that copy of it again.
    fn put_back(&self, copy: &Path) {
        fs::remove_dir_all(&self.site.vault).unwrap();
        copy_folder(copy, &self.site.vault);
    }

    /// The tenant over a store that does as it is told.
    fn watched(&self) -> (Arc<Watched>, Arc<Tenant>) {
        let store = Arc::new(Watched::new(self.site.store()));
        let tenant = self.site.tenant_in(store.clone()).unwrap();
        (store, tenant)
    }

    fn packs(&self) -> BTreeSet<String> {
        self.site.objects().into_iter().filter(|key| key.contains("/packs/")).collect()
    }

    fn bytes(&self) -> u64 {
        self.packs().iter().map(|key| fs::metadata(self.site.vault.join(key)).unwrap().len()).sum()
    }

    /// After everything was forgotten, nothing is left but tombstones.
    #[track_caller]
    fn nothing_stays(mut self) {
        for (name, number, _) in self.points.clone() {
            self.forget(&name, number);
        }
        self.prune(&[]);
        let left: Vec<_> = self.site.objects().into_iter().filter(|key| key.starts_with("tenants/")).collect();
        let may_stay = |key: &String| key.ends_with(".forgotten") || key.ends_with("tenant.json");
        assert!(left.iter().all(may_stay), "{left:?}");
        self.site.verify();
    }
}

fn content(seed: u64, mib: usize) -> Vec<u8> {
    Random::new(seed).bytes(mib * MIB)
}

#[test]
fn what_nothing_needs_goes_and_all_else_stays_as_it_was() {
    let mut life = Life::new();
    let mut disk = content(1, 4);
    for seed in 0..5u64 {
        disk[..MIB].copy_from_slice(&content(100 + seed, 1));
        life.backup("web", &disk);
    }
    // Half of it is what web@2 has.
    let shared = life.points[1].2.clone();
    life.backup("db", &[&shared[..MIB], &content(7, 1)[..]].concat());
    let before = life.site.contents();
    assert_eq!(life.prune(&[])["freed"], 0);
    assert_eq!(life.site.contents(), before, "there is nothing to prune");

    for number in [1, 2, 4] {
        life.forget("web", number);
    }
    let forgotten = life.site.contents();
    let looked = life.prune(&["--dry-run"]);
    assert_eq!((&looked["dry_run"], &looked["points"]), (&json!(true), &json!(3)));
    assert_eq!(life.site.contents(), forgotten, "it only looked");
    let bytes = life.bytes();
    let pruned = life.prune(&[]);
    assert_eq!(pruned["freed"].as_u64().unwrap(), bytes - life.bytes());
    // The first MiB of web@1 and web@4, for db has that of web@2; the first lies in one pack with what web@3 still has.
    assert!(pruned["removed"].as_u64().unwrap() >= 1 && pruned["freed"].as_u64().unwrap() > MIB as u64, "{pruned}");
    assert!(pruned["unused"].as_u64().unwrap() >= MIB as u64, "{pruned}");
    for key in ["removed", "rewritten"] {
        assert_eq!(looked[key], pruned[key], "{key}");
    }
    assert!(life.prune(&[])["freed"] == 0, "all was done");
    life.check();
    // With what was not worth it before.
    let before = life.bytes();
    let pruned = life.prune(&["--min-unused", "1"]);
    assert!(pruned["rewritten"].as_u64().unwrap() >= 1 && pruned["unused"] == 0, "{pruned}");
    assert!(before - life.bytes() > MIB as u64 * 9 / 10);
    assert!(life.packs().iter().any(|key| key.ends_with(".1")), "a next generation: {:?}", life.packs());
    life.check();
    let text = life.site.reseal(["prune"]).ok().stdout;
    assert!(text.contains("freed       0 B") && text.contains("for 3 restore points"), "{text}");
    // The chain goes on, from the newest that is left; and a whole backup of other machines finds what there is.
    let again = life.points[1].2.clone();
    assert_eq!(life.backup("web", &again)["stats"]["new"], 0);
    fs::remove_dir_all(&life.site.state).unwrap();
    let all = life.points.last().unwrap().2.clone();
    assert_eq!(life.backup("clone", &all)["stats"]["new"], 0);
    life.check();
    life.nothing_stays();
}

/// What can't be used.
#[test]
fn wrong_words_are_named() {
    let life = Life::new();
    life.site.reseal(["prune", "--grace", "5"]).fails(2, &["no unit"]);
    life.site.reseal(["prune", "--min-unused", "0"]).expect(&[2]);
    life.site.reseal(["prune", "--min-unused", "101"]).expect(&[2]);
    life.site.reseal(["prune", "web@1"]).expect(&[2]);
    assert_eq!(life.prune(&[])["points"], 0);
}

/// A backup that goes on until it is told: its rate is low, and it is stopped in the midst of the second of two disks, of which
/// the vault has the first already.
fn stopped(life: &Life, vm: &str, known: &[u8]) -> (Running, Vec<u8>) {
    let [first, second] = ["first", "second"].map(|name| life.site.disk(name));
    fs::write(&first, known).unwrap();
    let slow = content(55, 6);
    fs::write(&second, &slow).unwrap();
    let words = ["backup", "--json", vm, "--limit-rate", "4M"].map(str::to_owned);
    let disks = [("a", &first), ("b", &second)].map(|(name, path)| format!("{name}={}", path.display()));
    let running = life.site.start(words.into_iter().chain(disks));
    // Where it reads is what its descriptor of the second disk says: units are read at offsets, so its bytes are what counts.
    let io = format!("/proc/{}/io", running.id());
    let began = Instant::now();
    loop {
        let read = fs::read_to_string(&io).unwrap_or_default();
        let bytes: usize = read.lines().find_map(|line| line.strip_prefix("rchar: ")).map_or(0, |n| n.parse().unwrap());
        if bytes > known.len() + 2 * MIB {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20) && !running.has_ended(), "it has not come so far: {read}");
        sleep(Duration::from_millis(5));
    }
    signal(running.id(), libc::SIGSTOP);
    (running, slow)
}

/// VM `old` is forgotten, but a backup of `new` has found the same content there when it is stopped.
fn with_a_stopped_backup() -> (Life, Running, Vec<u8>, Vec<u8>) {
    let mut life = Life::new();
    let known = content(1, 2);
    life.backup("old", &known);
    life.backup("other", &content(2, 1));
    life.forget("old", 1);
    let (running, slow) = stopped(&life, "new", &known);
    (life, running, known, slow)
}

#[test]
fn a_writer_that_is_stopped_across_a_whole_prune_can_not_commit_any_more() {
    let (mut life, running, known, _) = with_a_stopped_backup();
    let began = Instant::now();
    let run = life.site.reseal(["prune", "--json", "--grace", "1s"]).ok();
    assert!(began.elapsed() >= Duration::from_secs(1));
    let pruned = run.json();
    assert_eq!(pruned["fenced"], json!(["new@1"]), "{pruned}");
    assert!(pruned["freed"].as_u64().unwrap() > 2 * MIB as u64, "{pruned}");
    assert!(run.stderr.contains("waiting for the end") && run.stderr.contains("backup of new"), "{}", run.stderr);
    assert_eq!(life.packs().len(), 2, "what the stopped one had stored is gone, too");
    life.check();
    signal(running.id(), libc::SIGCONT);
    running.wait().fails(1, &["prune gave up waiting", "new@1", "run it again", "--grace"]);
    life.check();
    assert!(life.site.unfinished().is_empty());
    // Its number is taken; the next one has all of it.
    let tenant = life.site.tenant();
    assert_eq!(tenant.chain(&vm("new")).unwrap().numbers().collect::<Vec<_>>(), [(1, State::Forgotten)]);
    assert!(tenant.tombstone(&vm("new"), 1).unwrap().fenced);
    life.prune(&[]);
    let made = life.backup("new", &known);
    assert_eq!(made["number"], 2);
    assert!(made["stats"]["new"].as_u64().unwrap() >= known.len() as u64, "{made}");
    life.check();
    life.nothing_stays();
}

#[test]
fn a_prune_waits_for_who_is_at_work_and_keeps_what_he_needs() {
    let (mut life, running, known, slow) = with_a_stopped_backup();
    let pruning = life.site.start(["prune", "--json", "--grace", "1h"]);
    sleep(Duration::from_millis(700));
    assert!(!pruning.has_ended(), "it waits");
    // Who begins now relies on none of it, and nobody waits for him.
    let made = life.backup("late", &known);
    assert!(made["stats"]["new"].as_u64().unwrap() >= known.len() as u64, "what is condemned is stored anew: {made}");
    signal(running.id(), libc::SIGCONT);
    assert_eq!(running.wait().ok().json()["number"], 1);
    let pruned = pruning.wait().ok().json();
    assert_eq!(pruned["fenced"], json!([]));
    let tenant = life.site.tenant();
    for (disk, content) in [("a", &known), ("b", &slow)] {
        assert!(LibraryDisk::open(&tenant, "new", 1, disk).unwrap().all().unwrap() == *content);
    }
    assert_eq!(life.site.verify()["points"], 3);
    // Now it has the same twice, and either may be used.
    life.site.reseal(["forget", "new@1"]).ok();
    life.prune(&[]);
    life.check();
    life.nothing_stays();
}

#[test]
fn what_is_read_stays_until_it_is_read_no_more() {
    let mut life = Life::new();
    let (first, second) = (content(1, 3), content(2, 3));
    life.backup("web", &first);
    life.backup("web", &second);
    let mounted = Mounted::new(&life.site, "mnt", &["web@1"]);
    // Whoever has it open reads on; the mount does not show it any more.
    let mut file = fs::File::open(mounted.point(&life.site, "web", 1).join("disk-0.raw")).unwrap();
    let said = life.site.reseal(["forget", "web@1", "--json"]).ok().json_lines();
    assert!(said[0]["reasons"][0].as_str().unwrap().contains("mount at"), "{said:?}");
    life.points.remove(0);
    for arguments in [&["--dry-run"][..], &[]] {
        let pruned = life.prune(arguments);
        assert_eq!(pruned["freed"], 0, "{pruned}");
        assert!(pruned["read"]["web@1"].as_str().unwrap().contains("mount at"), "{pruned}");
    }
    // It is forgotten all the same: nobody else opens it.
    life.site
        .reseal(["mount", life.site.path("x").to_str().unwrap(), "web@1"])
        .fails(1, &["there is no restore point web@1"]);
    let mut read = vec![0; MIB];
    file.seek(SeekFrom::Start(2 * MIB as u64)).unwrap();
    file.read_exact(&mut read).unwrap();
    assert!(read == first[2 * MIB..]);
    drop(file);
    life.check();
    // A process that was killed reads no more.
    let mut mounted = mounted;
    mounted.kill();
    drop(mounted);
    let pruned = life.prune(&[]);
    assert!(pruned["freed"].as_u64().unwrap() > 3 * MIB as u64 && pruned["read"] == json!({}), "{pruned}");
    life.check();
    life.nothing_stays();
}

#[test]
fn packs_are_rewritten_under_a_mount() {
    let mut life = Life::new();
    let old = content(1, 8);
    life.backup("web", &old);
    let kept = [&old[..2 * MIB], &content(3, 6)].concat();
    life.backup("web", &kept);
    let mounted = Mounted::new(&life.site, "mnt", &["--cache-size", "16M"]);
    let path = mounted.point(&life.site, "web", 2).join("disk-0.raw");
    let mut file = fs::File::open(&path).unwrap();
    let mut first = vec![0; 4096];
    file.read_exact(&mut first).unwrap();
    assert!(first == kept[..4096]);
    life.forget("web", 1);
    // The mount of all restore points says that it may read it.
    assert_eq!(life.prune(&[])["freed"], 0);
    drop(file);
    drop(mounted);
    let mounted = Mounted::new(&life.site, "mnt", &["web@2", "--cache-size", "16M"]);
    let mut file = fs::File::open(&path).unwrap();
    file.read_exact(&mut first).unwrap();
    let pruned = life.prune(&[]);
    assert!(pruned["rewritten"] == 1 && pruned["freed"].as_u64().unwrap() > 5 * MIB as u64, "{pruned}");
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    assert!(all == kept, "through the pack that took the other's place");
    drop((file, mounted));
    life.check();
}

/// Nobody knows what a manifest needs that can't be opened, so all stays.
#[test]
fn nothing_goes_while_something_is_damaged() {
    let mut life = Life::new();
    for seed in 0..3 {
        life.backup("web", &content(seed, 1));
    }
    life.forget("web", 1);
    let flip = |key: &str| {
        let path = life.site.vault.join(key);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
    };
    let index = life.site.packs(2);
    let manifest = "tenants/default/vms/web/00000002.manifest".to_owned();
    let tombstone = "tenants/default/vms/web/00000001.forgotten".to_owned();
    // A tombstone that somebody made up, beside a manifest.
    let made_up = life.site.vault.join("tenants/default/vms/web/00000002.forgotten");
    let copy = life.site.path("copy");
    copy_folder(&life.site.vault, &copy);
    let mut stopped = 0;
    for object in index.iter().chain([&manifest]) {
        flip(object);
        let before = life.site.contents();
        let run = life.site.reseal(["prune"]).expect(&[0, 3]);
        // What only the forgotten one needed need not be whole.
        if run.status == Some(3) {
            run.fails(3, &["nothing was removed", "--despite-damage", "reseal verify"]);
            assert_eq!(life.site.contents(), before);
            stopped += 1;
        }
        life.put_back(&copy);
    }
    assert_eq!(stopped, 3, "two indexes and a manifest");
    fs::copy(life.site.vault.join(&tombstone), &made_up).unwrap();
    let before = life.site.contents();
    life.site.reseal(["prune"]).fails(3, &["00000002.forgotten", "reseal verify"]);
    assert_eq!(life.site.contents(), before);
    fs::remove_file(made_up).unwrap();
    // A manifest that is gone may be put back.
    let path = life.site.vault.join(&manifest);
    let whole = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let before = life.site.contents();
    for words in [&["prune"][..], &["prune", "--dry-run"]] {
        life.site.reseal(words).fails(3, &["00000002.manifest is missing", "nothing was removed"]);
        assert_eq!(life.site.contents(), before);
    }
    fs::write(&path, &whole).unwrap();
    // A pack that is gone, or can't be opened, is in nobody's way.
    let data = life.site.packs(1).into_iter().max().unwrap();
    let pack = life.site.vault.join(&data);
    let bytes = fs::read(&pack).unwrap();
    fs::write(&pack, &bytes[..bytes.len() - 1]).unwrap();
    let run = life.site.reseal(["prune", "--json"]).expect(&[0, 3]);
    fs::write(&pack, &bytes).unwrap();
    if run.status == Some(3) {
        assert!(run.json()["bad_packs"][&data].is_string(), "{run:?}");
        run.fails(3, &["all else was pruned"]);
    }
    life.check();
    // What is held is not given up, whatever of it is damaged.
    let all: Vec<String> = life.points.iter().map(|(name, number, _)| format!("{name}@{number}")).collect();
    all.iter().for_each(|point| _ = life.site.reseal(["hold", point.as_str()]).ok());
    copy_folder(&life.site.vault, &life.site.path("held"));
    let (left, mut stopped) = (life.site.packs(2), 0);
    for object in left.iter().chain([&manifest]) {
        flip(object);
        let before = life.site.contents();
        let run = life.site.reseal(["prune", "--json", "--despite-damage"]).expect(&[0, 3]);
        if run.status == Some(3) {
            assert!(run.json()["held"].as_object().unwrap().len() == 1 && run.json()["freed"] == json!(0), "{run:?}");
            run.fails(3, &["is held", "Nothing was removed", "--release"]);
            assert_eq!(life.site.contents(), before);
            stopped += 1;
        }
        life.put_back(&life.site.path("held"));
    }
    assert_eq!(stopped, 3, "the same two indexes and the manifest");
    fs::remove_file(&path).unwrap();
    life.site.reseal(["prune", "--despite-damage"]).fails(3, &["web@2 is held"]);
    life.site.reseal(["hold", "web@2", "--release"]).ok();
    let looked = life.site.reseal(["prune", "--despite-damage", "--dry-run", "--json"]).ok().json();
    assert!(looked["freed"].as_u64().unwrap() > 0, "{looked}");
    fs::write(&path, &whole).unwrap();
    life.site.reseal(["hold", "web@2"]).ok();
    flip(&manifest);
    all.iter().for_each(|point| _ = life.site.reseal(["hold", point.as_str(), "--release"]).ok());
    assert!(!life.site.tenant().held_numbers(&vm("web"), |_| true).unwrap().contains(&2));
    fs::write(&path, &whole).unwrap();
    life.check();
    // One that is there and can't be opened is given up on request, too.
    copy_folder(&life.site.vault, &life.site.path("before"));
    flip(&manifest);
    let pruned = life.site.reseal(["prune", "--json", "--despite-damage"]).ok();
    assert!(pruned.json()["damaged"][&manifest].is_string() && pruned.stderr.contains("was removed"), "{pruned:?}");
    assert!(fs::read_dir(life.site.tenant_folder().join("gc")).unwrap().next().is_none());
    life.put_back(&life.site.path("before"));
    // Given up, on request only.
    fs::remove_file(&path).unwrap();
    let freed = life.site.reseal(["prune", "--json", "--despite-damage"]).ok();
    assert!(freed.json()["freed"].as_u64().unwrap() > MIB as u64 && freed.stderr.contains("is missing"), "{freed:?}");
    fs::write(&path, whole).unwrap();
    assert!(life.site.reseal(["verify", "--json"]).expect(&[3]).json()["damaged"] != json!([]));
    life.site.reseal(["forget", "web@2"]).ok();
    life.points.retain(|(_, number, _)| *number != 2);
    life.prune(&[]);
    life.check();
    life.nothing_stays();
}

#[test]
fn a_hold_stands_for_a_point_of_which_nothing_else_is_left() {
    let mut life = Life::new();
    for seed in 1..3 {
        life.backup("web", &content(seed, 1));
    }
    life.site.reseal(["hold", "web@2"]).ok();
    let manifest = life.site.tenant_folder().join("vms/web/00000002.manifest");
    let whole = fs::read(&manifest).unwrap();
    fs::remove_file(&manifest).unwrap();
    // On a machine that never saw it, nothing but the hold tells that it was there.
    fs::remove_dir_all(&life.site.state).unwrap();
    let before = life.site.contents();
    life.site.reseal(["prune"]).fails(3, &["00000002.manifest is missing, and web@2 is held", "nothing was removed"]);
    life.site.reseal(["prune", "--despite-damage"]).fails(3, &["web@2 is held", "Nothing was removed"]);
    assert_eq!(life.site.contents(), before);
    fs::write(&manifest, &whole).unwrap();
    life.check();
    // A note that can't be opened holds, until it is released.
    let notes = files_below(&life.site.tenant_folder().join("vms/web/notes"));
    let [note] = &notes[..] else { panic!("{notes:?}") };
    let as_it_was = fs::read(note).unwrap();
    let mut bytes = as_it_was.clone();
    bytes[60] ^= 1;
    fs::write(note, bytes).unwrap();
    let held = || life.site.tenant().held_numbers(&vm("web"), |_| true).unwrap().into_iter().collect::<Vec<_>>();
    assert_eq!(held(), [2]);
    life.site.reseal(["hold", "web@2", "--release"]).ok();
    assert_eq!(held(), Vec::<u32>::new());
    fs::remove_file(&manifest).unwrap();
    life.site.reseal(["hold", "web@2", "--release", "--accept-rollback"]).fails(1, &["web@2"]);
    fs::write(&manifest, &whole).unwrap();
    fs::write(note, as_it_was).unwrap();
    assert_eq!(held(), Vec::<u32>::new(), "the newer one counts");
    life.check();
}

/// A vault that was rolled back is nothing to remove from.
#[test]
fn a_vault_that_was_rolled_back_is_not_pruned() {
    let mut life = Life::new();
    life.backup("web", &content(1, 1));
    let copy = life.site.path("copy");
    copy_folder(&life.site.vault, &copy);
    life.backup("web", &content(2, 1));
    life.put_back(&copy);
    life.site.reseal(["prune"]).fails(3, &["rolled back"]);
}

#[test]
fn a_list_that_is_damaged_costs_space_and_nothing_else() {
    let mut life = Life::new();
    let known = content(1, 1);
    life.backup("web", &known);
    let gc = life.site.tenant_folder().join("gc");
    fs::create_dir_all(&gc).unwrap();
    fs::write(gc.join(format!("{}.condemned", "ab".repeat(16))), b"RSLGCLOG and no more").unwrap();
    let path = life.site.disk("clone");
    fs::write(&path, &known).unwrap();
    let run = life.site.reseal(["backup", "clone", path.to_str().unwrap()]).ok();
    assert!(run.stderr.contains(".condemned") && run.stderr.contains("reseal prune"), "{}", run.stderr);
    life.points.push(("clone".to_owned(), 1, known));
    life.check();
    life.prune(&[]);
    assert!(fs::read_dir(&gc).unwrap().next().is_none());
    life.check();
    // It goes with its tenant.
    life.site.reseal(["tenant", "add", "acme", "--no-recovery"]).ok();
    let gc = life.site.folder_of("acme").join("gc");
    fs::create_dir_all(&gc).unwrap();
    fs::write(gc.join(format!("{}.condemned", "ab".repeat(16))), b"RSLGCLOG and no more").unwrap();
    life.site.reseal(["tenant", "remove", "acme"]).ok();
    assert!(!gc.parent().unwrap().exists());
}

fn prune_in(tenant: &Arc<Tenant>, grace: Duration) -> Result<Pruned, BackupError> {
    prune_with(tenant, grace, false)
}

fn prune_with(tenant: &Arc<Tenant>, grace: Duration, despite_damage: bool) -> Result<Pruned, BackupError> {
    let prune = Prune {
        tenant: tenant.clone(),
        grace,
        percent: 25,
        most_read: None,
        despite_damage,
        workers: 1,
        throttle: None,
        say: &|_| {},
    };
    let alone = tenant.rekey_lease(&Holder::this_process("prune".to_owned()))?;
    prune.run(&*alone)
}

/// One VM whose packs go, are rewritten, and stay.
fn to_be_pruned() -> Life {
    let mut life = Life::new();
    let mut disk = content(1, 2);
    for seed in 0..3u64 {
        disk[..MIB].copy_from_slice(&content(100 + seed, 1));
        life.backup("web", &disk);
    }
    life.backup("db", &content(7, 1));
    for number in [1, 2] {
        life.forget("web", number);
    }
    life
}

/// Each operation of a prune in turn fails, as do all that follow, which is what its death would be; or is said to have failed, but
/// was done. The next prune ends it.
#[test]
fn wherever_a_prune_dies_the_vault_is_right_and_the_next_one_ends_it() {
    let life = to_be_pruned();
    let copy = life.site.path("copy");
    copy_folder(&life.site.vault, &copy);
    let mut expected = None;
    for (lasting, fault) in [
        (true, Fault::Fails(ErrorKind::NotConnected)),
        (false, Fault::Lies),
        (false, Fault::Fails(ErrorKind::StorageFull)),
    ] {
        for after in 0.. {
            life.put_back(&copy);
            let (store, tenant) = life.watched();
            store.take_log();
            store.plan(Some(Plan { operation: None, after, lasting, fault }));
            let result = prune_in(&tenant, Duration::from_secs(9));
            let happened = store.happened();
            store.plan(None);
            let log = store.take_log();
            life.read(&life.site.tenant());
            // What a writer of this moment would deduplicate against is there.
            let again = prune_in(&life.site.tenant(), Duration::from_secs(9)).unwrap();
            assert!(again.damaged.is_empty());
            life.read(&life.site.tenant());
            let generations: BTreeSet<_> =
                life.packs().iter().map(|key| parse_pack_file(key.rsplit('/').next().unwrap()).unwrap().0).collect();
            assert_eq!(generations.len(), life.packs().len(), "one generation of each: {log:?}");
            let bytes = life.bytes();
            let expected = expected.get_or_insert(bytes);
            assert_eq!(*expected, bytes, "after {:?}: {log:?}", log.get(after));
            assert!(fs::read_dir(life.site.tenant_folder().join("gc")).is_ok_and(|mut lists| lists.next().is_none()));
            if !happened {
                result.unwrap();
                assert!(after > 20, "it has more operations than {after}");
                break;
            }
        }
    }
    copy_folder(&copy, &life.site.path("again"));
    life.check();
}

/// A store that fails once, at whichever moment, is no damage: nothing is given up because of it.
#[test]
fn a_store_that_fails_is_not_taken_for_damage() {
    let life = to_be_pruned();
    let copy = life.site.path("copy");
    copy_folder(&life.site.vault, &copy);
    for after in 0.. {
        life.put_back(&copy);
        let (store, tenant) = life.watched();
        store.plan(Some(Plan { operation: None, after, lasting: false, fault: Fault::Fails(ErrorKind::TimedOut) }));
        let result = prune_with(&tenant, Duration::from_secs(9), true);
        let happened = store.happened();
        store.plan(None);
        life.read(&life.site.tenant());
        if !happened {
            assert!(result.unwrap().damaged.is_empty());
            break;
        }
        if let Ok(pruned) = result {
            assert!(pruned.damaged.is_empty(), "{:?}", pruned.damaged);
        }
    }
}

/// Who forgets dies between his tombstone and the look whether the point is held by now: it is, and so it stays.
#[test]
fn a_point_that_somebody_was_told_is_held_is_not_pruned() {
    let mut life = Life::new();
    for seed in 0..2 {
        life.backup("web", &content(seed, 1));
    }
    let (store, tenant) = life.watched();
    let point = tenant.point(&vm("web"), 1).unwrap();
    let tombstone = life.site.tenant_folder().join("vms/web/00000001.forgotten");
    // It dies at the first operation after that which makes the tombstone.
    for after in 0.. {
        let forgetting = tenant.forgetting().unwrap();
        let fault = Fault::Fails(ErrorKind::NotConnected);
        store.plan(Some(Plan { operation: None, after, lasting: true, fault }));
        forgetting.forget(&point, "test").unwrap_err();
        store.plan(None);
        if tombstone.exists() {
            break;
        }
    }
    let hold = Hold { held: true, reason: None };
    life.site.tenant().put_note(&point.manifest, DatedKind::Hold.name(), hold.content()).unwrap();
    assert_eq!(life.prune(&[])["freed"], 0);
    assert!(!tombstone.exists());
    life.check();
    life.site.reseal(["forget", "web@1"]).fails(1, &["is held"]);
    life.site.reseal(["hold", "web@1", "--release"]).ok();
    life.nothing_stays();
}

/// Of two that made one number one was late, saw a tombstone, and died: nobody was told of what it had made.
#[test]
fn a_manifest_beside_the_tombstone_of_another_point_goes() {
    let mut life = Life::new();
    for seed in 0..2 {
        life.backup("web", &content(seed, 1));
    }
    let tenant = life.site.tenant();
    let mut late = tenant.point(&vm("web"), 2).unwrap().manifest;
    life.forget("web", 2);
    late.point_id = PointId::from_bytes([9; 16]);
    let (object, _) = late.seal(&tenant.keys(), [7; 32]).unwrap();
    let path = life.site.tenant_folder().join("vms/web/00000002.manifest");
    fs::write(&path, object).unwrap();
    life.check();
    assert!(life.prune(&[])["freed"].as_u64().unwrap() > MIB as u64);
    assert!(!path.exists());
    life.check();
}

/// The real program is killed at random moments.
#[test]
fn a_prune_that_is_killed_leaves_a_right_vault() {
    let life = to_be_pruned();
    let copy = life.site.path("copy");
    copy_folder(&life.site.vault, &copy);
    for seed in seeds(8) {
        life.put_back(&copy);
        let running = life.site.start(["prune", "--min-unused", "25"]);
        sleep(Duration::from_micros(Random::new(seed).below(60_000)));
        running.kill();
        life.check();
        life.prune(&["--min-unused", "25"]);
        life.check();
        assert!(life.site.unfinished().is_empty() || life.prune(&[])["freed"] == 0);
    }
}

/// What one who fences has.
fn under(tenant: &Tenant) -> Box<dyn Lease> {
    tenant.rekey_lease(&Holder::this_process("prune".to_owned())).unwrap()
}

/// A fence whose maker died between its two steps: the number is taken, nobody takes it for a restore point, and whoever comes next
/// finishes it.
#[test]
fn a_fence_that_was_not_finished_is_no_restore_point() {
    let mut life = Life::new();
    life.backup("web", &content(1, 1));
    let (store, tenant) = life.watched();
    let half_a_fence = |tenant: &Tenant, number| {
        // The number is taken, and there is no tombstone yet.
        let fault = Fault::Fails(ErrorKind::NotConnected);
        let under = under(tenant);
        store.plan(Some(Plan { operation: Some(Operation::Upload), after: 1, lasting: true, fault }));
        tenant.fence(&vm("web"), number, &*under).unwrap_err();
        store.plan(None);
    };
    half_a_fence(&tenant, 2);
    let fence = life.site.tenant_folder().join("vms/web/00000002.manifest");
    life.check();
    assert_eq!(life.site.reseal(["show", "web@latest", "--json"]).ok().json()["number"], 1);
    life.site.reseal(["show", "web@2"]).fails(1, &["there is no restore point web@2"]);
    let restored = life.site.disk("restored");
    life.site.restore("web@latest", "disk-0", &restored).ok();
    life.site.reseal(["list"]).expect(&[0]);
    life.site.reseal(["status"]).ok();
    drop(Mounted::new(&life.site, "mnt", &[]));
    life.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    life.check();
    // A prune finishes it, and so does a backup.
    life.prune(&[]);
    assert!(!fence.exists() && fence.with_extension("forgotten").exists());
    life.check();
    assert_eq!(life.backup("web", &content(2, 1))["number"], 3);
    life.check();
    let tenant = life.site.tenant_in(store.clone()).unwrap();
    half_a_fence(&tenant, 4);
    assert_eq!(life.backup("web", &content(3, 1))["number"], 5);
    life.check();
    // What was made, and what can't be next, is not fenced.
    for number in [1, 3, 4, 5, 7, 99] {
        assert!(!tenant.fence(&vm("web"), number, &*under(&tenant)).unwrap());
    }
    // A VM of which there is nothing yet.
    assert!(tenant.fence(&vm("new"), 1, &*under(&tenant)).unwrap());
    life.check();
    assert_eq!(life.backup("new", &content(4, 1))["number"], 2);
    life.check();
    life.nothing_stays();
}

/// Who is at work and makes no restore point is waited for, and not fenced.
#[test]
fn nothing_goes_while_somebody_is_at_work_who_can_not_be_fenced() {
    let life = to_be_pruned();
    let tenant = life.site.tenant();
    for holder in [
        Holder::this_process("a note".to_owned()),
        // Whoever lies about the number leaves no gap.
        Holder::this_process("a lie".to_owned()).making(vm("web"), 77),
    ] {
        let lease = tenant.lease(&holder).unwrap();
        let before = life.packs();
        let run: Run = life.site.reseal(["prune", "--grace", "1s"]);
        run.fails(1, &["nothing was removed", &holder.what]);
        assert_eq!(life.packs(), before);
        drop(lease);
    }
    // The server has its tenants' keys all the time, and reads none of them by that.
    let _idle = tenant.reader_lease(&Holder::this_process("serve".to_owned()).pinning(Pins::Nothing));
    assert!(life.prune(&["--grace", "1s"])["freed"].as_u64().unwrap() > 0);
    life.check();
}

/// What was noted about a point that is forgotten goes with it; what serves the VM's others stays.
#[test]
fn notes_of_forgotten_points_go() {
    let mut life = Life::new();
    for seed in 0..3 {
        life.backup("web", &content(seed, 1));
    }
    let tenant = life.site.tenant();
    let notes = || {
        let keys = life.site.objects();
        keys.into_iter().filter(|key| key.ends_with(".note")).collect::<Vec<_>>()
    };
    for number in 1..=3 {
        let point = tenant.point(&vm("web"), number).unwrap().manifest;
        let verdict = BootVerdict {
            passed: true,
            expected: Expectation::Console("login:".into()),
            took_ms: 31_000,
            reason: None,
            program: "reseal".into(),
        };
        tenant.note_boot(&point, &verdict).unwrap();
        tenant.put_note(&point, "overlay", json!({})).unwrap();
    }
    life.site.reseal(["hold", "web@1"]).ok();
    life.site.reseal(["hold", "web@1", "--release"]).ok();
    assert_eq!(notes().len(), 8);
    life.site.reseal(["forget", "web@1", "web@2"]).ok();
    life.site.reseal(["prune", "--dry-run"]).ok();
    assert_eq!(notes().len(), 8);
    life.prune(&[]);
    assert_eq!(notes().len(), 4, "keys of overlays, and the verdict on web@3: {:?}", notes());
    assert!(life.site.reseal(["list"]).ok().stdout.contains("passed"));
    life.site.verify();
}

/// One at a time rewrites packs.
#[test]
fn a_prune_and_a_change_of_keys_keep_out_of_each_others_way() {
    let life = to_be_pruned();
    let tenant = life.site.tenant();
    let alone = tenant.rekey_lease(&Holder::this_process("prune".to_owned())).unwrap();
    life.site.reseal(["prune"]).fails(1, &["prune", "is at work"]);
    life.site.reseal(["rekey", "--data", "--no-recovery"]).fails(1, &["prune", "is at work"]);
    assert!(matches!(prune_in(&life.site.tenant(), Duration::ZERO), Err(BackupError::Vault(VaultError::Busy { .. }))));
    drop(alone);
    life.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    life.prune(&["--min-unused", "1"]);
    life.check();
    life.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    life.check();
    life.nothing_stays();
}

/// Of two that forget and prune, and one that takes as its parent what the first forgets, none loses anything.
#[test]
fn what_is_made_and_forgotten_while_a_prune_looks_stops_it() {
    let life = to_be_pruned();
    let (store, tenant) = life.watched();
    let (site_tenant, disk) = (life.site.tenant(), life.site.disk("web"));
    let heads = life.site.heads(&site_tenant);
    let mut is_done = false;
    store.meanwhile(move |operation, key| {
        // When what is condemned is known, and before anything is marked again.
        if operation == Operation::List && key.ends_with("leases/") && !is_done {
            let gc = site_tenant.condemned_lists().unwrap();
            if !gc.is_empty() {
                is_done = true;
                let made = reseal_tests::library::backup(&site_tenant, &heads, "web", &disk).unwrap();
                let point = site_tenant.point(&made.vm, made.number).unwrap();
                site_tenant.forgetting().unwrap().forget(&point, "test").unwrap();
            }
        }
    });
    let before = life.packs();
    let error = prune_in(&tenant, Duration::from_secs(9)).unwrap_err();
    assert!(error.to_string().contains("changed while it was pruned"), "{error}");
    assert!(before.is_subset(&life.packs()));
    life.prune(&["--min-unused", "25"]);
    life.check();
}

/// A site that sends for too long is told, and what it has sent by then is pruned and not taken for there.
#[test]
fn a_site_that_sends_across_a_whole_prune_is_told_and_sends_again() {
    let sites = Sites::new();
    let (old, disk) = (sites.source.disk("old"), sites.source.disk("disk"));
    fs::write(&old, content(1, 1)).unwrap();
    fs::write(&disk, content(2, 5)).unwrap();
    sites.source.reseal(sites.words(sites.port, "old", &[old.to_str().unwrap()])).ok();
    sites.target.reseal(["forget", "old@1"]).ok();
    let words = [&sites.words(sites.port, "new", &[disk.to_str().unwrap()])[..], &["--limit-rate".into(), "1M".into()]]
        .concat();
    let sending = sites.source.start(&words);
    sleep(Duration::from_millis(1200));
    let pruned = sites.target.reseal(["prune", "--json", "--grace", "1s"]).ok().json();
    // The server has its tenants' keys all the time, which keeps nobody from pruning.
    assert_eq!(pruned["fenced"], json!(["new@1"]), "{pruned}");
    assert!(pruned["freed"].as_u64().unwrap() > MIB as u64, "{pruned}");
    sending.wait().fails(1, &["the site gave it up", "run it again"]);
    sites.target.verify();
    sites.target.reseal(["prune"]).ok();
    let sent = sites.source.reseal(sites.words(sites.port, "new", &[disk.to_str().unwrap()])).ok().json();
    assert_eq!(sent["number"], 2);
    assert_eq!(sites.target.verify()["points"], 1);
    let restored = sites.target.path("restored");
    sites.target.restore("new@2", "disk-0", &restored).ok();
    assert!(fs::read(restored).unwrap() == content(2, 5));
}
