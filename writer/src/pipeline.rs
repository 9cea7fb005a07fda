//! The stages of a backup of one disk, joined by bounded channels: plan → workers → assembler.
//!
//! At most `IN_FLIGHT` units are anywhere between plan and index, so memory does not depend on the disk. A stage that
//! fails sends its error to the assembler; when that returns, the channels close and every thread ends.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam_channel::{Receiver, Sender, bounded};
use reseal_format::manifest::{Disk, Root};

use crate::BackupError;
use crate::assemble::{Assembler, InOrder};
use crate::index_writer::IndexWriter;
use crate::known::{Known, ParentDisk};
use crate::plan::{Plan, Unit};
use crate::source::Source;
use crate::worker::{Done, Encoding, Worker};

/// Units of 1 MiB between plan and index for each worker: enough that none waits for a slow neighbour.
const IN_FLIGHT: usize = 12;
/// Units at once however many cores there are: memory is bounded.
const MAX_IN_FLIGHT: usize = 128;

/// How a disk is backed up.
pub(crate) struct Job<'a> {
    pub source: &'a Source,
    pub known: &'a Known,
    pub parent: Option<&'a Disk>,
    pub encoding: Encoding,
    pub workers: usize,
    /// Told of bytes read.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Job<'_> {
    fn plan(&self, units: &Sender<Unit>, tickets: &Sender<()>, results: &Sender<Result<Done, BackupError>>) {
        let mut plan = Plan::new(self.source);
        loop {
            match plan.next_unit() {
                Ok(Some(unit)) => {
                    if tickets.send(()).is_err() || units.send(unit).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(e) => return drop(results.send(Err(e))),
            }
        }
    }

    fn work(&self, units: &Receiver<Unit>, results: &Sender<Result<Done, BackupError>>) {
        let parent = ParentDisk::new(self.known, self.parent);
        let mut worker = match Worker::new(self.source, self.known, parent, self.encoding) {
            Ok(worker) => worker,
            Err(e) => return drop(results.send(Err(e))),
        };
        for unit in units {
            // A panic must not leave the others waiting for this unit.
            let result = catch_unwind(AssertUnwindSafe(|| worker.work(unit))).unwrap_or(Err(BackupError::Thread));
            let failed = result.is_err();
            if results.send(result).is_err() || failed {
                return;
            }
        }
    }

    /// Reads the disk and stores what is new of it; the root of its index, and how many clusters that maps.
    pub(crate) fn run(&self, assembler: &mut Assembler<'_>) -> Result<(Option<Root>, u64), BackupError> {
        std::thread::scope(|scope| {
            let in_flight = (IN_FLIGHT * self.workers).min(MAX_IN_FLIGHT);
            let (ticket, tickets) = bounded(in_flight);
            let (unit, units) = bounded(in_flight);
            let (result, results) = bounded(in_flight);
            for _ in 0..self.workers {
                let (units, result) = (units.clone(), result.clone());
                scope.spawn(move || self.work(&units, &result));
            }
            // Only threads hold these from here on, so that the loop below ends when they have.
            drop(units);
            scope.spawn(move || self.plan(&unit, &ticket, &result));
            let index = IndexWriter::new(self.known, self.parent, self.source.length());
            let mut in_order = InOrder::new(assembler, index);
            for result in results {
                let done = result?;
                (self.progress)(done.read);
                for _ in 0..in_order.take(done)? {
                    let _ = tickets.recv();
                }
            }
            let (assembler, index) = in_order.finish()?;
            let (finisher, nodes) = assembler.nodes();
            index.finish(nodes, finisher)
        })
    }
}
