//! QMP, the monitor protocol of QEMU and of its guest agent: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.
//!
//! ```text
//! command → one line of JSON → QEMU        QEMU → lines of JSON → greeting, return, error, event
//! ```
//!
//! The guest agent has neither greeting nor events. It answers a [`SENTINEL`] byte before `guest-sync-delimited` with
//! one before its return, so that what an earlier client left unread is told from what is new.

use serde::Serialize;
use serde_json::Value;

/// Longest line that is taken. The longest known, the schema of QEMU 10, has 0.3 MiB; a VM with hundreds of disks
/// describes its nodes in a few MiB.
pub const MAX_LINE: usize = 16 << 20;
/// A byte that no JSON has: what the guest agent got before it is dropped.
pub const SENTINEL: u8 = 0xff;
/// Room that a command gets at once, so that a secret in it is not left behind by a growing buffer.
const COMMAND: usize = 4096;

/// Bytes that are no QMP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("a line is no JSON object")]
    NotJson,
    #[error("a message is neither greeting, return, error nor event")]
    Unknown,
}

/// What QEMU or the agent says.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Greeting(Version),
    Return {
        id: Option<u64>,
        value: Value,
    },
    Error {
        id: Option<u64>,
        /// `GenericError`, `CommandNotFound`, `DeviceNotFound` or others.
        class: String,
        description: String,
    },
    Event {
        name: String,
        data: Value,
    },
}

/// A version of QEMU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u64,
    pub minor: u64,
    pub micro: u64,
    /// The distributor's name for it.
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Version { major, minor, micro, package } = self;
        write!(f, "{major}.{minor}.{micro}")?;
        if package.is_empty() { Ok(()) } else { write!(f, " {package}") }
    }
}

/// One line that asks for `execute`.
pub fn command(execute: &str, arguments: Option<&impl Serialize>, id: u64) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    struct Command<'a, T> {
        execute: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        arguments: Option<&'a T>,
        id: u64,
    }
    let mut line = Vec::with_capacity(COMMAND);
    serde_json::to_writer(&mut line, &Command { execute, arguments, id })?;
    line.push(b'\n');
    Ok(line)
}

/// Cuts bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How far there is no end of a line.
    searched: usize,
}

