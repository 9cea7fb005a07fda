//! Printing for people and for programs.

use std::time::Duration;

use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
    pub verbose: bool,
}

impl Output {
    /// A line for people: to standard output, unless the output is JSON or quiet.
    pub fn say(&self, line: impl AsRef<str>) {
        if !self.json && !self.quiet {
            println!("{}", visible(line.as_ref()));
        }
    }

    /// Something that should be looked at: to standard error.
    pub fn warn(&self, line: impl AsRef<str>) {
        eprintln!("warning: {}", visible(line.as_ref()));
    }

    /// The one document of a command's JSON output, or one event of many.
    pub fn json(&self, value: &impl Serialize) {
        if self.json {
            println!("{}", serde_json::to_string(value).unwrap_or_default());
        }
    }
}

/// Names come from users, vaults and guests: none may drive the terminal.
fn visible(line: &str) -> String {
    line.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Bytes for people, in powers of 1,024.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A duration for people.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(human_duration(Duration::from_secs(3_725)), "1 h 2 min");
        assert_eq!(visible("a\x1b[2Jb"), "a\u{fffd}[2Jb");
    }
}
