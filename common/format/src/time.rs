//! The moment of a restore point: milliseconds since 1970, UTC. No clock is read here.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

/// Last moment that prints: 9999-12-30, in milliseconds.
const LAST: i64 = 253_402_200_000_000;

impl Timestamp {
    /// The last moment that prints.
    pub const LAST: Timestamp = Timestamp(LAST);

    /// Whether it lies between 1970 and 9999, so that it prints in 24 characters.
    pub fn is_sane(self) -> bool {
        (0..=LAST).contains(&self.0)
    }

    /// The same moment as RFC 3339 writes it: `2026-11-24T06:31:47.123Z`.
    pub fn to_rfc3339(self) -> String {
        let text = self.to_string();
        match text.split_once('T') {
            Some((date, time)) => format!("{date}T{}", time.replace('-', ":")),
            None => text,
        }
    }

    /// Parses what [`fmt::Display`] prints, also with colons instead of dashes in the time.
    pub fn parse(text: &str) -> Option<Timestamp> {
        let (date, time) = text.split_once('T')?;
        let time = time.replace('-', ":");
        let parsed: jiff::Timestamp = format!("{date}T{time}").parse().ok()?;
        Some(Timestamp(parsed.as_millisecond())).filter(|t| t.is_sane())
    }
}

/// `2026-11-24T06-31-47.123Z`: also a file name everywhere, and sorts by time.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clamped = self.0.clamp(0, LAST);
        let time = jiff::Timestamp::from_millisecond(clamped).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        write!(f, "{}", time.strftime("%Y-%m-%dT%H-%M-%S.%3fZ"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses() {
        let time = Timestamp(1_795_501_907_123);
        assert_eq!(time.to_string(), "2026-11-24T06-31-47.123Z");
        assert_eq!(Timestamp::parse("2026-11-24T06-31-47.123Z"), Some(time));
        assert_eq!(Timestamp::parse("2026-11-24T06:31:47.123Z"), Some(time));
        assert_eq!(Timestamp::parse("yesterday"), None);
        assert_eq!(Timestamp(i64::MAX).to_string().len(), 24);
    }
}
