//! A vault in an object store, as a user has it: everything that works on a folder works there.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::sync::Barrier;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_store::{LeaseUse, Store, StoreError};
use reseal_tests::azurite;
use reseal_tests::ceph::{self, Ceph};
use reseal_tests::model::ReadDisk as _;
use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::s3_proxy::{Fault, S3Proxy};
use reseal_tests::seaweed::{Seaweed, shared};
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

#[test]
fn cephs_gateway_does_so_too() {
    objects(&ceph::shared().site("objects"));
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

#[test]
fn a_lease_of_ceph_is_as_well() {
    leases(ceph::shared().site("leases"));
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
fn of_many_who_make_or_replace_an_object_one_does() {
    many(&shared().site_at("many", shared().port()));
}

#[test]
fn of_many_at_azure_one_does_too() {
    many(&azurite::shared().site("many"));
}

#[test]
fn of_many_at_ceph_one_does_as_well() {
    many(&ceph::shared().site("many"));
}

fn many(site: &Site) {
    const KEYS: usize = 16;
    const EACH: u8 = 8;
    let stores: Vec<_> = (0..EACH).map(|_| site.store()).collect();
    let barrier = Barrier::new(KEYS * usize::from(EACH));
    // Of each key, what each was told of making it, and of replacing it.
    type Told = (usize, u8, Result<bool, StoreError>, Result<bool, StoreError>);
    let told: Vec<Told> = std::thread::scope(|scope| {
        let all = (0..KEYS).flat_map(|key| (0..EACH).map(move |who| (key, who)));
        let (stores, barrier) = (&stores, &barrier);
        let tries: Vec<_> = all
            .map(|(key, who)| {
                // Whatever goes wrong, the others wait for this one.
                scope.spawn(move || {
                    let (store, name) = (&stores[usize::from(who)], format!("many/{key}"));
                    barrier.wait();
                    let made = match store.create(&name, &[who; 100]) {
                        Err(StoreError::Exists(_)) => Ok(false),
                        other => other.map(|()| true),
                    };
                    barrier.wait();
                    let first = store.get(&name, 100);
                    barrier.wait();
                    let replaced = first.and_then(|first| match store.replace(&name, &first, &[who | 0x80; 100]) {
                        Err(StoreError::Changed(_)) => Ok(false),
                        other => other.map(|()| true),
                    });
                    (key, who, made, replaced)
                })
            })
            .collect();
        tries.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let told: Vec<(usize, u8, bool, bool)> =
        told.into_iter().map(|(key, who, made, replaced)| (key, who, made.unwrap(), replaced.unwrap())).collect();
    for key in 0..KEYS {
        let of_key: Vec<_> = told.iter().filter(|(of, ..)| *of == key).collect();
        assert_eq!(of_key.iter().filter(|(_, _, made, _)| *made).count(), 1, "{of_key:?}");
        let replaced: Vec<u8> = of_key.iter().filter(|(.., replaced)| *replaced).map(|(_, who, ..)| *who).collect();
        assert_eq!(replaced.len(), 1, "{of_key:?}");
        assert_eq!(site.store().get(&format!("many/{key}"), 100).unwrap(), [replaced[0] | 0x80; 100]);
    }
}

#[test]
fn an_answer_that_was_lost_is_found_out() {
    let seaweed = shared();
    let proxy = S3Proxy::before(seaweed.port());
    lost(&proxy, &seaweed.site_at("lost", proxy.port()), &seaweed.site_at("lost", seaweed.port()));
}

#[test]
fn an_answer_of_azure_that_was_lost_is_too() {
    let azurite = azurite::shared();
    let proxy = S3Proxy::before(azurite.port());
    lost(&proxy, &azurite.site_at("lost", proxy.port()), &azurite.site("lost"));
}

#[test]
fn an_answer_of_ceph_that_was_lost_is_as_well() {
    let proxy = S3Proxy::before(ceph::shared().port());
    let direct = ceph::shared().site("lost");
    lost(&proxy, &Ceph::site_at("lost", proxy.port()), &direct);
}

fn lost(proxy: &S3Proxy, site: &Site, direct: &Site) {
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
        proxy.next("PUT", &key, fault);
        store.replace(&key, b"next", b"last").unwrap();
        assert!(proxy.has_met(), "{fault:?}");
        proxy.next("DELETE", &key, fault);
        store.delete(&key).unwrap();
        // Somebody else's is not taken for one's own.
        direct.store().create(&key, b"theirs").unwrap();
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
fn a_store_that_falls_silent_ends_what_waits_for_it() {
    let proxy = S3Proxy::before(shared().port());
    let mut site = shared().site_at("silent", proxy.port());
    // Longer than who waits does, so that it is not the lease that ends it.
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "600".into());
    site.reseal(["init", "--no-recovery"]).ok();
    let disk = site.disk("web");
    fs::write(&disk, Random::new(1).bytes(200 * MIB)).unwrap();
    let backup = site.start(["backup", "web", "--limit-rate", "20M", disk.to_str().unwrap()]);
    // It is in the midst of it.
    let began = Instant::now();
    while site.store().list("tenants/default/packs").unwrap().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60) && !backup.has_ended(), "it stores nothing");
        sleep(Duration::from_millis(50));
    }
    proxy.fall_silent(true);
    let began = Instant::now();
    while !backup.has_ended() && began.elapsed() < Duration::from_secs(150) {
        sleep(Duration::from_millis(200));
    }
    let ended = backup.wait().fails(4, &["has not answered within", "whether it runs"]);
    assert!(began.elapsed() >= Duration::from_secs(30), "{ended:#?}");
    // Who begins now waits for half as long.
    let began = Instant::now();
    site.reseal(["list"]).fails(4, &["has not answered within"]);
    assert!(began.elapsed() < Duration::from_secs(60));
    proxy.fall_silent(false);
    site.backup("web", &disk);
    site.verify();
}

#[test]
fn a_store_that_sends_without_end_is_not_listened_to() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut site = shared().site_at("endless", listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let Ok(mut connection) = connection else { return };
            std::thread::spawn(move || {
                let head = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nETag: \"x\"\r\n\
                            Last-Modified: Sun, 29 Nov 2026 00:00:00 GMT\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n";
                let chunk = [b"10000\r\n".as_slice(), &[0; 0x10000], b"\r\n"].concat();
                let _ = connection.write_all(head.as_bytes());
                while connection.write_all(&chunk).is_ok() {}
            });
        }
    });
    let store = site.store();
    let began = Instant::now();
    for told in [
        store.get("x", 10).map(drop),
        store.get("x", 1 << 30).map(drop),
        store.read_at("x", 0, &mut [0; 10]),
        store.read_tail("x", 10).map(drop),
        store.replace("x", b"0123456789", b"9876543210"),
    ] {
        let told = told.unwrap_err().to_string();
        assert!(told.contains("the store sends more than"), "{told}");
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    site.variables.remove("RESEAL_LEASE_SECONDS");
    assert_ne!(site.reseal(["list"]).status, Some(0));
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
fn a_store_that_takes_no_quotes_and_compares_nothing_without_them_is_not_written_to() {
    let proxy = S3Proxy::before(shared().port());
    let store = shared().site_at("quotes", proxy.port()).store();
    store.create("a", b"1").unwrap();
    proxy.refuse_quotes();
    proxy.ignore_conditions();
    assert!(matches!(store.replace("a", b"1", b"2"), Err(StoreError::Changed(_))));
    assert_eq!(store.get("a", 9).unwrap(), b"1");
}

#[test]
fn a_bucket_of_ceph_that_keeps_versions_is_refused_for_it_knows_no_conditions() {
    let ceph = ceph::shared();
    ceph.owner("versions").make_bucket_with_locks();
    let site = ceph.site_in("versions");
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
    site.reseal(["list"]).fails(2, &["nobody", ".aws/config"]);
    site.variables.remove("AWS_PROFILE");
    site.vault = "s3://named/x?profil=a".into();
    site.reseal(["list"]).fails(2, &["\"profil=a\" says nothing known", "profile=NAME"]);
}

#[test]
fn a_copy_goes_from_one_account_to_another_by_the_profiles_of_both() {
    let other = Seaweed::start_for("another");
    let (mut site, mut second) = (shared().site("account"), other.site("account"));
    let disk = site.disk("web");
    let content = Random::new(1).bytes(3 * MIB);
    fs::write(&disk, &content).unwrap();
    site.backup("web", &disk);
    let profile = |name: &str, site: &Site| {
        let of = |variable: &str| &site.variables[variable];
        format!(
            "[profile {name}]\naws_access_key_id = {}\naws_secret_access_key = {}\nendpoint_url = {}\nregion = {name}-1\n",
            of("AWS_ACCESS_KEY_ID"),
            of("AWS_SECRET_ACCESS_KEY"),
            of("AWS_ENDPOINT_URL")
        )
    };
    let config = site.path("aws.config");
    fs::write(&config, profile("here", &site) + &profile("there", &second)).unwrap();
    // The variables say nothing that is of use for either.
    let nothing =
        [("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9")];
    for (site, name) in [(&mut site, "here"), (&mut second, "there")] {
        site.vault = format!("{}?profile={name}", site.vault.display()).into();
        site.variables.insert("AWS_CONFIG_FILE".into(), config.to_str().unwrap().into());
        site.variables.extend(nothing.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
    let (at, keyring) = (second.vault.to_str().unwrap(), second.keyring.to_str().unwrap());
    site.reseal(["copy", "--to", at, "--to-keyring", keyring]).ok();
    second.verify();
    let out = second.path("out");
    second.restore("web@1", "disk-0", &out).ok();
    assert!(fs::read(&out).unwrap() == content);
    // And what is damaged here is mended from there.
    let store = site.store();
    let shelf = format!("tenants/default/packs/{}", store.list("tenants/default/packs").unwrap()[0].name);
    store.delete(&format!("{shelf}/{}", store.list(&shelf).unwrap()[0].name)).unwrap();
    site.reseal(["verify"]).expect(&[3]);
    site.reseal(["verify", "--repair-from", at, "--repair-keyring", keyring]).ok();
    site.verify();
}

#[test]
fn a_restore_asks_for_neighbours_together() {
    const CLUSTERS: usize = 128;
    let proxy = S3Proxy::before(shared().port());
    let site = shared().site_at("restored", proxy.port());
    site.reseal(["init", "--no-recovery"]).ok();
    let (disk, to) = (site.disk("a"), site.disk("restored"));
    let content = Random::new(9).bytes(CLUSTERS * 65_536);
    fs::write(&disk, &content).unwrap();
    site.backup("vm", &disk);
    let (before, _) = proxy.count();
    site.restore("vm@1", "disk-0", &to).ok();
    let (after, _) = proxy.count();
    assert!(fs::read(to).unwrap() == content);
    assert!(after - before < CLUSTERS as u64 / 2, "{} requests for {CLUSTERS} clusters", after - before);
}

#[test]
fn a_vault_in_a_bucket_works_like_one_in_a_folder() {
    whole(&shared().site_at("whole", shared().port()));
}

#[test]
fn a_vault_in_a_container_of_azure_does_too() {
    whole(&azurite::shared().site("whole"));
}

#[test]
fn a_vault_in_a_bucket_of_ceph_does_as_well() {
    whole(&ceph::shared().site("whole"));
}

/// The keys of all objects below a folder. Where a store shows folders that have none any more, these don't count.
fn objects_below(store: &dyn Store, folder: &str) -> Vec<String> {
    let entries = store.list(folder).unwrap();
    let below = |entry: &reseal_store::Entry| {
        let key = format!("{folder}/{}", entry.name);
        if entry.is_folder { objects_below(store, &key) } else { vec![key] }
    };
    entries.iter().flat_map(below).collect()
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
    let mounted = Mounted::new(site, "mounted", &[]);
    let mut bytes = vec![0; content.len()];
    mounted.disk(site, "web", 2, "disk-0").read(0, &mut bytes);
    assert!(bytes == content);
    mounted.umount(site).ok();
    let copied = Site::new();
    let words = ["copy", "--to", copied.vault.to_str().unwrap(), "--to-keyring", copied.keyring.to_str().unwrap()];
    site.reseal(words).ok();
    copied.verify();
    site.reseal(["list"]).ok();
    site.reseal(["status"]).expect(&[0, 1]);
    site.reseal(["rekey", "--kek", "--no-recovery"]).ok();
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
    site.reseal(["tenant", "add", "other", "--no-recovery"]).ok();
    site.reseal_of("other", ["backup", "web", disk.to_str().unwrap()]).ok();
    site.reseal(["tenant", "erase", "other", "--yes", "other"]).ok();
    site.reseal(["tenant", "remove", "other"]).ok();
    assert_eq!(objects_below(&*site.store(), "tenants/other"), Vec::<String>::new());
    site.verify();
}
