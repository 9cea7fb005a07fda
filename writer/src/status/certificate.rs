//! From when to when a certificate is valid.

use std::time::Duration;

use reseal_format::time::Timestamp;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::parse_x509_certificate;

/// How long before its end a certificate is worth a warning.
pub const WARN: Duration = Duration::from_secs(30 * 24 * 3600);

/// The end of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_after: Timestamp,
    /// Seconds until then; negative when it has passed.
    pub seconds_left: i64,
}

impl Validity {
    /// Of the first certificate of a text in PEM form.
    pub(super) fn of_pem(text: &str, now: Timestamp) -> Result<Validity, String> {
        let certificate = CertificateDer::from_pem_slice(text.as_bytes());
        let certificate = certificate.map_err(|e| format!("no certificate in PEM form: {e}"))?;
        let (_, parsed) = parse_x509_certificate(&certificate).map_err(|e| format!("no X.509 certificate: {e}"))?;
        let seconds = parsed.validity().not_after.timestamp();
        // A date far off is as good as the last one that prints.
        let not_after = Timestamp(seconds.saturating_mul(1000).clamp(0, Timestamp::LAST.0));
        Ok(Validity { not_after, seconds_left: (not_after.0 - now.0).div_euclid(1000) })
    }

    /// Whether it is time for another one.
    pub fn ends_soon(&self) -> bool {
        self.seconds_left < i64::try_from(WARN.as_secs()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_read() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2027, 3, 4);
        let pem = params.self_signed(&key).unwrap().pem();
        let validity = |now: &str| Validity::of_pem(&pem, Timestamp::parse(now).unwrap()).unwrap();
        let early = validity("2027-01-01T00:00:00.000Z");
        assert_eq!(early.not_after.to_rfc3339(), "2027-03-04T00:00:00.000Z");
        assert!(!early.ends_soon());
        assert!(validity("2027-02-10T00:00:00.000Z").ends_soon());
        assert_eq!(validity("2027-03-04T00:00:07.000Z").seconds_left, -7);
        assert!(Validity::of_pem("x", Timestamp(0)).is_err());
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(Validity::of_pem(garbage, Timestamp(0)).is_err());
    }
}
