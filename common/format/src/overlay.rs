//! The overlay of a disk that is written to: heads, the batches of its journal, and sealed blocks, in one file.
//!
//! ```text
//! page 0, 1   head, twice: the one of the higher generation that opens counts
//! page 2 …    blocks of the disk, a page each, and batches of the journal, some pages each
//! ```
//!
//! A page has 4,096 bytes, as has a block. A block's tag stands in the journal, so that what was there before does not open in the place
//! of what is there now. Who opens the file to write takes a new salt, its **session**: nonces count within it, so a pair of
//! key and nonce can't repeat, whatever of an earlier session was lost.
//!
//! Numbers are little-endian.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::FormatError;
use crate::keys::{KEY, TAG};

/// Bytes of a page of the file, and of a block of the disk.
pub const PAGE: usize = 4096;
/// `PAGE` as an offset.
pub const PAGE_U64: u64 = PAGE as u64;
/// Copies of the head, at the start of the file.
pub const HEADS: u64 = 2;
/// Most pages of a batch.
pub const BATCH_PAGES: usize = 16;
/// The journal takes its pages in chunks of so many; a batch lies within one.
pub const CHUNK_PAGES: u64 = 128;
/// Bytes of a batch before its records.
pub const BATCH_HEADER: usize = 112;
/// Most bytes of a batch's records.
pub const MAX_RECORDS: usize = BATCH_PAGES * PAGE - BATCH_HEADER - TAG;
/// Bytes of a digest that links a batch to the one before.
pub const LINK: usize = 32;

const HEAD_MAGIC: &[u8; 8] = b"RSLOVER1";
const BATCH_MAGIC: &[u8; 8] = b"RSLBATCH";
const VERSION: u16 = 1;
/// Bytes of a head that are in clear: all of them associated data.
const HEAD_CLEAR: usize = 72;
/// Bytes of a head that are sealed.
const HEAD_SEALED: usize = 88;

/// What a key is for.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Use {
    Head = 1,
    Journal = 2,
    Block = 3,
}

/// The secret of one overlay, random.
pub struct OverlayKey(Zeroizing<[u8; KEY]>);

impl OverlayKey {
    /// Takes 32 random bytes.
    pub fn from_bytes(bytes: Zeroizing<[u8; KEY]>) -> OverlayKey {
        OverlayKey(bytes)
    }

    /// The bytes, to be sealed.
    pub fn expose(&self) -> &[u8; KEY] {
        &self.0
    }

    /// HKDF-SHA256(secret, salt, label ‖ use ‖ overlay).
    fn derive(&self, salt: &[u8; KEY], what: Use, overlay: &[u8; 16]) -> LessSafeKey {
        let mut key = Zeroizing::new([0; KEY]);
        Hkdf::<Sha256>::new(Some(salt), &*self.0)
            .expand_multi_info(&[b"reseal/1 overlay", &[what as u8], overlay], key.as_mut())
            .expect("32 bytes are within what HKDF-SHA256 can give");
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("AES-256 takes a key of 32 bytes"))
    }
}

impl std::fmt::Debug for OverlayKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OverlayKey(redacted)")
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(part(bytes, at))
}

/// Where the journal begins, and whose overlay it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub overlay: [u8; 16],
    pub generation: u64,
    /// The restore point, and which of its disks.
    pub point: [u8; 16],
    pub disk: u16,
    /// Bytes of the disk.
    pub length: u64,
    /// Page of the journal's first batch, its sequence, and what it links to.
    pub journal: u64,
    pub sequence: u64,
    pub link: [u8; LINK],
}

