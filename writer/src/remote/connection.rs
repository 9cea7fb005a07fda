//! One connection to the target: who sends, and who hands on what comes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use reseal_proto::wire::{FromSource, FromTarget, Offer, Task as WireTask};
use reseal_site::RemoteError;
use reseal_vault::wipe::wipe;

use super::asker::{Answered, Offered};
use crate::BackupError;
use crate::judge::ClusterHash;
use crate::link::{Ended, Inbox, Outbox};
use crate::plan::{Task, Unit};
use crate::worker::Buffer;

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

/// What waits for an answer.
#[derive(Default)]
struct Waiting {
    /// Units by the number of their offer, and where each goes with its answer.
    offered: HashMap<u64, (Offered, Sender<Answered>)>,
    end: Option<End>,
}

impl Waiting {
    /// Nothing more is answered.
    fn give_up(&mut self) {
        for (_, (offered, back)) in self.offered.drain() {
            let _ = back.send(Answered { offered, needed: None });
        }
    }
}

/// A connection.
pub(super) struct Connection {
    peer: String,
    pub(super) outbox: Outbox,
    waiting: Arc<Mutex<Waiting>>,
    answers: Receiver<FromTarget>,
    /// Where units of a file are read to; the one that was used last is taken first, for a cache may still have it.
    pub(super) buffers: Mutex<Vec<Buffer>>,
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
                if let Some((offered, back)) = waiting.lock().offered.remove(&need.sequence) {
                    let _ = back.send(Answered { offered, needed: Some(need.clusters) });
                }
            }
            Ok(FromTarget::Distrusted(why)) => {
                let mut waiting = waiting.lock();
                waiting.end.get_or_insert(End::Distrusted(why.clone()));
                waiting.give_up();
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
    waiting.end = Some(End::Remote(error));
    waiting.give_up();
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
        Connection { peer, outbox, waiting, answers, buffers: Mutex::default(), clusters, bytes }
    }

    /// Why it ended, or what was distrusted.
    pub(super) fn error(&self) -> BackupError {
        let lost = || End::Remote(RemoteError::Lost { peer: self.peer.clone(), why: "it ended".into() });
        self.waiting.lock().end.clone().unwrap_or_else(lost).into()
    }

    pub(super) fn send(&self, message: &FromSource) -> Result<(), BackupError> {
        self.send_encoded(message.encode())
    }

    pub(super) fn send_encoded(&self, message: Vec<u8>) -> Result<(), BackupError> {
        self.outbox.blocking_send(message).map_err(|_| {
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
        self.broken(what)
    }

    pub(super) fn broken(&self, what: &str) -> BackupError {
        RemoteError::Unexpected { peer: self.peer.clone(), what: what.to_owned() }.into()
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

    /// Offers a unit. It goes to `back` with the answer, or without one when none comes any more.
    pub(super) fn offer(
        &self,
        offered: Offered,
        hashes: &[ClusterHash],
        back: &Sender<Answered>,
    ) -> Result<(), BackupError> {
        let message = FromSource::Offer(offer(offered.unit, hashes));
        {
            let mut waiting = self.waiting.lock();
            if let Some(end) = waiting.end.clone() {
                return Err(end.into());
            }
            waiting.offered.insert(offered.unit.sequence, (offered, back.clone()));
        }
        self.send(&message)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // All at once: what wipes byte by byte would take as long as some 20 units.
        for buffer in self.buffers.get_mut() {
            let mut bytes = std::mem::take(&mut **buffer);
            bytes.resize(bytes.capacity(), 0);
            wipe(&mut bytes);
        }
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
