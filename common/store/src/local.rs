//! A folder of a local or network file system.
//!
//! A new object is written to a locked file under `tmp/`, synced, linked to its key without replacing, and the folder is
//! synced. So an object exists whole and durable, or not; and whoever finds an unlocked file under `tmp/` may delete it.
//!
//! An object is replaced by a rename, after its content was compared under a lock that all replacements in the folder take.
//!
//! A lease is a file that its process keeps locked, so that it ends with the process, whatever becomes of that.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::{Advice, AtFlags, CWD, FlockOperation, Mode, OFlags, fadvise, flock, openat, unlinkat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::process::{Resource, getrlimit};

use crate::{Entry, Lease, LeaseUse, Standing, Store, StoreError, Upload, random_name};

/// Folder of unfinished objects.
const TMP: &str = "tmp";
/// What whoever replaces an object keeps locked, under `tmp/`. Its name is none of an unfinished object's.
const REPLACE_LOCK: &str = "replace.lock";
/// Longest wait for another process that replaces an object: it takes milliseconds, and a minute means that it hangs.
const REPLACE_PATIENCE: Duration = Duration::from_secs(60);
/// How deep folders are looked into to remove them: deeper than any key goes.
const MAX_DEPTH: u8 = 16;
/// Longest lease that is read.
const MAX_LEASE: usize = 64 << 10;
/// Most files kept open: packs of 256 GiB.
const MAX_OPEN_FILES: usize = 4096;

/// A folder.
pub struct Local {
    shared: Arc<Shared>,
    /// Objects are written once, so an open file stays right. The few that are replaced are read by `get`, which opens anew.
    open: Mutex<LruCache<String, Arc<File>>>,
}

struct Shared {
    root: PathBuf,
    /// Folders whose own entry this process has made durable.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Local {
    /// A store in that folder, which need not exist before the first object.
    pub fn new(root: impl Into<PathBuf>) -> Local {
        let shared = Shared { root: root.into(), durable: Mutex::default() };
        Local { shared: Arc::new(shared), open: Mutex::new(LruCache::new(open_files())) }
    }

    fn file(&self, key: &str) -> Result<Arc<File>, StoreError> {
        if let Some(file) = self.open.lock().get(key) {
            return Ok(file.clone());
        }
        let file = Arc::new(self.shared.open(key)?);
        self.open.lock().put(key.to_owned(), file.clone());
        Ok(file)
    }

    /// A new object that is being written.
    fn begin(&self, key: &str) -> Result<LocalUpload, StoreError> {
        let target = self.shared.path(key)?;
        let (file, path) = self.shared.temporary().map_err(|e| match io_error(key, "create", e) {
            // What is missing is the folder of the vault, not the object.
            StoreError::NotFound(key) => {
                let source = io::ErrorKind::NotFound.into();
                StoreError::Io { key, action: "make the folder of", source }
            }
            other => other,
        })?;
        Ok(LocalUpload { shared: self.shared.clone(), key: key.into(), target, file, path })
    }
}

