//! Files that only their owner may read: checked before they are read, replaced whole or not at all, under a lock.
//!
//! A new file is written beside its place, made durable, and only then given its name, so a power cut leaves the old file or the
//! new one. After a failed fsync the new one is discarded, not tried again: what reached the disk is unknown by then.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags, RenameFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

use crate::{KmsError, Secret};

/// How long to wait for another process that changes the file. Holders need milliseconds, so this is a dead one or a stalled disk.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two attempts to lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Bits that must be clear in the mode of a private file: any access of group or others. An access list shows here too, as the
/// group's bits.
const FOREIGN_BITS: u32 = 0o077;

/// Bits that must be clear in the mode of a file that decides where secrets go.
const WRITABLE_BITS: u32 = 0o022;

/// Reads a file whole, none if it does not exist, and says when it is larger than `limit`.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Option<Secret>, KmsError> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    read_open(&file, path, limit).map(Some)
}

/// The same for a file with secrets in it: refused unless it belongs to this user and nobody else has any access.
pub fn read_private(path: &Path, limit: u64) -> Result<Option<Secret>, KmsError> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    let meta = file.metadata().map_err(failed("read", path))?;
    let user = rustix::process::geteuid().as_raw();
    if meta.uid() != user {
        return Err(KmsError::ForeignOwner { path: path.to_owned(), owner: meta.uid(), user });
    }
    if meta.mode() & FOREIGN_BITS != 0 {
        return Err(KmsError::Exposed { path: path.to_owned(), mode: meta.mode() & 0o7777 });
    }
    read_open(&file, path, limit).map(Some)
}

/// The same for a file that decides where secrets go: others may read it, but only its owner, who is root or this
/// user, may write it.
pub fn read_trusted(path: &Path, limit: u64) -> Result<Option<Secret>, KmsError> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    let meta = file.metadata().map_err(failed("read", path))?;
    let user = rustix::process::geteuid().as_raw();
    let refused = |what: String| Err(KmsError::Config { path: path.to_owned(), what });
    if meta.uid() != user && meta.uid() != 0 {
        return refused(format!("it belongs to user {}, who would decide where secrets go: `chown` it", meta.uid()));
    }
    if meta.mode() & WRITABLE_BITS != 0 {
        let mode = meta.mode() & 0o7777;
        return refused(format!(
            "others may change where secrets go (mode {mode:04o}): run `chmod go-w {}`",
            path.display()
        ));
    }
    read_open(&file, path, limit).map(Some)
}

/// Opens without waiting for a writer, should the path be a pipe.
fn open(path: &Path) -> Result<Option<File>, KmsError> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("open", path)(error)),
    }
}

fn read_open(file: &File, path: &Path, limit: u64) -> Result<Secret, KmsError> {
    let meta = file.metadata().map_err(failed("read", path))?;
    if !meta.is_file() {
        return Err(KmsError::NotAFile { path: path.to_owned() });
    }
    // Room for all of it from the start: a buffer that grows leaves pieces of its content behind.
    let room = usize::try_from(meta.len().min(limit)).unwrap_or(0) + 2;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(KmsError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// Writes a file that must not exist yet, through `staged`; false if it exists.
pub fn write_new(path: &Path, staged: &Path, bytes: &[u8]) -> Result<bool, KmsError> {
    stage(staged, bytes)?;
    let named = name_new(staged, path);
    if !matches!(named, Ok(true)) {
        // Its removal is a courtesy: what counts is the error that led here.
        let _ = fs::remove_file(staged);
    }
    if named.map_err(failed("create", path))? {
        sync_folder(path)?;
        Ok(true)
    } else {
        Ok(false)
    }
}

/// Replaces a file, through `staged`.
pub fn replace(path: &Path, staged: &Path, bytes: &[u8]) -> Result<(), KmsError> {
    stage(staged, bytes)?;
    if let Err(error) = fs::rename(staged, path) {
        let _ = fs::remove_file(staged);
        return Err(failed("replace", path)(error));
    }
    sync_folder(path)
}

/// Writes `bytes` durably to a new file that only this user may read.
fn stage(staged: &Path, bytes: &[u8]) -> Result<(), KmsError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(staged).map_err(failed("create", staged))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(staged);
    }
    written.map_err(failed("write", staged))
}

/// Gives `staged` its name unless that is taken; false if it is.
fn name_new(staged: &Path, path: &Path) -> io::Result<bool> {
    match rustix::fs::renameat_with(CWD, staged, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        // A file system without that call, such as NFS, has hard links; one without hard links, such as FAT, has the call.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_new(staged, path),
        Err(error) => Err(error.into()),
    }
}

fn link_new(staged: &Path, path: &Path) -> io::Result<bool> {
    match rustix::fs::linkat(CWD, staged, CWD, path, AtFlags::empty()) {
        Ok(()) => fs::remove_file(staged).map(|()| true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Makes the folders above `path` that are missing, for this user only, each durable in its own parent.
pub fn make_parents(path: &Path) -> Result<(), KmsError> {
    let missing: Vec<&Path> =
        path.ancestors().skip(1).take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(folder) {
            Ok(()) => sync_folder(folder)?,
            // Another process was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create", folder)(error)),
        }
    }
    Ok(())
}

/// Makes the entry of `path` in its folder durable.
fn sync_folder(path: &Path) -> Result<(), KmsError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Some network and FUSE file systems have no such call, and then nothing better either.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        synced => synced.map_err(failed("make durable", folder)),
    }
}

/// An exclusive lock among all processes that change a file. It ends with the value, or with the process.
pub struct Lock(#[expect(dead_code, reason = "held open: closing it ends the lock")] File);

impl Lock {
    /// Waits at most `patience` for the lock at `path`, a file of its own that stays: the locked file itself is replaced, and to
    /// remove a lock file is a race.
    pub fn acquire(path: &Path, patience: Duration) -> Result<Self, KmsError> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(failed("open", path))?;
        let deadline = Instant::now() + patience;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => thread::sleep(LOCK_PAUSE),
                Err(Errno::WOULDBLOCK | Errno::INTR) => return Err(KmsError::Busy { path: path.to_owned() }),
                Err(error) => return Err(failed("lock", path)(error.into())),
            }
        }
    }
}

/// `path` with something appended to its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Turns an error of the system into ours, with what was done to which file.
pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KmsError {
    let path = path.to_owned();
    move |source| KmsError::Io { action, path, source }
}

#[cfg(test)]
mod tests;
