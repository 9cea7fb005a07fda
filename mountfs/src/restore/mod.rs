//! A restore point's disks, written back in the clear.
//!
//! ```text
//! point → which disks → targets, all checked before anything is written   (plan)
//!       → stretches of data, several at a time → bytes → write at         (copy)
//!       → files that stay sparse, or block devices                        (target)
//! ```
//!
//! What arrives was authenticated blob by blob, so a restore that ends well has verified itself.

mod copy;
mod plan;
mod target;

use std::io;
use std::path::PathBuf;

use reseal_format::names::DiskName;
use reseal_vault::VaultError;

pub use copy::{Watch, restore};
pub use plan::{Plan, PlannedDisk};

/// Why a disk was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{point} has no disk {disk}; it has {}", .has.join(", "))]
    NoDisk { point: String, disk: DiskName, has: Vec<String> },
    #[error("{point} has {count} disks, so {} must be a folder; or choose one with --disk", .path.display())]
    NotAFolder { point: String, count: usize, path: PathBuf },
    #[error("{} exists; --force overwrites it", .path.display())]
    Exists { path: PathBuf },
    #[error("{} is a block device; --force overwrites what is on it", .path.display())]
    DeviceNeedsForce { path: PathBuf },
    #[error("{} is in use: mounted, or part of something that is; nothing was written", .path.display())]
    DeviceBusy { path: PathBuf },
    #[error("{} has {has} bytes, the disk {needs}; nothing was written", .path.display())]
    TooSmall { path: PathBuf, has: u64, needs: u64 },
    #[error("{} is neither a file nor a block device", .path.display())]
    NotAFile { path: PathBuf },
    #[error("can't {action} {}: {source}", .path.display())]
    Target { path: PathBuf, action: &'static str, source: io::Error },
    #[error("disk {disk}: {source}")]
    Vault { disk: DiskName, source: VaultError },
    #[error("interrupted; what was written so far is no disk")]
    Interrupted,
}
