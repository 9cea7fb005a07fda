//! The contract between the vault and whatever keeps its key-encryption keys.

use crate::{KeyName, KmsError, Secret};

/// Longest payload that may be wrapped. A tenant's payload is about a hundred bytes; a KMS over the network commonly takes
/// 4 KiB or more in one call, so this much fits all of them.
pub const MAX_PAYLOAD: usize = 4096;

/// Longest context. It holds ids and a label, never data.
pub const MAX_CONTEXT: usize = 4096;

/// Longest wrapped form of any KMS: some answer in base64 with a prefix, so this is far more than [`MAX_PAYLOAD`] needs.
pub const MAX_WRAPPED: usize = 64 * 1024;

/// A key management service that keeps KEKs by name and wraps small payloads under them.
///
/// What every implementation guarantees:
///
/// - **Fail closed.** No method falls back to another key, to a cached answer, or to bytes that were not authenticated.
/// - **Bounded.** Names, contexts, payloads and wrapped bytes beyond the limits of this module are refused before anything is
///   sent or allocated for them. No call waits for ever.
/// - **Silent.** No secret is in an error, in `Debug`, or in a log.
/// - **Shared.** Methods may be called from any thread, and other processes may use the same KMS at the same time.
///
/// [`KmsError::class`] tells what a caller does about a failure.
pub trait Kms: Send + Sync {
    /// The kind as the tenant record and the recovery kit store it, such as `keyring`. Never changes for an implementation.
    fn kind(&self) -> &'static str;

    /// Makes a KEK of 256 random bits under `name`. It is durable when this returns.
    ///
    /// Returns the name to use from then on, which a KMS that names its keys itself may have chosen; callers store that one. An
    /// existing key is never replaced: that is an error.
    fn create(&self, name: &str) -> Result<KeyName, KmsError>;

    /// Encrypts `payload` under `key` so that it can be opened only with the same key and the same `context`.
    ///
    /// The answer carries all that [`Kms::unwrap`] needs (version, nonce, tag) and differs each time. A key that does not exist is
    /// an error and never made on the way.
    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError>;

    /// The payload that [`Kms::wrap`] was given, if and only if key, context and every byte of `wrapped` are those of that call.
    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError>;

    /// Destroys `key` for good: what it wrapped can't be unwrapped again, also not by processes that have the KMS open.
    ///
    /// A key that does not exist is [`KmsError::KeyMissing`]; whoever repeats an interrupted erasure takes that as done. Copies of
    /// the key elsewhere (recovery kits, the KMS's backups) are beyond reach.
    fn destroy(&self, key: &str) -> Result<(), KmsError>;

    /// Makes new material for what is wrapped under `key` from now on, and returns the name to wrap under.
    ///
    /// A KMS that keeps versions of a key makes one more, and the name stays. Any other makes a new key under a fresh
    /// name, and the old one stays beside it. Either way what was wrapped before still opens under its old name,
    /// until [`Kms::retire`].
    ///
    /// There is no call that wraps anew without unwrapping: each payload holds the generation of its record, so the
    /// next record needs another payload.
    fn rotate(&self, key: &str) -> Result<KeyName, KmsError> {
        self.create(KeyName::parse(key)?.successor()?.as_str())
    }

    /// Ends a rotation once nothing needs the old material: from now on `old` opens nothing that is older than
    /// `wrapped`, which was wrapped under `new` and this context after [`Kms::rotate`] had given that name.
    ///
    /// `wrapped` is opened first, so nothing is retired in favour of what does not open. A KMS that keeps versions
    /// refuses the older ones from then on (its administrator can allow them again); any other destroys the old key.
    /// Doing it again is no error.
    fn retire(&self, old: &str, new: &str, context: &[u8], wrapped: &[u8]) -> Result<(), KmsError> {
        self.unwrap(new, context, wrapped)?;
        if KeyName::parse(old)?.as_str() == new {
            return Ok(());
        }
        match self.destroy(old) {
            Err(error) if !error.is_key_missing() => Err(error),
            _ => Ok(()),
        }
    }
}

/// Refuses what is longer than the contract allows. Every implementation calls it first.
pub(crate) fn check_lengths(context: &[u8], payload: &[u8]) -> Result<(), KmsError> {
    for (what, bytes, limit) in [("context", context, MAX_CONTEXT), ("payload", payload, MAX_PAYLOAD)] {
        if bytes.len() > limit {
            return Err(KmsError::TooLong { what, len: bytes.len(), limit });
        }
    }
    Ok(())
}
