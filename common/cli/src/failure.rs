//! Exit statuses, and the one line that an error becomes.

use std::process::ExitCode;

use reseal_kms::KmsError;
use reseal_vault::{Class, VaultError};

/// Exit status of every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Failed = 1,
    Usage = 2,
    /// Data failed authentication or is missing.
    Damaged = 3,
    /// Source, store, KMS or server unreachable: try again.
    Unreachable = 4,
}

/// Why a command ends early.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub status: Status,
    pub message: String,
}

impl Failure {
    /// A failure of that status.
    pub fn new(status: Status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    /// The message of an error and of all its sources, each once.
    pub fn of(status: Status, error: &dyn std::error::Error) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            let text = error.to_string();
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = error.source();
        }
        Failure { status, message }
    }
}

impl From<Class> for Status {
    fn from(class: Class) -> Status {
        match class {
            Class::Failed => Status::Failed,
            Class::Usage => Status::Usage,
            Class::Damaged => Status::Damaged,
            Class::Unreachable => Status::Unreachable,
        }
    }
}

impl From<VaultError> for Failure {
    fn from(error: VaultError) -> Failure {
        Failure::of(error.class().into(), &error)
    }
}

impl From<KmsError> for Failure {
    fn from(error: KmsError) -> Failure {
        VaultError::from(error).into()
    }
}

impl From<reseal_store::StoreError> for Failure {
    fn from(error: reseal_store::StoreError) -> Failure {
        VaultError::from(error).into()
    }
}

/// Prints what went wrong and gives the exit status. The message goes through the same filter as names do, so that a
/// hostile object name can't drive the terminal.
pub fn finish(program: &str, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let visible: String =
                failure.message.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            eprintln!("{program}: {visible}");
            ExitCode::from(failure.status as u8)
        }
    }
}
