//! What a disk is moved to: a raw file or block device, a qcow2 image, either of them encrypted with LUKS, or a VMDK image.
//!
//! ```text
//! path → what stands there: nothing, a file, a block device that nobody has    (place)
//! format, secret → made by qemu-img, empty → what QEMU is told to open it      (image)
//!                → filled → durable, and from then on nobody's to remove
//! ```
//!
//! Nothing is overwritten unless that is asked for, and what was made and not finished is removed. A secret reaches QEMU's
//! programs through a pipe.

pub(crate) mod image;
mod place;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use reseal_qemu::{Missing, Secret, SecretError};
use serde_json::Value;

pub(crate) use place::OpenPlace;
pub use place::Place;

/// In which format a disk is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes; with a secret a LUKS volume of them.
    Raw,
    /// QEMU's own; with a secret LUKS inside it.
    Qcow2,
    /// The stream-optimized subformat: the one of OVF, which vSphere imports. It is compressed, and written once.
    Vmdk,
}

impl Format {
    /// The ending of the name of such a file, which is also the one by which a backup knows what it is.
    pub fn ending(self, is_clear: bool) -> &'static str {
        match (self, is_clear) {
            (Format::Raw, true) => "raw",
            (Format::Raw, false) => "luks",
            (Format::Qcow2, _) => "qcow2",
            (Format::Vmdk, _) => "vmdk",
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            "vmdk" => Ok(Format::Vmdk),
            _ => Err("there are raw, qcow2 and vmdk".into()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        })
    }
}

/// Why there is no target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
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
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("{} is a block device, and a {format} image needs a file; choose the format raw", .path.display())]
    ImageOnDevice { path: PathBuf, format: Format },
    #[error("a VMDK image can't be encrypted; choose the format qcow2 or raw")]
    ClearOnly,
    #[error(
        "a VMDK image that can be imported is written once, so no running VM can have it; choose the format qcow2 or raw"
    )]
    WrittenOnce,
    #[error("{}: the name is not UTF-8, which QEMU can't be told; choose another", .path.display())]
    Name { path: PathBuf },
    #[error("can't make {}: {source}", .path.display())]
    Missing { path: PathBuf, source: Missing },
    #[error("--luks-secret {0}")]
    Secret(SecretError),
    #[error("qemu-img can't make {}: {said}", .path.display())]
    NotMade { path: PathBuf, said: String },
}

impl TargetError {
    /// Whether something else has to be asked for.
    pub fn is_usage(&self) -> bool {
        match self {
            TargetError::ImageOnDevice { .. }
            | TargetError::ClearOnly
            | TargetError::WrittenOnce
            | TargetError::Name { .. }
            | TargetError::Secret(_) => true,
            TargetError::Exists { .. }
            | TargetError::DeviceNeedsForce { .. }
            | TargetError::DeviceBusy { .. }
            | TargetError::TooSmall { .. }
            | TargetError::NotAFile { .. }
            | TargetError::Io { .. }
            | TargetError::Missing { .. }
            | TargetError::NotMade { .. } => false,
        }
    }
}

/// The passphrase of a target that is to be encrypted, from a file that nobody else can read.
pub fn read_secret(file: &Path) -> Result<Arc<Secret>, TargetError> {
    Secret::read_private(file).map(Arc::new).map_err(TargetError::Secret)
}

/// Where a disk is to go, and how.
#[derive(Clone)]
pub struct TargetSpec {
    path: PathBuf,
    format: Format,
    secret: Option<Arc<Secret>>,
}

