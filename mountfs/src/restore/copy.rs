//! Copying: each worker takes the next stretch of data, has it read and writes it where it belongs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, is_zero};
use reseal_vault::{VaultError, Wait};

use super::plan::{Plan, PlannedDisk};
use super::raw::RawTarget;
use super::{RestoreError, image};
use crate::disks::{DiskOf, Disks};
use reseal_vault::disk::Tools;
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
    pub(super) fn go_on(&self) -> Result<(), RestoreError> {
        if self.stop.load(Ordering::Relaxed) { Err(RestoreError::Interrupted) } else { Ok(()) }
    }
}

/// Restores the disks of a plan, one after the other, each with as many workers as are of use. What was made for a disk that
/// fails is removed.
pub fn restore(disks: &Disks, plan: Plan<'_>, watch: &Watch<'_>) -> Result<(), RestoreError> {
    plan.disks.into_iter().try_for_each(|planned| match planned.target.is_plain() {
        true => restore_disk(disks, &planned, watch),
        false => image::restore(disks, &planned, watch),
    })
}

fn restore_disk(disks: &Disks, planned: &PlannedDisk<'_>, watch: &Watch<'_>) -> Result<(), RestoreError> {
    let source = Source { disks, of: planned.disk, watch };
    let target = RawTarget::open(planned.place, planned.target.path(), source.length())?;
    if target.needs_zeros() {
        zero_holes(source, &target)?;
    }
    let stretches = Mutex::new(Stretches { source, at: 0, end: 0 });
    let failed = AtomicBool::new(false);
    let run = || {
        let copy = || -> Result<(), RestoreError> {
            let mut worker = Worker { source, target: &target, tools: Tools::new(), buffer: Buffer::default() };
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
    thread::scope(|scope| {
        let runs: Vec<_> = (0..disks.readers()).map(|_| scope.spawn(run)).collect();
        let results: Vec<_> = runs.into_iter().map(|run| run.join().expect("a copier does not panic")).collect();
        results.into_iter().collect::<Result<Vec<()>, _>>()
    })?;
    target.finish()
}

/// A disk that is read.
#[derive(Clone, Copy)]
struct Source<'a> {
    disks: &'a Disks,
    of: DiskOf<'a>,
    watch: &'a Watch<'a>,
}

impl Source<'_> {
    fn length(&self) -> u64 {
        self.of.disk().length
    }

    fn read(&self, offset: u64, out: &mut [u8], tools: &mut Tools) -> Result<(), RestoreError> {
        self.disks.read_on(self.of, offset, out, &mut 0, Wait::May, tools).map_err(|e| self.failed(e))
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, RestoreError> {
        self.disks.next_data(self.of, offset).map_err(|e| self.failed(e))
    }

    fn next_hole(&self, offset: u64) -> Result<u64, RestoreError> {
        self.disks.next_hole(self.of, offset).map_err(|e| self.failed(e))
    }

    /// What ended the reading; what was ended on purpose is nobody's fault.
    fn failed(&self, source: VaultError) -> RestoreError {
        let disk = self.of.disk().name.clone();
        self.watch.go_on().err().unwrap_or(RestoreError::Vault { disk, source })
    }
}

fn zero_holes(source: Source<'_>, target: &RawTarget) -> Result<(), RestoreError> {
    let mut at = 0;
    while at < source.length() {
        let hole = source.next_hole(at)?;
        let data = source.next_data(hole)?.unwrap_or(source.length());
        target.zero(hole, data, &|| source.watch.go_on())?;
        at = data.max(hole);
    }
    Ok(())
}

/// The stretches of a disk that are not holes, in their order.
struct Stretches<'a> {
    source: Source<'a>,
    at: u64,
    /// End of the data that `at` is in.
    end: u64,
}

impl Stretches<'_> {
    fn next(&mut self) -> Result<Option<(u64, u64)>, RestoreError> {
        if self.at >= self.end {
            if self.at >= self.source.length() {
                return Ok(None);
            }
            let Some(data) = self.source.next_data(self.at)? else { return Ok(None) };
            self.at = data;
            self.end = self.source.next_hole(data)?;
        }
        let from = self.at;
        self.at = (from - from % STRETCH + STRETCH).min(self.end);
        Ok(Some((from, self.at)))
    }
}

struct Worker<'a> {
    source: Source<'a>,
    target: &'a RawTarget,
    tools: Tools,
    buffer: Buffer,
}

impl Worker<'_> {
    fn copy(&mut self, from: u64, to: u64) -> Result<(), RestoreError> {
        let length = usize::try_from(to - from).unwrap_or(0);
        let bytes = self.buffer.take(length);
        self.source.read(from, bytes, &mut self.tools)?;
        match self.target.needs_zeros() {
            true => self.target.write(from, bytes)?,
            false => write_sparse(self.target, from, bytes)?,
        }
        self.target.start_writing_back(from, length);
        Ok(())
    }
}

/// Writes all but the zeros.
fn write_sparse(target: &RawTarget, offset: u64, bytes: &[u8]) -> Result<(), RestoreError> {
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
