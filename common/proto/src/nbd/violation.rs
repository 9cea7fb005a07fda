//! What a peer sent that the protocol does not allow.

/// Bytes that can't be believed. After one, the connection is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("{what} begins with {found:#x} instead of {expected:#x}")]
    Magic { what: &'static str, found: u64, expected: u64 },
    #[error("{what} claims {length} bytes; at most {max} are possible")]
    TooLong { what: &'static str, length: u64, max: u64 },
    #[error("{what} has {length} bytes, which does not fit what it holds")]
    Length { what: &'static str, length: u64 },
    #[error("{what} is not UTF-8")]
    NotText { what: &'static str },
    #[error("{what} is {value}, which the protocol does not allow")]
    Value { what: &'static str, value: u64 },
    #[error("it speaks the old handshake, not fixed newstyle")]
    OldStyle,
    #[error("it answered option {found} when {expected} had been asked")]
    WrongOption { expected: u32, found: u32 },
    #[error("a reply of kind {kind:#x} does not belong to option {option}")]
    UnexpectedReply { option: u32, kind: u32 },
    #[error("option {option} was answered more than {max} times")]
    TooManyReplies { option: u32, max: usize },
    #[error("it sent more than {max} options without opening an export")]
    TooManyOptions { max: usize },
    #[error("the export was opened without a word about its size")]
    NoExportInfo,
    #[error("it selected the meta context {name:?}, which had not been asked for, or twice")]
    WrongContext { name: String },
    #[error("it gave two meta contexts the number {id}")]
    ContextIdTwice { id: u32 },
}
