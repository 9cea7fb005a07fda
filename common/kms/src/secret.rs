//! Secrets: wiped when dropped, never printed, never cloned by accident.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

use crate::{KeyName, KmsError};

/// An unwrapped payload.
pub type Secret = Zeroizing<Vec<u8>>;

/// Length of a KEK.
pub(crate) const KEY_LEN: usize = 32;

/// Longest passphrase. Longer input is a mistake, such as a whole file.
const MAX_PASSPHRASE: usize = 1024;

/// A 256-bit key. Boxed, so that a move leaves no copy behind.
pub struct KeyBytes(Box<[u8; KEY_LEN]>);

impl KeyBytes {
    /// Takes a key from bytes that the caller wipes.
    pub fn copy_from(bytes: &[u8; KEY_LEN]) -> Self {
        let mut key = Self::zeroed();
        key.0.copy_from_slice(bytes);
        key
    }

    /// A fresh key from the kernel's random source.
    pub fn random() -> Result<Self, KmsError> {
        let mut key = Self::zeroed();
        getrandom::fill(key.0.as_mut_slice()).map_err(KmsError::Random)?;
        Ok(key)
    }

    /// The key itself.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// A second copy, said aloud.
    pub fn duplicate(&self) -> Self {
        Self::copy_from(&self.0)
    }

    pub(crate) fn zeroed() -> Self {
        Self(Box::new([0; KEY_LEN]))
    }

    pub(crate) fn expose_mut(&mut self) -> &mut [u8; KEY_LEN] {
        &mut self.0
    }

    /// Exactly 64 lower-case hex digits, so that a key has one spelling only.
    fn from_hex(text: &str) -> Option<Self> {
        let mut key = Self::zeroed();
        let lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (lower && hex::decode_to_slice(text, key.0.as_mut_slice()).is_ok()).then_some(key)
    }
}

impl Drop for KeyBytes {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// For tests and for the import of keys: time of comparison shows nothing to those who can't read the keys anyway.
impl PartialEq for KeyBytes {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for KeyBytes {}

impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyBytes(redacted)")
    }
}

/// A KEK with its name, as it travels between keyrings and recovery kits.
#[derive(Debug, PartialEq, Eq)]
pub struct NamedKey {
    /// The name that tenant records use.
    pub name: KeyName,
    /// The key.
    pub key: KeyBytes,
}

/// What a human types. Compared byte by byte, not normalised.
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Takes a passphrase as it was typed, without the line's end. An empty one is refused: it protects nothing.
    pub fn new(text: String) -> Result<Self, KmsError> {
        let text = Zeroizing::new(text);
        if text.is_empty() {
            return Err(KmsError::EmptyPassphrase);
        }
        if text.len() > MAX_PASSPHRASE {
            return Err(KmsError::TooLong { what: "passphrase", len: text.len(), limit: MAX_PASSPHRASE });
        }
        Ok(Self(text))
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(redacted)")
    }
}

/// How a key is written in JSON: for `#[serde(with)]`, so that no key is written where nobody said so.
pub(crate) mod key_hex {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};
    use zeroize::Zeroizing;

    use super::KeyBytes;

    pub(crate) fn serialize<S: Serializer>(key: &KeyBytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(hex::encode(key.expose())))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<KeyBytes, D::Error> {
        deserializer.deserialize_str(KeyVisitor)
    }

    /// Decodes from the text where it lies: no copy of it is made that nobody wipes.
    struct KeyVisitor;

    impl Visitor<'_> for KeyVisitor {
        type Value = KeyBytes;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("64 lower-case hex digits")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<KeyBytes, E> {
            KeyBytes::from_hex(text).ok_or_else(|| E::custom("not a key"))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let named = NamedKey { name: KeyName::parse("acme").unwrap(), key: KeyBytes::copy_from(&[0xAB; KEY_LEN]) };
        let shown = format!("{named:?} {:?}", Passphrase::new("open sesame".into()).unwrap());
        for secret in ["abab", "ABAB", "171", "sesame"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }

    #[test]
    fn passphrases_are_neither_empty_nor_whole_files() {
        assert!(matches!(Passphrase::new(String::new()), Err(KmsError::EmptyPassphrase)));
        assert!(Passphrase::new("x".repeat(MAX_PASSPHRASE)).is_ok());
        assert!(matches!(Passphrase::new("x".repeat(MAX_PASSPHRASE + 1)), Err(KmsError::TooLong { .. })));
    }

    #[test]
    fn a_key_has_one_spelling() {
        let text = "0123456789abcdef".repeat(4);
        assert_eq!(hex::encode(KeyBytes::from_hex(&text).unwrap().expose()), text);
        for bad in
            [text.to_uppercase(), text[1..].to_owned(), format!("{text}00"), text.replace('a', "g"), String::new()]
        {
            assert!(KeyBytes::from_hex(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn random_keys_differ() {
        assert_ne!(KeyBytes::random().unwrap(), KeyBytes::random().unwrap());
    }
}
