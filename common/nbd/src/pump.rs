//! One connection at work: requests from a channel to the server, replies to buffers, and a new connection for a broken one.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use reseal_proto::nbd::{
    BlockStatus, CHUNK_LENGTH, Chunk, ChunkKind, Errno, ErrorChunk, HOLE_LENGTH, Hole, OFFSET_LENGTH, REPLY_START,
    Reply, Violation, decode_offset,
};

use crate::connection::Connection;
use crate::flight::{Done, Flights, Job, MAX_TRIES};
use crate::patience::Patience;
use crate::wire::WireError;
use crate::{Export, NbdError, Request, Serving, Start, Taker};

/// Wait before a lost connection is made again, doubled each time it is in vain.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long a wait may go on after it has become pointless.
const NAP: Duration = Duration::from_millis(50);

/// Why a connection serves no more.
enum End {
    /// It is lost; another may do.
    Lost(String),
    /// It is hopeless.
    Fatal(NbdError),
    /// Nobody wants the results.
    Unwanted,
}

impl From<NbdError> for End {
    fn from(error: NbdError) -> End {
        End::Fatal(error)
    }
}

/// Since when nothing has succeeded, and how long to wait next.
struct Backoff {
    since: Cell<Option<Instant>>,
    wait: Duration,
}

pub(crate) struct Pump<'a, T> {
    export: &'a Export,
    requests: &'a Receiver<Request<T>>,
    taker: &'a dyn Taker<T>,
    flights: Flights<T>,
    backoff: Backoff,
    /// The channel of requests is closed.
    closed: bool,
    /// Requests that go out together.
    batch: Vec<u8>,
    /// Payloads other than data.
    payload: Vec<u8>,
}

