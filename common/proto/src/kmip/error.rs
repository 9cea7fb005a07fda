//! What is wrong with a message. No text of the peer is in it: a message may hold a key.

use thiserror::Error;

use super::ttlv::Tag;

/// Why a message is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CodecError {
    /// It is something else.
    #[error("it is no KMIP response")]
    NoResponse,
    /// It says that it is longer than any message may be.
    #[error("a message of {len} bytes, more than the allowed {limit}")]
    TooLong { len: usize, limit: usize },
    /// A value reaches beyond what holds it.
    #[error("it is cut short")]
    Truncated,
    /// Something follows where nothing may.
    #[error("it is longer than it says")]
    Trailing,
    /// Structures within structures beyond any that KMIP defines.
    #[error("it is nested too deeply")]
    TooDeep,
    /// A type that KMIP does not define.
    #[error("the item {tag} has the unknown type {kind:#04x}")]
    UnknownType { tag: Tag, kind: u8 },
    /// A length that its type does not have.
    #[error("the item {tag} has a length of {len}")]
    BadLength { tag: Tag, len: usize },
    /// A text that is not UTF-8, or a boolean that is neither.
    #[error("the item {tag} has a value that its type does not have")]
    BadValue { tag: Tag },
    /// A part that must be there.
    #[error("it has no item {tag}")]
    Missing { tag: Tag },
    /// A part that has another type than KMIP says.
    #[error("the item {tag} is of another type")]
    OtherType { tag: Tag },
    /// It answers another operation, or several.
    #[error("it answers something else")]
    OtherOperation,
    /// It is of another version of the protocol than the request.
    #[error("it is of KMIP {major}.{minor}, which the request was not")]
    OtherVersion { major: i32, minor: i32 },
    /// More than was asked for.
    #[error("it lists more than {limit} of {tag}")]
    TooMany { tag: Tag, limit: usize },
}
