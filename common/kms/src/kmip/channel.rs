//! One TLS connection: requests out, answers in, and no wait beyond a deadline.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use reseal_proto::kmip::{HEADER_LEN, rest_of_response};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConnection, StreamOwned};
use zeroize::Zeroizing;

use super::credentials::Credentials;
use crate::Secret;

/// Attempts to connect: a server that starts, or a full queue, needs a moment.
const ATTEMPTS: u32 = 3;

/// Pause before the second attempt; before the third, four times as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Where a server is: `HOST:PORT` or `[IPV6]:PORT`.
#[derive(Debug)]
pub(super) struct Address {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl Address {
    /// None if it is no such address.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // Without brackets nobody knows where an IPv6 address ends.
        let host = bracketed.unwrap_or(host);
        if bracketed.is_none() && host.contains(':') {
            return None;
        }
        let name = ServerName::try_from(host.to_owned()).ok()?;
        let port = port.parse().ok().filter(|&port| port != 0)?;
        Some(Self { host: host.to_owned(), port, name })
    }

    /// Looks the name up, in a thread of its own: the system's resolver knows no deadline.
    fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, Fault> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let query = (self.host.clone(), self.port);
        thread::spawn(move || {
            // Nobody waits any more if this fails.
            let _ = sender.send(query.to_socket_addrs().map(Iterator::collect::<Vec<_>>));
        });
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(found)) if !found.is_empty() => Ok(found),
            Ok(Ok(_)) => Err(Fault::Unreachable("its name has no address".to_owned())),
            Ok(Err(error)) => Err(Fault::Unreachable(format!("its name is not found: {error}"))),
            Err(_) => Err(Fault::Unreachable("its name is not found in time".to_owned())),
        }
    }
}

/// Why nothing came of it. What it says is for people, and holds nothing that a session transports.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The server is not there, or too slow, or went away.
    Unreachable(String),
    /// It does not take our certificate.
    Denied(String),
    /// It is not the server that it should be, or speaks something else.
    Stranger(String),
}

/// A connection whose both ends are known.
pub(super) struct Channel {
    tls: StreamOwned<ClientConnection, Timed>,
}

impl Channel {
    /// Connects, in a few attempts while the server is not there.
    pub(super) fn open(address: &Address, credentials: &Credentials, deadline: Instant) -> Result<Self, Fault> {
        let mut pause = FIRST_PAUSE;
        for left in (0..ATTEMPTS).rev() {
            match Self::attempt(address, credentials, deadline, left + 1) {
                Err(Fault::Unreachable(_)) if left > 0 && Instant::now() + pause < deadline => {
                    thread::sleep(pause);
                    pause *= 4;
                }
                done => return done,
            }
        }
        Err(timed_out())
    }

    fn attempt(
        address: &Address,
        credentials: &Credentials,
        deadline: Instant,
        attempts_left: u32,
    ) -> Result<Self, Fault> {
        let socket = connect(&address.resolve(deadline)?, deadline, attempts_left)?;
        // One request waits for one answer: nothing is gained by collecting small packets.
        socket.set_nodelay(true).map_err(fault)?;
        let tls = ClientConnection::new(Arc::clone(&credentials.tls), address.name.clone())
            .map_err(|error| Fault::Stranger(format!("no TLS: {error}")))?;
        let mut tls = StreamOwned::new(tls, Timed { socket, deadline });
        while tls.conn.is_handshaking() {
            if let Err(error) = tls.conn.complete_io(&mut tls.sock) {
                return Err(fault(last_words(&mut tls, error)));
            }
        }
        if !credentials.were_shown() {
            let what = "it does not ask for a client certificate: switch mutual TLS on there, \
                or see which kinds of keys it takes";
            return Err(Fault::Stranger(what.to_owned()));
        }
        Ok(Self { tls })
    }

