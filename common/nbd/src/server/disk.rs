//! What is served: exports by name, and the disks behind them.

use std::sync::Arc;

use reseal_proto::nbd::Errno;
use reseal_proto::nbd::serve::Listed;

/// A stretch of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// At least one byte.
    pub length: u64,
    /// It takes no space, and reads as zeros.
    pub hole: bool,
}

/// A stretch of a disk that changed since a restore point, or did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// At least one byte.
    pub length: u64,
    pub changed: bool,
}

/// A request that can't be met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct DiskError {
    /// All that the client is told.
    pub errno: Errno,
    /// For the owner's log: must not hold what is on the disk.
    pub reason: String,
}

impl DiskError {
    /// What a disk says that can't be read.
    pub fn io(reason: impl Into<String>) -> DiskError {
        DiskError { errno: Errno::IO, reason: reason.into() }
    }

    fn read_only() -> DiskError {
        DiskError { errno: Errno::PERM, reason: "it is read-only".into() }
    }
}

/// One disk. Several threads, of several connections, use it at once. Ranges that it is asked for are never empty and end
/// where the disk does, or before.
pub trait Disk: Send + Sync {
    /// The name that this very disk has, whatever name it was opened by.
    fn name(&self) -> &str;

    /// For people.
    fn description(&self) -> Option<String> {
        None
    }

    /// Bytes.
    fn length(&self) -> u64;

    /// Whether a client that opens the same name again gets this same disk: only then may it open several connections.
    fn is_fixed(&self) -> bool {
        true
    }

    /// Fills `out` from `offset` on. After an error what is in it counts for nothing.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError>;

    /// The same if it takes no longer than a copy and a decompression do; `None`, and anything in `out`, where the store would be waited for.
    fn try_read(&self, _offset: u64, _out: &mut [u8]) -> Option<Result<(), DiskError>> {
        None
    }

    /// Whether it can be written to; the others are not asked to.
    fn is_writable(&self) -> bool {
        false
    }

    /// Writes at `offset`. Whoever reads afterwards, by any connection, gets it; it is durable after the next flush.
    fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), DiskError> {
        Err(DiskError::read_only())
    }

    /// Makes bytes zeros, as a write of them would.
    fn zero(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Err(DiskError::read_only())
    }

    /// Takes note that nobody needs these bytes any more.
    fn trim(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Err(DiskError::read_only())
    }

    /// Makes all durable that was written, by any connection, before this was called.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Which parts of a range are holes, from its start on: at least one stretch and at most `most`, which together may be
    /// less than the range but not more.
    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError>;

    /// Since when it can tell what changed, if it can: the disk of a restore point, in the words of a [`SinceDisk`].
    ///
    /// [`SinceDisk`]: super::SinceDisk
    fn changed_since(&self) -> Option<String> {
        None
    }

    /// What changed since then, as [`Disk::stretches`] tells holes.
    fn changes(&self, _offset: u64, _length: u64, _most: usize) -> Result<Vec<Change>, DiskError> {
        Err(DiskError { errno: Errno::INVAL, reason: "nothing is known of its changes".into() })
    }

    /// A range that will be read soon.
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Why there is no such export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotOpened {
    /// There is none of that name. The client sees the text.
    #[error("{0}")]
    Unknown(String),
    /// The client may not have it. The client sees the text.
    #[error("{0}")]
    Forbidden(String),
    /// Nothing is opened any more.
    #[error("the server is shutting down")]
    Ending,
    /// It is there, and can't be opened. Only the owner is told why.
    #[error("{0}")]
    Failed(String),
}

/// Disks by name.
pub trait Exports: Send + Sync {
    /// Opens one. Every connection opens its own.
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened>;

    /// Those that are shown to a client that asks which there are; more may be opened by their names.
    fn list(&self) -> Result<Vec<Listed>, NotOpened>;
}

/// Whom the server tells what its clients are not told. Called by many threads.
pub trait Owner: Send + Sync {
    /// Something went wrong that is no fault of the client.
    fn failed(&self, what: &str);

    /// A client has opened an export, of this name.
    fn opened(&self, _export: &str) {}

    /// So many bytes of a disk were sent. It may sleep, to keep to a rate.
    fn sent(&self, _bytes: u64) {}
}
