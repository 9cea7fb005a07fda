//! Why a connection ended before its client wanted it to.

use std::io;
use std::time::Duration;

use reseal_proto::nbd::Violation;

/// The end of one connection; others go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the client breaks the NBD protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the client went away in the middle of a request, or of an answer to one")]
    Gone,
    #[error("the client did not take what it had asked for within {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the client opened no export in time")]
    Slow,
    #[error("TLS with the client failed: {0}")]
    Tls(rustls::Error),
    #[error("{0}")]
    Io(io::Error),
}
