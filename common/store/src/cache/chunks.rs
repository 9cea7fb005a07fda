//! What the cache keeps of one object: a file with a header, and then groups of a table and the chunks that it is about.
//!
//! ```text
//! header (4096): "RSLCACHE" ‖ version (4) ‖ zeros (4) ‖ length of the object (8) ‖ its mark (16) ‖ zeros
//! group: mark (16) × 256 ‖ chunk (16 KiB) × 256
//! mark: the first bytes of keyed BLAKE3(name of the object, number of the chunk ‖ its bytes); zeros where there is none
//! ```
//!
//! Chunks are written before their marks, and each is compared with its mark whenever it is read. So whatever happened to the file, a chunk that
//! is torn, half written, another object's or rotten is one that is not there. Nothing is locked, and nothing is ever synced.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// Bytes of a chunk.
pub(super) const CHUNK_BYTES: usize = 16 << 10;
pub(super) const CHUNK: u64 = CHUNK_BYTES as u64;
const CHUNKS: u64 = 256;
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

    /// Reads chunks as far as they are there, one after the other, into `bytes`; how many these are.
    pub(super) fn read(&self, chunks: Range<u64>, bytes: &mut Vec<u8>, wait: Wait) -> u64 {
        let Some(length) = self.length() else { return 0 };
        let end = chunks.end.min(length.div_ceil(CHUNK));
        let mut next = chunks.start;
        while next < end {
            let stop = end.min(next - next % CHUNKS + CHUNKS);
            let from = bytes.len();
            let of = (stop * CHUNK).min(length) - next * CHUNK;
            let mut marks = vec![0; usize::try_from(stop - next).unwrap_or(0) * MARK];
            bytes.resize(from + usize::try_from(of).unwrap_or(0), 0);
            let read = self.read_exact(&mut marks, place_of_mark(next), wait).unwrap_or(false)
                && self.read_exact(&mut bytes[from..], place_of_chunk(next), wait).unwrap_or(false);
            let mut good = 0;
            if read {
                let parts = bytes[from..].chunks(CHUNK_BYTES).zip(marks.chunks(MARK));
                good = parts.zip(next..).take_while(|((part, said), n)| mark(&self.name, *n, part) == **said).count();
            }
            bytes.truncate(bytes.len().min(from + good * CHUNK_BYTES));
            next += good as u64;
            if next < stop {
                break;
            }
        }
        next - chunks.start
    }

    /// Whether a chunk seems to be there. It may turn out not to be.
    pub(super) fn has(&self, chunk: u64) -> bool {
        let mut said = [0; MARK];
        self.file.read_exact_at(&mut said, place_of_mark(chunk)).is_ok() && said != [0; MARK]
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
        (0..length).map(|n| (n * 31 % 251) as u8).collect()
    }

    #[test]
    fn what_is_kept_is_read_back_across_groups_and_to_the_end() {
        let chunks = Chunks::new(file(), [1; 32]);
        let all = content(300 * CHUNK_BYTES + 77);
        let length = all.len() as u64;
        assert_eq!(chunks.read(0..9, &mut Vec::new(), Wait::May), 0);
        chunks.write(0, &all[..100 * CHUNK_BYTES], length).unwrap();
        chunks.write(200, &all[200 * CHUNK_BYTES..], length).unwrap();
        let mut bytes = Vec::new();
        assert_eq!(chunks.read(98..120, &mut bytes, Wait::May), 2);
        assert!(bytes == all[98 * CHUNK_BYTES..100 * CHUNK_BYTES]);
        bytes.clear();
        assert_eq!(chunks.read(250..400, &mut bytes, Wait::May), 51, "the last one is short");
        assert!(bytes == all[250 * CHUNK_BYTES..]);
        assert!(chunks.has(200) && !chunks.has(150) && chunks.length() == Some(length));
        // Another process finds the same, one that takes it for another object nothing.
        let again = Chunks::new(chunks.file.try_clone().unwrap(), [1; 32]);
        bytes.clear();
        assert_eq!((again.length(), again.read(0..1, &mut bytes, Wait::May)), (Some(length), 1));
        let other = Chunks::new(chunks.file.try_clone().unwrap(), [2; 32]);
        assert_eq!(other.length(), None);
        other.length.store(length, Ordering::Relaxed);
        assert_eq!(other.read(0..1, &mut Vec::new(), Wait::May), 0);
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
            assert_eq!(chunks.read(0..3, &mut bytes, Wait::May), 1, "{at}");
            assert_eq!(bytes.len() as u64, CHUNK);
            chunks.file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(chunks.read(0..3, &mut Vec::new(), Wait::May), 3);
        chunks.file.set_len(place_of_chunk(2) + 5).unwrap();
        assert_eq!(chunks.read(2..3, &mut Vec::new(), Wait::May), 0);
        chunks.empty();
        assert_eq!(chunks.read(0..3, &mut Vec::new(), Wait::May), 0);
    }

    #[test]
    fn a_part_of_a_chunk_is_not_kept() {
        let chunks = Chunks::new(file(), [1; 32]);
        chunks.write(0, &content(CHUNK_BYTES + 5), 4 * CHUNK).unwrap();
        assert_eq!(chunks.read(0..2, &mut Vec::new(), Wait::May), 1);
    }
}