impl Decoder {
    /// One that has seen nothing.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes what was received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if it is there as a whole. After an error nothing that follows can be trusted.
    pub fn next_message(&mut self) -> Result<Option<Message>, QmpError> {
        loop {
            let found = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n');
            let Some(found) = found else {
                self.searched = self.bytes.len();
                return if self.searched > MAX_LINE { Err(QmpError::TooLong) } else { Ok(None) };
            };
            let end = self.searched + found;
            if end > MAX_LINE {
                return Err(QmpError::TooLong);
            }
            let line = &self.bytes[..end];
            let start = line.iter().rposition(|&byte| byte == SENTINEL).map_or(0, |at| at + 1);
            let line = line[start..].trim_ascii();
            let message = if line.is_empty() { None } else { Some(parse(line)) };
            self.bytes.drain(..=end);
            self.searched = 0;
            if let Some(message) = message {
                return message.map(Some);
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, QmpError> {
    let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else { return Err(QmpError::NotJson) };
    let id = object.get("id").and_then(Value::as_u64);
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    if let Some(value) = object.remove("return") {
        return Ok(Message::Return { id, value });
    }
    if let Some(error) = object.remove("error") {
        return Ok(Message::Error { id, class: text(&error, "class"), description: text(&error, "desc") });
    }
    if let Some(Value::String(name)) = object.remove("event") {
        return Ok(Message::Event { name, data: object.remove("data").unwrap_or_default() });
    }
    let greeting = object.remove("QMP").ok_or(QmpError::Unknown)?;
    let number = |name: &str| greeting["version"]["qemu"][name].as_u64().ok_or(QmpError::Unknown);
    Ok(Message::Greeting(Version {
        major: number("major")?,
        minor: number("minor")?,
        micro: number("micro")?,
        package: text(&greeting["version"], "package"),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn all(decoder: &mut Decoder) -> Result<Vec<Message>, QmpError> {
        let mut messages = Vec::new();
        while let Some(message) = decoder.next_message()? {
            messages.push(message);
        }
        Ok(messages)
    }

    #[test]
    fn commands_are_single_lines() {
        let line = command("stop", None::<&Value>, 7).unwrap();
        assert_eq!(line, b"{\"execute\":\"stop\",\"id\":7}\n");
        let line = command("qom-get", Some(&json!({"path": "a\nb"})), 8).unwrap();
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Value>(&line).unwrap()["arguments"]["path"], "a\nb");
    }

    #[test]
    fn each_kind_of_message_is_told() {
        let mut decoder = Decoder::new();
        decoder.feed(
            b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \
              \"Debian\"}, \"capabilities\": [\"oob\"]}}\r\n{\"return\": {}, \"id\": 1}\r\n\
              {\"id\": 2, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n\
              {\"timestamp\": {\"seconds\": 1}, \"event\": \"STOP\"}\n\n{\"return\"",
        );
        let messages = all(&mut decoder).unwrap();
        assert_eq!(messages.len(), 4);
        match &messages[0] {
            Message::Greeting(version) => assert_eq!(version.to_string(), "7.2.22 Debian"),
            other => panic!("{other:?}"),
        }
        assert_eq!(messages[1], Message::Return { id: Some(1), value: json!({}) });
        let error = Message::Error { id: Some(2), class: "GenericError".into(), description: "no".into() };
        assert_eq!(messages[2], error);
        assert_eq!(messages[3], Message::Event { name: "STOP".into(), data: Value::Null });
        decoder.feed(b": 5}\n");
        assert_eq!(all(&mut decoder).unwrap(), [Message::Return { id: None, value: json!(5) }]);
    }

    #[test]
    fn what_stands_before_a_sentinel_is_dropped() {
        let mut decoder = Decoder::new();
        decoder.feed(b"half of an old ans\xff{\"return\": 3}\n");
        assert_eq!(all(&mut decoder).unwrap(), [Message::Return { id: None, value: json!(3) }]);
    }

    #[test]
    fn lines_end_within_the_limit() {
        let mut decoder = Decoder::new();
        decoder.feed(&vec![b' '; MAX_LINE]);
        assert_eq!(decoder.next_message(), Ok(None));
        decoder.feed(b"  ");
        assert_eq!(decoder.next_message(), Err(QmpError::TooLong));
        let mut decoder = Decoder::new();
        decoder.feed(&vec![b' '; MAX_LINE + 1]);
        decoder.feed(b"\n");
        assert_eq!(decoder.next_message(), Err(QmpError::TooLong));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            let _ = all(&mut decoder);
        }

        #[test]
        fn arbitrary_objects_never_panic(key in "return|error|event|QMP|id", inner in "[0-9\\[\\]{}:\",a-z]{0,12}") {
            let mut decoder = Decoder::new();
            decoder.feed(format!("{{\"{key}\": {inner}}}\n{{\"{key}\": {{\"version\": {inner}}}}}\n").as_bytes());
            let _ = all(&mut decoder);
        }

        #[test]
        fn messages_do_not_depend_on_how_they_arrive(ids: Vec<u32>, cut in 1usize..40) {
            let mut bytes = Vec::new();
            for id in &ids {
                bytes.extend(format!("{{\"return\": {{\"text\": \"{id}\"}}, \"id\": {id}}}\r\n").into_bytes());
            }
            let mut decoder = Decoder::new();
            let mut found = Vec::new();
            for part in bytes.chunks(cut) {
                decoder.feed(part);
                found.extend(all(&mut decoder).unwrap());
            }
            let expected: Vec<_> = ids
                .iter()
                .map(|&id| Message::Return { id: Some(id.into()), value: json!({"text": id.to_string()}) })
                .collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_command_reads_back(name in "[a-z-]{1,20}", text: String, id: u64) {
            let line = command(&name, Some(&json!({"text": text})), id).unwrap();
            let value: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(value, json!({"execute": name, "arguments": {"text": text}, "id": id}));
        }
    }
}
