//! One connection to the target: who sends, and who hands on what comes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use reseal_proto::wire::{Data, FromSource, FromTarget, Offer, Task as WireTask};
use reseal_site::RemoteError;

use crate::BackupError;
use crate::judge::ClusterHash;
use crate::link::{Ended, Inbox, Outbox};
use crate::plan::{Task, Unit};

/// Messages that wait to be asked for: the protocol has one at most.
const ANSWERS: usize = 4;

/// Why nobody need wait any more.
#[derive(Debug, Clone)]
enum End {
    /// What was said of this disk's changes is wrong.
    Distrusted(String),
    Remote(RemoteError),
}

impl From<End> for BackupError {
    fn from(end: End) -> BackupError {
        match end {
            End::Distrusted(why) => BackupError::Distrusted { why },
            End::Remote(error) => error.into(),
        }
    }
}

/// What workers wait for.
#[derive(Default)]
struct Waiting {
    /// By the number of their offer.
    needs: HashMap<u64, Sender<u16>>,
    end: Option<End>,
}

/// A connection.
pub(super) struct Connection {
    peer: String,
    outbox: Outbox,
    waiting: Arc<Mutex<Waiting>>,
    answers: Receiver<FromTarget>,
    /// Clusters that were sent, and their bytes as frames.
    pub(super) clusters: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// Hands on what comes, until nothing does.
fn dispatch(mut inbox: Inbox<FromTarget>, peer: &str, waiting: &Mutex<Waiting>, answers: &Sender<FromTarget>) {
    let unexpected = |what: &str| RemoteError::Unexpected { peer: peer.to_owned(), what: what.to_owned() };
    let error = loop {
        match inbox.next() {
            Ok(FromTarget::Need(need)) => {
                // One that was distrusted meanwhile waits for nothing.
                if let Some(worker) = waiting.lock().needs.remove(&need.sequence) {
                    let _ = worker.send(need.clusters);
                }
            }
            Ok(FromTarget::Distrusted(why)) => {
                let mut waiting = waiting.lock();
                waiting.needs.clear();
                waiting.end.get_or_insert(End::Distrusted(why.clone()));
                // Who waits for the end of the disk.
                let _ = answers.try_send(FromTarget::Distrusted(why));
            }
            Ok(FromTarget::Trouble(trouble)) => break RemoteError::Trouble { peer: peer.to_owned(), trouble },
            Ok(answer) => {
                if answers.try_send(answer).is_err() {
                    break unexpected("it answers more than was asked");
                }
            }
            Err(Ended::Broken(source)) => break RemoteError::Broken { peer: peer.to_owned(), source },
            Err(Ended::Told(_)) => break unexpected("stopped"),
            Err(Ended::Lost(e)) => {
                let alert = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
                let (peer, why) = (peer.to_owned(), e.to_string());
                break match alert {
                    Some(rustls::Error::AlertReceived(_)) => RemoteError::Refused { peer, why },
                    _ => RemoteError::Lost { peer, why },
                };
            }
        }
    };
    let mut waiting = waiting.lock();
    waiting.needs.clear();
    waiting.end = Some(End::Remote(error));
}

impl Connection {
    pub(super) fn new(peer: String, inbox: Inbox<FromTarget>, outbox: Outbox) -> Connection {
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (answer, answers) = bounded(ANSWERS);
        {
            // It ends with the connection.
            let (peer, waiting) = (peer.clone(), waiting.clone());
            std::thread::spawn(move || dispatch(inbox, &peer, &waiting, &answer));
        }
        let (clusters, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Connection { peer, outbox, waiting, answers, clusters, bytes }
    }

    /// Why it ended, or what was distrusted.
    fn error(&self) -> BackupError {
        let lost = || End::Remote(RemoteError::Lost { peer: self.peer.clone(), why: "it ended".into() });
        self.waiting.lock().end.clone().unwrap_or_else(lost).into()
    }

    pub(super) fn send(&self, message: &FromSource) -> Result<(), BackupError> {
        self.outbox.blocking_send(message.encode()).map_err(|_| {
            // Who reads knows why, and learns it at the same moment or soon.
            while self.answers.recv().is_ok() {}
            self.error()
        })
    }

    /// The answer to what was asked.
    pub(super) fn answer(&self) -> Result<FromTarget, BackupError> {
        match self.answers.recv() {
            Ok(FromTarget::Distrusted(why)) => Err(BackupError::Distrusted { why }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.error()),
        }
    }

    pub(super) fn unexpected(&self, answer: &FromTarget) -> BackupError {
        let what = match answer {
            FromTarget::Distrusted(_) => "it distrusts what nobody said",
            _ => "it answers something else than was asked",
        };
        RemoteError::Unexpected { peer: self.peer.clone(), what: what.into() }.into()
    }

    /// Before a disk is begun: what was distrusted of the one before is over.
    pub(super) fn forget_distrust(&self) {
        let mut waiting = self.waiting.lock();
        if matches!(waiting.end, Some(End::Distrusted(_))) {
            waiting.end = None;
        }
        drop(waiting);
        while let Ok(FromTarget::Distrusted(_)) = self.answers.try_recv() {}
    }

    /// Tells of a unit that needs no reading.
    pub(super) fn tell(&self, unit: Unit) -> Result<(), BackupError> {
        self.send(&FromSource::Offer(offer(unit, &[])))
    }

    /// Offers a unit, and waits for what is needed of it.
    fn offer(&self, unit: Unit, hashes: &[ClusterHash]) -> Result<u16, BackupError> {
        let (need, needed) = bounded(1);
        {
            let mut waiting = self.waiting.lock();
            if let Some(end) = waiting.end.clone() {
                return Err(end.into());
            }
            waiting.needs.insert(unit.sequence, need);
        }
        self.send(&FromSource::Offer(offer(unit, hashes)))?;
        let needed = needed.recv().map_err(|_| self.error())?;
        let is_there = |at: usize| hashes.get(at).is_some_and(Option::is_some);
        if (0..16).any(|at| needed >> at & 1 == 1 && !is_there(at)) {
            let what = "it needs clusters that were not offered".into();
            return Err(RemoteError::Unexpected { peer: self.peer.clone(), what }.into());
        }
        Ok(needed)
    }
}

fn offer(unit: Unit, hashes: &[ClusterHash]) -> Offer {
    let task = match unit.task {
        Task::Read => WireTask::Read,
        Task::Check => WireTask::Check,
        Task::Keep => WireTask::Keep,
        Task::Clear => WireTask::Clear,
    };
    let clusters = hashes.iter().map(|hash| hash.map(|hash| *hash.as_bytes())).collect();
    Offer { sequence: unit.sequence, first: unit.first, count: unit.count, task, clusters }
}

/// A worker's way to ask.
#[derive(Clone, Copy)]
pub(crate) struct Asker<'a>(pub(super) &'a Connection);

impl Asker<'_> {
    /// Which clusters of a unit are needed, the first in the lowest bit.
    pub(crate) fn offer(&self, unit: Unit, hashes: &[ClusterHash]) -> Result<u16, BackupError> {
        self.0.offer(unit, hashes)
    }

    /// Sends those.
    pub(crate) fn send(&self, unit: Unit, frames: Vec<Vec<u8>>) -> Result<(), BackupError> {
        self.0.clusters.fetch_add(frames.len() as u64, Ordering::Relaxed);
        self.0.bytes.fetch_add(frames.iter().map(|frames| frames.len() as u64).sum(), Ordering::Relaxed);
        self.0.send(&FromSource::Data(Data { sequence: unit.sequence, frames }))
    }
}
