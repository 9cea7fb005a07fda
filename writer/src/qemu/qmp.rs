//! A client of a QMP socket: one command after the other, each within a time limit.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use reseal_proto::qmp::{Decoder, Message, Version, command};
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use serde::Serialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::QemuError;

/// Pause before a socket whose queue of clients is full is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// Connects to a Unix socket within a time. The usual way would wait for ever for a listener whose queue is full.
fn connect(socket: &Path, deadline: Instant) -> Result<UnixStream, QemuError> {
    let name = socket.display().to_string();
    let failed = |source: rustix::io::Errno| QemuError::Connect { socket: name.clone(), source: source.into() };
    let address = rustix::net::SocketAddrUnix::new(socket).map_err(failed)?;
    let began = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(|e| QemuError::host("set up a socket", e))?;
                return Ok(stream);
            }
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(AGAIN),
            Err(rustix::io::Errno::AGAIN) => {
                let seconds = began.elapsed().as_secs();
                return Err(QemuError::Silent { socket: name, what: "a connection".into(), seconds });
            }
            Err(e) => return Err(failed(e)),
        }
    }
}

/// A socket that speaks lines of JSON.
pub(crate) struct Line {
    stream: UnixStream,
    name: String,
    decoder: Decoder,
    next_id: u64,
}

impl Line {
    /// Connects. A listener that has no room for a client is waited for.
    pub(crate) fn connect(socket: &Path, deadline: Instant) -> Result<Line, QemuError> {
        let stream = connect(socket, deadline)?;
        Ok(Line { stream, name: socket.display().to_string(), decoder: Decoder::new(), next_id: 1 })
    }

    fn fault(&self, what: &str, began: Instant, source: std::io::Error) -> QemuError {
        use std::io::ErrorKind as Kind;
        let (socket, what) = (self.name.clone(), what.to_owned());
        match source.kind() {
            Kind::WouldBlock | Kind::TimedOut => {
                QemuError::Silent { socket, what, seconds: began.elapsed().as_secs().max(1) }
            }
            Kind::BrokenPipe | Kind::ConnectionReset | Kind::UnexpectedEof => QemuError::Gone { socket, what },
            _ => QemuError::Socket { socket, what, source },
        }
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8], what: &str, deadline: Instant) -> Result<(), QemuError> {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began).max(Duration::from_millis(1));
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|e| self.fault(what, began, e))
    }

    /// The next message, whatever it is.
    pub(crate) fn receive(&mut self, what: &str, deadline: Instant) -> Result<Message, QemuError> {
        let began = Instant::now();
        let mut bytes = [0; 16 << 10];
        loop {
            match self.decoder.next_message() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(source) => return Err(QemuError::Garbled { socket: self.name.clone(), source }),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.fault(what, began, std::io::ErrorKind::TimedOut.into()));
            }
            let got = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut bytes));
            match got {
                Ok(0) => return Err(self.fault(what, began, std::io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => self.decoder.feed(&bytes[..got]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.fault(what, began, e)),
            }
        }
    }

    /// Sends a command, with a file descriptor if it takes one; its id.
    pub(crate) fn ask(
        &mut self,
        execute: &str,
        arguments: Option<&impl Serialize>,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<u64, QemuError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = command(execute, arguments, id).map_err(|e| QemuError::host(format!("encode {execute}"), e))?;
        let line = Zeroizing::new(line);
        let mut sent = 0;
        if let Some(fd) = fd {
            let began = Instant::now();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let result =
                rustix::net::sendmsg(self.stream.as_fd(), &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL);
            sent = result.map_err(|e| self.fault(execute, began, e.into()))?;
        }
        self.send(&line[sent..], execute, deadline)?;
        Ok(id)
    }
}

/// A monitor, after its greeting.
pub(crate) struct Client {
    line: Line,
    version: Version,
    timeout: Duration,
}

impl Client {
    /// Connects, within the time that every later command has too.
    pub(crate) fn connect(socket: &Path, timeout: Duration) -> Result<Client, QemuError> {
        let deadline = Instant::now() + timeout;
        let mut line = Line::connect(socket, deadline)?;
        let version = loop {
            if let Message::Greeting(version) = line.receive("with its greeting", deadline)? {
                break version;
            }
        };
        let mut client = Client { line, version, timeout };
        client.call("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    pub(crate) fn version(&self) -> &Version {
        &self.version
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Executes a command and waits for what it returns.
    pub(crate) fn call(&mut self, execute: &str, arguments: Value) -> Result<Value, QemuError> {
        let arguments = Some(arguments).filter(|arguments| !arguments.is_null());
        self.execute(execute, arguments.as_ref(), None)
    }

    /// The same, with arguments that hold a secret or a file descriptor beside it.
    pub(crate) fn execute(
        &mut self,
        execute: &str,
        arguments: Option<&impl Serialize>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QemuError> {
        let deadline = Instant::now() + self.timeout;
        let asked = self.line.ask(execute, arguments, fd, deadline)?;
        loop {
            match self.line.receive(execute, deadline)? {
                Message::Return { id, value } if id == Some(asked) => return Ok(value),
                Message::Error { id, class, description } if id == Some(asked) || id.is_none() => {
                    return Err(QemuError::Refused { command: execute.to_owned(), class, description });
                }
                // Events, and what was answered after its time was over.
                _ => {}
            }
        }
    }

    /// Executes a command whose answer is a list.
    pub(crate) fn list(&mut self, execute: &str, arguments: Value) -> Result<Vec<Value>, QemuError> {
        match self.call(execute, arguments)? {
            Value::Array(list) => Ok(list),
            _ => Err(QemuError::Answer { command: execute.to_owned(), what: "a list" }),
        }
    }
}
