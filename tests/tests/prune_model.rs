//! Random lives of a tenant: backups that share content, of which some are stopped in the midst and some killed, forgets, prunes of
//! which some are killed, changes of the data keys, copies to a second vault, which forgets and prunes, too. Every point that was not
//! forgotten is right at each moment, and what nothing needs is gone after a prune that nobody disturbs. What chance may not bring about, a
//! backup that is given up while it relies on what goes, is part of each life.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_format::geometry::{FANOUT, root_level};
use reseal_format::ids::{PackId, PointId};
use reseal_format::index::BlobRef;
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::process::{Running, signal, wait_for, wait_until};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::Site;
use reseal_vault::{Packs, State, Tenant, Tree, VaultError, Wait};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const CLUSTER: usize = 65_536;
/// Clusters of a disk.
const CLUSTERS: usize = 48;
/// Contents that clusters have: few, so that VMs share them.
const CONTENTS: u64 = 90;
const VMS: [&str; 3] = ["a", "b", "c"];
const STEPS: usize = 45;
/// How long what must happen may take.
const SOON: Duration = Duration::from_secs(20);

/// A backup that was stopped, on a machine of its own: on this one all would wait for what it has locked of the state folder.
struct Stopped {
    _machine: Site,
    name: &'static str,
    running: Running,
    content: Vec<u8>,
}

struct Life {
    site: Site,
    second: Site,
    /// What each restore point that was ever there holds, by its id, which a copy has too.
    contents: BTreeMap<PointId, Vec<u8>>,
    random: Random,
    disks: BTreeMap<&'static str, Vec<u8>>,
    points: BTreeMap<(&'static str, u32), Vec<u8>>,
    stopped: Vec<Stopped>,
    /// How long the last backup took that nobody stopped, the last prune that waited for nobody, and the last copy.
    took: Duration,
    prune_took: Duration,
    copy_took: Duration,
    /// How often each thing has happened.
    told: BTreeMap<&'static str, u32>,
}

impl Life {
    fn new(seed: u64) -> Life {
        let mut life = Life {
            site: Site::new(),
            second: Site::new(),
            contents: BTreeMap::new(),
            random: Random::new(seed),
            disks: BTreeMap::new(),
            points: BTreeMap::new(),
            stopped: Vec::new(),
            took: Duration::from_millis(40),
            prune_took: Duration::from_millis(30),
            copy_took: Duration::from_millis(60),
            told: BTreeMap::new(),
        };
        for name in VMS {
            life.disks.insert(name, vec![0; CLUSTERS * CLUSTER]);
            life.write(name);
        }
        life
    }

    fn tell(&mut self, what: &'static str) {
        *self.told.entry(what).or_default() += 1;
    }

    fn a_vm(&mut self) -> &'static str {
        VMS[self.random.index(VMS.len())]
    }

    /// Some clusters of a disk change, mostly neighbours.
    fn write(&mut self, name: &'static str) {
        let from = self.random.index(CLUSTERS);
        let count = 1 + self.random.index(CLUSTERS / 2);
        for cluster in from..(from + count).min(CLUSTERS) {
            let content = Random::new(self.random.below(CONTENTS)).bytes(CLUSTER);
            self.disks.get_mut(name).unwrap()[cluster * CLUSTER..(cluster + 1) * CLUSTER].copy_from_slice(&content);
        }
    }

    fn start(&mut self, name: &'static str, machine: &Site) -> (Running, Vec<u8>) {
        let content = self.disks[name].clone();
        // A path of its own: who is stopped reads on later.
        let path = self.site.disk(&format!("{name}-{}", self.random.number()));
        fs::write(&path, &content).unwrap();
        (machine.start(["backup", "--json", name, path.to_str().unwrap()]), content)
    }

    /// A backup ends, in one way or another.
    fn ended(&mut self, name: &'static str, running: Running, content: Vec<u8>) {
        let run = running.wait().expect(&[0, 1]);
        if run.status == Some(0) {
            let number = u32::try_from(run.json()["number"].as_u64().unwrap()).unwrap();
            self.points.insert((name, number), content);
            self.tell("backup");
        } else if run.stderr.contains("prune gave up waiting") {
            self.tell("fenced");
        } else {
            assert!(run.stderr.contains("nothing is lost, run it again"), "{}", run.stderr);
            self.tell("lost race");
        }
    }

