//! Asks a guest, over and over, whether it is there.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reseal_qmp::Agent;

/// How long an agent may take to answer. Where none is there yet, its answer would never come.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a connection is left open for its first byte before it is made anew.
const BANNER: Duration = Duration::from_secs(5);

/// What is asked.
pub(super) enum Question {
    /// The guest's agent, at that socket.
    Agent(PathBuf),
    /// The port of this machine that is forwarded to the guest's.
    Port(u16),
}

/// A guest that is asked, on a thread of its own, until it has answered or this is dropped.
pub(super) struct Probe {
    stopped: Arc<AtomicBool>,
    answered: Arc<AtomicBool>,
}

impl Probe {
    /// Begins to ask.
    pub(super) fn start(question: Question) -> std::io::Result<Probe> {
        let probe = Probe { stopped: Arc::default(), answered: Arc::default() };
        let (stopped, answered) = (probe.stopped.clone(), probe.answered.clone());
        let ask = move || {
            while !stopped.load(Ordering::Relaxed) {
                let found = match &question {
                    Question::Agent(socket) => agent(socket),
                    Question::Port(port) => sends(*port, &stopped),
                };
                if found {
                    return answered.store(true, Ordering::Relaxed);
                }
                thread::sleep(PAUSE);
            }
        };
        thread::Builder::new().name("probe".into()).spawn(ask)?;
        Ok(probe)
    }

    /// Whether it has answered.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Whether the agent has answered, in step with the question.
fn agent(socket: &Path) -> bool {
    Agent::connect(socket, Instant::now() + ANSWER).is_ok()
}

/// Whether a byte comes from a port by itself, as from most servers that greet. A connection alone tells nothing: this machine takes it
/// before the guest is asked.
fn sends(port: u16, stopped: &AtomicBool) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Ok(mut stream) = TcpStream::connect_timeout(&address, ANSWER) else { return false };
    if stream.set_read_timeout(Some(PAUSE)).is_err() {
        return false;
    }
    let end = Instant::now() + BANNER;
    while Instant::now() < end && !stopped.load(Ordering::Relaxed) {
        match stream.read(&mut [0]) {
            Ok(length) => return length > 0,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(_) => return false,
        }
    }
    false
}
