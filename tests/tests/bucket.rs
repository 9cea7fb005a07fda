//! A vault in an object store, as a user has it: everything that works on a folder works there.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;

use reseal_store::{LeaseUse, StoreError};
use reseal_tests::azurite;
use reseal_tests::random::Random;
use reseal_tests::s3_proxy::{Fault, S3Proxy};
use reseal_tests::seaweed::shared;
use reseal_tests::site::Site;

const MIB: usize = 1 << 20;

#[test]
fn objects_are_made_once_replaced_by_comparison_and_read_back() {
    objects(&shared().site_at("objects", shared().port()));
}

#[test]
fn azure_does_the_same() {
    objects(&azurite::shared().site("objects"));
}

fn objects(site: &Site) {
    let store = site.store();
    store.probe().unwrap();
    store.create("a/b%20c/d", b"hello").unwrap();
    assert!(matches!(store.create("a/b%20c/d", b"other"), Err(StoreError::Exists(_))));
    assert_eq!(store.get("a/b%20c/d", 5).unwrap(), b"hello");
    assert!(matches!(store.get("a/b%20c/d", 4), Err(StoreError::TooLong { length: 5, .. })));
    assert!(matches!(store.get("a/x", 4), Err(StoreError::NotFound(_))));
    assert!(matches!(store.get("a", 4), Err(StoreError::NotFound(_))));
    assert_eq!(store.read_tail("a/b%20c/d", 3).unwrap(), (b"llo".to_vec(), 5));
    assert_eq!(store.read_tail("a/b%20c/d", 30).unwrap(), (b"hello".to_vec(), 5));
    assert_eq!(store.read_tail("a/b%20c/d", 0).unwrap(), (vec![], 5));
    let mut two = [0; 2];
    store.read_at("a/b%20c/d", 1, &mut two).unwrap();
    assert_eq!(&two, b"el");
    assert!(matches!(store.read_at("a/b%20c/d", 4, &mut two), Err(StoreError::Short { length: 5, wanted: 6, .. })));
    assert!(matches!(store.read_at("a/b%20c/d", 9, &mut two), Err(StoreError::Short { length: 5, .. })));
    store.create("a/empty", b"").unwrap();
    assert_eq!((store.get("a/empty", 9).unwrap(), store.read_tail("a/empty", 9).unwrap()), (vec![], (vec![], 0)));
    let mut listed = store.list("a/").unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    let of = |entry: &reseal_store::Entry| (entry.name.clone(), entry.length, entry.is_folder);
    assert_eq!(listed.iter().map(of).collect::<Vec<_>>(), [("b%20c".into(), 0, true), ("empty".into(), 0, false)]);
    assert_eq!(store.list("none/").unwrap(), []);
    store.replace("a/empty", b"", b"second").unwrap();
    for wrong in [&b"one"[..], b"secone", b"", b"second "] {
        assert!(matches!(store.replace("a/empty", wrong, b"3"), Err(StoreError::Changed(_))), "{wrong:?}");
    }
    store.replace("a/empty", b"one", b"second").unwrap();
    assert!(matches!(store.replace("a/none", b"one", b"two"), Err(StoreError::NotFound(_))));
    for key in ["../x", "a/../../x", "/etc/x", "a//b", "", "a/./b", "a\0b"] {
        assert!(store.create(key, b"x").is_err(), "{key:?}");
    }
    let mut upload = store.upload("a/large").unwrap();
    let content = Random::new(3).bytes(9 * MIB);
    for part in content.chunks(MIB + 1) {
        upload.append(part).unwrap();
    }
    assert!(matches!(store.get("a/large", 1), Err(StoreError::NotFound(_))));
    upload.finish().unwrap();
    let mut read = vec![0; 3 * MIB];
    store.read_at("a/large", 5 * MIB as u64 + 7, &mut read).unwrap();
    assert!(read == content[5 * MIB + 7..8 * MIB + 7]);
    store.delete("a/large").unwrap();
    assert!(matches!(store.delete("a/large"), Ok(()) | Err(StoreError::NotFound(_))));
    assert!(matches!(store.read_at("a/large", 0, &mut [0]), Err(StoreError::NotFound(_))));
}

