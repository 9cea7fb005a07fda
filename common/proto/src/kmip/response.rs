//! Responses: the result of the one operation that was asked for, and what it answers.

use std::fmt;

use super::request::{MAX_LOCATED, TAG_LEN};
use super::tags::{self, AttributeKind};
use super::ttlv::{Items, Tag, Value};
use super::{CodecError, Request, Version};

/// Longest identifier of an object. UUIDs have 36, and some servers make their own of a hundred.
const MAX_ID: usize = 256;

/// Longest IV. GCM takes any, 12 is usual and PyKMIP chooses 16.
pub const MAX_IV: usize = 64;

/// Most versions that are looked at: there are ten so far.
const MAX_VERSIONS: usize = 64;

/// A checked response. `Debug` shows no values.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// The version it is of.
    pub version: Version,
    /// Done, or why not.
    pub result: Result<Items<'a>, Refusal<'a>>,
}

/// What a server says when it does not do what it is asked to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Refusal<'a> {
    /// The reason's number.
    pub reason: Reason,
    /// The server's own words, which may hold anything, also what it was sent.
    pub message: &'a str,
}

/// Without the server's words.
impl fmt::Debug for Refusal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl<'a> Response<'a> {
    /// Checks a whole message, and that it answers `request`.
    pub fn parse(bytes: &'a [u8], request: &Request<'_>) -> Result<Self, CodecError> {
        let mut items = Items::check(bytes)?.into_iter();
        let message = match items.next() {
            Some(item) if item.tag == tags::RESPONSE_MESSAGE => item.value,
            _ => return Err(CodecError::NoResponse),
        };
        if items.next().is_some() {
            return Err(CodecError::Trailing);
        }
        let Value::Structure(message) = message else {
            return Err(CodecError::NoResponse);
        };
        let header = message.structure(tags::RESPONSE_HEADER)?;
        let version = version(header.structure(tags::PROTOCOL_VERSION)?)?;
        let mut batch = message.into_iter().filter(|item| item.tag == tags::BATCH_ITEM);
        let first = match (batch.next().map(|item| item.value), batch.next()) {
            (Some(Value::Structure(items)), None) => items,
            (Some(Value::Structure(_)), Some(_)) => return Err(CodecError::OtherOperation),
            (Some(_), _) => return Err(CodecError::OtherType { tag: tags::BATCH_ITEM }),
            (None, _) => return Err(CodecError::Missing { tag: tags::BATCH_ITEM }),
        };
        Ok(Self { version, result: result(first, request)? })
    }
}

fn result<'a>(item: Items<'a>, request: &Request<'_>) -> Result<Result<Items<'a>, Refusal<'a>>, CodecError> {
    let done = item.enumeration(tags::RESULT_STATUS)? == tags::SUCCESS;
    // Whoever fails before it has read the request can't say which operation it was.
    if (done || item.find(tags::OPERATION).is_some()) && item.enumeration(tags::OPERATION)? != request.operation() {
        return Err(CodecError::OtherOperation);
    }
    if !done {
        let reason = item
            .find(tags::RESULT_REASON)
            .map_or(Ok(Reason::GENERAL_FAILURE), |_| item.enumeration(tags::RESULT_REASON).map(Reason))?;
        let message = match item.find(tags::RESULT_MESSAGE) {
            Some(Value::Text(text)) => text,
            _ => "",
        };
        return Ok(Err(Refusal { reason, message }));
    }
    match item.find(tags::RESPONSE_PAYLOAD) {
        Some(Value::Structure(payload)) => Ok(Ok(payload)),
        Some(_) => Err(CodecError::OtherType { tag: tags::RESPONSE_PAYLOAD }),
        None => Err(CodecError::Missing { tag: tags::RESPONSE_PAYLOAD }),
    }
}

fn version(items: Items<'_>) -> Result<Version, CodecError> {
    Ok(Version {
        major: items.integer(tags::PROTOCOL_VERSION_MAJOR)?,
        minor: items.integer(tags::PROTOCOL_VERSION_MINOR)?,
    })
}

/// The best version that a server speaks and this codec too, from the answer to Discover Versions.
pub fn best_version(payload: Items<'_>) -> Result<Option<Version>, CodecError> {
    let mut best = None;
    for (nth, item) in payload.into_iter().filter(|item| item.tag == tags::PROTOCOL_VERSION).enumerate() {
        if nth == MAX_VERSIONS {
            return Err(CodecError::TooMany { tag: item.tag, limit: MAX_VERSIONS });
        }
        let Value::Structure(items) = item.value else {
            return Err(CodecError::OtherType { tag: item.tag });
        };
        let offered = version(items)?;
        if Version::KNOWN.contains(&offered) {
            best = best.max(Some(offered));
        }
    }
    Ok(best)
}

