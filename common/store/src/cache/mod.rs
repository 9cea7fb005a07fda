//! A cache of an object store on a disk, as the store has it: sealed.
//!
//! ```text
//! read → chunks that are kept → or that are under way: waited for → or fetched, the gap in one request
//! expect → chunks that are not kept ⇉ requests beside each other ⇉ kept
//! ```
//!
//! Several processes share a folder, and it outlives them. What is in it is not trusted: what is read of packs is sealed, and whoever reads it
//! verifies that each time, wherever it is from. Where that fails he says so ([`Store::doubt`]): nothing of that object is kept any longer, and it is
//! asked for anew. Their ends, which are partly in clear, are compared with marks before.
//!
//! Objects that are replaced are never kept: they are read by [`Store::get`].

mod chunks;
mod flights;
mod folder;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::{Bucket, Entry, Lease, LeaseUse, Lock, LockMode, Standing, Store, StoreError, Upload};
use chunks::{CHUNK, CHUNK_BYTES, Chunks, Name, Wait, chunks_of};
use flights::Flights;
use folder::Folder;

/// How long what another one fetches is waited for, before it is fetched once more.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long who expects something waits for room to ask for it.
const ROOM: Duration = Duration::from_secs(5);
/// At least so many chunks are fetched: neighbours are wanted together, and the time of a request is that of more bytes than these.
const LEAST: u64 = 16;
/// A cache that may have so much keeps what was expected until it is wanted.
const ROOMY: u64 = 1 << 30;
/// Most that is fetched in one request for a read that was not expected.
const MOST: u64 = 8 << 20;

/// A bucket with a cache before it.
pub struct Cached {
    bucket: Bucket,
    shared: Arc<Shared>,
}

struct Shared {
    folder: Folder,
    flights: Arc<Flights>,
    /// What makes names of keys: the same key in another bucket is another object.
    names: [u8; 32],
}

impl Shared {
    fn name(&self, key: &str) -> Name {
        *blake3::keyed_hash(&self.names, key.as_bytes()).as_bytes()
    }

    /// Keeps what was fetched from that chunk on.
    fn keep(&self, name: &Name, first: u64, bytes: &[u8], length: u64) {
        // Where nothing can be kept, what is read is right all the same.
        let Some(chunks) = self.folder.chunks(name) else { return };
        if chunks.write(first, bytes, length).is_ok() {
            self.folder.added(name, &chunks, bytes.len() as u64);
        }
    }
}

impl Cached {
    /// A cache of the bucket at that address, of at most about `limit` bytes in a folder.
    pub fn new(bucket: Bucket, address: &str, folder: &Path, limit: u64) -> io::Result<Cached> {
        let folder = Folder::open(folder, limit)?;
        let names = blake3::derive_key("reseal 2026-11 cache of an object store", address.as_bytes());
        let shared = Shared { folder, flights: Arc::default(), names };
        Ok(Cached { bucket, shared: Arc::new(shared) })
    }

    /// Reads chunks from the store and keeps them.
    fn fetch(&self, key: &str, name: &Name, chunks: Range<u64>) -> Result<(Vec<u8>, u64), StoreError> {
        // Nobody else needs to ask for them; if somebody does already, or too many others, this one asks all the same: it is waited for.
        let _flight = self.shared.flights.begin(name, chunks.clone(), Duration::ZERO);
        let (parts, length) = self.bucket.fetch(key, chunks.start * CHUNK..chunks.end * CHUNK)?;
        let bytes = parts.concat();
        self.shared.keep(name, chunks.start, &bytes, length);
        Ok((bytes, length))
    }

    /// Begins to fetch chunks that are not kept, in the background.
    fn fetch_later(&self, key: &str, name: Name, chunks: Range<u64>) -> bool {
        if self.shared.flights.has(&name, &chunks) {
            return true;
        }
        let Some(flight) = self.shared.flights.begin(&name, chunks.clone(), ROOM) else { return false };
        let shared = self.shared.clone();
        let then = move |fetched: Result<(Vec<Bytes>, u64), StoreError>| {
            // What fails here fails again for who wants it, and is told then.
            if let Ok((parts, length)) = fetched {
                shared.keep(&name, chunks.start, &parts.concat(), length);
            }
            drop(flight);
        };
        self.bucket.fetch_then(key, chunks.start * CHUNK..chunks.end * CHUNK, then).is_ok()
    }
}

/// The end of an object, from chunks that are what was written; and its length.
fn tail(chunks: &Chunks, want: u64) -> Option<(Vec<u8>, u64)> {
    let length = chunks.length()?;
    let from = length.saturating_sub(want);
    let wanted = chunks_of(&(from..length));
    let mut bytes = Vec::new();
    let there = chunks.read(wanted.clone(), &mut bytes);
    let skipped = usize::try_from(from - wanted.start * CHUNK).ok()?;
    (there == wanted.end - wanted.start && bytes.len() as u64 == length - wanted.start * CHUNK)
        .then(|| (bytes.split_off(skipped), length))
}