    fn step(&mut self) {
        let name = self.a_vm();
        match self.random.below(18) {
            0..=4 => {
                self.write(name);
                let mut machine = self.site.elsewhere();
                machine.keyring.clone_from(&self.site.keyring);
                // Mostly the same one, which knows what there is.
                if self.random.below(4) != 0 {
                    machine.state.clone_from(&self.site.state);
                }
                let began = Instant::now();
                let (running, content) = self.start(name, &machine);
                self.ended(name, running, content);
                self.took = began.elapsed();
            }
            5..=7 if self.stopped.len() < 3 => {
                self.write(name);
                let mut machine = self.site.elsewhere();
                machine.keyring.clone_from(&self.site.keyring);
                let (running, content) = self.start(name, &machine);
                sleep(self.took.mul_f64(self.random.below(100) as f64 / 100.0));
                signal(running.id(), libc::SIGSTOP);
                self.stopped.push(Stopped { _machine: machine, name, running, content });
            }
            5..=8 if !self.stopped.is_empty() => {
                let nth = self.random.index(self.stopped.len());
                let Stopped { name, running, content, _machine } = self.stopped.swap_remove(nth);
                if self.random.below(4) == 0 {
                    // Whether it had committed is for the vault to say.
                    running.kill();
                    self.learn(name, &content);
                    self.tell("killed backup");
                } else {
                    signal(running.id(), libc::SIGCONT);
                    self.ended(name, running, content);
                }
            }
            9 | 10 => {
                let live: Vec<_> = self.points.keys().copied().collect();
                if let Some(&(name, number)) = live.get(self.random.index(live.len().max(1))) {
                    self.site.reseal(["forget", &format!("{name}@{number}")]).ok();
                    self.points.remove(&(name, number));
                    self.tell("forget");
                }
            }
            11 => {
                let keep = 1 + self.random.below(4);
                self.learn_all();
                self.site.reseal(["forget", "--all", "--keep-last", &keep.to_string()]).ok();
                for name in VMS {
                    let numbers: Vec<u32> = self.points.keys().filter(|(of, _)| *of == name).map(|(_, n)| *n).collect();
                    let goes = numbers.len().saturating_sub(usize::try_from(keep).unwrap());
                    numbers[..goes].iter().for_each(|number| _ = self.points.remove(&(name, *number)));
                }
                self.tell("policy");
            }
            12 => {
                let running = self.site.start(["prune", "--grace", "1s", "--min-unused", "10"]);
                let longest = if self.stopped.is_empty() { self.prune_took } else { Duration::from_millis(1100) };
                sleep(longest.mul_f64(self.random.below(100) as f64 / 100.0));
                running.kill();
                self.tell("killed prune");
            }
            14 | 15 => self.copy(),
            16 => self.forget_copies(),
            13 if self.stopped.is_empty() => {
                self.site.reseal(["rekey", "--data", "--no-recovery"]).ok();
                self.tell("rekey");
            }
            _ => {
                let began = Instant::now();
                let run = self.site.reseal(["prune", "--json", "--grace", "1s", "--min-unused", "10"]).ok().json();
                if self.stopped.is_empty() {
                    self.prune_took = began.elapsed();
                }
                if run["fenced"] != json!([]) {
                    self.tell("prune that fenced");
                }
                self.tell("prune");
            }
        }
    }

