//! What a backup does on the other side of ┃, where the keys are: in this process, or at another site.

use std::ops::Range;

use reseal_format::ids::PointId;
use reseal_format::manifest::{Definition, Manifest, Tracking};
use reseal_format::names::DiskName;

use crate::BackupError;
use crate::pipeline::Job;

/// What is known of a disk before it is read.
#[derive(Debug, Clone)]
pub(crate) struct DiskFacts {
    pub name: DiskName,
    /// Bytes.
    pub length: u64,
    /// Where it is read from, for people.
    pub source: String,
    /// What records, from this moment on, what the next restore point has to read.
    pub tracking: Option<Tracking>,
}

/// Whether changes can be told since a moment: what is asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// One of [`reseal_format::manifest::method`].
    pub method: String,
    /// Its name: of the bitmap or checkpoint, or the change id.
    pub id: String,
    /// Since the restore point of that number; `None` if since the newest, whose disk must have recorded this name.
    pub since: Option<u32>,
}

/// What is to be read of a disk.
pub(crate) enum Start {
    /// All. The reason, where changes were told and there was something to start from.
    Whole(Option<String>),
    /// What changed, and these areas whatever is said.
    Since { always: Vec<Range<u64>> },
}

/// What a restore point says beside its disks.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    pub definition: Option<Definition>,
    pub warnings: Vec<String>,
    pub duration_ms: u64,
}

/// A restore point that does not exist yet.
pub(crate) trait Target {
    /// The id that it will have.
    fn point(&self) -> PointId;

    /// The newest restore point of the VM, as far as it is known here: index and digests may be missing.
    fn newest(&self) -> Option<&Manifest>;

    /// Begins a disk; the same once more begins it anew.
    fn begin(&mut self, facts: DiskFacts, asked: Option<Asked>) -> Result<Start, BackupError>;

    /// Reads the disk that was begun.
    fn read(&mut self, job: &Job<'_>) -> Result<(), BackupError>;

    /// Makes durable what was read.
    fn close(&mut self) -> Result<(), BackupError>;

    /// Makes the restore point exist.
    fn commit(&mut self, ending: Ending) -> Result<(), BackupError>;

    /// After an error: whether all disks can be read once more, for this point. True too if it exists already.
    fn recover(&mut self, error: &BackupError) -> Result<bool, BackupError>;

    /// Whether it exists.
    fn is_made(&self) -> bool;
}
