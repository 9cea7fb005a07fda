//! Where a disk is read from.

mod extents;
mod file;
mod nbd;
mod point;

use std::path::Path;

pub(crate) use extents::{Class, Extent, Extents, Marked, Run, Runs};
pub use file::FileSource;
pub use nbd::NbdSource;
pub use point::PointSource;

use reseal_nbd::server::SinceDisk;

use crate::BackupError;

/// A disk to back up.
pub enum Source {
    /// A regular file or a block device that holds its raw bytes.
    File(FileSource),
    /// An NBD export.
    Nbd(Box<NbdSource>),
    /// A disk of a restore point of another vault.
    Point(Box<PointSource>),
}

/// A disk that workers read where it lies.
pub(crate) trait Still: Sync {
    /// Bytes of the disk.
    fn length(&self) -> u64;

    /// Fills `buf` from `offset` on, which must not be past the end.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BackupError>;

    /// The next extent of data from `offset` on; `None` if only a hole follows.
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>, BackupError>;

    /// Whether nothing is there for so many bytes, which are not past the end.
    fn is_hole(&self, offset: u64, length: usize) -> Result<bool, BackupError> {
        let end = offset + length as u64;
        Ok(self.next_data(offset)?.is_none_or(|(start, _)| start >= end))
    }
}

/// The extents of such a disk. It does not say what changed, so all counts as changed.
pub(crate) struct StillExtents<'a>(pub &'a dyn Still);

impl Extents for StillExtents<'_> {
    fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
        let end = self.0.length();
        let (start, end) = self.0.next_data(from)?.unwrap_or((end, end));
        let (length, zero) = if start > from { (start - from, true) } else { (end - from, false) };
        Ok(Extent { length, zero, dirty: true })
    }
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
            Source::Point(point) => point.name(),
        }
    }

    /// Bytes of the disk.
    pub fn length(&self) -> u64 {
        match self {
            Source::File(file) => file.length(),
            Source::Nbd(nbd) => nbd.export().length(),
            Source::Point(point) => point.length(),
        }
    }

    /// About how many bytes will be read: what is allocated, as far as that is known before.
    pub fn expected(&self) -> u64 {
        match self {
            Source::File(file) => file.expected(),
            Source::Nbd(nbd) => nbd.export().length(),
            Source::Point(point) => point.used(),
        }
    }

    /// Since which disk of a restore point it tells what changed, if it says so itself.
    pub fn changed_since(&self) -> Option<SinceDisk> {
        match self {
            Source::File(_) | Source::Point(_) => None,
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
            Source::Point(_) => None,
            Source::Nbd(nbd) => Some(nbd.export().reconnected()).filter(|&times| times > 0).map(|times| {
                format!("the connection to {name} was lost and made again {times} times while it was read")
            }),
        };
        Ok(warning.into_iter().collect())
    }
}
