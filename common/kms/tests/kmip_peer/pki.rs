//! A CA, a server and a client, with ECDSA keys: PyKMIP's list of ciphers has nothing else that rustls takes.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use reseal_kms::KmipConfig;
use tempfile::TempDir;

pub(crate) struct Pki {
    folder: TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut ca = CertificateParams::default();
        // A name of its own, as any two CAs have.
        ca.distinguished_name.push(DnType::CommonName, format!("CA of {}", folder.path().display()));
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.path().join("ca.pem"), ca.pem()).unwrap();
        let pki = Self { folder };
        pki.issue(&ca, "server", &["127.0.0.1", "localhost"], ExtendedKeyUsagePurpose::ServerAuth);
        pki.issue(&ca, "elsewhere", &["kms.example.com"], ExtendedKeyUsagePurpose::ServerAuth);
        pki.issue(&ca, "reseal", &[], ExtendedKeyUsagePurpose::ClientAuth);
        pki.issue(&ca, "somebody", &[], ExtendedKeyUsagePurpose::ClientAuth);
        pki
    }

    fn issue(&self, ca: &CertifiedIssuer<'_, KeyPair>, name: &str, hosts: &[&str], usage: ExtendedKeyUsagePurpose) {
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, ca).unwrap();
        fs::write(self.cert(name), certificate.pem()).unwrap();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.key(name)).unwrap();
        file.write_all(key.serialize_pem().as_bytes()).unwrap();
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    pub(crate) fn cert(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.pem"))
    }

    pub(crate) fn key(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.key"))
    }

    /// How reseal reaches the server at `port`.
    pub(crate) fn config(&self, port: u16, allow_get: bool) -> KmipConfig {
        KmipConfig {
            address: format!("127.0.0.1:{port}"),
            ca: self.ca(),
            cert: self.cert("reseal"),
            key: self.key("reseal"),
            allow_get,
            timeout: Duration::from_secs(30),
        }
    }
}