/// The identifiers from the answer to Locate.
pub fn located(payload: Items<'_>) -> Result<Vec<String>, CodecError> {
    let mut ids = Vec::new();
    for item in payload.into_iter().filter(|item| item.tag == tags::UNIQUE_IDENTIFIER) {
        if ids.len() == MAX_LOCATED {
            return Err(CodecError::TooMany { tag: item.tag, limit: MAX_LOCATED });
        }
        match item.value {
            Value::Text(id) => ids.push(checked_id(id)?),
            _ => return Err(CodecError::OtherType { tag: item.tag }),
        }
    }
    Ok(ids)
}

/// The identifier from the answer to Create.
pub fn created(payload: Items<'_>) -> Result<String, CodecError> {
    checked_id(payload.text(tags::UNIQUE_IDENTIFIER)?)
}

/// An empty identifier would mean the last object that the server had to do with.
fn checked_id(id: &str) -> Result<String, CodecError> {
    if id.is_empty() || id.len() > MAX_ID {
        return Err(CodecError::BadLength { tag: tags::UNIQUE_IDENTIFIER, len: id.len() });
    }
    Ok(id.to_owned())
}

/// What a server says of an object. What it does not say is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Whether one of its names is the one in question.
    pub named: bool,
    /// Object Type.
    pub object_type: Option<u32>,
    /// Cryptographic Algorithm.
    pub algorithm: Option<u32>,
    /// Cryptographic Length, in bits.
    pub length: Option<i32>,
    /// Cryptographic Usage Mask.
    pub usage: Option<i32>,
    /// Where in its life it is.
    pub state: Option<State>,
}

/// Where in its life a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made, and not to be used yet.
    PreActive,
    /// In use.
    Active,
    /// Not to be used any more.
    Deactivated,
    /// Known to somebody who must not know it.
    Compromised,
    /// Gone; only its attributes are left.
    Destroyed,
    /// A state that KMIP does not define.
    Unknown,
}

impl State {
    fn from_number(number: u32) -> Self {
        match number {
            1 => Self::PreActive,
            2 => Self::Active,
            3 => Self::Deactivated,
            4 => Self::Compromised,
            // Destroyed, and destroyed after it was compromised.
            5 | 6 => Self::Destroyed,
            _ => Self::Unknown,
        }
    }
}

/// The answer to Get Attributes, for an object that should have this name.
pub fn attributes(payload: Items<'_>, version: Version, name: &str) -> Result<Attributes, CodecError> {
    let mut found = Attributes::default();
    if version >= Version::V2_0 {
        for item in payload.structure(tags::ATTRIBUTES)? {
            if let Some(kind) = tags::ASKED.iter().find(|kind| kind.tag == item.tag) {
                found.take(*kind, item.value, name)?;
            }
        }
        return Ok(found);
    }
    for item in payload.into_iter().filter(|item| item.tag == tags::ATTRIBUTE) {
        let Value::Structure(attribute) = item.value else {
            return Err(CodecError::OtherType { tag: item.tag });
        };
        let attribute_name = attribute.text(tags::ATTRIBUTE_NAME)?;
        if let Some(kind) = tags::ASKED.iter().find(|kind| kind.name == attribute_name) {
            found.take(*kind, attribute.get(tags::ATTRIBUTE_VALUE)?, name)?;
        }
    }
    Ok(found)
}

impl Attributes {
    fn take(&mut self, kind: AttributeKind, value: Value<'_>, name: &str) -> Result<(), CodecError> {
        match (kind.tag, value) {
            (tags::OBJECT_TYPE, Value::Enumeration(number)) => self.object_type = Some(number),
            (tags::NAME, Value::Structure(items)) => self.named |= items.text(tags::NAME_VALUE)? == name,
            (tags::CRYPTOGRAPHIC_ALGORITHM, Value::Enumeration(number)) => self.algorithm = Some(number),
            (tags::CRYPTOGRAPHIC_LENGTH, Value::Integer(bits)) => self.length = Some(bits),
            (tags::CRYPTOGRAPHIC_USAGE_MASK, Value::Integer(mask)) => self.usage = Some(mask),
            (tags::STATE, Value::Enumeration(number)) => self.state = Some(State::from_number(number)),
            (tag, _) => return Err(CodecError::OtherType { tag }),
        }
        Ok(())
    }
}

/// What Encrypt answers and Decrypt takes.
#[derive(Clone, Copy)]
pub struct Sealed<'a> {
    /// What the server chose; never chosen twice for one key.
    pub iv: &'a [u8],
    /// The authentication tag.
    pub tag: &'a [u8; TAG_LEN],
    /// As long as the plaintext.
    pub ciphertext: &'a [u8],
}

