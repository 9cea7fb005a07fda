//! A file system without space: the backup says so, what was there stays, and with space it goes on.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::{Path, PathBuf};

use reseal_tests::library::LibraryDisk;
use reseal_tests::loops::Mount;
use reseal_tests::random::Random;
use reseal_tests::site::Site;

const MIB: usize = 1 << 20;

fn write_disk(site: &Site, name: &str, seed: u64, length: usize) -> (PathBuf, Vec<u8>) {
    let content = Random::new(seed).bytes(length);
    let path = site.disk(name);
    fs::write(&path, &content).unwrap();
    (path, content)
}

fn assert_point(site: &Site, vm: &str, number: u32, content: &[u8]) {
    let read = LibraryDisk::open(&site.tenant(), vm, number, "disk-0").unwrap().all().unwrap();
    assert!(read == content, "{vm}@{number} differs");
}

fn backup_fails(site: &Site, vm: &str, disk: &Path) {
    let run = site.reseal(["backup", vm, disk.to_str().unwrap()]).fails(1, &["no space left", "free some"]);
    assert_eq!(run.stderr.lines().count(), 1, "one line says it: {run:#?}");
}

#[test]
fn a_full_ext4_stops_a_backup_and_nothing_else() {
    let mut site = Site::bare();
    let mount = Mount::ext4(&site.path("small.img"), &site.path("small"), 48 << 20);
    site.vault = mount.0.join("vault");
    site.reseal(["init", "--no-recovery"]).ok();
    let (first, content) = write_disk(&site, "first.raw", 1, 10 * MIB);
    site.backup("vm", &first);
    let (second, more) = write_disk(&site, "second.raw", 2, 60 * MIB);
    for _ in 0..3 {
        backup_fails(&site, "vm", &second);
        site.verify();
        assert_point(&site, "vm", 1, &content);
        assert_eq!(site.reseal(["list", "--json"]).ok().json_lines().len(), 1);
    }
    // What the failed backup wrote is gone, so that a smaller one fits.
    let (small, less) = write_disk(&site, "small.raw", 3, 10 * MIB);
    site.backup("vm", &small);
    assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    // On a larger file system the next one works.
    let larger = Mount::ext4(&site.path("large.img"), &site.path("large"), 200 << 20);
    let moved = larger.0.join("vault");
    reseal_tests::site::copy_folder(&site.vault, &moved);
    site.vault = moved;
    site.backup("vm", &second);
    site.verify();
    for (number, content) in [(1, &content), (2, &less), (3, &more)] {
        assert_point(&site, "vm", number, content);
    }
}

#[test]
fn a_full_tmpfs_that_grows_goes_on() {
    let mut site = Site::bare();
    let mount = Mount::tmpfs(&site.path("small"), 24 << 20);
    site.vault = mount.0.join("vault");
    site.reseal(["init", "--no-recovery"]).ok();
    let (first, content) = write_disk(&site, "first.raw", 4, 8 * MIB);
    site.backup("vm", &first);
    let (second, more) = write_disk(&site, "second.raw", 5, 40 * MIB);
    backup_fails(&site, "vm", &second);
    site.verify();
    mount.resize_tmpfs(100 << 20);
    site.backup("vm", &second);
    assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    site.verify();
    assert_point(&site, "vm", 1, &content);
    assert_point(&site, "vm", 2, &more);
}

/// Every amount of space, so that each of the writes that a backup makes meets the end once.
#[test]
fn wherever_the_space_ends_the_vault_stays_right() {
    let mut site = Site::bare();
    let mount = Mount::tmpfs(&site.path("small"), 64 << 20);
    site.vault = mount.0.join("vault");
    site.reseal(["init", "--no-recovery"]).ok();
    let (first, content) = write_disk(&site, "first.raw", 6, 300_000);
    site.backup("vm", &first);
    let filler = mount.0.join("filler");
    let mut points = vec![content];
    let mut failed = 0;
    for pages in 0..40u64 {
        let (disk, content) = write_disk(&site, "next.raw", 100 + pages, 100_000);
        let free = rustix::fs::statvfs(&mount.0).unwrap();
        let taken = (free.f_bavail * free.f_bsize).saturating_sub(pages * 4096);
        fs::write(&filler, vec![1; usize::try_from(taken).unwrap()]).unwrap();
        let run = site.reseal(["backup", "vm", disk.to_str().unwrap()]).expect(&[0, 1]);
        match run.status {
            Some(0) => points.push(content),
            _ => {
                assert!(run.stderr.contains("no space left"), "{pages} pages: {run:#?}");
                failed += 1;
            }
        }
        site.verify();
        fs::remove_file(&filler).unwrap();
    }
    assert!(failed >= 20 && points.len() > 5, "{failed} failed, {} points", points.len());
    for (number, content) in (1..).zip(&points) {
        assert_point(&site, "vm", number, content);
    }
    site.backup("vm", &first);
    assert_eq!(site.unfinished(), Vec::<PathBuf>::new());
    site.verify();
}

/// The lookup is a cache, and what was seen of the vault is not: a full state folder never makes a backup wrong.
#[test]
fn a_full_state_folder_is_survived_or_said() {
    let mut site = Site::bare();
    let mount = Mount::tmpfs(&site.path("small"), 1 << 20);
    site.state = mount.0.join("state");
    site.reseal(["init", "--no-recovery"]).ok();
    let mut points = Vec::new();
    for seed in 0..30 {
        let (disk, content) = write_disk(&site, "d.raw", 200 + seed, MIB);
        let free = rustix::fs::statvfs(&mount.0).unwrap();
        let taken = (free.f_bavail * free.f_bsize).saturating_sub(seed * 4096);
        fs::write(mount.0.join("filler"), vec![1; usize::try_from(taken).unwrap()]).unwrap();
        let run = site.reseal(["backup", "vm", disk.to_str().unwrap()]).expect(&[0, 1]);
        let made = site.tenant().chain(&reseal_tests::library::vm("vm")).unwrap().last() as usize;
        match run.status {
            Some(0) => assert_eq!(made, points.len() + 1),
            // It may have been made before what could not be remembered was: then that is what is said.
            _ => assert!(run.stderr.contains(site.state.to_str().unwrap()), "{run:#?}"),
        }
        points.resize(made, content);
        fs::remove_file(mount.0.join("filler")).unwrap();
        site.verify();
    }
    for (number, content) in (1..).zip(&points) {
        assert_point(&site, "vm", number, content);
    }
}
