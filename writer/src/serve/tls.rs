//! Whose certificates are taken: those of one's own PKI, of the site's authority, or of both.

use std::sync::Arc;

use reseal_proto::wire::{ALPN, NBD_ALPN};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
};

use super::authority::Authority;
use crate::BackupError;
use reseal_site::pem;

type Verifier = Arc<dyn ClientCertVerifier>;

/// One's own PKI.
pub(super) struct Pki {
    identity: Arc<CertifiedKey>,
    verifier: Verifier,
}

fn verifier(roots: RootCertStore, revoked: Vec<CertificateRevocationListDer<'static>>) -> Result<Verifier, String> {
    // Where there are lists, each client's issuer has to have one. A list that is old is used all the same: whoever forgets to
    // renew it would otherwise have no backups.
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), pem::provider());
    builder.with_crls(revoked).only_check_end_entity_revocation().build().map_err(|e| e.to_string())
}

impl Pki {
    pub(super) fn new(
        identity: CertifiedKey,
        roots: RootCertStore,
        revoked: Vec<CertificateRevocationListDer<'static>>,
    ) -> Result<Pki, String> {
        Ok(Pki { identity: Arc::new(identity), verifier: verifier(roots, revoked)? })
    }

    pub(super) fn identity(&self) -> Arc<CertifiedKey> {
        self.identity.clone()
    }

    pub(super) fn verifier(&self) -> Verifier {
        self.verifier.clone()
    }
}

impl Authority {
    /// Takes what it has issued to clients.
    pub(super) fn verifier(&self) -> Result<Verifier, BackupError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate().clone()).map_err(|e| BackupError::Usage(format!("the site's authority: {e}")))?;
        verifier(roots, Vec::new()).map_err(BackupError::Usage)
    }
}

/// Takes what any of several takes: each knows its own revocation lists, and judges its own certificates only.
#[derive(Debug)]
struct AnyOf {
    verifiers: Vec<Verifier>,
    hints: Vec<DistinguishedName>,
}

impl AnyOf {
    /// All check signatures in the same way.
    fn first(&self) -> Result<&Verifier, Error> {
        self.verifiers.first().ok_or(Error::General("nobody's certificates are taken".into()))
    }
}

impl ClientCertVerifier for AnyOf {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let mut why = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        for verifier in &self.verifiers {
            match verifier.verify_client_cert(end_entity, intermediates, now) {
                Ok(verified) => return Ok(verified),
                // What the one that issued it says is what matters.
                Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {}
                Err(e) => why = e,
            }
        }
        Err(why)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first()?.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first()?.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifiers.first().map(|verifier| verifier.supported_verify_schemes()).unwrap_or_default()
    }
}

/// How the server talks: with that certificate, and to those whose certificates are taken.
pub(super) fn server_config(identity: Arc<CertifiedKey>, verifiers: Vec<Verifier>) -> Result<ServerConfig, String> {
    let hints = verifiers.iter().flat_map(|verifier| verifier.root_hint_subjects().iter().cloned()).collect();
    let mut tls = ServerConfig::builder_with_provider(pem::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| format!("TLS can't be set up: {e}"))?
        .with_client_cert_verifier(Arc::new(AnyOf { verifiers, hints }))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    tls.alpn_protocols = vec![ALPN.to_vec(), NBD_ALPN.to_vec()];
    // Each connection shows its certificate anew.
    tls.send_tls13_tickets = 0;
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(tls)
}
