//! TLS towards a server: whom to trust, and who we are.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore};
use zeroize::{Zeroize, Zeroizing};

use crate::{NbdError, NbdUri};

/// Longest PEM file that is read: many certificates.
const MAX_FILE: u64 = 1 << 20;

/// Files in PEM form.
#[derive(Debug, Default, Clone)]
pub struct TlsFiles {
    /// The authorities that a server's certificate must come from.
    pub ca: Option<PathBuf>,
    /// Our certificate and its chain, where the server wants one.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
}

/// What a TLS session is made from.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) server: ServerName<'static>,
    /// Whether a server can ask who we are.
    pub(crate) has_certificate: bool,
}

impl Tls {
    /// What a URI needs; `None` without TLS, where no files are wanted.
    pub(crate) fn of(uri: &NbdUri, files: &TlsFiles) -> Result<Option<Tls>, NbdError> {
        if !uri.is_tls() {
            return Ok(None);
        }
        let Some(ca) = &files.ca else {
            return Err(NbdError::Usage(format!(
                "{uri} needs --tls-ca FILE with the certificate authority that its server's certificate comes from; the \
                 system's authorities are not used"
            )));
        };
        let name = uri.certificate_name();
        let server = ServerName::try_from(name.to_owned());
        let server =
            server.map_err(|_| NbdError::Usage(format!("{uri}: {name} can't be the name of a certificate")))?;
        let unusable = |e: rustls::Error| NbdError::Usage(format!("TLS can't be set up: {e}"));
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(authorities(ca)?);
        let (config, has_certificate) = match (&files.cert, &files.key) {
            (Some(cert), Some(key)) => {
                let identity: Arc<dyn ResolvesClientCert> = Arc::new(SingleCertAndKey::from(certified(cert, key)?));
                (config.with_client_cert_resolver(identity), true)
            }
            (None, None) => (config.with_no_client_auth(), false),
            _ => return Err(NbdError::Usage("--tls-cert and --tls-key belong together".into())),
        };
        Ok(Some(Tls { config: Arc::new(config), server, has_certificate }))
    }
}

pub(crate) fn authorities(path: &Path) -> Result<RootCertStore, NbdError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let added = roots.add(certificate);
        added.map_err(|e| NbdError::Usage(format!("{}: not the certificate of an authority: {e}", path.display())))?;
    }
    Ok(roots)
}

/// A certificate and the private key that belongs to it.
pub(crate) fn certified(cert: &Path, key: &Path) -> Result<CertifiedKey, NbdError> {
    let chain = certificates(cert)?;
    let text = read(key)?;
    let parsed = PrivateKeyDer::from_pem_slice(&text);
    let unusable =
        |e: &dyn std::fmt::Display| NbdError::Usage(format!("{}: no usable private key: {e}", key.display()));
    let mut parsed = parsed.map_err(|e| unusable(&e))?;
    let signing = aws_lc_rs::sign::any_supported_type(&parsed);
    parsed.zeroize();
    let certified = CertifiedKey::new(chain, signing.map_err(|e| unusable(&e))?);
    certified
        .keys_match()
        .map_err(|_| NbdError::Usage(format!("{} is not the private key of {}", key.display(), cert.display())))?;
    Ok(certified)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, NbdError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|e| NbdError::Usage(format!("{}: not a PEM file: {e}", path.display())))?;
    match found.is_empty() {
        true => Err(NbdError::Usage(format!("{} has no certificate in PEM form", path.display()))),
        false => Ok(found),
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, NbdError> {
    let failed = |e: std::io::Error| NbdError::Usage(format!("can't read {}: {e}", path.display()));
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    // All at once, so that no copy is left behind where the vector grew.
    let room = usize::try_from(length.min(MAX_FILE)).unwrap_or(0);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room + 1));
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(NbdError::Usage(format!("{} is too large for a PEM file", path.display()))),
        false => Ok(bytes),
    }
}