    /// A backup that relies on what nothing else needs any more is stopped in the midst, and a prune is killed while it waits for its end.
    /// The next one gives the backup up, and removes what it relied on: it must not make its point when it goes on.
    fn give_up(&mut self, seed: u64) {
        let name = VMS[usize::try_from(seed).unwrap() % VMS.len()];
        // What nothing else has.
        let gone = Random::new(!seed).bytes(4 * CLUSTER);
        let [first, slow] = ["gone", "slow"].map(|name| self.site.disk(name));
        fs::write(&first, &gone).unwrap();
        let made = self.site.backup("gone", &first);
        self.site.reseal(["forget", &format!("gone@{}", made["number"])]).ok();
        // At a MiB each second, of which the first one comes at once, it takes four seconds.
        fs::write(&slow, [&gone[..], &Random::new(!seed - 1).bytes(4 * MIB)].concat()).unwrap();
        let mut machine = self.site.elsewhere();
        machine.keyring.clone_from(&self.site.keyring);
        let running = machine.start(["backup", "--limit-rate", "1M", name, slow.to_str().unwrap()]);
        let tenant = self.site.tenant();
        let point = wait_for("the backup's beginning", SOON, || {
            let mut holders = tenant.leases().unwrap().into_iter().filter_map(|held| held.holder);
            holders.find(|holder| holder.pid == running.id())?.makes
        });
        sleep(Duration::from_millis(600));
        signal(running.id(), libc::SIGSTOP);
        assert!(tenant.chain(&point.vm).unwrap().last() < point.number, "{point} was made before it could be stopped");

        let lists = || tenant.condemned_lists().unwrap().len();
        // Of prunes that were killed before.
        let before = lists();
        let waiting = self.site.start(["prune", "--grace", "1h", "--min-unused", "10"]);
        wait_until("what a prune condemns", SOON, || lists() > before);
        assert!(!waiting.has_ended(), "it waits for the backup");
        waiting.kill();
        self.tell("prune that was killed while it waited");

        let words = ["prune", "--json", "--grace", "1s", "--min-unused", "10"];
        let pruned = self.site.reseal(words).ok().json();
        assert!(pruned["fenced"].as_array().unwrap().contains(&json!(point.to_string())), "{point}: {pruned}");
        assert!(pruned["freed"].as_u64().unwrap() > gone.len() as u64, "{pruned}");
        assert_eq!(lists(), 0, "nothing is condemned any more: {pruned}");
        self.tell("prune that fenced");
        signal(running.id(), libc::SIGCONT);
        running.wait().fails(1, &["prune gave up waiting", &point.to_string()]);
        assert!(self.site.tenant().tombstone(&point.vm, point.number).unwrap().fenced);
        self.tell("fenced");
    }

    /// Copies what the second vault lacks, or is killed meanwhile.
    fn copy(&mut self) {
        let tenant = self.site.tenant();
        for (&(name, number), content) in &self.points {
            let id = tenant.point(&vm(name), number).unwrap().manifest.point_id;
            self.contents.insert(id, content.clone());
        }
        let (to, keyring) = (self.second.vault.to_str().unwrap(), self.second.keyring.to_str().unwrap());
        let began = Instant::now();
        let running = self.site.start(["copy", "--to", to, "--to-keyring", keyring]);
        if self.random.below(3) == 0 {
            sleep(self.copy_took.mul_f64(self.random.below(100) as f64 / 100.0));
            running.kill();
            return self.tell("killed copy");
        }
        running.wait().ok();
        self.copy_took = began.elapsed();
        let copied = self.second.tenant();
        for name in VMS {
            let Some((_, number)) = self.points.keys().rfind(|(of, _)| *of == name) else { continue };
            let newest = tenant.point(&vm(name), *number).unwrap().manifest;
            let chain = copied.chain(&vm(name)).unwrap();
            let is_there = |number| copied.point(&vm(name), number).unwrap().manifest.point_id == newest.point_id;
            let is_forgotten = chain.numbers().any(|(number, state)| {
                state == State::Forgotten && copied.tombstone(&vm(name), number).unwrap().point_id == newest.point_id
            });
            assert!(is_forgotten || chain.live().any(is_there), "{name}@{number} was not copied: {:?}", self.told);
        }
        self.tell("copy");
    }

    /// What the second vault keeps is its own business.
    fn forget_copies(&mut self) {
        let keep = (1 + self.random.below(3)).to_string();
        if !self.second.tenant().vms().unwrap().is_empty() {
            self.second.reseal(["forget", "--all", "--keep-last", &keep]).ok();
        }
        self.second.reseal(["prune", "--min-unused", "10"]).ok();
        self.tell("prune of copies");
    }