impl Store for Cached {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        self.bucket.get(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if buf.is_empty() {
            return Ok(());
        }
        let name = self.shared.name(key);
        let end = offset.saturating_add(buf.len() as u64);
        if buf.len() as u64 > MOST || end >= u64::MAX / 2 {
            return self.bucket.read_at(key, offset, buf);
        }
        let wanted = chunks_of(&(offset..end));
        let mut missing = wanted.clone();
        let mut more = 0..0;
        if let Some(chunks) = self.shared.folder.chunks(&name) {
            for _ in 0..2 {
                if chunks.fill(offset, buf, Wait::May) {
                    return Ok(());
                }
                missing = chunks.missing(wanted.clone()).unwrap_or_else(|| wanted.clone());
                if !self.shared.flights.wait(&name, &missing, PATIENCE) {
                    break;
                }
            }
            let end = chunks.length().map_or(missing.end, |length| length.div_ceil(CHUNK));
            let next = missing.end..(missing.start + LEAST).min(end);
            more = chunks.missing(next.clone()).filter(|more| more.start == next.start).unwrap_or(0..0);
        }
        // What comes behind the gap is fetched, too: it is asked for in any case.
        missing.end = wanted.end;
        let (bytes, length) = self.fetch(key, &name, missing.start..missing.end.max(more.end))?;
        if end > length {
            return Err(StoreError::Short { key: key.into(), length, wanted: end });
        }
        // What is kept was copied to `buf` only if all was: so the part before the gap is once more.
        let from = missing.start * CHUNK;
        let first = usize::try_from(from.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let skipped = usize::try_from(offset.saturating_sub(from)).unwrap_or(usize::MAX);
        let (before, rest) = buf.split_at_mut(first);
        match bytes.get(skipped..).and_then(|bytes| bytes.get(..rest.len())) {
            Some(part) => rest.copy_from_slice(part),
            None => return Err(StoreError::Short { key: key.into(), length, wanted: end }),
        }
        let kept = self.shared.folder.chunks(&name);
        let is_there = before.is_empty() || kept.is_some_and(|kept| kept.fill(offset, before, Wait::May));
        match is_there {
            true => Ok(()),
            false => self.bucket.read_at(key, offset, buf),
        }
    }

    fn read_once(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.bucket.read_at(key, offset, buf)
    }

    fn try_read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        let name = self.shared.name(key);
        Ok(self.shared.folder.chunks(&name).is_some_and(|chunks| chunks.fill(offset, buf, Wait::MustNot)))
    }

    fn expect(&self, key: &str, offset: u64, length: u64) -> bool {
        let name = self.shared.name(key);
        let Some(chunks) = self.shared.folder.chunks(&name) else { return false };
        let mut wanted = chunks_of(&(offset..offset.saturating_add(length)));
        if let Some(length) = chunks.length() {
            wanted.end = wanted.end.min(length.div_ceil(CHUNK));
        }
        match chunks.missing(wanted) {
            Some(missing) => self.fetch_later(key, name, missing),
            None => true,
        }
    }

    fn fetches_aside(&self) -> bool {
        self.shared.folder.limit() >= ROOMY
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        // Whether it is there at all: that may change.
        if want == 0 {
            return self.bucket.read_tail(key, want);
        }
        let name = self.shared.name(key);
        if let Some(kept) = self.shared.folder.chunks(&name).and_then(|chunks| tail(&chunks, want as u64)) {
            return Ok(kept);
        }
        // The length is not known, so what comes may begin in the midst of a chunk; whole ones are kept.
        let (tail, length) = self.bucket.read_tail(key, want + CHUNK_BYTES)?;
        let start = length - tail.len() as u64;
        let first = start.div_ceil(CHUNK);
        if let Some(whole) = usize::try_from(first * CHUNK - start).ok().and_then(|skip| tail.get(skip..)) {
            self.shared.keep(&name, first, whole, length);
        }
        let from = tail.len().saturating_sub(want);
        Ok((tail[from..].to_vec(), length))
    }

    fn doubt(&self, key: &str) {
        self.shared.folder.remove(&self.shared.name(key));
    }

    fn is_far(&self) -> bool {
        true
    }

    fn is_past(&self) -> bool {
        self.bucket.is_past()
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.bucket.replace(key, expected, new)
    }

    fn replace_locked(&self, key: &str, expected: &[u8], new: &[u8], lock: Lock) -> Result<(), StoreError> {
        self.bucket.replace_locked(key, expected, new, lock)
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.bucket.create(key, bytes)
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.bucket.upload(key)
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        self.bucket.list(folder)
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.bucket.settle(folder)
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.doubt(key);
        self.bucket.delete(key)
    }

    fn hide(&self, key: &str) -> Result<(), StoreError> {
        self.doubt(key);
        self.bucket.hide(key)
    }

    fn time(&self) -> Result<i64, StoreError> {
        self.bucket.time()
    }

    fn lock(&self, key: &str, lock: Lock) -> Result<(), StoreError> {
        self.bucket.lock(key, lock)
    }

    fn lock_of(&self, key: &str) -> Result<Option<Lock>, StoreError> {
        self.bucket.lock_of(key)
    }

    fn probe_locks(&self, mode: LockMode) -> Result<(), StoreError> {
        self.bucket.probe_locks(mode)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.bucket.sweep()
    }

    fn probe(&self) -> Result<(), StoreError> {
        self.bucket.probe()
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        self.bucket.lease(key, bytes, of)
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        self.bucket.standing(key)
    }

    fn end(&self, key: &str) -> Result<bool, StoreError> {
        self.bucket.end(key)
    }
}
