//! Why another site gave no bytes, for all who waited for them.

use std::sync::Arc;

use reseal_nbd::{NbdError, Refusal};
use reseal_proto::nbd::Errno;
use reseal_vault::{Class, VaultError};

/// One failure, shared.
#[derive(Debug, Clone)]
pub(super) struct Trouble {
    message: Arc<str>,
    class: Class,
    /// Whether a new connection may do better.
    pub(super) is_passing: bool,
}

impl Trouble {
    pub(super) fn new(class: Class, message: impl Into<Arc<str>>) -> Trouble {
        Trouble { message: message.into(), class, is_passing: false }
    }

    /// A disk could not be opened.
    pub(super) fn opening(error: &VaultError) -> Trouble {
        Trouble::new(error.class(), error.to_string())
    }

    /// The server could not read something.
    pub(super) fn reading(error: &NbdError) -> Trouble {
        let message = match error {
            NbdError::Failed { errno: Errno::IO, .. } => {
                format!(
                    "{error}: what is there is damaged, or its vault does not answer; the log of that site says which"
                )
            }
            other => other.to_string(),
        };
        Trouble::new(class(error), message)
    }

    /// An export that had worked is of no use any more.
    pub(super) fn ended(error: &NbdError) -> Trouble {
        Trouble { is_passing: true, ..Trouble::reading(error) }
    }

    /// Connections were closed before they had answered.
    pub(super) fn closed(place: &str) -> Trouble {
        let message = format!("{place}: the connection was closed");
        Trouble { is_passing: true, ..Trouble::new(Class::Unreachable, message) }
    }

    pub(super) fn is_unreachable(&self) -> bool {
        self.class == Class::Unreachable
    }
}

impl From<Trouble> for VaultError {
    fn from(trouble: Trouble) -> VaultError {
        VaultError::Elsewhere { message: trouble.message.to_string(), class: trouble.class }
    }
}

fn class(error: &NbdError) -> Class {
    match error {
        NbdError::Unreachable { .. } => Class::Unreachable,
        // What a site answers where its vault has not the bytes that it should have; nothing else lasts.
        NbdError::Failed { errno: Errno::IO, .. } => Class::Damaged,
        NbdError::Failed { .. } => Class::Unreachable,
        NbdError::Refused { refusal: Refusal::ShuttingDown, .. } => Class::Unreachable,
        NbdError::Refused { .. } | NbdError::Protocol { .. } | NbdError::Changed { .. } => Class::Failed,
        NbdError::Tls { .. } => Class::Failed,
        NbdError::Usage(_) => Class::Usage,
    }
}
