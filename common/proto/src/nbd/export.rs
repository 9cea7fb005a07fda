//! What a server says of an export.

use super::Violation;

/// What an export can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    pub const HAS_FLAGS: ExportFlags = ExportFlags(1 << 0);
    pub const READ_ONLY: ExportFlags = ExportFlags(1 << 1);
    pub const SEND_FLUSH: ExportFlags = ExportFlags(1 << 2);
    pub const SEND_FUA: ExportFlags = ExportFlags(1 << 3);
    pub const ROTATIONAL: ExportFlags = ExportFlags(1 << 4);
    pub const SEND_TRIM: ExportFlags = ExportFlags(1 << 5);
    pub const SEND_WRITE_ZEROES: ExportFlags = ExportFlags(1 << 6);
    pub const SEND_DF: ExportFlags = ExportFlags(1 << 7);
    /// Several connections see the same, in order.
    pub const CAN_MULTI_CONN: ExportFlags = ExportFlags(1 << 8);
    pub const SEND_CACHE: ExportFlags = ExportFlags(1 << 10);
    pub const SEND_FAST_ZERO: ExportFlags = ExportFlags(1 << 11);

    pub fn contains(self, other: ExportFlags) -> bool {
        self.0 & other.0 == other.0
    }

    pub fn with(self, other: ExportFlags) -> ExportFlags {
        ExportFlags(self.0 | other.0)
    }

    pub fn without(self, other: ExportFlags) -> ExportFlags {
        ExportFlags(self.0 & !other.0)
    }
}

/// What offsets and lengths of requests must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Every offset and length is a multiple of it; a power of two.
    pub minimum: u32,
    /// What the server likes best.
    pub preferred: u32,
    /// Most bytes of a request that carries data.
    pub maximum: u32,
}

impl BlockSize {
    /// What holds for a server that was asked and named no limits.
    pub const DEFAULT: BlockSize = BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 };
    /// Largest minimum that the protocol allows.
    pub const MAX_MINIMUM: u32 = 64 << 10;

    pub(super) fn checked(self) -> Result<BlockSize, Violation> {
        let bad = |what, value: u32| Err(Violation::Value { what, value: value.into() });
        if !self.minimum.is_power_of_two() || self.minimum > BlockSize::MAX_MINIMUM {
            return bad("the minimum block size", self.minimum);
        }
        if self.preferred < self.minimum {
            return bad("the preferred block size", self.preferred);
        }
        if self.maximum < self.minimum {
            return bad("the maximum block size", self.maximum);
        }
        Ok(self)
    }
}
