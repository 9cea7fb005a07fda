//! What a boot reads: recorded, kept in the vault, and fetched ahead from a store that is far away.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reseal_format::boot_reads::{BootReads, DiskReads};
use reseal_format::geometry::CLUSTER;
use reseal_format::names::{DiskName, VmName};
use reseal_mountfs::boot_reads::{Limits, Prefetch, Recorder, RecordingExports};
use reseal_nbd::server::{Disk, Exports, PointExports, Scope, export_name};
use reseal_vault::disk::DiskReader;
use reseal_vault::{Point, Tenant};
use support::far::Far;
use support::faults::{Faulty, Mood};
use support::{Numbers, Vault, disk_bytes, flip};

const CACHE: usize = 64 << 20;
/// Long beside what the reads themselves take, and short enough for a test.
const DELAY: Duration = Duration::from_millis(5);
const CLUSTERS: usize = 400;

fn vm() -> VmName {
    VmName::new("web").unwrap()
}

/// The disk of a point by the code that NBD clients are served by.
fn open(
    tenant: &Arc<Tenant>,
    reader: &Arc<DiskReader>,
    number: u32,
    recorder: Option<&Arc<Recorder>>,
) -> Arc<dyn Disk> {
    let scope = Scope::Point { vm: vm(), number, disk: None };
    let points: Arc<dyn Exports> = Arc::new(PointExports::new(tenant.clone(), None, reader.clone(), scope));
    let exports = match recorder {
        Some(recorder) => Arc::new(RecordingExports::new(points, recorder.clone())),
        None => points,
    };
    exports.open(&export_name(&vm(), number, &DiskName::new("disk-0").unwrap())).unwrap()
}

/// Reads of a boot: here and there a few neighbours in parts, and some of them again.
fn boot(disk: &dyn Disk, bytes: &[u8]) {
    let mut numbers = Numbers(77);
    for _ in 0..60 {
        let at = usize::try_from(numbers.below(CLUSTERS as u64 - 4)).unwrap() * CLUSTER;
        for part in 0..6 {
            let (from, length) = (at + part * CLUSTER / 2 + 4096, 16 << 10);
            let mut out = vec![0xee; length];
            disk.read(from as u64, &mut out).unwrap();
            assert!(out == bytes[from..from + length], "at {from}");
        }
    }
}

fn point(tenant: &Tenant, number: u32) -> Arc<Point> {
    Arc::new(tenant.point(&vm(), number).unwrap())
}

/// What it took to boot from a store that is far away: reads that were waited for, and time.
struct Cost {
    waits: u64,
    took: Duration,
}

#[test]
fn what_one_boot_read_the_next_one_of_any_point_does_not_wait_for() {
    let vault = Vault::new();
    let mut bytes = disk_bytes(41, CLUSTERS * CLUSTER);
    vault.backup("web", &bytes);
    let far = Far::new(vault.tenant.store().clone(), DELAY);
    let tenant = vault.tenant_over(far.clone());
    let cold = || Arc::new(DiskReader::new(tenant.clone(), CACHE));
    let cost = |disk: &dyn Disk, bytes: &[u8]| {
        let (before, began) = (far.here(), Instant::now());
        boot(disk, bytes);
        Cost { waits: far.here() - before, took: began.elapsed() }
    };

    let first = point(&tenant, 1);
    assert_eq!(tenant.boot_reads(&first.manifest).unwrap(), None);
    let recorder = Recorder::new(&first.manifest);
    let slow = cost(&*open(&tenant, &cold(), 1, Some(&recorder)), &bytes);
    let reads = recorder.finish();
    assert!(reads.count() > 100 && slow.waits > 100, "{} clusters, {} waits", reads.count(), slow.waits);
    tenant.note_boot_reads(&first.manifest, &reads).unwrap();
    assert_eq!(recorder.finish(), BootReads::default(), "it is over");

    // Another point, of which a little is different.
    bytes[10 * CLUSTER..12 * CLUSTER].fill(0x33);
    vault.backup("web", &bytes);
    let second = point(&tenant, 2);
    let kept = tenant.boot_reads(&second.manifest).unwrap().unwrap();
    assert_eq!(kept, reads);
    let reader = cold();
    let ahead = Prefetch::start(&reader, &second, &kept, Limits::of(&reader)).unwrap();
    let disk = open(&tenant, &reader, 2, None);
    let beside = cost(&*disk, &bytes);
    ahead.wait();
    assert!(ahead.opened() > 50, "{} clusters", ahead.opened());
    assert!(beside.waits * 2 < slow.waits, "{} of {} reads were waited for", beside.waits, slow.waits);
    assert!(beside.took * 2 < slow.took, "{:?} instead of {:?}", beside.took, slow.took);
    assert_eq!(cost(&*disk, &bytes).waits, 0, "all of it is there now");
    assert!(far.elsewhere() < slow.waits, "neighbours are fetched in one go");

    // Of a VM only the last counts, and it takes the place of those before.
    tenant.note_boot_reads(&second.manifest, &BootReads::default()).unwrap();
    assert_eq!(tenant.boot_reads(&first.manifest).unwrap(), Some(BootReads::default()));
    assert_eq!(std::fs::read_dir(vault.repo().join("tenants/default/vms/web/notes")).unwrap().count(), 1);
}

