//! What the cache keeps of one object: a file with a header, and then groups of a table and the chunks that it is about.
//!
//! ```text
//! header (4096): "RSLCACHE" ‖ version (4) ‖ zeros (4) ‖ length of the object (8) ‖ its mark (16) ‖ zeros
//! group: mark (16) × 256 ‖ chunk (16 KiB) × 256
//! mark: the first bytes of keyed BLAKE3(name of the object, number of the chunk ‖ its bytes); zeros where there is none
//! ```
//!
//! Chunks are written before their marks. Where something is read that is not sealed, each chunk is compared with its mark: one that is torn,
//! half written, another object's or rotten is one that is not there. What is sealed is authenticated by who reads it, in any case. Nothing is
//! locked, and nothing is ever synced.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// Bytes of a chunk.
pub(super) const CHUNK_BYTES: usize = 16 << 10;
pub(super) const CHUNK: u64 = CHUNK_BYTES as u64;
const OF_GROUP: usize = 256;
const CHUNKS: u64 = OF_GROUP as u64;
const MARK: usize = 16;
const TABLE: u64 = CHUNKS * MARK as u64;
const HEADER: u64 = 4096;
const HEAD: usize = 40;
const MAGIC: &[u8; 8] = b"RSLCACHE";
const VERSION: u32 = 1;
/// Longest object that is kept.
const MAX_LENGTH: u64 = 1 << 40;

/// Names an object to the cache: what its marks are keyed with.
pub(super) type Name = [u8; 32];

/// Which chunks a range lies in.
pub(super) fn chunks_of(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK..range.end.div_ceil(CHUNK)
}

fn group(chunk: u64) -> u64 {
    HEADER + chunk / CHUNKS * (TABLE + CHUNKS * CHUNK)
}

fn place_of_mark(chunk: u64) -> u64 {
    group(chunk) + chunk % CHUNKS * MARK as u64
}

fn place_of_chunk(chunk: u64) -> u64 {
    group(chunk) + TABLE + chunk % CHUNKS * CHUNK
}

fn mark(name: &Name, number: u64, bytes: &[u8]) -> [u8; MARK] {
    let mut hasher = blake3::Hasher::new_keyed(name);
    hasher.update(&number.to_le_bytes()).update(bytes);
    let mut mark = [0; MARK];
    mark.copy_from_slice(&hasher.finalize().as_bytes()[..MARK]);
    mark
}

/// Whether a read may wait for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    May,
    MustNot,
}

/// The file of an object.
pub(super) struct Chunks {
    file: File,
    name: Name,
    /// Of the object; `u64::MAX` while it is not known.
    length: AtomicU64,
}

impl Chunks {
    pub(super) fn new(file: File, name: Name) -> Chunks {
        let chunks = Chunks { file, name, length: AtomicU64::new(u64::MAX) };
        if let Some(length) = chunks.read_length() {
            chunks.length.store(length, Ordering::Relaxed);
        }
        chunks
    }

    fn read_length(&self) -> Option<u64> {
        let mut head = [0; HEAD];
        self.file.read_exact_at(&mut head, 0).ok()?;
        let length = u64::from_le_bytes(head[16..24].try_into().ok()?);
        (head == self.head(length) && length <= MAX_LENGTH).then_some(length)
    }