impl<'a, T: Send> Pump<'a, T> {
    pub(crate) fn new(export: &'a Export, requests: &'a Receiver<Request<T>>, taker: &'a dyn Taker<T>) -> Pump<'a, T> {
        Pump {
            export,
            requests,
            taker,
            flights: Flights::new(),
            backoff: Backoff { since: Cell::new(None), wait: FIRST_WAIT },
            closed: false,
            batch: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// Serves until the channel is closed. Returns a connection that can be used again.
    pub(crate) fn run(mut self, start: Start<'a>) -> Option<Connection> {
        match self.serve_all(start) {
            Ok(connection) => connection,
            Err(End::Fatal(error)) => {
                self.export.stop();
                for asker in self.flights.askers() {
                    // Who does not wait any more needs no answer.
                    let _ = asker.send(Err(error.clone()));
                }
                self.taker.over(error);
                None
            }
            Err(End::Unwanted | End::Lost(_)) => {
                self.export.stop();
                None
            }
        }
    }

    fn serve_all(&mut self, start: Start<'a>) -> Result<Option<Connection>, End> {
        let (mut connection, _serving) = match start {
            Start::Idle(connection, serving) => (*connection, serving),
            Start::Alone(serving) => (self.reconnect("it was not connected")?, serving),
            Start::Help => match self.one_more()? {
                Some(started) => started,
                None => return Ok(None),
            },
        };
        loop {
            match self.serve(&mut connection) {
                Ok(()) => return Ok(Some(connection)),
                Err(End::Lost(reason)) => {
                    drop(connection);
                    self.flights.send_again().map_err(|bytes| {
                        let (start, end) = (bytes.start, bytes.end);
                        self.export.target.unreachable(format!(
                            "{MAX_TRIES} connections were lost with bytes {start} to {end} asked for, the last because \
                             {reason}"
                        ))
                    })?;
                    connection = self.reconnect(&reason)?;
                    self.export.reconnected.fetch_add(1, Ordering::Relaxed);
                }
                Err(end) => return Err(end),
            }
        }
    }

    /// A connection beside others. Servers may limit how many there are; that is no error.
    fn one_more(&self) -> Result<Option<(Connection, Serving<'a>)>, End> {
        let export = self.export;
        let ended = export.ended.load(Ordering::Relaxed);
        let stop = || export.is_stopped() || export.ended.load(Ordering::Relaxed) != ended;
        match export.connect(export.options.timeout, &stop) {
            Ok(connection) => Ok(Some((connection, Serving::new(export, &mut export.pool.lock())))),
            Err(NbdError::Unreachable { .. } | NbdError::Refused { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn reconnect(&mut self, reason: &str) -> Result<Connection, End> {
        let export = self.export;
        let since = self.backoff.since.get().unwrap_or_else(Instant::now);
        self.backoff.since.set(Some(since));
        let give_up = export.options.give_up;
        let stop = || export.is_stopped();
        let mut last = reason.to_owned();
        loop {
            let left = give_up.saturating_sub(since.elapsed());
            if left.is_zero() {
                let what = format!("{last} (the connection was lost {} s ago: {reason})", since.elapsed().as_secs());
                return Err(export.target.unreachable(what).into());
            }
            let wait = self.backoff.wait.min(left);
            self.backoff.wait = (self.backoff.wait * 2).min(LONGEST_WAIT);
            nap(wait, &stop)?;
            match export.connect(export.options.timeout.min(left.max(NAP)), &stop) {
                Ok(connection) => return Ok(connection),
                Err(_) if stop() => return Err(End::Unwanted),
                Err(NbdError::Unreachable { reason, .. }) => last = reason,
                Err(e) if e.is_passing() => last = e.to_string(),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends and receives until the channel is closed and all is answered.
    fn serve(&mut self, connection: &mut Connection) -> Result<(), End> {
        let export = self.export;
        let stop = || export.is_stopped();
        let mut patience = Patience::new(export.options.timeout, &stop);
        loop {
            self.fill()?;
            if !self.batch.is_empty() {
                if self.flights.under_way() == self.batch.len() / reseal_proto::nbd::REQUEST_LENGTH {
                    patience.renew();
                }
                let sent = connection.wire.send(&self.batch, &mut patience);
                self.batch.clear();
                sent.map_err(|e| self.lost(e))?;
            }
            if self.flights.under_way() > 0 {
                self.receive(connection, &mut patience)?;
            } else if self.closed {
                return Ok(());
            }
        }
    }

    /// Puts as many requests into the batch as may be under way. Waits for one only where nothing is.
    fn fill(&mut self) -> Result<(), End> {
        let most = self.export.options.in_flight.max(1);
        while self.flights.under_way() < most {
            if self.flights.has_waiting() {
                self.flights.send_next(&mut self.batch);
                continue;
            }
            let next = match self.flights.under_way() {
                _ if self.closed => return Ok(()),
                0 => self.wait()?,
                _ => self.requests.try_recv(),
            };
            match next {
                Ok(request) => self.take(request)?,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => self.closed = true,
            }
        }
        Ok(())
    }

    /// Waits for a request, unless that has become pointless.
    fn wait(&self) -> Result<Result<Request<T>, TryRecvError>, End> {
        loop {
            match self.requests.recv_timeout(NAP) {
                Ok(request) => return Ok(Ok(request)),
                Err(RecvTimeoutError::Disconnected) => return Ok(Err(TryRecvError::Disconnected)),
                Err(RecvTimeoutError::Timeout) if self.export.is_stopped() => return Err(End::Unwanted),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn take(&mut self, request: Request<T>) -> Result<(), End> {
        if let Err(error) = self.check(&request) {
            if let Request::Status { answer, .. } = request {
                let _ = answer.send(Err(error.clone()));
            }
            return Err(error.into());
        }
        let facts = &self.export.facts;
        let contexts = facts.allocation || self.export.target.bitmap.is_some();
        match self.flights.take(request, facts, contexts) {
            Some(Job::Read { read, .. }) => self.deliver(Done::Read(read)),
            Some(Job::Status { area, answer }) => self.deliver(Done::Status(Ok(area.extents(None, None)), answer)),
            None => Ok(()),
        }
    }

    /// An error if a request is not one that may be sent.
    fn check(&self, request: &Request<T>) -> Result<(), NbdError> {
        let (offset, length, aligned) = match request {
            Request::Read(read) => (read.offset, read.buffer.len() as u64, true),
            Request::Status { offset, length, .. } => (*offset, *length, false),
        };
        let facts = &self.export.facts;
        let size = facts.size;
        if offset.checked_add(length).is_none_or(|end| end > size) || (!aligned && length == 0) {
            let what = format!("{length} bytes from {offset} on are not inside of its {size} bytes");
            return Err(NbdError::Usage(format!("{}: {what}", self.export.name())));
        }
        let minimum = u64::from(facts.block_size.minimum);
        if aligned && !(offset.is_multiple_of(minimum) && length.is_multiple_of(minimum)) {
            let what = format!("{length} bytes from {offset} on are not in blocks of {minimum} bytes, as it demands");
            return Err(NbdError::Usage(format!("{}: {what}", self.export.name())));
        }
        Ok(())
    }

    /// Takes one reply, or one chunk of one.
    fn receive(&mut self, connection: &mut Connection, patience: &mut Patience<'_>) -> Result<(), End> {
        let mut header = [0; CHUNK_LENGTH];
        let (start, _) = header.split_at_mut(REPLY_START);
        connection.wire.read_exact(start, patience).map_err(|e| self.lost(e))?;
        let [a, b, c, d, ..] = header;
        let length = Reply::length([a, b, c, d]).map_err(|e| self.violation(&e))?;
        connection.wire.read_exact(&mut header[REPLY_START..length], patience).map_err(|e| self.lost(e))?;
        match Reply::decode(&header[..length]).map_err(|e| self.violation(&e))? {
            Reply::Simple { error, cookie } => self.simple(connection, patience, error, cookie),
            Reply::Chunk(chunk) => self.chunk(connection, patience, chunk),
        }
    }

    fn simple(
        &mut self,
        connection: &mut Connection,
        patience: &mut Patience<'_>,
        error: Errno,
        cookie: u64,
    ) -> Result<(), End> {
        let piece = self.flights.piece(cookie).map_err(|e| self.nonsense(e))?;
        if error.is_error() {
            self.failed(cookie, ErrorChunk { error, text: String::new(), offset: None })?;
            return self.finish(cookie, patience);
        }
        if self.export.facts.structured {
            return Err(self.nonsense("a reply that is not structured, though that was agreed".into()));
        }
        let bytes = piece.ask.bytes();
        let placed = self.flights.place(cookie, bytes.start, bytes.end - bytes.start);
        let read = placed.map(|buf| connection.wire.read_content(buf, patience));
        self.arrived(read)?;
        self.finish(cookie, patience)
    }

    fn chunk(&mut self, connection: &mut Connection, patience: &mut Patience<'_>, chunk: Chunk) -> Result<(), End> {
        let Chunk { done, kind, cookie, length } = chunk;
        if !self.export.facts.structured {
            return Err(self.nonsense("a structured reply, though that was not agreed".into()));
        }
        self.flights.piece(cookie).map_err(|e| self.nonsense(e))?;
        match kind {
            ChunkKind::None => {}
            ChunkKind::Data => {
                let mut offset = [0; OFFSET_LENGTH];
                connection.wire.read_exact(&mut offset, patience).map_err(|e| self.lost(e))?;
                let bytes = u64::from(length) - OFFSET_LENGTH as u64;
                let placed = self.flights.place(cookie, decode_offset(offset), bytes);
                let read = placed.map(|buf| connection.wire.read_content(buf, patience));
                self.arrived(read)?;
            }
            ChunkKind::Hole => {
                let mut payload = [0; HOLE_LENGTH];
                connection.wire.read_exact(&mut payload, patience).map_err(|e| self.lost(e))?;
                let hole = Hole::decode(&payload).map_err(|e| self.violation(&e))?;
                let placed = self.flights.place(cookie, hole.offset, hole.length.into());
                // The buffer may hold what was in it before.
                placed.map(|buf| buf.fill(0)).map_err(|e| nonsense(self.export, e))?;
            }
            ChunkKind::BlockStatus => {
                self.payload(connection, patience, length)?;
                let status = BlockStatus::decode(&self.payload).map_err(|e| self.violation(&e))?;
                let ids = (connection.allocation, connection.dirty);
                let taken = self.flights.status(cookie, status, ids, &self.export.facts);
                taken.map_err(|e| self.nonsense(e))?;
            }
            ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError(_) => {
                self.payload(connection, patience, length)?;
                let error = ErrorChunk::decode(kind, &self.payload).map_err(|e| self.violation(&e))?;
                self.failed(cookie, error)?;
            }
        }
        if done { self.finish(cookie, patience) } else { Ok(()) }
    }

    /// Reads a payload whose length the codec has limited.
    fn payload(&mut self, connection: &mut Connection, patience: &mut Patience<'_>, length: u32) -> Result<(), End> {
        self.payload.clear();
        self.payload.resize(usize::try_from(length).unwrap_or(0), 0);
        let read = connection.wire.read_content(&mut self.payload, patience);
        read.map_err(|e| self.lost(e))
    }

    fn arrived(&self, read: Result<Result<(), WireError>, String>) -> Result<(), End> {
        match read {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(self.lost(e)),
            Err(e) => Err(self.nonsense(e)),
        }
    }

    fn finish(&mut self, cookie: u64, patience: &mut Patience<'_>) -> Result<(), End> {
        let contexts = (self.export.facts.allocation, self.export.target.bitmap.is_some());
        let done = self.flights.finish(cookie, contexts).map_err(|e| self.nonsense(e))?;
        self.backoff.since.set(None);
        self.backoff.wait = FIRST_WAIT;
        if let Some(done) = done {
            self.deliver(done)?;
        }
        // Only now: the caller may have kept us waiting, not the server.
        patience.renew();
        Ok(())
    }

    fn deliver(&self, done: Done<T>) -> Result<(), End> {
        match done {
            Done::Read(read) => match self.taker.read(read) {
                true => Ok(()),
                false => Err(End::Unwanted),
            },
            Done::Failed(tag, error) => {
                self.taker.failed(tag, error);
                Ok(())
            }
            Done::Status(extents, answer) => {
                // Who does not wait any more needs no answer.
                let _ = answer.send(extents);
                Ok(())
            }
        }
    }

    /// The server can't do what it was asked: noted with the request, or the end, as whoever takes the answers wants it.
    fn failed(&mut self, cookie: u64, error: ErrorChunk) -> Result<(), End> {
        if error.error == Errno::SHUTDOWN {
            return Err(End::Lost("the server is shutting down".into()));
        }
        let piece = self.flights.piece(cookie).map_err(|e| nonsense(self.export, e))?;
        let bytes = piece.ask.bytes();
        let action = piece.ask.action();
        let offset = match error.offset {
            Some(offset) if !bytes.contains(&offset) => {
                return Err(self.nonsense(format!("an error at byte {offset}, which was not asked for")));
            }
            offset => offset.unwrap_or(bytes.start),
        };
        let text = if error.text.is_empty() { String::new() } else { format!(" (it says: {})", error.text) };
        let uri = self.export.name().to_owned();
        let failed = NbdError::Failed { uri, action, offset, end: bytes.end, errno: error.error, text };
        match self.taker.outlives_failures() {
            true => self.flights.fail(cookie, failed).map_err(|e| nonsense(self.export, e)),
            false => Err(failed.into()),
        }
    }

    fn lost(&self, error: WireError) -> End {
        match error {
            WireError::Stopped => End::Unwanted,
            // A session that was up and then got a record that can't be is as broken as one that was closed.
            e => End::Lost(e.to_string()),
        }
    }

    fn violation(&self, violation: &Violation) -> End {
        self.nonsense(violation.to_string())
    }

    fn nonsense(&self, what: String) -> End {
        nonsense(self.export, what)
    }
}

fn nonsense(export: &Export, what: String) -> End {
    End::Fatal(export.target.protocol(what))
}

/// Waits, unless it has become pointless.
fn nap(wait: Duration, stop: &dyn Fn() -> bool) -> Result<(), End> {
    let until = Instant::now() + wait;
    loop {
        if stop() {
            return Err(End::Unwanted);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(NAP));
    }
}
