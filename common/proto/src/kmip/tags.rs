//! Tags and enumerations, as far as reseal uses them. The names are those of the specification.

use super::ttlv::Tag;

macro_rules! tags {
    ($($name:ident = $low:literal;)+) => {
        $(#[doc = concat!("Tag 42", stringify!($low), ".")] pub const $name: Tag = Tag::standard($low);)+
    };
}

tags! {
    ATTRIBUTE = 0x0008;
    ATTRIBUTE_NAME = 0x000A;
    ATTRIBUTE_VALUE = 0x000B;
    BATCH_COUNT = 0x000D;
    BATCH_ITEM = 0x000F;
    BLOCK_CIPHER_MODE = 0x0011;
    CRYPTOGRAPHIC_ALGORITHM = 0x0028;
    CRYPTOGRAPHIC_LENGTH = 0x002A;
    CRYPTOGRAPHIC_PARAMETERS = 0x002B;
    CRYPTOGRAPHIC_USAGE_MASK = 0x002C;
    IV_COUNTER_NONCE = 0x003D;
    KEY_BLOCK = 0x0040;
    KEY_FORMAT_TYPE = 0x0042;
    KEY_MATERIAL = 0x0043;
    KEY_VALUE = 0x0045;
    KEY_WRAPPING_DATA = 0x0046;
    MAXIMUM_ITEMS = 0x004F;
    MAXIMUM_RESPONSE_SIZE = 0x0050;
    NAME = 0x0053;
    NAME_TYPE = 0x0054;
    NAME_VALUE = 0x0055;
    OBJECT_TYPE = 0x0057;
    OPERATION = 0x005C;
    PROTOCOL_VERSION = 0x0069;
    PROTOCOL_VERSION_MAJOR = 0x006A;
    PROTOCOL_VERSION_MINOR = 0x006B;
    REQUEST_HEADER = 0x0077;
    REQUEST_MESSAGE = 0x0078;
    REQUEST_PAYLOAD = 0x0079;
    RESPONSE_HEADER = 0x007A;
    RESPONSE_MESSAGE = 0x007B;
    RESPONSE_PAYLOAD = 0x007C;
    RESULT_MESSAGE = 0x007D;
    RESULT_REASON = 0x007E;
    RESULT_STATUS = 0x007F;
    REVOCATION_REASON = 0x0081;
    REVOCATION_REASON_CODE = 0x0082;
    STATE = 0x008D;
    SYMMETRIC_KEY = 0x008F;
    TEMPLATE_ATTRIBUTE = 0x0091;
    UNIQUE_IDENTIFIER = 0x0094;
    DATA = 0x00C2;
    RANDOM_IV = 0x00C5;
    TAG_LENGTH = 0x00CE;
    AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA = 0x00FE;
    AUTHENTICATED_ENCRYPTION_TAG = 0x00FF;
    ATTRIBUTES = 0x0125;
    ATTRIBUTE_REFERENCE = 0x013B;
}

/// Result Status: done.
pub const SUCCESS: u32 = 0;
/// Object Type: a symmetric key.
pub const OBJECT_SYMMETRIC_KEY: u32 = 2;
/// Cryptographic Algorithm: AES.
pub const AES: u32 = 3;
/// Block Cipher Mode: GCM.
pub const GCM: u32 = 9;
/// Key Format Type: the bytes of the key.
pub const RAW: u32 = 1;
/// Name Type: any text.
pub const UNINTERPRETED_TEXT: u32 = 1;
/// Revocation Reason Code: nobody uses it any more.
pub const CESSATION_OF_OPERATION: u32 = 6;
/// Cryptographic Usage Mask: may encrypt.
pub const MAY_ENCRYPT: i32 = 0x4;
/// Cryptographic Usage Mask: may decrypt.
pub const MAY_DECRYPT: i32 = 0x8;

/// An attribute: its name up to KMIP 1.4, its tag from 2.0 on.
#[derive(Clone, Copy)]
pub struct AttributeKind {
    pub(super) name: &'static str,
    pub(super) tag: Tag,
}

macro_rules! attributes {
    ($($kind:ident = $name:literal, $tag:ident;)+) => {
        $(pub(super) const $kind: AttributeKind = AttributeKind { name: $name, tag: $tag };)+
        /// All that a key is asked for.
        pub(super) const ASKED: &[AttributeKind] = &[$($kind),+];
    };
}

attributes! {
    A_OBJECT_TYPE = "Object Type", OBJECT_TYPE;
    A_NAME = "Name", NAME;
    A_ALGORITHM = "Cryptographic Algorithm", CRYPTOGRAPHIC_ALGORITHM;
    A_LENGTH = "Cryptographic Length", CRYPTOGRAPHIC_LENGTH;
    A_USAGE = "Cryptographic Usage Mask", CRYPTOGRAPHIC_USAGE_MASK;
    A_STATE = "State", STATE;
}
