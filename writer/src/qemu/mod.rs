//! A running VM of QEMU, through its monitor.
//!
//! ```text
//! disks → bitmaps                 which disks, and whether changes are known
//! scratch_image → scratch → watch where the guest's overwritten data goes meanwhile
//! run                             the snapshot, from its marker to its end
//! leftovers                       removes what is ours: at the end, and after a run that died
//! ```

mod bitmaps;
mod disks;
mod error;
mod leftovers;
mod machine;
mod marker;
mod names;
mod run;
mod run_folder;
mod scratch;
mod scratch_image;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use reseal_format::ids::PointId;
use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;

use crate::BackupError;
use crate::live::{Hypervisor, Snapshot};

pub use error::QemuError;
pub use leftovers::Leftovers;

use run::Run;

/// How a VM is reached.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// The socket of its monitor, which no other client may hold.
    pub qmp: PathBuf,
    /// The socket of its guest agent, if file systems are to be frozen for the moment of the snapshot.
    pub qga: Option<PathBuf>,
    /// Folder for what the guest overwrites while its disks are read, encrypted.
    pub scratch: PathBuf,
    /// Bytes to reserve there for each disk, instead of a tenth of it.
    pub scratch_reserve: Option<u64>,
    /// Names of disks by their id in QEMU, where they are to be others than those made from it.
    pub names: BTreeMap<String, DiskName>,
    /// How long one command of the monitor may take.
    pub timeout: Duration,
    /// How long the guest agent may take to give a sign of life.
    pub agent_patience: Duration,
    /// How long file systems may stay frozen.
    pub freeze_limit: Duration,
    /// The program of the guardian: `reseal` itself.
    pub program: PathBuf,
}

impl QemuOptions {
    /// The usual ones.
    pub fn new(qmp: PathBuf, scratch: PathBuf) -> QemuOptions {
        QemuOptions {
            qmp,
            qga: None,
            scratch,
            scratch_reserve: None,
            names: BTreeMap::new(),
            timeout: Duration::from_secs(30),
            agent_patience: Duration::from_secs(5),
            freeze_limit: Duration::from_secs(10),
            program: PathBuf::from("/proc/self/exe"),
        }
    }
}

/// A VM whose disks can be read as of one moment.
pub struct Qemu {
    options: QemuOptions,
    run: Option<Run>,
    /// The bitmaps that the newest restore point names.
    since: Vec<String>,
}

impl Qemu {
    /// Nothing is asked of the VM yet.
    pub fn new(options: QemuOptions) -> Qemu {
        Qemu { options, run: None, since: Vec::new() }
    }
}

impl Hypervisor for Qemu {
    fn begin(&mut self, point: PointId, since: Option<&Manifest>) -> Result<Snapshot, BackupError> {
        if self.run.is_some() {
            return Err(QemuError::Unusable("a snapshot of this VM is at work already".into()).into());
        }
        self.since = bitmaps::named(since);
        let mut run = Run::open(&self.options, point, since)?;
        match run.take(&self.options, since) {
            Ok(snapshot) => {
                self.run = Some(run);
                Ok(snapshot)
            }
            Err(e) => Err(run.give_up(e).into()),
        }
    }

    fn check(&mut self) -> Result<(), BackupError> {
        match &mut self.run {
            Some(run) => Ok(run.check()?),
            None => Err(QemuError::Unusable("there is no snapshot of this VM".into()).into()),
        }
    }

    fn end(&mut self, kept: bool) -> Vec<String> {
        self.run.take().map_or_else(Vec::new, |run| run.end(kept, &self.since))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end(false);
    }
}
