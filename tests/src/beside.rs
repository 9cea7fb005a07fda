//! Those who work on a vault beside each other until they are told to stop.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use blake3::Hash;
use parking_lot::Mutex;
use reseal_format::geometry::CLUSTER;
use reseal_store::StoreError;
use reseal_vault::{Tenant, VaultError};

use crate::library::{LibraryDisk, vm};
use crate::mounting::Mounted;
use crate::process::Run;
use crate::random::Random;
use crate::site::Site;

const MIB: usize = 1 << 20;
/// What a reader of a mount reads before he pauses: so little that neither the kernel nor the mount reads all of a disk ahead.
const FIRST: usize = 4096;

/// Stops the others when the one who has it ends, also by a failure.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What was backed up, by VM and number. Digests, for a soak makes many restore points.
#[derive(Default)]
pub struct Made(Mutex<BTreeMap<(String, u32), Hash>>);

impl Made {
    /// A restore point was made of this.
    pub fn add(&self, name: &str, number: u32, content: &[u8]) {
        let before = self.0.lock().insert((name.to_owned(), number), blake3::hash(content));
        assert!(before.is_none(), "{name}@{number} was made twice");
    }

    /// How many were made.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }

    /// The number that so many newer ones of the VM follow.
    pub fn recent(&self, name: &str, newer: usize) -> Option<u32> {
        let made = self.0.lock();
        let mut numbers = made.keys().rev().filter(|(of, _)| of == name).map(|(_, number)| *number);
        numbers.nth(newer)
    }

    /// What a restore point held.
    #[track_caller]
    fn of(&self, name: &str, number: u32) -> Hash {
        let found = self.0.lock().get(&(name.to_owned(), number)).copied();
        found.unwrap_or_else(|| panic!("nobody has made {name}@{number}"))
    }

    /// Every restore point that is there holds what was backed up; how many these are.
    #[track_caller]
    pub fn check(&self, site: &Site) -> usize {
        let there = all(site);
        for (name, number, content) in &there {
            assert!(*content == self.of(name, *number), "{name}@{number} differs");
        }
        there.len()
    }

    /// Every copy that is there holds what was backed up of its VM at some time, for it has a number of its own; how many these are.
    #[track_caller]
    pub fn check_copies(&self, site: &Site) -> usize {
        let (there, made) = (all(site), self.0.lock());
        for (name, number, content) in &there {
            let is_one = made.iter().any(|((of, _), other)| of == name && other == content);
            assert!(is_one, "the copy {name}@{number} is none of what was backed up");
        }
        there.len()
    }
}

/// What all restore points hold that are there.
#[track_caller]
fn all(site: &Site) -> Vec<(String, u32, Hash)> {
    let tenant = site.tenant();
    let mut found = Vec::new();
    for name in tenant.vms().unwrap() {
        for number in tenant.chain(&name).unwrap().live() {
            let disk = LibraryDisk::open(&tenant, name.as_str(), number, "disk-0").unwrap();
            found.push((name.to_string(), number, blake3::hash(&disk.all().unwrap())));
        }
    }
    found
}

/// What a disk of so many MiB holds before anything of it was changed: of all VMs the same.
pub fn unchanged(mib: usize) -> Vec<u8> {
    Random::new(77).bytes(mib * MIB)
}

/// Changes a disk of so many MiB and backs it up, again and again; forgets the oldest of more than three points. What was made and is still
/// there is read back.
pub fn write(site: &Site, name: &str, mib: usize, seed: u64, stop: &AtomicBool, made: &Made) {
    let mut random = Random::new(seed);
    let path = site.disk(name);
    let mut content = unchanged(mib);
    let mut points: Vec<(u32, Vec<u8>)> = Vec::new();
    let read = |(number, content): &(u32, Vec<u8>)| {
        let read = LibraryDisk::open(&site.tenant(), name, *number, "disk-0").unwrap().all().unwrap();
        assert!(read == *content, "{name}@{number} differs");
    };
    while !stop.load(Ordering::Relaxed) {
        // A third of what is written the other VM may have, too: whole clusters, for these are what is shared.
        let at = random.index((mib - 1) * MIB / CLUSTER) * CLUSTER;
        let what = if random.below(3) == 0 { random.below(6) } else { random.number() };
        content[at..at + MIB / 2].copy_from_slice(&Random::new(what).bytes(MIB / 2));
        fs::write(&path, &content).unwrap();
        let point = site.backup(name, &path);
        let number = u32::try_from(point["number"].as_u64().unwrap()).unwrap();
        made.add(name, number, &content);
        points.push((number, content.clone()));
        if points.len() > 3 {
            let (number, _) = points.remove(0);
            let point = format!("{name}@{number}");
            until_done(site, &["forget", &point], &["is at work"], Duration::from_secs(60));
        }
        read(&points[random.index(points.len())]);
    }
    // The last words of this writer.
    points.iter().for_each(read);
}

