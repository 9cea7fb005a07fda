//! A client of a monitor: one command after the other, each within a time limit, and the events that come between.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use reseal_proto::qmp::{Message, Version};
use serde::Serialize;
use serde_json::Value;

use crate::{Line, MonitorError};

/// Events that are kept until somebody waits for them; then the oldest go.
const MAX_EVENTS: usize = 256;
/// Longest data of an event that is kept. Those of block jobs and devices have some hundred bytes.
const MAX_EVENT: usize = 16 << 10;

/// What a monitor tells without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as `BLOCK_JOB_READY`.
    pub name: String,
    pub data: Value,
}

/// A monitor, after its greeting.
pub struct Client {
    line: Line,
    version: Version,
    timeout: Duration,
    events: VecDeque<Event>,
}

impl Client {
    /// Connects, within the time that every later command has too.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Client, MonitorError> {
        let deadline = Instant::now() + timeout;
        let mut line = Line::connect(socket, deadline)?;
        let version = loop {
            if let Message::Greeting(version) = line.receive("with its greeting", deadline)? {
                break version;
            }
        };
        let mut client = Client { line, version, timeout, events: VecDeque::new() };
        client.call("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// QEMU's.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// How long a command may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Executes a command and waits for what it returns.
    pub fn call(&mut self, execute: &str, arguments: Value) -> Result<Value, MonitorError> {
        let arguments = Some(arguments).filter(|arguments| !arguments.is_null());
        self.execute(execute, arguments.as_ref(), None)
    }

    /// The same, with arguments that hold a secret or a file descriptor beside it.
    pub fn execute(
        &mut self,
        execute: &str,
        arguments: Option<&impl Serialize>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        let deadline = Instant::now() + self.timeout;
        let asked = self.line.ask(execute, arguments, fd, deadline)?;
        loop {
            match self.line.receive(execute, deadline)? {
                Message::Return { id, value } if id == Some(asked) => return Ok(value),
                Message::Error { id, class, description } if id == Some(asked) || id.is_none() => {
                    return Err(MonitorError::Refused { command: execute.to_owned(), class, description });
                }
                Message::Event { name, data } => self.keep(Event { name, data }),
                // What was answered after its time was over.
                _ => {}
            }
        }
    }

    /// Executes a command whose answer is a list.
    pub fn list(&mut self, execute: &str, arguments: Value) -> Result<Vec<Value>, MonitorError> {
        match self.call(execute, arguments)? {
            Value::Array(list) => Ok(list),
            _ => Err(MonitorError::Answer { command: execute.to_owned(), what: "a list" }),
        }
    }

    fn keep(&mut self, event: Event) {
        if event.data.to_string().len() > MAX_EVENT {
            return;
        }
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The first event of those names that came since the last of them was taken, or comes until then; `None` if none
    /// does. Events of other names are kept.
    pub fn wait_event(&mut self, names: &[&str], deadline: Instant) -> Result<Option<Event>, MonitorError> {
        let wanted = |event: &Event| names.contains(&event.name.as_str());
        if let Some(at) = self.events.iter().position(wanted) {
            return Ok(self.events.remove(at));
        }
        loop {
            match self.line.receive("for an event", deadline) {
                Ok(Message::Event { name, data }) => {
                    let event = Event { name, data };
                    if wanted(&event) {
                        return Ok(Some(event));
                    }
                    self.keep(event);
                }
                // What was answered after its time was over.
                Ok(_) => {}
                Err(MonitorError::Silent { .. }) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use serde_json::json;

    use super::*;

    /// A monitor that answers each line with the next of those texts, and says the last by itself.
    fn monitor(answers: Vec<String>, last: &'static str) -> (tempfile::TempDir, Client, JoinHandle<()>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let serve = move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut stream = stream;
            stream
                .write_all(
                    b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":7,\"minor\":2,\"micro\":0},\"package\":\"\"}}}\n",
                )
                .unwrap();
            for answer in std::iter::once("{\"return\":{},\"id\":1}\n").chain(answers.iter().map(String::as_str)) {
                lines.read_line(&mut String::new()).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
            stream.write_all(last.as_bytes()).unwrap();
            // Until the client goes.
            let _ = lines.read_line(&mut String::new());
        };
        let thread = std::thread::spawn(serve);
        let client = Client::connect(&folder.path().join("qmp"), Duration::from_secs(20)).unwrap();
        (folder, client, thread)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn events_that_come_before_an_answer_are_kept_in_their_order() {
        let answer = "{\"event\":\"A\",\"data\":1}\n{\"event\":\"B\",\"data\":2}\n{\"event\":\"A\",\"data\":3}\n\
                      {\"return\":5,\"id\":2}\n";
        let (_folder, mut client, thread) = monitor(vec![answer.into()], "{\"event\":\"C\"}\n");
        assert_eq!(client.call("query-jobs", Value::Null).unwrap(), json!(5));
        let data = |client: &mut Client, name: &str| client.wait_event(&[name], later()).unwrap().unwrap().data;
        assert_eq!(data(&mut client, "C"), Value::Null);
        assert_eq!(data(&mut client, "B"), json!(2));
        assert_eq!(data(&mut client, "A"), json!(1));
        assert_eq!(data(&mut client, "A"), json!(3));
        assert_eq!(client.wait_event(&["A", "B", "C"], soon()).unwrap(), None);
        drop(client);
        thread.join().unwrap();
    }

    #[test]
    fn no_more_events_are_kept_than_there_is_room_for() {
        let long = "x".repeat(MAX_EVENT);
        let mut answer = format!("{{\"event\":\"LONG\",\"data\":\"{long}\"}}\n");
        for number in 0..=MAX_EVENTS {
            answer.push_str(&format!("{{\"event\":\"E\",\"data\":{number}}}\n"));
        }
        answer.push_str("{\"return\":{},\"id\":2}\n");
        let (_folder, mut client, thread) = monitor(vec![answer], "");
        client.call("stop", Value::Null).unwrap();
        assert_eq!(client.events.len(), MAX_EVENTS);
        assert_eq!(client.wait_event(&["LONG", "E"], soon()).unwrap().unwrap().data, json!(1));
        drop(client);
        thread.join().unwrap();
    }

    #[test]
    fn a_monitor_that_ends_is_an_error_and_no_silence() {
        let (_folder, mut client, thread) = monitor(vec!["{\"return\":{},\"id\":2}\n".into()], "");
        client.call("quit", Value::Null).unwrap();
        // The other end goes when it has read this.
        client.line.send(b"\n", "a line", later()).unwrap();
        thread.join().unwrap();
        let ended = client.wait_event(&["SHUTDOWN"], later()).unwrap_err();
        assert!(ended.is_gone(), "{ended}");
    }
}
