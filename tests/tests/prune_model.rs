//! Random lives of a tenant: backups that share content, of which some are stopped in the midst and some killed, forgets, prunes of
//! which some are killed, changes of the data keys, copies to a second vault, which forgets and prunes, too. Every point that was not forgotten is right at each moment, and what nothing needs
//! is gone after a prune that nobody disturbs.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_format::ids::PointId;
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::process::{Running, signal};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::Site;
use reseal_vault::State;

const CLUSTER: usize = 65_536;
/// Clusters of a disk.
const CLUSTERS: usize = 48;
/// Contents that clusters have: few, so that VMs share them.
const CONTENTS: u64 = 90;
const VMS: [&str; 3] = ["a", "b", "c"];
const STEPS: usize = 45;

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
    /// How long the last backup took that nobody stopped.
    took: Duration,
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
                sleep(Duration::from_micros(self.random.below(if self.stopped.is_empty() {
                    30_000
                } else {
                    1_100_000
                })));
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
                let run = self.site.reseal(["prune", "--json", "--grace", "1s", "--min-unused", "10"]).ok().json();
                if run["fenced"] != serde_json::json!([]) {
                    self.tell("prune that fenced");
                }
                self.tell("prune");
            }
        }
    }

    /// Copies what the second vault lacks, or is killed meanwhile.
    fn copy(&mut self) {
        let tenant = self.site.tenant();
        for (&(name, number), content) in &self.points {
            let id = tenant.point(&vm(name), number).unwrap().manifest.point_id;
            self.contents.insert(id, content.clone());
        }
        let (to, keyring) = (self.second.vault.to_str().unwrap(), self.second.keyring.to_str().unwrap());
        let running = self.site.start(["copy", "--to", to, "--to-keyring", keyring]);
        if self.random.below(3) == 0 {
            sleep(Duration::from_micros(self.random.below(60_000)));
            running.kill();
            return self.tell("killed copy");
        }
        running.wait().ok();
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

    /// Every copy of a restore point that is known is right.
    fn check_copies(&self) {
        let copied = self.second.tenant();
        for name in copied.vms().unwrap() {
            for number in copied.chain(&name).unwrap().live() {
                let id = copied.point(&name, number).unwrap().manifest.point_id;
                let read = LibraryDisk::open(&copied, name.as_str(), number, "disk-0").and_then(|disk| disk.all());
                let read = read.unwrap_or_else(|e| panic!("copy {name}@{number}: {e}; {:?}", self.told));
                assert!(self.contents.get(&id).is_none_or(|content| *content == read), "copy {name}@{number} differs");
            }
        }
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
            let Ok(disk) = LibraryDisk::open(&tenant, name, number, "disk-0") else { continue };
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

    /// At the end nobody is at work: all that is there is needed.
    fn end(mut self) -> BTreeMap<&'static str, u32> {
        self.learn_all();
        self.check(STEPS);
        for name in VMS {
            let chain = self.site.tenant().chain(&vm(name)).unwrap();
            assert!(chain.numbers().all(|(_, state)| state != State::Missing));
        }
        for _ in 0..2 {
            self.site.reseal(["prune", "--min-unused", "1"]).ok();
        }
        let report = self.site.verify();
        assert_eq!(report["points"], self.points.len());
        // What the points need is what the packs have: so many different clusters of so many bytes.
        let mut clusters: Vec<&[u8]> = self.points.values().flat_map(|content| content.chunks(CLUSTER)).collect();
        clusters.retain(|cluster| cluster.iter().any(|byte| *byte != 0));
        clusters.sort_unstable();
        clusters.dedup();
        let bytes: u64 = self.packs().iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        let least = (clusters.len() * CLUSTER) as u64;
        // A cluster may be there twice, of backups that did not see each other or stored anew what was condemned.
        assert!(bytes >= least && bytes < 2 * least + (4 << 20), "{bytes} bytes for {least}: {:?}", self.told);
        for (name, number) in self.points.keys().copied().collect::<Vec<_>>() {
            self.site.reseal(["forget", &format!("{name}@{number}")]).ok();
        }
        self.points.clear();
        self.site.reseal(["prune"]).ok();
        assert_eq!(self.packs(), Vec::<PathBuf>::new(), "nothing is needed any more");
        self.site.verify();
        // The copies stand by themselves.
        self.second.verify();
        self.check_copies();
        self.told
    }
}

#[test]
fn whatever_happens_points_are_right_and_garbage_goes() {
    let mut told: BTreeMap<&'static str, u32> = BTreeMap::new();
    for seed in seeds(4) {
        let mut life = Life::new(seed);
        for step in 0..STEPS {
            life.step();
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
        "copy",
        "killed copy",
        "prune of copies",
    ] {
        assert!(told.contains_key(what), "{what} never happened: {told:?}");
    }
}