    /// Every copy can be read, and those of restore points that are known are right; how many these are. Of what was stopped nobody knows
    /// yet whether it has made one.
    fn check_copies(&self) -> usize {
        let copied = self.second.tenant();
        let mut known = 0;
        for name in copied.vms().unwrap() {
            for number in copied.chain(&name).unwrap().live() {
                let id = copied.point(&name, number).unwrap().manifest.point_id;
                let read = LibraryDisk::open(&copied, name.as_str(), number, "disk-0").and_then(|disk| disk.all());
                let read = read.unwrap_or_else(|e| panic!("copy {name}@{number}: {e}; {:?}", self.told));
                if let Some(content) = self.contents.get(&id) {
                    assert!(*content == read, "copy {name}@{number} differs; {:?}", self.told);
                    known += 1;
                }
            }
        }
        known
    }

    /// One that was killed may have made its point, as may one that is stopped and has not said so yet.
    fn learn(&mut self, name: &'static str, content: &[u8]) {
        let tenant = self.site.tenant();
        for number in tenant
            .chain(&vm(name))
            .unwrap()
            .live()
            .filter(|number| !self.points.contains_key(&(name, *number)))
            .collect::<Vec<_>>()
        {
            let disk = match LibraryDisk::open(&tenant, name, number, "disk-0") {
                // A prune was killed while it gave a backup up.
                Err(VaultError::NoPoint { .. }) => continue,
                disk => disk.unwrap(),
            };
            let read = disk.all().unwrap();
            if read == content {
                self.points.insert((name, number), read);
            } else {
                assert!(
                    self.stopped.iter().any(|other| other.name == name && other.content == read),
                    "{name}@{number}"
                );
            }
        }
    }

    /// Those that were stopped after they had committed have said nothing yet.
    fn learn_all(&mut self) {
        for Stopped { name, running, content, _machine } in std::mem::take(&mut self.stopped) {
            signal(running.id(), libc::SIGCONT);
            self.ended(name, running, content);
        }
    }

    #[track_caller]
    fn check(&self, step: usize) {
        let tenant = self.site.tenant();
        for ((name, number), content) in &self.points {
            let read = LibraryDisk::open(&tenant, name, *number, "disk-0").and_then(|disk| disk.all());
            let read = read.unwrap_or_else(|e| panic!("step {step}: {name}@{number}: {e}; {:?}", self.told));
            assert!(read == *content, "step {step}: {name}@{number} differs; {:?}", self.told);
        }
        self.check_copies();
    }

    fn packs(&self) -> Vec<PathBuf> {
        let keys = self.site.objects().into_iter().filter(|key| key.contains("/packs/"));
        keys.map(|key| self.site.vault.join(key)).collect()
    }

    /// Another restore point needs half of what a backup has stored, and that of the backup is forgotten.
    fn leave_half(&mut self) {
        let whole = Random::new(u64::MAX).bytes(8 * CLUSTER);
        let (path, half) = (self.site.disk("half"), whole[..4 * CLUSTER].to_vec());
        for content in [&whole, &half] {
            fs::write(&path, content).unwrap();
            self.site.backup("half", &path);
        }
        self.site.reseal(["forget", "half@1"]).ok();
        self.points.insert(("half", 2), half);
    }

    /// At the end nobody is at work: all that is there is needed.
    fn end(mut self) -> BTreeMap<&'static str, u32> {
        self.learn_all();
        self.leave_half();
        self.check(STEPS);
        for name in VMS {
            let chain = self.site.tenant().chain(&vm(name)).unwrap();
            assert!(chain.numbers().all(|(_, state)| state != State::Missing));
        }
        let pruned = prune_all(&self.site);
        let freed = pruned["freed"].as_u64().unwrap();
        assert!(pruned["rewritten"].as_u64().unwrap() > 0 && freed > 4 * CLUSTER as u64, "{pruned}: {:?}", self.told);
        let report = self.site.verify();
        assert_eq!(report["points"], self.points.len());
        self.check(STEPS);
        for (name, number) in self.points.keys().copied().collect::<Vec<_>>() {
            self.site.reseal(["forget", &format!("{name}@{number}")]).ok();
        }
        self.points.clear();
        self.site.reseal(["prune"]).ok();
        assert_eq!(self.packs(), Vec::<PathBuf>::new(), "nothing is needed any more");
        self.site.verify();
        // The copies stand by themselves.
        prune_all(&self.second);
        self.second.verify();
        if self.check_copies() > 0 {
            self.tell("copies that were compared at the end");
        }
        self.told
    }
}