#[test]
fn a_lease_is_renewed_ended_and_taken_over() {
    leases(shared().site_at("leases", shared().port()));
}

#[test]
fn a_lease_of_azure_is_so_too() {
    leases(azurite::shared().site("leases"));
}

fn leases(mut site: Site) {
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "3".into());
    let (store, other) = (site.store(), site.store());
    let second = std::time::Duration::from_secs(1);
    let lease = store.lease("t/leases/one", b"who", LeaseUse::Changing).unwrap();
    std::thread::sleep(second * 7);
    let standing = other.standing("t/leases/one").unwrap().unwrap();
    assert_eq!((standing.bytes.as_slice(), standing.is_silent), (&b"who"[..], false), "it is renewed");
    assert!(matches!(other.lease("t/leases/one", b"x", LeaseUse::Changing), Err(StoreError::Exists(_))));
    assert!(!other.end("t/leases/one").unwrap());
    lease.check().unwrap();
    store.create("t/x", b"1").unwrap();
    drop(lease);
    assert_eq!(other.standing("t/leases/one").unwrap(), None);
    // One that its process does not renew: as if it stood still.
    other.create("t/leases/one", b"reseal-lease 1 00 0 3\ndead").unwrap();
    other.create("t/leases/two", b"reseal-lease 1 00 0 3\ndead").unwrap();
    assert!(!other.standing("t/leases/two").unwrap().unwrap().is_silent);
    std::thread::sleep(second * 7);
    let standing = other.standing("t/leases/two").unwrap().unwrap();
    assert_eq!((standing.bytes.as_slice(), standing.is_silent), (&b"dead"[..], true));
    assert!(other.end("t/leases/two").unwrap());
    assert_eq!(other.standing("t/leases/two").unwrap(), None);
    // Of several who take it over one has it.
    let taken: Vec<_> = std::thread::scope(|scope| {
        let tries: Vec<_> =
            (0..6).map(|_| scope.spawn(|| other.lease("t/leases/one", b"new", LeaseUse::Changing).ok())).collect();
        tries.into_iter().filter_map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(taken.len(), 1);
    // Whose lease was taken away changes nothing any more below its folder, and other things all the same.
    store.delete("t/leases/one").unwrap();
    std::thread::sleep(second * 2);
    assert!(matches!(taken[0].check(), Err(StoreError::Lost(_))));
    assert!(matches!(other.create("t/y", b"1"), Err(StoreError::Lost(_))));
    assert!(matches!(other.delete("t/x"), Err(StoreError::Lost(_))));
    other.create("u/y", b"1").unwrap();
    drop(taken);
    other.create("t/y", b"1").unwrap();
    // One who reads takes it again.
    let reading = store.lease("t/leases/read", b"who", LeaseUse::Reading).unwrap();
    other.delete("t/leases/read").unwrap();
    std::thread::sleep(second * 2);
    assert!(other.standing("t/leases/read").unwrap().is_some());
    drop(reading);
}

#[test]
fn an_answer_that_was_lost_is_found_out() {
    let seaweed = shared();
    let proxy = S3Proxy::before(seaweed.port());
    let site = seaweed.site_at("lost", proxy.port());
    let store = site.store();
    for (nth, fault) in
        [Fault::CutAfter, Fault::DoneAndError, Fault::Error, Fault::CutBefore, Fault::Throttled].into_iter().enumerate()
    {
        let key = format!("t/{nth}");
        proxy.next("PUT", &key, fault);
        store.create(&key, b"mine").unwrap();
        assert!(proxy.has_met(), "{fault:?}");
        proxy.next("PUT", &key, fault);
        store.replace(&key, b"mine", b"next").unwrap();
        assert!(proxy.has_met(), "{fault:?}");
        proxy.next("DELETE", &key, fault);
        store.delete(&key).unwrap();
        // Somebody else's is not taken for one's own.
        seaweed.site_at("lost", seaweed.port()).store().create(&key, b"theirs").unwrap();
        proxy.next("PUT", &key, fault);
        assert!(matches!(store.create(&key, b"mine"), Err(StoreError::Exists(_))), "{fault:?}");
        assert_eq!(store.get(&key, 9).unwrap(), b"theirs");
    }
    store.create("t/large", &Random::new(1).bytes(4 * MIB)).unwrap();
    let mut read = vec![0; 4 * MIB];
    for fault in [Fault::CutAnswer, Fault::CutBefore, Fault::Error, Fault::Throttled, Fault::Slow] {
        proxy.next("GET", "t/large", fault);
        read.fill(0);
        store.read_at("t/large", 0, &mut read).unwrap();
        assert!(proxy.has_met() && read == Random::new(1).bytes(4 * MIB), "{fault:?}");
    }
}

#[test]
fn a_store_that_knows_no_conditions_is_refused() {
    let proxy = S3Proxy::before(shared().port());
    proxy.ignore_conditions();
    let site = shared().site_at("lying", proxy.port());
    site.reseal(["init", "--no-recovery"]).fails(1, &["does not honour conditional writes"]);
    assert!(site.store().list("").unwrap().iter().all(|entry| entry.name == "tmp"));
}

#[test]
fn what_can_not_be_reached_or_used_is_named() {
    let mut site = shared().site_at("named", shared().port());
    site.vault = "s3://nobody-made-this/x".into();
    site.reseal(["init", "--no-recovery"]).fails(1, &["there is no such bucket"]);
    site.vault = "s3://named/x".into();
    site.variables.insert("AWS_SECRET_ACCESS_KEY".into(), "wrong".into());
    let run = site.reseal(["init", "--no-recovery"]).expect(&[1]);
    assert!(run.stderr.contains("can't") && !run.said().contains("wrong"), "{run:#?}");
    for (vault, said) in
        [("ftp://x/y", "ftp:// is no place"), ("s3://", "names no bucket"), ("s3://b/../x", "not a legal prefix")]
    {
        site.vault = vault.into();
        site.reseal(["list"]).fails(2, &[said]);
    }
    site.vault = "s3://named/x".into();
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "none".into());
    site.reseal(["list"]).fails(2, &["RESEAL_LEASE_SECONDS must be a number from 3 to 3600"]);
    site.variables.remove("RESEAL_LEASE_SECONDS");
    site.variables.insert("AWS_PROFILE".into(), "nobody".into());
    site.reseal(["list"]).fails(2, &["nobody", "AWS_PROFILE"]);
}

