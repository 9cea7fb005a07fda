//! The site's own authority: it issues the certificates of its clients, and that of its server.
//!
//! ```text
//! FOLDER/authority.pem     key and certificate, mode 0600
//! FOLDER/clients/          who was enrolled (registry)
//! ```
//!
//! Its word alone lets nobody in: a client's certificate has to be in the registry as well.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SerialNumber,
};
use reseal_format::names::ClientName;
use reseal_format::time::Timestamp;
use reseal_kms::private_file::{beside, make_parents, read_private, write_new};
use reseal_vault::{VaultError, random};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use super::registry::Certificate;
use crate::BackupError;
use reseal_site::certificate::Validity;
use reseal_site::pem;

const NAME: &str = "authority.pem";
const MAX_FILE: u64 = 64 << 10;
const DAY: Duration = Duration::from_secs(86_400);
/// Clocks of two sites differ: what is issued is valid since a while ago.
const BEFORE: Duration = Duration::from_secs(3600);
/// The authority outlives what anybody keeps; every client has its certificate in its enrolment file.
const AUTHORITY_DAYS: u32 = 30 * 365;
/// Of the server's certificate, whose key is in memory only.
const SERVER_DAYS: u32 = 90;
/// Year 9000, in milliseconds: dates of certificates end with the year 9999.
const LATEST: i64 = 221_845_392_000_000;
/// An uncompressed point of P-256.
const POINT: usize = 65;

/// What is issued to a client or server.
pub(super) struct Issued {
    pub der: CertificateDer<'static>,
    pub pem: String,
    /// As the registry has it.
    pub certificate: Certificate,
}

/// The site's authority.
pub(super) struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn path(folder: &Path) -> PathBuf {
    folder.join(NAME)
}

fn failed(what: &str, e: &rcgen::Error) -> BackupError {
    BackupError::Usage(format!("can't make {what}: {e}"))
}

