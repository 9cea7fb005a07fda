//! TTLV: every item is a tag, a type, a length and a value.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 3 | tag |
//! | 3 | 1 | type |
//! | 4 | 4 | length of the value, without padding |
//! | 8 | n | value; of a structure, its items |
//! | 8 + n | 0 to 7 | padding to a multiple of 8 |
//!
//! All numbers are big-endian. Bytes are checked once, whole, before anything is read from them; reading then allocates
//! nothing.

use std::fmt;

use zeroize::Zeroizing;

use super::{CodecError, MAX_MESSAGE};

/// Tag, type and length.
pub const HEADER_LEN: usize = 8;

/// Values start and end at multiples of this.
const ALIGNMENT: usize = 8;

/// Structures within structures; KMIP's own go down to about ten.
pub const MAX_DEPTH: usize = 16;

/// Room for a request from the start: a buffer that grows leaves pieces of its content behind. No request takes more.
const ROOM: usize = MAX_MESSAGE;

pub(super) const STRUCTURE: u8 = 0x01;
const INTEGER: u8 = 0x02;
const LONG_INTEGER: u8 = 0x03;
const BIG_INTEGER: u8 = 0x04;
const ENUMERATION: u8 = 0x05;
const BOOLEAN: u8 = 0x06;
const TEXT: u8 = 0x07;
const BYTES: u8 = 0x08;
const DATE_TIME: u8 = 0x09;
const INTERVAL: u8 = 0x0A;
const DATE_TIME_EXTENDED: u8 = 0x0B;

/// What an item is: three bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag(u32);

impl Tag {
    /// A tag of KMIP's own, which all start with 0x42.
    pub(super) const fn standard(low: u16) -> Self {
        Self(0x42_0000 | low as u32)
    }

    /// The number of it, as an enumeration of KMIP 2.0 refers to attributes.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One item of checked bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item<'a> {
    /// What it is.
    pub tag: Tag,
    /// Its value.
    pub value: Value<'a>,
}

/// A value of checked bytes.
#[derive(Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Items within.
    Structure(Items<'a>),
    /// 32 bits.
    Integer(i32),
    /// 64 bits.
    LongInteger(i64),
    /// Any multiple of 64 bits.
    BigInteger(&'a [u8]),
    /// One of named numbers.
    Enumeration(u32),
    /// Yes or no.
    Boolean(bool),
    /// UTF-8.
    Text(&'a str),
    /// Anything, also a key.
    Bytes(&'a [u8]),
    /// Seconds since 1970.
    DateTime(i64),
    /// Seconds.
    Interval(u32),
    /// Microseconds since 1970.
    DateTimeExtended(i64),
}

/// Shows no text and no bytes: they may be a key.
impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Structure(items) => items.fmt(f),
            Self::Integer(value) => value.fmt(f),
            Self::Enumeration(value) | Self::Interval(value) => value.fmt(f),
            Self::Boolean(value) => value.fmt(f),
            Self::LongInteger(value) | Self::DateTime(value) | Self::DateTimeExtended(value) => value.fmt(f),
            Self::BigInteger(bytes) | Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Text(text) => write!(f, "text of {} bytes", text.len()),
        }
    }
}

/// The items of a structure, checked.
#[derive(Clone, Copy, PartialEq)]
pub struct Items<'a>(&'a [u8]);

impl fmt::Debug for Items<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(*self).finish()
    }
}

impl<'a> Items<'a> {
    /// Checks that `bytes` are whole items, all the way down.
    pub fn check(bytes: &'a [u8]) -> Result<Self, CodecError> {
        if bytes.len() > MAX_MESSAGE {
            return Err(CodecError::TooLong { len: bytes.len(), limit: MAX_MESSAGE });
        }
        check(bytes, MAX_DEPTH)?;
        Ok(Self(bytes))
    }

