//! What a server answers to a request: a simple reply, or chunks of a structured one.

use super::fields::{Fields, message};
use super::{Errno, MAX_DESCRIPTORS, MAX_STRING, Violation};

/// Bytes that tell which kind of reply it is.
pub const REPLY_START: usize = 4;
pub const SIMPLE_LENGTH: usize = 16;
pub const CHUNK_LENGTH: usize = 20;
/// Offset before the data of a chunk.
pub const OFFSET_LENGTH: usize = 8;
/// Payload of a chunk that says "zeros".
pub const HOLE_LENGTH: usize = 12;

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const DONE: u16 = 1 << 0;
const ERROR: u16 = 1 << 15;
const DESCRIPTOR_LENGTH: usize = 8;
/// Number and length of the text of an error.
const ERROR_FIELDS: usize = 6;
/// Payload of an error chunk, also of a kind that is not known here: fields, text, and room for what may come.
const MAX_ERROR: usize = ERROR_FIELDS + MAX_STRING + 64;

/// Flags of extents.
pub mod state {
    /// `base:allocation`: takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// `base:allocation`: reads as zeros.
    pub const ZERO: u32 = 1 << 1;
    /// `qemu:dirty-bitmap:…`: written to since the bitmap was made.
    pub const DIRTY: u32 = 1 << 0;
}

/// The first part of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The data of a read that succeeded follow.
    Simple {
        error: Errno,
        cookie: u64,
    },
    Chunk(Chunk),
}

/// What stands before the payload of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Nothing follows for this request.
    pub done: bool,
    pub kind: ChunkKind,
    pub cookie: u64,
    /// Bytes of payload that follow. Possible for the kind; for data, the caller has to compare it with the request.
    pub length: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    None,
    Data,
    Hole,
    BlockStatus,
    Error,
    ErrorOffset,
    /// An error of a kind that is not known here.
    OtherError(u16),
}

impl ChunkKind {
    fn number(self) -> u16 {
        match self {
            ChunkKind::None => 0,
            ChunkKind::Data => 1,
            ChunkKind::Hole => 2,
            ChunkKind::BlockStatus => 5,
            ChunkKind::Error => ERROR | 1,
            ChunkKind::ErrorOffset => ERROR | 2,
            ChunkKind::OtherError(number) => number,
        }
    }

    fn of(number: u16) -> Result<ChunkKind, Violation> {
        Ok(match number {
            0 => ChunkKind::None,
            1 => ChunkKind::Data,
            2 => ChunkKind::Hole,
            5 => ChunkKind::BlockStatus,
            number if number == ERROR | 1 => ChunkKind::Error,
            number if number == ERROR | 2 => ChunkKind::ErrorOffset,
            number if number & ERROR != 0 => ChunkKind::OtherError(number),
            number => return Err(Violation::Value { what: "the kind of a chunk", value: number.into() }),
        })
    }

    /// Whether a payload of that length can be.
    fn fits(self, length: usize) -> bool {
        match self {
            ChunkKind::None => length == 0,
            ChunkKind::Data => length > OFFSET_LENGTH,
            ChunkKind::Hole => length == HOLE_LENGTH,
            ChunkKind::BlockStatus => {
                let descriptors = length.saturating_sub(4);
                descriptors > 0
                    && descriptors.is_multiple_of(DESCRIPTOR_LENGTH)
                    && descriptors / DESCRIPTOR_LENGTH <= MAX_DESCRIPTORS
            }
            ChunkKind::Error | ChunkKind::OtherError(_) => (ERROR_FIELDS..=MAX_ERROR).contains(&length),
            ChunkKind::ErrorOffset => (ERROR_FIELDS + OFFSET_LENGTH..=MAX_ERROR).contains(&length),
        }
    }
}

