//! Lines for the administrator, on standard error. One that would be said again and again is counted instead.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long the same line is only counted.
const QUIET: Duration = Duration::from_secs(60);
/// Lines that are remembered: a vault with more kinds of damage than this may repeat itself.
const REMEMBERED: usize = 512;

struct Said {
    at: Instant,
    /// How often it was held back since.
    more: u64,
}

/// Where lines go.
pub struct Journal {
    said: Mutex<HashMap<String, Said>>,
    write: Box<dyn Fn(&str) + Send + Sync>,
}

impl Journal {
    /// Lines go to standard error.
    pub fn new() -> Journal {
        Journal::to(|line| eprintln!("reseal-mount: {line}"))
    }

    /// Lines go where `write` puts them.
    pub fn to(write: impl Fn(&str) + Send + Sync + 'static) -> Journal {
        Journal { said: Mutex::default(), write: Box::new(write) }
    }

    /// Says a line, unless the same was said a moment ago.
    pub fn say(&self, line: &str) {
        // Names come from vaults: none may drive the terminal or forge a line.
        let line: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        let now = Instant::now();
        let more = {
            let mut said = self.said.lock();
            if let Some(before) = said.get_mut(&line)
                && now.duration_since(before.at) < QUIET
            {
                before.more += 1;
                return;
            }
            if said.len() >= REMEMBERED {
                said.retain(|_, before| now.duration_since(before.at) < QUIET);
            }
            if said.len() >= REMEMBERED {
                said.clear();
            }
            said.insert(line.clone(), Said { at: now, more: 0 }).map_or(0, |before| before.more)
        };
        match more {
            0 => (self.write)(&line),
            more => (self.write)(&format!("{line} ({more} more times since it was last said)")),
        }
    }
}

impl Default for Journal {
    fn default() -> Journal {
        Journal::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_line_is_said_once_and_cannot_drive_the_terminal() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let journal = Journal::to({
            let lines = lines.clone();
            move |line| lines.lock().push(line.to_owned())
        });
        for _ in 0..3 {
            journal.say("bad\u{1b}[2J\nname");
            journal.say("other");
        }
        assert_eq!(*lines.lock(), ["bad\u{fffd}[2J\u{fffd}name", "other"]);
    }
}
