//! TLS towards clients: who we are, and whom we let in.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;

use crate::NbdError;
use crate::tls::{authorities, certified};

/// Files in PEM form.
#[derive(Debug, Clone, Copy)]
pub struct ServerTls<'a> {
    /// The server's certificate and its chain.
    pub cert: &'a Path,
    /// Its private key.
    pub key: &'a Path,
    /// Only clients with a certificate of these authorities are let in; without, all are.
    pub client_ca: Option<&'a Path>,
}

impl ServerTls<'_> {
    /// Reads the files.
    pub fn config(&self) -> Result<Arc<ServerConfig>, NbdError> {
        let unusable = |e: &dyn std::fmt::Display| NbdError::Usage(format!("TLS can't be set up: {e}"));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| unusable(&e))?;
        let builder = match self.client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let roots = Arc::new(authorities(ca)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| unusable(&e))?)
            }
        };
        let identity: Arc<dyn ResolvesServerCert> = Arc::new(SingleCertAndKey::from(certified(self.cert, self.key)?));
        Ok(Arc::new(builder.with_cert_resolver(identity)))
    }
}
