//! A running VM whose disks are read as they were at one moment.

use std::path::PathBuf;

use reseal_format::ids::PointId;
use reseal_format::manifest::{Definition, Manifest, Tracking};
use reseal_format::names::DiskName;

use crate::BackupError;

/// What a hypervisor is asked for. Dropping it without [`Hypervisor::end`] undoes what `begin` did, as far as possible.
pub trait Hypervisor {
    /// Takes the moment: from here on the disks are read as they are now, while the VM goes on. `since` is the newest
    /// restore point; where the hypervisor still records what changed since that, it says so disk by disk.
    fn begin(&mut self, point: PointId, since: Option<&Manifest>) -> Result<Snapshot, BackupError>;

    /// An error unless what was read since `begin` was the disks of that one moment. Asked before the commit.
    fn check(&mut self) -> Result<(), BackupError>;

    /// Ends it. `kept` says that the restore point exists, so that what is recorded from its moment on is what the next one
    /// starts from; otherwise the recording since the point before goes on as if nothing had been. Returns what could
    /// not be cleaned up, as warnings.
    fn end(&mut self, kept: bool) -> Vec<String>;
}

/// The disks of one moment.
#[derive(Debug)]
pub struct Snapshot {
    pub disks: Vec<SnapshotDisk>,
    /// What is needed to start the VM again.
    pub definition: Option<Definition>,
    /// What the administrator should know, such as a disk that is left out.
    pub warnings: Vec<String>,
}

/// A disk of that moment, as an NBD export on a Unix socket.
#[derive(Debug)]
pub struct SnapshotDisk {
    pub name: DiskName,
    pub socket: PathBuf,
    pub export: String,
    /// Name of the dirty bitmap (as in `qemu:dirty-bitmap:NAME`) whose dirty areas are all that changed since the newest
    /// restore point; otherwise why there is none, for the administrator.
    pub changes: Result<String, String>,
    /// What records, from this moment on, what the next restore point has to read.
    pub tracking: Option<Tracking>,
    /// Where it was read from, for people.
    pub source: String,
}
