//! Random days in the life of a VM: every restore point stays what the disks were at its moment, through the reader
//! library, through `restore`, and through a real mount.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, RngSeed};
use reseal_tests::library::LibraryDisk;
use reseal_tests::model::{DiskFile, ModelDisk};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::{Random, soak};
use reseal_tests::site::{Site, files_below};
use serde_json::Value;

const CLUSTER: u64 = 65_536;
/// What one leaf of the index maps.
const LEAF: u64 = 1024 * CLUSTER;

/// Something that happens between two backups, or one. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Step {
    Write {
        disk: usize,
        at: u64,
        length: usize,
        seed: u64,
    },
    /// The same content as elsewhere on the disk.
    Copy {
        disk: usize,
        from: u64,
        to: u64,
    },
    /// Zeros are written, which is no hole of the file.
    WriteZeros {
        disk: usize,
        at: u64,
        length: usize,
    },
    Punch {
        disk: usize,
        at: u64,
        length: u64,
    },
    Resize {
        disk: usize,
        length: u64,
    },
    AddDisk {
        length: u64,
    },
    RemoveDisk {
        disk: usize,
    },
    Backup,
    /// A backup that reads only what a list calls changed since one of the points, and that much of the rest.
    TellChanges {
        since: usize,
        check: u8,
    },
    /// The local lookup is lost, or its file is filled with garbage.
    LoseLookup,
    DamageLookup {
        seed: u64,
    },
}

/// Lengths that are awkward in one way or another, and sparse beyond the first leaf, and one beyond the first node.
fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..300_000,
        4 => (1u64..40).prop_map(|clusters| clusters * CLUSTER),
        2 => (0u64..2000).prop_map(|beyond| LEAF - 1000 + beyond),
        1 => (1u64..20).prop_map(|leaves| leaves * LEAF),
        1 => Just(1024 * LEAF + 5 * CLUSTER + 1),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (disk, at) = (0usize..4, any::<u64>());
    prop_oneof![
        8 => (disk.clone(), at, 1usize..200_000, any::<u64>())
            .prop_map(|(disk, at, length, seed)| Step::Write { disk, at, length, seed }),
        2 => (disk.clone(), at, at).prop_map(|(disk, from, to)| Step::Copy { disk, from, to }),
        2 => (disk.clone(), at, 1usize..400_000).prop_map(|(disk, at, length)| Step::WriteZeros { disk, at, length }),
        2 => (disk.clone(), at, 1u64..2 * LEAF).prop_map(|(disk, at, length)| Step::Punch { disk, at, length }),
        3 => (disk.clone(), length()).prop_map(|(disk, length)| Step::Resize { disk, length }),
        1 => length().prop_map(|length| Step::AddDisk { length }),
        1 => disk.prop_map(|disk| Step::RemoveDisk { disk }),
        5 => Just(Step::Backup),
        5 => (0usize..3, 0u8..=100).prop_map(|(since, check)| Step::TellChanges { since, check }),
        1 => Just(Step::LoseLookup),
        1 => any::<u64>().prop_map(|seed| Step::DamageLookup { seed }),
    ]
}

struct Life {
    site: Site,
    disks: BTreeMap<String, (PathBuf, ModelDisk)>,
    next_disk: u32,
    points: Vec<BTreeMap<String, ModelDisk>>,
}

impl Life {
    fn new() -> Life {
        let mut life = Life { site: Site::new(), disks: BTreeMap::new(), next_disk: 0, points: Vec::new() };
        life.add(5 * CLUSTER + 77);
        life
    }

    fn add(&mut self, length: u64) {
        let name = format!("disk-{}", self.next_disk);
        self.next_disk += 1;
        let path = self.site.disk(&name);
        DiskFile::create(&path, length);
        self.disks.insert(name, (path, ModelDisk::new(length)));
    }

