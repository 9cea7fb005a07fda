//! A connected socket that never waits long: each wait ends after a slice, so that the caller can look at the time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::uri::Place;

/// Longest single wait. Long enough to cost nothing, short enough that nobody notices when an end is waited for.
const SLICE: Duration = Duration::from_millis(50);
/// Silence after which the kernel asks a TCP peer whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// A stream socket of either kind.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects within `timeout`, name resolution aside, which has limits of its own.
    pub(crate) fn connect(place: &Place, timeout: Duration) -> io::Result<Socket> {
        let socket = match place {
            Place::Tcp { host, port } => Socket::Tcp(connect_tcp(host, *port, timeout)?),
            Place::Unix(path) => Socket::Unix(connect_unix(path, timeout)?),
        };
        let slice = Some(SLICE.min(timeout));
        match &socket {
            Socket::Tcp(stream) => {
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(stream, true)?;
                sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
                sockopt::set_tcp_keepintvl(stream, KEEPALIVE)?;
                stream.set_read_timeout(slice)?;
                stream.set_write_timeout(slice)?;
            }
            Socket::Unix(stream) => {
                stream.set_read_timeout(slice)?;
                stream.set_write_timeout(slice)?;
            }
        }
        Ok(socket)
    }
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let until = Instant::now() + timeout;
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in (host, port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match connect_address(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn connect_address(address: &SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(address, timeout)
}

/// Like `UnixStream::connect`, which would wait for ever where the server does not accept.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    let address = match bytes.strip_prefix(b"\0") {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(path),
    };
    let address = address.map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path of the socket is too long, or has a NUL inside")
    })?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(socket.as_fd(), Timeout::Send, Some(timeout))?;
    match connect(socket.as_fd(), &address) {
        Ok(()) => Ok(UnixStream::from(socket)),
        // This is how the kernel says that the time was up.
        Err(rustix::io::Errno::AGAIN) => Err(io::ErrorKind::TimedOut.into()),
        Err(e) => Err(e.into()),
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.read(buf),
            Socket::Unix(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.write(buf),
            Socket::Unix(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
