//! What can go wrong between two sites.

use reseal_cli::{Failure, Status};
use reseal_proto::wire::{Trouble, TroubleCode, Violation};

/// What the other site, or the way to it, has to do with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RemoteError {
    #[error("{0}")]
    Usage(String),
    #[error("the connection to {peer} was lost: {why}")]
    Lost { peer: String, why: String },
    #[error(
        "{peer} does not accept this site's certificate ({why}): it is expired, foreign or not configured there; ask who runs it \
         for a new enrolment file"
    )]
    Refused { peer: String, why: String },
    #[error("{peer} does not speak the protocol as it should: {source}")]
    Broken { peer: String, source: Violation },
    #[error("{peer} does not keep to the protocol: {what}")]
    Unexpected { peer: String, what: String },
    #[error("{peer} says: {}", .trouble.message)]
    Trouble { peer: String, trouble: Trouble },
}

impl RemoteError {
    /// Whether another connection may end better.
    pub fn may_pass(&self) -> bool {
        match self {
            RemoteError::Lost { .. } => true,
            RemoteError::Trouble { trouble, .. } => {
                matches!(trouble.code, TroubleCode::Busy | TroubleCode::Unavailable)
            }
            _ => false,
        }
    }

    /// Whether another certificate may be taken where this one was not.
    pub fn is_of_certificate(&self) -> bool {
        match self {
            RemoteError::Refused { .. } => true,
            RemoteError::Trouble { trouble, .. } => trouble.code == TroubleCode::NotAllowed,
            _ => false,
        }
    }

    /// Exit status of a command that ends with it.
    pub fn status(&self) -> Status {
        match self {
            RemoteError::Usage(_) => Status::Usage,
            RemoteError::Lost { .. } => Status::Unreachable,
            RemoteError::Trouble { trouble, .. } => match trouble.code {
                TroubleCode::Unavailable | TroubleCode::Busy => Status::Unreachable,
                TroubleCode::Damaged => Status::Damaged,
                _ => Status::Failed,
            },
            _ => Status::Failed,
        }
    }
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Failure {
        Failure::of(error.status(), &error)
    }
}
