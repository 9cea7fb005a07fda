//! Errors about one key of one server.

use reseal_proto::kmip::response::Refusal;
use reseal_proto::kmip::{CodecError, Reason, Request};

use super::channel::Fault;
use crate::KmsError;

/// Longest text of a server that is repeated.
const MAX_QUOTE: usize = 200;

/// What errors name: the server, as the operator's configuration has it, and the key.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) kms: &'a str,
    pub(super) key: &'a str,
}

impl Target<'_> {
    pub(super) fn missing(self) -> KmsError {
        KmsError::NoSuchKey { kms: self.kms.to_owned(), key: self.key.to_owned() }
    }

    pub(super) fn taken(self) -> KmsError {
        KmsError::KeyTaken { kms: self.kms.to_owned(), key: self.key.to_owned() }
    }

    pub(super) fn unfit(self, what: &'static str) -> KmsError {
        KmsError::UnfitKey { kms: self.kms.to_owned(), key: self.key.to_owned(), what }
    }

    pub(super) fn not_opened(self) -> KmsError {
        KmsError::NotOpened { kms: self.kms.to_owned(), key: self.key.to_owned() }
    }

    pub(super) fn not_reached(self, what: String) -> KmsError {
        KmsError::NotReached { kms: self.kms.to_owned(), key: self.key.to_owned(), what }
    }

    pub(super) fn nonsense(self, what: impl ToString) -> KmsError {
        KmsError::BadAnswer { kms: self.kms.to_owned(), key: self.key.to_owned(), what: what.to_string() }
    }

    pub(super) fn codec(self, request: &Request<'_>, error: CodecError) -> KmsError {
        self.nonsense(format!("asked to {}: {error}", action(request)))
    }

    pub(super) fn denied(self, action: &'static str, what: String) -> KmsError {
        KmsError::Denied { kms: self.kms.to_owned(), key: self.key.to_owned(), action, what }
    }

    /// A connection that failed.
    pub(super) fn fault(self, fault: Fault) -> KmsError {
        match fault {
            Fault::Unreachable(what) => self.not_reached(what),
            Fault::Denied(what) => self.denied("open a session", what),
            Fault::Stranger(what) => self.nonsense(what),
        }
    }

    /// A server that does not do what it was asked to.
    pub(super) fn refused(self, request: &Request<'_>, refusal: Refusal<'_>) -> KmsError {
        match refusal.reason {
            Reason::ITEM_NOT_FOUND | Reason::OBJECT_NOT_FOUND | Reason::OBJECT_DESTROYED => self.missing(),
            Reason::OBJECT_ALREADY_EXISTS | Reason::NON_UNIQUE_NAME_ATTRIBUTE => self.taken(),
            Reason::WRONG_KEY_LIFECYCLE_STATE => self.unfit("it is not active: activate it, or name another key"),
            Reason::INCOMPATIBLE_CRYPTOGRAPHIC_USAGE_MASK => self.unfit(UNFIT_USAGE),
            Reason::OBJECT_ARCHIVED | Reason::KEY_VALUE_NOT_PRESENT => self.unfit("it is archived: recover it there"),
            Reason::SENSITIVE | Reason::NOT_EXTRACTABLE => {
                self.unfit("the server keeps it to itself, and can't encrypt with AES-256-GCM either")
            }
            Reason::INTERNAL_SERVER_ERROR
            | Reason::SERVER_LIMIT_EXCEEDED
            | Reason::PROTECTION_STORAGE_UNAVAILABLE
            | Reason::GENERAL_FAILURE => {
                self.not_reached(format!("asked to {}, it fails: {}", action(request), said(request, refusal)))
            }
            _ => self.denied(action(request), said(request, refusal)),
        }
    }
}

/// A key must allow both, and the server's refusal or its attributes may tell that it does not.
pub(super) const UNFIT_USAGE: &str = "its usage mask does not allow to encrypt and decrypt";

/// What the server says. Its own words are left out where it was sent what it could repeat.
fn said(request: &Request<'_>, refusal: Refusal<'_>) -> String {
    let quotable = !matches!(request, Request::Encrypt { .. } | Request::Decrypt { .. } | Request::Get { .. });
    if !quotable || refusal.message.is_empty() {
        return refusal.reason.to_string();
    }
    // Escaped: it goes onto a terminal.
    let words: String = refusal.message.chars().take(MAX_QUOTE).flat_map(char::escape_debug).collect();
    format!("{}: {words}", refusal.reason)
}

/// What a request asks for, as an error says it.
fn action(request: &Request<'_>) -> &'static str {
    match request {
        Request::DiscoverVersions => "open a session",
        Request::Locate { .. } => "find keys",
        Request::Create { .. } => "create keys",
        Request::Activate { .. } => "activate keys",
        Request::Revoke { .. } => "revoke keys",
        Request::Destroy { .. } => "destroy keys",
        Request::GetAttributes { .. } => "show attributes",
        Request::Get { .. } => "hand out keys",
        Request::Encrypt { .. } => "encrypt",
        Request::Decrypt { .. } => "decrypt",
    }
}
