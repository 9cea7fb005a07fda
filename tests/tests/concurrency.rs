//! Many at once: writers of one tenant, two writers of one VM, readers beside writers.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::PathBuf;

use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::Site;

fn write_disk(site: &Site, name: &str, parts: &[(u64, usize)]) -> PathBuf {
    let path = site.disk(name);
    let content: Vec<u8> = parts.iter().flat_map(|&(seed, length)| Random::new(seed).bytes(length)).collect();
    fs::write(&path, content).unwrap();
    path
}

#[test]
fn ten_backups_of_one_tenant_at_once_all_succeed() {
    const SHARED: usize = 4 << 20;
    let site = Site::new();
    // All share a part, as clones of a template do.
    let disks: Vec<_> =
        (0..10).map(|n| write_disk(&site, &format!("{n}.raw"), &[(1, SHARED), (100 + n, 2 << 20)])).collect();
    for round in 1..=2 {
        let start =
            |(n, disk): (usize, &PathBuf)| site.start(["backup", "--json", &format!("vm-{n}"), disk.to_str().unwrap()]);
        let running: Vec<_> = disks.iter().enumerate().map(start).collect();
        for running in running {
            let point = running.wait().ok().json();
            assert_eq!(point["number"], round);
            if round == 2 {
                assert_eq!(point["stats"]["stored"], 0);
            }
        }
        assert_eq!(site.verify()["points"], 10 * round);
    }
    let tenant = site.tenant();
    for (n, disk) in disks.iter().enumerate() {
        let read = LibraryDisk::open(&tenant, &format!("vm-{n}"), 2, "disk-0").unwrap().all().unwrap();
        assert!(read == fs::read(disk).unwrap());
    }
    // One that comes later stores only its own part.
    let late = write_disk(&site, "late.raw", &[(1, SHARED), (999, 1 << 20)]);
    assert!(site.backup("late", &late)["stats"]["new"].as_u64().unwrap() <= (1 << 20) + 65_536);
    assert!(site.unfinished().is_empty());
}

/// Whoever loses says so and can be run again; the chain stays whole.
#[test]
fn of_two_writers_of_one_vm_one_wins_and_the_other_says_so() {
    let site = Site::new();
    let (a, b) = (write_disk(&site, "a.raw", &[(1, 6 << 20)]), write_disk(&site, "b.raw", &[(2, 6 << 20)]));
    let mut races = 0;
    let mut last = 0;
    for _ in seeds(12) {
        let start = |disk: &PathBuf| site.start(["backup", "vm", disk.to_str().unwrap()]);
        let runs = [start(&a), start(&b)].map(|running| running.wait());
        let won = runs.iter().filter(|run| run.status == Some(0)).count();
        assert!(won >= 1, "{runs:#?}");
        for run in runs.into_iter().filter(|run| run.status != Some(0)) {
            run.fails(1, &["another backup of vm", "nothing is lost, run it again"]);
            races += 1;
        }
        let now = site.tenant().chain(&vm("vm")).unwrap().last();
        assert_eq!(now as usize, last + won);
        last = now as usize;
    }
    assert!(races > 0, "two that start together meet sometimes");
    assert_eq!(site.verify()["points"], last);
    assert!(site.unfinished().is_empty());
}

/// Two `init` of one vault at once: one vault, one tenant, and keys that open it.
#[test]
fn of_many_that_init_one_vault_one_wins() {
    for _ in 0..5 {
        let site = Site::bare();
        let running: Vec<_> = (0..6).map(|_| site.start(["init", "--no-recovery"])).collect();
        let won = running
            .into_iter()
            .filter(|_| true)
            .map(|one| one.wait().expect(&[0, 1]))
            .filter(|run| run.status == Some(0));
        assert_eq!(won.count(), 1);
        let disk = write_disk(&site, "d.raw", &[(1, 100_000)]);
        site.backup("vm", &disk);
        site.verify();
    }
}

#[test]
fn lists_and_verifications_beside_a_running_backup_see_whole_points() {
    let site = Site::new();
    let disk = write_disk(&site, "d.raw", &[(1, 24 << 20)]);
    let small = write_disk(&site, "s.raw", &[(2, 200_000)]);
    site.backup("small", &small);
    let running = site.start(["backup", "big", disk.to_str().unwrap()]);
    for _ in 0..8 {
        site.verify();
        site.reseal(["list"]).ok();
        site.backup("small", &small);
    }
    running.wait().ok();
    assert_eq!(site.verify()["points"], 10);
}
