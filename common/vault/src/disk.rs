//! Reading a disk: bytes of any range, from the caches or from the store.
//!
//! ```text
//! range → clusters → leaf → hole: zeros
//!                         → frame cache, or: blob → open → frames → bytes
//! ```
//!
//! Architecture invariant: every byte that comes out was authenticated, or is of a cluster that an authenticated leaf
//! calls a hole. An error leaves the output undefined and is never answered with it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::{PackHandle, Packs, Tenant, Tree, VaultError, Wait};
use reseal_format::FormatError;
use reseal_format::frames::{FrameDecoder, FrameShift, Frames};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, ClusterIndex, FANOUT_U64, cluster_count};
use reseal_format::ids::PackId;
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::Disk;
use reseal_format::pack::MAX_SEALED;

use crate::frame_cache::{Frame, FrameCache, OVERHEAD};
use crate::wipe::{Buffer, Secret};

/// What a thread needs to open blobs: a decompressor, and the buffer that a blob is read and opened in.
pub struct Tools {
    decoder: FrameDecoder,
    sealed: Buffer,
}

impl Tools {
    /// Fresh ones.
    pub fn new() -> Tools {
        let decoder = FrameDecoder::new().expect("a decompressor is a small allocation");
        // As large as any blob, so that it is never moved.
        Tools { decoder, sealed: Buffer::with_capacity(MAX_SEALED) }
    }
}

impl Default for Tools {
    fn default() -> Tools {
        Tools::new()
    }
}

thread_local! {
    static SCRATCH: RefCell<(Tools, Buffer)> = RefCell::new((Tools::new(), Buffer::default()));
}

/// Runs with this thread's tools and an output buffer of that length.
pub fn with_scratch<T>(length: usize, run: impl FnOnce(&mut Tools, &mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|(tools, out)| run(tools, out.take(length)))
}

/// How much of a pack is fetched around a blob that was not at hand. Neighbours on a disk are neighbours in a pack and are
/// wanted together; reading this much takes little longer than seeking to it.
const AROUND: u64 = 512 * 1024;

/// The same for a stream from a store that is far: each request costs it, and us, more than its bytes.
const STREAM: u64 = 2 << 20;

/// Most that is fetched in one go for [`DiskReader::fetch`].
const FETCHED: usize = 1 << 20;
/// What lies between two blobs that are fetched in one go may be as large as this: reading it takes less long than asking again.
const GAP: u64 = 128 * 1024;

/// Leaves that are had at hand at most: of 256 GiB.
const WARM_LEAVES: u64 = 4096;
/// As many requests at a time.
const WARMERS: u64 = 16;

/// Names what is wrong inside a blob that was authenticated.
fn damaged(blob: BlobRef) -> impl Fn(FormatError) -> VaultError {
    move |source| VaultError::Damaged { object: format!("pack {} blob {}", blob.pack, blob.ordinal), source }
}

/// Where a blob is, as far as is known.
struct Place {
    blob: BlobRef,
    handle: Arc<PackHandle>,
    offset: u64,
    length: usize,
}

impl Place {
    fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    /// Whether another one, which comes after it, is worth fetching with it: so is not one of another generation of the pack.
    fn is_near(&self, next: &Place) -> bool {
        self.handle.key() == next.handle.key() && next.offset.saturating_sub(self.end()) <= GAP
    }
}

/// Reads the disks of one tenant. All that it keeps stays within the bytes that it was given.
pub struct DiskReader {
    tree: Tree,
    frames: FrameCache,
    cache_bytes: AtomicUsize,
    /// Roots of disks for which that was begun: see [`DiskReader::warm`].
    warmed: Mutex<HashSet<(PackId, u32)>>,
}

impl DiskReader {
    /// A reader that keeps at most about so many bytes of frames, index nodes and pack tables.
    pub fn new(tenant: Arc<Tenant>, cache_bytes: usize) -> DiskReader {
        // A quarter each for nodes and tables, which are what a random read needs first, if they need so much; the rest is for
        // frames. `Packs` halves its part again for tables of ids, which no reader asks for: so it is told twice as much.
        let quarter = cache_bytes / 4;
        let packs = Arc::new(Packs::new(tenant, quarter * 2));
        DiskReader {
            tree: Tree::new(packs, quarter),
            frames: FrameCache::new(),
            cache_bytes: AtomicUsize::new(cache_bytes),
            warmed: Mutex::default(),
        }
    }

