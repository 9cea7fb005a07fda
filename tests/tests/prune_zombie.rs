//! A prune that stands still in the midst, and goes on long after another one has done its work: whatever it was about to do, nothing
//! that anybody relies on goes.
//!
//! In an object store nothing tells whether a process has ended, so there another prune begins beside it. Here that is so because its lease is
//! taken away from under it; and nothing stops it then, as in an object store the look at its lease mostly would.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reseal_tests::faults::{Operation, Watched};
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::random::Random;
use reseal_tests::site::{Site, copy_folder};
use reseal_vault::Holder;
use reseal_writer::prune::Prune;

const MIB: usize = 1 << 20;

fn content(seed: u64, mib: usize) -> Vec<u8> {
    Random::new(seed).bytes(mib * MIB)
}

/// A vault in which one pack is partly needed, and another one not at all.
fn site() -> (Site, Vec<u8>, Vec<u8>) {
    let site = Site::new();
    let disk = site.disk("web");
    // All in one pack; web@2 needs two thirds of it.
    let first = content(1, 3);
    let mut second = first.clone();
    second[..MIB].copy_from_slice(&content(2, 1));
    for content in [&first, &second] {
        fs::write(&disk, content).unwrap();
        site.backup("web", &disk);
    }
    let other = site.disk("other");
    fs::write(&other, content(3, 1)).unwrap();
    site.backup("other", &other);
    site.reseal(["forget", "web@1"]).ok();
    site.reseal(["forget", "other@1"]).ok();
    (site, first, second)
}

/// Has a prune stand still before its operation of that number among those that change something; meanwhile another one, which finds
/// less worth rewriting, does its work, and then somebody backs up what was forgotten. Whether there was such an operation.
fn stands_still_before(site: &Arc<Site>, number: usize, first: &[u8], second: &[u8]) -> bool {
    let again = site.disk("again");
    fs::write(&again, [first, &content(3, 1)].concat()).unwrap();
    let store = Arc::new(Watched::new(site.store()));
    let tenant = site.tenant_in(store.clone()).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let (seen, elsewhere) = (count.clone(), site.clone());
    store.meanwhile(move |operation, key| {
        let changes = matches!(operation, Operation::Finish | Operation::Delete) && key.contains("/packs/");
        if changes && seen.fetch_add(1, Ordering::Relaxed) == number {
            fs::remove_file(elsewhere.tenant_folder().join("leases/rekey.lease")).unwrap();
            let pruned = elsewhere.reseal(["prune", "--min-unused", "100", "--json"]).ok().json();
            assert_eq!(pruned["fenced"], serde_json::json!([]));
            assert!(
                !elsewhere.tenant_folder().join("gc").exists()
                    || fs::read_dir(elsewhere.tenant_folder().join("gc")).unwrap().next().is_none()
            );
            elsewhere.backup("again", &elsewhere.disk("again"));
        }
    });
    let alone = tenant.rekey_lease(&Holder::this_process("prune".to_owned())).unwrap();
    let prune = Prune {
        tenant: tenant.clone(),
        grace: Duration::from_secs(9),
        percent: 10,
        most_read: None,
        despite_damage: false,
        workers: 1,
        throttle: None,
        say: &|_| {},
    };
    // What it finds changed may stop it.
    let _ = prune.run(&*alone);
    drop(alone);
    let was_there = count.load(Ordering::Relaxed) > number;
    if was_there {
        let tenant = site.tenant();
        let read = |name, number| LibraryDisk::open(&tenant, name, number, "disk-0").unwrap().all().unwrap();
        assert!(read("web", 2) == second, "before {number}");
        assert!(read("again", 1) == fs::read(&again).unwrap(), "before {number}");
        site.verify();
        site.reseal(["prune", "--min-unused", "1"]).ok();
        site.verify();
    }
    was_there
}

#[test]
fn a_prune_that_goes_on_another_day_takes_nothing_away() {
    let (site, first, second) = site();
    let site = Arc::new(site);
    let copy = site.path("copy");
    copy_folder(&site.vault, &copy);
    let mut number = 0;
    while stands_still_before(&site, number, &first, &second) {
        fs::remove_dir_all(&site.vault).unwrap();
        copy_folder(&copy, &site.vault);
        fs::remove_dir_all(&site.state).unwrap();
        number += 1;
    }
    // It removes one pack of each kind at least, and rewrites another one.
    assert!(number >= 4, "it had {number} operations");
    assert_eq!(site.tenant().chain(&vm("web")).unwrap().last(), 2);
}
