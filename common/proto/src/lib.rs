//! Codecs of the protocols that reseal speaks: bytes in, events out.
//!
//! Architecture invariant: no socket, clock or file, and no length from a peer that is not checked against a limit before
//! memory is allocated by it.

pub mod kmip;
pub mod nbd;
pub mod qmp;
pub mod wire;
