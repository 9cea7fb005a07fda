//! A server that lies, in each way that matters: a clear error within the time limit, never a panic or a hang.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use parking_lot::Mutex;
use reseal_nbd::{Export, Extent, NbdError, Options, Read, Request as NbdRequest, Taker};
use reseal_proto::nbd::*;
use zeroize::Zeroizing;

use crate::reading::{extents, impatient, read_all};
use crate::server::Place;

const SIZE: u64 = 1 << 20;

type Talk = dyn Fn(&mut UnixStream, Request) + Send + Sync;

/// A server that opens an export as told and then does what `talk` does with each request.
#[derive(Clone)]
struct Liar {
    size: Arc<dyn Fn(usize) -> u64 + Send + Sync>,
    structured: bool,
    minimum: u32,
    /// `talk` is asked about extents too; otherwise all is data.
    about_extents: bool,
    talk: Arc<Talk>,
    connections: Arc<AtomicUsize>,
}

impl Liar {
    fn new(talk: impl Fn(&mut UnixStream, Request) + Send + Sync + 'static) -> Liar {
        Liar {
            size: Arc::new(|_| SIZE),
            structured: true,
            minimum: 1,
            about_extents: false,
            talk: Arc::new(talk),
            connections: Arc::default(),
        }
    }

    fn listen(&self, place: &Place) {
        let listener = UnixListener::bind(place.socket()).unwrap();
        let liar = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (liar, stream) = (liar.clone(), stream.unwrap());
                let number = liar.connections.fetch_add(1, Ordering::Relaxed);
                // A client that hangs up is what these tests want.
                std::thread::spawn(move || liar.serve(stream, number));
            }
        });
    }

    fn serve(&self, mut stream: UnixStream, number: usize) -> std::io::Result<()> {
        stream.write_all(&Greeting { fixed_newstyle: true, no_zeroes: true }.encode())?;
        stream.read_exact(&mut [0; CLIENT_FLAGS_LENGTH])?;
        loop {
            let mut header = [0; OPTION_HEADER_LENGTH];
            stream.read_exact(&mut header)?;
            let header = OptionHeader::decode(&header).unwrap();
            let mut data = vec![0; header.length];
            stream.read_exact(&mut data)?;
            let option = OptionRequest::decode(header.kind, &data).unwrap();
            let go = matches!(option, OptionRequest::Go(_));
            let unsupported = OptionReply::Error { error: OptionError::Unsupported, text: String::new() };
            let replies = match option {
                OptionRequest::StructuredReply if !self.structured => vec![unsupported],
                OptionRequest::SetMetaContext(_) => {
                    vec![OptionReply::MetaContext { id: 5, name: BASE_ALLOCATION.into() }, OptionReply::Ack]
                }
                OptionRequest::Go(_) => {
                    let (size, flags) = ((self.size)(number), ExportFlags::HAS_FLAGS);
                    let block_size = BlockSize { minimum: self.minimum, preferred: 4096, maximum: 1 << 20 };
                    vec![
                        OptionReply::Info(Info::Export { size, flags }),
                        OptionReply::Info(Info::BlockSize(block_size)),
                        OptionReply::Ack,
                    ]
                }
                _ => vec![OptionReply::Ack],
            };
            for reply in replies {
                stream.write_all(&reply.encode(header.kind))?;
            }
            if go {
                break;
            }
        }
        loop {
            let mut request = [0; REQUEST_LENGTH];
            stream.read_exact(&mut request)?;
            let request = Request::decode(&request).unwrap();
            match request.command {
                Command::BlockStatus if !self.about_extents => status(&mut stream, request, &[(request.length, 0)]),
                Command::Disconnect => return Ok(()),
                _ => (self.talk)(&mut stream, request),
            }
        }
    }
}

fn send(stream: &mut UnixStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

fn chunk(stream: &mut UnixStream, request: Request, done: bool, kind: ChunkKind, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap();
    send(stream, &Reply::Chunk(Chunk { done, kind, cookie: request.cookie, length }).encode());
    send(stream, payload);
}

fn data(stream: &mut UnixStream, request: Request, done: bool, offset: u64, length: u32) {
    let mut payload = offset.to_be_bytes().to_vec();
    payload.resize(8 + length as usize, 0x55);
    chunk(stream, request, done, ChunkKind::Data, &payload);
}

fn status(stream: &mut UnixStream, request: Request, extents: &[(u32, u32)]) {
    let descriptors = extents.iter().map(|&(length, flags)| Descriptor { length, flags }).collect();
    chunk(stream, request, true, ChunkKind::BlockStatus, &BlockStatus { context: 5, descriptors }.encode());
}

/// Reads from a liar; the error must come in time.
fn error_of(liar: &Liar) -> NbdError {
    let place = Place::new();
    liar.listen(&place);
    let began = Instant::now();
    let error = Export::open(&place.uri(""), &impatient(), None)
        .and_then(|export| read_all(&export, 256 << 10, |_| {}).map(drop))
        .unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}: {error}", began.elapsed());
    error
}

