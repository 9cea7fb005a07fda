//! A new certificate for the one that ends before long.

use super::fields::{Fields, Out, length32};
use super::{MAX_CERTIFICATE, MAX_REQUEST, MAX_TEXT, Violation};

/// Asks for a certificate of a new key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renew {
    /// PKCS#10, in DER form: of it the key counts, and that its owner signed.
    pub request: Vec<u8>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewed {
    /// Not now. The text says why.
    Refused(String),
    /// The certificate, in DER form. The one before stays valid until this one was used.
    Issued(Vec<u8>),
    /// The certificate is of somebody else's authority, who renews it.
    Elsewhere,
}

impl Renew {
    pub(super) fn put(&self, out: &mut Out) {
        out.u32(length32(self.request.len())).bytes(&self.request);
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Renew, Violation> {
        let length = fields.count("a request for a certificate", MAX_REQUEST)?;
        Ok(Renew { request: fields.bytes(length)?.to_vec() })
    }
}

impl Renewed {
    pub(super) fn put(&self, out: &mut Out) {
        match self {
            Renewed::Refused(why) => out.u8(0).line(why, MAX_TEXT),
            Renewed::Issued(certificate) => out.u8(1).u32(length32(certificate.len())).bytes(certificate),
            Renewed::Elsewhere => out.u8(2),
        };
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Renewed, Violation> {
        match fields.u8()? {
            0 => Ok(Renewed::Refused(fields.line("a reason", MAX_TEXT)?)),
            1 => {
                let length = fields.count("a certificate", MAX_CERTIFICATE)?;
                Ok(Renewed::Issued(fields.bytes(length)?.to_vec()))
            }
            2 => Ok(Renewed::Elsewhere),
            value => Err(Violation::Value { what: "the answer to a request for a certificate", value: value.into() }),
        }
    }
}