#[test]
fn a_vault_in_a_bucket_works_like_one_in_a_folder() {
    whole(&shared().site_at("whole", shared().port()));
}

#[test]
fn a_vault_in_a_container_of_azure_does_too() {
    whole(&azurite::shared().site("whole"));
}

fn whole(site: &Site) {
    site.reseal(["init", "--no-recovery"]).ok();
    site.reseal(["init", "--no-recovery"]).fails(1, &["already"]);
    let mut content = Random::new(1).bytes(6 * MIB + 777);
    content[MIB..2 * MIB].fill(0);
    let disk = site.disk("web.raw");
    fs::write(&disk, &content).unwrap();
    site.backup("web", &disk);
    let first = content.clone();
    content[3 * MIB..4 * MIB].copy_from_slice(&Random::new(2).bytes(MIB));
    fs::write(&disk, &content).unwrap();
    let second = site.backup("web", &disk);
    assert!(second["stats"]["stored"].as_u64().unwrap_or(0) < 2 * MIB as u64, "{second}");
    site.verify();
    for (point, wanted) in [("web@1", &first), ("web@2", &content)] {
        let out = site.path(point);
        site.restore(point, "disk-0", &out).ok();
        assert!(fs::read(&out).unwrap() == *wanted, "{point}");
    }
    site.reseal(["list"]).ok();
    site.reseal(["status"]).expect(&[0, 1]);
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    site.verify();
    site.reseal(["hold", "web@2", "--reason", "why not"]).ok();
    site.reseal(["forget", "web@2"]).fails(1, &["held"]);
    site.reseal(["forget", "web@1"]).ok();
    let pruned = site.reseal(["prune", "--json", "--min-unused", "1"]).ok().json();
    assert!(pruned["freed"].as_u64().unwrap() > 0, "{pruned}");
    site.verify();
    let out = site.path("again");
    site.restore("web@2", "disk-0", &out).ok();
    assert!(fs::read(&out).unwrap() == content);
    assert!(site.reseal(["restore", "web@1", "/dev/null"]).status != Some(0));
}
