//! The guest agent: it freezes and thaws the guest's file systems.

use std::path::Path;
use std::time::{Duration, Instant};

use reseal_proto::qmp::{Message, SENTINEL};
use serde_json::{Value, json};

use super::QemuError;
use super::qmp::Line;

/// A connection to the guest agent, in step with it.
pub(crate) struct Agent {
    line: Line,
}

impl Agent {
    /// Connects and waits until the agent answers. Before it has, nothing is asked of it that it might do later.
    pub(crate) fn connect(socket: &Path, deadline: Instant) -> Result<Agent, QemuError> {
        Agent::in_step(socket, deadline).map_err(|e| match e {
            QemuError::Silent { socket, .. } => QemuError::Unusable(format!(
                "the guest agent behind {socket} did not answer in time; is it installed and running in the guest?"
            )),
            other => other,
        })
    }

    fn in_step(socket: &Path, deadline: Instant) -> Result<Agent, QemuError> {
        let mut line = Line::connect(socket, deadline)?;
        let token = getrandom::u32().map_err(QemuError::random)?;
        let token = u64::from(token);
        line.send(&[SENTINEL], "a sign of life", deadline)?;
        line.ask("guest-sync-delimited", Some(&json!({ "id": token })), None, deadline)?;
        loop {
            // What an earlier client left unread comes first, and may be anything.
            match line.receive("a sign of life", deadline)? {
                Message::Return { value, .. } if value.as_u64() == Some(token) => return Ok(Agent { line }),
                _ => {}
            }
        }
    }

    fn call(&mut self, execute: &str, deadline: Instant) -> Result<Value, QemuError> {
        self.line.ask(execute, None::<&Value>, None, deadline)?;
        loop {
            match self.line.receive(execute, deadline)? {
                Message::Return { value, .. } => return Ok(value),
                Message::Error { class, description, .. } => {
                    return Err(QemuError::Refused { command: execute.to_owned(), class, description });
                }
                _ => {}
            }
        }
    }

    /// Whether file systems are frozen now.
    pub(crate) fn is_frozen(&mut self, deadline: Instant) -> Result<bool, QemuError> {
        Ok(self.call("guest-fsfreeze-status", deadline)?.as_str() == Some("frozen"))
    }

    /// Freezes; how many file systems.
    pub(crate) fn freeze(&mut self, deadline: Instant) -> Result<u64, QemuError> {
        Ok(self.call("guest-fsfreeze-freeze", deadline)?.as_u64().unwrap_or(0))
    }

    /// Thaws; how many file systems.
    pub(crate) fn thaw(&mut self, deadline: Instant) -> Result<u64, QemuError> {
        Ok(self.call("guest-fsfreeze-thaw", deadline)?.as_u64().unwrap_or(0))
    }
}

/// Thaws over a new connection, as often as it takes within the time.
pub(crate) fn thaw_surely(socket: &Path, within: Duration) -> Result<u64, QemuError> {
    /// One attempt.
    const ATTEMPT: Duration = Duration::from_secs(10);
    let end = Instant::now() + within;
    loop {
        let deadline = end.min(Instant::now() + ATTEMPT);
        match Agent::connect(socket, deadline).and_then(|mut agent| agent.thaw(deadline)) {
            Ok(thawed) => return Ok(thawed),
            // No socket, no VM: nothing is frozen any more.
            Err(e @ QemuError::Connect { .. }) => return Err(e),
            Err(e) if Instant::now() >= end => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