    /// Keeps at most about so many bytes from now on.
    pub fn resize(&self, cache_bytes: usize) {
        let quarter = cache_bytes / 4;
        self.tree.packs().resize_cache(quarter * 2);
        self.tree.resize_cache(quarter);
        self.cache_bytes.store(cache_bytes, Ordering::Relaxed);
        self.frames.resize(self.room());
    }

    /// Whether each request to the store takes long.
    pub fn is_far(&self) -> bool {
        self.tree.packs().tenant().store().is_far()
    }

    /// Whether clusters that are prepared for take no room among those that are open: see [`Store::fetches_aside`](reseal_store::Store::fetches_aside).
    pub fn fetches_aside(&self) -> bool {
        self.tree.packs().tenant().store().fetches_aside()
    }

    /// Does so in the background, if the store is far; see [`DiskReader::warm`].
    pub fn warm_later(self: &Arc<Self>, disk: &Disk) {
        let Some(root) = disk.root.map(BlobRef::from) else { return };
        if self.is_far() && self.warmed.lock().insert((root.pack, root.ordinal)) {
            let (reader, disk) = (self.clone(), disk.clone());
            // Without it reading is slower at first.
            let _ = std::thread::Builder::new().name("warm".into()).spawn(move || reader.warm(&disk));
        }
    }

    /// Has leaves of a disk at hand, and tables of the packs that they lead to: from a store that is far, each of them would cost who reads
    /// the time of a request. What can't be read now is told to him.
    pub fn warm(&self, disk: &Disk) {
        let leaves = cluster_count(disk.length).div_ceil(FANOUT_U64).min(WARM_LEAVES);
        let (next, known) = (AtomicU64::new(0), Mutex::new(HashSet::new()));
        let one = || {
            while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < leaves) {
                let leaf = match self.tree.leaf(disk, number, Wait::May) {
                    Ok(Some(leaf)) => leaf,
                    Ok(None) => continue,
                    // Whoever reads is told; a store that is away is not asked for all the others, too.
                    Err(_) => return next.store(leaves, Ordering::Relaxed),
                };
                for &(id, generation) in leaf.packs() {
                    if known.lock().insert(id) {
                        self.tree.packs().open_ahead(id, generation);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..WARMERS.min(leaves) {
                let _ = std::thread::Builder::new().name("warm".into()).spawn_scoped(scope, one);
            }
        });
    }

    /// Bytes of frames that it may keep now: what nodes and tables leave.
    fn room(&self) -> usize {
        let others = self.tree.cached_bytes() + self.tree.packs().cached_bytes();
        let all = self.cache_bytes.load(Ordering::Relaxed);
        all.saturating_sub(others).max(all / 2)
    }

    fn put(&self, blob: BlobRef, frame: Frame) -> Arc<Frame> {
        self.frames.put(blob, frame, self.room())
    }

    /// How many of `length` bytes from `offset` on the disk has.
    pub fn clip(disk: &Disk, offset: u64, length: usize) -> usize {
        usize::try_from(disk.length.saturating_sub(offset)).map_or(length, |rest| rest.min(length))
    }

    /// Fills `out` from `offset` on. With [`Wait::MustNot`] it answers [`VaultError::WouldBlock`] where the store might
    /// make it wait.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn read(
        &self,
        disk: &Disk,
        offset: u64,
        out: &mut [u8],
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        self.read_on(disk, offset, out, &mut 0, wait, tools)
    }

