//! The stages of a backup of one disk, joined by bounded channels: plan → (connections →) workers → assembler.
//!
//! At most `IN_FLIGHT` units are anywhere between plan and index, so memory does not depend on the disk. A stage that
//! fails sends its error to the assembler; when that returns, the channels close and every thread ends.
//!
//! A file's units are read by the workers. Those of an NBD export are read by its connections, into buffers that go
//! around, so that the many requests which are under way need no worker to wait for them.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use reseal_format::geometry::CLUSTER_U64;

use crate::BackupError;
use crate::assemble::InOrder;
use crate::plan::{Plan, Sample, Task, Unit};
use crate::source::{Extents, Marked, Source, Still, StillExtents};
use crate::throttle::Throttle;
use crate::worker::{Buffer, Done, Encoding, Inbox, Right, Worker};
use reseal_nbd::{Read, Request};

/// Units of 1 MiB between plan and index for each worker: enough that none waits for a slow neighbour.
const IN_FLIGHT: usize = 12;
/// Units at once however many cores there are: memory is bounded.
const MAX_IN_FLIGHT: usize = 128;

/// How a disk is backed up.
pub(crate) struct Job<'a> {
    pub source: &'a Source,
    /// What changed since that, if somebody says so.
    pub told: Option<&'a Told>,
    pub encoding: Encoding,
    pub workers: usize,
    pub throttle: Option<&'a Throttle>,
    /// Told of bytes read.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// What changed, as somebody says.
pub(crate) struct Told {
    /// Areas, ascending and disjoint; `None` if the source tells with its extents.
    pub areas: Option<Vec<Range<u64>>>,
    /// Areas that are read whatever is said.
    pub always: Vec<Range<u64>>,
    /// What is read of the rest, to see whether it is true.
    pub sample: Option<Sample>,
}

/// Where the plan's units go.
enum Outbox {
    Workers(Sender<Unit>),
    Connections { requests: Sender<Request<Unit>>, pool: Receiver<Buffer> },
}

impl Outbox {
    /// Whether somebody is left to take it.
    fn send(&self, unit: Unit, length: u64) -> bool {
        match self {
            Outbox::Workers(units) => units.send(unit).is_ok(),
            Outbox::Connections { requests, pool } => {
                let Ok(mut buffer) = pool.recv() else { return false };
                buffer.resize(unit.length(length), 0);
                let offset = unit.first * CLUSTER_U64;
                requests.send(Request::Read(Read { offset, buffer, tag: unit })).is_ok()
            }
        }
    }
}

/// Tells a thread that sleeps that the job is over.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Counts a thread that has ended, however it did.
struct CountDown<'a>(&'a AtomicUsize);

impl Drop for CountDown<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All of any disk.
static WHOLE: Range<u64> = 0..u64::MAX;

