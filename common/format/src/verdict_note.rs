//! What became of a boot that was tried, as a note about the restore point that was booted.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::FormatError;
use crate::dated_note::DatedKind;
use crate::manifest::{MAX_TEXT, Note, clipped};

/// Longest text that a console is waited for to show, in bytes.
pub const MAX_PATTERN: usize = 256;
/// Longest name and version of the program, in bytes.
const MAX_PROGRAM: usize = 128;

/// What a guest has to do before it counts as booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expectation {
    /// Its console shows this text.
    Console(String),
    /// Its guest agent answers.
    Agent,
    /// It takes a connection at this TCP port.
    Tcp(u16),
}

/// As `--expect` takes it.
impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expectation::Console(text) => write!(f, "console:{text}"),
            Expectation::Agent => f.write_str("agent"),
            Expectation::Tcp(port) => write!(f, "tcp:{port}"),
        }
    }
}

impl FromStr for Expectation {
    type Err = String;

    fn from_str(text: &str) -> Result<Expectation, String> {
        match text.split_once(':') {
            None if text == "agent" => Ok(Expectation::Agent),
            Some(("tcp", port)) => match port.parse() {
                Ok(port) if port > 0 => Ok(Expectation::Tcp(port)),
                _ => Err("tcp: needs a port from 1 to 65535, such as tcp:22".into()),
            },
            Some(("console", "")) => Err("console: needs a text, such as console:login:".into()),
            Some(("console", text)) if text.len() > MAX_PATTERN => {
                Err(format!("console: takes a text of at most {MAX_PATTERN} bytes"))
            }
            Some(("console", text)) if text.chars().any(char::is_control) => {
                Err("console: takes a text of one line, without control characters".into())
            }
            Some(("console", text)) => Ok(Expectation::Console(text.to_owned())),
            _ => Err("it is console:TEXT, agent, or tcp:PORT".into()),
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootVerdict {
    pub passed: bool,
    pub expected: Expectation,
    /// How long it took until then, or until it was given up.
    pub took_ms: u64,
    /// Why it failed; in this program's words, never the guest's.
    pub reason: Option<String>,
    /// Name and version of the program that tried it.
    pub program: String,
}

/// The content of the note.
#[derive(Serialize, Deserialize)]
struct Content {
    passed: bool,
    expected: String,
    took_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default)]
    program: String,
}

impl BootVerdict {
    /// The content of such a note.
    pub fn content(&self) -> Value {
        let content = Content {
            passed: self.passed,
            expected: self.expected.to_string(),
            took_ms: self.took_ms,
            reason: self.reason.as_deref().map(|reason| clipped(reason, MAX_TEXT)),
            program: clipped(&self.program, MAX_PROGRAM),
        };
        serde_json::to_value(content).expect("text and numbers always serialize")
    }

    /// What a note says.
    pub fn of(note: &Note) -> Result<BootVerdict, FormatError> {
        DatedKind::BootVerdict.check(note)?;
        let malformed = FormatError::Malformed("it holds no verdict of a boot");
        let Ok(content) = Content::deserialize(&note.content) else { return Err(malformed) };
        let is_long = content.reason.as_ref().is_some_and(|reason| reason.len() > MAX_TEXT);
        if is_long || content.program.len() > MAX_PROGRAM {
            return Err(malformed);
        }
        Ok(BootVerdict {
            passed: content.passed,
            expected: content.expected.parse().map_err(|_| malformed)?,
            took_ms: content.took_ms,
            reason: content.reason,
            program: content.program,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ids::{PointId, VmId};
    use crate::names::VmName;
    use crate::time::Timestamp;

    fn note(content: Value) -> Note {
        let created = Timestamp(1_795_501_907_123);
        Note {
            note_id: DatedKind::BootVerdict.id(created, [1; 6]),
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([2; 16]),
            number: 3,
            point_id: PointId::from_bytes([4; 16]),
            created,
            kind: "boot-verdict".into(),
            content,
        }
    }

    fn verdict() -> BootVerdict {
        BootVerdict {
            passed: false,
            expected: Expectation::Console("login:".into()),
            took_ms: 300_000,
            reason: Some("it was given up".into()),
            program: "reseal 0.1.0".into(),
        }
    }

    #[test]
    fn a_verdict_comes_back_and_one_that_is_too_long_is_cut() {
        let verdict = verdict();
        let content = verdict.content();
        assert_eq!(
            content,
            json!({ "passed": false, "expected": "console:login:", "took_ms": 300_000, "reason": "it was given up",
                    "program": "reseal 0.1.0" })
        );
        assert_eq!(BootVerdict::of(&note(content)), Ok(verdict.clone()));
        let long = BootVerdict { reason: Some("ä".repeat(MAX_TEXT)), program: "x".repeat(1000), ..verdict };
        let back = BootVerdict::of(&note(long.content())).unwrap();
        assert_eq!((back.reason.unwrap().len(), back.program.len()), (MAX_TEXT, MAX_PROGRAM));
    }

    #[test]
    fn what_is_no_verdict_is_refused() {
        let refused = |note: &Note| assert!(BootVerdict::of(note).is_err(), "{:?}", note.content);
        for (field, value) in [
            ("passed", json!("yes")),
            ("expected", json!("tcp:0")),
            ("expected", json!(format!("console:{}", "x".repeat(MAX_PATTERN + 1)))),
            ("took_ms", json!(-1)),
            ("reason", json!("x".repeat(MAX_TEXT + 1))),
            ("program", json!("x".repeat(MAX_PROGRAM + 1))),
        ] {
            let mut content = verdict().content();
            content[field] = value;
            refused(&note(content));
        }
        refused(&note(json!([])));
        let mut other = note(verdict().content());
        other.kind = "overlay".into();
        refused(&other);
        let mut later = note(verdict().content());
        later.created = Timestamp(later.created.0 + 1);
        refused(&later);
    }

    #[test]
    fn expectations_are_written_as_they_are_read() {
        for text in ["console:login:", "console:a: b", "agent", "tcp:22"] {
            assert_eq!(text.parse::<Expectation>().map(|e| e.to_string()), Ok(text.into()));
        }
        for bad in
            ["", "login:", "console:", "console:a\u{1b}b", "tcp:", "tcp:0", "tcp:65536", "tcp:-1", "agent:", "Agent"]
        {
            assert!(bad.parse::<Expectation>().is_err(), "{bad}");
        }
    }
}