    /// The same from byte `done` of `out` on, which grows with what is filled: what was tried without waiting is finished
    /// by somebody who may wait.
    pub fn read_on(
        &self,
        disk: &Disk,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        assert!(offset + out.len() as u64 <= disk.length, "the caller clips a range to the disk");
        if wait == Wait::May && self.is_far() && !self.fetches_aside() {
            // In few requests. What can't be had is told by the reading.
            let (from, to) = (offset + *done as u64, offset + out.len() as u64);
            let clusters: Vec<u64> = (from / CLUSTER_U64..to.div_ceil(CLUSTER_U64)).collect();
            if clusters.len() > 1 {
                self.fetch(disk, &clusters, tools);
            }
        }
        let mut leaves = Leaves::new(self, disk);
        while *done < out.len() {
            let at = offset + *done as u64;
            let within = usize::try_from(at % CLUSTER_U64).unwrap_or(0);
            let length = (out.len() - *done).min(CLUSTER - within);
            let part = &mut out[*done..*done + length];
            let cluster = ClusterIndex::of_byte(at);
            let found = match leaves.blob(cluster, wait) {
                Err(e) if wait == Wait::May && e.damaged_object().is_some() => {
                    self.tree.blob_anew(disk, cluster).map_err(|_| e)?
                }
                other => other?,
            };
            match found {
                None => part.fill(0),
                Some(blob) => match self.read_cluster(blob, within, part, wait, tools) {
                    Err(e) if wait == Wait::May && e.damaged_object().is_some() => {
                        let other = self.elsewhere(disk, cluster, blob)?.ok_or(e)?;
                        // For the rest of the range the leaf is looked up as it is now.
                        leaves = Leaves::new(self, disk);
                        self.read_cluster(other, within, part, wait, tools)?;
                    }
                    other => other?,
                },
            }
            *done += length;
        }
        Ok(())
    }

    /// Where a cluster is that is not where the index said: the node that said so may have been made again since.
    fn elsewhere(&self, disk: &Disk, cluster: ClusterIndex, blob: BlobRef) -> Result<Option<BlobRef>, VaultError> {
        let other = self.tree.blob_anew(disk, cluster)?;
        Ok(other.filter(|other| (other.pack, other.ordinal) != (blob.pack, blob.ordinal)))
    }

    /// Fills `out` from byte `at` of a blob's cluster on.
    fn read_cluster(
        &self,
        blob: BlobRef,
        at: usize,
        out: &mut [u8],
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        let mut done = 0;
        while done < out.len() {
            match self.frames.covering(blob, at + done) {
                Some(frame) => done += frame.copy_to(at + done, &mut out[done..]),
                None => return self.open_cluster(blob, at + done, &mut out[done..], wait, tools),
            }
        }
        Ok(())
    }

    /// The same, for what is not in the cache: opens the blob.
    fn open_cluster(
        &self,
        blob: BlobRef,
        at: usize,
        out: &mut [u8],
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        let Tools { decoder, sealed } = tools;
        let frames = self.frames_of(blob, wait, sealed)?;
        let size = frames.shift().bytes();
        let mut done = 0;
        while done < out.len() {
            let (nth, within) = ((at + done) / size, (at + done) % size);
            if within == 0 && out.len() - done >= size {
                // Wanted whole: it is decoded to where it is wanted, and not kept. A stream does not come back for it,
                // and what the kernel has read it keeps itself.
                decoder.decode_frame(&frames, nth, &mut out[done..done + size]).map_err(damaged(blob))?;
                done += size;
            } else {
                let mut frame = Frame::new(nth * size, size);
                decoder.decode_frame(&frames, nth, frame.bytes_mut()).map_err(damaged(blob))?;
                done += self.put(blob, frame).copy_to(at + done, &mut out[done..]);
            }
        }
        Ok(())
    }

