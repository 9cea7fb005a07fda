//! Certificates and keys in PEM form, for both ends of a connection between sites.

use std::sync::Arc;

use base64ct::{Base64, Encoding};
use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroize;

/// The cryptography of all connections.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// All certificates of a text.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let found = found.map_err(|e| format!("not in PEM form: {e}"))?;
    if found.is_empty() { Err("there is no certificate in PEM form".into()) } else { Ok(found) }
}

/// Authorities that are trusted.
pub fn authorities(text: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(text)? {
        roots.add(certificate).map_err(|e| format!("not the certificate of an authority: {e}"))?;
    }
    Ok(roots)
}

/// A certificate in PEM form.
pub fn certificate(der: &[u8]) -> String {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in Base64::encode_string(der).as_bytes().chunks(64) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text + "-----END CERTIFICATE-----\n"
}

/// Lists of certificates that were revoked.
pub fn revocations(text: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(text).collect();
    let found = found.map_err(|e| format!("not in PEM form: {e}"))?;
    if found.is_empty() { Err("there is no revocation list in PEM form".into()) } else { Ok(found) }
}

/// A certificate with its chain, and its private key.
pub fn identity(chain: &[u8], key: &[u8]) -> Result<CertifiedKey, String> {
    let chain = certificates(chain)?;
    let mut parsed = PrivateKeyDer::from_pem_slice(key).map_err(|_| "no private key in PEM form".to_owned())?;
    let signing = aws_lc_rs::sign::any_supported_type(&parsed);
    parsed.zeroize();
    let signing = signing.map_err(|_| "the private key is of no kind that is supported".to_owned())?;
    let certified = CertifiedKey::new(chain, signing);
    certified.keys_match().map_err(|_| "the private key is not that of the certificate".to_owned())?;
    Ok(certified)
}