/// The answer to Encrypt. One without IV or tag can't be opened again, and is none.
pub fn sealed(payload: Items<'_>) -> Result<Sealed<'_>, CodecError> {
    let iv = payload.bytes(tags::IV_COUNTER_NONCE)?;
    if iv.is_empty() || iv.len() > MAX_IV {
        return Err(CodecError::BadLength { tag: tags::IV_COUNTER_NONCE, len: iv.len() });
    }
    let tag = payload.bytes(tags::AUTHENTICATED_ENCRYPTION_TAG)?;
    let tag = tag
        .try_into()
        .map_err(|_| CodecError::BadLength { tag: tags::AUTHENTICATED_ENCRYPTION_TAG, len: tag.len() })?;
    Ok(Sealed { iv, tag, ciphertext: payload.bytes(tags::DATA)? })
}

/// The plaintext in the answer to Decrypt.
pub fn opened(payload: Items<'_>) -> Result<&[u8], CodecError> {
    payload.bytes(tags::DATA)
}

/// The bytes of the AES key of 256 bits in the answer to Get; an error if it is another key, or wrapped.
pub fn key(payload: Items<'_>) -> Result<&[u8; 32], CodecError> {
    let block = payload.structure(tags::SYMMETRIC_KEY)?.structure(tags::KEY_BLOCK)?;
    expect(tags::KEY_FORMAT_TYPE, block.enumeration(tags::KEY_FORMAT_TYPE)? == tags::RAW)?;
    expect(tags::KEY_WRAPPING_DATA, block.find(tags::KEY_WRAPPING_DATA).is_none())?;
    expect(tags::CRYPTOGRAPHIC_ALGORITHM, block.enumeration(tags::CRYPTOGRAPHIC_ALGORITHM)? == tags::AES)?;
    let material = block.structure(tags::KEY_VALUE)?.bytes(tags::KEY_MATERIAL)?;
    material.try_into().map_err(|_| CodecError::BadLength { tag: tags::KEY_MATERIAL, len: material.len() })
}

fn expect(tag: Tag, holds: bool) -> Result<(), CodecError> {
    if holds { Ok(()) } else { Err(CodecError::BadValue { tag }) }
}

/// Why a server does not do what it is asked to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub u32);

macro_rules! reasons {
    ($($name:ident = $number:literal, $text:literal;)+) => {
        impl Reason {
            $(#[doc = $text] pub const $name: Self = Self($number);)+

            /// As the specification calls it.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)+
                    _ => None,
                }
            }
        }
    };
}

reasons! {
    ITEM_NOT_FOUND = 0x01, "Item Not Found";
    RESPONSE_TOO_LARGE = 0x02, "Response Too Large";
    AUTHENTICATION_NOT_SUCCESSFUL = 0x03, "Authentication Not Successful";
    INVALID_MESSAGE = 0x04, "Invalid Message";
    OPERATION_NOT_SUPPORTED = 0x05, "Operation Not Supported";
    MISSING_DATA = 0x06, "Missing Data";
    INVALID_FIELD = 0x07, "Invalid Field";
    FEATURE_NOT_SUPPORTED = 0x08, "Feature Not Supported";
    CRYPTOGRAPHIC_FAILURE = 0x0A, "Cryptographic Failure";
    ILLEGAL_OPERATION = 0x0B, "Illegal Operation";
    PERMISSION_DENIED = 0x0C, "Permission Denied";
    OBJECT_ARCHIVED = 0x0D, "Object Archived";
    KEY_FORMAT_TYPE_NOT_SUPPORTED = 0x10, "Key Format Type Not Supported";
    KEY_VALUE_NOT_PRESENT = 0x13, "Key Value Not Present";
    ATTESTATION_REQUIRED = 0x14, "Attestation Required";
    ATTESTATION_FAILED = 0x15, "Attestation Failed";
    SENSITIVE = 0x16, "Sensitive";
    NOT_EXTRACTABLE = 0x17, "Not Extractable";
    OBJECT_ALREADY_EXISTS = 0x18, "Object Already Exists";
    USAGE_LIMIT_EXCEEDED = 0x1A, "Usage Limit Exceeded";
    BAD_CRYPTOGRAPHIC_PARAMETERS = 0x24, "Bad Cryptographic Parameters";
    INCOMPATIBLE_CRYPTOGRAPHIC_USAGE_MASK = 0x29, "Incompatible Cryptographic Usage Mask";
    INTERNAL_SERVER_ERROR = 0x2A, "Internal Server Error";
    NON_UNIQUE_NAME_ATTRIBUTE = 0x35, "Non Unique Name Attribute";
    OBJECT_DESTROYED = 0x36, "Object Destroyed";
    OBJECT_NOT_FOUND = 0x37, "Object Not Found";
    NOT_AUTHORISED = 0x39, "Not Authorised";
    SERVER_LIMIT_EXCEEDED = 0x3A, "Server Limit Exceeded";
    UNSUPPORTED_CRYPTOGRAPHIC_PARAMETERS = 0x3E, "Unsupported Cryptographic Parameters";
    UNSUPPORTED_PROTOCOL_VERSION = 0x3F, "Unsupported Protocol Version";
    WRONG_KEY_LIFECYCLE_STATE = 0x43, "Wrong Key Lifecycle State";
    PROTECTION_STORAGE_UNAVAILABLE = 0x44, "Protection Storage Unavailable";
    GENERAL_FAILURE = 0x100, "General Failure";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "result reason {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