    /// The first item with this tag.
    pub fn find(self, tag: Tag) -> Option<Value<'a>> {
        self.into_iter().find(|item| item.tag == tag).map(|item| item.value)
    }

    /// The first item with this tag, which must be there.
    pub fn get(self, tag: Tag) -> Result<Value<'a>, CodecError> {
        self.find(tag).ok_or(CodecError::Missing { tag })
    }

    /// The items of a structure that must be there.
    pub fn structure(self, tag: Tag) -> Result<Items<'a>, CodecError> {
        match self.get(tag)? {
            Value::Structure(items) => Ok(items),
            _ => Err(CodecError::OtherType { tag }),
        }
    }

    /// An integer that must be there.
    pub fn integer(self, tag: Tag) -> Result<i32, CodecError> {
        match self.get(tag)? {
            Value::Integer(value) => Ok(value),
            _ => Err(CodecError::OtherType { tag }),
        }
    }

    /// An enumeration that must be there.
    pub fn enumeration(self, tag: Tag) -> Result<u32, CodecError> {
        match self.get(tag)? {
            Value::Enumeration(value) => Ok(value),
            _ => Err(CodecError::OtherType { tag }),
        }
    }

    /// A text that must be there.
    pub fn text(self, tag: Tag) -> Result<&'a str, CodecError> {
        match self.get(tag)? {
            Value::Text(value) => Ok(value),
            _ => Err(CodecError::OtherType { tag }),
        }
    }

    /// Bytes that must be there.
    pub fn bytes(self, tag: Tag) -> Result<&'a [u8], CodecError> {
        match self.get(tag)? {
            Value::Bytes(value) => Ok(value),
            _ => Err(CodecError::OtherType { tag }),
        }
    }
}

impl<'a> IntoIterator for Items<'a> {
    type Item = Item<'a>;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        Iter(self.0)
    }
}

/// The items of a structure, one after another.
pub struct Iter<'a>(&'a [u8]);

impl<'a> Iterator for Iter<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        // Only checked bytes come here, so that this can't fail but at their end.
        let raw = Raw::split(&mut self.0).ok()??;
        let value = raw.value().ok()?;
        Some(Item { tag: raw.tag, value })
    }
}

/// Tag, type and length of a header.
pub(super) fn split_header(header: &[u8; HEADER_LEN]) -> (Tag, u8, usize) {
    let [t0, t1, t2, kind, l0, l1, l2, l3] = *header;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    (Tag(u32::from_be_bytes([0, t0, t1, t2])), kind, length)
}

/// Checks whole items, at most `depth` structures down.
fn check(mut bytes: &[u8], depth: usize) -> Result<(), CodecError> {
    while let Some(raw) = Raw::split(&mut bytes)? {
        if let Value::Structure(items) = raw.value()? {
            let depth = depth.checked_sub(1).ok_or(CodecError::TooDeep)?;
            check(items.0, depth)?;
        }
    }
    Ok(())
}

/// An item whose value lies within the bytes, and is not looked at yet.
struct Raw<'a> {
    tag: Tag,
    kind: u8,
    value: &'a [u8],
}

impl<'a> Raw<'a> {
    /// Takes the next item off `bytes`; none at their end.
    fn split(bytes: &mut &'a [u8]) -> Result<Option<Self>, CodecError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(CodecError::Truncated)?;
        let (tag, kind, length) = split_header(header);
        let padded = length.checked_next_multiple_of(ALIGNMENT).ok_or(CodecError::Truncated)?;
        let (value, rest) = rest.split_at_checked(padded).ok_or(CodecError::Truncated)?;
        *bytes = rest;
        Ok(Some(Self { tag, kind, value: &value[..length] }))
    }