impl Head {
    /// Seals it; `salt` must be fresh random bytes.
    pub fn seal(&self, key: &OverlayKey, salt: &[u8; KEY]) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0..8].copy_from_slice(HEAD_MAGIC);
        page[8..10].copy_from_slice(&VERSION.to_le_bytes());
        page[16..32].copy_from_slice(&self.overlay);
        page[32..40].copy_from_slice(&self.generation.to_le_bytes());
        page[40..72].copy_from_slice(salt);
        let (clear, rest) = page.split_at_mut(HEAD_CLEAR);
        let (sealed, rest) = rest.split_at_mut(HEAD_SEALED);
        sealed[0..16].copy_from_slice(&self.point);
        sealed[16..18].copy_from_slice(&self.disk.to_le_bytes());
        sealed[24..32].copy_from_slice(&self.length.to_le_bytes());
        sealed[32..40].copy_from_slice(&self.journal.to_le_bytes());
        sealed[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        sealed[48..80].copy_from_slice(&self.link);
        let key = key.derive(salt, Use::Head, &self.overlay);
        let tag = key.seal_in_place_separate_tag(nonce(0), Aad::from(&*clear), sealed);
        rest[..TAG].copy_from_slice(tag.expect("a head is far below the limit of AES-GCM").as_ref());
        page
    }

    /// Opens it.
    pub fn open(key: &OverlayKey, page: &[u8; PAGE]) -> Result<Head, FormatError> {
        if &page[0..8] != HEAD_MAGIC {
            return Err(FormatError::Malformed("not the head of an overlay"));
        }
        let version = u16::from_le_bytes(part(page, 8));
        if version != VERSION {
            return Err(FormatError::Version { found: version });
        }
        let (overlay, generation) = (part(page, 16), number(page, 32));
        let key = key.derive(&part(page, 40), Use::Head, &overlay);
        let mut sealed = part::<{ HEAD_SEALED + TAG }>(page, HEAD_CLEAR);
        key.open_in_place(nonce(0), Aad::from(&page[..HEAD_CLEAR]), &mut sealed)
            .map_err(|_| FormatError::Authentication)?;
        Ok(Head {
            overlay,
            generation,
            point: part(&sealed, 0),
            disk: u16::from_le_bytes(part(&sealed, 16)),
            length: number(&sealed, 24),
            journal: number(&sealed, 32),
            sequence: number(&sealed, 40),
            link: part(&sealed, 48),
        })
    }
}

/// A fact about the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A session, by a number that blocks name it by.
    Session { number: u32, salt: [u8; KEY] },
    /// A block is in a page, sealed in a session under a counter.
    Block { block: u64, page: u64, session: u32, counter: u64, tag: [u8; TAG] },
    /// So many blocks are zeros.
    Zeros { block: u64, count: u64 },
}

/// Bytes of the longest record.
pub const MAX_RECORD: usize = 1 + 8 + 8 + 4 + 8 + TAG;

impl Record {
    /// Bytes of a record that begins with this byte; all there are for one that is not known.
    pub fn length(kind: u8) -> usize {
        match kind {
            1 => 1 + 4 + KEY,
            3 => 1 + 16,
            _ => MAX_RECORD,
        }
    }

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Record::Session { number, salt } => {
                out.push(1);
                out.extend(number.to_le_bytes());
                out.extend(salt);
            }
            Record::Block { block, page, session, counter, tag } => {
                out.push(2);
                out.extend(block.to_le_bytes());
                out.extend(page.to_le_bytes());
                out.extend(session.to_le_bytes());
                out.extend(counter.to_le_bytes());
                out.extend(tag);
            }
            Record::Zeros { block, count } => {
                out.push(3);
                out.extend(block.to_le_bytes());
                out.extend(count.to_le_bytes());
            }
        }
    }

    /// All of a batch.
    pub fn decode_all(mut bytes: &[u8]) -> Result<Vec<Record>, FormatError> {
        let mut records = Vec::with_capacity(bytes.len() / MAX_RECORD + 1);
        while let Some((&kind, rest)) = bytes.split_first() {
            let length = match kind {
                1 => 4 + KEY,
                2 => MAX_RECORD - 1,
                3 => 16,
                _ => return Err(FormatError::Malformed("an unknown record of an overlay's journal")),
            };
            let Some((record, rest)) = rest.split_at_checked(length) else {
                return Err(FormatError::Malformed("a record of an overlay's journal is cut off"));
            };
            bytes = rest;
            records.push(match kind {
                1 => Record::Session { number: u32::from_le_bytes(part(record, 0)), salt: part(record, 4) },
                2 => Record::Block {
                    block: number(record, 0),
                    page: number(record, 8),
                    session: u32::from_le_bytes(part(record, 16)),
                    counter: number(record, 20),
                    tag: part(record, 28),
                },
                _ => Record::Zeros { block: number(record, 0), count: number(record, 8) },
            });
        }
        Ok(records)
    }
}

/// What is in clear of a batch: all of it associated data.
///
/// A batch that does not open says nothing, and what follows it can't be found by it. So each tells of the chunk that follows its own, which
/// leads past one that is damaged, and of the flush that it belongs to, which tells a flush that was under way from one that was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    pub sequence: u64,
    /// Sequence of the batch that its flush begins with.
    pub first: u64,
    pub salt: [u8; KEY],
    /// Digest of the batch before.
    pub link: [u8; LINK],
    /// Page of the batch that follows: in the same chunk, or the first of the next one.
    pub next: u64,
    /// First page of the chunk that follows the one that it is in.
    pub ahead: u64,
    /// Whether the flush that it belongs to ends with it.
    pub is_last: bool,
}