impl Shared {
    /// The path of a key. Keys are built from encoded names, so a part that could leave the root is a mistake.
    fn path(&self, key: &str) -> Result<PathBuf, StoreError> {
        let legal = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if !key.strip_suffix('/').unwrap_or(key).split('/').all(legal) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a legal key");
            return Err(StoreError::Io { key: key.into(), action: "use", source });
        }
        Ok(self.root.join(key))
    }

    /// Opens an object. Whoever else can write to the folder may have put something in its place whose opening or reading
    /// would never end, such as a pipe.
    fn open(&self, key: &str) -> Result<File, StoreError> {
        let path = self.path(key)?;
        let file = open_at_once(&path).map_err(|e| io_error(key, "open", e))?;
        match file.metadata().map_err(|e| io_error(key, "read", e))?.is_file() {
            true => Ok(file),
            false => Err(StoreError::NotAFile(key.into())),
        }
    }

    /// Makes a folder, with those above it, and their entries durable.
    fn ensure_folder(&self, folder: &Path) -> io::Result<()> {
        if self.durable.lock().contains(folder) {
            return Ok(());
        }
        let make = || match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            // Another process may have made it a moment ago, and not yet synced: whoever relies on it syncs.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        };
        match make() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).ok_or(e)?;
                // It may have been there before, and have gone with its file system.
                self.durable.lock().remove(parent);
                self.ensure_folder(parent)?;
                make()?;
            }
            other => other?,
        }
        if let Some(parent) = folder.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            File::open(parent)?.sync_all()?;
        }
        self.durable.lock().insert(folder.to_owned());
        Ok(())
    }

    /// Removes a folder, after those in it, if it is empty. What is a link, or is in use, stays.
    fn remove_empty(&self, folder: &Path, depth: u8) -> io::Result<()> {
        let entries = match std::fs::read_dir(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            if depth > 0 && entry.file_type()?.is_dir() {
                self.remove_empty(&entry.path(), depth - 1)?;
            }
        }
        // Whoever makes it again must make it durable again, also if that happens in this moment.
        self.durable.lock().remove(folder);
        match std::fs::remove_dir(folder) {
            Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty && e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// A new locked file under `tmp/`.
    fn temporary(&self) -> io::Result<(File, PathBuf)> {
        let folder = self.root.join(TMP);
        self.ensure_folder(&folder)?;
        loop {
            let path = folder.join(random_name()?);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            // A sweep that came between the two has taken it for abandoned.
            if file.metadata()?.nlink() > 0 {
                return Ok((file, path));
            }
        }
    }
}

/// The right to compare and replace. Its file goes with it, so that nothing temporary stays.
struct ReplaceLock {
    _file: File,
    path: PathBuf,
}

impl ReplaceLock {
    fn take(shared: &Shared) -> io::Result<ReplaceLock> {
        let folder = shared.root.join(TMP);
        shared.ensure_folder(&folder)?;
        let path = folder.join(REPLACE_LOCK);
        let end = Instant::now() + REPLACE_PATIENCE;
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        loop {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if file.metadata()?.nlink() > 0 => return Ok(ReplaceLock { _file: file, path }),
                // Its last holder has removed it: the next one is another file.
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(Duration::from_millis(2)),
                Err(Errno::WOULDBLOCK) => {
                    let what = format!("another process keeps {} locked; wait for it, or end it", path.display());
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for ReplaceLock {
    fn drop(&mut self) {
        // While it is still locked: whoever waits for it sees that it has no name any more.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// How many files are kept open: a quarter of what the process may have.
fn open_files() -> NonZeroUsize {
    let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
    let files = limit.map_or(MAX_OPEN_FILES, |limit| (limit / 4).min(MAX_OPEN_FILES));
    NonZeroUsize::new(files).unwrap_or(NonZeroUsize::MIN)
}

/// Whether a file under `tmp/` may be one of ours: see [`random_name`]. Nothing else there is touched.
fn is_temporary(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Opens to read without waiting for a writer, should it be a pipe. Regular files don't know the difference.
fn open_at_once(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)
}

fn io_error(key: &str, action: &'static str, source: io::Error) -> StoreError {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StoreError::NotFound(key.into()),
        io::ErrorKind::AlreadyExists => StoreError::Exists(key.into()),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(key.into()),
        _ => match Errno::from_io_error(&source) {
            // A link to itself, a socket, a device that is not there.
            Some(Errno::LOOP | Errno::NXIO | Errno::NODEV) => StoreError::NotAFile(key.into()),
            _ => StoreError::Io { key: key.into(), action, source },
        },
    }
}

fn short_or_io(key: &str, file: &File, wanted: u64, source: io::Error) -> StoreError {
    match file.metadata() {
        Ok(data) if source.kind() == io::ErrorKind::UnexpectedEof => {
            StoreError::Short { key: key.into(), length: data.len(), wanted }
        }
        _ => io_error(key, "read", source),
    }
}

impl Store for Local {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        let file = self.shared.open(key)?;
        let length = file.metadata().map_err(|e| io_error(key, "read", e))?.len();
        let size = usize::try_from(length).ok().filter(|&size| size <= limit);
        let size = size.ok_or_else(|| StoreError::TooLong { key: key.into(), length, limit })?;
        let mut bytes = vec![0; size];
        file.read_exact_at(&mut bytes, 0).map_err(|e| short_or_io(key, &file, length, e))?;
        Ok(bytes)
    }

    fn doubt(&self, key: &str) {
        // Another file may have been put in its place.
        self.open.lock().pop(key);
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let file = self.file(key)?;
        file.read_exact_at(buf, offset).map_err(|e| short_or_io(key, &file, offset + buf.len() as u64, e))
    }

    fn try_read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        // Opening may wait too, so only a file that is open already counts.
        let Some(file) = self.open.lock().get(key).cloned() else { return Ok(false) };
        let wanted = buf.len();
        match preadv2(&*file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(got) => Ok(got == wanted),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
            Err(e) => Err(io_error(key, "read", e.into())),
        }
    }

    fn expect(&self, key: &str, offset: u64, length: u64) -> bool {
        // The kernel reads ahead by itself only where reads are in order and of one file.
        self.file(key).is_ok_and(|file| fadvise(&*file, offset, NonZeroU64::new(length), Advice::WillNeed).is_ok())
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        let file = self.file(key)?;
        let length = file.metadata().map_err(|e| io_error(key, "read", e))?.len();
        let size = usize::try_from(length).map_or(want, |length| want.min(length));
        let mut tail = vec![0; size];
        let start = length - size as u64;
        file.read_exact_at(&mut tail, start).map_err(|e| short_or_io(key, &file, length, e))?;
        Ok((tail, length))
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        let mut upload = self.begin(key)?;
        upload.append(new)?;
        // A failed sync is not tried again: the kernel may have dropped the pages, and a second one would lie.
        upload.file.sync_all().map_err(|e| io_error(key, "write", e))?;
        let _alone = ReplaceLock::take(&self.shared).map_err(|e| io_error(key, "lock", e))?;
        let now = match self.get(key, expected.len().max(new.len())) {
            Err(StoreError::TooLong { .. }) => return Err(StoreError::Changed(key.into())),
            other => other?,
        };
        if now == new {
            return upload.sync_folder().map_err(|e| io_error(key, "sync", e));
        }
        if now != expected {
            return Err(StoreError::Changed(key.into()));
        }
        self.open.lock().pop(key);
        upload.take_place().map_err(|e| io_error(key, "replace", e))
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(self.begin(key)?))
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        let path = if folder.is_empty() { self.shared.root.clone() } else { self.shared.path(folder)? };
        let entries = match std::fs::read_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|e| io_error(folder, "list", e))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| io_error(folder, "list", e))?;
            // What is not text is not ours.
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.metadata() {
                Ok(data) => {
                    let length = if data.is_dir() { 0 } else { data.len() };
                    found.push(Entry { name, length, is_folder: data.is_dir() });
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {} // went in between
                Err(e) => return Err(io_error(folder, "list", e)),
            }
        }
        Ok(found)
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        let path = self.shared.path(folder)?;
        let settled = self.shared.ensure_folder(&path).and_then(|()| File::open(&path)?.sync_all());
        settled.map_err(|e| io_error(folder, "sync", e))
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.open.lock().pop(key);
        let path = self.shared.path(key)?;
        std::fs::remove_file(&path).map_err(|e| io_error(key, "delete", e))
    }

    fn remove_empty(&self, folder: &str) -> Result<(), StoreError> {
        let path = self.shared.path(folder)?;
        let removed = self.shared.remove_empty(&path, MAX_DEPTH);
        removed.map_err(|e| io_error(folder, "remove", e))
    }

    fn sweep(&self) -> Result<(), StoreError> {
        // Neither the folder nor a file in it may be a link: whoever else can write to the vault's folder could have it
        // point at files of others.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(folder) = openat(CWD, self.shared.root.join(TMP), flags, Mode::empty()) else { return Ok(()) };
        for entry in self.list(TMP)?.iter().filter(|entry| is_temporary(&entry.name) && !entry.is_folder) {
            // Whoever still writes holds the lock; what can't be opened or removed now is left for the next sweep. Opened
            // for writing, because network file systems take no exclusive lock otherwise.
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(file) = openat(&folder, &*entry.name, flags, Mode::empty()) else { continue };
            let file = File::from(file);
            let regular = file.metadata().is_ok_and(|data| data.is_file());
            if regular && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = unlinkat(&folder, &*entry.name, AtFlags::empty());
            }
        }
        Ok(())
    }

    fn lease(&self, key: &str, bytes: &[u8], _: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        let mut upload = self.begin(key)?;
        upload.append(bytes)?;
        let linked = || -> io::Result<()> {
            let folder = upload.target.parent().ok_or(io::ErrorKind::InvalidInput)?;
            self.shared.ensure_folder(folder)?;
            std::fs::hard_link(&upload.path, &upload.target)
        };
        linked().map_err(|e| io_error(key, "make", e))?;
        Ok(Box::new(LocalLease(upload)))
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        // Read before it is asked for: it may go in between, but not come.
        let bytes = self.get(key, MAX_LEASE).unwrap_or_default();
        Ok(self.is_held(key)?.then_some(Standing { bytes, is_silent: false }))
    }
}

