//! Identifiers. They are random, so that no two objects of two vaults can be taken for one another.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $length:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $length]);

        impl $name {
            /// Its length in bytes.
            pub const LENGTH: usize = $length;

            /// Takes the bytes as they are.
            pub const fn from_bytes(bytes: [u8; $length]) -> Self {
                Self(bytes)
            }

            /// The bytes, as they stand in every binary table.
            pub const fn as_bytes(&self) -> &[u8; $length] {
                &self.0
            }

            /// Parses lower-case hexadecimal of exactly the right length.
            pub fn from_hex(text: &str) -> Option<Self> {
                let mut bytes = [0; $length];
                hex::decode_to_slice(text, &mut bytes).ok()?;
                (hex::encode(bytes) == text).then_some(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::from_hex(&text).ok_or_else(|| {
                    serde::de::Error::custom(concat!(stringify!($name), " is not lower-case hexadecimal of its length"))
                })
            }
        }
    };
}

id!(/** A vault. */ VaultId, 16);
id!(/** A tenant of a vault. */ TenantId, 16);
id!(/** A VM of a tenant; the name is an attribute of it. */ VmId, 16);
id!(/** A restore point. */ PointId, 16);
id!(/** A note about a restore point. */ NoteId, 16);
id!(/** What is written to a restore point, or to one of its disks. */ OverlayId, 16);
id!(/** What a process says of itself while it is at work. */ LeaseId, 16);
id!(/** A list of condemned blobs. */ CondemnedId, 16);
id!(/** A pack, whatever its generation. */ PackId, 16);
id!(/** Keyed hash of a cluster or index node: equal within a tenant exactly if the plaintext is. */ BlobId, 32);
id!(/** BLAKE3 of a plaintext manifest or of ciphertext. */ Digest, 32);

impl Digest {
    /// BLAKE3 of these bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_text_parses() {
        let id = PackId::from_bytes([0xab; 16]);
        assert_eq!(PackId::from_hex(&id.to_string()), Some(id));
        assert_eq!(PackId::from_hex(&id.to_string().to_uppercase()), None);
        assert_eq!(PackId::from_hex(&id.to_string()[1..]), None);
    }
}