/// Runs `reseal` until it succeeds; it may be refused for one of these reasons meanwhile, for no longer than that. Who ended while an object store
/// was away may have left his lease, and says that he is at work until it is silent.
pub fn until_done(site: &Site, words: &[&str], passing: &[&str], within: Duration) -> Run {
    let began = Instant::now();
    loop {
        let run = site.reseal(words);
        if run.status == Some(0) {
            return run;
        }
        let is_passing = passing.iter().any(|text| run.stderr.contains(text));
        assert!(is_passing && began.elapsed() < within, "{run:?}");
        sleep(Duration::from_secs(1));
    }
}

/// Whether somebody has forgotten a restore point: then it has a tombstone, for ever.
#[track_caller]
pub fn is_forgotten(tenant: &Tenant, name: &str, number: u32) -> bool {
    match tenant.tombstone(&vm(name), number) {
        Ok(tombstone) => {
            assert!(!tombstone.fenced, "{name}@{number} was made, and can't have been given up");
            true
        }
        Err(VaultError::Store(StoreError::NotFound(_))) => false,
        Err(e) => panic!("{name}@{number}: {e}"),
    }
}

/// How the reading of a mount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// All of it was right.
    Right,
    /// It was forgotten before it was open.
    Forgotten,
    /// It was not mounted in time.
    Late,
}

/// Mounts one restore point at that folder of the site, reads the beginning of its disk, then the rest, and compares all of it with what was
/// backed up; `meanwhile` is what is done in between. Two errors are none. Until the disk is open the restore point may not be found, but
/// only where somebody has forgotten it: a mount of one that is forgotten already is refused, and of one that is forgotten while it is
/// mounted no name is found any more. And the mount may be late, which is for the caller to judge. What was opened has to be read to its end,
/// for who mounts a restore point pins it, whoever forgets it and prunes.
pub fn read_mounted(
    site: &Site,
    made: &Made,
    (name, number): (&str, u32),
    folder: &str,
    meanwhile: impl FnOnce(),
) -> Seen {
    let (tenant, point) = (site.tenant(), format!("{name}@{number}"));
    let created = match tenant.point(&vm(name), number) {
        Err(VaultError::NoPoint { .. }) => {
            assert!(is_forgotten(&tenant, name, number), "{point} is gone, and nobody has forgotten it");
            return Seen::Forgotten;
        }
        found => found.unwrap().manifest.created,
    };
    let mounted = match Mounted::try_new(site, folder, &[&point]) {
        Ok(mounted) => mounted,
        // It was killed, for it was not ready.
        Err(run) if run.status.is_none() => return Seen::Late,
        Err(run) => {
            let is_said = run.stderr.contains(&format!("there is no restore point {point}"));
            assert!(is_said && is_forgotten(&tenant, name, number), "{point} was not mounted: {run:#?}");
            return Seen::Forgotten;
        }
    };
    let path = mounted.path.join(format!("{name}/{created}/disk-0.raw"));
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) => {
            let is_missing = e.kind() == ErrorKind::NotFound;
            assert!(is_missing && is_forgotten(&tenant, name, number), "{point} at {}: {e}", path.display());
            mounted.umount(site).ok();
            return Seen::Forgotten;
        }
    };
    let mut read = vec![0; FIRST];
    let rest = file.read_exact(&mut read).and_then(|()| {
        meanwhile();
        file.read_to_end(&mut read)
    });
    if let Err(e) = rest {
        panic!("{point}, which is mounted and open, can't be read: {e}");
    }
    drop(file);
    let is_right = blake3::hash(&read) == made.of(name, number);
    assert!(is_right, "{point} differs where it is mounted, or in its length of {} bytes", read.len());
    mounted.umount(site).ok();
    Seen::Right
}
