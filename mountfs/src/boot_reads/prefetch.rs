//! Fetches ahead what the last boot read.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use reseal_format::boot_reads::BootReads;
use reseal_vault::Point;
use reseal_vault::disk::{DiskReader, Tools};

/// Clusters whose order does not count, so that neighbours among them are fetched in one go: half a second of a boot, or less.
const WINDOW: usize = 512;
/// Clusters of one request; enough that the time until the store answers counts little beside that of the bytes.
const TOGETHER: usize = 8;
/// Neighbours may be as far apart as this and still be fetched in one go.
const APART: u64 = 2;
/// Of the frame cache, what is fetched ahead may take so many quarters: the guest's other reads need room, too.
const QUARTERS: usize = 3;
const STACK: usize = 512 * 1024;
/// Below that of whoever serves the guest.
const NICE: i32 = 10;

/// How much of it there may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests to the store at once.
    pub requests: usize,
    /// Clusters.
    pub clusters: usize,
}

impl Limits {
    /// What suits a reader: enough requests to hide 20 ms each, and no more clusters than its cache holds.
    pub fn of(reader: &DiskReader) -> Limits {
        Limits { requests: 24, clusters: reader.frame_bytes() / 4 * QUARTERS / DiskReader::CLUSTER_WEIGHT }
    }
}

/// Neighbours on one disk.
struct Wish {
    nth: usize,
    clusters: Vec<u64>,
}

#[derive(Default)]
struct Shared {
    stopped: AtomicBool,
    opened: AtomicUsize,
}

/// It goes on in the background until all is fetched, or this is dropped.
pub struct Prefetch {
    shared: Arc<Shared>,
    /// Closed when the last thread has ended.
    ended: Receiver<()>,
}

/// What is to be fetched, in about the order in which it was read, and of no more than `most` clusters.
fn wishes(point: &Point, reads: &BootReads, most: usize) -> Vec<Wish> {
    let mut left = most;
    let mut all = Vec::new();
    for read in &reads.disks {
        // A disk that is gone or has another name now: nothing is known of what will be read.
        let Some(nth) = point.manifest.disks.iter().position(|disk| disk.name == read.disk) else { continue };
        let clusters = &read.clusters[..read.clusters.len().min(left)];
        left -= clusters.len();
        for (at, window) in clusters.chunks(WINDOW).enumerate() {
            let mut window = window.to_vec();
            window.sort_unstable();
            let near = window.chunk_by(|a, b| b - a <= APART).flat_map(|near| near.chunks(TOGETHER));
            all.extend(near.map(|near| (at, Wish { nth, clusters: near.to_vec() })));
        }
    }
    // Disks are read beside one another.
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, wish)| wish).collect()
}

impl Prefetch {
    /// Begins.
    pub fn start(
        reader: &Arc<DiskReader>,
        point: &Arc<Point>,
        reads: &BootReads,
        limits: Limits,
    ) -> io::Result<Prefetch> {
        let wishes = wishes(point, reads, limits.clusters);
        let threads = limits.requests.clamp(1, wishes.len().max(1));
        let (order, orders) = bounded(wishes.len().max(1));
        for wish in wishes {
            // There is room for all of them.
            let _ = order.try_send(wish);
        }
        drop(order);
        let (ending, ended) = bounded(0);
        // Those that have begun end with this, should a thread not start.
        let prefetch = Prefetch { shared: Arc::default(), ended };
        for _ in 0..threads {
            let worker = Worker {
                reader: reader.clone(),
                point: point.clone(),
                orders: orders.clone(),
                shared: prefetch.shared.clone(),
                _ending: ending.clone(),
            };
            thread::Builder::new().name("prefetch".into()).stack_size(STACK).spawn(move || worker.run())?;
        }
        Ok(prefetch)
    }

    /// Clusters that were opened so far; those that were at hand already don't count.
    pub fn opened(&self) -> usize {
        self.shared.opened.load(Ordering::Relaxed)
    }

    /// Waits until all is fetched.
    pub fn wait(&self) {
        // Nothing is ever sent.
        let _ = self.ended.recv();
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // Its threads are not waited for: one may hang in a store that does not answer.
        self.shared.stopped.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    reader: Arc<DiskReader>,
    point: Arc<Point>,
    orders: Receiver<Wish>,
    shared: Arc<Shared>,
    _ending: Sender<()>,
}

impl Worker {
    fn run(self) {
        // The guest's own reads go first where cores are short. On Linux this is about the calling thread alone.
        let _ = rustix::process::setpriority_process(None, NICE);
        let mut tools = Tools::new();
        for Wish { nth, clusters } in &self.orders {
            if self.shared.stopped.load(Ordering::Relaxed) {
                return;
            }
            let Some(disk) = self.point.manifest.disks.get(nth) else { continue };
            // What is damaged, or can't be read now, is told when it is really wanted.
            let opened = self.reader.fetch(disk, &clusters, &mut tools);
            self.shared.opened.fetch_add(opened, Ordering::Relaxed);
        }
    }
}
