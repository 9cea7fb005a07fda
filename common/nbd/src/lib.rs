//! Reading an export of an NBD server.
//!
//! ```text
//! URI → socket → TLS → handshake → Export → pump: requests ⇉ replies → buffers, extents
//! (uri) (socket) (wire, tls) (connection)   (pump, flight, coverage)     (taker, extents)
//! ```
//!
//! Synchronous: one thread a connection, which sends while it may and otherwise receives, so that data go from the socket
//! straight into the caller's buffer. [`patience`] limits how long a server is waited for.
//!
//! No crate that exists serves: `nbd` and `tokio-nbd` know neither structured replies with meta contexts nor a client with TLS,
//! and libnbd is C with GnuTLS.
//!
//! Architecture invariant: only reads are sent, so that all that was in flight on a connection that broke is sent again.
//! A server that breaks the protocol is not asked again.

mod connection;
mod coverage;
mod error;
mod extents;
mod flight;
mod patience;
mod pump;
pub mod server;
mod socket;
mod taker;
mod tls;
mod uri;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use zeroize::Zeroizing;

pub use error::NbdError;
pub use extents::Extent;
pub use reseal_proto::nbd::handshake::Refusal;
pub use taker::Taker;
pub use tls::{TlsFiles, TlsFirst};
pub use uri::{NbdUri, is_uri};

use connection::{Connection, Facts, Target};
use tls::Tls;

/// Requests of at most 256 KiB on each connection. Measured with one to four connections to `qemu-nbd`: 4 to 64 differ by
/// less than repeated runs do. More would let one connection take what others could do; fewer would not fill a long line.
const IN_FLIGHT: usize = 8;

/// How an export is read.
#[derive(Debug, Clone)]
pub struct Options {
    pub tls: TlsFiles,
    /// Most connections at once.
    pub connections: usize,
    /// Longest silence of a server that owes something, and longest time to connect.
    pub timeout: Duration,
    /// How long a lost connection is tried to be made again.
    pub give_up: Duration,
    /// Requests that are under way on each connection.
    pub in_flight: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            tls: TlsFiles::default(),
            connections: 4,
            timeout: Duration::from_secs(30),
            give_up: Duration::from_secs(60),
            in_flight: IN_FLIGHT,
        }
    }
}

/// What is asked of an export.
pub enum Request<T> {
    Read(Read<T>),
    /// What is at these bytes; answered on a channel of its own.
    Status {
        offset: u64,
        length: u64,
        answer: Sender<Result<Vec<Extent>, NbdError>>,
    },
}

/// A read, and what was read.
pub struct Read<T> {
    pub offset: u64,
    /// As long as what is read; comes back filled.
    pub buffer: Zeroizing<Vec<u8>>,
    pub tag: T,
}

/// An export that is open: length, constraints and contexts are known; the first connection waits to be used.
pub struct Export {
    target: Target,
    options: Options,
    facts: Facts,
    pool: Mutex<Pool>,
    /// How many pumps have ended; whoever only helps them needs not wait any longer then.
    ended: AtomicU64,
    /// Something failed for good.
    stopped: AtomicBool,
    reconnected: AtomicU64,
}

#[derive(Default)]
struct Pool {
    /// Connections that nobody uses.
    idle: Vec<Connection>,
    /// Pumps that have a connection, or make it again.
    serving: usize,
}

/// How a pump comes to its first connection.
enum Start<'a> {
    Idle(Box<Connection>, Serving<'a>),
    /// Others serve: if there can't be one more connection, they do without.
    Help,
    /// Nobody else does.
    Alone(Serving<'a>),
}

/// Counts a pump that serves, for as long as it lives.
struct Serving<'a>(&'a Export);

impl Serving<'_> {
    fn new<'a>(export: &'a Export, pool: &mut Pool) -> Serving<'a> {
        pool.serving += 1;
        Serving(export)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.pool.lock().serving -= 1;
    }
}