impl Job<'_> {
    /// The disk's extents as they are to be read.
    fn extents<'s>(&'s self, outbox: &Outbox, serving: &'s AtomicUsize) -> Box<dyn Extents + 's> {
        let extents: Box<dyn Extents + 's> = match (self.source, outbox) {
            (Source::Nbd(nbd), Outbox::Connections { requests, .. }) => {
                Box::new(nbd.extents(requests.clone(), serving))
            }
            (Source::Nbd(_), Outbox::Workers(_)) => unreachable!("an export is read by its connections"),
            (Source::File(file), _) => Box::new(StillExtents(file)),
            (Source::Point(point), _) => Box::new(StillExtents(&**point)),
        };
        match self.told {
            // Whatever a bitmap of the export says: nobody believes it.
            None => Box::new(Marked::also(extents, std::slice::from_ref(&WHOLE))),
            Some(Told { areas: None, always, .. }) => Box::new(Marked::also(extents, always)),
            Some(Told { areas: Some(areas), always, .. }) => {
                Box::new(Marked::also(Marked::only(extents, areas), always))
            }
        }
    }

    fn plan(
        &self,
        outbox: &Outbox,
        tickets: &Sender<()>,
        results: &Sender<Result<Done, BackupError>>,
        (stop, serving): (&AtomicBool, &AtomicUsize),
    ) {
        let length = self.source.length();
        let sample = self.told.and_then(|told| told.sample);
        let mut plan = Plan::new(self.extents(outbox, serving), length, self.told.is_some(), sample);
        loop {
            let unit = match plan.next_unit() {
                Ok(Some(unit)) => unit,
                Ok(None) => return,
                Err(e) => return drop(results.send(Err(e))),
            };
            if tickets.send(()).is_err() {
                return;
            }
            let sent = match unit.task {
                Task::Read | Task::Check => {
                    if let Some(throttle) = self.throttle {
                        throttle.take(unit.length(length) as u64, stop);
                    }
                    outbox.send(unit, length)
                }
                Task::Keep | Task::Clear => results.send(Ok(Done { unit, read: 0, clusters: Vec::new() })).is_ok(),
            };
            if !sent {
                return;
            }
        }
    }

    fn work<'r>(&self, inbox: Inbox<'r>, right: Right<'r>, results: &Sender<Result<Done, BackupError>>) {
        let mut worker = match Worker::new(inbox, right, self.encoding) {
            Ok(worker) => worker,
            Err(e) => return drop(results.send(Err(e))),
        };
        loop {
            // A panic must not leave the others waiting for this unit.
            let result = catch_unwind(AssertUnwindSafe(|| worker.work()));
            let Some(result) = result.unwrap_or(Some(Err(BackupError::Thread))) else { return };
            let failed = result.is_err();
            if results.send(result).is_err() || failed {
                return;
            }
        }
    }

    /// Units between plan and index, where all is done in this process.
    pub(crate) fn in_flight(&self) -> usize {
        (IN_FLIGHT * self.workers).min(MAX_IN_FLIGHT)
    }

    /// Reads the disk; how many units it was. At most `in_flight` are anywhere at once. There are as many workers as `rights`, each
    /// of which is what one has of the other side of ┃, and `add` takes what they have found, in the order of the disk. After an error that is neither distrust nor another site's an export is of no
    /// more use.
    pub(crate) fn run<'r>(
        &self,
        rights: Vec<Right<'r>>,
        in_flight: usize,
        add: &mut dyn FnMut(Done) -> Result<(), BackupError>,
    ) -> Result<u64, BackupError> {
        let (stop, serving) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            let (stop, serving) = (&stop, &serving);
            let abandon = |e: BackupError| {
                // Whoever waits for a silent server need not wait on.
                let goes_on = matches!(e, BackupError::Distrusted { .. } | BackupError::Remote(_));
                if let (Source::Nbd(nbd), false) = (self.source, goes_on) {
                    nbd.export().stop();
                }
                e
            };
            let (ticket, tickets) = bounded(in_flight);
            let (result, results) = bounded(in_flight);
            let still: Option<&dyn Still> = match self.source {
                Source::File(file) => Some(file),
                Source::Point(point) => Some(&**point),
                Source::Nbd(_) => None,
            };
            let outbox = match (self.source, still) {
                (_, Some(still)) => {
                    let (unit, units) = bounded(in_flight);
                    for right in rights {
                        let (inbox, result) = (Inbox::Still(units.clone(), still), result.clone());
                        scope.spawn(move || self.work(inbox, right, &result));
                    }
                    Outbox::Workers(unit)
                }
                (Source::File(_) | Source::Point(_), None) => unreachable!("they lie still"),
                (Source::Nbd(nbd), None) => {
                    let (requests, requested) = bounded(in_flight);
                    let (filled, to_do) = bounded(in_flight);
                    let (empty, pool) = bounded(in_flight + rights.len());
                    for _ in 0..in_flight {
                        let _ = empty.send(Buffer::default());
                    }
                    for right in rights {
                        let (inbox, result) = (Inbox::Nbd(to_do.clone(), empty.clone()), result.clone());
                        scope.spawn(move || self.work(inbox, right, &result));
                    }
                    // A first try that was ended by distrust has stopped it.
                    nbd.export().restart();
                    for _ in 0..nbd.export().connections() {
                        let (requested, filled) = (requested.clone(), filled.clone());
                        serving.fetch_add(1, Ordering::Relaxed);
                        scope.spawn(move || {
                            let _serving = CountDown(serving);
                            nbd.export().pump(&requested, &filled);
                        });
                    }
                    Outbox::Connections { requests, pool }
                }
            };
            // Only threads hold channels from here on, so that the loop below ends when they have.
            scope.spawn(move || self.plan(&outbox, &ticket, &result, (stop, serving)));
            let length = self.source.length();
            let mut in_order = InOrder::default();
            let mut disconnected = None;
            let mut reached = 0;
            for result in results {
                let done = match result {
                    Ok(done) => done,
                    // Why the connection ended is on its way.
                    Err(e @ BackupError::Disconnected) => {
                        disconnected = Some(e);
                        continue;
                    }
                    Err(e) => return Err(abandon(e)),
                };
                let unit = done.unit;
                (self.progress)(match self.source {
                    Source::File(_) | Source::Point(_) => done.read,
                    // How much of an export will be read is not known before: what counts is how far on the disk it is.
                    Source::Nbd(_) => {
                        let end = ((unit.first + unit.count) * CLUSTER_U64).min(length);
                        let more = end.saturating_sub(reached);
                        reached += more;
                        more
                    }
                });
                for _ in 0..in_order.take(done, add).map_err(abandon)? {
                    let _ = tickets.recv();
                }
            }
            if let Some(e) = disconnected {
                return Err(e);
            }
            in_order.finish()
        })
    }
}
