//! What is stored: how a payload lies under a key of a KMIP server.
//!
//! Form 1, encrypted by the server:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | form, 1 |
//! | 1 | 1 | length n of the IV, 1 to 64 |
//! | 2 | n | IV, chosen by the server |
//! | 2 + n | 16 | tag |
//! | 18 + n | m | ciphertext of the byte 1 and the payload: some servers encrypt nothing if there is nothing |
//!
//! Form 2, encrypted here with the key that was fetched by Get:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | form, 2 |
//! | 1 | 12 | nonce, random (why that is enough: [`crate::seal`]) |
//! | 13 | n | ciphertext of the payload |
//! | 13 + n | 16 | tag |
//!
//! Both are AES-256-GCM. Associated data of both: label, key name, context.

use reseal_proto::kmip::Sealed;
use reseal_proto::kmip::request::TAG_LEN;
use reseal_proto::kmip::response::MAX_IV;
use zeroize::Zeroizing;

use crate::kms::MAX_PAYLOAD;
use crate::seal::{self, Label, NONCE_LEN};
use crate::{KeyBytes, KeyName, KmsError, Secret};

const BY_SERVER: u8 = 1;
const BY_CLIENT: u8 = 2;

/// The highest form that this program knows.
const KNOWN: u8 = BY_CLIENT;

/// What stands before the payload in what a server encrypts.
const LEAD: u8 = 1;

