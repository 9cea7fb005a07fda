//! What can go wrong between reseal and a running QEMU.

use std::io;

use reseal_cli::Status;
use reseal_proto::qmp::QmpError;

use crate::guardian::GuardianError;

/// Why something could not be had from QEMU or its guest agent.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    #[error("can't connect to {socket}: {source}; is the VM running, and is this its socket?")]
    Connect { socket: String, source: io::Error },
    #[error(
        "{socket} did not answer {what} within {seconds} s; a monitor serves one client at a time: is another one \
         (libvirt, an earlier reseal) connected, or the VM stuck?"
    )]
    Silent { socket: String, what: String, seconds: u64 },
    #[error("{socket} was closed while {what} was asked for; the VM has probably ended")]
    Gone { socket: String, what: String },
    #[error("{socket}: {source} during {what}")]
    Socket { socket: String, what: String, source: io::Error },
    #[error("{socket} does not speak QMP: {source}")]
    Garbled { socket: String, source: QmpError },
    #[error("QEMU refused {command}: {description}")]
    Refused { command: String, class: String, description: String },
    #[error("QEMU's answer to {command} lacks {what}; reseal needs QEMU 7.2 or newer")]
    Answer { command: String, what: &'static str },
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
            QemuError::Gone { .. } => true,
            QemuError::Connect { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
            }
            _ => false,
        }
    }

    /// What the command ends with.
    pub fn status(&self) -> Status {
        match self {
            QemuError::Connect { .. }
            | QemuError::Silent { .. }
            | QemuError::Gone { .. }
            | QemuError::Socket { .. }
            | QemuError::Lost(_) => Status::Unreachable,
            QemuError::Garbled { .. }
            | QemuError::Refused { .. }
            | QemuError::Answer { .. }
            | QemuError::Host { .. }
            | QemuError::Guardian(_)
            | QemuError::Unusable(_) => Status::Failed,
        }
    }
}
