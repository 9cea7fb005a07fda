//! What can go wrong between reseal and a running QEMU.

use std::io;

use reseal_cli::Status;
use reseal_qmp::MonitorError;

use crate::guardian::GuardianError;

/// Why something could not be had from QEMU or its guest agent.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("can't {action}: {source}")]
    Host { action: String, source: io::Error },
    #[error(transparent)]
    Guardian(#[from] GuardianError),
    #[error("{0}")]
    Unusable(String),
    #[error("{0}; nothing was committed")]
    Lost(String),
}

impl QemuError {
    /// A fault of this machine.
    pub(crate) fn host(action: impl Into<String>, source: impl Into<io::Error>) -> QemuError {
        QemuError::Host { action: action.into(), source: source.into() }
    }

    /// The kernel gave no random numbers.
    pub(crate) fn random(e: getrandom::Error) -> QemuError {
        QemuError::host("make random numbers", io::Error::other(e.to_string()))
    }

    /// Whether the other side is not there any more, so that nothing of ours is left in it.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            QemuError::Monitor(e) => e.is_gone(),
            _ => false,
        }
    }

    /// What the command ends with.
    pub fn status(&self) -> Status {
        match self {
            QemuError::Monitor(e) => e.status(),
            QemuError::Lost(_) => Status::Unreachable,
            QemuError::Host { .. } | QemuError::Guardian(_) | QemuError::Unusable(_) => Status::Failed,
        }
    }
}
