//! Spans of time as people write them: `90s`, `30m`, `24h`, `7d`, `2w`.

use std::time::Duration;

/// Longest span: ten years. What is longer was typed wrong.
const LONGEST: u64 = 10 * 365 * 24 * 3600;

/// Parses a number with its unit.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        "" => return Err(format!("{text:?} has no unit; s, m, h, d and w are, as in 24h")),
        unit => return Err(format!("{unit} is no unit of time; s, m, h, d and w are")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?}: a number and a unit are expected, as in 24h"))?;
    let seconds = number.checked_mul(unit).filter(|seconds| (1..=LONGEST).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| format!("{text:?} is out of range: from 1s to ten years"))
}

/// The same for people, in the two largest units that say something.
pub fn show(span: Duration) -> String {
    let seconds = span.as_secs();
    let parts = [("d", seconds / 86_400), ("h", seconds / 3600 % 24), ("m", seconds / 60 % 60), ("s", seconds % 60)];
    let from = parts.iter().position(|(_, number)| *number > 0).unwrap_or(3);
    let shown = parts[from..].iter().take(2).filter(|(_, number)| *number > 0);
    let shown: Vec<_> = shown.map(|(unit, number)| format!("{number}{unit}")).collect();
    if shown.is_empty() { "0s".to_owned() } else { shown.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_unit_and_an_end() {
        assert_eq!(parse("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("24h"), parse("1d"));
        assert_eq!(parse("2w"), parse("14d"));
        for wrong in ["", "24", "h", "0s", "-1h", "1y", "1.5h", "99999999999999w", "600w", "1h30m", "١h"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn spans_read_well() {
        let shown = |seconds| show(Duration::from_secs(seconds));
        assert_eq!([0, 59, 60, 3_725, 86_400, 90_061].map(shown), ["0s", "59s", "1m", "1h 2m", "1d", "1d 1h"]);
    }
}
