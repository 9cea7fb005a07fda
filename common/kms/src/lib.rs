//! Key-encryption keys (KEKs): who keeps them, and how a tenant's payload is wrapped under one.
//!
//! ```text
//! payload of a tenant → Kms::wrap (key name, context) → wrapped bytes, in the tenant record
//! master and keys → recovery kit → another machine, or another KMS
//! ```
//!
//! Modules in reading order:
//!
//! - [`kms`]: the contract that every KMS fulfils, and the limits on what crosses it
//! - `names`: names of KEKs, checked before anything looks them up
//! - `secret`: keys, passphrases and unwrapped payloads; wiped when dropped, never printed
//! - `seal`: AES-256-GCM and every label in one place
//! - `kdf`: the key of a passphrase
//! - `private_file`: files that only their owner may read, replaced whole or not at all
//! - [`keyring`]: the embedded KMS, a local file for one machine
//! - [`config`]: the operator's file that says which KMS each tenant uses
//! - `base64`: what secrets take on their way through JSON
//! - [`transit`]: HashiCorp Vault and OpenBao, over HTTPS
//! - `pinned`: a KMS that serves one key only, because the configuration names it
//! - [`kmip`]: key management servers that speak KMIP, over mutual TLS
//! - [`kit`]: the recovery kit, an age file or a sheet of paper to keep away from that machine
//! - `error`: what went wrong, with which file and key, and what to do about it
//!
//! Nothing here falls back: a key that is missing, wrong or damaged is an error.

mod base64;
pub mod config;
mod error;
mod kdf;
pub mod keyring;
pub mod kit;
pub mod kmip;
pub mod kms;
mod names;
mod pinned;
pub mod private_file;
mod seal;
mod secret;
pub mod transit;

pub use config::KmsConfig;
pub use error::{Class, KmsError};
pub use keyring::{Keyring, is_passphrase_protected};
pub use kmip::{Kmip, KmipConfig};
pub use kms::Kms;
pub use names::KeyName;
pub use private_file::{read_private, read_trusted};
pub use secret::{KeyBytes, NamedKey, Passphrase, Secret};
pub use transit::Transit;
