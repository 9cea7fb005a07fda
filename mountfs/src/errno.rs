//! What can go wrong for a reader of a mount, and the number that the kernel is told.
//!
//! | what | errno |
//! | --- | --- |
//! | no such name; a VM or restore point that is not, or no longer, there | ENOENT |
//! | an inode that is no folder, file or link as the request needs | ENOTDIR, EISDIR, EINVAL |
//! | a seek beyond the last data or the end | ENXIO |
//! | a handle that is not open | EBADF |
//! | an attribute that is not there | ENODATA |
//! | a change of what can't be changed | EROFS |
//! | another length or owner for a disk that can be written to | EPERM |
//! | a write behind its end | EFBIG |
//! | a kind of allocation that has no meaning here | EOPNOTSUPP |
//! | an overlay that is full, by its limit or its file system | ENOSPC |
//! | an answer that does not fit | ERANGE |
//! | damaged, missing, replaced or rolled back; a failed authentication | EIO |
//! | a store that fails, is gone, or does not answer in time; too many that wait for it; the mount ends | EIO |
//! | an overlay that is damaged, or could not be made durable | EIO |
//!
//! The tables below are exhaustive and have no wildcard, so that a new error forces a decision here.

use std::time::Duration;

use fuser::Errno;
use reseal_store::StoreError;
use reseal_vault::VaultError;

use crate::overlay::OverlayError;

/// Why a request was not answered with what it asked for.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("the store did not answer within {} s", .0.as_secs_f32())]
    Deadline(Duration),
    #[error("too many requests wait for the store already")]
    Crowded,
    #[error("the mount is ending")]
    Ending,
    #[error("a worker died")]
    Died,
    #[error("no such name")]
    NoEntry,
    #[error("not a folder")]
    NotAFolder,
    #[error("is a folder")]
    IsAFolder,
    #[error("not a link")]
    NotALink,
    #[error("nothing but a hole follows")]
    PastData,
    #[error("no such way to seek")]
    BadSeek,
    #[error("the handle is not open")]
    BadHandle,
    #[error("no such attribute")]
    NoAttribute,
    #[error("the answer does not fit")]
    TooSmall,
    #[error(transparent)]
    Overlay(OverlayError),
    #[error("it can't be changed")]
    ReadOnly,
    #[error("a disk keeps its length, its owner and its mode")]
    Fixed,
    #[error("that is behind the end of the disk")]
    PastEnd,
    #[error("only holes and zeros can be allocated, within the disk")]
    NoSuchAllocation,
}

impl Fault {
    /// Whether only the wish not to wait stood in the way.
    pub fn would_block(&self) -> bool {
        matches!(self, Fault::Vault(VaultError::WouldBlock))
    }

    /// Whether the administrator should hear of it: what any program may provoke by asking for a wrong name is not worth
    /// a line.
    pub fn is_worth_a_line(&self) -> bool {
        matches!(errno(self), Errno::EIO | Errno::ENOSPC) && !matches!(self, Fault::Ending)
    }
}

/// The number for the kernel.
pub fn errno(fault: &Fault) -> Errno {
    match fault {
        Fault::Vault(error) => vault_errno(error),
        Fault::Deadline(_) | Fault::Crowded | Fault::Ending | Fault::Died => Errno::EIO,
        Fault::NoEntry => Errno::ENOENT,
        Fault::NotAFolder => Errno::ENOTDIR,
        Fault::IsAFolder => Errno::EISDIR,
        Fault::NotALink | Fault::BadSeek => Errno::EINVAL,
        Fault::PastData => Errno::ENXIO,
        Fault::BadHandle => Errno::EBADF,
        Fault::NoAttribute => Errno::ENODATA,
        Fault::TooSmall => Errno::ERANGE,
        Fault::Overlay(error) if error.is_full() => Errno::ENOSPC,
        Fault::Overlay(_) => Errno::EIO,
        Fault::ReadOnly => Errno::EROFS,
        Fault::Fixed => Errno::EPERM,
        Fault::PastEnd => Errno::EFBIG,
        Fault::NoSuchAllocation => Errno::EOPNOTSUPP,
    }
}

fn vault_errno(error: &VaultError) -> Errno {
    match error {
        VaultError::NoVm { .. } | VaultError::NoPoint { .. } => Errno::ENOENT,
        VaultError::BadPoint { .. } => Errno::EINVAL,
        // Never meant for a reader of the mount: whoever must not wait hands the request on.
        VaultError::WouldBlock => Errno::EIO,
        VaultError::Damaged { .. } | VaultError::Missing { .. } | VaultError::Rollback { .. } => Errno::EIO,
        VaultError::NotAVault { .. }
        | VaultError::VaultExists { .. }
        | VaultError::NotEmpty(_)
        | VaultError::NoTenant { .. }
        | VaultError::TenantExists { .. }
        | VaultError::LostRace { .. }
        | VaultError::Fenced { .. }
        | VaultError::ChangedMeanwhile { .. }
        | VaultError::Held { .. }
        | VaultError::OtherKms { .. }
        | VaultError::MovedKms { .. }
        | VaultError::NoNewKeys { .. }
        | VaultError::Erased { .. }
        | VaultError::NotErased { .. }
        | VaultError::StillOpens { .. }
        | VaultError::NotWrapped { .. }
        | VaultError::OverQuota { .. }
        | VaultError::ManyObjectives { .. }
        | VaultError::ManyPolicies { .. }
        | VaultError::OtherKit { .. }
        | VaultError::OldKit { .. }
        | VaultError::KitWithoutMaster { .. }
        | VaultError::NotEmptyTenant { .. }
        | VaultError::Busy { .. }
        | VaultError::Kms(_)
        | VaultError::Elsewhere { .. }
        | VaultError::State { .. }
        | VaultError::Random => Errno::EIO,
        VaultError::Store(error) => match error {
            // The name was found in a listing or in an authenticated object, so what is missing is damage, not a wrong name.
            StoreError::NotFound(_) | StoreError::NotAFile(_) => Errno::EIO,
            StoreError::TooLong { .. } | StoreError::Short { .. } | StoreError::Io { .. } => Errno::EIO,
            StoreError::Exists(_) | StoreError::Changed(_) | StoreError::Full(_) => Errno::EIO,
            StoreError::Lost(_) | StoreError::Unconditional => Errno::EIO,
            StoreError::NoLocks | StoreError::Locked { .. } => Errno::EPERM,
            StoreError::Past(_) => Errno::EROFS,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_and_silence_are_input_output_errors_and_wrong_names_are_not() {
        let missing = VaultError::Missing { object: "pack".into(), why: "gone" };
        for fault in [Fault::Vault(missing), Fault::Deadline(Duration::from_secs(30)), Fault::Crowded] {
            assert_eq!(errno(&fault), Errno::EIO);
            assert!(fault.is_worth_a_line());
        }
        let full = Fault::Overlay(OverlayError::Full);
        assert!(errno(&full) == Errno::ENOSPC && full.is_worth_a_line(), "the owner can do something about it");
        assert!(Fault::Overlay(OverlayError::Broken).is_worth_a_line() && !Fault::ReadOnly.is_worth_a_line());
        assert_eq!(errno(&Fault::NoEntry), Errno::ENOENT);
        assert!(!Fault::NoEntry.is_worth_a_line() && !Fault::Ending.is_worth_a_line());
        assert!(Fault::Vault(VaultError::WouldBlock).would_block());
    }
}
