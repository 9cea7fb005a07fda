//! The first words of both sides.

use super::Violation;
use super::fields::Fields;

pub const GREETING_LENGTH: usize = 18;
pub const CLIENT_FLAGS_LENGTH: usize = 4;

const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second word of the handshake that came before newstyle.
const OLD_STYLE: u64 = 0x0000_4202_8186_1253;

const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;

/// What the server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Options can be negotiated.
    pub fixed_newstyle: bool,
    /// It can do without 124 bytes of zeros.
    pub no_zeroes: bool,
}

impl Greeting {
    pub fn encode(&self) -> [u8; GREETING_LENGTH] {
        let mut flags = 0;
        flags |= if self.fixed_newstyle { FIXED_NEWSTYLE } else { 0 };
        flags |= if self.no_zeroes { NO_ZEROES } else { 0 };
        let mut out = [0; GREETING_LENGTH];
        out[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
        out[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
        out[16..].copy_from_slice(&flags.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Greeting, Violation> {
        let mut fields = Fields::of("the greeting", bytes);
        let magic = fields.u64()?;
        if magic != NBDMAGIC {
            return Err(Violation::Magic { what: "the greeting", found: magic, expected: NBDMAGIC });
        }
        match fields.u64()? {
            IHAVEOPT => {}
            OLD_STYLE => return Err(Violation::OldStyle),
            found => return Err(Violation::Magic { what: "the second word", found, expected: IHAVEOPT }),
        }
        let flags = fields.u16()?;
        fields.end()?;
        Ok(Greeting { fixed_newstyle: flags & FIXED_NEWSTYLE != 0, no_zeroes: flags & NO_ZEROES != 0 })
    }
}

/// What the client answers to the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags {
    pub fixed_newstyle: bool,
    pub no_zeroes: bool,
}

impl ClientFlags {
    pub fn encode(&self) -> [u8; CLIENT_FLAGS_LENGTH] {
        let mut flags = 0;
        flags |= if self.fixed_newstyle { u32::from(FIXED_NEWSTYLE) } else { 0 };
        flags |= if self.no_zeroes { u32::from(NO_ZEROES) } else { 0 };
        flags.to_be_bytes()
    }

    /// A server drops a client that sets a flag that it does not know.
    pub fn decode(bytes: &[u8]) -> Result<ClientFlags, Violation> {
        let mut fields = Fields::of("the client's flags", bytes);
        let flags = fields.u32()?;
        fields.end()?;
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if flags & !known != 0 {
            return Err(Violation::Value { what: "the client's flags", value: flags.into() });
        }
        let has = |flag: u16| flags & u32::from(flag) != 0;
        Ok(ClientFlags { fixed_newstyle: has(FIXED_NEWSTYLE), no_zeroes: has(NO_ZEROES) })
    }
}