/// Such a lie is seen at once, and the server is not asked again.
fn lie(talk: impl Fn(&mut UnixStream, Request) + Send + Sync + 'static) -> String {
    let liar = Liar::new(talk);
    let error = error_of(&liar);
    assert!(matches!(error, NbdError::Protocol { .. }), "{error}");
    assert_eq!(liar.connections.load(Ordering::Relaxed), 1, "asked again after: {error}");
    error.to_string()
}

fn extent_lie(minimum: u32, talk: impl Fn(&mut UnixStream, Request) + Send + Sync + 'static) -> String {
    let liar = Liar { minimum, about_extents: true, ..Liar::new(talk) };
    let error = error_of(&liar);
    assert!(matches!(error, NbdError::Protocol { .. }), "{error}");
    error.to_string()
}

/// An end that is neither right nor a lie: the connection is made again until that is given up.
fn given_up(liar: &Liar) -> String {
    let error = error_of(liar);
    assert!(matches!(error, NbdError::Unreachable { .. }), "{error}");
    assert!(liar.connections.load(Ordering::Relaxed) > 1, "not tried again: {error}");
    error.to_string()
}

#[test]
fn an_honest_server_of_this_kind_is_read() {
    let place = Place::new();
    let liar = Liar::new(|stream, request| {
        // In two pieces, the last first, a hole between them and an end of its own.
        let half = request.length / 2;
        data(stream, request, false, request.offset + u64::from(half) + 100, half - 100);
        let hole = Hole { offset: request.offset + u64::from(half), length: 100 };
        chunk(stream, request, false, ChunkKind::Hole, &hole.encode());
        data(stream, request, false, request.offset, half);
        chunk(stream, request, true, ChunkKind::None, &[]);
    });
    liar.listen(&place);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let whole = read_all(&export, 256 << 10, |_| {}).unwrap();
    for part in whole.bytes.chunks(256 << 10) {
        assert!(part[..128 << 10].iter().all(|byte| *byte == 0x55));
        assert!(part[128 << 10..][..100].iter().all(|byte| *byte == 0));
        assert!(part[(128 << 10) + 100..].iter().all(|byte| *byte == 0x55));
    }
}

#[test]
fn handles_that_were_not_sent() {
    let said = lie(|stream, request| {
        let wrong = Request { cookie: request.cookie + 1000, ..request };
        data(stream, wrong, true, request.offset, request.length);
    });
    assert!(said.contains("was not sent"), "{said}");
    let said = lie(|stream, request| {
        data(stream, request, true, request.offset, request.length);
        data(stream, request, true, request.offset, request.length);
    });
    assert!(said.contains("was not sent"), "{said}");
}

#[test]
fn data_outside_of_the_request() {
    let said = lie(|stream, request| data(stream, request, true, request.offset, request.length + 1));
    assert!(said.contains("in the reply to a read"), "{said}");
    lie(|stream, request| data(stream, request, true, request.offset + 1, request.length));
    lie(|stream, request| data(stream, request, true, request.offset.wrapping_sub(1), 16));
    lie(|stream, request| data(stream, request, true, u64::MAX, 16));
    lie(|stream, request| {
        let hole = Hole { offset: request.offset, length: u32::MAX };
        chunk(stream, request, true, ChunkKind::Hole, &hole.encode());
    });
    // The length alone, without the data.
    lie(|stream, request| {
        let header = Chunk { done: true, kind: ChunkKind::Data, cookie: request.cookie, length: u32::MAX };
        send(stream, &Reply::Chunk(header).encode());
        send(stream, &request.offset.to_be_bytes());
    });
}