impl BatchHeader {
    fn encode(&self, length: usize) -> [u8; BATCH_HEADER] {
        let mut bytes = [0; BATCH_HEADER];
        bytes[0..8].copy_from_slice(BATCH_MAGIC);
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.salt);
        bytes[56..88].copy_from_slice(&self.link);
        bytes[88..96].copy_from_slice(&self.next.to_le_bytes());
        bytes[96..104].copy_from_slice(&self.ahead.to_le_bytes());
        bytes[104..108].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        bytes[108] = u8::from(self.is_last);
        bytes
    }

    /// Decodes it, and how many bytes of records follow; `None` where there is no batch.
    pub fn decode(bytes: &[u8; BATCH_HEADER]) -> Option<(BatchHeader, usize)> {
        let length = u32::from_le_bytes(part(bytes, 104)) as usize;
        let is_last = match bytes[108..112] {
            [0, 0, 0, 0] => false,
            [1, 0, 0, 0] => true,
            _ => return None,
        };
        if &bytes[0..8] != BATCH_MAGIC || length > MAX_RECORDS {
            return None;
        }
        let header = BatchHeader {
            sequence: number(bytes, 8),
            first: number(bytes, 16),
            salt: part(bytes, 24),
            link: part(bytes, 56),
            next: number(bytes, 88),
            ahead: number(bytes, 96),
            is_last,
        };
        Some((header, length))
    }

    /// The batch, filled up to whole pages, and its digest, to which the next one links.
    ///
    /// # Panics
    /// If there are more than [`MAX_RECORDS`] bytes of records.
    pub fn seal(&self, key: &OverlayKey, overlay: &[u8; 16], records: &[u8]) -> (Vec<u8>, [u8; LINK]) {
        assert!(records.len() <= MAX_RECORDS, "the journal cuts what it writes into batches");
        let length = BATCH_HEADER + records.len() + TAG;
        let mut bytes = vec![0; length.next_multiple_of(PAGE)];
        let (header, rest) = bytes.split_at_mut(BATCH_HEADER);
        header.copy_from_slice(&self.encode(records.len()));
        let (sealed, rest) = rest.split_at_mut(records.len());
        sealed.copy_from_slice(records);
        let cipher = key.derive(&self.salt, Use::Journal, overlay);
        let tag = cipher.seal_in_place_separate_tag(nonce(self.sequence), Aad::from(&*header), sealed);
        rest[..TAG].copy_from_slice(tag.expect("a batch is far below the limit of AES-GCM").as_ref());
        let digest = *blake3::hash(&bytes[..length]).as_bytes();
        (bytes, digest)
    }

    /// Bytes of the pages of a batch with so many bytes of records.
    pub fn span(records: usize) -> usize {
        (BATCH_HEADER + records + TAG).next_multiple_of(PAGE)
    }

    /// Opens a batch whose header was decoded from these bytes: its records, and its digest.
    pub fn open(
        &self,
        key: &OverlayKey,
        overlay: &[u8; 16],
        bytes: &[u8],
        length: usize,
    ) -> Result<(Vec<Record>, [u8; LINK]), FormatError> {
        let whole = bytes.get(..BATCH_HEADER + length + TAG).ok_or(FormatError::Malformed("a batch is cut off"))?;
        let (header, sealed) = whole.split_at(BATCH_HEADER);
        let mut sealed = sealed.to_vec();
        let cipher = key.derive(&self.salt, Use::Journal, overlay);
        let opened = cipher.open_in_place(nonce(self.sequence), Aad::from(header), &mut sealed);
        let records = Record::decode_all(opened.map_err(|_| FormatError::Authentication)?)?;
        Ok((records, *blake3::hash(whole).as_bytes()))
    }
}

/// Seals and opens the blocks of one session.
pub struct BlockKey(LessSafeKey);

impl BlockKey {
    /// The key of a session.
    pub fn new(key: &OverlayKey, overlay: &[u8; 16], salt: &[u8; KEY]) -> BlockKey {
        BlockKey(key.derive(salt, Use::Block, overlay))
    }

    /// Seals a block in place. No counter may be used twice.
    pub fn seal(&self, counter: u64, block: u64, bytes: &mut [u8]) -> [u8; TAG] {
        let aad = Aad::from(block.to_le_bytes());
        let tag = self.0.seal_in_place_separate_tag(nonce(counter), aad, bytes);
        part(tag.expect("a block is far below the limit of AES-GCM").as_ref(), 0)
    }