    fn value(&self) -> Result<Value<'a>, CodecError> {
        Ok(match self.kind {
            // A structure is whole items, which are padded each.
            STRUCTURE if self.value.len().is_multiple_of(ALIGNMENT) => Value::Structure(Items(self.value)),
            STRUCTURE => return Err(self.bad_length()),
            INTEGER => Value::Integer(i32::from_be_bytes(self.fixed()?)),
            LONG_INTEGER => Value::LongInteger(i64::from_be_bytes(self.fixed()?)),
            BIG_INTEGER if self.value.len().is_multiple_of(ALIGNMENT) => Value::BigInteger(self.value),
            BIG_INTEGER => return Err(self.bad_length()),
            ENUMERATION => Value::Enumeration(u32::from_be_bytes(self.fixed()?)),
            BOOLEAN => match u64::from_be_bytes(self.fixed()?) {
                0 => Value::Boolean(false),
                1 => Value::Boolean(true),
                _ => return Err(CodecError::BadValue { tag: self.tag }),
            },
            TEXT => Value::Text(std::str::from_utf8(self.value).map_err(|_| CodecError::BadValue { tag: self.tag })?),
            BYTES => Value::Bytes(self.value),
            DATE_TIME => Value::DateTime(i64::from_be_bytes(self.fixed()?)),
            INTERVAL => Value::Interval(u32::from_be_bytes(self.fixed()?)),
            DATE_TIME_EXTENDED => Value::DateTimeExtended(i64::from_be_bytes(self.fixed()?)),
            kind => return Err(CodecError::UnknownType { tag: self.tag, kind }),
        })
    }

    fn fixed<const N: usize>(&self) -> Result<[u8; N], CodecError> {
        self.value.try_into().map_err(|_| self.bad_length())
    }

    fn bad_length(&self) -> CodecError {
        CodecError::BadLength { tag: self.tag, len: self.value.len() }
    }
}

/// Writes items. What it wrote is wiped when dropped: it may hold a key.
pub struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "a writer is made to write, not as a default of something")]
    pub fn new() -> Self {
        Self(Zeroizing::new(Vec::with_capacity(ROOM)))
    }

    /// What was written.
    pub fn finish(self) -> Zeroizing<Vec<u8>> {
        self.0
    }

    /// A structure of what `items` writes.
    pub fn structure(&mut self, tag: Tag, items: impl FnOnce(&mut Self)) {
        self.header(tag, STRUCTURE, 0);
        let start = self.0.len();
        items(self);
        let length = encoded_length(self.0.len() - start);
        self.0[start - size_of::<u32>()..start].copy_from_slice(&length);
    }

    /// 32 bits.
    pub fn integer(&mut self, tag: Tag, value: i32) {
        self.item(tag, INTEGER, &value.to_be_bytes());
    }

    /// One of named numbers.
    pub fn enumeration(&mut self, tag: Tag, value: u32) {
        self.item(tag, ENUMERATION, &value.to_be_bytes());
    }

    /// Yes or no.
    pub fn boolean(&mut self, tag: Tag, value: bool) {
        self.item(tag, BOOLEAN, &u64::from(value).to_be_bytes());
    }

    /// UTF-8.
    pub fn text(&mut self, tag: Tag, value: &str) {
        self.item(tag, TEXT, value.as_bytes());
    }

    /// Anything.
    pub fn bytes(&mut self, tag: Tag, value: &[u8]) {
        self.item(tag, BYTES, value);
    }

    fn item(&mut self, tag: Tag, kind: u8, value: &[u8]) {
        self.header(tag, kind, value.len());
        self.0.extend_from_slice(value);
        let padded = self.0.len().next_multiple_of(ALIGNMENT);
        self.0.resize(padded, 0);
    }

    fn header(&mut self, tag: Tag, kind: u8, length: usize) {
        let [_, t0, t1, t2] = tag.0.to_be_bytes();
        self.0.extend_from_slice(&[t0, t1, t2, kind]);
        self.0.extend_from_slice(&encoded_length(length));
    }
}

/// A length of something that this program made.
fn encoded_length(length: usize) -> [u8; 4] {
    u32::try_from(length).expect("a message has less than 4 GiB").to_be_bytes()
}
