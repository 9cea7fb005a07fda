//! Packs: objects of at most 16,384 sealed blobs, written once.
//!
//! ```text
//! blob × count ‖ sealed id table ‖ sealed length table ‖ trailer (128 bytes, clear)
//! ```
//!
//! Each blob, and each table, is AES-256-GCM ciphertext ‖ tag. One read of the tail usually gets all that is needed to
//! read any blob with one more. Generation G+1 of a pack has the same ordinals as G; a blob of length 0 was emptied.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::frames::MAX_ENCODED;
use crate::ids::{BlobId, Digest, PackId};
use crate::keys::{IDS_ORDINAL, KEY, Kind, LENGTHS_ORDINAL, Scope, TAG, blob_aad, nonce, object_key};
use crate::tenant::TenantKeys;
use crate::{FORMAT_VERSION, FormatError};

/// Most blobs of a pack: an index entry has 14 bits for the ordinal.
pub const MAX_BLOBS: u32 = 1 << 14;
/// A pack is closed when its blobs have reached this many bytes: large enough that an object store's price per request
/// does not matter, small enough that an interrupted backup loses little.
pub const TARGET_BYTES: u64 = 64 << 20;
/// Most bytes of one sealed blob.
pub const MAX_SEALED: usize = MAX_ENCODED + TAG;
/// Bytes of the trailer.
pub const TRAILER: usize = 128;

const MAGIC: &[u8; 8] = b"RSLPACK1";
const END: &[u8; 8] = b"1KCAPLSR";
/// Offset of the digest in the trailer: it covers all bytes of the object before it.
const DIGEST_AT: usize = 88;
const LENGTH: usize = 4;

/// The clear end of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trailer {
    pub kind: Kind,
    pub generation: u32,
    pub id: PackId,
    pub epoch: u32,
    /// Blobs, emptied ones too.
    pub count: u32,
    /// Bytes of all sealed blobs.
    pub blob_bytes: u64,
    pub salt: [u8; KEY],
    /// BLAKE3 of everything before it.
    pub digest: Digest,
}

impl Trailer {
    /// Bytes of the sealed table of ids.
    pub fn id_table_bytes(&self) -> usize {
        self.count as usize * BlobId::LENGTH + TAG
    }

    /// Bytes of the sealed table of lengths.
    pub fn length_table_bytes(&self) -> usize {
        self.count as usize * LENGTH + TAG
    }

    /// Bytes of both tables and the trailer: what a reader wants of the tail.
    pub fn tail_bytes(&self) -> usize {
        self.id_table_bytes() + self.length_table_bytes() + TRAILER
    }

    fn encode_without_digest(&self) -> [u8; DIGEST_AT] {
        let mut bytes = [0; DIGEST_AT];
        bytes[0..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[12..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..32].copy_from_slice(self.id.as_bytes());
        bytes[32..36].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.count.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.blob_bytes.to_le_bytes());
        bytes[48..56].copy_from_slice(&[0; 8]);
        bytes[56..88].copy_from_slice(&self.salt);
        bytes
    }

    /// Parses the last 128 bytes of an object of `object_length` bytes, and checks that its parts add up to that.
    pub fn decode(bytes: &[u8; TRAILER], object_length: u64) -> Result<Trailer, FormatError> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if &bytes[0..8] != MAGIC || &bytes[120..128] != END {
            return Err(FormatError::Malformed("no pack trailer at its end; it may be cut off"));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { found: version });
        }
        let kind = Kind::from_byte(bytes[10]).filter(|kind| matches!(kind, Kind::DataPack | Kind::IndexPack));
        let mut trailer = Trailer {
            kind: kind.ok_or(FormatError::Malformed("unknown kind of pack"))?,
            generation: u32_at(12),
            id: PackId::from_bytes([0; 16]),
            epoch: u32_at(32),
            count: u32_at(36),
            blob_bytes: u64::from(u32_at(40)) | u64::from(u32_at(44)) << 32,
            salt: [0; KEY],
            digest: Digest::from_bytes([0; 32]),
        };
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        trailer.id = PackId::from_bytes(id);
        trailer.salt.copy_from_slice(&bytes[56..88]);
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[DIGEST_AT..120]);
        trailer.digest = Digest::from_bytes(digest);
        if trailer.count > MAX_BLOBS {
            return Err(FormatError::Malformed("more blobs than a pack holds"));
        }
        if trailer.blob_bytes.checked_add(trailer.tail_bytes() as u64) != Some(object_length) {
            return Err(FormatError::Malformed("its parts do not add up to its length"));
        }
        Ok(trailer)
    }
}

