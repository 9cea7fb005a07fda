//! Why a restore point does not boot. Each says what to do about it.

use std::io;
use std::path::PathBuf;

use reseal_vault::Class;

use crate::writable::FolderError;

/// What can go wrong with a VM that is started here.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{0}")]
    Machine(String),
    #[error("{program} is not installed: install the package {package}")]
    Missing { program: &'static str, package: &'static str },
    #[error("no UEFI firmware for {arch} was found: install the package {package}, or boot with --firmware bios")]
    NoFirmware { arch: &'static str, package: &'static str },
    #[error("KVM can't be used: {0}; --accel tcg does without, but is slow")]
    NoKvm(String),
    #[error("can't {action} {}: {source}", .path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the path {} can't be used for sockets: {why}", .path.display())]
    Path { path: PathBuf, why: &'static str },
    #[error("{} can't be understood: {why}", .path.display())]
    Record { path: PathBuf, why: String },
    #[error(transparent)]
    Overlay(#[from] FolderError),
    #[error("can't start {}: {source}", .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("a QEMU that does not say its number holds {}; end it, and try again", .0.display())]
    Unknown(PathBuf),
    #[error("QEMU ended before it was ready: {said}")]
    Early { said: String },
    #[error("QEMU was killed, or broke down{said}")]
    Died { said: String },
    #[error("{0}")]
    Monitor(#[from] reseal_qmp::MonitorError),
    #[error(
        "the disk {disk} was moved to {target}, which is newer than the overlay: start the VM from there, and drop the overlay"
    )]
    Moved { disk: String, target: String },
    #[error("`{command}` failed: {said}")]
    Said { command: String, said: String },
}

impl BootError {
    /// What a caller does about it.
    pub fn class(&self) -> Class {
        match self {
            BootError::Machine(_) | BootError::Path { .. } | BootError::Moved { .. } => Class::Usage,
            BootError::Missing { .. }
            | BootError::NoFirmware { .. }
            | BootError::NoKvm(_)
            | BootError::File { .. }
            | BootError::Record { .. }
            | BootError::Overlay(_)
            | BootError::Start { .. }
            | BootError::Unknown(_)
            | BootError::Early { .. }
            | BootError::Died { .. }
            | BootError::Monitor(_)
            | BootError::Said { .. } => Class::Failed,
        }
    }
}
