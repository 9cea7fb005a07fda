//! Disks in memory that tests serve, and a client that says whatever a test wants.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use parking_lot::Mutex;
use reseal_nbd::server::{
    Change, Connection, Disk, DiskError, Exports, Limits, Listed, NotOpened, Owner, ServeError, Service, StartTls,
    Stopper, Stretch,
};
use reseal_proto::nbd::*;

use crate::server::Place;

/// A hole is at least so long.
pub(crate) const BLOCK: usize = 4096;

type Hook = dyn Fn(u64, usize) -> Result<(), DiskError> + Send + Sync;

/// A disk in memory, whose zero blocks are holes.
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    /// Called before each read.
    pub(crate) before: Box<Hook>,
    /// From which byte on nothing can be read at once, and how often something was.
    pub(crate) waits_from: u64,
    pub(crate) at_once: AtomicU64,
    /// It tells its changes.
    pub(crate) is_written: bool,
}

impl Model {
    /// A third data that can be told apart, a third holes, a third data, and an end that is no multiple of anything.
    pub(crate) fn new() -> Model {
        let size = 6 * BLOCK * 100 + 777;
        let mut bytes: Vec<u8> = (0..size).map(|at| u8::try_from((at / 7 + at / 4099) % 251 + 1).unwrap()).collect();
        bytes[2 * BLOCK * 100..4 * BLOCK * 100].fill(0);
        // A short hole in data.
        bytes[10 * BLOCK..11 * BLOCK].fill(0);
        Model { bytes, before: Box::new(|_, _| Ok(())), waits_from: 0, at_once: AtomicU64::new(0), is_written: false }
    }

    pub(crate) fn with(before: impl Fn(u64, usize) -> Result<(), DiskError> + Send + Sync + 'static) -> Model {
        Model { before: Box::new(before), ..Model::new() }
    }

    fn range(&self, offset: u64, length: usize) -> &[u8] {
        let start = usize::try_from(offset).unwrap();
        &self.bytes[start..start + length]
    }
}

impl Disk for Model {
    fn name(&self) -> &str {
        "model"
    }

    fn description(&self) -> Option<String> {
        Some("a disk in memory".into())
    }

    fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        (self.before)(offset, out.len())?;
        out.copy_from_slice(self.range(offset, out.len()));
        Ok(())
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Option<Result<(), DiskError>> {
        if offset >= self.waits_from {
            return None;
        }
        self.at_once.fetch_add(1, Ordering::Relaxed);
        Some(self.read(offset, out))
    }

    fn changed_since(&self) -> Option<String> {
        self.is_written.then(|| SINCE.to_owned())
    }

    fn changes(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Change>, DiskError> {
        let (mut at, end, mut found) = (offset, offset + length, Vec::new());
        while at < end && found.len() < most {
            let block = at / BLOCK as u64;
            let next = ((block + 1) * BLOCK as u64).min(end);
            found.push(Change { length: next - at, changed: block % 2 == 1 });
            at = next;
        }
        Ok(found)
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        let end = offset + length;
        let (mut at, mut found) = (offset, Vec::<Stretch>::new());
        while at < end {
            let block = at - at % BLOCK as u64;
            let next = (block + BLOCK as u64).min(end);
            let whole = (BLOCK as u64).min(self.length() - block);
            let hole = self.range(block, usize::try_from(whole).unwrap()).iter().all(|byte| *byte == 0);
            let is_full = found.len() == most;
            match found.last_mut() {
                Some(last) if last.hole == hole => last.length += next - at,
                _ if is_full => break,
                _ => found.push(Stretch { length: next - at, hole }),
            }
            at = next;
        }
        Ok(found)
    }
}

/// What the model says of its changes: the disk of a point, and that each other block was written.
pub(crate) const SINCE: &str = "07070707070707070707070707070707/vm@3/model";

/// One export, `model`, which is also the default.
pub(crate) struct One(pub(crate) Arc<Model>);

impl Exports for One {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        match name {
            "" | "model" => Ok(self.0.clone()),
            "broken" => Err(NotOpened::Failed("the reason of the owner".into())),
            "secret" => Err(NotOpened::Forbidden("not for you".into())),
            "late" => Err(NotOpened::Ending),
            _ => Err(NotOpened::Unknown("there is only model".into())),
        }
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        Ok(vec![Listed { name: "model".into(), description: "a disk in memory".into() }])
    }
}

/// What the owner was told.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) failed: Mutex<Vec<String>>,
    pub(crate) sent: AtomicU64,
}

impl Owner for Heard {
    fn failed(&self, what: &str) {
        self.failed.lock().push(what.to_owned());
    }

    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A server of one disk on a Unix socket.
pub(crate) struct Served {
    pub(crate) place: Place,
    pub(crate) model: Arc<Model>,
    pub(crate) heard: Arc<Heard>,
    /// How each connection ended.
    pub(crate) ends: Receiver<Result<(), ServeError>>,
    pub(crate) stoppers: Receiver<Stopper>,
}

impl Served {
    pub(crate) fn new(model: Model) -> Served {
        Served::with(Place::new(), model, StartTls::Never, Limits { threads: 4, ..Limits::default() })
    }

    pub(crate) fn with(place: Place, model: Model, tls: StartTls, limits: Limits) -> Served {
        let (model, heard) = (Arc::new(model), Arc::new(Heard::default()));
        let service = Service { exports: Arc::new(One(model.clone())), owner: heard.clone(), tls, limits };
        let (ends, stoppers) = listen(&place, service);
        Served { place, model, heard, ends, stoppers }
    }

