//! The socket of one client, which several threads read, write and shut down at once.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::ServeError;

/// Silence after which the kernel asks a TCP peer whether it is still there: an idle client may stay, a dead one not.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Longest single wait of whoever has to look at the time.
const SLICE: Duration = Duration::from_secs(1);
/// Bytes that a client must take within the time limit: one at a time is as good as none.
const PROGRESS: usize = 64 << 10;

/// A connected stream socket.
pub(super) struct Endpoint {
    fd: OwnedFd,
}

impl Endpoint {
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Endpoint> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
        Endpoint::of(stream.into())
    }

    pub(super) fn unix(stream: UnixStream) -> io::Result<Endpoint> {
        stream.set_nonblocking(false)?;
        Endpoint::of(stream.into())
    }

    fn of(fd: OwnedFd) -> io::Result<Endpoint> {
        sockopt::set_socket_timeout(&fd, Timeout::Send, Some(SLICE))?;
        Ok(Endpoint { fd })
    }

    /// Wakes whoever waits for the client, and ends what it sends and receives.
    pub(super) fn shut_down(&self) {
        // Fails if the client has gone already.
        let _ = shutdown(&self.fd, Shutdown::Both);
    }

    /// What has come, as soon as something has; 0 at the end.
    pub(super) fn receive(&self, buf: &mut [u8]) -> Result<usize, ServeError> {
        loop {
            match recv(&self.fd, &mut *buf, RecvFlags::empty()) {
                Ok((_, got)) => return Ok(got),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(0),
                Err(e) => return Err(ServeError::Io(e.into())),
            }
        }
    }

    /// Whether something has come, or the end.
    pub(super) fn has_input(&self) -> bool {
        recv(&self.fd, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
    }

    /// What [`Endpoint::receive`] gives, until a moment.
    pub(super) fn receive_until(&self, buf: &mut [u8], until: Instant) -> Result<usize, ServeError> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ServeError::Slow);
            }
            // A timeout of zero would be none.
            self.set_patience(Some(left.max(Duration::from_millis(1))))?;
            match recv(&self.fd, &mut *buf, RecvFlags::empty()) {
                Ok((_, got)) => return Ok(got),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::CONNRESET) => return Ok(0),
                Err(e) => return Err(ServeError::Io(e.into())),
            }
        }
    }

    /// How long [`Endpoint::receive`] waits; `None` for ever.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> Result<(), ServeError> {
        sockopt::set_socket_timeout(&self.fd, Timeout::Recv, patience).map_err(|e| ServeError::Io(e.into()))
    }

    /// Sends all. A client that takes too little for so long is given up.
    pub(super) fn send(&self, bytes: &[u8], patience: Duration) -> Result<(), ServeError> {
        let mut rest = bytes;
        let (mut until, mut taken) = (None, 0);
        while !rest.is_empty() {
            match send(&self.fd, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    taken += sent;
                    if taken >= PROGRESS {
                        (until, taken) = (None, 0);
                    }
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ServeError::Gone),
                Err(e) => return Err(ServeError::Io(e.into())),
            }
            // Looked at only where one call was not enough.
            if !rest.is_empty() && Instant::now() >= *until.get_or_insert_with(|| Instant::now() + patience) {
                return Err(ServeError::Stalled(patience));
            }
        }
        Ok(())
    }
}