impl Export {
    /// Connects, once, and opens the export. `base:allocation` is used where it is offered; a dirty bitmap that is asked for
    /// must be there.
    pub fn open(uri: &NbdUri, options: &Options, bitmap: Option<&str>) -> Result<Export, NbdError> {
        let tls = Tls::of(uri, &options.tls)?;
        Export::open_target(Target::new(uri, tls, bitmap), options)
    }

    /// The same without a bitmap, but where the server can tell what changed since a restore point, it is asked to:
    /// [`Export::changed_since`].
    pub fn open_asking_since(uri: &NbdUri, options: &Options) -> Result<Export, NbdError> {
        let tls = Tls::of(uri, &options.tls)?;
        let mut target = Target::new(uri, tls, None);
        target.asks_since = true;
        Export::open_target(target, options)
    }

    /// The same where TLS comes first; the files for TLS of the options are not used.
    pub fn open_tls(first: &TlsFirst, options: &Options) -> Result<Export, NbdError> {
        Export::open_target(Target::tls_first(first)?, options)
    }

    fn open_target(mut target: Target, options: &Options) -> Result<Export, NbdError> {
        let mut first = target.connect(options.timeout, &|| false)?;
        // Every further connection must have this same context.
        target.asks_since = false;
        target.bitmap = first.since.take().or(target.bitmap);
        let facts = first.facts;
        Ok(Export {
            target,
            options: options.clone(),
            facts,
            pool: Mutex::new(Pool { idle: vec![first], serving: 0 }),
            ended: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            reconnected: AtomicU64::new(0),
        })
    }

    /// The URI as shown to people.
    pub fn name(&self) -> &str {
        &self.target.name
    }

    /// Bytes of the export.
    pub fn length(&self) -> u64 {
        self.facts.size
    }

    /// Whether holes can be told from data.
    pub fn has_allocation(&self) -> bool {
        self.facts.allocation
    }

    /// Whether what changed can be told from what did not.
    pub fn tells_changes(&self) -> bool {
        self.target.bitmap.is_some()
    }

    /// Since when, if the server said so itself, in reseal's words.
    pub fn changed_since(&self) -> Option<&str> {
        self.target.bitmap.as_deref()?.strip_prefix(reseal_proto::nbd::CHANGED_SINCE)
    }

    /// How many pumps are worth having.
    pub fn connections(&self) -> usize {
        if self.facts.multi { self.options.connections.max(1) } else { 1 }
    }

    /// How many times a connection was lost and made again.
    pub fn reconnected(&self) -> u64 {
        self.reconnected.load(Ordering::Relaxed)
    }

    /// Serves requests over one connection until the channel is closed. To be called from as many threads as
    /// [`Export::connections`] says.
    ///
    /// What fails for good is told to `taker`, which may be a channel, and as the answer to each status that was asked for;
    /// then this returns. After that the export is of no use.
    pub fn pump<T: Send>(&self, requests: &Receiver<Request<T>>, taker: &dyn Taker<T>) {
        let connection = pump::Pump::new(self, requests, taker).run(self.start());
        self.pool.lock().idle.extend(connection);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    /// Lets the pumps end soon, whatever they wait for. For a caller that no longer wants what it asked for; what is under way
    /// is not answered.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Makes the export usable again after all pumps ended because nobody wanted what they read.
    pub fn restart(&self) {
        self.stopped.store(false, Ordering::Relaxed);
    }

    fn start(&self) -> Start<'_> {
        let mut pool = self.pool.lock();
        match pool.idle.pop() {
            Some(connection) => Start::Idle(Box::new(connection), Serving::new(self, &mut pool)),
            None if pool.serving > 0 => Start::Help,
            None => Start::Alone(Serving::new(self, &mut pool)),
        }
    }

    /// One connection more, of the same export.
    fn connect(&self, timeout: Duration, stop: &dyn Fn() -> bool) -> Result<Connection, NbdError> {
        let connection = self.target.connect(timeout, stop)?;
        self.facts.same(&connection.facts, &self.target)?;
        Ok(connection)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.pool.get_mut().idle.drain(..).for_each(Connection::close);
    }
}