impl Local {
    /// Whether the process that made a lease still has it. What is left of one that nobody has is removed.
    fn is_held(&self, key: &str) -> Result<bool, StoreError> {
        let path = self.shared.path(key)?;
        // Opened for writing, because network file systems take no exclusive lock otherwise; and never a link or a pipe.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(|e| io_error(key, "open", e))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(true),
            other => other.map_err(|e| io_error(key, "lock", e.into()))?,
        }
        // Its name may have been taken by another lease since it was opened. Who removes one has it locked, so what has
        // the name now is this file, or has a process.
        let remove = || match is_same_file(&file, &path)? {
            true => std::fs::remove_file(&path).map(|()| false),
            false => Ok(path.symlink_metadata().is_ok()),
        };
        match remove() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            other => other.map_err(|e| io_error(key, "delete", e)),
        }
    }
}

/// The locked file. Its first name, under `tmp/`, goes with it too.
struct LocalLease(LocalUpload);

impl Lease for LocalLease {
    fn check(&self) -> Result<(), StoreError> {
        // It ends with the process.
        Ok(())
    }

    fn take_back(&self, key: &str) -> Result<(), StoreError> {
        let path = self.0.shared.path(key)?;
        std::fs::remove_file(&path).map_err(|e| io_error(key, "delete", e))
    }
}