/// Prunes a vault on which nobody is at work of all that nothing needs, however little of a pack that is; what the prune said. It leaves none
/// of that: the next one finds nothing to do, and the packs have those blobs that the restore points need, and no others.
#[track_caller]
fn prune_all(site: &Site) -> Value {
    let prune = || site.reseal(["prune", "--json", "--min-unused", "1", "--max-rewrite", "all"]).ok().json();
    let (first, second) = (prune(), prune());
    for report in [&first, &second] {
        // No pack has as many as a hundred blobs, and those of a pack are about equally long: each is a percent or more of it.
        for key in ["unused", "postponed", "locked", "locked_points"] {
            assert_eq!(report[key], 0, "{key}: {report}");
        }
        for key in ["fenced", "at_work"] {
            assert_eq!(report[key], json!([]), "{key}: {report}");
        }
        for key in ["read", "held_back", "damaged", "bad_packs"] {
            assert_eq!(report[key], json!({}), "{key}: {report}");
        }
    }
    for key in ["freed", "removed", "rewritten"] {
        assert_eq!(second[key], 0, "{key}: {second}");
    }
    let tenant = site.tenant();
    assert!(tenant.leases().unwrap().is_empty() && tenant.condemned_lists().unwrap().is_empty());
    let [there, needed] = blobs(&tenant);
    let differ: Vec<_> = there.symmetric_difference(&needed).collect();
    assert!(differ.is_empty(), "of {} blobs {} are needed: {differ:?}", there.len(), needed.len());
    first
}

/// Which blobs the packs of a tenant have, and which its restore points need: clusters, and nodes of their indexes.
#[track_caller]
fn blobs(tenant: &Arc<Tenant>) -> [BTreeSet<(PackId, u32)>; 2] {
    let packs = Arc::new(Packs::new(tenant.clone(), MIB));
    let tree = Tree::new(packs.clone(), MIB);
    let (mut there, mut needed) = (BTreeSet::new(), BTreeSet::new());
    let mut listed = BTreeSet::new();
    for file in packs.list().unwrap() {
        assert!(listed.insert(file.id), "there is more than one generation of the pack {}", file.id);
        let handle = packs.open_listed(file).unwrap();
        let lengths = handle.lengths();
        let not_empty = (0..lengths.count()).filter(|ordinal| lengths.place(*ordinal).is_some());
        there.extend(not_empty.map(|ordinal| (file.id, ordinal)));
    }
    for name in tenant.vms().unwrap() {
        for number in tenant.chain(&name).unwrap().live() {
            for disk in tenant.point(&name, number).unwrap().manifest.disks {
                let root = disk.root.map(|root| (BlobRef::from(root), root_level(disk.length)));
                let mut waiting: Vec<_> = root.into_iter().collect();
                while let Some((blob, level)) = waiting.pop() {
                    needed.insert((blob.pack, blob.ordinal));
                    let node = tree.node(blob, level, Wait::May).unwrap();
                    for child in (0..FANOUT).filter_map(|slot| node.get(slot)) {
                        match level {
                            0 => _ = needed.insert((child.pack, child.ordinal)),
                            _ => waiting.push((child, level - 1)),
                        }
                    }
                }
            }
        }
    }
    [there, needed]
}

#[test]
fn whatever_happens_points_are_right_and_garbage_goes() {
    let mut told: BTreeMap<&'static str, u32> = BTreeMap::new();
    for seed in seeds(4) {
        let mut life = Life::new(seed);
        for step in 0..STEPS {
            life.step();
            if step == STEPS / 2 {
                life.give_up(seed);
            }
            life.check(step);
        }
        for (what, count) in life.end() {
            *told.entry(what).or_default() += count;
        }
    }
    eprintln!("{told:?}");
    for what in [
        "backup",
        "forget",
        "policy",
        "killed prune",
        "killed backup",
        "rekey",
        "prune",
        "prune that fenced",
        "fenced",
        "prune that was killed while it waited",
        "copy",
        "killed copy",
        "prune of copies",
        "copies that were compared at the end",
    ] {
        assert!(told.contains_key(what), "{what} never happened: {told:?}");
    }
}