    /// How the next connection that ends has ended.
    pub(crate) fn end(&self) -> Result<(), ServeError> {
        self.ends.recv_timeout(Duration::from_secs(20)).expect("the connection ends")
    }

    /// A client that has said nothing yet.
    pub(crate) fn connect(&self) -> Talker<UnixStream> {
        Talker::connect(&self.place)
    }

    /// A client that has opened the disk, with structured replies and `base:allocation` or with neither.
    pub(crate) fn open(&self, structured: bool) -> Talker<UnixStream> {
        let mut talker = self.connect();
        talker.greet(true);
        talker.go("model", structured);
        talker
    }
}

/// Serves at a place's socket; how each connection ends, and what ends it.
pub(crate) fn listen(place: &Place, service: Service) -> (Receiver<Result<(), ServeError>>, Receiver<Stopper>) {
    let service = Arc::new(service);
    let listener = UnixListener::bind(place.socket()).unwrap();
    let (end, ends) = unbounded();
    let (stopper, stoppers) = unbounded();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let connection = Connection::unix(stream.unwrap()).unwrap();
            let _ = stopper.send(connection.stopper());
            let (service, end) = (service.clone(), end.clone());
            std::thread::spawn(move || end.send(connection.serve(&service)));
        }
    });
    (ends, stoppers)
}

/// A client of few words.
pub(crate) struct Talker<S>(pub(crate) S);

impl Talker<UnixStream> {
    /// One that has said nothing yet.
    pub(crate) fn connect(place: &Place) -> Talker<UnixStream> {
        let stream = UnixStream::connect(place.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Talker(stream)
    }
}

/// What came back for a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Simple(u64, Errno),
    Chunk(u64, ChunkKind, Vec<u8>),
}

impl<S: Read + Write> Talker<S> {
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        // A server that hangs up meanwhile is what some tests want.
        let _ = self.0.write_all(bytes);
    }

    pub(crate) fn hear<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn hear_of(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The server says no more.
    pub(crate) fn is_over(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }

    pub(crate) fn greet(&mut self, no_zeroes: bool) {
        let greeting = Greeting::decode(&self.hear::<GREETING_LENGTH>()).unwrap();
        assert!(greeting.fixed_newstyle && greeting.no_zeroes);
        self.say(&ClientFlags { fixed_newstyle: true, no_zeroes }.encode());
    }

    /// Sends an option and takes all its replies.
    pub(crate) fn ask(&mut self, option: &OptionRequest) -> Vec<OptionReply> {
        self.say(&option.encode());
        self.replies(option.kind())
    }

    pub(crate) fn replies(&mut self, kind: OptionKind) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::decode(&self.hear::<OPTION_REPLY_HEADER_LENGTH>()).unwrap();
            assert_eq!(header.option, kind);
            let data = self.hear_of(header.length);
            replies.push(OptionReply::decode(header.kind, &data).unwrap());
            if matches!(replies.last(), Some(OptionReply::Ack | OptionReply::Error { .. })) {
                return replies;
            }
        }
    }

    pub(crate) fn go(&mut self, export: &str, structured: bool) -> Vec<OptionReply> {
        if structured {
            assert_eq!(self.ask(&OptionRequest::StructuredReply), [OptionReply::Ack]);
            let query = MetaQuery { export: export.into(), queries: vec![BASE_ALLOCATION.into()] };
            let selected = self.ask(&OptionRequest::SetMetaContext(query));
            assert_eq!(selected.len(), 2, "{selected:?}");
        }
        let request = InfoRequest { export: export.into(), wanted: vec![info::BLOCK_SIZE, info::NAME] };
        let replies = self.ask(&OptionRequest::Go(request));
        assert_eq!(replies.last(), Some(&OptionReply::Ack), "{replies:?}");
        replies
    }

    pub(crate) fn send(&mut self, command: Command, flags: CommandFlags, cookie: u64, offset: u64, length: u32) {
        self.say(&Request { command, flags, cookie, offset, length }.encode());
    }

    /// The next reply; `data` follows a simple one that is no error.
    pub(crate) fn answer(&mut self) -> Answer {
        let start = self.hear::<REPLY_START>();
        let rest = self.hear_of(Reply::length(start).unwrap() - REPLY_START);
        match Reply::decode(&[&start[..], &rest].concat()).unwrap() {
            Reply::Simple { error, cookie } => Answer::Simple(cookie, error),
            Reply::Chunk(chunk) => {
                assert!(chunk.done, "each reply is one chunk");
                Answer::Chunk(chunk.cookie, chunk.kind, self.hear_of(chunk.length as usize))
            }
        }
    }

    /// Sends a request and takes the reply to it.
    pub(crate) fn request(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u32) -> Answer {
        self.send(command, flags, 7, offset, length);
        self.answer()
    }
}

/// The error of a reply.
pub(crate) fn errno(answer: &Answer) -> Errno {
    match answer {
        Answer::Simple(_, error) => *error,
        Answer::Chunk(_, kind @ (ChunkKind::Error | ChunkKind::ErrorOffset), payload) => {
            ErrorChunk::decode(*kind, payload).unwrap().error
        }
        Answer::Chunk(..) => Errno::NONE,
    }
}

/// Waits for something that other threads do.
pub(crate) fn wait_until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
