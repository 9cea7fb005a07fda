//! The JSON of the few requests and answers.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error, Visitor};
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use super::http::Fault;
use crate::Secret;
use crate::base64::SecretText;

/// A request's object of texts, in one piece that is wiped. Room for it all is reserved, so that no part stays behind.
pub(super) fn to_json(fields: &[(&str, &str)]) -> Secret {
    let fields: BTreeMap<&str, &str> = fields.iter().copied().collect();
    let room: usize = fields.iter().map(|(name, value)| name.len() + 2 * value.len() + 8).sum();
    let mut json = Zeroizing::new(Vec::with_capacity(room + 2));
    // Writing text into memory does not fail.
    let _ = serde_json::to_writer(&mut *json, &fields);
    json
}

/// Parses an answer. What it says is not repeated in the error: it may hold a secret.
pub(super) fn parse<T: DeserializeOwned>(answer: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(answer).map_err(|error| {
        let what = if error.is_data() { "its JSON lacks a field" } else { "it is not JSON" };
        Fault::BadAnswer(format!("{what}, line {} column {}", error.line(), error.column()))
    })
}

/// What most answers are wrapped in.
#[derive(Deserialize)]
pub(super) struct Data<T> {
    pub(super) data: T,
    #[serde(default)]
    pub(super) warnings: Option<Vec<String>>,
}

/// A key as the server describes it. What it does not mention (older servers lack some) is not so.
#[derive(Deserialize)]
pub(super) struct KeyData {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) latest_version: u64,
    pub(super) min_decryption_version: u64,
    /// When each version that may still decrypt was made; of a key pair also its public half.
    pub(super) keys: BTreeMap<u64, serde_json::Value>,
    pub(super) exportable: bool,
    pub(super) allow_plaintext_backup: bool,
    pub(super) derived: bool,
    #[serde(default)]
    pub(super) convergent_encryption: bool,
    #[serde(default)]
    pub(super) soft_deleted: bool,
}

#[derive(Deserialize)]
pub(super) struct Encrypted {
    pub(super) ciphertext: String,
}

#[derive(Deserialize)]
pub(super) struct Decrypted {
    pub(super) plaintext: Hidden,
}

/// What a login or a renewal gives.
#[derive(Deserialize)]
pub(super) struct Granted {
    pub(super) auth: Auth,
}

#[derive(Deserialize)]
pub(super) struct Auth {
    #[serde(default)]
    pub(super) client_token: Option<Hidden>,
    pub(super) lease_duration: u64,
    pub(super) renewable: bool,
}

/// What a token may learn about itself.
#[derive(Deserialize)]
pub(super) struct Looked {
    /// 0 for a token that never ends.
    #[serde(default)]
    pub(super) ttl: u64,
    #[serde(default)]
    pub(super) renewable: bool,
}

/// Text that is copied once, from where it lies into what is wiped.
pub(super) struct Hidden(pub(super) SecretText);

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Copy;

        impl Visitor<'_> for Copy {
            type Value = Hidden;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Hidden, E> {
                Ok(Hidden(Zeroizing::new(text.to_owned())))
            }
        }

        deserializer.deserialize_str(Copy)
    }
}