impl TargetSpec {
    /// A disk in that format at that path; with a secret encrypted with LUKS, which that passphrase opens.
    pub fn new(path: &Path, format: Format, secret: Option<Arc<Secret>>) -> Result<TargetSpec, TargetError> {
        if format == Format::Vmdk && secret.is_some() {
            return Err(TargetError::ClearOnly);
        }
        Ok(TargetSpec { path: path.to_owned(), format, secret })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// What opens it, for a QEMU that is told of it on a private socket.
    pub fn secret(&self) -> Option<&Arc<Secret>> {
        self.secret.as_ref()
    }

    /// Whether the disk will be there in the clear.
    pub fn is_clear(&self) -> bool {
        self.secret.is_none()
    }

    /// What there will be, for people.
    pub fn describe(&self) -> String {
        match (self.format, self.is_clear()) {
            (Format::Raw, true) => "in the clear".into(),
            (Format::Raw, false) => "a LUKS volume".into(),
            (format, true) => format!("in the clear, as {format}"),
            (format, false) => format!("encrypted with LUKS, as {format}"),
        }
    }

    /// Whether it is a file or device with the disk's own bytes, which needs no program of QEMU's.
    pub fn is_plain(&self) -> bool {
        self.format == Format::Raw && self.is_clear()
    }

    /// Refuses what can't be written to at random, as by a running VM.
    pub fn demand_rewritable(&self) -> Result<(), TargetError> {
        match self.format {
            Format::Raw | Format::Qcow2 => Ok(()),
            Format::Vmdk => Err(TargetError::WrittenOnce),
        }
    }

    /// Looks, without changing anything, whether a disk of that length can go there. `force`: what is there is overwritten.
    pub fn check(&self, length: u64, force: bool) -> Result<Place, TargetError> {
        let path = || self.path.clone();
        if !self.is_plain() {
            image::name(&self.path)?;
            image::find_program(&self.path)?;
        }
        let place = Place::check(&self.path, self.bytes(length), force)?;
        match (place, self.format) {
            (Place::Device, Format::Qcow2 | Format::Vmdk) => {
                Err(TargetError::ImageOnDevice { path: path(), format: self.format })
            }
            _ => Ok(place),
        }
    }

    /// Makes it, empty, for a disk of that length.
    pub fn create(&self, length: u64, force: bool) -> Result<Created, TargetError> {
        self.create_at(self.check(length, force)?, length, &|| true)
    }

    /// The same where that was found at its path, for as long as `go_on` says so.
    pub(crate) fn create_at(
        &self,
        place: Place,
        length: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Created, TargetError> {
        let name = image::name(&self.path)?;
        let open = place.open(&self.path, self.bytes(length))?;
        match self.is_plain() {
            true => open.set_length(image::sectors(length))?,
            false => image::create(self, &name, length, go_on)?,
        }
        Ok(Created { spec: self.clone(), name, length, open })
    }

    /// Bytes that a device needs for a disk of that length.
    fn bytes(&self, length: u64) -> u64 {
        match self.is_clear() {
            true => length,
            false => image::sectors(length) + image::LUKS_HEADER,
        }
    }
}

/// A target that was made. Dropped unfinished, a file that was made for it is removed.
pub struct Created {
    spec: TargetSpec,
    /// Its path as QEMU is told.
    name: String,
    length: u64,
    open: OpenPlace,
}

impl Created {
    pub fn spec(&self) -> &TargetSpec {
        &self.spec
    }

    /// What `blockdev-add` is told, so that a node of that name has the disk, neither longer nor shorter. `secret` names the
    /// secret object that is there if the target has a secret.
    pub fn blockdev(&self, node: &str, secret: &str) -> Value {
        image::blockdev(&self.spec, &self.name, self.open.is_device().then_some(self.length), node, secret)
    }

    /// The same for programs that take `--target-image-opts`.
    pub(crate) fn image_options(&self, secret: &str) -> String {
        image::options(&self.spec, &self.name, self.open.is_device(), secret)
    }

    /// Makes durable what is there by now, which may go all the same.
    pub fn sync(&self) -> Result<(), TargetError> {
        self.open.sync()
    }

    /// Makes durable what QEMU's programs wrote, and may have left in the page cache. The target stays from then on.
    pub fn finish(self) -> Result<(), TargetError> {
        self.open.finish()
    }
}

#[cfg(test)]
mod tests;
