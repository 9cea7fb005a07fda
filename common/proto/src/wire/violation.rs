//! What a peer sent that the protocol does not allow.

/// Bytes that can't be believed. After one, the connection is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("it does not speak reseal's protocol")]
    Magic,
    #[error("a message of kind {kind:#x} is none that this side may get")]
    Kind { kind: u8 },
    #[error("{what} claims {length} bytes; at most {max} are possible")]
    TooLong { what: &'static str, length: u64, max: u64 },
    #[error("{what} has {length} bytes, which does not fit what it holds")]
    Length { what: &'static str, length: u64 },
    #[error("{what} is not UTF-8, or has control characters")]
    NotText { what: &'static str },
    #[error("{what} is {value}, which the protocol does not allow")]
    Value { what: &'static str, value: u64 },
}