/// The AES-256-GCM key of one generation of one pack, and what its associated data is made of.
struct PackKey {
    key: LessSafeKey,
    scope: Scope,
    kind: Kind,
    id: PackId,
    generation: u32,
}

impl PackKey {
    fn new(keys: &TenantKeys, trailer: &Trailer) -> Result<PackKey, FormatError> {
        let dek = keys.dek(trailer.epoch)?;
        let Trailer { kind, id, generation, .. } = *trailer;
        let key = object_key(dek.expose(), &trailer.salt, &keys.scope(), kind, id.as_bytes());
        let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).expect("AES-256 takes a key of 32 bytes");
        Ok(PackKey { key: LessSafeKey::new(key), scope: keys.scope(), kind, id, generation })
    }

    fn aad(&self, ordinal: u32, length: usize) -> Aad<impl AsRef<[u8]>> {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        Aad::from(blob_aad(&self.scope, self.kind, self.id.as_bytes(), self.generation, ordinal, length))
    }

    fn seal(&self, ordinal: u32, content: &mut Vec<u8>) {
        let aad = self.aad(ordinal, content.len());
        let nonce = Nonce::assume_unique_for_key(nonce(ordinal));
        self.key.seal_in_place_append_tag(nonce, aad, content).expect("a blob is far below the limit of AES-GCM");
    }

    fn open<'a>(&self, ordinal: u32, sealed: &'a mut [u8]) -> Result<&'a mut [u8], FormatError> {
        let length = sealed.len().checked_sub(TAG).ok_or(FormatError::Malformed("shorter than a tag"))?;
        let nonce = Nonce::assume_unique_for_key(nonce(ordinal));
        self.key.open_in_place(nonce, self.aad(ordinal, length), sealed).map_err(|_| FormatError::Authentication)
    }
}

/// Seals the blobs of a new pack, one after the other.
pub struct PackSealer {
    key: PackKey,
    trailer: Trailer,
    lengths: Vec<u8>,
    ids: Vec<u8>,
    hasher: blake3::Hasher,
}

impl PackSealer {
    /// Starts generation 0 of a pack under the tenant's current DEK. `id` and `salt` must be fresh random bytes.
    pub fn new(keys: &TenantKeys, kind: Kind, id: PackId, salt: [u8; KEY]) -> Result<PackSealer, FormatError> {
        PackSealer::of_generation(keys, kind, id, 0, salt)
    }

    /// Starts the generation after that of `old`, under the tenant's current DEK. Each blob takes the ordinal that it had,
    /// or [`PackSealer::empty`] does. `salt` must be fresh random bytes.
    pub fn next(keys: &TenantKeys, old: &Trailer, salt: [u8; KEY]) -> Result<PackSealer, FormatError> {
        let next =
            old.generation.checked_add(1).ok_or(FormatError::Malformed("its generation is the highest there is"));
        PackSealer::of_generation(keys, old.kind, old.id, next?, salt)
    }

    /// Starts that generation of a pack whose others may be unreadable: which is to be above all that ever were. `salt` must be fresh random
    /// bytes.
    pub fn of_generation(
        keys: &TenantKeys,
        kind: Kind,
        id: PackId,
        generation: u32,
        salt: [u8; KEY],
    ) -> Result<PackSealer, FormatError> {
        let trailer = Trailer {
            kind,
            generation,
            id,
            epoch: keys.current_epoch(),
            count: 0,
            blob_bytes: 0,
            salt,
            digest: Digest::from_bytes([0; 32]),
        };
        keys.check_writable()?;
        let key = PackKey::new(keys, &trailer)?;
        Ok(PackSealer { key, trailer, lengths: Vec::new(), ids: Vec::new(), hasher: blake3::Hasher::new() })
    }

    /// The pack.
    pub fn id(&self) -> PackId {
        self.trailer.id
    }

    /// Its generation.
    pub fn generation(&self) -> u32 {
        self.trailer.generation
    }

    /// Blobs so far.
    pub fn count(&self) -> u32 {
        self.trailer.count
    }