impl Drop for LocalLease {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0.target);
    }
}

struct LocalUpload {
    shared: Arc<Shared>,
    key: String,
    target: PathBuf,
    file: File,
    path: PathBuf,
}

impl LocalUpload {
    fn commit(&self) -> io::Result<()> {
        // A failed sync is not tried again: the kernel may have dropped the pages, and a second one would lie.
        self.file.sync_all()?;
        let folder = self.target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        self.shared.ensure_folder(folder)?;
        match std::fs::hard_link(&self.path, &self.target) {
            // Over a network the answer to a link that was made may be lost, and the link then tried again.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.is_linked()? => {}
            other => other?,
        }
        let synced = self.sync_folder();
        if synced.is_err() {
            // Not known to be durable, so nobody may build on it.
            let _ = std::fs::remove_file(&self.target);
        }
        synced
    }

    /// Replaces what is under the key.
    fn take_place(&self) -> io::Result<()> {
        match std::fs::rename(&self.path, &self.target) {
            // The answer to a rename that was made may be lost too.
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.is_linked()? => {}
            other => other?,
        }
        self.sync_folder()
    }

    fn sync_folder(&self) -> io::Result<()> {
        let folder = self.target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        File::open(folder)?.sync_all()
    }

    fn is_linked(&self) -> io::Result<bool> {
        is_same_file(&self.file, &self.target)
    }
}

fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    let (ours, theirs) = (file.metadata()?, std::fs::metadata(path)?);
    Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
}