#[test]
fn data_that_overlap_or_are_missing() {
    let said = lie(|stream, request| {
        data(stream, request, false, request.offset, 100);
        data(stream, request, true, request.offset + 99, request.length - 99);
    });
    assert!(said.contains("came twice"), "{said}");
    let said = lie(|stream, request| data(stream, request, true, request.offset, request.length - 1));
    assert!(said.contains("without all of its bytes"), "{said}");
    lie(|stream, request| chunk(stream, request, true, ChunkKind::None, &[]));
    let said = lie(|stream, request| {
        for at in (0..request.length).step_by(2) {
            data(stream, request, false, request.offset + u64::from(at), 1);
        }
    });
    assert!(said.contains("too many small pieces"), "{said}");
}

#[test]
fn replies_of_the_wrong_kind() {
    let said = lie(|stream, request| status(stream, request, &[(request.length, 0)]));
    assert!(said.contains("extents in the reply to a read"), "{said}");
    let said = lie(|stream, request| {
        send(stream, &Reply::Simple { error: Errno::NONE, cookie: request.cookie }.encode());
        send(stream, &vec![0; request.length as usize]);
    });
    assert!(said.contains("not structured"), "{said}");
    let liar = Liar { structured: false, ..Liar::new(|stream, request| data(stream, request, true, 0, 100)) };
    let said = error_of(&liar).to_string();
    assert!(said.contains("not agreed"), "{said}");
    let said = extent_lie(1, |stream, request| data(stream, request, true, request.offset, 100));
    assert!(said.contains("question about extents"), "{said}");
    let said = lie(|stream, request| {
        let error = ErrorChunk { error: Errno::IO, text: String::new(), offset: Some(request.offset + SIZE) };
        chunk(stream, request, true, ChunkKind::ErrorOffset, &error.encode());
    });
    assert!(said.contains("which was not asked for"), "{said}");
}

#[test]
fn garbage() {
    let said = lie(|stream, _| send(stream, &[0x41; 4096]));
    assert!(said.contains("0x41414141"), "{said}");
    lie(|stream, request| {
        let mut header =
            Reply::Chunk(Chunk { done: true, kind: ChunkKind::None, cookie: request.cookie, length: 0 }).encode();
        header[7] = 99;
        send(stream, &header);
    });
    lie(|stream, request| {
        let header = Chunk { done: true, kind: ChunkKind::Error, cookie: request.cookie, length: u32::MAX };
        send(stream, &Reply::Chunk(header).encode());
    });
}

#[test]
fn extents_that_can_not_be() {
    let said = extent_lie(1, |stream, request| {
        let mut payload = 5u32.to_be_bytes().to_vec();
        payload.extend([0; 8]);
        chunk(stream, request, true, ChunkKind::BlockStatus, &payload);
    });
    assert!(said.contains("length of an extent is 0"), "{said}");
    let said = extent_lie(1, |stream, request| status(stream, request, &[(request.length + 1, 0)]));
    assert!(said.contains("beyond the end"), "{said}");
    let said = extent_lie(1, |stream, request| status(stream, request, &[(request.length, 0), (512, 0)]));
    assert!(said.contains("beyond what was asked"), "{said}");
    let said = extent_lie(4096, |stream, request| status(stream, request, &[(512, 0)]));
    assert!(said.contains("multiple of its minimum"), "{said}");
    let said = extent_lie(1, |stream, request| {
        let descriptors = vec![Descriptor { length: 512, flags: 0 }];
        chunk(stream, request, true, ChunkKind::BlockStatus, &BlockStatus { context: 6, descriptors }.encode());
    });
    assert!(said.contains("was not selected"), "{said}");
    let said = extent_lie(1, |stream, request| {
        for done in [false, true] {
            let descriptors = vec![Descriptor { length: 512, flags: 0 }];
            chunk(stream, request, done, ChunkKind::BlockStatus, &BlockStatus { context: 5, descriptors }.encode());
        }
    });
    assert!(said.contains("came twice"), "{said}");
    let said = extent_lie(1, |stream, request| chunk(stream, request, true, ChunkKind::None, &[]));
    assert!(said.contains("every context"), "{said}");
    // More extents than are ever taken.
    extent_lie(1, |stream, request| {
        let header = Chunk { done: true, kind: ChunkKind::BlockStatus, cookie: request.cookie, length: (1 << 30) + 4 };
        send(stream, &Reply::Chunk(header).encode());
    });
}

