//! What a server answers to an option.

use std::fmt;

use super::fields::{Fields, length32, message, put_string};
use super::{BlockSize, ExportFlags, MAX_OPTION_REPLY, OptionKind, Violation, info};

pub const OPTION_REPLY_HEADER_LENGTH: usize = 20;

const MAGIC: u64 = 0x0003_e889_0455_65a9;
const ERROR: u32 = 1 << 31;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;

/// Why a server does not do what an option asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionError {
    Unsupported,
    Policy,
    Invalid,
    Platform,
    TlsRequired,
    Unknown,
    Shutdown,
    BlockSizeRequired,
    TooBig,
    Other(u32),
}

impl OptionError {
    fn number(self) -> u32 {
        ERROR
            | match self {
                OptionError::Unsupported => 1,
                OptionError::Policy => 2,
                OptionError::Invalid => 3,
                OptionError::Platform => 4,
                OptionError::TlsRequired => 5,
                OptionError::Unknown => 6,
                OptionError::Shutdown => 7,
                OptionError::BlockSizeRequired => 8,
                OptionError::TooBig => 9,
                OptionError::Other(number) => number,
            }
    }

    fn of(number: u32) -> OptionError {
        match number & !ERROR {
            1 => OptionError::Unsupported,
            2 => OptionError::Policy,
            3 => OptionError::Invalid,
            4 => OptionError::Platform,
            5 => OptionError::TlsRequired,
            6 => OptionError::Unknown,
            7 => OptionError::Shutdown,
            8 => OptionError::BlockSizeRequired,
            9 => OptionError::TooBig,
            other => OptionError::Other(other),
        }
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptionError::Unsupported => "not supported",
            OptionError::Policy => "against its policy",
            OptionError::Invalid => "invalid request",
            OptionError::Platform => "not possible on its platform",
            OptionError::TlsRequired => "TLS required",
            OptionError::Unknown => "no such export",
            OptionError::Shutdown => "shutting down",
            OptionError::BlockSizeRequired => "block size must be negotiated",
            OptionError::TooBig => "request too large",
            OptionError::Other(number) => return write!(f, "error {number}"),
        })
    }
}

/// What stands before the data of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    pub option: OptionKind,
    /// Which reply, as on the wire.
    pub kind: u32,
    /// Bytes that follow, at most `MAX_OPTION_REPLY`.
    pub length: usize,
}

impl OptionReplyHeader {
    pub fn decode(bytes: &[u8]) -> Result<OptionReplyHeader, Violation> {
        const WHAT: &str = "the reply to an option";
        let mut fields = Fields::of(WHAT, bytes);
        let magic = fields.u64()?;
        if magic != MAGIC {
            return Err(Violation::Magic { what: WHAT, found: magic, expected: MAGIC });
        }
        let option = OptionKind::of(fields.u32()?);
        let kind = fields.u32()?;
        let length = u64::from(fields.u32()?);
        fields.end()?;
        let too_long = || Violation::TooLong { what: WHAT, length, max: MAX_OPTION_REPLY as u64 };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_OPTION_REPLY).ok_or_else(too_long)?;
        Ok(OptionReplyHeader { option, kind, length })
    }
}

/// One piece of information about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    Export {
        size: u64,
        flags: ExportFlags,
    },
    Name(String),
    Description(String),
    BlockSize(BlockSize),
    /// One that is not known here.
    Other(u16),
}

/// A reply with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    Ack,
    /// One export of a list, and details for people.
    Server {
        name: String,
        details: String,
    },
    Info(Info),
    MetaContext {
        id: u32,
        name: String,
    },
    Error {
        error: OptionError,
        text: String,
    },
    /// One that is not known here, which no client asks for.
    Other(u32),
}

impl OptionReply {
    fn kind(&self) -> u32 {
        match self {
            OptionReply::Ack => ACK,
            OptionReply::Server { .. } => SERVER,
            OptionReply::Info(_) => INFO,
            OptionReply::MetaContext { .. } => META_CONTEXT,
            OptionReply::Error { error, .. } => error.number(),
            OptionReply::Other(kind) => *kind,
        }
    }

    /// Header and data. Strings must have at most `MAX_STRING` bytes.
    pub fn encode(&self, option: OptionKind) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            OptionReply::Server { name, details } => {
                put_string(&mut data, name);
                data.extend(details.as_bytes());
            }
            OptionReply::Info(info) => info.put(&mut data),
            OptionReply::MetaContext { id, name } => {
                data.extend(id.to_be_bytes());
                data.extend(name.as_bytes());
            }
            OptionReply::Error { text, .. } => data.extend(text.as_bytes()),
            OptionReply::Ack | OptionReply::Other(_) => {}
        }
        let mut out = Vec::with_capacity(OPTION_REPLY_HEADER_LENGTH + data.len());
        out.extend(MAGIC.to_be_bytes());
        out.extend(option.number().to_be_bytes());
        out.extend(self.kind().to_be_bytes());
        out.extend(length32(data.len()).to_be_bytes());
        out.extend(data);
        out
    }

    /// From the data that followed a header.
    pub fn decode(kind: u32, data: &[u8]) -> Result<OptionReply, Violation> {
        let mut fields = Fields::of("the data of a reply to an option", data);
        let reply = match kind {
            ACK => OptionReply::Ack,
            SERVER => OptionReply::Server { name: fields.string()?, details: message(fields.rest()) },
            INFO => OptionReply::Info(Info::take(&mut fields)?),
            META_CONTEXT => OptionReply::MetaContext { id: fields.u32()?, name: fields.last_string()? },
            kind if kind & ERROR != 0 => {
                OptionReply::Error { error: OptionError::of(kind), text: message(fields.rest()) }
            }
            kind => {
                fields.rest();
                OptionReply::Other(kind)
            }
        };
        fields.end()?;
        Ok(reply)
    }
}

impl Info {
    fn put(&self, data: &mut Vec<u8>) {
        match self {
            Info::Export { size, flags } => {
                data.extend(info::EXPORT.to_be_bytes());
                data.extend(size.to_be_bytes());
                data.extend(flags.0.to_be_bytes());
            }
            Info::Name(text) => {
                data.extend(info::NAME.to_be_bytes());
                data.extend(text.as_bytes());
            }
            Info::Description(text) => {
                data.extend(info::DESCRIPTION.to_be_bytes());
                data.extend(text.as_bytes());
            }
            Info::BlockSize(size) => {
                data.extend(info::BLOCK_SIZE.to_be_bytes());
                data.extend([size.minimum, size.preferred, size.maximum].iter().flat_map(|size| size.to_be_bytes()));
            }
            Info::Other(kind) => data.extend(kind.to_be_bytes()),
        }
    }

    fn take(fields: &mut Fields<'_>) -> Result<Info, Violation> {
        Ok(match fields.u16()? {
            info::EXPORT => Info::Export { size: fields.u64()?, flags: ExportFlags(fields.u16()?) },
            info::NAME => Info::Name(fields.last_string()?),
            info::DESCRIPTION => Info::Description(message(fields.rest())),
            info::BLOCK_SIZE => {
                let size = BlockSize { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? };
                Info::BlockSize(size.checked()?)
            }
            kind => {
                fields.rest();
                Info::Other(kind)
            }
        })
    }
}