impl Upload for LocalUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|e| io_error(&self.key, "write", e))
    }

    fn finish(self: Box<Self>) -> Result<(), StoreError> {
        self.commit().map_err(|e| match io_error(&self.key, "write", e) {
            StoreError::NotFound(key) => StoreError::Io { key, action: "link", source: io::ErrorKind::NotFound.into() },
            StoreError::Io { key, source, .. } if source.kind() == io::ErrorKind::PermissionDenied => StoreError::Io {
                key,
                action: "link (a vault needs a file system with hard links, and the right to write)",
                source,
            },
            other => other,
        })
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        // Once linked under its key this is a second name; before that it is all there is. A sweep removes what stays.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Local) {
        let folder = tempfile::tempdir().unwrap();
        let store = Local::new(folder.path().join("vault"));
        (folder, store)
    }

    #[test]
    fn what_is_doubted_is_opened_anew() {
        let (folder, store) = store();
        store.create("a/b", b"old").unwrap();
        let read = || {
            let mut bytes = [0; 3];
            store.read_at("a/b", 0, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(&read(), b"old");
        let other = folder.path().join("other");
        std::fs::write(&other, b"new").unwrap();
        std::fs::rename(other, folder.path().join("vault/a/b")).unwrap();
        assert_eq!(&read(), b"old", "the file that is open");
        store.doubt("a/b");
        assert_eq!(&read(), b"new");
    }

    #[test]
    fn a_lease_is_held_until_it_is_dropped_or_its_process_is_gone() {
        let (_folder, store) = store();
        let lease = store.lease("t/leases/1.lease", b"who", LeaseUse::Changing).unwrap();
        assert!(store.is_held("t/leases/1.lease").unwrap());
        assert!(matches!(store.lease("t/leases/1.lease", b"other", LeaseUse::Changing), Err(StoreError::Exists(_))));
        store.sweep().unwrap();
        assert_eq!(store.get("t/leases/1.lease", 9).unwrap(), b"who");
        drop(lease);
        assert!(!store.is_held("t/leases/1.lease").unwrap());
        assert_eq!((store.list("t/leases").unwrap(), store.list(TMP).unwrap()), (vec![], vec![]));
        // What a process that was killed leaves: the file, without a lock.
        store.create("t/leases/2.lease", b"who").unwrap();
        assert!(!store.is_held("t/leases/2.lease").unwrap());
        assert_eq!(store.list("t/leases").unwrap(), []);
    }

    #[test]
    fn objects_are_created_once_and_read_back() {
        let (_folder, store) = store();
        store.create("a/b/c", b"hello").unwrap();
        assert!(matches!(store.create("a/b/c", b"other"), Err(StoreError::Exists(_))));
        assert_eq!(store.get("a/b/c", 5).unwrap(), b"hello");
        assert!(matches!(store.get("a/b/c", 4), Err(StoreError::TooLong { length: 5, .. })));
        assert!(matches!(store.get("a/b/d", 4), Err(StoreError::NotFound(_))));
        assert_eq!(store.read_tail("a/b/c", 3).unwrap(), (b"llo".to_vec(), 5));
        assert_eq!(store.read_tail("a/b/c", 30).unwrap(), (b"hello".to_vec(), 5));
        let mut two = [0; 2];
        store.read_at("a/b/c", 1, &mut two).unwrap();
        assert_eq!(&two, b"el");
        assert!(matches!(store.read_at("a/b/c", 4, &mut two), Err(StoreError::Short { length: 5, wanted: 6, .. })));
        assert!(store.try_read_at("a/b/c", 1, &mut two).unwrap());
        assert_eq!(store.list("a/").unwrap(), [Entry { name: "b".into(), length: 0, is_folder: true }]);
        assert_eq!(store.list("none/").unwrap(), []);
        assert_eq!(store.list("").unwrap().len(), 2, "a and tmp");
        assert_eq!(store.list("tmp/").unwrap(), [], "nothing temporary stays");
        store.delete("a/b/c").unwrap();
        assert!(matches!(store.get("a/b/c", 5), Err(StoreError::NotFound(_))));
    }

    #[test]
    fn no_key_leaves_the_root() {
        let (_folder, store) = store();
        for key in ["../x", "a/../../x", "/etc/x", "a//b", "", "a/./b", "a\0b"] {
            assert!(store.create(key, b"x").is_err(), "{key:?}");
        }
    }

    #[test]
    fn of_many_that_create_one_wins() {
        let (_folder, store) = store();
        let won = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..16u8)
                .map(|n| {
                    scope.spawn({
                        let store = &store;
                        move || store.create("k", &[n]).is_ok()
                    })
                })
                .collect();
            tries.into_iter().filter(|_| true).map(|t| t.join().unwrap()).filter(|&won| won).count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn an_object_is_replaced_only_where_it_is_what_was_expected() {
        let (_folder, store) = store();
        store.create("a/b", b"one").unwrap();
        store.read_at("a/b", 0, &mut [0; 3]).unwrap();
        store.replace("a/b", b"one", b"second").unwrap();
        assert_eq!(store.get("a/b", 9).unwrap(), b"second");
        for wrong in [&b"one"[..], b"secone", b"", b"second "] {
            assert!(matches!(store.replace("a/b", wrong, b"3"), Err(StoreError::Changed(_))), "{wrong:?}");
        }
        store.replace("a/b", b"one", b"second").unwrap();
        assert!(matches!(store.replace("a/c", b"one", b"two"), Err(StoreError::NotFound(_))));
        assert!(matches!(store.replace("a", b"one", b"two"), Err(StoreError::NotAFile(_))));
        assert_eq!(store.read_tail("a/b", 9).unwrap().0, b"second", "an open file is no memory of it here");
        assert_eq!(store.list("tmp/").unwrap(), [], "nothing temporary stays");
        assert_eq!(store.list("a/").unwrap().len(), 1);
    }

    #[test]
    fn of_many_that_replace_each_step_is_made_by_one() {
        let (folder, store) = store();
        store.create("k", b"0").unwrap();
        let root = folder.path().join("vault");
        let done = std::thread::scope(|scope| {
            let count = || {
                // As in another process: with files of its own.
                let store = Local::new(&root);
                let mut done = 0;
                for _ in 0..50 {
                    let now = store.get("k", 9).unwrap();
                    let number: u32 = std::str::from_utf8(&now).unwrap().parse().unwrap();
                    let salted = format!("{}", number + 1);
                    match store.replace("k", &now, salted.as_bytes()) {
                        Ok(()) => done += 1,
                        Err(StoreError::Changed(_)) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
                done
            };
            let tries: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
            tries.into_iter().map(|t| t.join().unwrap()).sum::<u32>()
        });
        let number: u32 = String::from_utf8(store.get("k", 9).unwrap()).unwrap().parse().unwrap();
        // Two that write the same bytes both succeed.
        assert!((1..=done).contains(&number), "{number} of {done}");
        assert_eq!(store.list("tmp").unwrap(), []);
    }

    #[test]
    fn a_lock_that_a_killed_process_left_is_no_obstacle() {
        let (folder, store) = store();
        store.create("k", b"1").unwrap();
        let left = folder.path().join("vault/tmp").join(REPLACE_LOCK);
        std::fs::write(&left, b"").unwrap();
        store.replace("k", b"1", b"2").unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn empty_folders_go_and_others_stay() {
        let (folder, store) = store();
        for key in ["t/a/b/1", "t/a/c/2", "t/d/3"] {
            store.create(key, b"x").unwrap();
        }
        for key in ["t/a/b/1", "t/a/c/2"] {
            store.delete(key).unwrap();
        }
        store.remove_empty("t/").unwrap();
        let root = folder.path().join("vault");
        assert!(!root.join("t/a").exists() && root.join("t/d/3").exists());
        store.create("t/a/b/1", b"x").unwrap();
        store.remove_empty("none").unwrap();
    }

    #[test]
    fn a_sweep_removes_what_is_abandoned_and_nothing_else() {
        let (folder, store) = store();
        let mut upload = store.upload("k").unwrap();
        upload.append(b"x").unwrap();
        let abandoned = folder.path().join("vault/tmp").join("d".repeat(32));
        std::fs::write(&abandoned, b"x").unwrap();
        let foreign = folder.path().join("vault/tmp/thesis.txt");
        std::fs::write(&foreign, b"x").unwrap();
        Local::new(folder.path().join("vault")).sweep().unwrap();
        assert!(!abandoned.exists());
        assert!(foreign.exists(), "a name that is not ours");
        upload.finish().unwrap();
        assert_eq!(store.get("k", 1).unwrap(), b"x");
    }

    #[test]
    fn what_is_no_regular_file_is_no_object_and_never_waited_for() {
        let (folder, store) = store();
        store.create("a/b", b"x").unwrap();
        let root = folder.path().join("vault");
        rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, root.join("tmp/pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        std::os::unix::fs::symlink(root.join("loop"), root.join("loop")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", root.join("zero")).unwrap();
        for key in ["a", "pipe", "loop", "zero"] {
            assert!(matches!(store.get(key, 9), Err(StoreError::NotAFile(_))), "{key}");
            assert!(matches!(store.read_at(key, 0, &mut [0]), Err(StoreError::NotAFile(_))), "{key}");
            assert!(matches!(store.read_tail(key, 9), Err(StoreError::NotAFile(_))), "{key}");
        }
        store.sweep().unwrap();
    }

    #[test]
    fn a_sweep_follows_no_link() {
        let (folder, store) = store();
        store.create("k", b"x").unwrap();
        let elsewhere = folder.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let file = elsewhere.join("e".repeat(32));
        std::fs::write(&file, b"x").unwrap();
        std::fs::remove_dir(folder.path().join("vault/tmp")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, folder.path().join("vault/tmp")).unwrap();
        store.sweep().unwrap();
        assert!(file.exists());
    }

    #[test]
    fn a_root_that_leads_nowhere_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(folder.path().join("not-mounted/x"), folder.path().join("vault")).unwrap();
        assert!(Local::new(folder.path().join("vault")).create("a/b", b"x").is_err());
    }

    #[test]
    fn an_unfinished_object_never_existed() {
        let (_folder, store) = store();
        store.upload("k").unwrap().append(b"x").unwrap();
        assert!(matches!(store.get("k", 1), Err(StoreError::NotFound(_))));
        assert_eq!(store.list("tmp").unwrap(), []);
    }
}
