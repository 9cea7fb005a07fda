//! What can go wrong with a backup.

use std::io;

use reseal_cli::{Failure, Status};
use reseal_format::names::VmName;
use reseal_vault::VaultError;

use crate::guardian::GuardianError;
use crate::image::ImageError;
use crate::libvirt::LibvirtError;
use crate::qemu::QemuError;
use reseal_nbd::NbdError;
use reseal_site::RemoteError;

/// A backup that did not make a restore point.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("can't {action} {path}: {source}")]
    Source { path: String, action: &'static str, source: io::Error },
    #[error("{path} is neither a regular file nor a block device")]
    NotADisk { path: String },
    #[error("{path} has {length} bytes, more than the longest disk of a vault ({max})")]
    TooLarge { path: String, length: u64, max: u64 },
    #[error("{path} ended at byte {end}, though it had {length} bytes when the backup began; nothing was committed")]
    Shrank { path: String, end: u64, length: u64 },
    #[error(
        "{source}. The chain can't go on from there: put the object back from a copy of the vault, or back up under \
         another VM name until then"
    )]
    Newest { source: VaultError },
    /// What is read is a restore point.
    #[error("the restore point that is copied: {source}")]
    Copied { source: VaultError },
    #[error(
        "{vm}@{number} in the other vault is no copy of a restore point of {vm} here: copy to another tenant (--to-tenant), where \
         nobody else makes restore points of it"
    )]
    NoCopy { vm: VmName, number: u32 },
    #[error("{0}")]
    Usage(String),
    #[error("a thread of the pipeline ended unexpectedly")]
    Thread,
    #[error("the connection to the source ended")]
    Disconnected,
    /// What was said about changes can't be used: the disk has to be read whole.
    #[error("what is said to be unchanged can't be taken as it was: {why}")]
    Distrusted { why: String },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    #[error(transparent)]
    Guardian(#[from] GuardianError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Vault(#[from] VaultError),
}

impl BackupError {
    /// Exit status of a command that ends with it.
    pub fn status(&self) -> Status {
        match self {
            BackupError::Vault(source) | BackupError::Newest { source } | BackupError::Copied { source } => {
                source.class().into()
            }
            BackupError::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => Status::Failed,
            BackupError::Remote(e) => e.status(),
            BackupError::Nbd(e) => e.status(),
            BackupError::Image(e) => e.status(),
            BackupError::Qemu(e) => e.status(),
            BackupError::Libvirt(e) => e.status(),
            BackupError::Source { .. } | BackupError::Shrank { .. } | BackupError::Disconnected => Status::Unreachable,
            BackupError::NotADisk { .. } | BackupError::Usage(_) => Status::Usage,
            BackupError::Guardian(_)
            | BackupError::TooLarge { .. }
            | BackupError::Thread
            | BackupError::NoCopy { .. }
            | BackupError::Distrusted { .. } => Status::Failed,
        }
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Failure {
        match error {
            BackupError::Vault(error) => error.into(),
            // It says itself what its source says.
            BackupError::Newest { .. } | BackupError::Copied { .. } => Failure::new(error.status(), error.to_string()),
            error => Failure::of(error.status(), &error),
        }
    }
}