    /// Sends a request and waits for its answer, whole and not longer than allowed.
    pub(super) fn exchange(&mut self, request: &[u8]) -> Result<Secret, Fault> {
        if let Err(error) = self.tls.write_all(request).and_then(|()| self.tls.flush()) {
            // A server that hangs up may have said why: in TLS 1.3 it sees our certificate only when we are done.
            return Err(fault(last_words(&mut self.tls, error)));
        }
        let mut header = [0; HEADER_LEN];
        self.tls.read_exact(&mut header).map_err(fault)?;
        let rest = rest_of_response(&header).map_err(|error| Fault::Stranger(error.to_string()))?;
        let mut answer = Zeroizing::new(vec![0; HEADER_LEN + rest]);
        let (start, end) = answer.split_at_mut(HEADER_LEN);
        start.copy_from_slice(&header);
        self.tls.read_exact(end).map_err(fault)?;
        Ok(answer)
    }
}

/// What a server that takes nothing any more has said of TLS before, or the error that there is. What is still to be sent is left:
/// that would fail first.
fn last_words(tls: &mut StreamOwned<ClientConnection, Timed>, error: io::Error) -> io::Error {
    if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
        return error;
    }
    while tls.conn.read_tls(&mut tls.sock).is_ok_and(|read| read > 0) {
        if let Err(why) = tls.conn.process_new_packets() {
            return io::Error::new(io::ErrorKind::InvalidData, why);
        }
    }
    error
}

impl Drop for Channel {
    /// Says goodbye, without waiting: the server may be gone.
    fn drop(&mut self) {
        self.tls.conn.send_close_notify();
        self.tls.sock.deadline = Instant::now() + Duration::from_millis(100);
        let _ = self.tls.flush();
    }
}

/// Connects to the first address that answers. None of them, and no attempt, uses up all the time.
fn connect(addresses: &[SocketAddr], deadline: Instant, attempts_left: u32) -> Result<TcpStream, Fault> {
    let mut failure = timed_out();
    for (nth, address) in addresses.iter().enumerate() {
        let shares = u32::try_from(addresses.len() - nth).unwrap_or(u32::MAX).saturating_mul(attempts_left);
        let share = deadline.saturating_duration_since(Instant::now()) / shares.max(1);
        if share.is_zero() {
            return Err(timed_out());
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = fault(error),
        }
    }
    Err(failure)
}

/// A socket that no call waits for beyond the deadline.
struct Timed {
    socket: TcpStream,
    deadline: Instant,
}

impl Timed {
    fn bounded<T>(
        &mut self,
        set: impl Fn(&TcpStream, Option<Duration>) -> io::Result<()>,
        mut call: impl FnMut(&mut TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            set(&self.socket, Some(left))?;
            match call(&mut self.socket) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.bounded(TcpStream::set_read_timeout, |socket| socket.read(buf))
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.bounded(TcpStream::set_write_timeout, |socket| socket.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn timed_out() -> Fault {
    Fault::Unreachable("it does not answer in time".to_owned())
}

/// What rustls says, if the error is its own.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// Who is at fault for an error of a connection.
fn fault(error: io::Error) -> Fault {
    use AlertDescription as Alert;
    match tls_error(&error) {
        Some(rustls::Error::AlertReceived(
            alert @ (Alert::NoCertificate
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            // So ends a signature that does not fit: another CA, or another key, of the same name.
            | Alert::DecryptError
            | Alert::AccessDenied
            | Alert::CertificateRequired),
        )) => Fault::Denied(format!("it does not accept the client certificate: {alert:?}")),
        Some(rustls::Error::AlertReceived(alert)) => {
            Fault::Unreachable(format!("it ends TLS with {alert:?}: see what TLS versions and ciphers it speaks"))
        }
        Some(rustls::Error::InvalidCertificate(reason)) => {
            Fault::Stranger(format!("its certificate is not one that the given CA vouches for: {reason}"))
        }
        Some(other) => Fault::Stranger(format!("no TLS: {other}")),
        None => match error.kind() {
            io::ErrorKind::TimedOut => timed_out(),
            io::ErrorKind::UnexpectedEof => Fault::Unreachable("it ended the connection".to_owned()),
            _ => Fault::Unreachable(error.to_string()),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (text, host, port) in [
            ("kms.example.com:5696", "kms.example.com", 5696),
            ("127.0.0.1:1", "127.0.0.1", 1),
            ("[::1]:65535", "::1", 65535),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port));
        }
        for bad in ["", "kms", ":5696", "kms:", "kms:0", "kms:65536", "::1:5696", "a b:1", "[::1]", "kms:x"] {
            assert!(Address::parse(bad).is_none(), "{bad}");
        }
    }
}
