//! What fetching ahead brings to a boot from a store that is far away:
//! `prefetch DISK READS [MILLISECONDS [MEBIBYTES OF CACHE]]`, with the reads of a boot as `bench` records them, one `OFFSET LENGTH` a line.
//!
//! It backs up the disk, and replays the reads one after the other, by the code that serves NBD clients, over a store that takes so long
//! for each request: once as they come, recording them, and once while what was recorded is fetched ahead.

#![allow(clippy::unwrap_used, reason = "a tool of developers fails by panicking")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_format::names::DiskName;
use reseal_mountfs::boot_reads::{Limits, Prefetch, Recorder, RecordingExports};
use reseal_nbd::server::{Disk, Exports, PointExports, Scope, export_name};
use reseal_tests::faults::{Fault, Plan, Watched};
use reseal_tests::library::{backup, vm};
use reseal_tests::site::Site;
use reseal_vault::disk::DiskReader;

/// As `boot` has it unless told otherwise.
const CACHE: usize = 512;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [disk, reads, rest @ ..] = &arguments[..] else { panic!("give DISK READS [MILLISECONDS [MEBIBYTES]]") };
    let delay = Duration::from_millis(rest.first().map_or(20, |text| text.parse().unwrap()));
    let cache = rest.get(1).map_or(CACHE, |text| text.parse().unwrap()) << 20;
    let reads = parse(&fs::read_to_string(reads).unwrap());

    let site = Site::new();
    let near = site.tenant();
    let point = Arc::new({
        backup(&near, &site.heads(&near), "vm", Path::new(disk)).unwrap();
        near.point(&vm("vm"), 1).unwrap()
    });
    let store = Arc::new(Watched::new(site.store()));
    let tenant = site.tenant_in(store.clone()).unwrap();
    store.plan(Some(Plan { operation: None, after: 0, lasting: true, fault: Fault::Stalls(delay) }));
    let exports = |reader: &Arc<DiskReader>| -> Arc<dyn Exports> {
        let scope = Scope::Point { vm: vm("vm"), number: 1, disk: None };
        Arc::new(PointExports::new(tenant.clone(), None, reader.clone(), scope))
    };
    let name = export_name(&vm("vm"), 1, &DiskName::new("disk-0").unwrap());
    let said = |what: &str, took: Duration| {
        let requests = store.take_log().len();
        println!("{what}: {:.2} s, {requests} requests", took.as_secs_f64());
    };
    println!("{} reads, {} ms a request", reads.len(), delay.as_millis());
    store.take_log();

    let cold = Arc::new(DiskReader::new(tenant.clone(), cache));
    let recorder = Recorder::new(&point.manifest);
    let recording = RecordingExports::new(exports(&cold), recorder.clone());
    said("as they come", replay(&*recording.open(&name).unwrap(), &reads));
    let recorded = recorder.finish();
    println!("{} clusters were read", recorded.count());

    let reader = Arc::new(DiskReader::new(tenant.clone(), cache));
    let began = Instant::now();
    let ahead = Prefetch::start(&reader, &point, &recorded, Limits::of(&reader)).unwrap();
    let took = replay(&*exports(&reader).open(&name).unwrap(), &reads);
    ahead.wait();
    println!("all {} clusters were there after {:.2} s", ahead.opened(), began.elapsed().as_secs_f64());
    said("fetched ahead", took);

    let reader = Arc::new(DiskReader::new(tenant.clone(), cache));
    let began = Instant::now();
    Prefetch::start(&reader, &point, &recorded, Limits::of(&reader)).unwrap().wait();
    said("the fetching alone", began.elapsed());
}

fn parse(text: &str) -> Vec<(u64, usize)> {
    let words = text.lines().filter_map(|line| line.split_once(' '));
    words.map(|(offset, length)| (offset.parse().unwrap(), length.parse().unwrap())).collect()
}

/// One read after the other.
fn replay(disk: &dyn Disk, reads: &[(u64, usize)]) -> Duration {
    let mut buffer = vec![0; reads.iter().map(|(_, length)| *length).max().unwrap_or(0)];
    let began = Instant::now();
    for (offset, length) in reads {
        disk.read(*offset, &mut buffer[..*length]).unwrap();
    }
    began.elapsed()
}
