//! What can go wrong with an export.

use reseal_cli::{Failure, Status};
use reseal_proto::nbd::Errno;
use reseal_proto::nbd::handshake::Refusal;

/// An export that can't be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdError {
    /// Nobody answers, or not any more.
    #[error("can't reach {uri}: {reason}")]
    Unreachable { uri: String, reason: String },
    /// The server answers, and does not let us.
    #[error("{uri}: {refusal}{}", remedy(.refusal))]
    Refused { uri: String, refusal: Refusal },
    /// The server could not do what it was asked.
    #[error("the server of {uri} can't {action} bytes {offset} to {end}: {errno}{text}")]
    Failed { uri: String, action: &'static str, offset: u64, end: u64, errno: Errno, text: String },
    /// What the server sends can't be right.
    #[error("the server of {uri} breaks the NBD protocol, so nothing that it sends can be believed: {what}")]
    Protocol { uri: String, what: String },
    #[error("{uri} is not the same after the connection was made again: {what}; start the backup again")]
    Changed { uri: String, what: String },
    #[error("TLS with {uri} failed: {reason}")]
    Tls { uri: String, reason: String },
    #[error("{0}")]
    Usage(String),
}

fn remedy(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::NoTls { .. } => "; it was asked for by nbds://, so nothing was read. Enable TLS in the server",
        Refusal::NotFixedNewstyle => "; a newer server is needed",
        Refusal::TlsRequired { .. } => "; write nbds:// and give --tls-ca",
        Refusal::NoSuchExport { .. } => "; the last part of the URI must name one that it has",
        Refusal::BadName | Refusal::NoContext { .. } | Refusal::ShuttingDown | Refusal::Other { .. } => "",
    }
}

impl NbdError {
    /// The exit status of a command that ends so.
    pub fn status(&self) -> Status {
        match self {
            NbdError::Unreachable { .. }
            | NbdError::Failed { .. }
            | NbdError::Protocol { .. }
            | NbdError::Changed { .. }
            | NbdError::Tls { .. } => Status::Unreachable,
            NbdError::Refused { refusal, .. } => match refusal {
                Refusal::NoSuchExport { .. }
                | Refusal::BadName
                | Refusal::TlsRequired { .. }
                | Refusal::NoContext { .. } => Status::Usage,
                Refusal::NotFixedNewstyle | Refusal::NoTls { .. } | Refusal::ShuttingDown | Refusal::Other { .. } => {
                    Status::Unreachable
                }
            },
            NbdError::Usage(_) => Status::Usage,
        }
    }

    /// Whether trying again may help, once an export has been seen to work: a server that starts again opens its socket
    /// before its exports are there.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            NbdError::Unreachable { .. } => true,
            NbdError::Refused { refusal, .. } => {
                matches!(refusal, Refusal::ShuttingDown | Refusal::NoSuchExport { .. })
            }
            NbdError::Failed { .. }
            | NbdError::Protocol { .. }
            | NbdError::Changed { .. }
            | NbdError::Tls { .. }
            | NbdError::Usage(_) => false,
        }
    }
}

impl From<NbdError> for Failure {
    fn from(error: NbdError) -> Failure {
        Failure::of(error.status(), &error)
    }
}
