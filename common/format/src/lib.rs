//! The format of a reseal vault: bytes in, bytes out.
//!
//! The data's path, which is also the reading order of the modules:
//!
//! ```text
//! cluster → frames → blob → pack        (geometry, frames, keys, pack)
//!           blob references → index     (index)
//!           root of each disk → manifest (seal, manifest)
//! ```
//!
//! [`layout`] names the objects, [`names`] and [`ids`] what is in those names, [`tenant`] and [`vaultfile`] hold
//! the two records that are read before anything else.
//!
//! Architecture invariant: nothing here reads a clock, a file or a socket, and randomness is passed in. Every decoder
//! takes bytes that may come from an attacker: it checks each length against a hard limit before it allocates.
//! `docs/FORMAT.md` has the byte tables.

pub mod boot_reads;
pub mod condemned;
pub mod dated_note;
mod fields;
pub mod frames;
pub mod geometry;
pub mod hold_note;
pub mod ids;
pub mod index;
pub mod keys;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod names;
pub mod objectives;
pub mod ordinals;
pub mod overlay;
pub mod overlay_note;
pub mod pack;
pub mod retention;
pub mod seal;
pub mod tenant;
pub mod time;
pub mod vaultfile;
pub mod verdict_note;

/// Version of everything described here. A reader refuses any other.
pub const FORMAT_VERSION: u16 = 1;

/// Why bytes are not what they claim to be. The caller knows the object's name and adds it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes do not follow the format: a wrong magic, a length out of range, a field that contradicts another.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// The object was written by a later version.
    #[error("has format version {found}, this program reads version {FORMAT_VERSION}; use a newer reseal")]
    Version { found: u16 },
    /// The vault needs a feature that this program lacks.
    #[error("needs the feature {0:?}, which this program lacks; use a newer reseal")]
    Feature(String),
    /// The authentication tag does not match: other bytes, another key, or an object moved from elsewhere.
    #[error("failed authentication: it was damaged, replaced, or belongs elsewhere")]
    Authentication,
    /// The object was sealed under a data-encryption key that the tenant record does not hold.
    #[error("is sealed under DEK epoch {0}, which the tenant record does not hold")]
    UnknownEpoch(u32),
    /// What was authenticated is about another object than the one that was asked for.
    #[error("is about something else: {0}")]
    Mismatch(&'static str),
}
