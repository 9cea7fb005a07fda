//! A restore point's disks, written back.
//!
//! ```text
//! point → which disks → targets, all checked before anything is written         (plan)
//! raw:    stretches of data, several at a time → bytes → write at               (copy)
//!         → files that stay sparse, or block devices                            (raw)
//! others: disk → NBD on a socket without a name → qemu-img convert → image      (served, image)
//! ```
//!
//! What arrives was authenticated blob by blob, so a restore that ends well has verified itself.

mod copy;
mod image;
mod plan;
mod raw;
mod served;

use std::io;
use std::path::PathBuf;

use reseal_format::names::DiskName;
use reseal_vault::VaultError;

use crate::target::TargetError;

pub use copy::{Watch, restore};
pub use plan::{How, Plan, PlannedDisk};

/// Why a disk was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{point} has no disk {disk}; it has {}", .has.join(", "))]
    NoDisk { point: String, disk: DiskName, has: Vec<String> },
    #[error("{point} has {count} disks, so {} must be a folder; or choose one with --disk", .path.display())]
    NotAFolder { point: String, count: usize, path: PathBuf },
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("disk {disk}: {source}")]
    Vault { disk: DiskName, source: VaultError },
    #[error("can't serve disk {disk} to qemu-img: {source}")]
    Serve { disk: DiskName, source: io::Error },
    #[error("qemu-img can't write {}: {said}", .path.display())]
    NotWritten { path: PathBuf, said: String },
    #[error("interrupted; what was written so far is no disk")]
    Interrupted,
}
