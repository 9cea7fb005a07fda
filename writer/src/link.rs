//! A connection that carries messages, for those who wait: two tasks of the network's runtime read and write, and hand on over
//! bounded channels. So a peer that does not read, or sends faster than it is listened to, is held back by TCP.

use std::io;
use std::time::Duration;

use reseal_proto::wire::{FromSource, FromTarget, HEADER_LENGTH, Header, Side, Violation};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, copy, sink, split};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A side that has nothing to say says so this often.
const ALIVE: Duration = Duration::from_secs(15);
/// A peer from which nothing comes, or which takes nothing, for so long is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a peer may take to read a last message.
const FAREWELL: Duration = Duration::from_secs(5);
/// Messages that wait on either side: enough that neither waits for the other, and few, for one may have a megabyte.
const WAITING: usize = 8;
/// As much of a message as is made room for before it is there.
const PIECE: usize = 64 << 10;

/// Why nothing more comes.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The connection ended, or nobody answers.
    Lost(io::Error),
    /// The peer sent what it must not.
    Broken(Violation),
    /// This side is about to stop.
    Stopping,
}

/// A message that can be read.
pub(crate) trait Incoming: Sized + Send + 'static {
    /// Who sends it.
    const SIDE: Side;
    /// What this side says when it has nothing to say.
    fn alive() -> Vec<u8>;
    fn decode(header: Header, payload: &[u8]) -> Result<Self, Violation>;
    fn is_alive(&self) -> bool;
}

impl Incoming for FromSource {
    const SIDE: Side = Side::Source;

    fn alive() -> Vec<u8> {
        FromTarget::Alive.encode()
    }

    fn decode(header: Header, payload: &[u8]) -> Result<FromSource, Violation> {
        FromSource::decode(header, payload)
    }

    fn is_alive(&self) -> bool {
        *self == FromSource::Alive
    }
}

impl Incoming for FromTarget {
    const SIDE: Side = Side::Target;

    fn alive() -> Vec<u8> {
        FromSource::Alive.encode()
    }

    fn decode(header: Header, payload: &[u8]) -> Result<FromTarget, Violation> {
        FromTarget::decode(header, payload)
    }

    fn is_alive(&self) -> bool {
        *self == FromTarget::Alive
    }
}

/// What comes from the peer. Dropped, it ends the reading.
pub(crate) struct Inbox<I> {
    messages: mpsc::Receiver<Result<I, Ended>>,
    reader: JoinHandle<()>,
}

/// What goes to the peer. When all are dropped, what is under way is sent, and the connection is shut down.
pub(crate) type Outbox = mpsc::Sender<Vec<u8>>;

impl<I: Incoming> Inbox<I> {
    /// The next message.
    pub(crate) fn next(&mut self) -> Result<I, Ended> {
        let ended = || Err(Ended::Lost(io::ErrorKind::UnexpectedEof.into()));
        self.messages.blocking_recv().unwrap_or_else(ended)
    }

    /// Gives the peer a while to read what was sent last: were the connection closed with bytes of the peer unread, that
    /// would be lost.
    pub(crate) fn farewell(mut self, runtime: &Handle) {
        let drain = async { while self.messages.recv().await.is_some_and(|message| message.is_ok()) {} };
        let _ = runtime.block_on(async { timeout(FAREWELL, drain).await });
    }
}

impl<I> Drop for Inbox<I> {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Carries messages over a stream until either end has enough. A change of `stop` ends the reading.
pub(crate) fn carry<I: Incoming, S: AsyncRead + AsyncWrite + Send + 'static>(
    runtime: &Handle,
    stream: S,
    stop: Option<watch::Receiver<bool>>,
) -> (Inbox<I>, Outbox) {
    let (from, to) = split(stream);
    let (incoming, messages) = mpsc::channel(WAITING);
    let (outbox, outgoing) = mpsc::channel(WAITING);
    let reader = runtime.spawn(read_all::<I, _>(from, incoming, stop));
    runtime.spawn(async move {
        // Whoever sends learns it from the channel, and why from the other half.
        let _ = write_all(to, outgoing, I::alive()).await;
    });
    (Inbox { messages, reader }, outbox)
}

async fn read_all<I: Incoming, S: AsyncRead>(
    mut from: ReadHalf<S>,
    to: mpsc::Sender<Result<I, Ended>>,
    stop: Option<watch::Receiver<bool>>,
) {
    loop {
        let read = read_one::<I, S>(&mut from);
        let message = match stop.clone() {
            None => read.await,
            Some(mut stop) => tokio::select! {
                message = read => message,
                _ = stop.wait_for(|stop| *stop) => Err(Ended::Stopping),
            },
        };
        if message.as_ref().is_ok_and(Incoming::is_alive) {
            continue;
        }
        let (is_last, is_lost) = (message.is_err(), matches!(message, Err(Ended::Lost(_))));
        if to.send(message).await.is_err() || is_lost {
            return;
        }
        if is_last {
            // So that the peer can read why.
            let _ = timeout(FAREWELL, copy(&mut from, &mut sink())).await;
            return;
        }
    }
}

async fn patiently<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let silent = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "nobody answers"));
    timeout(SILENCE, what).await.unwrap_or_else(silent)
}

async fn read_one<I: Incoming, S: AsyncRead>(from: &mut ReadHalf<S>) -> Result<I, Ended> {
    let mut header = [0; HEADER_LENGTH];
    patiently(from.read_exact(&mut header)).await.map_err(Ended::Lost)?;
    let header = Header::decode(I::SIDE, header).map_err(Ended::Broken)?;
    let mut payload = Vec::new();
    while payload.len() < header.payload() {
        // Room is made as it comes, and not as is claimed.
        let (at, piece) = (payload.len(), (header.payload() - payload.len()).min(PIECE.max(payload.len())));
        payload.resize(at + piece, 0);
        patiently(from.read_exact(&mut payload[at..])).await.map_err(Ended::Lost)?;
    }
    I::decode(header, &payload).map_err(Ended::Broken)
}

async fn write_all<S: AsyncWrite>(
    mut to: WriteHalf<S>,
    mut from: mpsc::Receiver<Vec<u8>>,
    alive: Vec<u8>,
) -> io::Result<()> {
    loop {
        let message = match timeout(ALIVE, from.recv()).await {
            Err(_) => alive.clone(),
            Ok(Some(message)) => message,
            Ok(None) => return patiently(to.shutdown()).await,
        };
        for piece in message.chunks(PIECE) {
            patiently(to.write_all(piece)).await?;
        }
        if from.is_empty() {
            patiently(to.flush()).await?;
        }
    }
}