/// Wrapped bytes whose form was checked, before any key is asked for.
pub(super) enum Wrapped<'a> {
    /// To be opened by the server.
    ByServer(Sealed<'a>),
    /// To be opened here: nonce, ciphertext, tag.
    ByClient(&'a [u8]),
}

impl<'a> Wrapped<'a> {
    pub(super) fn parse(name: &KeyName, wrapped: &'a [u8]) -> Result<Self, KmsError> {
        let truncated = || KmsError::WrappedTruncated { key: name.to_string(), len: wrapped.len() };
        let too_long = || KmsError::WrappedTooLong { key: name.to_string(), len: wrapped.len() };
        let (&form, rest) = wrapped.split_first().ok_or_else(truncated)?;
        match form {
            BY_SERVER => {
                let (&iv_len, rest) = rest.split_first().ok_or_else(truncated)?;
                let iv_len = usize::from(iv_len);
                if iv_len == 0 || iv_len > MAX_IV {
                    return Err(truncated());
                }
                let (iv, rest) = rest.split_at_checked(iv_len).ok_or_else(truncated)?;
                let (tag, ciphertext) = rest.split_first_chunk::<TAG_LEN>().ok_or_else(truncated)?;
                match ciphertext.len() {
                    0 => Err(truncated()),
                    len if len > 1 + MAX_PAYLOAD => Err(too_long()),
                    _ => Ok(Self::ByServer(Sealed { iv, tag, ciphertext })),
                }
            }
            BY_CLIENT if rest.len() < NONCE_LEN + TAG_LEN => Err(truncated()),
            BY_CLIENT if rest.len() > NONCE_LEN + TAG_LEN + MAX_PAYLOAD => Err(too_long()),
            BY_CLIENT => Ok(Self::ByClient(rest)),
            found => Err(KmsError::WrappedVersion { key: name.to_string(), found, known: KNOWN }),
        }
    }
}

/// Form 1 of what a server answered.
pub(super) fn by_server(sealed: Sealed<'_>) -> Vec<u8> {
    // Longer ones are no answers.
    let iv_len = u8::try_from(sealed.iv.len()).unwrap_or(u8::MAX);
    [&[BY_SERVER, iv_len], sealed.iv, sealed.tag.as_slice(), sealed.ciphertext].concat()
}

/// Form 2 of a payload, under a key that was fetched.
pub(super) fn by_client(name: &KeyName, key: &KeyBytes, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
    let sealed = seal::seal(key, Label::WrappedPayload, &parts(name, context), payload)?;
    Ok([&[BY_CLIENT], sealed.as_slice()].concat())
}

/// The payload of form 2; none if anything differs.
pub(super) fn open_by_client(name: &KeyName, key: &KeyBytes, context: &[u8], sealed: &[u8]) -> Option<Secret> {
    seal::open(key, Label::WrappedPayload, &parts(name, context), sealed)
}

/// What a server authenticates along with the payload.
pub(super) fn additional(name: &KeyName, context: &[u8]) -> Vec<u8> {
    seal::associated(Label::WrappedPayload, &parts(name, context))
}

/// What a server encrypts.
pub(super) fn lead_in(payload: &[u8]) -> Secret {
    let mut plaintext = Zeroizing::new(Vec::with_capacity(1 + payload.len()));
    plaintext.push(LEAD);
    plaintext.extend_from_slice(payload);
    plaintext
}

/// The payload in what a server decrypted; none if that is not what [`lead_in`] made.
pub(super) fn lead_out(plaintext: &[u8]) -> Option<Secret> {
    match plaintext.split_first() {
        Some((&LEAD, payload)) if payload.len() <= MAX_PAYLOAD => Some(Zeroizing::new(payload.to_vec())),
        _ => None,
    }
}

fn parts<'a>(name: &'a KeyName, context: &'a [u8]) -> [&'a [u8]; 2] {
    [name.as_str().as_bytes(), context]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// What these bytes were made of. If a test with them fails, the stored form has changed: bump the form.
    const KEK: [u8; 32] = [7; 32];
    /// Made by another implementation of AES-GCM, with the nonce 00 01 02 … 0b.
    const FROZEN: &str = "02000102030405060708090a0b68e0901c7268bda09b2d33156b8753ccc7a2562b529c86";

    fn name() -> KeyName {
        KeyName::parse("acme-0a1b2c3d").unwrap()
    }

    #[test]
    fn the_form_of_the_server_is_frozen() {
        let sealed = Sealed { iv: &[0xA1; 12], tag: &[0xB2; TAG_LEN], ciphertext: &[0xC3; 3] };
        let bytes = by_server(sealed);
        let frozen = "010ca1a1a1a1a1a1a1a1a1a1a1a1b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2c3c3c3";
        assert_eq!(hex::encode(&bytes), frozen);
        let Wrapped::ByServer(read) = Wrapped::parse(&name(), &bytes).unwrap() else { panic!("another form") };
        assert_eq!((read.iv, read.tag, read.ciphertext), (sealed.iv, sealed.tag, sealed.ciphertext));
        assert_eq!(
            hex::encode(additional(&name(), b"ctx")),
            "1d0000000000000072657365616c206b6d732076312077726170706564207061796c6f6164\
             0d0000000000000061636d652d30613162326333640300000000000000637478"
        );
        assert_eq!(lead_in(b"xy").as_slice(), b"\x01xy");
        assert_eq!(lead_out(b"\x01xy").unwrap().as_slice(), b"xy");
        assert_eq!(lead_out(b"\x01").unwrap().as_slice(), b"");
        assert!(lead_out(b"").is_none() && lead_out(b"\x02xy").is_none());
    }

    #[test]
    fn the_form_of_the_client_is_frozen() {
        let frozen = hex::decode(FROZEN).unwrap();
        let Wrapped::ByClient(sealed) = Wrapped::parse(&name(), &frozen).unwrap() else { panic!("another form") };
        let key = KeyBytes::copy_from(&KEK);
        assert_eq!(open_by_client(&name(), &key, b"ctx", sealed).unwrap().as_slice(), b"payload");
        assert_eq!(by_client(&name(), &key, b"ctx", b"payload").unwrap().len(), frozen.len());
    }

    #[test]
    fn lengths_and_forms_are_checked() {
        let parse = |bytes: &[u8]| Wrapped::parse(&name(), bytes).map(drop).unwrap_err();
        let by_server = |iv: u8, rest: usize| [&[BY_SERVER, iv][..], &vec![0; rest]].concat();
        for short in
            [vec![], vec![BY_SERVER], by_server(0, 40), by_server(65, 200), by_server(12, 28), vec![BY_CLIENT; 28]]
        {
            assert!(matches!(parse(&short), KmsError::WrappedTruncated { .. }), "{short:?}");
        }
        for long in
            [by_server(12, 12 + TAG_LEN + MAX_PAYLOAD + 2), vec![BY_CLIENT; 1 + NONCE_LEN + TAG_LEN + MAX_PAYLOAD + 1]]
        {
            assert!(matches!(parse(&long), KmsError::WrappedTooLong { .. }), "{}", long.len());
        }
        for form in [0, 3, 255] {
            assert!(matches!(parse(&[form; 60]), KmsError::WrappedVersion { .. }));
        }
    }
}
