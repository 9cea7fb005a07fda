//! Writes that fail, at every place, and reads that are counted: the libraries over a store that does as it is told.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reseal_tests::faults::{Fault, Operation, Plan, Watched};
use reseal_tests::library::{LibraryDisk, backup};
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use reseal_vault::{PointSpec, Points, Tenant};

const DISK: usize = 700_000;

struct Watch {
    site: Site,
    store: Arc<Watched>,
    tenant: Arc<Tenant>,
    disk: PathBuf,
    content: Vec<u8>,
    points: Vec<Vec<u8>>,
    random: Random,
}

impl Watch {
    /// A vault with one point.
    fn new(seed: u64) -> Watch {
        let site = Site::new();
        let store = Arc::new(Watched::new(site.store()));
        let tenant = site.tenant_in(store.clone()).unwrap();
        let mut random = Random::new(seed);
        let content = random.bytes(DISK);
        let disk = site.disk("d.raw");
        fs::write(&disk, &content).unwrap();
        site.backup("vm", &disk);
        Watch { points: vec![content.clone()], site, store, tenant, disk, content, random }
    }

    /// The disk changes.
    fn change(&mut self) {
        let at = self.random.index(DISK / 2);
        self.random.fill(&mut self.content[at..at + DISK / 3]);
        fs::write(&self.disk, &self.content).unwrap();
    }

    /// A backup over the watched store; whether it said that it worked.
    fn backup(&self) -> bool {
        let heads = self.site.heads(&self.tenant);
        backup(&self.tenant, &heads, "vm", &self.disk).is_ok()
    }

    /// After a backup that may have failed: all points are right, and the next backup, of another process, is.
    #[track_caller]
    fn check(&mut self, said: bool, how: &str) {
        self.store.plan(None);
        let made = self.tenant.chain(&reseal_tests::library::vm("vm")).unwrap().last() as usize;
        assert!(made == self.points.len() + 1 || (!said && made == self.points.len()), "{how}: {made} points");
        self.points.resize(made, self.content.clone());
        self.site.verify();
        self.change();
        self.site.backup("vm", &self.disk);
        self.points.push(self.content.clone());
        assert_eq!(self.site.unfinished(), Vec::<PathBuf>::new(), "{how}");
        let tenant = self.site.tenant();
        for (number, content) in (1..).zip(&self.points) {
            let read = LibraryDisk::open(&tenant, "vm", number, "disk-0").unwrap().all().unwrap();
            assert!(read == *content, "{how}: vm@{number} differs");
        }
        self.site.verify();
    }
}

/// Each operation of a backup in turn fails once; until a backup goes through without meeting it.
fn each_operation_in_turn(seed: u64, fault: Fault) {
    let mut watch = Watch::new(seed);
    let mut failed = 0;
    for after in 0.. {
        assert!(after < 200, "a backup of a small disk takes fewer operations");
        watch.change();
        watch.store.plan(Some(Plan { operation: None, after, lasting: false, fault }));
        let said = watch.backup();
        let happened = watch.store.happened();
        failed += usize::from(!said);
        watch.check(said, &format!("{fault:?} after {after}"));
        if !happened {
            assert!(said && failed >= 8, "{failed} of {after} failed");
            return;
        }
    }
}

#[test]
fn whichever_operation_fails_nothing_is_lost() {
    each_operation_in_turn(1, Fault::Fails(ErrorKind::Other));
}

#[test]
fn whichever_operation_meets_a_full_disk_nothing_is_lost() {
    each_operation_in_turn(2, Fault::Fails(ErrorKind::StorageFull));
}

/// The object is there, but the answer was lost: the retry must not be refused for ever, nor a number be used twice.
#[test]
fn whichever_answer_is_lost_nothing_is() {
    each_operation_in_turn(3, Fault::Lies);
}

