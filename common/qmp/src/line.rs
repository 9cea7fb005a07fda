//! A Unix socket that speaks lines of JSON, each sent and received within a deadline.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use reseal_proto::qmp::{Decoder, Message, command};
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::MonitorError;

/// Pause before a socket whose queue of clients is full is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// Connects to a Unix socket within a time. The usual way would wait for ever for a listener whose queue is full.
fn connect(socket: &Path, deadline: Instant) -> Result<UnixStream, MonitorError> {
    let name = socket.display().to_string();
    let failed = |source: rustix::io::Errno| MonitorError::Connect { socket: name.clone(), source: source.into() };
    let address = rustix::net::SocketAddrUnix::new(socket).map_err(failed)?;
    let began = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(|e| MonitorError::host("set up a socket", e))?;
                return Ok(stream);
            }
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(AGAIN),
            Err(rustix::io::Errno::AGAIN) => {
                let seconds = began.elapsed().as_secs();
                return Err(MonitorError::Silent { socket: name, what: "a connection".into(), seconds });
            }
            Err(e) => return Err(failed(e)),
        }
    }
}

/// A socket that speaks lines of JSON.
pub struct Line {
    stream: UnixStream,
    name: String,
    decoder: Decoder,
    next_id: u64,
}

impl Line {
    /// Connects. A listener that has no room for a client is waited for.
    pub fn connect(socket: &Path, deadline: Instant) -> Result<Line, MonitorError> {
        let stream = connect(socket, deadline)?;
        Ok(Line { stream, name: socket.display().to_string(), decoder: Decoder::new(), next_id: 1 })
    }

    fn fault(&self, what: &str, began: Instant, source: std::io::Error) -> MonitorError {
        use std::io::ErrorKind as Kind;
        let (socket, what) = (self.name.clone(), what.to_owned());
        match source.kind() {
            Kind::WouldBlock | Kind::TimedOut => {
                MonitorError::Silent { socket, what, seconds: began.elapsed().as_secs().max(1) }
            }
            Kind::BrokenPipe | Kind::ConnectionReset | Kind::UnexpectedEof => MonitorError::Gone { socket, what },
            _ => MonitorError::Socket { socket, what, source },
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8], what: &str, deadline: Instant) -> Result<(), MonitorError> {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began).max(Duration::from_millis(1));
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|e| self.fault(what, began, e))
    }

    /// The next message, whatever it is.
    pub fn receive(&mut self, what: &str, deadline: Instant) -> Result<Message, MonitorError> {
        let began = Instant::now();
        let mut bytes = [0; 16 << 10];
        loop {
            match self.decoder.next_message() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(source) => return Err(MonitorError::Garbled { socket: self.name.clone(), source }),
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
    pub fn ask(
        &mut self,
        execute: &str,
        arguments: Option<&impl Serialize>,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<u64, MonitorError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = command(execute, arguments, id).map_err(|e| MonitorError::host(format!("encode {execute}"), e))?;
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
