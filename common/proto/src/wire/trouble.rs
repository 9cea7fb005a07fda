//! Why a side ends the connection.

use super::fields::{Fields, Out};
use super::{MAX_TEXT, Violation};

/// What kind of trouble, so that a program can decide what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleCode {
    /// The other side broke the protocol, or sent content that is not what it had offered.
    Protocol,
    /// The other side's version is none that this side speaks.
    Version,
    /// The certificate does not allow it.
    NotAllowed,
    /// Another session is at work on the VM.
    Busy,
    /// The tenant may store no more.
    Quota,
    /// Another backup of the VM has committed meanwhile.
    LostRace,
    /// What was begun on an earlier connection is not known any more.
    Unknown,
    /// A store or KMS did not answer, or this side is about to stop: trying again may help.
    Unavailable,
    /// Data of the vault failed authentication, or are missing.
    Damaged,
    /// Something else.
    Failed,
    /// A code that a later version has.
    Other(u16),
}

impl TroubleCode {
    fn number(self) -> u16 {
        match self {
            TroubleCode::Protocol => 1,
            TroubleCode::Version => 2,
            TroubleCode::NotAllowed => 3,
            TroubleCode::Busy => 4,
            TroubleCode::Quota => 5,
            TroubleCode::LostRace => 6,
            TroubleCode::Unknown => 7,
            TroubleCode::Unavailable => 8,
            TroubleCode::Damaged => 9,
            TroubleCode::Failed => 10,
            TroubleCode::Other(number) => number,
        }
    }

    fn of(number: u16) -> TroubleCode {
        match number {
            1 => TroubleCode::Protocol,
            2 => TroubleCode::Version,
            3 => TroubleCode::NotAllowed,
            4 => TroubleCode::Busy,
            5 => TroubleCode::Quota,
            6 => TroubleCode::LostRace,
            7 => TroubleCode::Unknown,
            8 => TroubleCode::Unavailable,
            9 => TroubleCode::Damaged,
            10 => TroubleCode::Failed,
            other => TroubleCode::Other(other),
        }
    }
}

/// The last message of a side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub code: TroubleCode,
    /// Names the object, and what to do.
    pub message: String,
}

impl Trouble {
    pub(super) fn put(&self, out: &mut Out) {
        out.u16(self.code.number()).line(&self.message, MAX_TEXT);
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Trouble, Violation> {
        let code = TroubleCode::of(fields.u16()?);
        Ok(Trouble { code, message: fields.line("an error", MAX_TEXT)? })
    }
}
