//! A connection on which one message follows the other, for those who ask and wait.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use reseal_format::time::Timestamp;
use reseal_proto::wire::{FromSource, FromTarget, HEADER_LENGTH, Header, Hello, Side, VERSION};
use rustls::{ClientConnection, StreamOwned};

use crate::{Enrolment, RemoteError};

/// How long it may take to learn whether the other site is there.
const GREETING: Duration = Duration::from_secs(10);
/// As much of a message as is made room for before it is there.
const PIECE: usize = 64 << 10;

/// A socket that is waited for until a certain moment, however little comes at a time.
struct Timed {
    stream: TcpStream,
    until: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::new(io::ErrorKind::TimedOut, "nobody answers")) } else { Ok(Some(left)) }
    }
}

/// Says what a wait that was over means.
fn late(e: io::Error) -> io::Error {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "nobody answers")
        }
        _ => e,
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf).map_err(late)
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf).map_err(late)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A connection to another site, whose version is this program's.
pub struct Line {
    stream: StreamOwned<ClientConnection, Timed>,
    peer: String,
    /// For what is wrong with the file.
    file: String,
    patience: Duration,
    time: Timestamp,
}

impl Line {
    /// Connects, and says hello. Each answer is waited for as long as `patience` says.
    pub fn connect(enrolment: &Enrolment, patience: Duration) -> Result<Line, RemoteError> {
        let peer = enrolment.address().to_owned();
        let lost = |e: io::Error| RemoteError::Lost { peer: peer.clone(), why: e.to_string() };
        let until = Instant::now() + patience;
        let stream = connect(enrolment.address(), until).map_err(lost)?;
        stream.set_nodelay(true).map_err(lost)?;
        let tls = ClientConnection::new(enrolment.tls(), enrolment.server());
        let tls = tls.map_err(|e| RemoteError::Usage(format!("TLS can't be set up: {e}")))?;
        let stream = StreamOwned::new(tls, Timed { stream, until });
        let file = enrolment.path().display().to_string();
        let mut line = Line { stream, peer, file, patience, time: Timestamp(0) };
        let software = concat!("reseal ", env!("CARGO_PKG_VERSION")).to_owned();
        match line.ask(&FromSource::Hello(Hello { version: VERSION, software }))? {
            FromTarget::Welcome(welcome) if welcome.version == VERSION => {
                line.time = Timestamp(i64::try_from(welcome.time).unwrap_or(i64::MAX));
                Ok(line)
            }
            FromTarget::Welcome(other) => {
                Err(line.unexpected(format!("it speaks version {}, this program {VERSION}", other.version)))
            }
            _ => Err(line.unexpected("it does not say its version first")),
        }
    }

    /// The other site's time when it said hello.
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, message: &FromSource) -> Result<FromTarget, RemoteError> {
        self.send(message)?;
        self.answer()
    }

    /// Says something.
    pub fn send(&mut self, message: &FromSource) -> Result<(), RemoteError> {
        self.stream.sock.until = Instant::now() + self.patience;
        let sent = self.stream.write_all(&message.encode()).and_then(|()| self.stream.flush());
        sent.map_err(|e| self.lost(e))
    }

    /// The answer to what was asked first of what was not answered yet.
    pub fn answer(&mut self) -> Result<FromTarget, RemoteError> {
        self.stream.sock.until = Instant::now() + self.patience;
        loop {
            match self.next()? {
                FromTarget::Alive => {}
                FromTarget::Trouble(trouble) => return Err(RemoteError::Trouble { peer: self.peer.clone(), trouble }),
                answer => return Ok(answer),
            }
        }
    }

    fn next(&mut self) -> Result<FromTarget, RemoteError> {
        let broken = |source| RemoteError::Broken { peer: self.peer.clone(), source };
        let mut header = [0; HEADER_LENGTH];
        self.stream.read_exact(&mut header).map_err(|e| self.lost(e))?;
        let header = Header::decode(Side::Target, header).map_err(broken)?;
        let mut payload = Vec::new();
        while payload.len() < header.payload() {
            // Room is made as it comes, and not as is claimed.
            let (at, piece) = (payload.len(), (header.payload() - payload.len()).min(PIECE));
            payload.resize(at + piece, 0);
            self.stream.read_exact(&mut payload[at..]).map_err(|e| self.lost(e))?;
        }
        FromTarget::decode(header, &payload).map_err(broken)
    }

    fn lost(&self, e: io::Error) -> RemoteError {
        let (peer, why) = (self.peer.clone(), e.to_string());
        match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(_)) => RemoteError::Refused { peer, why },
            Some(_) => RemoteError::Usage(format!(
                "{peer} can't be trusted: {why}. Compare the enrolment file {} with what runs there",
                self.file
            )),
            None => RemoteError::Lost { peer, why },
        }
    }

    /// It answers what it must not.
    pub fn unexpected(&self, what: impl Into<String>) -> RemoteError {
        RemoteError::Unexpected { peer: self.peer.clone(), what: what.into() }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stream.conn.send_close_notify();
        // Whether it hears that is its own business.
        self.stream.sock.until = Instant::now() + Duration::from_millis(100);
        let _ = self.stream.flush();
    }
}

fn connect(address: &str, until: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{address} is no address"));
    for address in address.to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody answers"));
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = late(e),
        }
    }
    Err(last)
}

/// Whether the other site is there, and takes this one's certificate: both name their version, and that is all.
pub fn greet(enrolment: &Enrolment) -> Result<(), RemoteError> {
    Line::connect(enrolment, GREETING).map(drop)
}