#[test]
fn a_store_that_fails_for_good_fails_the_backup_only() {
    let mut watch = Watch::new(4);
    let writes = [Operation::Upload, Operation::Append, Operation::Finish, Operation::List, Operation::Sweep];
    for operation in writes {
        watch.change();
        let fault = Fault::Fails(ErrorKind::TimedOut);
        watch.store.plan(Some(Plan { operation: Some(operation), after: 0, lasting: true, fault }));
        assert!(!watch.backup(), "{operation:?}");
        watch.check(false, &format!("{operation:?} fails for good"));
    }
}

#[test]
fn a_store_that_stalls_delays_a_backup_only() {
    let mut watch = Watch::new(5);
    for operation in [Operation::Append, Operation::Finish, Operation::ReadAt, Operation::List] {
        watch.change();
        let fault = Fault::Stalls(Duration::from_millis(100));
        watch.store.plan(Some(Plan { operation: Some(operation), after: 0, lasting: true, fault }));
        assert!(watch.backup(), "{operation:?}");
        watch.check(true, &format!("{operation:?} stalls"));
    }
}

/// A damaged or unreachable parent must not be taken for holes or for unchanged.
#[test]
fn reads_that_fail_during_a_backup_make_no_wrong_point() {
    let mut watch = Watch::new(6);
    for operation in [Operation::Get, Operation::ReadAt, Operation::ReadTail] {
        for after in 0..6 {
            watch.change();
            let fault = Fault::Fails(ErrorKind::NotFound);
            watch.store.plan(Some(Plan { operation: Some(operation), after, lasting: true, fault }));
            let said = watch.backup();
            watch.check(said, &format!("{operation:?} fails from the {after}th on"));
        }
    }
}

/// The manifest is the last object that a backup makes, and everything before it is finished by then.
#[test]
fn the_manifest_is_made_last() {
    let mut watch = Watch::new(7);
    watch.change();
    watch.store.take_log();
    assert!(watch.backup());
    let log = watch.store.take_log();
    let finished: Vec<_> = log.iter().filter(|(operation, _)| *operation == Operation::Finish).collect();
    let manifests = finished.iter().filter(|(_, key)| key.ends_with(".manifest")).count();
    assert_eq!((manifests, finished.len()), (1, 3));
    assert!(finished.last().unwrap().1.ends_with(".manifest"));
    let started = log.iter().position(|(_, key)| key.ends_with("2.manifest")).unwrap();
    let before = log[..started].iter().filter(|(operation, _)| *operation == Operation::Finish).count();
    assert_eq!(before, 2, "a manifest was begun before what it leads to was durable");
}

/// Of a chain of a thousand, the last opens as the first does: same requests, same bytes.
#[test]
fn opening_the_thousandth_point_costs_what_opening_the_first_does() {
    let site = Site::new();
    let store = Arc::new(Watched::new(site.store()));
    let tenant = site.tenant_in(store.clone()).unwrap();
    let heads = site.heads(&tenant);
    let disk = site.disk("d.raw");
    let mut content = Random::new(8).bytes(200_000);
    for number in 1..=1000u32 {
        content[..4].copy_from_slice(&number.to_le_bytes());
        // In place, as a guest writes.
        fs::write(&disk, &content).unwrap();
        assert_eq!(backup(&tenant, &heads, "vm", &disk).unwrap().number, number);
    }
    let cost = |number: u32| {
        let tenant = site.tenant_in(store.clone()).unwrap();
        store.take_log();
        let spec = PointSpec::parse(&format!("vm@{number}")).unwrap();
        let point = tenant.resolve(&spec).unwrap();
        assert_eq!(point.manifest.number, number);
        let disk = LibraryDisk::open(&tenant, "vm", number, "disk-0").unwrap();
        let mut first = [0; 4];
        disk.try_read(0, &mut first).unwrap();
        assert_eq!(first, number.to_le_bytes());
        let log = store.take_log();
        let operations: Vec<_> = log.iter().map(|(operation, _)| *operation).collect();
        assert!(operations.iter().filter(|operation| operation.reads()).count() <= 8, "{log:?}");
        operations
    };
    let first = cost(1);
    for number in [2, 500, 1000] {
        assert_eq!(cost(number), first, "vm@{number}");
    }
    site.verify();
}
