//! What can go wrong with a backup.

use std::io;

use reseal_cli::{Failure, Status};
use reseal_vault::VaultError;

use crate::guardian::GuardianError;
use crate::image::ImageError;
use crate::libvirt::LibvirtError;
use crate::nbd::NbdError;
use crate::qemu::QemuError;
use crate::remote::RemoteError;

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

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Failure {
        match error {
            BackupError::Vault(error) => error.into(),
            BackupError::Newest { ref source } => Failure::new(source.class().into(), error.to_string()),
            BackupError::Source { ref source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Failure::of(Status::Failed, &error)
            }
            BackupError::Remote(ref e) => Failure::of(e.status(), e),
            BackupError::Nbd(ref e) => Failure::of(e.status(), e),
            BackupError::Image(ref e) => Failure::of(e.status(), e),
            BackupError::Qemu(ref e) => Failure::of(e.status(), e),
            BackupError::Libvirt(ref e) => Failure::of(e.status(), e),
            BackupError::Guardian(ref e) => Failure::of(Status::Failed, e),
            BackupError::Source { .. } | BackupError::Shrank { .. } | BackupError::Disconnected => {
                Failure::of(Status::Unreachable, &error)
            }
            BackupError::NotADisk { .. } | BackupError::Usage(_) => Failure::of(Status::Usage, &error),
            BackupError::TooLarge { .. } | BackupError::Thread | BackupError::Distrusted { .. } => {
                Failure::of(Status::Failed, &error)
            }
        }
    }
}
