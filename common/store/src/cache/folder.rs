//! The folder of the cache, which several processes share: which files it has, and how much of it may stay.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, OFlags, flock};

use super::chunks::{Chunks, Name};

/// Files that are kept open.
const OPEN: NonZeroUsize = NonZeroUsize::new(512).expect("it is more than none");
/// Who removes some has this locked.
const LOCK: &str = "evict.lock";
/// How often a file that is read is said to be used.
const TOUCH: Duration = Duration::from_secs(60);
/// Once there is too much, so many eighths of what may stay do.
const STAYS: u64 = 7;
/// After a process has added so little of what may stay, it counts again: others add, too.
const RECOUNT: u64 = 16;

pub(super) struct Folder {
    path: PathBuf,
    limit: u64,
    open: Mutex<LruCache<Name, (Arc<Chunks>, Instant)>>,
    /// About how many bytes are in it: what was found the last time that was counted, and what was added since.
    used: AtomicU64,
    /// What was added since it was counted.
    added: AtomicU64,
}

struct Found {
    path: PathBuf,
    bytes: u64,
    used: i64,
}

impl Folder {
    /// Makes the folder, if need be.
    pub(super) fn open(path: &Path, limit: u64) -> io::Result<Folder> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let (open, used, added) = (Mutex::new(LruCache::new(OPEN)), AtomicU64::new(0), AtomicU64::new(0));
        let folder = Folder { path: path.to_owned(), limit, open, used, added };
        folder.count();
        Ok(folder)
    }

    /// How many bytes may stay.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    fn file(&self, name: &Name) -> PathBuf {
        let hex: String = name[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        self.path.join(&hex[..2]).join(hex)
    }

    /// What is kept of an object. Where nothing can be kept, nothing is.
    pub(super) fn chunks(&self, name: &Name) -> Option<Arc<Chunks>> {
        let mut open = self.open.lock();
        if let Some((chunks, touched)) = open.get_mut(name) {
            if touched.elapsed() < TOUCH {
                return Some(chunks.clone());
            }
            if !chunks.is_removed() {
                *touched = Instant::now();
                chunks.touch();
                return Some(chunks.clone());
            }
        }
        let path = self.file(name);
        let file = match create(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().recursive(true).mode(0o700).create(path.parent()?).ok()?;
                create(&path).ok()?
            }
            other => other.ok()?,
        };
        let chunks = Arc::new(Chunks::new(file, *name));
        chunks.touch();
        open.put(*name, (chunks.clone(), Instant::now()));
        Some(chunks)
    }

    /// Forgets an object.
    pub(super) fn remove(&self, name: &Name) {
        let open = self.open.lock().pop(name);
        if let Some((chunks, _)) = open {
            chunks.empty();
        }
        let _ = std::fs::remove_file(self.file(name));
    }

    /// Says that so many bytes were added to one. Should that be too much, others go.
    pub(super) fn added(&self, name: &Name, chunks: &Chunks, bytes: u64) {
        // What was removed meanwhile takes space for nobody.
        if chunks.is_removed() {
            self.open.lock().pop(name);
            return;
        }
        let mut used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if self.added.fetch_add(bytes, Ordering::Relaxed) + bytes > self.limit / RECOUNT {
            self.count();
            used = self.used.load(Ordering::Relaxed);
        }
        if used > self.limit {
            self.evict();
        }
    }

    /// All files of objects, however old the process is that made them.
    fn found(&self) -> Vec<Found> {
        let below = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
        let shelves = below(&self.path).filter(|entry| entry.file_name().len() == 2);
        let files = shelves.flat_map(|shelf| below(&shelf.path()).collect::<Vec<_>>());
        let found = files.filter_map(|entry| {
            let data = entry.metadata().ok().filter(|data| data.is_file() && entry.file_name().len() == 32)?;
            Some(Found { path: entry.path(), bytes: data.blocks() * 512, used: data.mtime() })
        });
        found.collect()
    }

    fn count(&self) -> Vec<Found> {
        self.added.store(0, Ordering::Relaxed);
        let found = self.found();
        self.used.store(found.iter().map(|file| file.bytes).sum(), Ordering::Relaxed);
        found
    }

    /// Removes those that were not used for longest.
    fn evict(&self) {
        let Ok(lock) = create(&self.path.join(LOCK)) else { return };
        // Another process, or thread, does just that.
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return;
        }
        let mut found = self.count();
        found.sort_by_key(|file| file.used);
        let mut used = self.used.load(Ordering::Relaxed);
        for file in found {
            if used <= self.limit / 8 * STAYS {
                break;
            }
            // Its space comes back also where others have it open.
            if let Ok(open) = create(&file.path) {
                let _ = open.set_len(0);
            }
            let _ = std::fs::remove_file(&file.path);
            used = used.saturating_sub(file.bytes);
        }
        self.used.store(used, Ordering::Relaxed);
    }
}

/// Opens a file, which is made if there is none. It is never a link.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()).open(path)
}

#[cfg(test)]
mod tests {
    use super::super::chunks::{CHUNK, CHUNK_BYTES};
    use super::*;

    #[test]
    fn those_that_were_not_used_for_longest_go_and_their_space_comes_back() {
        let at = tempfile::tempdir().unwrap();
        let limit = 64 * CHUNK;
        let folder = Folder::open(&at.path().join("cache"), limit).unwrap();
        let other = Folder::open(&at.path().join("cache"), limit).unwrap();
        let bytes = vec![7; 16 * CHUNK_BYTES];
        let old = other.chunks(&[0; 32]).unwrap();
        for nth in 0..8u8 {
            let chunks = folder.chunks(&[nth; 32]).unwrap();
            chunks.write(0, &bytes, bytes.len() as u64).unwrap();
            let used = std::time::UNIX_EPOCH + Duration::from_secs(1000 + u64::from(nth));
            let path = folder.file(&[nth; 32]);
            File::options().write(true).open(path).unwrap().set_modified(used).unwrap();
            folder.added(&[nth; 32], &chunks, bytes.len() as u64);
        }
        assert!(folder.found().iter().map(|file| file.bytes).sum::<u64>() <= limit);
        assert!(!folder.file(&[0; 32]).exists() && folder.file(&[7; 32]).exists());
        assert_eq!(old.read(0..1, &mut Vec::new()), 0, "emptied for those who have it open, too");
        assert!(old.is_removed());
        folder.remove(&[7; 32]);
        assert!(!folder.file(&[7; 32]).exists());
    }

    #[test]
    fn the_limit_is_one_for_all_who_share_the_folder() {
        let at = tempfile::tempdir().unwrap();
        let limit = 64 * CHUNK;
        let folders: Vec<Folder> = (0..4).map(|_| Folder::open(&at.path().join("cache"), limit).unwrap()).collect();
        let bytes = vec![7; 4 * CHUNK_BYTES];
        let mut most = 0;
        for nth in 0..=255u8 {
            let folder = &folders[usize::from(nth) % folders.len()];
            let chunks = folder.chunks(&[nth; 32]).unwrap();
            chunks.write(0, &bytes, bytes.len() as u64).unwrap();
            folder.added(&[nth; 32], &chunks, bytes.len() as u64);
            most = most.max(folder.found().iter().map(|file| file.bytes).sum::<u64>());
        }
        // Each may have added a sixteenth, and what it adds at once, since it has counted.
        assert!(most <= limit + limit / RECOUNT * 4 + 4 * 4 * CHUNK, "{most} of {limit}");
    }
}
