//! The guest agent: it freezes and thaws the guest's file systems.

use std::path::Path;
use std::time::{Duration, Instant};

use reseal_proto::qmp::{Message, SENTINEL};
use serde_json::{Value, json};

use crate::{Line, MonitorError};

/// A connection to the guest agent, in step with it.
pub struct Agent {
    line: Line,
}

impl Agent {
    /// Connects and waits until the agent answers. Before it has, nothing is asked of it that it might do later.
    pub fn connect(socket: &Path, deadline: Instant) -> Result<Agent, MonitorError> {
        Agent::in_step(socket, deadline).map_err(|e| match e {
            MonitorError::Silent { socket, .. } => MonitorError::NoAgent { socket },
            other => other,
        })
    }

    fn in_step(socket: &Path, deadline: Instant) -> Result<Agent, MonitorError> {
        let mut line = Line::connect(socket, deadline)?;
        let token = getrandom::u32()
            .map_err(|e| MonitorError::host("make random numbers", std::io::Error::other(e.to_string())))?;
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

    fn call(&mut self, execute: &str, deadline: Instant) -> Result<Value, MonitorError> {
        self.line.ask(execute, None::<&Value>, None, deadline)?;
        loop {
            match self.line.receive(execute, deadline)? {
                Message::Return { value, .. } => return Ok(value),
                Message::Error { class, description, .. } => {
                    return Err(MonitorError::Refused { command: execute.to_owned(), class, description });
                }
                _ => {}
            }
        }
    }

    /// Whether file systems are frozen now.
    pub fn is_frozen(&mut self, deadline: Instant) -> Result<bool, MonitorError> {
        Ok(self.call("guest-fsfreeze-status", deadline)?.as_str() == Some("frozen"))
    }

    /// Freezes; how many file systems.
    pub fn freeze(&mut self, deadline: Instant) -> Result<u64, MonitorError> {
        Ok(self.call("guest-fsfreeze-freeze", deadline)?.as_u64().unwrap_or(0))
    }

    /// Thaws; how many file systems.
    pub fn thaw(&mut self, deadline: Instant) -> Result<u64, MonitorError> {
        Ok(self.call("guest-fsfreeze-thaw", deadline)?.as_u64().unwrap_or(0))
    }
}

/// Thaws over a new connection, as often as it takes within the time.
pub fn thaw_surely(socket: &Path, within: Duration) -> Result<u64, MonitorError> {
    /// One attempt.
    const ATTEMPT: Duration = Duration::from_secs(10);
    let end = Instant::now() + within;
    loop {
        let deadline = end.min(Instant::now() + ATTEMPT);
        match Agent::connect(socket, deadline).and_then(|mut agent| agent.thaw(deadline)) {
            Ok(thawed) => return Ok(thawed),
            // No socket, no VM: nothing is frozen any more.
            Err(e @ MonitorError::Connect { .. }) => return Err(e),
            Err(e) if Instant::now() >= end => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
