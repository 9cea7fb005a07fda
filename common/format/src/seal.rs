//! Objects that are sealed as one piece: manifests, tombstones and notes.
//!
//! ```text
//! header (128 bytes, clear, all of it associated data) ‖ ciphertext ‖ tag
//! ```

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use zeroize::Zeroizing;

use crate::ids::{Digest, VmId};
use crate::keys::{KEY, Kind, ONLY_ORDINAL, Scope, TAG, header_aad, nonce, object_key};
use crate::tenant::TenantKeys;
use crate::{FORMAT_VERSION, FormatError};

/// Bytes of the header.
pub const HEADER: usize = 128;
/// Most bytes of plaintext: far more than a manifest with its definition needs.
pub const MAX_PLAINTEXT: usize = 8 << 20;
/// Most bytes of the object.
pub const MAX_OBJECT: usize = HEADER + MAX_PLAINTEXT + TAG;

const MAGIC: &[u8; 8] = b"RSLSEAL1";

/// What is bound to the content, and in clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub epoch: u32,
    /// The point, or the note.
    pub id: [u8; 16],
    pub vm: VmId,
    /// Number of the restore point within its VM.
    pub number: u32,
    /// Generation of the tenant record when it was sealed.
    pub record_generation: u64,
    /// Digest of the parent's plaintext.
    pub parent: Option<Digest>,
}

impl Header {
    fn encode(&self, salt: &[u8; KEY], length: usize) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.id);
        bytes[32..64].copy_from_slice(salt);
        bytes[64..80].copy_from_slice(self.vm.as_bytes());
        bytes[80..84].copy_from_slice(&self.number.to_le_bytes());
        bytes[84..92].copy_from_slice(&self.record_generation.to_le_bytes());
        if let Some(parent) = self.parent {
            bytes[92..124].copy_from_slice(parent.as_bytes());
        }
        bytes[124..128].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<(Header, [u8; KEY], usize), FormatError> {
        if &bytes[0..8] != MAGIC {
            return Err(FormatError::Malformed("not a sealed object"));
        }
        let version = u16::from_le_bytes(part(bytes, 8));
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { found: version });
        }
        let kind = Kind::from_byte(bytes[10]).filter(|k| matches!(k, Kind::Manifest | Kind::Tombstone | Kind::Note));
        let parent: [u8; 32] = part(bytes, 92);
        let header = Header {
            kind: kind.ok_or(FormatError::Malformed("unknown kind of sealed object"))?,
            epoch: u32::from_le_bytes(part(bytes, 12)),
            id: part(bytes, 16),
            vm: VmId::from_bytes(part(bytes, 64)),
            number: u32::from_le_bytes(part(bytes, 80)),
            record_generation: u64::from_le_bytes(part(bytes, 84)),
            parent: (parent != [0; 32]).then_some(Digest::from_bytes(parent)),
        };
        Ok((header, part(bytes, 32), u32::from_le_bytes(part(bytes, 124)) as usize))
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn cipher(keys: &TenantKeys, header: &Header, salt: &[u8; KEY]) -> Result<(Aes256Gcm, Scope), FormatError> {
    let scope = keys.scope();
    let key = object_key(keys.dek(header.epoch)?.expose(), salt, &scope, header.kind, &header.id);
    let cipher = Aes256Gcm::new_from_slice(key.as_ref()).expect("AES-256 takes a key of 32 bytes");
    Ok((cipher, scope))
}

/// Seals `plaintext`, which has at most [`MAX_PLAINTEXT`] bytes. `salt` must be fresh random bytes.
pub fn seal(keys: &TenantKeys, header: &Header, salt: [u8; KEY], plaintext: &[u8]) -> Result<Vec<u8>, FormatError> {
    keys.check_writable()?;
    if plaintext.len() > MAX_PLAINTEXT {
        return Err(FormatError::Malformed("longer than a sealed object may be"));
    }
    let (cipher, scope) = cipher(keys, header, &salt)?;
    let mut object = header.encode(&salt, plaintext.len()).to_vec();
    let aad = header_aad(&scope, &object);
    let sealed = cipher.encrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: plaintext, aad: &aad });
    object.extend(sealed.expect("a sealed object is far below the limit of AES-GCM"));
    Ok(object)
}

/// Opens an object of that kind.
pub fn open(keys: &TenantKeys, kind: Kind, object: &[u8]) -> Result<(Header, Zeroizing<Vec<u8>>), FormatError> {
    let (clear, sealed) =
        object.split_first_chunk::<HEADER>().ok_or(FormatError::Malformed("shorter than its header"))?;
    let (header, salt, length) = Header::decode(clear)?;
    if header.kind != kind {
        return Err(FormatError::Mismatch("it is of another kind"));
    }
    if length > MAX_PLAINTEXT || sealed.len() != length + TAG {
        return Err(FormatError::Malformed("its length is not what its header says; it may be cut off"));
    }
    let (cipher, scope) = cipher(keys, &header, &salt)?;
    let aad = header_aad(&scope, clear);
    let plain = cipher.decrypt(&nonce(ONLY_ORDINAL).into(), Payload { msg: sealed, aad: &aad });
    Ok((header, Zeroizing::new(plain.map_err(|_| FormatError::Authentication)?)))
}

