//! `reseal.json`: the vault's version, features and id. In clear, and no secret.

use serde::{Deserialize, Serialize};

use crate::ids::VaultId;
use crate::{FORMAT_VERSION, FormatError};

/// Longest `reseal.json` that is read.
pub const MAX_VAULT_FILE: usize = 64 * 1024;

/// What `reseal.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultFile {
    /// Always `"reseal vault"`: what the file is, to whoever finds it.
    what: String,
    /// Format version of every object of the vault.
    format: u16,
    /// Features that a program must know to read the vault. This version knows none.
    #[serde(default)]
    required_features: Vec<String>,
    /// The vault.
    pub vault_id: VaultId,
}

const WHAT: &str = "reseal vault";

impl VaultFile {
    /// A vault of this version.
    pub fn new(vault_id: VaultId) -> VaultFile {
        VaultFile { what: WHAT.into(), format: FORMAT_VERSION, required_features: Vec::new(), vault_id }
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Parses, and refuses what this program can't read.
    pub fn decode(bytes: &[u8]) -> Result<VaultFile, FormatError> {
        /// What a file of any version has.
        #[derive(Deserialize)]
        struct Version {
            what: String,
            format: u16,
        }
        let malformed = FormatError::Malformed("not the JSON of a vault");
        let version: Version = serde_json::from_slice(bytes).map_err(|_| malformed.clone())?;
        if version.what != WHAT {
            return Err(malformed);
        }
        if version.format != FORMAT_VERSION {
            return Err(FormatError::Version { found: version.format });
        }
        let file: VaultFile = serde_json::from_slice(bytes).map_err(|_| malformed)?;
        match file.required_features.first() {
            Some(feature) => Err(FormatError::Feature(feature.chars().take(64).collect())),
            None => Ok(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_version_or_feature_is_refused() {
        let file = VaultFile::new(VaultId::from_bytes([1; 16]));
        assert_eq!(VaultFile::decode(&file.encode()), Ok(file.clone()));
        let later = VaultFile { format: 2, ..file.clone() };
        assert_eq!(VaultFile::decode(&later.encode()), Err(FormatError::Version { found: 2 }));
        let elsewise = br#"{"what": "reseal vault", "format": 2}"#;
        assert_eq!(VaultFile::decode(elsewise), Err(FormatError::Version { found: 2 }));
        let other = VaultFile { required_features: vec!["x".into()], ..file };
        assert_eq!(VaultFile::decode(&other.encode()), Err(FormatError::Feature("x".into())));
        assert!(VaultFile::decode(b"{}").is_err());
    }
}
