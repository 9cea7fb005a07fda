//! The folder of an overlay, which one process has at a time.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::document::{Document, FILE};
use super::moved::{MOVED, NEW_MOVED};

const DOCUMENT: &str = "overlay.json";
/// What it is called before it is whole.
const NEW: &str = "overlay.json.new";
const LOCK: &str = "lock";
/// Longest `overlay.json` that is read: 256 disks take far less.
const MAX_DOCUMENT: u64 = 1 << 20;
/// How often, and with which pause, a lock is tried: who lists overlays holds it for a moment.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// Why a folder is no overlay's, or not ours now.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("can't {action} {}: {source}", .path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the overlay in {} is in use by another process; end that, or choose another folder", .0.display())]
    InUse(PathBuf),
    #[error(
        "a VM that still runs needs the overlay in {}, whoever serves it or not: `reseal boot` with --overlay takes it up again; end it first",
        .0.display()
    )]
    Vm(PathBuf),
    #[error("{} holds other things than an overlay; choose an empty folder, or one that does not exist yet", .0.display())]
    Foreign(PathBuf),
    #[error("{} holds no overlay", .0.display())]
    Nothing(PathBuf),
    #[error("{} can't be understood: {why}", .path.display())]
    Malformed { path: PathBuf, why: String },
}

/// A folder that nobody else has.
pub struct Folder {
    path: PathBuf,
    /// Locked until it is closed.
    _lock: File,
}

pub(super) fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> FolderError + 'a {
    move |source| FolderError::Io { action, path: path.to_owned(), source }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
    options
}

/// Makes a folder of mode 0700, and those above it.
pub(super) fn make(path: &Path) -> Result<(), FolderError> {
    if !path.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
        if let Some(above) = path.parent() {
            sync_folder(above)?;
        }
    }
    Ok(())
}

/// Makes durable which files a folder has.
pub(super) fn sync_folder(path: &Path) -> Result<(), FolderError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path).and_then(|folder| folder.sync_all()).map_err(failed("make durable", path))
}

/// Whether a file of that name is one that we make.
fn is_ours(name: &str) -> bool {
    matches!(name, DOCUMENT | NEW | LOCK | MOVED | NEW_MOVED)
        || name.strip_suffix(FILE).is_some_and(|rest| rest.ends_with('.'))
}

/// Names in a folder; those that can't be of ours as something that is not.
fn names(path: &Path) -> Result<Vec<String>, FolderError> {
    let entries = fs::read_dir(path).map_err(failed("list", path))?;
    entries
        .map(|entry| Ok(entry.map_err(failed("list", path))?.file_name().into_string().unwrap_or_else(|_| "?".into())))
        .collect()
}

