//! Wrapped bytes are the ciphertext as transit writes it: `vault:v`, the key's version, `:`, base64.
//!
//! A server takes several spellings of the same: version 0 for 1, leading zeros, stray bits at the end of the base64.
//! Here each has one, so that no byte of what is stored can change unnoticed.

use crate::base64;

/// What each ciphertext starts with.
const PREFIX: &str = "vault:v";

/// Nonce and tag of AES-256-GCM and ChaCha20-Poly1305.
const LEAST: usize = 12 + 16;

/// A ciphertext whose form is right.
pub(super) struct Ciphertext<'a> {
    pub(super) text: &'a str,
    /// The version of the key that made it, from 1.
    pub(super) version: u64,
}

impl<'a> Ciphertext<'a> {
    /// None if it has not exactly that form.
    pub(super) fn parse(wrapped: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(wrapped).ok()?;
        let (digits, sealed) = text.strip_prefix(PREFIX)?.split_once(':')?;
        let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
        let version = digits.parse().ok().filter(|_| plain)?;
        (base64::decode(sealed)?.len() >= LEAST).then_some(Self { text, version })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_ciphertext_has_one_spelling() {
        let sealed = base64::encode(&[7; LEAST]);
        for (version, text) in [(1, "1"), (10, "10"), (u64::MAX, "18446744073709551615")] {
            let text = format!("vault:v{text}:{}", *sealed);
            assert_eq!(Ciphertext::parse(text.as_bytes()).unwrap().version, version);
        }
        for bad in [
            "vault:v0:",
            "vault:v01:",
            "vault:v+1:",
            "vault:v:",
            "vault:v18446744073709551616:",
            "vault:1:",
            "Vault:v1:",
        ] {
            assert!(Ciphertext::parse(format!("{bad}{}", *sealed).as_bytes()).is_none(), "{bad}");
        }
        let short = base64::encode(&[7; LEAST - 1]);
        for bad in [format!("vault:v1:{}", *short), format!("vault:v1:{}\n", *sealed), "vault:v1".into(), String::new()]
        {
            assert!(Ciphertext::parse(bad.as_bytes()).is_none(), "{bad}");
        }
        assert!(Ciphertext::parse(b"vault:v1:\xFF").is_none());
    }
}
