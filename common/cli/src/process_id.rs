//! Whether a process is still the one it was.

use std::io;

use serde::{Deserialize, Serialize};

/// A process: numbers are used again, so its start belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks between boot and its start.
    pub start: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: u32) -> io::Result<ProcessId> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, start) = parse(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(ProcessId { pid, start })
    }

    /// Whether it still runs. One that has ended and that its parent has not looked at does not.
    pub fn is_alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        parse(&stat).is_some_and(|(state, start)| start == self.start && !matches!(state, "Z" | "X"))
    }
}

/// State and start of a process. Its name, in parentheses, may hold anything; the state is the first field after it,
/// the start the 20th (proc(5): fields 3 and 22).
fn parse(stat: &str) -> Option<(&str, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    Some((fields.next()?, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_another_with_its_number() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.is_alive());
        assert!(!ProcessId { start: own.start + 1, ..own }.is_alive());
        assert!(!ProcessId { pid: u32::MAX, start: 0 }.is_alive());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let child_id = ProcessId::of(child.id()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!child_id.is_alive(), "ended, though nobody has waited for it");
        child.wait().unwrap();
    }
}