    /// A disk by its place, and a place on it that is usually near its start or end.
    fn at(&mut self, disk: usize, at: u64) -> Option<(DiskFile, &mut ModelDisk, u64)> {
        let nth = disk % self.disks.len();
        let (path, model) = self.disks.values_mut().nth(nth)?;
        let near = at.min(model.length) % (20 * CLUSTER).min(model.length.max(1));
        let at = match at % 3 {
            0 => near,
            1 => model.length.saturating_sub(near + 1),
            _ => at % model.length.max(1),
        };
        let file = DiskFile(fs::File::options().read(true).write(true).open(path).unwrap());
        (model.length > 0).then_some((file, model, at))
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Write { disk, at, length, seed } => {
                let Some((file, model, at)) = self.at(disk, at) else { return };
                let bytes = Random::new(seed).bytes(length);
                file.write(at, &bytes);
                model.write(at, &bytes);
            }
            Step::Copy { disk, from, to } => {
                let Some((_, _, from)) = self.at(disk, from) else { return };
                let Some((file, model, to)) = self.at(disk, to) else { return };
                let (from, to) = (from - from % CLUSTER, to - to % CLUSTER);
                let mut bytes = vec![0; usize::try_from((2 * CLUSTER).min(model.length - from)).unwrap()];
                model.read(from, &mut bytes);
                file.write(to, &bytes);
                model.write(to, &bytes);
            }
            Step::WriteZeros { disk, at, length } => {
                let Some((file, model, at)) = self.at(disk, at) else { return };
                file.write(at, &vec![0; length]);
                model.zero(at, length as u64);
            }
            Step::Punch { disk, at, length } => {
                let Some((file, model, at)) = self.at(disk, at) else { return };
                file.punch(at, length);
                model.zero(at, length);
            }
            Step::Resize { disk, length } => {
                let nth = disk % self.disks.len();
                let (path, model) = self.disks.values_mut().nth(nth).unwrap();
                fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
                model.resize(length);
            }
            Step::AddDisk { length } if self.disks.len() < 4 => self.add(length),
            Step::RemoveDisk { disk } if self.disks.len() > 1 => {
                let name = self.disks.keys().nth(disk % self.disks.len()).unwrap().clone();
                fs::remove_file(self.disks.remove(&name).unwrap().0).unwrap();
            }
            Step::AddDisk { .. } | Step::RemoveDisk { .. } => {}
            Step::Backup => self.backup(),
            Step::TellChanges { since, check } => self.backup_told(since, check),
            Step::LoseLookup => {
                for lookup in self.lookups() {
                    fs::remove_file(lookup).unwrap();
                }
            }
            Step::DamageLookup { seed } => {
                for lookup in self.lookups() {
                    let length = fs::metadata(&lookup).unwrap().len();
                    fs::write(lookup, Random::new(seed).bytes(usize::try_from(length).unwrap())).unwrap();
                }
            }
        }
    }

    fn lookups(&self) -> Vec<PathBuf> {
        files_below(&self.site.state).into_iter().filter(|path| path.ends_with("lookup/data.mdb")).collect()
    }

    fn backup(&mut self) {
        let disks: Vec<_> = self.disks.iter().map(|(name, (path, _))| (name.clone(), path.clone())).collect();
        let point = self.site.backup_disks("vm", &disks);
        self.made(&point);
    }

    /// `since` counts back from the newest point.
    fn backup_told(&mut self, since: usize, check: u8) {
        let Some(nth) = self.points.len().checked_sub(1 + since) else { return self.backup() };
        let mut arguments: Vec<String> = ["backup", "--json", "vm"].map(String::from).into();
        arguments.extend(["--since".into(), format!("vm@{}", nth + 1), "--check-unchanged".into(), check.to_string()]);
        for (name, (path, model)) in &self.disks {
            let before = self.points[nth].get(name);
            let list = self.site.path(format!("{name}.json"));
            let touched = &model.touched[before.map_or(0, |before| before.touched.len())..];
            let clipped = touched.iter().map(|area| area.start.min(model.length)..area.end.min(model.length));
            let areas: Vec<_> =
                clipped.map(|area| serde_json::json!({"start": area.start, "length": area.end - area.start})).collect();
            let told = serde_json::json!({"startOffset": 0, "length": model.length, "changedArea": areas});
            fs::write(&list, serde_json::to_vec(&told).unwrap()).unwrap();
            arguments.push(format!("{name}={}", path.display()));
            arguments.extend(["--changes".into(), format!("{name}={}", list.display())]);
        }
        let point = self.site.reseal(&arguments).ok().json();
        for shown in point["disks"].as_array().unwrap() {
            let name = shown["name"].as_str().unwrap();
            let same = |before: &ModelDisk| before.length == self.disks[name].1.length;
            let usable = self.points[nth].get(name).is_some_and(same);
            assert_eq!(shown["claim"].is_object(), usable, "{name} since {}: {point}", nth + 1);
        }
        self.made(&point);
    }

    fn made(&mut self, point: &Value) {
        assert_eq!(point["number"], self.points.len() + 1);
        let models: BTreeMap<_, _> =
            self.disks.iter().map(|(name, (_, model))| (name.clone(), model.clone())).collect();
        for shown in point["disks"].as_array().unwrap() {
            let model = &models[shown["name"].as_str().unwrap()];
            assert_eq!(shown["length"], model.length);
            assert_eq!(shown["used"].as_u64().unwrap(), (model.used_clusters() * CLUSTER).min(model.length));
        }
        self.points.push(models);
    }

    /// Holds every point against its model, in the three ways that a user reads one.
    fn check(&self) {
        self.site.verify();
        let tenant = self.site.tenant();
        let mounted = Mounted::new(&self.site, "mnt", &[]);
        for (number, point) in (1..).zip(&self.points) {
            for (name, model) in point {
                let what = |how| format!("vm@{number} {name} {how}");
                let disk = LibraryDisk::open(&tenant, "vm", number, name).unwrap();
                model.assert_same(&disk, &what("in the library"));
                model.assert_same(&mounted.disk(&self.site, "vm", number, name), &what("in the mount"));
                let restored = self.site.disk("restored.raw");
                self.site.restore(&format!("vm@{number}"), name, &restored).ok();
                model.assert_same(&DiskFile::open(&restored), &what("restored"));
                fs::remove_file(restored).unwrap();
            }
            let shown = fs::read_dir(mounted.point(&self.site, "vm", number)).unwrap();
            let disks = shown.filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().ends_with(".raw"));
            assert_eq!(disks.count(), point.len());
        }
        mounted.umount(&self.site).ok();
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 16 * soak(),
        rng_seed: RngSeed::Fixed(0x5EED),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_point_stays_what_the_disks_were(steps in prop::collection::vec(step(), 1..40)) {
        let mut life = Life::new();
        steps.iter().for_each(|step| life.take(step));
        life.backup();
        life.check();
    }
}

