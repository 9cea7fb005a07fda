//! The disks of another site: which are known here, and which have connections.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_format::names::{DiskName, VmName};
use reseal_nbd::Export;
use reseal_site::SiteReader;
use reseal_vault::cache::Cache;
use reseal_vault::{Class, VaultError, Wait};

use super::DiskOf;
use super::block::DiskKey;
use super::opening::Opening;
use super::remote::{RemoteDisk, Site};

/// Disks with connections, at most: whoever reads a thousand must not hold a thousand.
const MOST_OPEN: usize = 24;
/// Disks whose extents are remembered.
const MOST_KNOWN: usize = 64;
/// How long connections that nobody uses are kept.
const IDLE: Duration = Duration::from_secs(15);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How far sequential readers are read ahead of: it fills a gigabit line with 100 ms.
const WINDOW: usize = 16 << 20;
/// The part of its time that a request is given up before the end of, so that its reader is told why: the deadline of whoever
/// waits has no reason to give.
const HEAD_START: u32 = 20;

/// Opens disks at another site.
pub trait Opens: Send + Sync {
    /// Opens one.
    fn open(&self, vm: &VmName, number: u32, disk: &DiskName) -> Result<Export, VaultError>;
}

impl Opens for Arc<SiteReader> {
    fn open(&self, vm: &VmName, number: u32, disk: &DiskName) -> Result<Export, VaultError> {
        self.disk(vm, number, disk)
    }
}

/// Reads the disks of one site.
pub struct There {
    site: Arc<Site>,
    disks: Mutex<HashMap<DiskKey, Arc<RemoteDisk>>>,
    window: usize,
}

impl There {
    /// Those that `opens` opens. At most about so many bytes are kept, and nobody waits longer than `limit`. `place` is the
    /// site's name in messages.
    pub fn new(
        opens: impl Opens + 'static,
        place: String,
        cache_bytes: usize,
        limit: Duration,
    ) -> std::io::Result<Arc<There>> {
        let site = Site {
            opens: Box::new(opens),
            place,
            limit: limit - limit / HEAD_START,
            blocks: Cache::new(cache_bytes),
            flying: AtomicUsize::new(0),
            pumps: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        };
        let window = WINDOW.min(cache_bytes / 4);
        let there = Arc::new(There { site: Arc::new(site), disks: Mutex::default(), window });
        let watched = Arc::downgrade(&there);
        thread::Builder::new().name("idle".into()).spawn(move || close_idle(&watched))?;
        Ok(there)
    }

    fn disk(&self, of: DiskOf<'_>) -> Arc<RemoteDisk> {
        let key = DiskKey { point: of.manifest.point_id, nth: of.nth };
        let mut disks = self.disks.lock();
        if let Some(disk) = disks.get(&key) {
            return disk.clone();
        }
        if disks.len() >= MOST_KNOWN
            && let Some(oldest) = disks.iter().min_by_key(|(_, disk)| disk.line.lock().used).map(|(key, _)| *key)
            && let Some(oldest) = disks.remove(&oldest)
        {
            close(&oldest);
        }
        let place = (of.manifest.vm.clone(), of.manifest.number);
        let disk = RemoteDisk::new(self.site.clone(), key, place, of.disk.name.clone(), of.disk.length);
        let disk = Arc::new(disk);
        disks.insert(key, disk.clone());
        disk
    }

    /// The line to a disk, which is opened if it is not.
    fn line(&self, disk: &Arc<RemoteDisk>) -> Result<Arc<Opening>, VaultError> {
        if let Some(opening) = open_line(disk) {
            return Ok(opening);
        }
        self.make_room();
        let mut line = disk.line.lock();
        if let Some(opening) = line.opening.as_ref().filter(|opening| !opening.is_over()) {
            return Ok(opening.clone());
        }
        let failed = |e| VaultError::Elsewhere { message: format!("can't start a thread: {e}"), class: Class::Failed };
        let opening = Opening::begin(disk).map_err(failed)?;
        line.opening = Some(opening.clone());
        Ok(opening)
    }

    /// Closes the lines that were used longest ago, those that nobody waits for first, until one more may be opened.
    fn make_room(&self) {
        let mut open: Vec<_> = {
            let disks = self.disks.lock();
            let with_line = disks.values().filter_map(|disk| {
                let line = disk.line.lock();
                let opening = line.opening.as_ref().filter(|opening| !opening.is_over())?;
                Some((opening.is_busy(), line.used, disk.clone()))
            });
            with_line.collect()
        };
        open.sort_by_key(|(is_busy, used, _)| (*is_busy, *used));
        let many = (open.len() + 1).saturating_sub(MOST_OPEN);
        open.iter().take(many).for_each(|(_, _, disk)| close(disk));
    }

    pub(super) fn read_on(
        &self,
        of: DiskOf<'_>,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        wait: Wait,
    ) -> Result<(), VaultError> {
        let disk = self.disk(of);
        disk.read_on(offset, out, done, wait, &|| self.line(&disk))
    }

    /// Asks for clusters, unless more is on its way than is worth it.
    pub(super) fn prepare(&self, of: DiskOf<'_>, clusters: Range<u64>) -> Result<(), VaultError> {
        if self.under_way() > self.window * 2 {
            return Ok(());
        }
        let disk = self.disk(of);
        disk.prepare(clusters, &|| self.line(&disk))
    }

    pub(super) fn next_data(&self, of: DiskOf<'_>, offset: u64) -> Result<Option<u64>, VaultError> {
        let disk = self.disk(of);
        disk.next(offset, false, &|| self.line(&disk))
    }

    pub(super) fn next_hole(&self, of: DiskOf<'_>, offset: u64) -> Result<u64, VaultError> {
        let disk = self.disk(of);
        Ok(disk.next(offset, true, &|| self.line(&disk))?.unwrap_or(disk.length))
    }

    pub(super) fn window(&self) -> u64 {
        self.window as u64
    }

    /// Connections that run.
    pub fn connections(&self) -> usize {
        self.site.pumps.load(Ordering::Relaxed)
    }

    /// Bytes that were asked for and have not come.
    pub fn under_way(&self) -> usize {
        self.site.flying.load(Ordering::Relaxed)
    }

    /// Whoever waits waits no longer.
    pub(super) fn stop(&self) {
        self.site.stopped.store(true, Ordering::Relaxed);
        for disk in self.disks.lock().values() {
            if let Some(opening) = disk.line.lock().opening.take() {
                opening.stop();
            }
        }
    }
}

impl Drop for There {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_line(disk: &RemoteDisk) -> Option<Arc<Opening>> {
    let mut line = disk.line.lock();
    line.used = Instant::now();
    line.opening.clone().filter(|opening| !opening.is_over())
}

fn close(disk: &RemoteDisk) {
    if let Some(opening) = disk.line.lock().opening.take() {
        opening.close();
    }
}

fn close_idle(there: &Weak<There>) {
    while let Some(there) = there.upgrade() {
        for disk in there.disks.lock().values() {
            let mut line = disk.line.lock();
            let is_idle = line.used.elapsed() > IDLE;
            let unused = line.opening.take_if(|opening| opening.is_over() || (is_idle && !opening.is_busy()));
            drop(line);
            if let Some(opening) = unused {
                opening.close();
            }
        }
        drop(there);
        thread::sleep(LOOK);
    }
}
