//! Serving disks to NBD clients, to be read and, where a disk can be, written to.
//!
//! ```text
//! socket → TLS → handshake: which export → requests → several threads → disk → replies
//! (endpoint, stream) (negotiate)           (session, budget)         (disk)
//! restore points as disks: name → point → disk reader               (point_name, point_exports, vault_disk)
//! ```
//!
//! Synchronous: the read path is, and a thread that has a request in its hands needs no other to answer it. Whoever accepts
//! connections makes a [`Connection`] of each and gives it a thread of its own.
//!
//! Architecture invariant: a reply holds bytes that the disk gave, whole, or an error; never what was in the buffer before. What
//! a client sends decides no allocation beyond [`MAX_READ`] at a time, and no more of them than [`Limits::in_flight`].

mod budget;
mod disk;
mod endpoint;
mod error;
mod negotiate;
mod point_exports;
mod point_name;
mod session;
mod stream;
mod tls;
mod vault_disk;

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection};

pub use disk::{Change, Disk, DiskError, Exports, NotOpened, Owner, Stretch};
pub use error::ServeError;
pub use point_exports::{PointExports, Scope};
pub use point_name::{PointDisk, SinceDisk, export_name};
pub use reseal_proto::nbd::Errno;
pub use reseal_proto::nbd::serve::Listed;
pub use tls::ServerTls;
pub use vault_disk::VaultDisk;

use endpoint::Endpoint;
use negotiate::negotiate;
use session::Session;
use stream::{Receiving, Sending, Stream};

/// Longest read that is answered, and longest write that is taken.
pub const MAX_READ: u32 = 32 << 20;

/// Threads for one client at least: more than there may be cores, for some wait for the storage, or for a flush.
const THREADS: usize = 8;

/// Whether a client that came in the clear gets TLS.
#[derive(Clone)]
pub enum StartTls {
    Never,
    /// If it asks.
    Offered(Arc<ServerConfig>),
    /// Before anything else.
    Demanded(Arc<ServerConfig>),
}

/// What one client may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Threads that work on its requests: as many are under way at once.
    pub threads: usize,
    /// Longest read, of which clients are told.
    pub max_read: u32,
    /// Bytes that its reads and writes under way may have; never less than the longest one.
    pub in_flight: usize,
    /// How long it may take to open an export, apart from what the server itself takes for it.
    pub handshake: Duration,
    /// How long it may leave a reply untaken. A client that wants nothing may stay.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            threads: std::thread::available_parallelism().map_or(THREADS, usize::from).max(THREADS),
            max_read: MAX_READ,
            in_flight: 64 << 20,
            handshake: Duration::from_secs(30),
            patience: Duration::from_secs(60),
        }
    }
}

/// What all connections have in common.
pub struct Service {
    pub exports: Arc<dyn Exports>,
    pub owner: Arc<dyn Owner>,
    pub tls: StartTls,
    pub limits: Limits,
}

/// A client that has connected.
pub struct Connection {
    endpoint: Arc<Endpoint>,
    tls: Option<ServerConnection>,
    stopped: Arc<AtomicBool>,
}

/// Ends a connection from another thread.
#[derive(Clone)]
pub struct Stopper {
    endpoint: Arc<Endpoint>,
    stopped: Arc<AtomicBool>,
}

impl Stopper {
    /// Ends it: what is being answered is not answered any more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.endpoint.shut_down();
    }
}

impl Connection {
    /// A client on a Unix socket.
    pub fn unix(stream: UnixStream) -> io::Result<Connection> {
        Ok(Connection::of(Endpoint::unix(stream)?, None))
    }

    /// A client on TCP, in the clear.
    pub fn tcp(stream: TcpStream) -> io::Result<Connection> {
        Ok(Connection::of(Endpoint::tcp(stream)?, None))
    }

    /// A client on TCP whose TLS handshake is done. What TLS has received already counts.
    pub fn tls(stream: TcpStream, tls: ServerConnection) -> io::Result<Connection> {
        Ok(Connection::of(Endpoint::tcp(stream)?, Some(tls)))
    }

    fn of(endpoint: Endpoint, tls: Option<ServerConnection>) -> Connection {
        Connection { endpoint: Arc::new(endpoint), tls, stopped: Arc::default() }
    }

    /// Something that ends it.
    pub fn stopper(&self) -> Stopper {
        Stopper { endpoint: self.endpoint.clone(), stopped: self.stopped.clone() }
    }

    /// Serves until the client has gone, or is stopped, which both are no errors.
    pub fn serve(mut self, service: &Service) -> Result<(), ServeError> {
        let result = self.run(service);
        // Also where it ended before there was a session.
        self.endpoint.shut_down();
        match self.stopped.load(Ordering::SeqCst) {
            true => Ok(()),
            false => result,
        }
    }

    fn run(&mut self, service: &Service) -> Result<(), ServeError> {
        let mut stream = Stream::new(self.endpoint.clone(), self.tls.take());
        let (mut receiving, mut sending) = (Receiving::new(), Sending::default());
        let opened = negotiate(service, &mut stream, &mut receiving, &mut sending);
        let Some(opened) = opened? else {
            stream.close(&mut sending);
            return Ok(());
        };
        stream.endpoint().set_patience(None)?;
        service.owner.opened(opened.disk.name());
        Session::new(service, &stream, &opened, receiving, sending).run(service.limits.threads.max(1))
    }
}