impl Folder {
    /// Takes a folder for an overlay that is there, or is to be: then it must be empty, or not there yet.
    pub fn take(path: &Path) -> Result<Folder, FolderError> {
        make(path)?;
        let foreign = || FolderError::Foreign(path.to_owned());
        let found = names(path)?;
        if !found.iter().any(|name| name == DOCUMENT) {
            if !found.iter().all(|name| is_ours(name)) {
                return Err(foreign());
            }
            fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed("make private", path))?;
        }
        Folder::lock(path)
    }

    /// Takes the folder of an overlay that is there.
    pub fn existing(path: &Path) -> Result<Folder, FolderError> {
        match fs::symlink_metadata(path.join(DOCUMENT)).is_ok_and(|data| data.is_file()) {
            true => Folder::lock(path),
            false => Err(FolderError::Nothing(path.to_owned())),
        }
    }

    fn lock(path: &Path) -> Result<Folder, FolderError> {
        let file = path.join(LOCK);
        for _ in 0..TRIES {
            let lock = private().create(true).open(&file).map_err(failed("open", &file))?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(e) => return Err(failed("lock", &file)(e.into())),
            }
            // Who dropped the overlay meanwhile took the file away with it.
            let locked = lock.metadata().map_err(failed("look at", &file))?;
            let is_same = |now: fs::Metadata| (now.dev(), now.ino()) == (locked.dev(), locked.ino());
            if fs::symlink_metadata(&file).is_ok_and(is_same) {
                return Ok(Folder { path: path.to_owned(), _lock: lock });
            }
        }
        Err(FolderError::InUse(path.to_owned()))
    }

    /// Whether some process has the folder now.
    pub fn is_in_use(path: &Path) -> bool {
        let Ok(lock) =
            OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path.join(LOCK))
        else {
            return false;
        };
        matches!(flock(&lock, FlockOperation::NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the folder holds, if it is an overlay.
    pub fn document(path: &Path) -> Result<Option<Document>, FolderError> {
        let file = path.join(DOCUMENT);
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&file);
        let opened = match opened {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("open", &file))?,
        };
        let mut bytes = Vec::new();
        opened.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(failed("read", &file))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(FolderError::Malformed { path: file, why: "it is too long".into() });
        }
        Document::decode(&bytes).map(Some).map_err(|why| FolderError::Malformed { path: file, why })
    }

    /// Takes away what a process that died while it made the overlay has left.
    pub fn clear(&self) -> Result<(), FolderError> {
        for name in names(&self.path)?.iter().filter(|name| is_ours(name) && *name != LOCK) {
            let file = self.path.join(name);
            fs::remove_file(&file).map_err(failed("remove", &file))?;
        }
        Ok(())
    }

    /// Makes the overlay exist. All that it names must be durable already.
    pub fn put(&self, document: &Document) -> Result<(), FolderError> {
        let (new, file) = (self.path.join(NEW), self.path.join(DOCUMENT));
        let mut opened = private().create_new(true).open(&new).map_err(failed("make", &new))?;
        opened.write_all(&document.encode()).and_then(|()| opened.sync_all()).map_err(failed("write", &new))?;
        fs::rename(&new, &file).map_err(failed("make", &file))?;
        sync_folder(&self.path)
    }

    /// Makes the file of a disk.
    pub fn create_file(&self, name: &str) -> Result<File, FolderError> {
        let file = self.path.join(name);
        private().create_new(true).open(&file).map_err(failed("make", &file))
    }

    /// Opens the file of a disk.
    pub fn open_file(&self, name: &str) -> Result<File, FolderError> {
        let file = self.path.join(name);
        let opened = private().open(&file).map_err(failed("open", &file))?;
        match opened.metadata().map_err(failed("look at", &file))?.is_file() {
            true => Ok(opened),
            false => Err(FolderError::Malformed { path: file, why: "it is no file".into() }),
        }
    }

    /// Makes durable which files there are.
    pub fn sync(&self) -> Result<(), FolderError> {
        sync_folder(&self.path)
    }

    /// Removes the overlay, and the folder if nothing else is in it.
    pub fn remove(self) -> Result<(), FolderError> {
        // It first: what is left without it is no overlay any more.
        let file = self.path.join(DOCUMENT);
        match fs::remove_file(&file) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("remove", &file)(e)),
            _ => self.sync()?,
        }
        self.clear()?;
        let lock = self.path.join(LOCK);
        fs::remove_file(&lock).map_err(failed("remove", &lock))?;
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() != ErrorKind::DirectoryNotEmpty => Err(failed("remove", &self.path)(e)),
            _ => Ok(()),
        }
    }
}

/// Makes a file that is gone when it is closed.
pub(super) fn nameless(folder: &Path) -> Result<File, FolderError> {
    let name: [u8; 16] = reseal_vault::random().map_err(|e| failed("make a file in", folder)(io::Error::other(e)))?;
    let name = reseal_format::ids::OverlayId::from_bytes(name);
    let file = folder.join(format!("{name}.{FILE}"));
    let opened = private().create_new(true).open(&file).map_err(failed("make", &file))?;
    fs::remove_file(&file).map_err(failed("unlink", &file))?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_processs_and_only_an_empty_one_becomes_an_overlays() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("a/b");
        let folder = Folder::take(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(path.join(LOCK)).unwrap().mode() & 0o777, 0o600);
        assert!(Folder::is_in_use(&path));
        assert!(matches!(Folder::take(&path), Err(FolderError::InUse(_))));
        assert!(matches!(Folder::existing(&path), Err(FolderError::Nothing(_))));
        drop(folder);
        assert!(!Folder::is_in_use(&path));
        // What somebody who died has left is no hindrance; what is not ours is.
        fs::write(path.join("x.overlay"), b"").unwrap();
        fs::write(path.join(NEW), b"").unwrap();
        let folder = Folder::take(&path).unwrap();
        folder.clear().unwrap();
        assert_eq!(names(&path).unwrap(), [LOCK]);
        drop(folder);
        fs::write(path.join("letter.txt"), b"").unwrap();
        assert!(matches!(Folder::take(&path), Err(FolderError::Foreign(_))));
        assert!(path.join("letter.txt").exists());
    }

    #[test]
    fn files_and_links_that_are_no_overlay_are_refused_without_waiting() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path();
        std::os::unix::fs::symlink("/etc/passwd", path.join(DOCUMENT)).unwrap();
        assert!(Folder::document(path).is_err());
        fs::remove_file(path.join(DOCUMENT)).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path.join(DOCUMENT), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(Folder::document(path).is_err(), "nobody writes to a pipe");
        fs::remove_file(path.join(DOCUMENT)).unwrap();
        File::create(path.join(DOCUMENT)).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(Folder::document(path), Err(FolderError::Malformed { .. })));
    }
}
