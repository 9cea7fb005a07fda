//! Printing for people and for programs.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
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
            print(&visible(line.as_ref()));
        }
    }

    /// Something that should be looked at: to standard error.
    pub fn warn(&self, line: impl AsRef<str>) {
        let _ = writeln!(std::io::stderr().lock(), "warning: {}", visible(line.as_ref()));
    }

    /// A line about what is wrong: to standard output with all else, or to standard error where only errors are printed.
    pub fn complain(&self, line: impl AsRef<str>) {
        match self.quiet && !self.json {
            true => drop(writeln!(std::io::stderr().lock(), "{}", visible(line.as_ref()))),
            false => self.say(line),
        }
    }

    /// The one document of a command's JSON output, or one event of many.
    pub fn json(&self, value: &impl Serialize) {
        if self.json {
            print(&serde_json::to_string(value).unwrap_or_default());
        }
    }
}

/// Whoever reads may have gone, or its disk be full: what was done is done all the same.
fn print(line: &str) {
    static SAID: AtomicBool = AtomicBool::new(false);
    match writeln!(std::io::stdout().lock(), "{line}") {
        Err(e) if e.kind() != ErrorKind::BrokenPipe && !SAID.swap(true, Ordering::Relaxed) => {
            let _ = writeln!(std::io::stderr().lock(), "warning: can't write to standard output: {e}");
        }
        _ => {}
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

/// A number of things for people. `what` is one of them, and takes an s where it is not one.
pub fn counted(count: impl Display, what: &str) -> String {
    let count = count.to_string();
    let plural = if count == "1" { "" } else { "s" };
    format!("{count} {what}{plural}")
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
        assert_eq!([0, 1, 2].map(|count| counted(count, "pack")), ["0 packs", "1 pack", "2 packs"]);
        assert_eq!(visible("a\x1b[2Jb"), "a\u{fffd}[2Jb");
    }
}
