//! Memory is bounded whatever the disk's size: a sparse disk as large as a file may be, and one full of random data.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;

use reseal_tests::model::{DiskFile, ReadDisk};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::{Random, soak};
use reseal_tests::site::Site;

/// The promise, in KiB.
const BACKUP: u64 = 300 << 10;
const MOUNT: u64 = 200 << 10;

/// Most memory that a process has had so far, in KiB.
fn peak_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Backs up, verifies, and reads in a mount all over; each within its bound.
fn within_bounds(site: &Site, disk: &std::path::Path, reads: &[(u64, usize)]) {
    let file = DiskFile::open(disk);
    for _ in 0..2 {
        let run = site.reseal(["backup", "vm", disk.to_str().unwrap()]).ok();
        assert!(run.peak_kib < BACKUP, "the backup took {} MiB", run.peak_kib >> 10);
    }
    let run = site.reseal(["verify"]).ok();
    assert!(run.peak_kib < BACKUP, "the verification took {} MiB", run.peak_kib >> 10);
    let cache = 64;
    let mounted = Mounted::new(site, "mnt", &["--cache-size", &format!("{cache}M")]);
    let shown = mounted.disk(site, "vm", 2, "disk-0");
    assert_eq!(shown.length(), file.length());
    for &(at, length) in reads {
        let (mut found, mut wanted) = (vec![0; length], vec![0; length]);
        shown.read(at, &mut found);
        file.read(at, &mut wanted);
        assert!(found == wanted, "at byte {at}");
    }
    let peak = peak_kib(mounted.process());
    assert!(peak < MOUNT + cache * 1024, "the mount took {} MiB", peak >> 10);
    drop(shown);
    mounted.umount(site).ok();
}

#[test]
fn a_sparse_disk_of_sixteen_tebibytes_takes_little() {
    let site = Site::new();
    let disk = site.disk("huge.raw");
    // The longest file that ext4 has; other file systems have longer ones.
    let length = (16u64 << 40) - 4096;
    let file = DiskFile::create(&disk, length);
    let mut random = Random::new(1);
    let mut reads = vec![(0, 100_000), (length - 100_000, 100_000)];
    // All over the disk: each in another leaf, and every sixteenth in another node.
    for n in 0..600 {
        let at = (length / 600 * n).min(length - 5000);
        file.write(at, &random.bytes(4096));
        reads.push((at.saturating_sub(10), 5000));
    }
    drop(file);
    within_bounds(&site, &disk, &reads);
    let shown = site.reseal(["show", "--json", "vm@2"]).ok().json();
    assert_eq!(shown["disks"][0]["length"], length);
    assert!(site.reseal(["show", "vm@2"]).ok().stdout.contains("16.0 TiB"));
}

#[test]
fn a_full_disk_of_a_gibibyte_takes_no_more() {
    let site = Site::new();
    let disk = site.disk("full.raw");
    let length = (1u64 << 30) * u64::from(soak().min(8));
    let file = DiskFile::create(&disk, length);
    let mut random = Random::new(2);
    let mut chunk = vec![0; 1 << 20];
    for at in (0..length).step_by(chunk.len()) {
        random.fill(&mut chunk);
        file.write(at, &chunk);
    }
    drop(file);
    let mut reads: Vec<_> = (0..length / 2).step_by(1 << 20).map(|at| (at, 1 << 20)).collect();
    reads.extend((0..2000).map(|_| (random.below(length - 4096), 4096)));
    within_bounds(&site, &disk, &reads);
}
