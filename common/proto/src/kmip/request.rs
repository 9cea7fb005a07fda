//! Requests: one operation, one message, no time stamp.
//!
//! A Time Stamp would make a server whose clock differs refuse; nothing here needs one, for TLS keeps messages from
//! being replayed.

use zeroize::Zeroizing;

use super::MAX_MESSAGE;
use super::tags::{self, ASKED, AttributeKind};
use super::ttlv::{Tag, Writer};

/// Bytes of an authentication tag that is asked for: all that GCM has.
pub const TAG_LEN: usize = 16;

/// Bits of a key that is made or used.
pub const KEY_BITS: i32 = 256;

/// Most keys that are asked for under one name, and one more to see that there are more.
pub const MAX_LOCATED: usize = 16;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Before the dot.
    pub major: i32,
    /// After the dot.
    pub minor: i32,
}

impl Version {
    /// 1.0 knows no Discover Versions.
    pub const V1_0: Self = Self { major: 1, minor: 0 };
    /// The first with Discover Versions.
    pub const V1_1: Self = Self { major: 1, minor: 1 };
    /// The first whose Encrypt authenticates.
    pub const V1_4: Self = Self { major: 1, minor: 4 };
    /// Attributes have tags rather than names.
    pub const V2_0: Self = Self { major: 2, minor: 0 };

    /// All that this codec speaks, the best first.
    pub const KNOWN: [Self; 6] =
        [Self::V2_0, Self::V1_4, Self { major: 1, minor: 3 }, Self { major: 1, minor: 2 }, Self::V1_1, Self::V1_0];

