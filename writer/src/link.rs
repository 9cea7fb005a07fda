//! A connection that carries messages, for those who wait: two tasks of the network's runtime read and write, and hand on over
//! bounded channels. So a peer that does not read, or sends faster than it is listened to, is held back by TCP.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
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
pub(crate) const WAITING: usize = 8;
/// How long what is being written when this side ends the connection may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// As much of a message as is made room for before it is there.
const PIECE: usize = 64 << 10;
/// A message whose buffer is worth keeping, and one that is kept for as long as the connection lasts.
const LARGE: usize = 512 << 10;
const LARGEST: usize = 2 << 20;

/// Why nothing more comes.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The connection ended, or nobody answers.
    Lost(io::Error),
    /// The peer sent what it must not.
    Broken(Violation),
    /// This side ends it.
    Told(Why),
}

/// Why this side ends a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The program is about to stop.
    Stopping,
    /// The peer may not do any more what it does.
    NotAllowed,
    /// The tenant was erased, or is gone.
    Lost,
    /// It has lasted as long as one may.
    TooLong,
}

/// Tells of bytes that came; until when to wait before more is read.
pub(crate) type Pace = Arc<dyn Fn(usize) -> Option<Instant> + Send + Sync>;

/// What one who has many connections holds of each.
#[derive(Clone)]
pub(crate) struct Reins {
    /// Says why when the connection is to end.
    pub ending: watch::Receiver<Option<Why>>,
    pub pace: Pace,
    /// Messages that may wait.
    pub waiting: usize,
    /// Answers that may.
    pub outgoing: usize,
}

impl Reins {
    async fn ending(&self) -> Why {
        let mut ending = self.ending.clone();
        match ending.wait_for(Option::is_some).await.map(|why| *why) {
            Ok(Some(why)) => why,
            // Whoever would say it is gone: nothing ends it but the peer.
            _ => std::future::pending().await,
        }
    }
}

async fn told(reins: Option<&Reins>) -> Why {
    match reins {
        Some(reins) => reins.ending().await,
        None => std::future::pending().await,
    }
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
#[derive(Clone)]
pub(crate) struct Outbox {
    messages: mpsc::Sender<Vec<u8>>,
    used: Used,
}

/// Buffers of messages that were sent, to be used again: memory that is new costs more than what is written to it. Those that are
/// waiting to be sent are no more than [`WAITING`], so these are few, too.
type Used = Arc<Mutex<Vec<Vec<u8>>>>;

impl Outbox {
    /// Sends a message; waits where too many wait already. An error if none is sent any more.
    pub(crate) fn blocking_send(&self, message: Vec<u8>) -> Result<(), Closed> {
        self.messages.blocking_send(message).map_err(|_| Closed)
    }

    /// A buffer for a large message, with whatever is in it.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        self.used.lock().pop().unwrap_or_else(|| Vec::with_capacity(LARGE))
    }
}

/// Nothing is sent any more.
#[derive(Debug)]
pub(crate) struct Closed;

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

/// Carries messages over a stream until either end has enough.
pub(crate) fn carry<I: Incoming, S: AsyncRead + AsyncWrite + Send + 'static>(
    runtime: &Handle,
    stream: S,
    reins: Option<Reins>,
) -> (Inbox<I>, Outbox) {
    let (from, to) = split(stream);
    let (incoming, messages) = mpsc::channel(reins.as_ref().map_or(WAITING, |reins| reins.waiting));
    let most = reins.as_ref().map_or(WAITING, |reins| reins.outgoing);
    let (outgoing, messages_out) = mpsc::channel(most);
    let outbox = Outbox { messages: outgoing, used: Used::default() };
    let used = outbox.used.clone();
    let reader = runtime.spawn(read_all::<I, _>(from, incoming, reins.clone()));
    runtime.spawn(async move {
        // Whoever sends learns it from the channel, and why from the other half.
        let _ = write_all(to, (messages_out, used), I::alive(), reins).await;
    });
    (Inbox { messages, reader }, outbox)
}

async fn read_all<I: Incoming, S: AsyncRead>(
    mut from: ReadHalf<S>,
    to: mpsc::Sender<Result<I, Ended>>,
    reins: Option<Reins>,
) {
    let mut payload = Vec::new();
    loop {
        if payload.capacity() > LARGEST {
            payload = Vec::new();
        }
        let message = tokio::select! {
            biased;
            why = told(reins.as_ref()) => Err(Ended::Told(why)),
            message = read_one::<I, S>(&mut from, &mut payload, reins.as_ref().map(|reins| &reins.pace)) => message,
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

/// Waits, where bytes came faster than they may.
async fn keep_pace(pace: Option<&Pace>, bytes: usize) {
    if let Some(until) = pace.and_then(|pace| pace(bytes)) {
        tokio::time::sleep_until(until.into()).await;
    }
}

async fn read_one<I: Incoming, S: AsyncRead>(
    from: &mut ReadHalf<S>,
    payload: &mut Vec<u8>,
    pace: Option<&Pace>,
) -> Result<I, Ended> {
    let mut header = [0; HEADER_LENGTH];
    patiently(from.read_exact(&mut header)).await.map_err(Ended::Lost)?;
    keep_pace(pace, HEADER_LENGTH).await;
    let header = Header::decode(I::SIDE, header).map_err(Ended::Broken)?;
    payload.clear();
    while payload.len() < header.payload() {
        // Room is made as it comes, and not as is claimed.
        let piece = (header.payload() - payload.len()).min(PIECE);
        let read = patiently(read_piece(from, piece, payload)).await;
        read.map_err(Ended::Lost)?;
        // Piece by piece, so that the peer sees something taken however slow it is to be.
        keep_pace(pace, piece).await;
    }
    I::decode(header, payload).map_err(Ended::Broken)
}

/// Appends exactly so many bytes.
async fn read_piece<S: AsyncRead>(from: &mut ReadHalf<S>, bytes: usize, to: &mut Vec<u8>) -> io::Result<()> {
    to.reserve(bytes);
    let mut piece = from.take(bytes as u64);
    while piece.limit() > 0 {
        if piece.read_buf(to).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

async fn write_all<S: AsyncWrite>(
    mut to: WriteHalf<S>,
    (mut from, used): (mpsc::Receiver<Vec<u8>>, Used),
    alive: Vec<u8>,
    reins: Option<Reins>,
) -> io::Result<()> {
    loop {
        let message = match timeout(ALIVE, from.recv()).await {
            Err(_) => alive.clone(),
            Ok(Some(message)) => message,
            Ok(None) => return patiently(to.shutdown()).await,
        };
        let write = async {
            for piece in message.chunks(PIECE) {
                patiently(to.write_all(piece)).await?;
            }
            if from.is_empty() {
                patiently(to.flush()).await?;
            }
            io::Result::Ok(())
        };
        let told = async {
            told(reins.as_ref()).await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            biased;
            written = write => written?,
            // A peer that takes nothing must not hold up the end.
            () = told => return Err(io::ErrorKind::TimedOut.into()),
        }
        if (LARGE..=LARGEST).contains(&message.capacity()) {
            let mut used = used.lock();
            if used.len() < WAITING {
                used.push(message);
            }
        }
    }
}
