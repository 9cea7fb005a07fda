//! What a KEK of the keyring does: wraps one payload, in this form.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | version, 1 |
//! | 1 | 12 | nonce, random (why that is enough: [`crate::seal`]) |
//! | 13 | n | ciphertext |
//! | 13 + n | 16 | tag |
//!
//! Associated data: label, key name, context.

use crate::kms::MAX_PAYLOAD;
use crate::seal::{self, Label, NONCE_LEN, TAG_LEN};
use crate::{KeyBytes, KeyName, KmsError, Secret};

const VERSION: u8 = 1;

/// Bytes around a payload.
const OVERHEAD: usize = 1 + NONCE_LEN + TAG_LEN;

pub(crate) fn wrap(name: &KeyName, key: &KeyBytes, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
    let sealed = seal::seal(key, Label::WrappedPayload, &parts(name, context), payload)?;
    Ok([&[VERSION], sealed.as_slice()].concat())
}

/// Checks the form of wrapped bytes before any key is fetched, and gives what is sealed.
pub(crate) fn parse<'a>(name: &KeyName, wrapped: &'a [u8]) -> Result<&'a [u8], KmsError> {
    let truncated = KmsError::WrappedTruncated { key: name.to_string(), len: wrapped.len() };
    let Some((&version, sealed)) = wrapped.split_first() else {
        return Err(truncated);
    };
    if version != VERSION {
        return Err(KmsError::WrappedVersion { key: name.to_string(), found: version, known: VERSION });
    }
    if wrapped.len() < OVERHEAD {
        return Err(truncated);
    }
    if wrapped.len() > OVERHEAD + MAX_PAYLOAD {
        return Err(KmsError::WrappedTooLong { key: name.to_string(), len: wrapped.len() });
    }
    Ok(sealed)
}

pub(crate) fn unwrap(name: &KeyName, key: &KeyBytes, context: &[u8], sealed: &[u8]) -> Option<Secret> {
    seal::open(key, Label::WrappedPayload, &parts(name, context), sealed)
}

fn parts<'a>(name: &'a KeyName, context: &'a [u8]) -> [&'a [u8]; 2] {
    [name.as_str().as_bytes(), context]
}
