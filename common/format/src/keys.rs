//! Every key derivation, nonce and associated-data construction of the format, on one screen.
//!
//! ```text
//! KMS: KEK ─ wraps ─ payload with the master                        (module tenant)
//! master ─ HKDF(salt of the record) ─ seals DEKs and dedup secret   (module tenant)
//! DEK of an epoch ─ HKDF(salt of the object) ─ seals one object     (modules pack and seal)
//! dedup secret ─ keyed BLAKE3 ─ blob ids
//! ```
//!
//! Nonces: every object has a random 32-byte salt and so its own AES-256-GCM key, and inside it the nonce is the
//! ordinal. A closed object is never appended to, and whoever seals other bytes takes a new salt, so a pair of key and
//! nonce can't repeat.

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::FORMAT_VERSION;
use crate::ids::{BlobId, TenantId, VaultId};

/// Bytes of every key, secret and salt.
pub const KEY: usize = 32;
/// Bytes of an authentication tag.
pub const TAG: usize = 16;

/// What kind of object a key is for. The numbers stand in headers, trailers and derivations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    DataPack = 1,
    IndexPack = 2,
    Manifest = 3,
    Tombstone = 4,
    Note = 5,
    Record = 6,
}

impl Kind {
    /// The kind that a byte stands for.
    pub fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::DataPack, Kind::IndexPack, Kind::Manifest, Kind::Tombstone, Kind::Note, Kind::Record]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// Nonce of the sealed table of blob lengths; blobs have their ordinals.
pub const LENGTHS_ORDINAL: u32 = 0xFFFF_FFFF;
/// Nonce of the sealed table of blob ids.
pub const IDS_ORDINAL: u32 = 0xFFFF_FFFE;
/// Nonce of an object that is sealed as one piece.
pub const ONLY_ORDINAL: u32 = 0;

/// The label of the one HKDF derivation; it would change with the derivation.
const OBJECT_LABEL: &[u8] = b"reseal/1 object key";

macro_rules! secret {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name(Zeroizing<[u8; KEY]>);

        impl $name {
            /// Takes 32 random bytes.
            pub fn from_bytes(bytes: Zeroizing<[u8; KEY]>) -> Self {
                Self(bytes)
            }

            /// The bytes, to be sealed.
            pub(crate) fn expose(&self) -> &[u8; KEY] {
                &self.0
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }
    };
}

secret!(/** A tenant's random secret; stored only wrapped by the KEK. */ Master);
secret!(/** A tenant's data-encryption key of one epoch. */ Dek);
secret!(/** Key of a tenant's blob ids. */ DedupSecret);

impl Master {
    /// A copy, to be sealed in a recovery kit.
    pub fn for_escrow(&self) -> Zeroizing<[u8; KEY]> {
        self.0.clone()
    }
}

/// Vault and tenant: what every derivation and all associated data are bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    pub vault: VaultId,
    pub tenant: TenantId,
}

/// The key of one object: HKDF-SHA256(secret, salt, label ‖ vault ‖ tenant ‖ kind ‖ id).
pub(crate) fn object_key(
    secret: &[u8; KEY],
    salt: &[u8; KEY],
    scope: &Scope,
    kind: Kind,
    id: &[u8; 16],
) -> Zeroizing<[u8; KEY]> {
    let mut key = Zeroizing::new([0; KEY]);
    let info = [OBJECT_LABEL, scope.vault.as_bytes(), scope.tenant.as_bytes(), &[kind as u8], id];
    Hkdf::<Sha256>::new(Some(salt), secret)
        .expand_multi_info(&info, key.as_mut())
        .expect("32 bytes are within what HKDF-SHA256 can give");
    key
}

/// The 96-bit nonce of an ordinal: eight zero bytes, then the ordinal, big-endian.
pub(crate) fn nonce(ordinal: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[8..].copy_from_slice(&ordinal.to_be_bytes());
    nonce
}

/// Length of [`blob_aad`].
const BLOB_AAD: usize = 2 + 16 + 16 + 1 + 16 + 4 + 4 + 4;

/// Associated data of a part of a pack: version ‖ vault ‖ tenant ‖ kind ‖ pack ‖ generation ‖ ordinal ‖ length.
pub(crate) fn blob_aad(
    scope: &Scope,
    kind: Kind,
    pack: &[u8; 16],
    generation: u32,
    ordinal: u32,
    length: u32,
) -> [u8; BLOB_AAD] {
    let mut aad = [0; BLOB_AAD];
    aad[0..2].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    aad[2..18].copy_from_slice(scope.vault.as_bytes());
    aad[18..34].copy_from_slice(scope.tenant.as_bytes());
    aad[34] = kind as u8;
    aad[35..51].copy_from_slice(pack);
    aad[51..55].copy_from_slice(&generation.to_le_bytes());
    aad[55..59].copy_from_slice(&ordinal.to_le_bytes());
    aad[59..63].copy_from_slice(&length.to_le_bytes());
    aad
}

/// Associated data of an object that is sealed as one piece: version ‖ vault ‖ tenant ‖ its whole clear header.
pub(crate) fn header_aad(scope: &Scope, header: &[u8]) -> Vec<u8> {
    [&FORMAT_VERSION.to_le_bytes()[..], scope.vault.as_bytes(), scope.tenant.as_bytes(), header].concat()
}

impl DedupSecret {
    /// The id of a blob: BLAKE3 keyed with the secret, of the BLAKE3 hash of the plaintext. Whoever knows the hash and
    /// the secret can compute it; the id alone tells nothing about the plaintext.
    pub fn blob_id(&self, plaintext_hash: &blake3::Hash) -> BlobId {
        BlobId::from_bytes(*blake3::keyed_hash(&self.0, plaintext_hash.as_bytes()).as_bytes())
    }

    /// The id of the blob of this plaintext.
    pub fn id_of(&self, plaintext: &[u8]) -> BlobId {
        self.blob_id(&blake3::hash(plaintext))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_derivation_changes_the_key() {
        let scope = Scope { vault: VaultId::from_bytes([1; 16]), tenant: TenantId::from_bytes([2; 16]) };
        let base = object_key(&[3; 32], &[4; 32], &scope, Kind::DataPack, &[5; 16]);
        let elsewhere = Scope { vault: VaultId::from_bytes([9; 16]), ..scope };
        let other = Scope { tenant: TenantId::from_bytes([9; 16]), ..scope };
        for key in [
            object_key(&[9; 32], &[4; 32], &scope, Kind::DataPack, &[5; 16]),
            object_key(&[3; 32], &[9; 32], &scope, Kind::DataPack, &[5; 16]),
            object_key(&[3; 32], &[4; 32], &elsewhere, Kind::DataPack, &[5; 16]),
            object_key(&[3; 32], &[4; 32], &other, Kind::DataPack, &[5; 16]),
            object_key(&[3; 32], &[4; 32], &scope, Kind::IndexPack, &[5; 16]),
            object_key(&[3; 32], &[4; 32], &scope, Kind::DataPack, &[9; 16]),
        ] {
            assert_ne!(*key, *base);
        }
    }

    #[test]
    fn secrets_do_not_print() {
        let dek = Dek::from_bytes(Zeroizing::new([0xAB; 32]));
        assert_eq!(format!("{dek:?}"), "Dek(redacted)");
    }
}