    fn head(&self, length: u64) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[16..24].copy_from_slice(&length.to_le_bytes());
        let of_head = mark(&self.name, u64::MAX, &head[..24]);
        head[24..].copy_from_slice(&of_head);
        head
    }

    /// How long the object is, if that is known.
    pub(super) fn length(&self) -> Option<u64> {
        Some(self.length.load(Ordering::Relaxed)).filter(|length| *length != u64::MAX)
    }

    /// Whether another process has removed it.
    pub(super) fn is_removed(&self) -> bool {
        self.file.metadata().is_ok_and(|data| data.nlink() == 0)
    }

    /// Gives back its space, also from those who still have it open.
    pub(super) fn empty(&self) {
        let _ = self.file.set_len(0);
    }

    /// Says that it is used.
    pub(super) fn touch(&self) {
        let _ = self.file.set_modified(std::time::SystemTime::now());
    }

    fn read_exact(&self, bytes: &mut [u8], at: u64, wait: Wait) -> io::Result<bool> {
        if wait == Wait::May {
            return match self.file.read_exact_at(bytes, at) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
                other => other.map(|()| true),
            };
        }
        let wanted = bytes.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(bytes)], at, ReadWriteFlags::NOWAIT) {
            Ok(got) => Ok(got == wanted),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Fills `buf` from `offset` on, if all chunks that it lies in seem to be there; whether it did. They are not compared with their marks: it
    /// is for what is sealed, which says more of itself than a mark does.
    pub(super) fn fill(&self, offset: u64, buf: &mut [u8], wait: Wait) -> bool {
        let Some(length) = self.length() else { return false };
        let end = offset.saturating_add(buf.len() as u64);
        if end > length {
            return false;
        }
        let mut at = offset;
        let mut rest = buf;
        while at < end {
            let first = at / CHUNK;
            let stop = end.min((first - first % CHUNKS + CHUNKS) * CHUNK);
            let chunks = chunks_of(&(at..stop));
            let mut marks = [0; OF_GROUP * MARK];
            let marks = &mut marks[..usize::try_from(chunks.end - chunks.start).unwrap_or(0) * MARK];
            let (part, after) = rest.split_at_mut(usize::try_from(stop - at).unwrap_or(0));
            let is_there = self.read_exact(marks, place_of_mark(first), wait).unwrap_or(false)
                && marks.chunks(MARK).all(|said| said != [0; MARK])
                && self.read_exact(part, place_of_chunk(first) + at % CHUNK, wait).unwrap_or(false);
            if !is_there {
                return false;
            }
            (at, rest) = (stop, after);
        }
        true
    }

    /// Reads chunks as far as they are there and as they were written, one after the other, into `bytes`; how many these are.
    pub(super) fn read(&self, chunks: Range<u64>, bytes: &mut Vec<u8>) -> u64 {
        let Some(length) = self.length() else { return 0 };
        let mut chunk = vec![0; CHUNK_BYTES];
        for number in chunks.start..chunks.end.min(length.div_ceil(CHUNK)) {
            let of = usize::try_from(length - number * CHUNK).map_or(CHUNK_BYTES, |rest| rest.min(CHUNK_BYTES));
            let (part, mut said) = (&mut chunk[..of], [0; MARK]);
            let is_read = self.read_exact(&mut said, place_of_mark(number), Wait::May).unwrap_or(false)
                && self.read_exact(part, place_of_chunk(number), Wait::May).unwrap_or(false);
            if !is_read || mark(&self.name, number, part) != said {
                return number - chunks.start;
            }
            bytes.extend_from_slice(part);
        }
        chunks.end.min(length.div_ceil(CHUNK)).saturating_sub(chunks.start)
    }

    /// From the first to the last of these chunks that does not seem to be there. One that does may turn out not to be.
    pub(super) fn missing(&self, chunks: Range<u64>) -> Option<Range<u64>> {
        let mut missing: Option<Range<u64>> = None;
        let mut next = chunks.start;
        while next < chunks.end {
            let stop = chunks.end.min(next - next % CHUNKS + CHUNKS);
            let mut marks = vec![0; usize::try_from(stop - next).unwrap_or(0) * MARK];
            let is_read = self.file.read_exact_at(&mut marks, place_of_mark(next)).is_ok();
            for (number, said) in (next..stop).zip(marks.chunks(MARK)) {
                if !is_read || said == [0; MARK] {
                    missing = Some(missing.map_or(number, |missing| missing.start)..number + 1);
                }
            }
            next = stop;
        }
        missing
    }

    /// Keeps chunks from that one on, of an object of that length. Of the last one all must be given.
    pub(super) fn write(&self, first: u64, bytes: &[u8], length: u64) -> io::Result<()> {
        if self.length() != Some(length) {
            if length > MAX_LENGTH {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            self.file.write_all_at(&self.head(length), 0)?;
            self.length.store(length, Ordering::Relaxed);
        }
        for (part, number) in bytes.chunks(CHUNK_BYTES).zip(first..) {
            let is_whole = part.len() as u64 == CHUNK || number * CHUNK + part.len() as u64 == length;
            if is_whole {
                self.file.write_all_at(part, place_of_chunk(number))?;
                self.file.write_all_at(&mark(&self.name, number, part), place_of_mark(number))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn content(length: usize) -> Vec<u8> {
        (0..length).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect()
    }

    #[test]
    fn what_is_kept_is_read_back_across_groups_and_to_the_end() {
        let chunks = Chunks::new(file(), [1; 32]);
        let all = content(300 * CHUNK_BYTES + 77);
        let length = all.len() as u64;
        assert_eq!(chunks.read(0..9, &mut Vec::new()), 0);
        chunks.write(0, &all[..100 * CHUNK_BYTES], length).unwrap();
        chunks.write(200, &all[200 * CHUNK_BYTES..], length).unwrap();
        let mut bytes = Vec::new();
        assert_eq!(chunks.read(98..120, &mut bytes), 2);
        assert!(bytes == all[98 * CHUNK_BYTES..100 * CHUNK_BYTES]);
        bytes.clear();
        let mut part = vec![0; 60 * CHUNK_BYTES + 9];
        assert!(chunks.fill(240 * CHUNK + 68, &mut part, Wait::May), "to the last byte, across groups");
        assert!(part == all[240 * CHUNK_BYTES + 68..]);
        assert!(!chunks.fill(99 * CHUNK + 1, &mut part[..CHUNK_BYTES], Wait::May), "one of two is not there");
        assert!(!chunks.fill(299 * CHUNK, &mut part[..CHUNK_BYTES + 78], Wait::May), "past the end");
        assert_eq!(chunks.read(250..400, &mut bytes), 51, "the last one is short");
        assert!(bytes == all[250 * CHUNK_BYTES..]);
        assert_eq!((chunks.missing(98..258), chunks.missing(0..100)), (Some(100..200), None));
        assert_eq!((chunks.missing(300..301), chunks.length()), (None, Some(length)));
        // Another process finds the same, one that takes it for another object nothing.
        let again = Chunks::new(chunks.file.try_clone().unwrap(), [1; 32]);
        bytes.clear();
        assert_eq!((again.length(), again.read(0..1, &mut bytes)), (Some(length), 1));
        let other = Chunks::new(chunks.file.try_clone().unwrap(), [2; 32]);
        assert_eq!(other.length(), None);
        other.length.store(length, Ordering::Relaxed);
        assert_eq!(other.read(0..1, &mut Vec::new()), 0);
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_a_chunk_less() {
        let chunks = Chunks::new(file(), [1; 32]);
        let all = content(3 * CHUNK_BYTES);
        chunks.write(0, &all, all.len() as u64).unwrap();
        for at in [place_of_chunk(1), place_of_chunk(1) + CHUNK - 1, place_of_mark(1), place_of_mark(1) + 15] {
            let mut byte = [0];
            chunks.file.read_exact_at(&mut byte, at).unwrap();
            chunks.file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            let mut bytes = Vec::new();
            assert_eq!(chunks.read(0..3, &mut bytes), 1, "{at}");
            assert_eq!(bytes.len() as u64, CHUNK);
            chunks.file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(chunks.read(0..3, &mut Vec::new()), 3);
        chunks.file.set_len(place_of_chunk(2) + 5).unwrap();
        assert_eq!(chunks.read(2..3, &mut Vec::new()), 0);
        chunks.empty();
        assert_eq!(chunks.read(0..3, &mut Vec::new()), 0);
    }

    #[test]
    fn a_part_of_a_chunk_is_not_kept() {
        let chunks = Chunks::new(file(), [1; 32]);
        chunks.write(0, &content(CHUNK_BYTES + 5), 4 * CHUNK).unwrap();
        assert_eq!(chunks.read(0..2, &mut Vec::new()), 1);
    }
}