    /// Reads and opens a blob of data.
    fn frames_of<'a>(&self, blob: BlobRef, wait: Wait, sealed: &'a mut Buffer) -> Result<Frames<'a>, VaultError> {
        self.tree.packs().read_blob(Kind::DataPack, blob, wait, sealed.vector())?;
        Frames::parse(sealed.vector()).map_err(damaged(blob))
    }

    /// Bytes of opened frames for which there is room in any case.
    pub fn frame_bytes(&self) -> usize {
        self.cache_bytes.load(Ordering::Relaxed) / 2
    }

    /// What of the frame cache an opened cluster takes, whatever the size of its frames.
    pub const CLUSTER_WEIGHT: usize = CLUSTER + 4 * OVERHEAD;

    /// Opens clusters, which are wanted soon, and keeps all their frames; those that lie side by side in the store are fetched in
    /// one go. How many were opened. What can't be is left out: whoever reads it is told why.
    pub fn fetch(&self, disk: &Disk, clusters: &[u64], tools: &mut Tools) -> usize {
        let on_disk = clusters.iter().filter(|cluster| **cluster < cluster_count(disk.length));
        let missing = |&cluster: &u64| self.missing(disk, ClusterIndex(cluster)).ok().flatten();
        let mut wanted: Vec<Place> = on_disk.filter_map(missing).collect();
        wanted.sort_unstable_by_key(|place| (place.blob.pack, place.offset));
        // Clusters that are alike have one blob.
        wanted.dedup_by_key(|place| (place.blob.pack, place.blob.ordinal));
        let mut opened = 0;
        for near in wanted.chunk_by(Place::is_near) {
            let mut rest = near;
            while let Some(first) = rest.first() {
                let fits = |place: &&Place| place.end() - first.offset <= FETCHED as u64;
                let (now, then) = rest.split_at(rest.iter().take_while(fits).count().max(1));
                rest = then;
                opened += self.fetch_together(now, tools);
            }
        }
        opened
    }

    /// Where a cluster is that is no hole, and of which not all is at hand.
    fn missing(&self, disk: &Disk, cluster: ClusterIndex) -> Result<Option<Place>, VaultError> {
        let Some(blob) = self.tree.blob(disk, cluster, Wait::May)? else { return Ok(None) };
        let is_there = |at| self.frames.covering(blob, at).is_some();
        if (0..CLUSTER).step_by(FrameShift::K16.bytes()).all(is_there) {
            return Ok(None);
        }
        let Some((handle, offset)) = self.tree.packs().place(blob, Wait::May)? else { return Ok(None) };
        let length = handle.lengths().place(blob.ordinal).map_or(0, |(_, length)| length);
        Ok(Some(Place { blob, handle, offset, length }))
    }

    /// Reads blobs of one pack, and all between them, and opens each; how many could be.
    fn fetch_together(&self, places: &[Place], tools: &mut Tools) -> usize {
        let [first, .., last] = places else {
            let alone = |place: &Place| {
                let Tools { decoder, sealed } = &mut *tools;
                let frames = self.frames_of(place.blob, Wait::May, sealed)?;
                self.keep(place.blob, &frames, decoder)
            };
            return places.iter().map(alone).filter(Result::is_ok).count();
        };
        let length = usize::try_from(last.end() - first.offset).unwrap_or(FETCHED);
        let mut bytes = Secret(vec![0; length]);
        let store = self.tree.packs().tenant().store();
        if store.read_at(first.handle.key(), first.offset, &mut bytes.0).is_err() {
            return 0;
        }
        let mut opened = 0;
        for place in places {
            let from = usize::try_from(place.offset - first.offset).unwrap_or(length);
            let Some(sealed) = bytes.0.get_mut(from..from + place.length) else { continue };
            let Ok(content) = place.handle.open(place.blob.ordinal, sealed) else { continue };
            let Ok(frames) = Frames::parse(content) else { continue };
            opened += usize::from(self.keep(place.blob, &frames, &mut tools.decoder).is_ok());
        }
        opened
    }

    /// Decodes all frames of a blob, and keeps them.
    fn keep(&self, blob: BlobRef, frames: &Frames<'_>, decoder: &mut FrameDecoder) -> Result<(), VaultError> {
        let size = frames.shift().bytes();
        for nth in 0..frames.shift().count() {
            let mut frame = Frame::new(nth * size, size);
            decoder.decode_frame(frames, nth, frame.bytes_mut()).map_err(damaged(blob))?;
            self.put(blob, frame);
        }
        Ok(())
    }

    /// Opens a cluster and keeps all its frames, for a stream that is about to want them. One that is there in part counts
    /// as there.
    fn prefetch(&self, disk: &Disk, cluster: ClusterIndex, tools: &mut Tools) -> Result<(), VaultError> {
        let Some(blob) = self.tree.blob(disk, cluster, Wait::May)? else { return Ok(()) };
        if self.frames.covering(blob, CLUSTER - 1).is_some() {
            return Ok(());
        }
        let Tools { decoder, sealed } = tools;
        let frames = self.frames_of(blob, Wait::May, sealed)?;
        self.keep(blob, &frames, decoder)
    }

    /// Prepares for clusters that will be wanted soon: has the store fetch what they are in, or, where a store can't do that
    /// on the side, opens them. May wait.
    pub fn prepare(&self, disk: &Disk, clusters: Range<u64>, tools: &mut Tools) -> Result<(), VaultError> {
        self.prepare_around(disk, clusters, AROUND, tools)
    }

    /// The same for who reads in order: of a store that is far more is fetched in one go.
    pub fn prepare_stream(&self, disk: &Disk, clusters: Range<u64>, tools: &mut Tools) -> Result<(), VaultError> {
        self.prepare_around(disk, clusters, if self.is_far() { STREAM } else { AROUND }, tools)
    }

    fn prepare_around(
        &self,
        disk: &Disk,
        clusters: Range<u64>,
        around: u64,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        let mut expected = None;
        for cluster in clusters.map(ClusterIndex) {
            let Some(blob) = self.tree.blob(disk, cluster, Wait::May)? else { continue };
            let Some((handle, offset)) = self.tree.packs().place(blob, Wait::May)? else { continue };
            let window = Some((blob.pack, offset / around));
            if window == expected {
                continue;
            }
            match self.tree.packs().tenant().store().expect(handle.key(), offset - offset % around, around) {
                true => expected = window,
                false => self.prefetch(disk, cluster, tools)?,
            }
        }
        Ok(())
    }

    /// The leaf of that number, and through it the holes and blobs of 64 MiB of disk.
    pub fn leaf(&self, disk: &Disk, leaf: u64, wait: Wait) -> Result<Option<Arc<IndexNode>>, VaultError> {
        self.tree.leaf(disk, leaf, wait)
    }

    /// Whether there is a hole at `offset`, and where it, or the data there, ends. No further than `end` is looked, which must
    /// lie beyond `offset` and on the disk.
    pub fn stretch(&self, disk: &Disk, offset: u64, end: u64) -> Result<(bool, u64), VaultError> {
        let first = ClusterIndex::of_byte(offset);
        let is_hole = self.tree.blob(disk, first, Wait::May)?.is_none();
        let other = self.tree.next(disk, first, cluster_count(end), !is_hole)?;
        Ok((is_hole, other.map_or(end, ClusterIndex::first_byte)))
    }

    /// Where data begins at or after `offset`; `None` if only holes follow.
    pub fn next_data(&self, disk: &Disk, offset: u64) -> Result<Option<u64>, VaultError> {
        let found = self.tree.next(disk, ClusterIndex::of_byte(offset), cluster_count(disk.length), false)?;
        Ok(found.map(|cluster| cluster.first_byte().max(offset)))
    }

    /// Where a hole begins at or after `offset`, which must be on the disk; its end counts as one.
    pub fn next_hole(&self, disk: &Disk, offset: u64) -> Result<u64, VaultError> {
        let found = self.tree.next(disk, ClusterIndex::of_byte(offset), cluster_count(disk.length), true)?;
        Ok(found.map_or(disk.length, |cluster| cluster.first_byte().max(offset)))
    }
}

/// The leaves that one range needs, each looked up once.
struct Leaves<'a> {
    reader: &'a DiskReader,
    disk: &'a Disk,
    current: Option<(u64, Option<Arc<IndexNode>>)>,
}

impl<'a> Leaves<'a> {
    fn new(reader: &'a DiskReader, disk: &'a Disk) -> Leaves<'a> {
        Leaves { reader, disk, current: None }
    }

    fn blob(&mut self, cluster: ClusterIndex, wait: Wait) -> Result<Option<BlobRef>, VaultError> {
        let number = cluster.leaf();
        if self.current.as_ref().is_none_or(|(current, _)| *current != number) {
            self.current = Some((number, self.reader.leaf(self.disk, number, wait)?));
        }
        let leaf = self.current.as_ref().and_then(|(_, leaf)| leaf.as_ref());
        Ok(leaf.and_then(|leaf| leaf.get(cluster.slot(0))))
    }
}