/// What an object says that it is; nothing is authenticated yet.
pub fn kind(object: &[u8]) -> Result<Kind, FormatError> {
    let clear = object.first_chunk::<HEADER>().ok_or(FormatError::Malformed("shorter than its header"))?;
    Ok(Header::decode(clear)?.0.kind)
}

/// The epoch of the DEK that an object is sealed under, as its header says.
pub fn epoch(object: &[u8]) -> Result<u32, FormatError> {
    let clear = object.first_chunk::<HEADER>().ok_or(FormatError::Malformed("shorter than its header"))?;
    Ok(Header::decode(clear)?.0.epoch)
}

/// Whether an object is as long as its header says, which is all that can be seen of it without keys.
pub fn check_clear(object: &[u8]) -> Result<(), FormatError> {
    let (clear, sealed) =
        object.split_first_chunk::<HEADER>().ok_or(FormatError::Malformed("shorter than its header"))?;
    let (_, _, length) = Header::decode(clear)?;
    match length <= MAX_PLAINTEXT && sealed.len() == length + TAG {
        true => Ok(()),
        false => Err(FormatError::Malformed("its length is not what its header says; it may be cut off")),
    }
}

/// Opens an object of any kind, to see whether it does.
pub fn check(keys: &TenantKeys, object: &[u8]) -> Result<(), FormatError> {
    open(keys, kind(object)?, object).map(drop)
}

/// Seals an object of any kind again, under the current DEK, with the same plaintext, byte for byte. `salt` must be fresh
/// random bytes.
pub fn reseal(keys: &TenantKeys, object: &[u8], salt: [u8; KEY]) -> Result<Vec<u8>, FormatError> {
    let clear = object.first_chunk::<HEADER>().ok_or(FormatError::Malformed("shorter than its header"))?;
    let (header, plain) = open(keys, Header::decode(clear)?.0.kind, object)?;
    let header = Header { epoch: keys.current_epoch(), record_generation: keys.record_generation(), ..header };
    seal(keys, &header, salt, &plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tenant::tests::keys;

    fn header() -> Header {
        Header {
            kind: Kind::Note,
            epoch: 1,
            id: [1; 16],
            vm: VmId::from_bytes([2; 16]),
            number: 7,
            record_generation: 1,
            parent: Some(Digest::from_bytes([3; 32])),
        }
    }

    #[test]
    fn no_flipped_byte_or_cut_goes_unseen() {
        let object = seal(&keys(1), &header(), [5; 32], b"content").unwrap();
        let (back, plain) = open(&keys(1), Kind::Note, &object).unwrap();
        assert_eq!((back, &plain[..]), (header(), &b"content"[..]));
        for at in 0..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 1;
            assert!(open(&keys(1), Kind::Note, &damaged).is_err(), "byte {at}");
            assert!(open(&keys(1), Kind::Note, &object[..at]).is_err(), "cut at {at}");
        }
        assert!(open(&keys(1), Kind::Manifest, &object).is_err(), "another kind");
        assert!(open(&keys(2), Kind::Note, &object).is_err(), "another vault and tenant");
    }

    #[test]
    fn what_is_sealed_again_is_the_same_under_another_key() {
        let (old, new) = (keys(1), crate::tenant::tests::keys_of_next_epoch(1));
        let object = seal(&old, &header(), [5; 32], b"content").unwrap();
        let again = reseal(&new, &object, [6; 32]).unwrap();
        assert_eq!((epoch(&object), epoch(&again)), (Ok(1), Ok(2)));
        assert_eq!((check(&new, &object), check(&new, &again)), (Ok(()), Ok(())));
        let (back, plain) = open(&new, Kind::Note, &again).unwrap();
        assert_eq!(&plain[..], b"content");
        assert_eq!(back, Header { epoch: 2, record_generation: 2, ..header() });
        assert_eq!(open(&old, Kind::Note, &again).unwrap_err(), FormatError::UnknownEpoch(2));
        for at in HEADER..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 1;
            assert_eq!(reseal(&new, &damaged, [7; 32]), Err(FormatError::Authentication), "byte {at}");
            assert_eq!(check(&new, &damaged), Err(FormatError::Authentication), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn hostile_objects_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = open(&keys(1), Kind::Manifest, &bytes);
            let _ = (epoch(&bytes), reseal(&keys(1), &bytes, [5; 32]));
            let real = seal(&keys(1), &header(), [5; 32], b"content").unwrap();
            let known = bytes.len().min(11);
            bytes[..known].copy_from_slice(&real[..known]);
            let _ = open(&keys(1), Kind::Note, &bytes);
        }
    }
}
