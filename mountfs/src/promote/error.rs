//! Why a disk was not moved. In all cases the VM goes on, and the place that is recorded has all that it wrote.

use std::path::PathBuf;

use reseal_format::names::DiskName;
use reseal_qmp::MonitorError;
use reseal_vault::Class;

use crate::target::TargetError;

/// Why a disk was not moved.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("the VM has no device {device} for the disk {disk}; was it unplugged?")]
    NoDevice { disk: DiskName, device: String },
    #[error("the disk {disk} is not on the overlay: the VM has it at QEMU's node {node}")]
    Elsewhere { disk: DiskName, node: String },
    #[error("QEMU can't open {}, made for the disk {disk}: {why}", .target.display())]
    Unopened { disk: DiskName, target: PathBuf, why: String },
    #[error("the disk {disk} could not be moved to {}: {why}; the VM goes on from the overlay, with all that it wrote", .target.display())]
    Failed { disk: DiskName, target: PathBuf, why: String },
    #[error("interrupted; the VM goes on from the overlay, with all that it wrote")]
    Interrupted,
    #[error("can't record where the disks are: {0}; the VM goes on from the overlay, with all that it wrote")]
    Record(String),
    #[error(
        "{source}; that was at the very end of the move, when {} had all that the VM wrote: it counts as moved. Run the same \
         command again to see where the VM has it",
        .target.display()
    )]
    Unknown { target: PathBuf, source: MonitorError },
}

impl PromoteError {
    /// What a caller does about it.
    pub fn class(&self) -> Class {
        match self {
            PromoteError::Target(e) if e.is_usage() => Class::Usage,
            PromoteError::Elsewhere { .. } | PromoteError::NoDevice { .. } => Class::Usage,
            PromoteError::Monitor(_)
            | PromoteError::Target(_)
            | PromoteError::Unopened { .. }
            | PromoteError::Failed { .. }
            | PromoteError::Interrupted
            | PromoteError::Record(_)
            | PromoteError::Unknown { .. } => Class::Failed,
        }
    }
}
