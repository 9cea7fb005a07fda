//! Copying: each core takes the next stretch of data, opens its clusters and writes it where it belongs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, is_zero};
use reseal_format::manifest::Disk;
use reseal_vault::{VaultError, Wait};

use super::RestoreError;
use super::plan::{Plan, PlannedDisk};
use super::target::OpenTarget;
use reseal_vault::disk::{DiskReader, Tools};
use reseal_vault::wipe::Buffer;

/// How much is written at once: large enough for few system calls, small enough to stay in a core's own cache.
const STRETCH: u64 = 16 * CLUSTER_U64;
/// Zeros in a cluster of data that are worth a hole of their own: fewer would cost more calls than blocks.
const HOLE: usize = CLUSTER / 4;

/// What watches a restore.
pub struct Watch<'a> {
    /// Is told of so many more bytes of the disks.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Ends the restore when it becomes true.
    pub stop: &'a AtomicBool,
}

impl Watch<'_> {
    fn go_on(&self) -> Result<(), RestoreError> {
        if self.stop.load(Ordering::Relaxed) { Err(RestoreError::Interrupted) } else { Ok(()) }
    }
}

/// Restores the disks of a plan, one after the other, each with all cores. What was made for a disk that fails is removed.
pub fn restore(reader: &DiskReader, plan: Plan<'_>, watch: &Watch<'_>) -> Result<(), RestoreError> {
    plan.disks.into_iter().try_for_each(|planned| restore_disk(reader, &planned, watch))
}

fn restore_disk(reader: &DiskReader, planned: &PlannedDisk<'_>, watch: &Watch<'_>) -> Result<(), RestoreError> {
    let disk = planned.disk;
    let target = planned.target.open(&planned.path, disk.length)?;
    if target.needs_zeros() {
        zero_holes(reader, disk, &target, watch)?;
    }
    let stretches = Mutex::new(Stretches { reader, disk, at: 0, end: 0 });
    let failed = AtomicBool::new(false);
    let run = || {
        let copy = || -> Result<(), RestoreError> {
            let mut worker = Worker { reader, disk, target: &target, tools: Tools::new(), buffer: Buffer::default() };
            while !failed.load(Ordering::Relaxed) {
                watch.go_on()?;
                let Some((from, to)) = stretches.lock().next()? else { break };
                worker.copy(from, to)?;
                (watch.progress)(to - from);
            }
            Ok(())
        };
        // One that fails stops the others.
        copy().inspect_err(|_| failed.store(true, Ordering::Relaxed))
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let runs: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        let results: Vec<_> = runs.into_iter().map(|run| run.join().expect("a copier does not panic")).collect();
        results.into_iter().collect::<Result<Vec<()>, _>>()
    })?;
    target.finish()
}

fn of_disk(disk: &Disk) -> impl Fn(VaultError) -> RestoreError {
    |source| RestoreError::Vault { disk: disk.name.clone(), source }
}

fn zero_holes(reader: &DiskReader, disk: &Disk, target: &OpenTarget, watch: &Watch<'_>) -> Result<(), RestoreError> {
    let mut at = 0;
    while at < disk.length {
        let hole = reader.next_hole(disk, at).map_err(of_disk(disk))?;
        let data = reader.next_data(disk, hole).map_err(of_disk(disk))?.unwrap_or(disk.length);
        target.zero(hole, data, &|| watch.go_on())?;
        at = data.max(hole);
    }
    Ok(())
}

/// The stretches of a disk that are not holes, in their order.
struct Stretches<'a> {
    reader: &'a DiskReader,
    disk: &'a Disk,
    at: u64,
    /// End of the data that `at` is in.
    end: u64,
}

impl Stretches<'_> {
    fn next(&mut self) -> Result<Option<(u64, u64)>, RestoreError> {
        if self.at >= self.end {
            if self.at >= self.disk.length {
                return Ok(None);
            }
            let Some(data) = self.reader.next_data(self.disk, self.at).map_err(of_disk(self.disk))? else {
                return Ok(None);
            };
            self.at = data;
            self.end = self.reader.next_hole(self.disk, data).map_err(of_disk(self.disk))?;
        }
        let from = self.at;
        self.at = (from - from % STRETCH + STRETCH).min(self.end);
        Ok(Some((from, self.at)))
    }
}

struct Worker<'a> {
    reader: &'a DiskReader,
    disk: &'a Disk,
    target: &'a OpenTarget,
    tools: Tools,
    buffer: Buffer,
}

impl Worker<'_> {
    fn copy(&mut self, from: u64, to: u64) -> Result<(), RestoreError> {
        let length = usize::try_from(to - from).unwrap_or(0);
        let bytes = self.buffer.take(length);
        self.reader.read(self.disk, from, bytes, Wait::May, &mut self.tools).map_err(of_disk(self.disk))?;
        match self.target.needs_zeros() {
            true => self.target.write(from, bytes)?,
            false => write_sparse(self.target, from, bytes)?,
        }
        self.target.start_writing_back(from, length);
        Ok(())
    }
}

/// Writes all but the zeros.
fn write_sparse(target: &OpenTarget, offset: u64, bytes: &[u8]) -> Result<(), RestoreError> {
    let mut start = None;
    for (nth, block) in bytes.chunks(HOLE).enumerate() {
        let at = nth * HOLE;
        match (is_zero(block), start) {
            (true, Some(from)) => {
                target.write(offset + from as u64, &bytes[from..at])?;
                start = None;
            }
            (false, None) => start = Some(at),
            (true, None) | (false, Some(_)) => {}
        }
    }
    match start {
        Some(from) => target.write(offset + from as u64, &bytes[from..]),
        None => Ok(()),
    }
}
