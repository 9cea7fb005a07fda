//! The one file that a source needs: where the target is, how it is known, and who this site is.
//!
//! ```toml
//! version = 1
//! address = "backup.example.com:7443"
//! server_name = "backup.example.com"   # of its certificate
//! server_ca = """-----BEGIN CERTIFICATE-----…"""
//! certificate = """-----BEGIN CERTIFICATE-----…"""
//! key = """-----BEGIN PRIVATE KEY-----…"""
//! tenant = "acme"
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::names::TenantName;
use reseal_kms::read_private;
use reseal_proto::wire::ALPN;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::RemoteError;
use crate::BackupError;
use crate::pem;

/// Longest enrolment file.
const MAX_FILE: u64 = 256 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    address: String,
    server_name: String,
    server_ca: String,
    certificate: String,
    key: Zeroizing<String>,
    tenant: TenantName,
}

/// A site's place at another, read and checked.
pub struct Enrolment {
    /// For messages.
    pub(crate) path: PathBuf,
    pub(crate) address: String,
    pub(crate) server: ServerName<'static>,
    pub(crate) tls: Arc<ClientConfig>,
    tenant: TenantName,
}

impl Enrolment {
    /// Reads the file, which nobody else may read.
    pub fn read(path: &Path) -> Result<Enrolment, BackupError> {
        let wrong = |what: String| RemoteError::Usage(format!("the enrolment file {}: {what}", path.display()));
        let text = read_private(path, MAX_FILE).map_err(|e| RemoteError::Usage(e.to_string()))?;
        let text = text.ok_or_else(|| wrong("there is no such file".into()))?;
        let text = std::str::from_utf8(&text).map_err(|_| wrong("it is not UTF-8".into()))?;
        // What the parser says would show the lines around, and with them the key.
        let file: File = toml::from_str(text).map_err(|e: toml::de::Error| wrong(e.message().to_owned()))?;
        if file.version != 1 {
            return Err(
                wrong(format!("it has version {}, this program reads 1; use a newer reseal", file.version)).into()
            );
        }
        let server = ServerName::try_from(file.server_name.clone());
        let server = server.map_err(|_| wrong(format!("{} can't be the name of a server", file.server_name)))?;
        let roots = pem::authorities(file.server_ca.as_bytes()).map_err(|e| wrong(format!("server_ca: {e}")))?;
        let identity = pem::identity(file.certificate.as_bytes(), file.key.as_bytes());
        let identity = identity.map_err(|e| wrong(format!("certificate and key: {e}")))?;
        let tls = ClientConfig::builder_with_provider(pem::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(format!("TLS can't be set up: {e}")))?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity)));
        let mut tls = tls;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // Each connection shows its certificate anew.
        tls.resumption = rustls::client::Resumption::disabled();
        let (path, address, tenant) = (path.to_owned(), file.address, file.tenant);
        Ok(Enrolment { path, address, server, tls: Arc::new(tls), tenant })
    }

    /// Whose restore points it makes.
    pub fn tenant(&self) -> &TenantName {
        &self.tenant
    }
}
