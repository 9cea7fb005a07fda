//! Where a disk is read from.

mod extents;
mod file;
mod nbd;

use std::path::Path;

pub(crate) use extents::{Class, Extent, Extents, Marked, Run, Runs};
pub use file::FileSource;
pub use nbd::NbdSource;

use reseal_nbd::server::SinceDisk;

use crate::BackupError;

/// A disk to back up.
pub enum Source {
    /// A regular file or a block device that holds its raw bytes.
    File(FileSource),
    /// An NBD export.
    Nbd(Box<NbdSource>),
}

impl Source {
    /// Opens a file or block device that holds the disk's raw bytes.
    pub fn open(path: &Path) -> Result<Source, BackupError> {
        FileSource::open(path).map(Source::File)
    }

    /// What it is called in messages, and in the restore point.
    pub fn name(&self) -> &str {
        match self {
            Source::File(file) => file.path(),
            Source::Nbd(nbd) => nbd.name(),
        }
    }

    /// Bytes of the disk.
    pub fn length(&self) -> u64 {
        match self {
            Source::File(file) => file.length(),
            Source::Nbd(nbd) => nbd.export().length(),
        }
    }

    /// About how many bytes will be read: what is allocated, as far as that is known before.
    pub fn expected(&self) -> u64 {
        match self {
            Source::File(file) => file.expected(),
            Source::Nbd(nbd) => nbd.export().length(),
        }
    }

    /// Since which disk of a restore point it tells what changed, if it says so itself.
    pub fn changed_since(&self) -> Option<SinceDisk> {
        match self {
            Source::File(_) => None,
            Source::Nbd(nbd) => nbd.export().changed_since().and_then(SinceDisk::parse),
        }
    }

    /// What the administrator should know about how it was read.
    pub fn warnings(&self) -> Result<Vec<String>, BackupError> {
        let name = self.name();
        let warning = match self {
            Source::File(file) => file.changed()?.then(|| {
                format!("{name} was written to while it was read, so the disk may hold parts of different moments")
            }),
            Source::Nbd(nbd) => Some(nbd.export().reconnected()).filter(|&times| times > 0).map(|times| {
                format!("the connection to {name} was lost and made again {times} times while it was read")
            }),
        };
        Ok(warning.into_iter().collect())
    }
}
