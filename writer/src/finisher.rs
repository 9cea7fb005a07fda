//! Full packs are made durable in the background, so that waiting for the disk does not stop the pipeline.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;
use reseal_format::ids::{BlobId, PackId};
use reseal_vault::{FinishingPack, Quota, VaultError};

use crate::BackupError;
use crate::known::Known;

/// Packs that wait, and threads that finish: enough to keep a disk syncing while the next packs fill, few enough that
/// their buffers and ids stay small.
const WAITING: usize = 2;
const THREADS: usize = 2;

/// A pack to be finished; `dedup` tells whether later clusters may be deduplicated against it.
struct Job {
    pack: FinishingPack,
    dedup: bool,
}

/// The threads that finish packs.
pub(crate) struct Finisher {
    /// `None` once the last pack was handed over.
    jobs: Mutex<Option<Sender<Job>>>,
    learnt: Receiver<Vec<BlobId>>,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    known: Arc<Known>,
    quota: Option<Quota>,
    /// Bytes of the packs that were finished or are being so. One that the quota refuses is not among them.
    stored: Mutex<u64>,
    /// Packs that are durable.
    made: Mutex<HashSet<PackId>>,
    failure: Mutex<Option<VaultError>>,
}

impl Shared {
    fn finish(&self, job: Job) -> Result<Vec<BlobId>, VaultError> {
        {
            let (mut stored, bytes) = (self.stored.lock(), job.pack.bytes());
            if let Some(quota) = &self.quota {
                quota.check(*stored, bytes)?;
            }
            *stored += bytes;
        }
        let (id, ids) = job.pack.finish()?;
        self.made.lock().insert(id);
        if let Some(lookup) = &self.known.lookup {
            // What the lookup does not learn now, the next backup learns from the listing.
            let _ = lookup.learn(id, 0, if job.dedup { &ids } else { &[] });
        }
        Ok(if job.dedup { ids } else { Vec::new() })
    }
}

impl Finisher {
    pub(crate) fn new(known: Arc<Known>, quota: Option<Quota>) -> Finisher {
        let (jobs, todo) = bounded::<Job>(WAITING);
        let (done, learnt) = unbounded();
        let shared =
            Arc::new(Shared { known, quota, stored: Mutex::new(0), made: Mutex::default(), failure: Mutex::new(None) });
        let thread = |_| {
            let (todo, done, shared) = (todo.clone(), done.clone(), shared.clone());
            std::thread::spawn(move || {
                for job in todo {
                    match shared.finish(job) {
                        Ok(ids) => drop(done.send(ids)),
                        Err(e) => drop(shared.failure.lock().get_or_insert(e)),
                    }
                }
            })
        };
        let threads = (0..THREADS).map(thread).collect();
        Finisher { jobs: Mutex::new(Some(jobs)), learnt, shared, threads: Mutex::new(threads) }
    }

    /// Hands over a pack; waits where too many wait already.
    pub(crate) fn submit(&self, pack: FinishingPack, dedup: bool) -> Result<(), BackupError> {
        if self.shared.failure.lock().is_some() {
            // What is on its way is made durable all the same: the next backup uses it.
            self.wait()?;
            return Err(BackupError::Thread);
        }
        let jobs = self.jobs.lock().clone();
        jobs.and_then(|jobs| jobs.send(Job { pack, dedup }).ok()).ok_or(BackupError::Thread)
    }

    /// The ids of blobs that the lookup has learnt since the last call.
    pub(crate) fn learnt(&self) -> impl Iterator<Item = Vec<BlobId>> + '_ {
        self.learnt.try_iter()
    }

    /// The packs that were made.
    pub(crate) fn made(&self) -> HashSet<PackId> {
        self.shared.made.lock().clone()
    }

    /// Takes no more packs and waits until all are durable; how many bytes they have.
    pub(crate) fn wait(&self) -> Result<u64, BackupError> {
        drop(self.jobs.lock().take());
        for thread in self.threads.lock().drain(..) {
            thread.join().map_err(|_| BackupError::Thread)?;
        }
        match self.shared.failure.lock().take() {
            Some(failure) => Err(failure.into()),
            None => Ok(*self.shared.stored.lock()),
        }
    }
}

impl Drop for Finisher {
    /// What is on its way ends before the lease of the backup does, also after an error: nobody may seal under keys that
    /// are about to go once nobody says that he does.
    fn drop(&mut self) {
        drop(self.jobs.lock().take());
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
    }
}
