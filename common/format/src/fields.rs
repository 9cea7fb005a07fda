//! Fields of a JSON object that this version does not know. Whoever replaces the object keeps them, byte for byte: a parser's
//! own numbers would damage some.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// The unknown fields of an object that is no secret.
pub(crate) type Unknown = BTreeMap<String, Text>;

/// A value as its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
        Ok(Text(Box::<RawValue>::deserialize(deserializer)?.get().to_owned()))
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

/// The fields of an object but for those that are known.
pub(crate) fn unknown(json: &[u8], known: &[&str]) -> serde_json::Result<Unknown> {
    let mut fields: Unknown = serde_json::from_slice(json)?;
    fields.retain(|name, _| !known.contains(&name.as_str()));
    Ok(fields)
}

/// The fields of an object that may be secret: they are not copied.
pub(crate) type Borrowed<'a> = BTreeMap<String, &'a RawValue>;