/// What all certificates have in common.
fn params(name: &str, days: u32, now: Timestamp) -> Result<CertificateParams, BackupError> {
    if now.0 > LATEST {
        return Err(BackupError::Usage("this machine's clock is past the year 9000; set it".into()));
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let since = Duration::from_millis(u64::try_from(now.0).unwrap_or(0));
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since.saturating_sub(BEFORE);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since + DAY * days;
    let mut serial: [u8; 16] = random()?;
    // A positive number of 16 bytes.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

impl Authority {
    /// The one of a folder, if there is one.
    pub(super) fn open(folder: &Path) -> Result<Option<Authority>, BackupError> {
        let path = path(folder);
        let Some(text) = read_private(&path, MAX_FILE).map_err(VaultError::from)? else { return Ok(None) };
        let wrong = |what: String| {
            BackupError::Usage(format!(
                "the authority {}: {what}; put the file back from a copy. Without it every client has to be enrolled again",
                path.display()
            ))
        };
        let identity = pem::identity(&text, &text).map_err(wrong)?;
        let certificate = identity.cert.first().cloned().ok_or_else(|| wrong("there is no certificate".into()))?;
        let mut key = PrivateKeyDer::from_pem_slice(&text).map_err(|_| wrong("there is no private key".into()))?;
        let pair = KeyPair::try_from(&key);
        key.zeroize();
        let pair = pair.map_err(|_| wrong("the private key is of no kind that is supported".into()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, pair).map_err(|e| wrong(e.to_string()))?;
        let pem = pem::certificate(&certificate);
        Ok(Some(Authority { certificate, pem, issuer }))
    }

    /// The same, made if there is none.
    pub(super) fn open_or_make(folder: &Path, now: Timestamp) -> Result<Authority, BackupError> {
        if let Some(authority) = Authority::open(folder)? {
            return Ok(authority);
        }
        let path = path(folder);
        make_parents(&path).map_err(VaultError::from)?;
        let staged = beside(&path, &format!(".new-{}", hex::encode(random::<8>()?)));
        // One who makes it at the same moment is as good.
        write_new(&path, &staged, Authority::make(now)?.as_bytes()).map_err(VaultError::from)?;
        let gone = || BackupError::Usage(format!("the authority {} is gone", path.display()));
        Authority::open(folder)?.ok_or_else(gone)
    }

    /// Key and certificate of a new one.
    fn make(now: Timestamp) -> Result<Zeroizing<String>, BackupError> {
        let what = "an authority";
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| failed(what, &e))?;
        let mut params = params(&format!("reseal site {}", hex::encode(random::<8>()?)), AUTHORITY_DAYS, now)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&pair).map_err(|e| failed(what, &e))?;
        let key = Zeroizing::new(pair.serialize_pem());
        Ok(Zeroizing::new(format!("{}{}", *key, certificate.pem())))
    }

    /// Its certificate, in PEM form: what a client is to trust.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
        usage: ExtendedKeyUsagePurpose,
        now: Timestamp,
    ) -> Result<Issued, BackupError> {
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let serial = params.serial_number.as_ref().map(|serial| hex::encode(serial.to_bytes())).unwrap_or_default();
        let signed = params.signed_by(key, &self.issuer).map_err(|e| failed("a certificate", &e))?;
        let der = signed.der().clone();
        let expires = Validity::of(&der).map_err(BackupError::Usage)?.expires;
        let sha256 = Sha256::digest(&der).into();
        let certificate = Certificate { sha256, serial, issued: now, expires, superseded: None };
        Ok(Issued { pem: signed.pem(), der, certificate })
    }

    /// A certificate of a client for so many days, of that key.
    fn client(
        &self,
        name: &ClientName,
        key: &impl PublicKeyData,
        days: u32,
        now: Timestamp,
    ) -> Result<Issued, BackupError> {
        self.issue(params(name.as_str(), days, now)?, key, ExtendedKeyUsagePurpose::ClientAuth, now)
    }

    /// A new key with a certificate of a client, and the key in PEM form.
    pub(super) fn enrol(
        &self,
        name: &ClientName,
        days: u32,
        now: Timestamp,
    ) -> Result<(Issued, Zeroizing<String>), BackupError> {
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| failed("a key", &e))?;
        let issued = self.client(name, &pair, days, now);
        let key = Zeroizing::new(pair.serialize_pem());
        pair.zeroize();
        Ok((issued?, key))
    }

    /// A certificate for a client that has shown, by signing a request, that it has the key. Nothing else of the request
    /// counts. The text says what is wrong with it.
    pub(super) fn renew(
        &self,
        request: &[u8],
        name: &ClientName,
        days: u32,
        now: Timestamp,
    ) -> Result<Result<Issued, String>, BackupError> {
        let Ok(request) = CertificateSigningRequestParams::from_der(&request.into()) else {
            return Ok(Err("the request for a certificate is malformed, or was not signed with its key".into()));
        };
        let key = request.public_key;
        // A signature of this kind may be of another curve.
        if *key.algorithm() != PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != POINT {
            return Ok(Err("the request for a certificate has a key of another kind than ECDSA P-256".into()));
        }
        self.client(name, &key, days, now).map(Ok)
    }

    /// A new key with a certificate of the server, and when it is time for another.
    pub(super) fn server(&self, host: &str, now: Timestamp) -> Result<(CertifiedKey, Timestamp), BackupError> {
        let what = "the server's certificate";
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| failed(what, &e))?;
        let mut params = params(host, SERVER_DAYS, now)?;
        params.subject_alt_names =
            CertificateParams::new(vec![host.to_owned()]).map_err(|e| failed(what, &e))?.subject_alt_names;
        let issued = self.issue(params, &pair, ExtendedKeyUsagePurpose::ServerAuth, now)?;
        let key = Zeroizing::new(pair.serialize_pem());
        pair.zeroize();
        let identity = pem::identity(issued.pem.as_bytes(), key.as_bytes()).map_err(BackupError::Usage)?;
        let due = DAY * SERVER_DAYS / 3 * 2;
        Ok((identity, Timestamp(now.0.saturating_add(i64::try_from(due.as_millis()).unwrap_or(i64::MAX)))))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::server::WebPkiClientVerifier;

    use super::*;
    use reseal_site::certificate::now;

    fn name() -> ClientName {
        ClientName::new("site1").unwrap()
    }

    /// Whether a certificate is taken from a client, or from a server of that name.
    fn is_taken(authority: &Authority, of: &CertificateDer<'_>, server: Option<&str>, at: Timestamp) -> bool {
        let roots = std::sync::Arc::new(pem::authorities(authority.pem().as_bytes()).unwrap());
        let at = UnixTime::since_unix_epoch(Duration::from_millis(at.0.try_into().unwrap()));
        match server {
            Some(name) => {
                let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(roots, pem::provider())
                    .build()
                    .unwrap();
                let name = ServerName::try_from(name.to_owned()).unwrap();
                use rustls::client::danger::ServerCertVerifier as _;
                verifier.verify_server_cert(of, &[], &name, &[], at).is_ok()
            }
            None => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, pem::provider()).build().unwrap();
                verifier.verify_client_cert(of, &[], at).is_ok()
            }
        }
    }

    #[test]
    fn it_is_made_once_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("a/authority");
        assert!(Authority::open(&at).unwrap().is_none());
        let first = Authority::open_or_make(&at, now()).unwrap();
        let second = Authority::open_or_make(&at, now()).unwrap();
        assert_eq!(first.pem(), second.pem());
        assert_eq!(std::fs::metadata(path(&at)).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(path(&at), std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Authority::open(&at).is_err_and(|e| e.to_string().contains("chmod")));
    }

    #[test]
    fn certificates_serve_for_one_thing_a_while_and_under_their_authority() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, other) = (folder.path().join("a"), folder.path().join("b"));
        let now = now();
        let (ours, other) =
            (Authority::open_or_make(&ours, now).unwrap(), Authority::open_or_make(&other, now).unwrap());
        let days = |days: i64| Timestamp(now.0 + days * 86_400_000);
        let (client, key) = ours.enrol(&name(), 10, now).unwrap();
        assert!(key.contains("PRIVATE KEY") && client.certificate.serial.len() == 32);
        assert!(is_taken(&ours, &client.der, None, now) && is_taken(&ours, &client.der, None, days(9)));
        assert!(is_taken(&ours, &client.der, None, Timestamp(now.0 - 1_800_000)), "clocks differ");
        assert!(!is_taken(&ours, &client.der, None, days(11)) && !is_taken(&ours, &client.der, None, days(-1)));
        assert!(!is_taken(&other, &client.der, None, now));
        assert!(!is_taken(&ours, &client.der, Some("site1"), now), "a client is no server");
        for host in ["backup.example.com", "192.0.2.7", "2001:db8::7"] {
            let (server, due) = ours.server(host, now).unwrap();
            let of = &server.cert[0];
            assert!(is_taken(&ours, of, Some(host), now) && !is_taken(&ours, of, Some("elsewhere.example.com"), now));
            assert!(!is_taken(&ours, of, None, now), "a server is no client");
            assert_eq!(due, days(60));
        }
        // The authority itself is nobody's certificate, and no client can issue one.
        assert!(!is_taken(&ours, ours.certificate(), None, now));
    }

    #[test]
    fn a_request_counts_only_with_its_signature_and_only_its_key_counts() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_make(folder.path(), now()).unwrap();
        let renew = |request: &[u8]| authority.renew(request, &name(), 10, now()).unwrap();
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut wish = CertificateParams::new(vec!["elsewhere.example.com".into()]).unwrap();
        wish.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        wish.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let request = wish.serialize_request(&pair).unwrap().der().to_vec();
        let issued = renew(&request).unwrap_or_else(|e| panic!("{e}"));
        assert!(is_taken(&authority, &issued.der, None, now()));
        assert!(!is_taken(&authority, &issued.der, Some("elsewhere.example.com"), now()));
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.der).unwrap();
        assert!(!parsed.is_ca() && parsed.subject_alternative_name().unwrap().is_none());
        // Any bit of it that is changed, but for those that say how the signature is written down.
        let key = parsed.public_key().raw;
        for at in 0..request.len() {
            let mut changed = request.clone();
            changed[at] ^= 1;
            let Ok(issued) = renew(&changed) else { continue };
            let (_, parsed) = x509_parser::parse_x509_certificate(&issued.der).unwrap();
            assert!(parsed.public_key().raw == key && !parsed.is_ca(), "byte {at} makes another certificate");
        }
        assert!(renew(&[]).is_err() && renew(&[0x30; 2048]).is_err());
        for curve in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let pair = KeyPair::generate_for(curve).unwrap();
            let request = CertificateParams::default().serialize_request(&pair).unwrap();
            assert!(renew(request.der()).is_err_and(|e| e.contains("another kind")));
        }
    }
}
