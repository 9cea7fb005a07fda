//! What stands before each message.
//!
//! ```text
//! kind u8 ‖ 0 × 3 ‖ length of the payload u32
//! ```

use super::{
    MAX_AREAS, MAX_CERTIFICATE, MAX_CLUSTERS, MAX_DEFINITION, MAX_DISKS, MAX_FRAMES, MAX_LISTED_POINTS, MAX_LISTED_VMS,
    MAX_NAME, MAX_REQUEST, MAX_SHOWN, MAX_TEXT, MAX_WARNINGS, Violation,
};

pub const HEADER_LENGTH: usize = 8;

/// Who sends a message. Kinds of the target have the highest bit set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
}

/// The numbers of the kinds.
pub(super) mod kind {
    pub(crate) const HELLO: u8 = 0x01;
    pub(crate) const BEGIN: u8 = 0x02;
    pub(crate) const DISK: u8 = 0x03;
    pub(crate) const OFFER: u8 = 0x04;
    pub(crate) const DATA: u8 = 0x05;
    pub(crate) const DISK_END: u8 = 0x06;
    pub(crate) const CLOSE: u8 = 0x07;
    pub(crate) const COMMIT: u8 = 0x08;
    pub(crate) const ALIVE: u8 = 0x10;
    pub(crate) const TROUBLE: u8 = 0x11;

    pub(crate) const RENEW: u8 = 0x20;

    pub(crate) const LIST_VMS: u8 = 0x30;
    pub(crate) const LIST_POINTS: u8 = 0x31;
    pub(crate) const SHOW: u8 = 0x32;

    pub(crate) const WELCOME: u8 = 0x81;
    pub(crate) const BEGUN: u8 = 0x82;
    pub(crate) const DISK_READY: u8 = 0x83;
    pub(crate) const NEED: u8 = 0x84;
    pub(crate) const DISK_DONE: u8 = 0x85;
    pub(crate) const DISTRUSTED: u8 = 0x86;
    pub(crate) const CLOSED: u8 = 0x87;
    pub(crate) const COMMITTED: u8 = 0x88;
    pub(crate) const TARGET_ALIVE: u8 = 0x90;
    pub(crate) const TARGET_TROUBLE: u8 = 0x91;
    pub(crate) const RENEWED: u8 = 0xa0;
    pub(crate) const VMS: u8 = 0xb0;
    pub(crate) const POINTS: u8 = 0xb1;
    pub(crate) const SHOWN: u8 = 0xb2;
}

/// Bytes of a text of at most `max` bytes, with its length.
const fn text(max: usize) -> usize {
    4 + max
}

/// Three texts that name a record of changes, and the byte that says whether there are any.
const TRACKING: usize = 1 + 3 * text(MAX_TEXT);

/// Longest payload of a kind.
fn limit(side: Side, kind: u8) -> Option<usize> {
    Some(match (side, kind) {
        // The first messages of either side may be longer in a later version, which is to be told apart all the same.
        (Side::Source, kind::HELLO) | (Side::Target, kind::WELCOME) => 1024,
        (Side::Source, kind::BEGIN) => text(MAX_NAME) + 1 + 16,
        (Side::Source, kind::DISK) => text(MAX_NAME) + 8 + text(MAX_TEXT) + 2 * TRACKING + 4,
        (Side::Source, kind::OFFER) => 8 + 8 + 8 + 1 + 2 + MAX_CLUSTERS * 32,
        (Side::Source, kind::DATA) => 8 + 4 + MAX_CLUSTERS * (4 + MAX_FRAMES),
        (Side::Source, kind::DISK_END) => 8,
        (Side::Source, kind::CLOSE | kind::ALIVE)
        | (Side::Target, kind::DISK_DONE | kind::CLOSED | kind::TARGET_ALIVE) => 0,
        (Side::Source, kind::COMMIT) => {
            8 + 1 + text(MAX_TEXT) + text(MAX_DEFINITION) + 4 + MAX_WARNINGS * text(MAX_TEXT)
        }
        (Side::Source, kind::TROUBLE) | (Side::Target, kind::TARGET_TROUBLE) => 2 + text(MAX_TEXT),
        (Side::Source, kind::RENEW) => text(MAX_REQUEST),
        (Side::Target, kind::RENEWED) => 1 + text(MAX_CERTIFICATE),
        (Side::Source, kind::LIST_VMS) => 1 + text(MAX_NAME),
        (Side::Source, kind::LIST_POINTS | kind::SHOW) => text(MAX_NAME) + 4,
        (Side::Target, kind::VMS) => 4 + MAX_LISTED_VMS * text(MAX_NAME) + 1,
        (Side::Target, kind::POINTS) => 4 + MAX_LISTED_POINTS * 5 + 1,
        (Side::Target, kind::SHOWN) => 1 + text(MAX_SHOWN),
        (Side::Target, kind::BEGUN) => 64 + MAX_DISKS * (text(MAX_NAME) + 8 + TRACKING),
        (Side::Target, kind::DISK_READY) => 1 + 4 + 4 + MAX_AREAS * 16,
        (Side::Target, kind::NEED) => 10,
        (Side::Target, kind::DISTRUSTED) => text(MAX_TEXT),
        (Side::Target, kind::COMMITTED) => 4 + 16 + 8 + 4 + MAX_WARNINGS * text(MAX_TEXT),
        _ => return None,
    })
}

/// What stands before a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub(super) kind: u8,
    length: u32,
}

impl Header {
    /// Of a message that `side` sent. Its length is possible for its kind.
    pub fn decode(side: Side, bytes: [u8; HEADER_LENGTH]) -> Result<Header, Violation> {
        let [kind, zeros @ .., l0, l1, l2, l3] = bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let max = limit(side, kind).filter(|_| zeros == [0; 3]).ok_or(Violation::Kind { kind })?;
        if u64::from(length) > max as u64 {
            return Err(Violation::TooLong { what: "a message", length: length.into(), max: max as u64 });
        }
        Ok(Header { kind, length })
    }

    /// Bytes of the payload that follows.
    pub fn payload(&self) -> usize {
        usize::try_from(self.length).unwrap_or(usize::MAX)
    }
}

/// A whole message: its header, and the payload that `put` writes.
pub(super) fn message(kind: u8, put: impl FnOnce(&mut super::fields::Out)) -> Vec<u8> {
    let mut out = super::fields::Out::default();
    out.bytes(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    put(&mut out);
    finish(&mut out.0);
    out.0
}

/// Writes into the header of a message how long its payload has become.
pub(super) fn finish(message: &mut [u8]) {
    let length = super::fields::length32(message.len() - HEADER_LENGTH);
    message[HEADER_LENGTH - 4..HEADER_LENGTH].copy_from_slice(&length.to_be_bytes());
}

/// What begins the first message of either side.
pub(super) const MAGIC: &[u8; 8] = b"RSLWIRE\0";