impl Reply {
    /// How long the reply is that starts so, without what follows it.
    pub fn length(start: [u8; REPLY_START]) -> Result<usize, Violation> {
        match u32::from_be_bytes(start) {
            SIMPLE => Ok(SIMPLE_LENGTH),
            STRUCTURED => Ok(CHUNK_LENGTH),
            found => Err(Violation::Magic { what: "a reply", found: found.into(), expected: STRUCTURED.into() }),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        match self {
            Reply::Simple { error, cookie } => {
                let mut out = Vec::with_capacity(SIMPLE_LENGTH);
                out.extend(SIMPLE.to_be_bytes());
                out.extend(error.0.to_be_bytes());
                out.extend(cookie.to_be_bytes());
                out
            }
            Reply::Chunk(chunk) => {
                let mut out = Vec::with_capacity(CHUNK_LENGTH);
                out.extend(STRUCTURED.to_be_bytes());
                out.extend(if chunk.done { DONE } else { 0 }.to_be_bytes());
                out.extend(chunk.kind.number().to_be_bytes());
                out.extend(chunk.cookie.to_be_bytes());
                out.extend(chunk.length.to_be_bytes());
                out
            }
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Reply, Violation> {
        let mut fields = Fields::of("a reply", bytes);
        let reply = match fields.u32()? {
            SIMPLE => Reply::Simple { error: Errno(fields.u32()?), cookie: fields.u64()? },
            STRUCTURED => {
                // Flags that are not known here are to be ignored.
                let done = fields.u16()? & DONE != 0;
                let kind = ChunkKind::of(fields.u16()?)?;
                let chunk = Chunk { done, kind, cookie: fields.u64()?, length: fields.u32()? };
                if !usize::try_from(chunk.length).is_ok_and(|length| kind.fits(length)) {
                    return Err(Violation::Length { what: "the payload of a chunk", length: chunk.length.into() });
                }
                if kind == ChunkKind::None && !done {
                    return Err(Violation::Value { what: "the flag of a chunk without content", value: 0 });
                }
                Reply::Chunk(chunk)
            }
            found => {
                return Err(Violation::Magic { what: "a reply", found: found.into(), expected: STRUCTURED.into() });
            }
        };
        fields.end()?;
        Ok(reply)
    }
}

/// The offset before the data of a chunk.
pub fn decode_offset(bytes: [u8; OFFSET_LENGTH]) -> u64 {
    u64::from_be_bytes(bytes)
}

/// An area that reads as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub offset: u64,
    pub length: u32,
}

impl Hole {
    pub fn encode(&self) -> [u8; HOLE_LENGTH] {
        let mut out = [0; HOLE_LENGTH];
        out[..8].copy_from_slice(&self.offset.to_be_bytes());
        out[8..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Hole, Violation> {
        let mut fields = Fields::of("a hole", bytes);
        let hole = Hole { offset: fields.u64()?, length: fields.u32()? };
        fields.end()?;
        match hole.length {
            0 => Err(Violation::Value { what: "the length of a hole", value: 0 }),
            _ => Ok(hole),
        }
    }
}

/// An extent as one context sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    pub length: u32,
    /// Of [`state`], or what else the context means by it.
    pub flags: u32,
}

/// Consecutive extents from the request's offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockStatus {
    pub context: u32,
    pub descriptors: Vec<Descriptor>,
}

impl BlockStatus {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + self.descriptors.len() * DESCRIPTOR_LENGTH);
        out.extend(self.context.to_be_bytes());
        for descriptor in &self.descriptors {
            out.extend(descriptor.length.to_be_bytes());
            out.extend(descriptor.flags.to_be_bytes());
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<BlockStatus, Violation> {
        let length = Violation::Length { what: "a block status", length: bytes.len() as u64 };
        if !ChunkKind::BlockStatus.fits(bytes.len()) {
            return Err(length);
        }
        let mut fields = Fields::of("a block status", bytes);
        let context = fields.u32()?;
        let count = (bytes.len() - 4) / DESCRIPTOR_LENGTH;
        let mut descriptors = Vec::with_capacity(count);
        for _ in 0..count {
            let descriptor = Descriptor { length: fields.u32()?, flags: fields.u32()? };
            if descriptor.length == 0 {
                return Err(Violation::Value { what: "the length of an extent", value: 0 });
            }
            descriptors.push(descriptor);
        }
        fields.end()?;
        Ok(BlockStatus { context, descriptors })
    }
}

/// An error with words, and where it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorChunk {
    pub error: Errno,
    pub text: String,
    /// Only of [`ChunkKind::ErrorOffset`].
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// The text must have at most `MAX_STRING` bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ERROR_FIELDS + self.text.len() + OFFSET_LENGTH);
        out.extend(self.error.0.to_be_bytes());
        out.extend(u16::try_from(self.text.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend(self.text.as_bytes());
        out.extend(self.offset.iter().flat_map(|offset| offset.to_be_bytes()));
        out
    }

    pub fn decode(kind: ChunkKind, bytes: &[u8]) -> Result<ErrorChunk, Violation> {
        let mut fields = Fields::of("an error", bytes);
        let error = Errno(fields.u32()?);
        if !error.is_error() {
            return Err(Violation::Value { what: "the number of an error", value: 0 });
        }
        let length = usize::from(fields.u16()?);
        if length > MAX_STRING {
            let max = MAX_STRING as u64;
            return Err(Violation::TooLong { what: "the text of an error", length: length as u64, max });
        }
        let text = message(fields.bytes(length)?);
        let offset = match kind {
            ChunkKind::ErrorOffset => Some(fields.u64()?),
            // Kinds that are not known here may have more.
            ChunkKind::OtherError(_) => {
                fields.rest();
                None
            }
            _ => None,
        };
        fields.end()?;
        Ok(ErrorChunk { error, text, offset })
    }
}