/// Growing and shrinking over each border of the index tree, with data at both sides of it.
#[test]
fn disks_grow_and_shrink_over_the_levels_of_the_index() {
    let mut life = Life::new();
    let mut random = Random::new(3);
    let top = 1024 * LEAF;
    for length in [LEAF - 1, LEAF, LEAF + 1, 5 * LEAF, top, top + CLUSTER, LEAF + 1, top + 3 * LEAF, 1, 0, 2 * LEAF] {
        life.take(&Step::Resize { disk: 0, length });
        let (path, model) = life.disks.values_mut().next().unwrap();
        let file = DiskFile(fs::File::options().read(true).write(true).open(path).unwrap());
        for at in [0, LEAF - 5000, LEAF + 70_000, top - 3000, length.saturating_sub(4000)] {
            let bytes = random.bytes(9000);
            if at < length {
                file.write(at, &bytes);
                model.write(at, &bytes);
            }
        }
        life.backup();
        // The same disk again, told what little has changed: subtrees of every level are kept whole.
        life.take(&Step::Write { disk: 0, at: length / 2, length: 5000, seed: length });
        life.backup_told(0, 0);
    }
    life.check();
}

/// Without its lookup a backup is right, and what the parent has is still not stored again.
#[test]
fn a_lost_lookup_costs_nothing_that_the_parent_has() {
    let mut life = Life::new();
    for nth in 0..10 {
        life.take(&Step::Write { disk: 0, at: nth * CLUSTER, length: 65_536, seed: nth });
    }
    life.backup();
    for step in [Step::LoseLookup, Step::DamageLookup { seed: 1 }] {
        life.take(&step);
        let disks: Vec<_> = life.disks.iter().map(|(name, (path, _))| (name.clone(), path.clone())).collect();
        let again = life.site.backup_disks("vm", &disks);
        let clone = life.site.backup_disks("clone", &disks);
        assert_eq!((&again["stats"]["new"], &clone["stats"]["new"]), (&0.into(), &0.into()), "{step:?}");
    }
    fs::remove_dir_all(&life.site.state).unwrap();
    let disks: Vec<_> = life.disks.iter().map(|(name, (path, _))| (name.clone(), path.clone())).collect();
    assert_eq!(life.site.backup_disks("another", &disks)["stats"]["new"], 0);
    life.site.verify();
}
