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
//! client = "site1"                     # this and what follows is for people, and may be missing
//! role = "append"
//! vms = ["*"]
//! issued = "2026-11-24T06:31:47.123Z"
//! expires = "2027-11-24T06:31:47.123Z"
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::names::TenantName;
use reseal_format::time::Timestamp;
use reseal_kms::read_private;
use reseal_proto::wire::ALPN;
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use toml::Spanned;
use zeroize::Zeroizing;

use crate::RemoteError;
use crate::certificate::Validity;
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
    certificate: Spanned<String>,
    key: Spanned<Zeroizing<String>>,
    tenant: TenantName,
    client: Option<String>,
    #[serde(rename = "role")]
    _role: Option<String>,
    #[serde(default, rename = "vms")]
    _vms: Vec<String>,
    issued: Option<Spanned<String>>,
    expires: Option<Spanned<String>>,
}

/// What a certificate is replaced with.
pub(crate) struct Replacement<'a> {
    pub certificate: &'a str,
    pub key: &'a str,
    pub validity: Validity,
}

/// A site's place at another, read and checked.
#[derive(Clone)]
pub struct Enrolment {
    /// For messages.
    pub(crate) path: PathBuf,
    pub(crate) address: String,
    server: ServerName<'static>,
    tls: Arc<ClientConfig>,
    tenant: TenantName,
    client: Option<String>,
    certificate: CertificateDer<'static>,
    validity: Validity,
}

impl Enrolment {
    /// Reads the file, which nobody else may read.
    pub fn read(path: &Path) -> Result<Enrolment, RemoteError> {
        let wrong = |what: String| RemoteError::Usage(format!("the enrolment file {}: {what}", path.display()));
        let (_, file) = read_file(path)?;
        let server = ServerName::try_from(file.server_name.clone());
        let server = server.map_err(|_| wrong(format!("{} can't be the name of a server", file.server_name)))?;
        let roots = pem::authorities(file.server_ca.as_bytes()).map_err(|e| wrong(format!("server_ca: {e}")))?;
        let identity = pem::identity(file.certificate.get_ref().as_bytes(), file.key.get_ref().as_bytes());
        let identity = identity.map_err(|e| wrong(format!("certificate and key: {e}")))?;
        let certificate = identity.cert.first().cloned().ok_or_else(|| wrong("it has no certificate".into()))?;
        let validity = Validity::of(&certificate).map_err(|e| wrong(format!("certificate: {e}")))?;
        let tls = ClientConfig::builder_with_provider(pem::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(format!("TLS can't be set up: {e}")))?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity)));
        let mut tls = tls;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // Each connection shows its certificate anew.
        tls.resumption = rustls::client::Resumption::disabled();
        let (path, address, tls) = (path.to_owned(), file.address, Arc::new(tls));
        let (tenant, client) = (file.tenant, file.client);
        Ok(Enrolment { path, address, server, tls, tenant, client, certificate, validity })
    }

    /// The file that it stands in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the other site is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The name that its certificate must have.
    pub fn server(&self) -> ServerName<'static> {
        self.server.clone()
    }

    /// What a connection is made with.
    pub fn tls(&self) -> Arc<ClientConfig> {
        self.tls.clone()
    }

    /// Whose restore points it makes.
    pub fn tenant(&self) -> &TenantName {
        &self.tenant
    }

    /// Its name at the target, where the file has it.
    pub fn client(&self) -> Option<&str> {
        self.client.as_deref()
    }

    /// How long its certificate is valid.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// The folder for what this machine keeps about the tenant at that site.
    pub fn folder(&self, state: &Path) -> PathBuf {
        // As a name of a folder, an address would need encoding.
        let digest = Sha256::digest(format!("{}\n{}", self.address, self.tenant));
        state.join("sites").join(hex::encode(&digest[..16]))
    }

    /// Whether the file has the same certificate.
    pub fn is_same(&self, other: &Enrolment) -> bool {
        self.certificate == other.certificate
    }

    /// The text of the file with another certificate and key; all else in it stays as it is, to the byte.
    pub(crate) fn with(&self, new: &Replacement<'_>) -> Result<Zeroizing<String>, RemoteError> {
        let (text, file) = read_file(&self.path)?;
        let time = |time: Timestamp| format!("\"{}\"", time.to_rfc3339());
        let long = |text: &str| Zeroizing::new(format!("\"\"\"\n{text}\"\"\""));
        let mut changes = vec![(file.certificate.span(), long(new.certificate)), (file.key.span(), long(new.key))];
        changes.extend(file.issued.map(|issued| (issued.span(), time(new.validity.issued).into())));
        changes.extend(file.expires.map(|expires| (expires.span(), time(new.validity.expires).into())));
        changes.sort_by_key(|(span, _)| span.start);
        // Room for all of it: a text that grows would leave pieces of the key behind.
        let room = text.len() + changes.iter().map(|(_, new)| new.len()).sum::<usize>();
        let mut result = Zeroizing::new(String::with_capacity(room));
        let mut at = 0;
        for (span, new) in changes {
            result.push_str(text.get(at..span.start).unwrap_or_default());
            result.push_str(&new);
            at = span.end;
        }
        result.push_str(text.get(at..).unwrap_or_default());
        Ok(result)
    }
}

