//! Those who work on a vault beside each other until they are told to stop.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::library::LibraryDisk;
use crate::process::Run;
use crate::random::Random;
use crate::site::Site;

const MIB: usize = 1 << 20;

/// Stops the others when the one who has it ends, also by a failure.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Changes a disk of so many MiB and backs it up, again and again; forgets the oldest of more than three points. What was made and is still
/// there is read back.
pub fn write(site: &Site, name: &str, mib: usize, seed: u64, stop: &AtomicBool, made: &AtomicU32) {
    let mut random = Random::new(seed);
    let path = site.disk(name);
    let mut content = Random::new(77).bytes(mib * MIB);
    let mut points: Vec<(u32, Vec<u8>)> = Vec::new();
    let read = |(number, content): &(u32, Vec<u8>)| {
        let read = LibraryDisk::open(&site.tenant(), name, *number, "disk-0").unwrap().all().unwrap();
        assert!(read == *content, "{name}@{number} differs");
    };
    while !stop.load(Ordering::Relaxed) {
        // A third of what is written the other VM may have, too.
        let at = random.index((mib - 1) * MIB);
        let what = if random.below(3) == 0 { random.below(6) } else { random.number() };
        content[at..at + MIB / 2].copy_from_slice(&Random::new(what).bytes(MIB / 2));
        fs::write(&path, &content).unwrap();
        let point = site.backup(name, &path);
        made.fetch_add(1, Ordering::Relaxed);
        points.push((u32::try_from(point["number"].as_u64().unwrap()).unwrap(), content.clone()));
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