#[test]
fn no_more_is_fetched_than_the_cache_holds_and_a_store_that_hangs_holds_up_nobody() {
    let vault = Vault::new();
    let bytes = disk_bytes(42, CLUSTERS * CLUSTER);
    vault.backup("web", &bytes);
    let store = Faulty::new(vault.tenant.store().clone());
    let tenant = vault.tenant_over(store.clone());
    let first = point(&tenant, 1);
    let all = DiskReads { disk: DiskName::new("disk-0").unwrap(), clusters: (0..CLUSTERS as u64 + 50).collect() };
    let other = DiskReads { disk: DiskName::new("other").unwrap(), clusters: vec![1, 2] };
    let reads = BootReads { disks: vec![other, all] };

    let small = Arc::new(DiskReader::new(tenant.clone(), 8 << 20));
    let limits = Limits::of(&small);
    assert!(limits.clusters > 20 && limits.clusters * CLUSTER < small.frame_bytes(), "{limits:?}");
    let ahead = Prefetch::start(&small, &first, &reads, limits).unwrap();
    ahead.wait();
    assert!(ahead.opened() > 10 && ahead.opened() <= limits.clusters, "{} clusters", ahead.opened());

    let reader = Arc::new(DiskReader::new(tenant.clone(), CACHE));
    store.set(Mood::Hangs);
    let began = Instant::now();
    let ahead = Prefetch::start(&reader, &first, &reads, Limits::of(&reader)).unwrap();
    assert_eq!(ahead.opened(), 0);
    drop(ahead);
    assert!(began.elapsed() < Duration::from_secs(20));
    store.set(Mood::Answers);
    assert!(store.reads.load(Ordering::Relaxed) > 0);
}

#[test]
fn what_is_damaged_is_not_fetched_and_reported_when_it_is_read() {
    let vault = Vault::new();
    let bytes = disk_bytes(43, CLUSTERS * CLUSTER);
    vault.backup("web", &bytes);
    flip(&vault.packs()[0], 100_000);
    let first = point(&vault.tenant, 1);
    let reader = Arc::new(DiskReader::new(vault.tenant.clone(), CACHE));
    let all = DiskReads { disk: DiskName::new("disk-0").unwrap(), clusters: (0..CLUSTERS as u64).collect() };
    let ahead = Prefetch::start(&reader, &first, &BootReads { disks: vec![all] }, Limits::of(&reader)).unwrap();
    ahead.wait();
    assert!(ahead.opened() > 100, "{} clusters", ahead.opened());
    let disk = open(&vault.tenant, &reader, 1, None);
    let mut damaged = 0;
    for (nth, cluster) in bytes.chunks(CLUSTER).enumerate() {
        let mut out = vec![0xee; CLUSTER];
        match disk.read((nth * CLUSTER) as u64, &mut out) {
            Ok(()) => assert!(out == cluster, "cluster {nth}"),
            Err(e) => {
                assert!(e.reason.contains("failed authentication"), "{e}");
                damaged += 1;
            }
        }
    }
    assert_eq!(damaged, 1);
}
