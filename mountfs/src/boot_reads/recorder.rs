//! Looks on while a guest boots.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use reseal_format::boot_reads::{BootReads, DiskReads, MAX_CLUSTERS};
use reseal_format::geometry::CLUSTER_U64;
use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;
use reseal_nbd::server::{Disk, DiskError, Exports, Listed, NotOpened, Stretch, export_name};

/// Which clusters were read.
#[derive(Default)]
struct Seen {
    /// By place of the disk in the manifest.
    clusters: HashSet<(usize, u64)>,
    order: Vec<(usize, u64)>,
}

/// Notes which clusters of a point's disks are read first, in that order.
pub struct Recorder {
    /// Each with the name of its export.
    disks: Vec<(DiskName, String)>,
    /// Whether it still does: afterwards a read costs one look at this.
    looks: AtomicBool,
    seen: Mutex<Seen>,
}

impl Recorder {
    /// One that begins now.
    pub fn new(point: &Manifest) -> Arc<Recorder> {
        let named = |name: &DiskName| (name.clone(), export_name(&point.vm, point.number, name));
        let disks = point.disks.iter().map(|disk| named(&disk.name)).collect();
        Arc::new(Recorder { disks, looks: AtomicBool::new(true), seen: Mutex::default() })
    }

    fn note(&self, nth: usize, offset: u64, length: usize) {
        if length == 0 || !self.looks.load(Ordering::Relaxed) {
            return;
        }
        let last = (offset + (length as u64 - 1)) / CLUSTER_U64;
        let mut guard = self.seen.lock();
        let Seen { clusters, order } = &mut *guard;
        for cluster in offset / CLUSTER_U64..=last {
            if order.len() == MAX_CLUSTERS {
                self.looks.store(false, Ordering::Relaxed);
                return;
            }
            if clusters.insert((nth, cluster)) {
                order.push((nth, cluster));
            }
        }
    }

    /// The boot is over: what it read. What is read from now on is not noted.
    pub fn finish(&self) -> BootReads {
        self.looks.store(false, Ordering::Relaxed);
        let Seen { order, .. } = std::mem::take(&mut *self.seen.lock());
        let mut disks: Vec<DiskReads> =
            self.disks.iter().map(|(name, _)| DiskReads { disk: name.clone(), clusters: Vec::new() }).collect();
        for (nth, cluster) in order {
            disks[nth].clusters.push(cluster);
        }
        disks.retain(|read| !read.clusters.is_empty());
        BootReads { disks }
    }
}

/// Exports of a point whose reads are noted.
pub struct RecordingExports {
    points: Arc<dyn Exports>,
    recorder: Arc<Recorder>,
}

impl RecordingExports {
    /// What `points` has.
    pub fn new(points: Arc<dyn Exports>, recorder: Arc<Recorder>) -> RecordingExports {
        RecordingExports { points, recorder }
    }
}

impl Exports for RecordingExports {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        let disk = self.points.open(name)?;
        match self.recorder.disks.iter().position(|(_, export)| export == disk.name()) {
            Some(nth) => Ok(Arc::new(RecordedDisk { disk, nth, recorder: self.recorder.clone() })),
            None => Ok(disk),
        }
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        self.points.list()
    }
}

/// A disk that is read only, and noted.
struct RecordedDisk {
    disk: Arc<dyn Disk>,
    nth: usize,
    recorder: Arc<Recorder>,
}

impl Disk for RecordedDisk {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn description(&self) -> Option<String> {
        self.disk.description()
    }

    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn is_fixed(&self) -> bool {
        self.disk.is_fixed()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        self.recorder.note(self.nth, offset, out.len());
        self.disk.read(offset, out)
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Option<Result<(), DiskError>> {
        let read = self.disk.try_read(offset, out)?;
        // What would have to be waited for is noted when it is.
        self.recorder.note(self.nth, offset, out.len());
        Some(read)
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        self.disk.stretches(offset, length, most)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.cache(offset, length)
    }
}
