//! What can go wrong on the way to a monitor or a guest agent.

use std::io;

use reseal_cli::Status;
use reseal_proto::qmp::QmpError;

/// Why something could not be had from QEMU or its guest agent.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("can't connect to {socket}: {source}; is the VM running, and is this its socket?")]
    Connect { socket: String, source: io::Error },
    #[error(
        "{socket} did not answer {what} within {seconds} s; a monitor serves one client at a time: is another one \
         (libvirt, an earlier reseal) connected, or the VM stuck?"
    )]
    Silent { socket: String, what: String, seconds: u64 },
    #[error("the guest agent behind {socket} did not answer in time; is it installed and running in the guest?")]
    NoAgent { socket: String },
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
}

impl MonitorError {
    /// A fault of this machine.
    pub(crate) fn host(action: impl Into<String>, source: impl Into<io::Error>) -> MonitorError {
        MonitorError::Host { action: action.into(), source: source.into() }
    }

    /// Whether the other side is not there any more, so that nothing of ours is left in it.
    pub fn is_gone(&self) -> bool {
        match self {
            MonitorError::Gone { .. } => true,
            MonitorError::Connect { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
            }
            _ => false,
        }
    }

    /// What the command ends with.
    pub fn status(&self) -> Status {
        match self {
            MonitorError::Connect { .. }
            | MonitorError::Silent { .. }
            | MonitorError::Gone { .. }
            | MonitorError::Socket { .. } => Status::Unreachable,
            MonitorError::NoAgent { .. }
            | MonitorError::Garbled { .. }
            | MonitorError::Refused { .. }
            | MonitorError::Answer { .. }
            | MonitorError::Host { .. } => Status::Failed,
        }
    }
}