    /// Bytes of all sealed blobs so far.
    pub fn blob_bytes(&self) -> u64 {
        self.trailer.blob_bytes
    }

    /// Bytes of the object if it were finished now.
    pub fn object_bytes(&self) -> u64 {
        self.trailer.blob_bytes + self.trailer.tail_bytes() as u64
    }

    /// Whether it should be closed: it has as many blobs, or as many bytes, as a pack may have.
    pub fn is_full(&self) -> bool {
        self.trailer.count == MAX_BLOBS || self.trailer.blob_bytes >= TARGET_BYTES
    }

    /// Seals the next blob in place (content becomes ciphertext ‖ tag, to be appended to the object); its ordinal.
    ///
    /// # Panics
    /// If the pack is full, or the content is empty or longer than any blob.
    pub fn seal(&mut self, id: BlobId, content: &mut Vec<u8>) -> u32 {
        assert!(self.trailer.count < MAX_BLOBS, "a full pack takes no more blobs");
        assert!((1..=MAX_ENCODED).contains(&content.len()), "a blob has a length within its limits");
        let ordinal = self.trailer.count;
        self.key.seal(ordinal, content);
        self.hasher.update(content);
        self.lengths.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.ids.extend(id.as_bytes());
        self.trailer.count += 1;
        self.trailer.blob_bytes += content.len() as u64;
        ordinal
    }

    /// Leaves the next ordinal to a blob that was emptied: nothing stands there.
    ///
    /// # Panics
    /// If the pack has as many blobs as it may.
    pub fn empty(&mut self) {
        assert!(self.trailer.count < MAX_BLOBS, "a full pack takes no more blobs");
        self.lengths.extend([0; LENGTH]);
        self.ids.extend([0; BlobId::LENGTH]);
        self.trailer.count += 1;
    }

    /// The rest of the object, after the blobs: both tables and the trailer.
    pub fn finish(mut self) -> Vec<u8> {
        self.key.seal(IDS_ORDINAL, &mut self.ids);
        self.key.seal(LENGTHS_ORDINAL, &mut self.lengths);
        let mut tail = self.ids;
        tail.append(&mut self.lengths);
        tail.extend(self.trailer.encode_without_digest());
        self.hasher.update(&tail);
        tail.extend(self.hasher.finalize().as_bytes());
        tail.extend(END);
        tail
    }
}

/// Opens the tables and blobs of a pack.
pub struct PackOpener {
    key: PackKey,
    trailer: Trailer,
}

impl PackOpener {
    /// Derives the pack's key. What the trailer says is trusted only so far as tags then match.
    pub fn new(keys: &TenantKeys, trailer: Trailer) -> Result<PackOpener, FormatError> {
        Ok(PackOpener { key: PackKey::new(keys, &trailer)?, trailer })
    }

    /// The pack's trailer.
    pub fn trailer(&self) -> &Trailer {
        &self.trailer
    }

    /// Opens the table of lengths.
    pub fn open_lengths(&self, mut sealed: Vec<u8>) -> Result<BlobLengths, FormatError> {
        let plain = self.key.open(LENGTHS_ORDINAL, &mut sealed)?;
        let mut ends = Vec::with_capacity(plain.len() / LENGTH);
        let mut end = 0u64;
        for length in plain.chunks_exact(LENGTH) {
            let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
            if length as usize > MAX_SEALED || (length > 0 && length as usize <= TAG) {
                return Err(FormatError::Malformed("a blob has a length out of range"));
            }
            end += u64::from(length);
            ends.push(u32::try_from(end).map_err(|_| FormatError::Malformed("pack is too long"))?);
        }
        if end != self.trailer.blob_bytes || ends.len() != self.trailer.count as usize {
            return Err(FormatError::Malformed("table of lengths contradicts the trailer"));
        }
        Ok(BlobLengths { ends })
    }

    /// Opens the table of ids, by ordinal.
    pub fn open_ids(&self, mut sealed: Vec<u8>) -> Result<Vec<BlobId>, FormatError> {
        let plain = self.key.open(IDS_ORDINAL, &mut sealed)?;
        if plain.len() != self.trailer.count as usize * BlobId::LENGTH {
            return Err(FormatError::Malformed("table of ids contradicts the trailer"));
        }
        let id = |row: &[u8]| {
            let mut bytes = [0; BlobId::LENGTH];
            bytes.copy_from_slice(row);
            BlobId::from_bytes(bytes)
        };
        Ok(plain.chunks_exact(BlobId::LENGTH).map(id).collect())
    }

