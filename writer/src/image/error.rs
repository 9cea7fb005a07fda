//! What can go wrong with an image.

use std::io;

use reseal_cli::{Failure, Status};
use reseal_qemu::{Missing, SecretError};

use super::ImageFormat;

/// An image that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("can't {action} {path}: {source}")]
    Io { path: String, action: &'static str, source: io::Error },
    #[error(
        "{path} starts like a {} image, but is not named like one. If it is one, pass --format {format}; if the guest's \
         disk itself starts like that, pass --raw", .format.title()
    )]
    Unnamed { path: String, format: ImageFormat },
    #[error(
        "{path} is named like a {} image, but is none by its content. If it holds the disk's raw bytes, pass --raw; if it \
         is an image of another format, name that with --format", .format.title()
    )]
    Misnamed { path: String, format: ImageFormat },
    #[error("{0:?} is no image format; there are qcow2, vmdk, vhdx, vdi, vhd, luks and raw")]
    UnknownFormat(String),
    #[error("can't read disk images: {0}")]
    Missing(#[from] Missing),
    #[error("{path}: the name is not UTF-8, which QEMU can't be told; rename the image, or make a link to it")]
    Name { path: String },
    #[error(
        "{path} is in use by another program, most likely a running VM. Back up the VM while it runs with --libvirt or \
         --qmp, or shut it down first"
    )]
    InUse { path: String },
    #[error("{path} is encrypted; give the file whose first line opens it with --image-secret FILE")]
    NoSecret { path: String },
    #[error("{path} is encrypted, and the secret given with --image-secret does not open it")]
    WrongSecret { path: String },
    #[error("--image-secret {0}")]
    SecretFile(#[from] SecretError),
    #[error("{path} is encrypted by {method}, which is obsolete; convert it to LUKS with `qemu-img convert`")]
    Cipher { path: String, method: String },
    #[error("{path} can't be opened because of an image that it builds on: {said}")]
    Backing { path: String, said: String },
    #[error(
        "{path} builds on {backing} without saying in which format that is, and it must not be guessed from what a guest \
         may have written; record it with `qemu-img rebase -u -b BACKING -F FORMAT IMAGE`"
    )]
    Probed { path: String, backing: String },
    #[error("{path} is damaged ({said}); look at it with `qemu-img check`, or take a copy of it that is whole")]
    Corrupt { path: String, said: String },
    #[error("{path} is no {} image by its content; name its format with --format, or pass --raw", .format.title())]
    NotThat { path: String, format: ImageFormat },
    #[error("{program} did not get {path} ready within {seconds} s: {said}")]
    Slow { path: String, program: &'static str, seconds: u64, said: String },
    #[error("{program} can't serve {path}: {said}")]
    Failed { path: String, program: &'static str, said: String },
}

impl ImageError {
    /// What the exit status of a command says of it.
    pub fn status(&self) -> Status {
        match self {
            ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Status::Failed,
            ImageError::Io { .. }
            | ImageError::InUse { .. }
            | ImageError::Backing { .. }
            | ImageError::Slow { .. }
            | ImageError::Failed { .. } => Status::Unreachable,
            ImageError::Unnamed { .. }
            | ImageError::Misnamed { .. }
            | ImageError::UnknownFormat(_)
            | ImageError::Name { .. }
            | ImageError::NoSecret { .. }
            | ImageError::WrongSecret { .. }
            | ImageError::SecretFile(_)
            | ImageError::Cipher { .. }
            | ImageError::Probed { .. }
            | ImageError::NotThat { .. } => Status::Usage,
            ImageError::Missing(_) | ImageError::Corrupt { .. } => Status::Failed,
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Failure {
        // Every message holds its source already.
        Failure::new(error.status(), error.to_string())
    }
}
