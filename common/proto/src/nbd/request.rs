//! What a client sends once the export is open.

use super::Violation;
use super::fields::Fields;

pub const REQUEST_LENGTH: usize = 28;

const MAGIC: u32 = 0x2560_9513;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    /// Its data follow the request.
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Other(u16),
}

impl Command {
    fn number(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Other(number) => number,
        }
    }

    fn of(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Other(other),
        }
    }

    /// Flags that a client may set with it.
    pub fn allowed(self) -> CommandFlags {
        match self {
            Command::Read => CommandFlags::DF,
            Command::Write | Command::Trim => CommandFlags::FUA,
            Command::WriteZeroes => CommandFlags::FUA.with(CommandFlags::NO_HOLE).with(CommandFlags::FAST_ZERO),
            Command::BlockStatus => CommandFlags::REQ_ONE,
            Command::Disconnect | Command::Flush | Command::Cache | Command::Other(_) => CommandFlags::NONE,
        }
    }
}

/// How it is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandFlags(pub u16);

impl CommandFlags {
    pub const NONE: CommandFlags = CommandFlags(0);
    /// Durable before the reply.
    pub const FUA: CommandFlags = CommandFlags(1 << 0);
    /// Zeros that keep their space.
    pub const NO_HOLE: CommandFlags = CommandFlags(1 << 1);
    /// One chunk only.
    pub const DF: CommandFlags = CommandFlags(1 << 2);
    /// One extent only.
    pub const REQ_ONE: CommandFlags = CommandFlags(1 << 3);
    /// Only if it is faster than writing.
    pub const FAST_ZERO: CommandFlags = CommandFlags(1 << 4);

    pub fn contains(self, other: CommandFlags) -> bool {
        self.0 & other.0 == other.0
    }

    pub fn with(self, other: CommandFlags) -> CommandFlags {
        CommandFlags(self.0 | other.0)
    }
}

/// A request, without the data of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub flags: CommandFlags,
    /// Comes back in the replies.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub fn encode(&self) -> [u8; REQUEST_LENGTH] {
        let mut out = [0; REQUEST_LENGTH];
        out[..4].copy_from_slice(&MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.number().to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Request, Violation> {
        let mut fields = Fields::of("a request", bytes);
        let magic = fields.u32()?;
        if magic != MAGIC {
            return Err(Violation::Magic { what: "a request", found: magic.into(), expected: MAGIC.into() });
        }
        let flags = CommandFlags(fields.u16()?);
        let command = Command::of(fields.u16()?);
        let request = Request { command, flags, cookie: fields.u64()?, offset: fields.u64()?, length: fields.u32()? };
        fields.end()?;
        Ok(request)
    }
}
