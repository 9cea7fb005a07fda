//! Names of key-encryption keys.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::KmsError;

/// Longest name. Vault, KMIP servers and file names all take this much.
const MAX_NAME: usize = 128;

/// Longest part of a tenant's name that goes into the name of its key, which leaves room for the suffix.
const MAX_STEM: usize = 100;

/// The name of a KEK: 1 to 128 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
///
/// So narrow because it comes from records that others wrote, and goes into paths of a KMS, into files and onto terminals.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyName(String);

impl KeyName {
    /// Checks a name that comes from outside.
    pub fn parse(name: &str) -> Result<Self, KmsError> {
        let legal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if starts && name.len() <= MAX_NAME && name.as_bytes().iter().all(legal) {
            Ok(Self(name.to_owned()))
        } else {
            Err(KmsError::InvalidName { name: name.chars().take(MAX_NAME).collect() })
        }
    }

    /// A fresh name for a key of `tenant`: what is legal of the tenant's name, and 8 random hex digits.
    ///
    /// Random, so that a tenant made anew under an old name never meets the old key.
    pub fn for_tenant(tenant: &str) -> Result<Self, KmsError> {
        let mut suffix = [0; 4];
        getrandom::fill(&mut suffix).map_err(KmsError::Random)?;
        let stem: String = tenant
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
            .take(MAX_STEM)
            .collect();
        let stem = stem.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        let stem = if stem.is_empty() { "tenant" } else { stem };
        Self::parse(&format!("{stem}-{}", hex::encode(suffix)))
    }

    /// A fresh name for the key that takes the place of this one: the same but for the random digits at its end.
    pub fn successor(&self) -> Result<Self, KmsError> {
        let stem = match self.0.rsplit_once('-') {
            Some((stem, digits)) if digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()) => stem,
            _ => &self.0,
        };
        Self::for_tenant(stem)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for KeyName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyName {
    type Error = KmsError;

    fn try_from(name: String) -> Result<Self, KmsError> {
        Self::parse(&name)
    }
}

impl From<KeyName> for String {
    fn from(name: KeyName) -> String {
        name.0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_names_are_accepted() {
        let longest = "a".repeat(MAX_NAME);
        for good in ["default-0a1b2c3d", "A", "0.x_y-z", longest.as_str()] {
            assert_eq!(KeyName::parse(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(MAX_NAME + 1);
        for bad in ["", "-a", ".a", "..", "a/b", "a b", "a\n", "a\0", "ä", "a\u{1b}[2J", long.as_str()] {
            assert!(matches!(KeyName::parse(bad), Err(KmsError::InvalidName { .. })), "{bad:?}");
        }
    }

    #[test]
    fn any_tenant_gets_a_legal_name_of_its_own() {
        let long = "x".repeat(1000);
        for (tenant, stem) in [
            ("acme", "acme"),
            ("Größe & Co", "Gr__e___Co"),
            ("../etc", "etc"),
            ("日本", "tenant"),
            ("", "tenant"),
            (&long, &long[..MAX_STEM]),
        ] {
            let name = KeyName::for_tenant(tenant).unwrap();
            let (front, suffix) = name.as_str().rsplit_once('-').unwrap();
            assert_eq!(front, stem);
            assert_eq!(suffix.len(), 8);
            assert_ne!(name, KeyName::for_tenant(tenant).unwrap());
        }
    }

    #[test]
    fn a_successor_has_other_digits_and_does_not_grow() {
        for (name, stem) in
            [("acme-0a1b2c3d", "acme"), ("acme", "acme"), ("acme-0a1b2c3", "acme-0a1b2c3"), ("a-b-00000000", "a-b")]
        {
            let name = KeyName::parse(name).unwrap();
            let next = name.successor().unwrap();
            assert_eq!(next.as_str().rsplit_once('-').unwrap().0, stem);
            assert_ne!(next, name);
            assert_eq!(next.successor().unwrap().as_str().len(), next.as_str().len());
        }
        assert!(KeyName::parse(&"a".repeat(MAX_NAME)).unwrap().successor().is_ok());
    }

    #[test]
    fn an_error_shows_control_characters_escaped() {
        let message = KeyName::parse("a\u{1b}[2J").unwrap_err().to_string();
        assert!(!message.contains('\u{1b}'), "{message}");
    }
}