    pub(super) fn write(self, w: &mut Writer) {
        w.structure(tags::PROTOCOL_VERSION, |w| {
            w.integer(tags::PROTOCOL_VERSION_MAJOR, self.major);
            w.integer(tags::PROTOCOL_VERSION_MINOR, self.minor);
        });
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a server is asked to do. No `Debug`: it may hold what is to be encrypted.
#[derive(Clone, Copy)]
pub enum Request<'a> {
    /// Which versions it speaks.
    DiscoverVersions,
    /// The identifiers of what has this name.
    Locate { name: &'a str },
    /// A new AES key of 256 bits that may encrypt and decrypt.
    Create { name: &'a str },
    /// Let a new key be used.
    Activate { id: &'a str },
    /// Let a key not be used any more.
    Revoke { id: &'a str },
    /// Destroy a key that is not in use.
    Destroy { id: &'a str },
    /// What a key is.
    GetAttributes { id: &'a str },
    /// The key itself, not wrapped.
    Get { id: &'a str },
    /// AES-256-GCM with an IV that the server chooses.
    Encrypt { id: &'a str, additional: &'a [u8], plaintext: &'a [u8] },
    /// The reverse.
    Decrypt { id: &'a str, additional: &'a [u8], sealed: super::Sealed<'a> },
}

impl Request<'_> {
    /// The operation's number.
    pub fn operation(&self) -> u32 {
        match self {
            Self::Create { .. } => 0x01,
            Self::Locate { .. } => 0x08,
            Self::Get { .. } => 0x0A,
            Self::GetAttributes { .. } => 0x0B,
            Self::Activate { .. } => 0x12,
            Self::Revoke { .. } => 0x13,
            Self::Destroy { .. } => 0x14,
            Self::DiscoverVersions => 0x1E,
            Self::Encrypt { .. } => 0x1F,
            Self::Decrypt { .. } => 0x20,
        }
    }

    /// The whole message.
    pub fn encode(&self, version: Version) -> Zeroizing<Vec<u8>> {
        let mut w = Writer::new();
        w.structure(tags::REQUEST_MESSAGE, |w| {
            w.structure(tags::REQUEST_HEADER, |w| {
                version.write(w);
                w.integer(tags::MAXIMUM_RESPONSE_SIZE, i32::try_from(MAX_MESSAGE).unwrap_or(i32::MAX));
                w.integer(tags::BATCH_COUNT, 1);
            });
            w.structure(tags::BATCH_ITEM, |w| {
                w.enumeration(tags::OPERATION, self.operation());
                w.structure(tags::REQUEST_PAYLOAD, |w| self.payload(version, w));
            });
        });
        w.finish()
    }

    fn payload(&self, version: Version, w: &mut Writer) {
        match *self {
            Self::DiscoverVersions => {
                for version in Version::KNOWN {
                    version.write(w);
                }
            }
            Self::Locate { name } => {
                w.integer(tags::MAXIMUM_ITEMS, i32::try_from(MAX_LOCATED + 1).unwrap_or(i32::MAX));
                list(version, w, None, |attribute| attribute.named(name));
            }
            Self::Create { name } => {
                w.enumeration(tags::OBJECT_TYPE, tags::OBJECT_SYMMETRIC_KEY);
                list(version, w, Some(tags::TEMPLATE_ATTRIBUTE), |attribute| {
                    attribute.write(tags::A_ALGORITHM, |w, tag| w.enumeration(tag, tags::AES));
                    attribute.write(tags::A_LENGTH, |w, tag| w.integer(tag, KEY_BITS));
                    attribute.write(tags::A_USAGE, |w, tag| w.integer(tag, tags::MAY_ENCRYPT | tags::MAY_DECRYPT));
                    attribute.named(name);
                });
            }
            Self::Activate { id } | Self::Destroy { id } => w.text(tags::UNIQUE_IDENTIFIER, id),
            Self::Revoke { id } => {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                w.structure(tags::REVOCATION_REASON, |w| {
                    w.enumeration(tags::REVOCATION_REASON_CODE, tags::CESSATION_OF_OPERATION);
                });
            }
            Self::GetAttributes { id } => {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                for asked in ASKED {
                    if version >= Version::V2_0 {
                        w.enumeration(tags::ATTRIBUTE_REFERENCE, asked.tag.number());
                    } else {
                        w.text(tags::ATTRIBUTE_NAME, asked.name);
                    }
                }
            }
            Self::Get { id } => {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                w.enumeration(tags::KEY_FORMAT_TYPE, tags::RAW);
            }
            Self::Encrypt { id, additional, plaintext } => {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                parameters(w, true);
                w.bytes(tags::DATA, plaintext);
                w.bytes(tags::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA, additional);
            }
            Self::Decrypt { id, additional, sealed } => {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                parameters(w, false);
                w.bytes(tags::DATA, sealed.ciphertext);
                w.bytes(tags::IV_COUNTER_NONCE, sealed.iv);
                w.bytes(tags::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA, additional);
                w.bytes(tags::AUTHENTICATED_ENCRYPTION_TAG, sealed.tag);
            }
        }
    }
}

/// Cryptographic Parameters, always sent: a server's own defaults may be anything.
fn parameters(w: &mut Writer, random_iv: bool) {
    w.structure(tags::CRYPTOGRAPHIC_PARAMETERS, |w| {
        w.enumeration(tags::BLOCK_CIPHER_MODE, tags::GCM);
        w.enumeration(tags::CRYPTOGRAPHIC_ALGORITHM, tags::AES);
        if random_iv {
            w.boolean(tags::RANDOM_IV, true);
        }
        w.integer(tags::TAG_LENGTH, i32::try_from(TAG_LEN).unwrap_or(i32::MAX));
    });
}

/// A list of attributes: up to KMIP 1.4 each behind its name, within `wrapper` if there is one; from 2.0 on in one
/// structure, each under its tag.
fn list(version: Version, w: &mut Writer, wrapper: Option<Tag>, items: impl FnOnce(&mut AttributeWriter<'_>)) {
    let tagged = version >= Version::V2_0;
    let wrapper = if tagged { Some(tags::ATTRIBUTES) } else { wrapper };
    match wrapper {
        Some(wrapper) => w.structure(wrapper, |w| items(&mut AttributeWriter { w, tagged })),
        None => items(&mut AttributeWriter { w, tagged }),
    }
}

struct AttributeWriter<'a> {
    w: &'a mut Writer,
    tagged: bool,
}

impl AttributeWriter<'_> {
    fn write(&mut self, kind: AttributeKind, value: impl FnOnce(&mut Writer, Tag)) {
        if self.tagged {
            value(self.w, kind.tag);
        } else {
            self.w.structure(tags::ATTRIBUTE, |w| {
                w.text(tags::ATTRIBUTE_NAME, kind.name);
                value(w, tags::ATTRIBUTE_VALUE);
            });
        }
    }

    fn named(&mut self, name: &str) {
        self.write(tags::A_NAME, |w, tag| {
            w.structure(tag, |w| {
                w.text(tags::NAME_VALUE, name);
                w.enumeration(tags::NAME_TYPE, tags::UNINTERPRETED_TEXT);
            });
        });
    }
}
