//! Bytes to and from a server, in the clear or through TLS, under a time limit.

use std::io::{self, BufReader, Read, Write};
use std::time::Duration;

use reseal_proto::nbd::{CHUNK_LENGTH, OFFSET_LENGTH};
use rustls::ClientConnection;

use crate::patience::Patience;
use crate::socket::Socket;
use crate::tls::Tls;

/// What is read ahead in the clear: the header of a chunk with data, and not more, so that the data themselves go straight
/// to where they belong.
const HEADERS: usize = CHUNK_LENGTH + OFFSET_LENGTH;
/// What is read ahead of TLS: several records, for rustls itself asks for little at a time.
const RECORDS: usize = 128 << 10;

/// Why no more bytes come or go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the server closed the connection")]
    Closed,
    #[error("the server did not answer for {}", seconds(.0))]
    Silent(Duration),
    #[error("{0}")]
    Io(io::Error),
    #[error("{0}")]
    Tls(rustls::Error),
    #[error("the server sent bytes in the clear after it had agreed to TLS")]
    Injected,
    #[error("waiting was given up")]
    Stopped,
}

fn seconds(time: &Duration) -> String {
    if time.as_millis().is_multiple_of(1000) {
        format!("{} s", time.as_secs())
    } else {
        format!("{} ms", time.as_millis())
    }
}

/// A connection.
pub(crate) enum Wire {
    Plain(BufReader<Socket>),
    Tls(Box<Session>),
}

/// A TLS session over a socket.
pub(crate) struct Session {
    tls: ClientConnection,
    socket: BufReader<Socket>,
}

impl Wire {
    pub(crate) fn new(socket: Socket) -> Wire {
        Wire::Plain(BufReader::with_capacity(HEADERS, socket))
    }

    /// Speaks TLS from here on.
    pub(crate) fn start_tls(self, tls: &Tls, patience: &mut Patience<'_>) -> Result<Wire, WireError> {
        let Wire::Plain(plain) = self else { return Ok(self) };
        if !plain.buffer().is_empty() {
            return Err(WireError::Injected);
        }
        let session = ClientConnection::new(tls.config.clone(), tls.server.clone()).map_err(WireError::Tls)?;
        let socket = BufReader::with_capacity(RECORDS, plain.into_inner());
        let mut session = Box::new(Session { tls: session, socket });
        while session.tls.is_handshaking() {
            session.flush(patience)?;
            if session.tls.is_handshaking() {
                session.receive_within(patience)?;
            }
        }
        session.flush(patience)?;
        Ok(Wire::Tls(session))
    }

    /// Whether both sides have agreed, inside TLS, on what they speak.
    pub(crate) fn has_agreed(&self) -> bool {
        matches!(self, Wire::Tls(session) if session.tls.alpn_protocol().is_some())
    }

    /// Fills `buf`.
    pub(crate) fn read_exact(&mut self, buf: &mut [u8], patience: &mut Patience<'_>) -> Result<(), WireError> {
        self.fill(buf, |_| {}, patience)
    }

    /// Fills `buf` with content, which counts as progress.
    pub(crate) fn read_content(&mut self, buf: &mut [u8], patience: &mut Patience<'_>) -> Result<(), WireError> {
        self.fill(buf, |(patience, bytes)| patience.content(bytes), patience)
    }

    fn fill<'p>(
        &mut self,
        buf: &mut [u8],
        progress: impl Fn((&mut Patience<'p>, usize)),
        patience: &mut Patience<'p>,
    ) -> Result<(), WireError> {
        let mut done = 0;
        while done < buf.len() {
            match self.read(&mut buf[done..]) {
                Ok(0) => return Err(WireError::Closed),
                Ok(got) => {
                    done += got;
                    progress((&mut *patience, got));
                    if done < buf.len() {
                        patience.check()?;
                    }
                }
                Err(e) => retry(e, patience)?,
            }
        }
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, WireError> {
        match self {
            Wire::Plain(socket) => socket.read(buf).map_err(WireError::Io),
            Wire::Tls(session) => session.read(buf),
        }
    }

    /// Sends all of `bytes`, which must not be much.
    pub(crate) fn send(&mut self, bytes: &[u8], patience: &mut Patience<'_>) -> Result<(), WireError> {
        match self {
            Wire::Plain(socket) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    match socket.get_mut().write(rest) {
                        Ok(0) => return Err(WireError::Closed),
                        Ok(sent) => rest = &rest[sent..],
                        Err(e) => retry(WireError::Io(e), patience)?,
                    }
                }
                Ok(())
            }
            Wire::Tls(session) => {
                session.tls.writer().write_all(bytes).map_err(WireError::Io)?;
                session.flush(patience)
            }
        }
    }

    /// Says the last word, as far as that is possible without waiting.
    pub(crate) fn close(mut self, last: &[u8]) {
        let stop = || true;
        let mut patience = Patience::new(Duration::ZERO, &stop);
        if self.send(last, &mut patience).is_ok()
            && let Wire::Tls(session) = &mut self
        {
            session.tls.send_close_notify();
            // The server closes in any case.
            let _ = session.flush(&mut patience);
        }
    }
}

/// Goes on after an interruption or the end of a slice, as long as there is patience.
fn retry(error: WireError, patience: &Patience<'_>) -> Result<(), WireError> {
    match error {
        WireError::Io(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        WireError::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => patience.check(),
        WireError::Io(e) if is_closed(e.kind()) => Err(WireError::Closed),
        other => Err(other),
    }
}

fn is_closed(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof)
}

impl Session {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, WireError> {
        loop {
            match self.tls.reader().read(buf) {
                Ok(got) => return Ok(got),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.receive()?,
                Err(e) => return Err(WireError::Io(e)),
            }
        }
    }

    /// Takes records from the socket.
    fn receive(&mut self) -> Result<(), WireError> {
        match self.tls.read_tls(&mut self.socket) {
            Ok(0) => return Err(WireError::Closed),
            Ok(_) => {}
            Err(e) => return Err(WireError::Io(e)),
        }
        match self.tls.process_new_packets() {
            Ok(_) => Ok(()),
            Err(e) => {
                // An alert says why, if it can be sent at once.
                let _ = self.tls.write_tls(self.socket.get_mut());
                Err(WireError::Tls(e))
            }
        }
    }

    fn receive_within(&mut self, patience: &mut Patience<'_>) -> Result<(), WireError> {
        match self.receive() {
            Ok(()) => patience.check(),
            Err(e) => retry(e, patience),
        }
    }

    fn flush(&mut self, patience: &mut Patience<'_>) -> Result<(), WireError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(self.socket.get_mut()) {
                Ok(0) => return Err(WireError::Closed),
                Ok(_) => {}
                Err(e) => retry(WireError::Io(e), patience)?,
            }
        }
        Ok(())
    }
}
