//! One boot: what is known of the last one is fetched ahead, and what this one reads is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_format::boot_reads::BootReads;
use reseal_nbd::server::Exports;
use reseal_vault::disk::DiskReader;
use reseal_vault::{Point, Tenant, VaultError};

use super::{Limits, Prefetch, Recorder, RecordingExports};
use crate::journal::Journal;

/// For how long a guest counts as booting where nobody watches it: emulated ones take a minute.
const BOOT: Duration = Duration::from_secs(120);

/// The reads of a boot. Nothing that goes wrong with them keeps a VM from running: it is told to the journal.
pub struct BootReading {
    tenant: Arc<Tenant>,
    point: Arc<Point>,
    journal: Arc<Journal>,
    recorder: Arc<Recorder>,
    began: Instant,
    /// Whether another boot's are known.
    is_known: bool,
    is_over: bool,
    ahead: Option<Prefetch>,
}

impl BootReading {
    /// A boot begins, whose disks are read by `reader`.
    pub fn begin(
        tenant: &Arc<Tenant>,
        reader: &Arc<DiskReader>,
        point: &Arc<Point>,
        journal: &Arc<Journal>,
    ) -> BootReading {
        let known = tenant.boot_reads(&point.manifest).unwrap_or_else(|e| {
            journal.say(&format!("what the last boot read can't be fetched ahead: {e}"));
            None
        });
        let fetch = |reads: &BootReads| Prefetch::start(reader, point, reads, Limits::of(reader)).ok();
        BootReading {
            tenant: tenant.clone(),
            point: point.clone(),
            journal: journal.clone(),
            recorder: Recorder::new(&point.manifest),
            began: Instant::now(),
            is_known: known.is_some(),
            is_over: false,
            ahead: known.as_ref().and_then(fetch),
        }
    }

    /// What `points` has, but looked on.
    pub fn exports(&self, points: Arc<dyn Exports>) -> Arc<dyn Exports> {
        Arc::new(RecordingExports::new(points, self.recorder.clone()))
    }

    /// Keeps what was read, if the guest has had the time to boot. Cheap, and to be called now and then.
    pub fn look(&mut self) {
        if self.began.elapsed() >= BOOT {
            self.over();
        }
    }

    /// The guest has booted: keeps what was read.
    pub fn over(&mut self) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        let reads = self.recorder.finish();
        if reads.count() == 0 {
            return;
        }
        if let Err(e) = self.keep(&reads) {
            self.journal.say(&format!("what this boot read is not kept for the next one: {e}"));
        }
    }

    /// The guest has ended: what was read so far is better than nothing, and than nothing only.
    pub fn end(mut self) {
        match self.is_known {
            true => self.forget(),
            false => self.over(),
        }
    }

    /// It was no boot.
    pub fn forget(&mut self) {
        self.is_over = true;
        self.recorder.finish();
        self.ahead = None;
    }

    fn keep(&self, reads: &BootReads) -> Result<(), VaultError> {
        self.tenant.note_boot_reads(&self.point.manifest, reads).map(drop)
    }
}
