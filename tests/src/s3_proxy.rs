//! What comes between an object store and who uses it: time, refusals, and cuts before and after the store has done what it was asked.
//!
//! One request a connection: what the store answers is passed on to its end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use crate::random::Random;

/// What may become of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// 500, and nothing was done.
    Error,
    /// 503, "SlowDown".
    Throttled,
    /// The connection ends before the store hears of it.
    CutBefore,
    /// The store does it, and the answer is lost.
    CutAfter,
    /// The store does it, and says 500.
    DoneAndError,
    /// The answer ends in the midst.
    CutAnswer,
    /// It takes a while.
    Slow,
}

const ALL: [Fault; 7] = [
    Fault::Error,
    Fault::Throttled,
    Fault::CutBefore,
    Fault::CutAfter,
    Fault::DoneAndError,
    Fault::CutAnswer,
    Fault::Slow,
];

struct Shared {
    to: u16,
    /// Microseconds that each request takes longer.
    delay: AtomicU64,
    /// Of a thousand requests so many meet a fault.
    faults: AtomicU32,
    random: Mutex<Random>,
    requests: AtomicU64,
    met: AtomicU64,
    /// The next request of that method whose path has this in it meets this.
    next: Mutex<Option<(String, String, Fault)>>,
    /// Whether nothing is answered any more.
    is_silent: AtomicBool,
    /// Whether who is refused for a condition is told that he has succeeded.
    ignores_conditions: AtomicBool,
    /// Whether who says in quotes which version he means is refused.
    refuses_quotes: AtomicBool,
    stop: AtomicBool,
}

/// Listens at a port of its own until it is dropped.
pub struct S3Proxy {
    shared: Arc<Shared>,
    port: u16,
}

impl S3Proxy {
    /// One before the store that listens at that port.
    pub fn before(to: u16) -> S3Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            to,
            delay: AtomicU64::new(0),
            faults: AtomicU32::new(0),
            random: Mutex::new(Random::new(1)),
            requests: AtomicU64::new(0),
            met: AtomicU64::new(0),
            next: Mutex::new(None),
            is_silent: AtomicBool::new(false),
            ignores_conditions: AtomicBool::new(false),
            refuses_quotes: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let listening = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                if listening.stop.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(connection), shared) = (connection, listening.clone()) else { continue };
                thread::spawn(move || {
                    let _ = serve(&shared, &connection);
                    let _ = connection.shutdown(Shutdown::Both);
                });
            }
        });
        S3Proxy { shared, port }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Each request takes so much longer.
    pub fn delay(&self, by: Duration) {
        self.shared.delay.store(u64::try_from(by.as_micros()).unwrap(), Ordering::Relaxed);
    }

    /// Of a thousand requests so many meet a fault, by chance.
    pub fn faults(&self, of_a_thousand: u32) {
        self.shared.faults.store(of_a_thousand, Ordering::Relaxed);
    }

    /// The next request of that method whose path has this in it meets that fault.
    pub fn next(&self, method: &str, path: &str, fault: Fault) {
        *self.shared.next.lock() = Some((method.into(), path.into(), fault));
    }

    /// From now on it looks like a store that knows no conditions.
    pub fn ignore_conditions(&self) {
        self.shared.ignores_conditions.store(true, Ordering::Relaxed);
    }

    /// From now on it refuses who says in quotes which version he means to replace.
    pub fn refuse_quotes(&self) {
        self.shared.refuses_quotes.store(true, Ordering::Relaxed);
    }

    /// From now on it takes what comes, and answers nothing; or it does again.
    pub fn fall_silent(&self, is_silent: bool) {
        self.shared.is_silent.store(is_silent, Ordering::Relaxed);
    }

    /// Whether what was said of the next one has happened.
    pub fn has_met(&self) -> bool {
        self.shared.next.lock().is_none()
    }

    /// Requests so far, and how many of them met a fault.
    pub fn count(&self) -> (u64, u64) {
        (self.shared.requests.load(Ordering::Relaxed), self.shared.met.load(Ordering::Relaxed))
    }
}

impl Drop for S3Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn fault(&self, line: &str) -> Option<Fault> {
        let mut next = self.next.lock();
        if let Some((method, path, fault)) = &*next
            && line.starts_with(method.as_str())
            && line.contains(path.as_str())
        {
            let fault = *fault;
            *next = None;
            return Some(fault);
        }
        let mut random = self.random.lock();
        let meets = random.below(1000) < u64::from(self.faults.load(Ordering::Relaxed));
        meets.then(|| ALL[random.index(ALL.len())])
    }
}

fn serve(shared: &Shared, client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(256 << 10, client);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let mut head = line.clone();
    let mut length = 0u64;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        if header.trim_end().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap_or((&header, ""));
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap_or(0),
            "connection" => continue,
            _ => {}
        }
        head.push_str(&header);
    }
    head.push_str("Connection: close\r\n\r\n");
    while shared.is_silent.load(Ordering::Relaxed) && !shared.stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
    }
    if shared.refuses_quotes.load(Ordering::Relaxed) && head.to_ascii_lowercase().contains("\nif-match: \"") {
        io::copy(&mut reader.take(length), &mut io::sink())?;
        return refuse(client, "412 Precondition Failed", "PreconditionFailed");
    }
    let fault = shared.fault(&line);
    shared.met.fetch_add(u64::from(fault.is_some()), Ordering::Relaxed);
    thread::sleep(Duration::from_micros(shared.delay.load(Ordering::Relaxed)));
    match fault {
        Some(Fault::CutBefore) => return Ok(()),
        Some(Fault::Error | Fault::Throttled) => {
            io::copy(&mut reader.take(length), &mut io::sink())?;
            let (status, code) = match fault {
                Some(Fault::Throttled) => ("503 Service Unavailable", "SlowDown"),
                _ => ("500 Internal Server Error", "InternalError"),
            };
            return refuse(client, status, code);
        }
        Some(Fault::Slow) => thread::sleep(Duration::from_millis(700)),
        _ => {}
    }
    let upstream = TcpStream::connect(("127.0.0.1", shared.to))?;
    upstream.set_nodelay(true)?;
    (&upstream).write_all(head.as_bytes())?;
    io::copy(&mut reader.take(length), &mut &upstream)?;
    match fault {
        Some(Fault::CutAfter) => io::copy(&mut &upstream, &mut io::sink()).map(drop),
        Some(Fault::DoneAndError) => {
            io::copy(&mut &upstream, &mut io::sink())?;
            refuse(client, "500 Internal Server Error", "InternalError")
        }
        Some(Fault::CutAnswer) => {
            let mut answer = Vec::new();
            (&upstream).read_to_end(&mut answer)?;
            let mut client = client;
            client.write_all(&answer[..answer.len() / 2])
        }
        _ if shared.ignores_conditions.load(Ordering::Relaxed) => {
            let mut answer = Vec::new();
            (&upstream).read_to_end(&mut answer)?;
            if answer.starts_with(b"HTTP/1.1 412") {
                answer = b"HTTP/1.1 200 OK\r\nETag: \"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
            }
            let mut client = client;
            client.write_all(&answer)
        }
        _ => pass(&upstream, client),
    }
}

/// Passes an answer on, in large pieces.
fn pass(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}

fn refuse(mut client: &TcpStream, status: &str, code: &str) -> io::Result<()> {
    let body = format!("<Error><Code>{code}</Code><Message>said by the proxy</Message></Error>");
    let length = body.len();
    write!(client, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}
