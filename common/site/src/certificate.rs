//! How long a certificate is valid, and when it is time for another.

use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::time::Timestamp;
use serde::Serialize;

/// How long before its end a certificate that was not renewed is worth a warning, unless a third of its life is less.
const WARNING_MS: i64 = 30 * 86_400_000;

/// The time during which a certificate is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Validity {
    pub issued: Timestamp,
    pub expires: Timestamp,
}

impl Validity {
    /// Of a certificate in DER form.
    pub fn of(certificate: &[u8]) -> Result<Validity, String> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| "it is no X.509 certificate")?;
        let validity = parsed.validity();
        // A date far off is as good as the last one that prints.
        let time = |seconds: i64| Timestamp(seconds.saturating_mul(1000).clamp(0, Timestamp::LAST.0));
        let (issued, expires) = (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()));
        Ok(Validity { issued, expires })
    }

    fn third(&self) -> i64 {
        self.expires.0.saturating_sub(self.issued.0).max(0) / 3
    }

    /// Whether two thirds of its life are over.
    pub fn renewal_is_due(&self, now: Timestamp) -> bool {
        now.0 >= self.expires.0.saturating_sub(self.third())
    }

    /// Whether whoever looks after it should hear that it ends.
    pub fn is_ending(&self, now: Timestamp) -> bool {
        now.0 >= self.expires.0.saturating_sub(self.third().min(WARNING_MS))
    }

    /// Seconds until its end; negative when that has passed.
    pub fn seconds_left(&self, now: Timestamp) -> i64 {
        self.expires.0.saturating_sub(now.0).div_euclid(1000)
    }

    /// Whether it is over.
    pub fn is_over(&self, now: Timestamp) -> bool {
        now > self.expires
    }
}

/// This machine's time. A clock from before 1970 says 1970.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400_000;

    #[test]
    fn renewal_is_due_from_two_thirds_on_and_the_end_is_told_at_most_30_days_ahead() {
        let of = |days: i64| Validity { issued: Timestamp(0), expires: Timestamp(days * DAY) };
        let day = |day: i64| Timestamp(day * DAY);
        let year = of(366);
        assert!(!year.renewal_is_due(day(243)) && year.renewal_is_due(day(244)));
        assert!(!year.is_ending(day(335)) && year.is_ending(day(336)));
        assert!(!year.is_over(day(366)) && year.is_over(day(367)));
        // One that never has 30 days is not always worth a warning.
        let week = of(6);
        assert!(!week.is_ending(day(3)) && week.is_ending(day(4)) && week.renewal_is_due(day(4)));
        // One that ends before it begins is over, and nothing overflows.
        let odd = Validity { issued: Timestamp(i64::MAX), expires: Timestamp(i64::MIN) };
        assert!(odd.renewal_is_due(day(1)) && odd.is_ending(day(1)) && odd.is_over(day(1)));
    }

    #[test]
    fn what_is_no_certificate_has_no_validity() {
        assert!(Validity::of(b"").is_err() && Validity::of(&[0x30; 400]).is_err());
    }
}
