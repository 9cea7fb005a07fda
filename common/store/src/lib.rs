//! Objects by key: where a vault lives.
//!
//! [`Store`] is what the vault needs of a place: ranged reads, create-only writes that are durable when they return, the
//! replacement of what is known to be there, and listings. [`local`] is a folder of a file system, [`bucket`] an object store, and [`cache`] keeps
//! what was read of one on a disk.
//!
//! Architecture invariant: synchronous, because a FUSE read must not pay for a task switch. Faults are injected by
//! another `Store` around a real one, never by hooks in here.

mod bucket;
mod cache;
mod local;

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

pub use bucket::{AddressError, Bucket, Variables, is_address};
pub use cache::Cached;
pub use local::Local;

/// What a listing says of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Last part of the key, without a slash.
    pub name: String,
    /// Bytes; 0 for a folder.
    pub length: u64,
    /// Whether keys go on below it.
    pub is_folder: bool,
}

/// A place that holds objects. Keys are relative paths with `/` between their parts.
pub trait Store: Send + Sync {
    /// The whole object, if it has at most `limit` bytes.
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError>;

    /// Fills `buf` from `offset` on.
    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError>;

    /// Like [`Store::read_at`], for what won't be read again: it is not worth to be remembered.
    fn read_once(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.read_at(key, offset, buf)
    }

    /// Like [`Store::read_at`], but gives up and answers `false` where it might have to wait.
    fn try_read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError>;

    /// Says that these bytes will be wanted soon. A store that can have them at hand by then, without anybody waiting for
    /// them, begins to and answers `true`.
    fn expect(&self, _key: &str, _offset: u64, _length: u64) -> bool {
        false
    }

    /// Whether what is expected is fetched with many requests at a time, which each take long, and kept beside this process's memory.
    fn fetches_aside(&self) -> bool {
        false
    }

    /// Says that what was read of an object is not authentic: nothing that is remembered of it is believed any more.
    fn doubt(&self, _key: &str) {}

    /// Whether each request takes so long that many should be under way at a time.
    fn is_far(&self) -> bool {
        false
    }

    /// The last bytes of the object, `want` of them or all it has, and its length.
    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError>;

    /// Whether it is shown as it was at a moment, so that nothing can be changed.
    fn is_past(&self) -> bool {
        false
    }

    /// Makes an object whole, or not at all; durable when it returns. Fails with [`StoreError::Exists`] where the key is
    /// taken: of several that try, exactly one succeeds.
    fn create(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let mut upload = self.upload(key)?;
        upload.append(bytes)?;
        upload.finish()
    }

    /// Puts `new` in the place of `expected`, which is all that the object holds now; durable when it returns. Readers find
    /// the one or the other whole. Fails with [`StoreError::Changed`] where the object holds anything else: of several
    /// that try, one succeeds. An object that holds `new` already is only made durable, so it may be tried again.
    ///
    /// What is ever replaced must be read by [`Store::get`]: the other reads may remember an object from before.
    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError>;

    /// The same; what it holds then is locked.
    fn replace_locked(&self, _key: &str, _expected: &[u8], _new: &[u8], _lock: Lock) -> Result<(), StoreError> {
        Err(StoreError::NoLocks)
    }

    /// Starts an object that is written piece by piece. It does not exist before [`Upload::finish`].
    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError>;

    /// What is directly below a folder ("" is the root); a folder that does not exist is empty. In no order.
    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError>;

    /// Makes durable what a listing of a folder has shown: its writer may have died before it had.
    fn settle(&self, folder: &str) -> Result<(), StoreError>;

    /// Removes an object; of one that has versions, the newest for good. One that is locked is refused.
    fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// Takes an object out of sight, and removes it where nothing keeps it.
    fn hide(&self, key: &str) -> Result<(), StoreError> {
        self.delete(key)
    }

    /// The store's own time, by which it keeps locks, in seconds since 1970.
    fn time(&self) -> Result<i64, StoreError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(since.as_secs().cast_signed())
    }

    /// Locks an object, so that what it is now can't be removed before then by anybody. One that is locked for longer already stays so.
    fn lock(&self, _key: &str, _lock: Lock) -> Result<(), StoreError> {
        Err(StoreError::NoLocks)
    }

    /// The lock of an object that is there, if it is locked now.
    fn lock_of(&self, _key: &str) -> Result<Option<Lock>, StoreError> {
        Ok(None)
    }

    /// Refuses a place that lets what is locked be removed, or that knows no locks.
    fn probe_locks(&self, _mode: LockMode) -> Result<(), StoreError> {
        Err(StoreError::NoLocks)
    }

    /// Removes a folder and those below it, as far as no object is in them. Where a store has no folders of its own, there
    /// is nothing to do.
    fn remove_empty(&self, _folder: &str) -> Result<(), StoreError> {
        Ok(())
    }

    /// Removes what writers that died have left behind.
    fn sweep(&self) -> Result<(), StoreError>;

    /// Refuses a place that does not honour what `create` and `replace` promise.
    fn probe(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Makes an object that says that this process is at work. It goes when the lease is dropped; where the process dies
    /// before, it stays, but [`Store::standing`] tells the difference. It is not durable: nor is the process. Fails with
    /// [`StoreError::Exists`] where somebody has it.
    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError>;

    /// What a process says that still has a lease, or may have; `None` where nobody has. What is left of such a one may be removed.
    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError>;

    /// Removes a lease that is silent; whether nobody has it now: its process may have been heard of again. Who does has seen to it that
    /// nothing counts which that might still do.
    fn end(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.standing(key)?.is_none())
    }
}

