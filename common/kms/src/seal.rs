//! AES-256-GCM over what is small, and every label of this crate on one screen.
//!
//! Nonces are 96 random bits. That is sound here because each key seals few messages: a KEK wraps one payload each time its tenant
//! is made or rekeyed, and a keyring is sealed anew only when its keys change. Even 2^32 of either leave the chance of a repeated
//! nonce at 2^-33. Bulk data never goes through here.

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit, Nonce};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::secret::KEY_LEN;
use crate::{KeyBytes, KeyName, KmsError, Secret};

pub(crate) const NONCE_LEN: usize = 12;
pub(crate) const TAG_LEN: usize = 16;

/// Longest plaintext: a full keyring fits, a disk does not.
const MAX_PLAINTEXT: usize = 16 * 1024 * 1024;

/// What a message is for. It opens the associated data, so that nothing sealed for one purpose opens for another.
#[derive(Clone, Copy)]
pub(crate) enum Label {
    /// A tenant's payload under a KEK.
    WrappedPayload,
    /// All keys of a keyring under its passphrase.
    SealedKeyring,
    /// The check value beside a key in a keyring.
    KeyCheck,
}

impl Label {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::WrappedPayload => b"reseal kms v1 wrapped payload",
            Self::SealedKeyring => b"reseal kms v1 sealed keyring",
            Self::KeyCheck => b"reseal kms v1 key check",
        }
    }
}

/// Associated data: the label and each part behind its length, so that no two lists of parts give the same bytes.
pub(crate) fn associated(label: Label, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in std::iter::once(&label.bytes()).chain(parts) {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// Seals `plaintext`: nonce ‖ ciphertext ‖ tag.
pub(crate) fn seal(key: &KeyBytes, label: Label, parts: &[&[u8]], plaintext: &[u8]) -> Result<Vec<u8>, KmsError> {
    let too_long = || KmsError::TooLong { what: "plaintext", len: plaintext.len(), limit: MAX_PLAINTEXT };
    if plaintext.len() > MAX_PLAINTEXT {
        return Err(too_long());
    }
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce).map_err(KmsError::Random)?;
    let payload = Payload { msg: plaintext, aad: &associated(label, parts) };
    // The cipher's own limit is far above ours.
    let sealed = cipher(key).encrypt(&Nonce::from(nonce), payload).map_err(|_| too_long())?;
    Ok([nonce.as_slice(), sealed.as_slice()].concat())
}

/// Opens what [`seal`] made; nothing unless key, label, parts and every byte are the same.
pub(crate) fn open(key: &KeyBytes, label: Label, parts: &[&[u8]], sealed: &[u8]) -> Option<Secret> {
    let (nonce, ciphertext) = sealed.split_first_chunk::<NONCE_LEN>()?;
    let payload = Payload { msg: ciphertext, aad: &associated(label, parts) };
    let plaintext = cipher(key).decrypt(&Nonce::from(*nonce), payload).ok()?;
    Some(Zeroizing::new(plaintext))
}

/// A check value over one entry of a keyring, which tells a damaged file from a wrong key. Guards against accidents only.
pub(crate) fn key_check(name: &KeyName, created: u64, key: &KeyBytes) -> [u8; 8] {
    let parts: [&[u8]; 2] = [name.as_str().as_bytes(), &created.to_le_bytes()];
    let digest = Sha256::new().chain_update(associated(Label::KeyCheck, &parts)).chain_update(key.expose()).finalize();
    let mut check = [0; 8];
    check.copy_from_slice(&digest[..8]);
    check
}

fn cipher(key: &KeyBytes) -> Aes256Gcm {
    let key: &[u8; KEY_LEN] = key.expose();
    Aes256Gcm::new(key.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn opens_only_with_the_same_key_label_and_parts() {
        let key = KeyBytes::random().unwrap();
        let sealed = seal(&key, Label::WrappedPayload, &[b"ab", b"c"], b"secret").unwrap();
        assert_eq!(sealed.len(), NONCE_LEN + 6 + TAG_LEN);
        let opens = |key: &KeyBytes, label, parts: &[&[u8]]| open(key, label, parts, &sealed).is_some();
        assert!(opens(&key, Label::WrappedPayload, &[b"ab", b"c"]));
        assert!(!opens(&KeyBytes::random().unwrap(), Label::WrappedPayload, &[b"ab", b"c"]));
        assert!(!opens(&key, Label::SealedKeyring, &[b"ab", b"c"]));
        assert!(!opens(&key, Label::WrappedPayload, &[b"a", b"bc"]));
        assert!(!opens(&key, Label::WrappedPayload, &[b"ab", b"c", b""]));
    }

    #[test]
    fn sealing_twice_gives_other_bytes() {
        let key = KeyBytes::random().unwrap();
        let once = || seal(&key, Label::WrappedPayload, &[], b"secret").unwrap();
        assert_ne!(once(), once());
    }

    #[test]
    fn short_input_is_refused() {
        let key = KeyBytes::random().unwrap();
        for len in 0..NONCE_LEN + TAG_LEN {
            assert!(open(&key, Label::WrappedPayload, &[], &vec![0; len]).is_none());
        }
    }

    #[test]
    fn the_check_value_depends_on_name_time_and_key() {
        let (a, b) = (KeyName::parse("a").unwrap(), KeyName::parse("b").unwrap());
        let (k, l) = (KeyBytes::copy_from(&[1; 32]), KeyBytes::copy_from(&[2; 32]));
        let checks = [key_check(&a, 1, &k), key_check(&b, 1, &k), key_check(&a, 2, &k), key_check(&a, 1, &l)];
        for (i, one) in checks.iter().enumerate() {
            assert!(checks[i + 1..].iter().all(|other| one != other));
        }
    }
}
