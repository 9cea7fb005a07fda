//! Opened frames: decrypted, authenticated and decompressed parts of clusters, kept as long as there is room.

use std::cell::RefCell;
use std::sync::Arc;

use crate::cache::{Cache, Weigh};
use reseal_format::frames::FrameShift;
use reseal_format::ids::PackId;
use reseal_format::index::BlobRef;

use crate::wipe::wipe;

/// What a frame costs beside its bytes: the entry in the map and in the list, the allocation's own header.
pub(crate) const OVERHEAD: usize = 160;

/// Which frame: a pack's generations hold the same plaintext, so the generation does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FrameKey {
    pack: PackId,
    ordinal: u32,
    /// Where in the cluster it starts. Blobs have frames of different sizes, so its number would not tell.
    start: u32,
}

/// Buffers of frames that left the cache, which a thread keeps for its next ones: one in, one out, once the cache is full.
const SPARE: usize = 4;

/// Wiped when its thread ends.
struct Spare(Vec<Box<[u8]>>);

impl Drop for Spare {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|bytes| wipe(bytes));
    }
}

thread_local! {
    static SPARES: RefCell<Spare> = const { RefCell::new(Spare(Vec::new())) };
}

/// An opened frame.
pub(crate) struct Frame {
    start: usize,
    bytes: Box<[u8]>,
}

impl Frame {
    /// A frame to be filled whole; what is in it is left from before.
    pub(crate) fn new(start: usize, length: usize) -> Frame {
        let spare = SPARES.with_borrow_mut(|spare| {
            let nth = spare.0.iter().position(|bytes| bytes.len() == length)?;
            Some(spare.0.swap_remove(nth))
        });
        Frame { start, bytes: spare.unwrap_or_else(|| vec![0; length].into_boxed_slice()) }
    }

    /// Its bytes, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Copies what it has from byte `at` of the cluster on, as much as `out` takes; how much that was.
    pub(crate) fn copy_to(&self, at: usize, out: &mut [u8]) -> usize {
        let part = &self.bytes[at - self.start..];
        let length = part.len().min(out.len());
        out[..length].copy_from_slice(&part[..length]);
        length
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        // While the thread ends its spares are gone already; then, as where it has enough, the buffer is wiped and freed.
        let kept = SPARES.try_with(|spare| {
            let spares = &mut spare.borrow_mut().0;
            let room = spares.len() < SPARE;
            if room {
                spares.push(std::mem::take(&mut self.bytes));
            }
            room
        });
        if kept != Ok(true) {
            wipe(&mut self.bytes);
        }
    }
}

impl Weigh for Frame {
    fn weight(&self) -> usize {
        self.bytes.len() + OVERHEAD
    }
}

/// The cache.
pub(crate) struct FrameCache(Cache<FrameKey, Arc<Frame>>);

impl FrameCache {
    /// An empty cache.
    pub(crate) fn new() -> FrameCache {
        FrameCache(Cache::new(0))
    }

    /// Keeps at most about so many bytes from now on.
    pub(crate) fn resize(&self, bytes: usize) {
        self.0.resize(bytes);
    }

    fn key(blob: BlobRef, start: usize) -> FrameKey {
        FrameKey { pack: blob.pack, ordinal: blob.ordinal, start: u32::try_from(start).unwrap_or(u32::MAX) }
    }

    /// The frame that holds byte `at` of a cluster.
    pub(crate) fn covering(&self, blob: BlobRef, at: usize) -> Option<Arc<Frame>> {
        // The size of a blob's frames stands in the blob; so each size is tried, the usual one first.
        let sizes = [FrameShift::DEFAULT, FrameShift::K16, FrameShift::K64];
        let starts = sizes.map(|shift| at - at % shift.bytes());
        starts.iter().enumerate().filter(|(nth, start)| !starts[..*nth].contains(start)).find_map(|(_, &start)| {
            self.0.get(&Self::key(blob, start)).filter(|frame| at < frame.start + frame.bytes.len())
        })
    }

    /// Keeps a frame, if all together take no more than about so many bytes.
    pub(crate) fn put(&self, blob: BlobRef, frame: Frame, bytes: usize) -> Arc<Frame> {
        let frame = Arc::new(frame);
        self.0.limit(bytes);
        self.0.put(Self::key(blob, frame.start), frame.clone());
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_every_size_are_found_by_any_of_their_bytes() {
        let blob = |ordinal| BlobRef { pack: PackId::from_bytes([1; 16]), generation: 0, ordinal };
        let cache = FrameCache::new();
        for (ordinal, shift) in [FrameShift::K16, FrameShift::K32, FrameShift::K64].into_iter().enumerate() {
            let blob = blob(u32::try_from(ordinal).unwrap());
            let start = 65_536 - shift.bytes();
            cache.put(blob, Frame::new(start, shift.bytes()), 16 << 20);
            for at in (0..65_536).step_by(4096) {
                assert_eq!(cache.covering(blob, at).is_some(), at >= start, "{shift:?} at {at}");
            }
        }
        assert!(cache.covering(blob(3), 0).is_none());
    }
}
