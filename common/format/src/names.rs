//! Names that people give: of tenants, VMs and disks.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Deserializer, Serialize};

/// Longest name in bytes: percent-encoding can triple it, and file systems end at 255.
pub const MAX_NAME: usize = 80;

/// What stays itself in an object key.
const KEEP: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Why a name can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {what} name {name:?} {why}; names have 1 to {MAX_NAME} bytes of UTF-8 without '/' and control characters")]
pub struct NameError {
    what: &'static str,
    name: String,
    why: &'static str,
}

fn fault(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("is empty"),
        "." | ".." => Some("means a folder"),
        _ if name.len() > MAX_NAME => Some("is too long"),
        _ if name.contains('/') => Some("contains '/'"),
        _ if name.chars().any(char::is_control) => Some("contains a control character"),
        _ => None,
    }
}

fn encode(name: &str) -> String {
    let text = utf8_percent_encode(name, KEEP).to_string();
    // A key never starts with a dot: it could be hidden, or be taken for a folder.
    match text.strip_prefix('.') {
        Some(rest) => format!("%2E{rest}"),
        None => text,
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $refused:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Checks a name that somebody typed or that was read.
            pub fn new(name: &str) -> Result<Self, NameError> {
                let refused: &[(char, &'static str)] = &$refused;
                let why = fault(name).or_else(|| refused.iter().find(|(c, _)| name.contains(*c)).map(|(_, why)| *why));
                match why {
                    Some(why) => Err(NameError { what: $what, name: name.chars().take(MAX_NAME).collect(), why }),
                    None => Ok(Self(name.to_owned())),
                }
            }

            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The name as one part of an object key.
            pub fn to_key(&self) -> String {
                encode(&self.0)
            }

            /// The name that a part of an object key spells, if it is the one way to spell it.
            pub fn from_key(part: &str) -> Option<Self> {
                let name = Self::new(&percent_decode_str(part).decode_utf8().ok()?).ok()?;
                (name.to_key() == part).then_some(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(/** A customer of the vault. */ TenantName, "tenant", []);
name!(/** A virtual machine. */ VmName, "VM", []);
name!(/** A site that may send to a tenant. */ ClientName, "client", []);
name!(/** A disk of a VM. */ DiskName, "disk", [('=', "contains '=', which ends the name in NAME=DISK")]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", "a\nb", "a\0b", "\u{85}", &"x".repeat(81)] {
            assert!(VmName::new(name).is_err(), "{name:?}");
        }
        assert!(DiskName::new("a=b").is_err());
    }

    #[test]
    fn keys_are_canonical_and_reversible() {
        for name in ["web01", ".hidden", "ä ö", "50%", "a@b", "...", "-x", "a\\b"] {
            let vm = VmName::new(name).unwrap();
            let key = vm.to_key();
            assert!(key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.%".contains(&b)) && !key.starts_with('.'));
            assert_eq!(VmName::from_key(&key), Some(vm));
        }
        assert_eq!(VmName::from_key("%77eb"), None, "another spelling of the same name");
        assert_eq!(VmName::from_key("..%2Fx"), None);
    }
}