/// Text and fields of a file, which nobody else may read.
fn read_file(path: &Path) -> Result<(Zeroizing<String>, File), RemoteError> {
    let wrong = |what: String| RemoteError::Usage(format!("the enrolment file {}: {what}", path.display()));
    let bytes = read_private(path, MAX_FILE).map_err(|e| RemoteError::Usage(e.to_string()))?;
    let bytes = bytes.ok_or_else(|| wrong("there is no such file".into()))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("it is not UTF-8".into()))?;
    // What the parser says would show the lines around, and with them the key.
    let file: File = toml::from_str(text).map_err(|e: toml::de::Error| wrong(e.message().to_owned()))?;
    match file.version {
        1 => Ok((Zeroizing::new(text.to_owned()), file)),
        other => Err(wrong(format!("it has version {other}, this program reads 1; use a newer reseal"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn identity() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (CertificateParams::default().self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn a_renewal_leaves_all_else_in_the_file_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("acme.reseal");
        let ((ca, _), (old, old_key), (new, new_key)) = (identity(), identity(), identity());
        let text = |certificate: &str, key: &str, year: u32| {
            format!(
                "# mine\nversion=1\nkey = \"\"\"\n{key}\"\"\" # where it is\naddress = 'backup:1'\n\n\nserver_name = \"backup\"\n\
                 expires = \"{year}-01-02T00:00:00.000Z\"\ncertificate = \"\"\"\n{certificate}\"\"\"\ntenant = \"\\u00e4\"\n\
                 server_ca = \"\"\"\n{ca}\"\"\"\n#end"
            )
        };
        std::fs::write(&path, text(&old, &old_key, 2026)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let enrolment = Enrolment::read(&path).unwrap();
        let expires = Timestamp::parse("2027-01-02T00:00:00.000Z").unwrap();
        let validity = Validity { issued: Timestamp(0), expires };
        let renewed = enrolment.with(&Replacement { certificate: &new, key: &new_key, validity }).unwrap();
        assert_eq!(*renewed, text(&new, &new_key, 2027));
        std::fs::write(&path, &*renewed).unwrap();
        assert!(!Enrolment::read(&path).unwrap().is_same(&enrolment));
        // What the file says wrong never shows the key.
        std::fs::write(&path, text(&new, &new_key, 2027).replace("version=1", "version=")).unwrap();
        let said = Enrolment::read(&path).err().unwrap().to_string();
        assert!(!said.contains(new_key.lines().nth(1).unwrap()) && said.contains("acme.reseal"), "{said}");
    }
}
