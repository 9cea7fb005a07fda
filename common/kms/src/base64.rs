//! Base64, padded, with one spelling only: what secrets take on their way through JSON.

use base64ct::{Base64, Encoding};
use zeroize::Zeroizing;

use crate::Secret;

/// Text that is wiped when it is dropped.
pub(crate) type SecretText = Zeroizing<String>;

/// `bytes` as text, in one piece from the start.
pub(crate) fn encode(bytes: &[u8]) -> SecretText {
    Zeroizing::new(Base64::encode_string(bytes))
}

/// The bytes of `text`, none if it is not exactly what [`encode`] makes of them.
pub(crate) fn decode(text: &str) -> Option<Secret> {
    let mut bytes = Zeroizing::new(vec![0; text.len() / 4 * 3]);
    let len = Base64::decode(text, &mut bytes).ok()?.len();
    bytes.truncate(len);
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_come_back() {
        for len in 0..70 {
            let bytes: Vec<u8> = (0u8..len).map(|i| i.wrapping_mul(37)).collect();
            assert_eq!(*decode(&encode(&bytes)).unwrap(), bytes);
        }
    }

    #[test]
    fn each_value_has_one_spelling() {
        for bad in
            ["A", "AA", "AAA", "AA=", "AB==", "AAB=", "AAAA=", "AA==AA==", "AA\n==", " AAAA", "AAAA ", "AA-_", "===="]
        {
            assert!(decode(bad).is_none(), "{bad:?}");
        }
        assert_eq!(decode("").unwrap().len(), 0);
    }
}