/// What a lease is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseUse {
    /// Others wait for its end, and count on nothing being changed after it.
    Changing,
    /// Others leave alone what it reads.
    Reading,
}

/// A lease that some process has, or may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// What it says.
    pub bytes: Vec<u8>,
    /// Whether nothing was heard of its process for so long that it has probably ended. Where a lease ends with its process, none is.
    pub is_silent: bool,
}

/// Until when an object can't be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// Seconds since 1970, by the store's clock; `i64::MAX` where no time ends it.
    pub until: i64,
    pub mode: LockMode,
}

/// How firm a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Whom the store gives the right to can bypass it.
    Governance,
    /// Nobody can.
    Compliance,
}

/// A lease that this process has, until this is dropped.
pub trait Lease: Send + Sync {
    /// An error if another process has ended it, for nothing was heard of this one for too long. Asked after a change that counts only while
    /// the lease stands.
    fn check(&self) -> Result<(), StoreError>;

    /// Removes an object that this process has just made under a lease which no longer stands.
    fn take_back(&self, key: &str) -> Result<(), StoreError>;
}

/// An object in the making. Dropped unfinished, it never existed.
pub trait Upload: Send {
    /// Adds bytes at its end.
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError>;

    /// Locks it from its beginning on. Said before it is finished.
    fn lock(&mut self, _lock: Lock) -> Result<(), StoreError> {
        Err(StoreError::NoLocks)
    }

    /// Makes it durable under its key, as [`Store::create`] does.
    fn finish(self: Box<Self>) -> Result<(), StoreError>;
}

/// 32 hexadecimal digits that nobody else has.
fn random_name() -> io::Result<String> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(random.map(|byte| format!("{byte:02x}")).concat())
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{0} is missing")]
    NotFound(String),
    #[error("{0} exists already")]
    Exists(String),
    #[error("{0} was changed meanwhile by another process, and is not replaced; try again")]
    Changed(String),
    #[error("{key} has {length} bytes, more than the {limit} that it may have")]
    TooLong { key: String, length: u64, limit: usize },
    #[error("{key} ends at byte {length}, before byte {wanted}; it is cut off")]
    Short { key: String, length: u64, wanted: u64 },
    #[error("{0} is no regular file")]
    NotAFile(String),
    #[error("no space left for {0}; free some on the file system of the vault")]
    Full(String),
    #[error(
        "the lease {0} was lost: the store could not be reached for too long, or this process stood still, and another one went on; \
         nothing more is changed; begin again"
    )]
    Lost(String),
    #[error(
        "this object store does not honour conditional writes (If-None-Match and If-Match): of two who write at a time both would be told that \
         they had succeeded; use an engine, or a version of it, that does; Ceph's gateway does where the bucket keeps no versions"
    )]
    Unconditional,
    #[error(
        "objects can't be locked here: a vault whose tenants lock what they write has to be in a bucket of S3, or of one like it, that was made \
         with Object Lock"
    )]
    NoLocks,
    #[error("{0} can't be changed: the vault is shown as it was at a moment; leave `?as-of=` out of its address")]
    Past(String),
    #[error("{key} is locked until {until} in the object store, and stays")]
    Locked { key: String, until: String },
    #[error("can't {action} {key}: {source}")]
    Io { key: String, action: &'static str, source: io::Error },
}

impl StoreError {
    /// Whether the place refuses to change or remove the object, as a lock on it makes it: trying again changes nothing.
    pub fn is_refused(&self) -> bool {
        let refused = [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem];
        match self {
            StoreError::Io { source, .. } => refused.contains(&source.kind()),
            StoreError::Locked { .. } => true,
            _ => false,
        }
    }

    /// The key of the object that it is about.
    pub fn key(&self) -> &str {
        match self {
            StoreError::NotFound(key) | StoreError::NotAFile(key) => key,
            StoreError::Exists(key) | StoreError::Changed(key) | StoreError::Full(key) => key,
            StoreError::Lost(key) | StoreError::Past(key) => key,
            StoreError::Unconditional | StoreError::NoLocks => "tmp",
            StoreError::Locked { key, .. } => key,
            StoreError::TooLong { key, .. } | StoreError::Short { key, .. } | StoreError::Io { key, .. } => key,
        }
    }
}