#[test]
fn silence_and_trickling() {
    let said = given_up(&Liar::new(|_, _| {}));
    assert!(said.contains("did not answer for 400 ms"), "{said}");
    // A right reply, one byte at a time.
    let said = given_up(&Liar::new(|stream, request| {
        let mut reply = Reply::Chunk(Chunk {
            done: true,
            kind: ChunkKind::Data,
            cookie: request.cookie,
            length: request.length + 8,
        })
        .encode();
        reply.extend(request.offset.to_be_bytes());
        reply.resize(reply.len() + request.length as usize, 0);
        for byte in reply {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }));
    assert!(said.contains("did not answer"), "{said}");
    // Chunks without end that say nothing.
    let said = given_up(&Liar::new(|stream, request| {
        let mut offset = request.offset;
        while offset < request.offset + 1000 {
            let hole = Hole { offset, length: 1 };
            let header = Chunk { done: false, kind: ChunkKind::Hole, cookie: request.cookie, length: 12 };
            if stream.write_all(&Reply::Chunk(header).encode()).and_then(|()| stream.write_all(&hole.encode())).is_err()
            {
                return;
            }
            offset += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
    }));
    assert!(said.contains("did not answer"), "{said}");
}

#[test]
fn early_ends() {
    let said = given_up(&Liar::new(|stream, _| drop(stream.shutdown(std::net::Shutdown::Both))));
    assert!(said.contains("closed the connection"), "{said}");
    let said = given_up(&Liar::new(|stream, request| {
        let header = Chunk { done: true, kind: ChunkKind::Data, cookie: request.cookie, length: request.length + 8 };
        send(stream, &Reply::Chunk(header).encode());
        send(stream, &request.offset.to_be_bytes());
        send(stream, &[1; 1000]);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }));
    assert!(said.contains("closed the connection"), "{said}");
    // It is about to end, and says so.
    given_up(&Liar::new(|stream, request| {
        let error = ErrorChunk { error: Errno::SHUTDOWN, text: String::new(), offset: None };
        chunk(stream, request, true, ChunkKind::Error, &error.encode());
    }));
}

#[test]
fn a_connection_lost_at_each_read_is_made_again_until_all_is_read() {
    let place = Place::new();
    // Each connection answers one read and ends.
    let liar = Liar::new(|stream, request| {
        data(stream, request, true, request.offset, request.length);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    liar.listen(&place);
    let options = Options { in_flight: 4, ..Options::default() };
    let export = Export::open(&place.uri(""), &options, None).unwrap();
    let whole = read_all(&export, 64 << 10, |_| {}).unwrap();
    assert!(whole.bytes.iter().all(|byte| *byte == 0x55));
    assert_eq!(export.reconnected(), 15);
}

#[test]
fn a_request_that_always_kills_the_connection_is_given_up() {
    let place = Place::new();
    let liar = Liar::new(|stream, request| match request.offset {
        0x8_0000 => drop(stream.shutdown(std::net::Shutdown::Both)),
        _ => data(stream, request, true, request.offset, request.length),
    });
    liar.listen(&place);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let error = read_all(&export, 64 << 10, |_| {}).unwrap_err();
    assert!(error.to_string().contains("10 connections were lost with bytes 524288 to 589824"), "{error}");
}

#[test]
fn another_size_after_a_lost_connection() {
    let mut liar = Liar::new(|stream, _| drop(stream.shutdown(std::net::Shutdown::Both)));
    liar.size = Arc::new(|number| if number == 0 { SIZE } else { SIZE * 2 });
    let error = error_of(&liar);
    assert!(matches!(error, NbdError::Changed { .. }), "{error}");
}

#[test]
fn an_export_of_no_possible_size() {
    for (size, minimum) in [(u64::MAX, 1), (SIZE + 1, 512)] {
        let mut liar = Liar { minimum, ..Liar::new(|_, _| {}) };
        liar.size = Arc::new(move |_| size);
        let error = error_of(&liar);
        assert!(matches!(error, NbdError::Protocol { .. }), "{error}");
    }
}

/// What opening gives where the server sends these bytes and waits.
fn opened_by(bytes: &'static [u8], close: bool) -> NbdError {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(bytes);
        if close {
            return;
        }
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    let began = Instant::now();
    let error = match Export::open(&place.uri(""), &impatient(), None) {
        Ok(_) => panic!("it was opened"),
        Err(e) => e,
    };
    assert!(began.elapsed() < Duration::from_secs(2));
    server.join().unwrap();
    error
}

#[test]
fn handshakes_that_lead_nowhere() {
    assert!(matches!(opened_by(b"", false), NbdError::Unreachable { .. }));
    assert!(matches!(opened_by(b"NBDM", true), NbdError::Unreachable { .. }));
    assert!(matches!(opened_by(b"HTTP/1.1 400 Bad Request\r\n", false), NbdError::Protocol { .. }));
    assert!(matches!(opened_by(b"NBDMAGICIHAVEOPT\0\x02", false), NbdError::Refused { .. }));
    // A reply to an option of almost 4 GiB.
    let huge = b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\xff\xff\xff\xff";
    let error = opened_by(huge, false);
    assert!(error.to_string().contains("claims 4294967295 bytes"), "{error}");
}

#[test]
fn a_question_while_nobody_answers_ends_too() {
    let place = Place::new();
    let liar = Liar { about_extents: true, ..Liar::new(|_, _| {}) };
    liar.listen(&place);
    let export = Export::open(&place.uri(""), &impatient(), None).unwrap();
    let error = extents(&export, 0, SIZE).unwrap_err();
    assert!(matches!(error, NbdError::Unreachable { .. }), "{error}");
}

/// Goes on after failures, and keeps what came of each read by its offset.
#[derive(Default)]
struct Patient {
    read: Mutex<Vec<(u64, bool)>>,
    over: Mutex<Option<NbdError>>,
}

impl Taker<u64> for Patient {
    fn read(&self, read: Read<u64>) -> bool {
        assert!(read.buffer.iter().all(|byte| *byte == 0x55));
        self.read.lock().push((read.tag, true));
        true
    }

    fn outlives_failures(&self) -> bool {
        true
    }

    fn failed(&self, tag: u64, error: NbdError) {
        assert!(matches!(error, NbdError::Failed { errno: Errno::IO, .. }), "{error}");
        self.read.lock().push((tag, false));
    }

    fn over(&self, error: NbdError) {
        *self.over.lock() = Some(error);
    }
}

/// Reads units of half a megabyte, two requests each, and asks once about extents.
fn read_patiently(liar: &Liar) -> (Patient, Option<Result<Vec<Extent>, NbdError>>) {
    let place = Place::new();
    liar.listen(&place);
    let export = Export::open(&place.uri(""), &impatient(), None).unwrap();
    let (request, requests) = unbounded();
    for offset in (0..SIZE).step_by(512 << 10) {
        let buffer = Zeroizing::new(vec![0; 512 << 10]);
        request.send(NbdRequest::Read(Read { offset, buffer, tag: offset })).unwrap();
    }
    let (answer, answers) = unbounded();
    request.send(NbdRequest::Status { offset: 0, length: SIZE, answer }).unwrap();
    drop(request);
    let patient = Patient::default();
    export.pump(&requests, &patient);
    drop(requests);
    (patient, answers.try_recv().ok())
}

#[test]
fn who_outlives_failures_loses_what_failed_and_nothing_else() {
    let fails = |request: &Request| request.command == Command::BlockStatus || request.offset == 256 << 10;
    let liar = Liar {
        about_extents: true,
        ..Liar::new(move |stream, request| match fails(&request) {
            true => {
                // Some of it came, then it failed, and the end comes by itself.
                if request.command == Command::Read {
                    data(stream, request, false, request.offset, 100);
                }
                let error = ErrorChunk { error: Errno::IO, text: "bad".into(), offset: None };
                chunk(stream, request, false, ChunkKind::Error, &error.encode());
                chunk(stream, request, true, ChunkKind::None, &[]);
            }
            false => data(stream, request, true, request.offset, request.length),
        })
    };
    let (patient, status) = read_patiently(&liar);
    let mut read = patient.read.into_inner();
    read.sort_unstable();
    assert_eq!(read, [(0, false), (512 << 10, true)]);
    assert!(patient.over.into_inner().is_none());
    assert!(matches!(status, Some(Err(NbdError::Failed { errno: Errno::IO, .. }))), "{status:?}");
    assert_eq!(liar.connections.load(Ordering::Relaxed), 1);

    // A lie is the end all the same.
    let (patient, status) = read_patiently(&Liar::new(|stream, request| {
        data(stream, request, true, request.offset + 1, request.length);
    }));
    assert!(matches!(patient.over.into_inner(), Some(NbdError::Protocol { .. })));
    assert!(patient.read.into_inner().is_empty() && !matches!(status, Some(Ok(_))), "{status:?}");
}
