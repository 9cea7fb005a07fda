//! Who vouches for the server, and who we are: certificates and the private key, read anew for each session.
//!
//! So a renewed certificate is used at once, and between operations no key is in memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, SignatureScheme};
use zeroize::Zeroizing;

use super::KmipConfig;
use crate::{KmsError, Secret, private_file};

/// Longest file with certificates: a bundle of all public CAs has a quarter of it.
const MAX_FILE: u64 = 1024 * 1024;

/// What a TLS connection needs.
pub(super) struct Credentials {
    /// For rustls.
    pub(super) tls: Arc<ClientConfig>,
    /// Whether the server asked who we are.
    shown: Arc<AtomicBool>,
}

impl Credentials {
    /// Reads the files and checks that they fit together.
    pub(super) fn load(config: &KmipConfig) -> Result<Self, KmsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&config.ca)? {
            roots
                .add(certificate)
                .map_err(|error| bad(&config.ca, format!("holds a CA that can't be used: {error}")))?;
        }
        let chain = certificates(&config.cert)?;
        let signer = aws_lc_rs::sign::any_supported_type(&*private_key(&config.key)?)
            .map_err(|_| bad(&config.key, "is a private key of a kind that TLS does not use".to_owned()))?;
        let certified = CertifiedKey::new(chain, signer);
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(_) => {
                let what = format!("does not belong to the certificate {}", config.cert.display());
                return Err(bad(&config.key, what));
            }
        }
        let shown = Arc::new(AtomicBool::new(false));
        let identity = Identity { certified: Arc::new(certified), shown: Arc::clone(&shown) };
        let mut tls = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| bad(&config.ca, format!("can't be used for TLS: {error}")))?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::new(identity));
        // Each session proves anew who both sides are.
        tls.resumption = Resumption::disabled();
        Ok(Self { tls: Arc::new(tls), shown })
    }

    /// Whether the server asked for our certificate, and it fitted what was asked.
    pub(super) fn were_shown(&self) -> bool {
        self.shown.load(Ordering::Relaxed)
    }
}

/// Our certificate, and whether anybody wanted it.
#[derive(Debug)]
struct Identity {
    certified: Arc<CertifiedKey>,
    shown: Arc<AtomicBool>,
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified.key.choose_scheme(schemes)?;
        self.shown.store(true, Ordering::Relaxed);
        Some(Arc::clone(&self.certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, KmsError> {
    let bytes = whole(path, private_file::read(path, MAX_FILE))?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(bad(path, "holds no certificate in PEM form".to_owned())),
    }
}

fn private_key(path: &Path) -> Result<Zeroizing<PrivateKeyDer<'static>>, KmsError> {
    let bytes = whole(path, private_file::read_private(path, MAX_FILE))?;
    // The parser's own words are left out: they may quote the file.
    let key = PrivateKeyDer::from_pem_slice(&bytes);
    key.map(Zeroizing::new)
        .map_err(|_| bad(path, "holds no private key in PEM form, not under a passphrase".to_owned()))
}

fn whole(path: &Path, read: Result<Option<Secret>, KmsError>) -> Result<Secret, KmsError> {
    match read {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(bad(path, "is not there".to_owned())),
        Err(KmsError::TooLarge { limit, .. }) => Err(bad(path, format!("is larger than {limit} bytes"))),
        Err(error) => Err(error),
    }
}

/// A file of the configuration that can't be used.
fn bad(path: &Path, what: String) -> KmsError {
    KmsError::Config { path: path.to_owned(), what }
}
