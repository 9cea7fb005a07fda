//! KMIP, the protocol of key management servers, binary form, versions 1.0 to 1.4 and 2.0:
//! <https://docs.oasis-open.org/kmip/spec/v1.4/kmip-spec-v1.4.html>,
//! <https://docs.oasis-open.org/kmip/kmip-spec/v2.0/kmip-spec-v2.0.html>.
//!
//! ```text
//! Request → encode (version) → bytes ┃ bytes → Response → answer of the operation
//! ```
//!
//! Modules in reading order:
//!
//! - [`ttlv`]: tag, type, length and value, which everything is made of
//! - [`tags`]: what the tags and enumerations that reseal uses are called
//! - [`request`]: one operation as one message
//! - [`response`]: a message's result, and what each operation answers
//! - [`error`]: what is wrong with a message
//!
//! Written here rather than taken from `kmip-ttlv`: that crate's last release is of January 2023, and it covers version
//! 1.0.

pub mod error;
pub mod request;
pub mod response;
pub mod tags;
#[cfg(test)]
mod tests;
pub mod ttlv;

pub use error::CodecError;
pub use request::{Request, Version};
pub use response::{Attributes, Reason, Response, Sealed, State};

/// Longest message, with its header. A wrapped payload with its context, or a list of a few keys, takes a fifth of it.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Bytes that tell how long a message is.
pub const HEADER_LEN: usize = ttlv::HEADER_LEN;

/// The port that KMIP has of its own.
pub const DEFAULT_PORT: u16 = 5696;

/// How many bytes follow the header of a response: checked, so that it may be allocated.
pub fn rest_of_response(header: &[u8; HEADER_LEN]) -> Result<usize, CodecError> {
    let (tag, kind, length) = ttlv::split_header(header);
    if tag != tags::RESPONSE_MESSAGE || kind != ttlv::STRUCTURE {
        return Err(CodecError::NoResponse);
    }
    if length > MAX_MESSAGE - HEADER_LEN {
        return Err(CodecError::TooLong { len: length, limit: MAX_MESSAGE - HEADER_LEN });
    }
    Ok(length)
}