    /// Opens a blob in place.
    pub fn open_blob<'a>(&self, ordinal: u32, sealed: &'a mut [u8]) -> Result<&'a mut [u8], FormatError> {
        self.key.open(ordinal, sealed)
    }
}

/// Where each blob of a pack stands.
#[derive(Debug, Clone)]
pub struct BlobLengths {
    ends: Vec<u32>,
}

impl BlobLengths {
    /// Blobs, emptied ones too.
    pub fn count(&self) -> u32 {
        u32::try_from(self.ends.len()).unwrap_or(u32::MAX)
    }

    /// Offset in the object and sealed length of a blob; `None` if there is no such ordinal or it was emptied.
    pub fn place(&self, ordinal: u32) -> Option<(u64, usize)> {
        let ordinal = ordinal as usize;
        let end = *self.ends.get(ordinal)?;
        let start = if ordinal == 0 { 0 } else { self.ends[ordinal - 1] };
        (end > start).then_some((u64::from(start), (end - start) as usize))
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> usize {
        self.ends.len() * LENGTH
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tenant::tests::keys;

    fn pack(blobs: &[&[u8]]) -> Vec<u8> {
        let mut sealer = PackSealer::new(&keys(1), Kind::DataPack, PackId::from_bytes([3; 16]), [4; 32]).unwrap();
        let mut object = Vec::new();
        for (nth, blob) in blobs.iter().enumerate() {
            let mut content = blob.to_vec();
            let ordinal = sealer.seal(keys(1).dedup().id_of(blob), &mut content);
            assert_eq!(ordinal as usize, nth);
            object.extend(content);
        }
        object.extend(sealer.finish());
        object
    }

    fn trailer(object: &[u8]) -> Result<Trailer, FormatError> {
        let (_, last) = object.split_last_chunk::<TRAILER>().unwrap();
        Trailer::decode(last, object.len() as u64)
    }

    fn open_all(object: &[u8], keys: &TenantKeys) -> Result<Vec<Vec<u8>>, FormatError> {
        let trailer = trailer(object)?;
        let ids_at = usize::try_from(trailer.blob_bytes).unwrap();
        let lengths_at = ids_at + trailer.id_table_bytes();
        let lengths_end = lengths_at + trailer.length_table_bytes();
        let opener = PackOpener::new(keys, trailer)?;
        let lengths = opener.open_lengths(object[lengths_at..lengths_end].to_vec())?;
        let ids = opener.open_ids(object[ids_at..lengths_at].to_vec())?;
        (0..lengths.count())
            .map(|ordinal| {
                let (start, length) = lengths.place(ordinal).unwrap();
                let start = usize::try_from(start).unwrap();
                let mut sealed = object[start..start + length].to_vec();
                let plain = opener.open_blob(ordinal, &mut sealed)?.to_vec();
                assert_eq!(keys.dedup().id_of(&plain), ids[ordinal as usize]);
                Ok(plain)
            })
            .collect()
    }

    #[test]
    fn blobs_come_back() {
        let object = pack(&[b"one", b"two", &[7; 5000]]);
        assert_eq!(open_all(&object, &keys(1)).unwrap(), [b"one".to_vec(), b"two".to_vec(), vec![7; 5000]]);
        assert_eq!(trailer(&object).unwrap().digest, Digest::of(&object[..object.len() - 40]));
    }

    #[test]
    fn the_next_generation_has_the_same_ordinals_under_another_key() {
        let keys = keys(1);
        let old = pack(&[b"one", b"two", b"three"]);
        let mut sealer = PackSealer::next(&keys, &trailer(&old).unwrap(), [5; 32]).unwrap();
        let (mut one, mut three) = (b"one".to_vec(), b"three".to_vec());
        assert_eq!(sealer.seal(keys.dedup().id_of(b"one"), &mut one), 0);
        sealer.empty();
        assert_eq!(sealer.seal(keys.dedup().id_of(b"three"), &mut three), 2);
        let object = [one, three, sealer.finish()].concat();
        let new = trailer(&object).unwrap();
        assert_eq!((new.generation, new.count, new.id), (1, 3, trailer(&old).unwrap().id));
        let opener = PackOpener::new(&keys, new.clone()).unwrap();
        let lengths_at = usize::try_from(new.blob_bytes).unwrap() + new.id_table_bytes();
        let lengths = opener.open_lengths(object[lengths_at..lengths_at + new.length_table_bytes()].to_vec()).unwrap();
        assert_eq!([0, 1, 2].map(|ordinal| lengths.place(ordinal)), [Some((0, 19)), None, Some((19, 21))]);
        assert_eq!(opener.open_blob(2, &mut object[19..40].to_vec()).unwrap(), b"three");
        assert_ne!(object[..19], old[..19], "another salt, so another key");
        let last = Trailer { generation: u32::MAX, ..new };
        assert!(PackSealer::next(&keys, &last, [6; 32]).is_err());
    }

    #[test]
    fn no_flipped_byte_goes_unseen() {
        let object = pack(&[b"one", b"two"]);
        for at in 0..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 0x40;
            let whole = trailer(&damaged).map(|t| t.digest == Digest::of(&damaged[..damaged.len() - 40]));
            assert_ne!(whole, Ok(true), "byte {at} is outside the digest");
            // What is read through the tables is authenticated; only the digest and unused bytes are not read.
            let unread = at >= object.len() - TRAILER;
            assert!(unread || open_all(&damaged, &keys(1)).is_err(), "byte {at} was served");
        }
    }

    #[test]
    fn each_bound_field_of_the_associated_data_matters() {
        let keys = keys(1);
        let object = pack(&[b"one", b"two"]);
        let original = trailer(&object).unwrap();
        let open = |trailer: &Trailer, keys: &TenantKeys, ordinal| {
            PackOpener::new(keys, trailer.clone()).unwrap().open_blob(ordinal, &mut object[..3 + TAG].to_vec()).is_ok()
        };
        assert!(open(&original, &keys, 0));
        assert!(!open(&original, &keys, 1), "ordinal");
        assert!(!open(&Trailer { generation: 1, ..original.clone() }, &keys, 0), "generation");
        assert!(!open(&Trailer { id: PackId::from_bytes([9; 16]), ..original.clone() }, &keys, 0), "pack");
        assert!(!open(&Trailer { kind: Kind::IndexPack, ..original.clone() }, &keys, 0), "kind");
        assert!(!open(&Trailer { salt: [9; 32], ..original.clone() }, &keys, 0), "salt");
        assert!(!open(&original, &crate::tenant::tests::keys(2), 0), "vault and tenant");
        let opener = PackOpener::new(&keys, original).unwrap();
        assert!(opener.open_blob(0, &mut object[..4 + TAG].to_vec()).is_err(), "length");
    }

    /// `aes-gcm` is another implementation than the one that sealed.
    #[test]
    fn an_independent_implementation_opens_every_blob() {
        use aes_gcm::aead::{Aead, KeyInit, Payload};
        let keys = keys(1);
        let object = pack(&[b"one", &[7; 70]]);
        let trailer = trailer(&object).unwrap();
        let dek = keys.dek(trailer.epoch).unwrap();
        let key = object_key(dek.expose(), &trailer.salt, &keys.scope(), trailer.kind, trailer.id.as_bytes());
        let cipher = aes_gcm::Aes256Gcm::new_from_slice(key.as_ref()).unwrap();
        let mut start = 0;
        for (ordinal, plain) in [(0u32, &b"one"[..]), (1, &[7; 70])] {
            let length = u32::try_from(plain.len()).unwrap();
            let aad = blob_aad(&keys.scope(), trailer.kind, trailer.id.as_bytes(), 0, ordinal, length);
            let sealed = &object[start..start + plain.len() + TAG];
            let opened = cipher.decrypt(&nonce(ordinal).into(), Payload { msg: sealed, aad: &aad }).unwrap();
            assert_eq!(opened, plain);
            start += sealed.len();
        }
    }

    proptest! {
        #[test]
        fn hostile_trailers_never_panic(tail in prop::collection::vec(any::<u8>(), TRAILER), length: u64, valid: bool) {
            let mut tail: [u8; TRAILER] = tail.try_into().unwrap();
            if valid {
                let real = pack(&[b"x"]);
                tail[0..12].copy_from_slice(&real[real.len() - TRAILER..][..12]);
                tail[120..].copy_from_slice(END);
            }
            let _ = Trailer::decode(&tail, length);
        }
    }
}