    /// Opens a block into `out`, which is as long as what is sealed; undefined if it does not open.
    pub fn open(
        &self,
        counter: u64,
        block: u64,
        tag: &[u8; TAG],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let aad = Aad::from(block.to_le_bytes());
        let opened = self.0.open_separate_gather(nonce(counter), aad, sealed, tag, out);
        opened.map_err(|_| FormatError::Authentication)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> OverlayKey {
        OverlayKey::from_bytes(Zeroizing::new([7; KEY]))
    }

    fn head() -> Head {
        Head {
            overlay: [1; 16],
            generation: 5,
            point: [2; 16],
            disk: 3,
            length: 1 << 40,
            journal: 9,
            sequence: 11,
            link: [4; LINK],
        }
    }

    fn records() -> Vec<Record> {
        vec![
            Record::Session { number: 1, salt: [8; KEY] },
            Record::Block { block: 1 << 33, page: 77, session: 1, counter: 12, tag: [6; TAG] },
            Record::Zeros { block: 5, count: 1 << 34 },
        ]
    }

    fn encoded() -> Vec<u8> {
        let mut bytes = Vec::new();
        records().iter().for_each(|record| record.encode(&mut bytes));
        bytes
    }

    #[test]
    fn no_flipped_byte_of_a_head_goes_unseen() {
        let page = head().seal(&key(), &[9; KEY]);
        assert_eq!(Head::open(&key(), &page), Ok(head()));
        for at in 0..HEAD_CLEAR + HEAD_SEALED + TAG {
            let mut damaged = page;
            damaged[at] ^= 1;
            assert!(Head::open(&key(), &damaged).is_err(), "byte {at}");
        }
        let other = OverlayKey::from_bytes(Zeroizing::new([8; KEY]));
        assert_eq!(Head::open(&other, &page), Err(FormatError::Authentication));
        let text = format!("{other:?}");
        assert_eq!(text, "OverlayKey(redacted)");
    }

    #[test]
    fn no_flipped_byte_of_a_batch_goes_unseen() {
        let header =
            BatchHeader { sequence: 3, first: 2, salt: [5; KEY], link: [6; LINK], next: 44, ahead: 300, is_last: true };
        let (bytes, digest) = header.seal(&key(), &[1; 16], &encoded());
        assert_eq!(bytes.len(), BatchHeader::span(encoded().len()));
        let (decoded, length) = BatchHeader::decode(&part(&bytes, 0)).unwrap();
        assert_eq!((decoded, length), (header, encoded().len()));
        assert_eq!(decoded.open(&key(), &[1; 16], &bytes, length), Ok((records(), digest)));
        assert!(decoded.open(&key(), &[2; 16], &bytes, length).is_err(), "of another overlay");
        for at in 0..BATCH_HEADER + length + TAG {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let opened = BatchHeader::decode(&part(&damaged, 0))
                .map(|(header, length)| header.open(&key(), &[1; 16], &damaged, length));
            assert!(opened.is_none_or(|opened| opened.is_err()), "byte {at}");
        }
    }

    #[test]
    fn a_block_opens_as_itself_only() {
        let (mine, other) = (BlockKey::new(&key(), &[1; 16], &[5; KEY]), BlockKey::new(&key(), &[1; 16], &[6; KEY]));
        let mut sealed = [3; PAGE];
        let tag = mine.seal(1, 2, &mut sealed);
        assert_ne!(sealed, [3; PAGE]);
        let mut out = [0; PAGE];
        mine.open(1, 2, &tag, &sealed, &mut out).unwrap();
        assert_eq!(out, [3; PAGE]);
        assert!(mine.open(1, 3, &tag, &sealed, &mut out).is_err(), "another block");
        assert!(mine.open(2, 2, &tag, &sealed, &mut out).is_err(), "another counter");
        assert!(other.open(1, 2, &tag, &sealed, &mut out).is_err(), "another session");
        sealed[9] ^= 1;
        assert!(mine.open(1, 2, &tag, &sealed, &mut out).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Record::decode_all(&bytes);
            let mut page = [0; PAGE];
            page[..bytes.len()].copy_from_slice(&bytes);
            page[0..8].copy_from_slice(HEAD_MAGIC);
            page[8..10].copy_from_slice(&VERSION.to_le_bytes());
            prop_assert!(Head::open(&key(), &page).is_err());
            page[0..8].copy_from_slice(BATCH_MAGIC);
            if let Some((header, length)) = BatchHeader::decode(&part(&page, 0)) {
                prop_assert!(header.open(&key(), &[1; 16], &page, length).is_err());
            }
        }
    }
}
