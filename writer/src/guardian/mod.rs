//! A process beside the writer that undoes what the writer began with a VM if the writer dies.
//!
//! ```text
//! writer:   start → plan … freeze → thaw … plan … done
//! guardian: ready              frozen  thawed          or, when the writer is gone: thaw, undo, end
//! ```
//!
//! It is connected by a socket that nobody else holds: when that closes, the writer is dead. It freezes and thaws
//! itself, and holds the deadline, so a stopped writer leaves no guest frozen either. It does not outlive its work.

mod message;
mod process;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub use message::{Freezer, Plan, Undo};
pub use process::run;
pub use reseal_cli::ProcessId;

use message::{Reply, Request};

/// How long the guardian may take to be there.
const START: Duration = Duration::from_secs(15);
/// How long after a freeze's own limits an answer is waited for.
const GRACE: Duration = Duration::from_secs(15);
/// How long a thaw may take.
const THAW: Duration = Duration::from_secs(75);
/// How long it may take to end.
const END: Duration = Duration::from_secs(5);
/// Longest answer of a guardian.
const MAX_REPLY: usize = 64 << 10;

/// The guardian could not do it.
#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    #[error("can't {action} the guardian process: {source}")]
    Process { action: &'static str, source: std::io::Error },
    #[error("{0}")]
    Refused(String),
}

fn process(action: &'static str) -> impl FnOnce(std::io::Error) -> GuardianError {
    move |source| GuardianError::Process { action, source }
}

/// The writer's end.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    stream: BufReader<UnixStream>,
    id: ProcessId,
    frozen: Option<Freezer>,
}

impl Guardian {
    /// Starts one from `program`, which is `reseal` itself. It has no plan yet.
    pub fn start(program: &Path) -> Result<Guardian, GuardianError> {
        let (own, other) = UnixStream::pair().map_err(process("connect to"))?;
        let mut command = Command::new(program);
        // It holds neither keys nor plaintext.
        command.args(["--allow-swap", "guardian"]).stdin(Stdio::from(OwnedFd::from(other))).stdout(Stdio::null());
        let child = command.spawn().map_err(process("start"))?;
        // The command still holds the other end, and would keep it open.
        drop(command);
        let id = ProcessId::of(child.id()).map_err(process("look at"))?;
        let mut guardian = Guardian { child, stream: BufReader::new(own), id, frozen: None };
        match guardian.reply(START)? {
            Reply::Ready => Ok(guardian),
            other => Err(GuardianError::Refused(format!("the guardian process began with {other:?}"))),
        }
    }

    /// Which process it is.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    fn send(&mut self, request: &Request) -> Result<(), GuardianError> {
        let mut line = serde_json::to_vec(request).map_err(|e| process("describe work to")(e.into()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(process("write to"))
    }

    fn reply(&mut self, within: Duration) -> Result<Reply, GuardianError> {
        let deadline = Instant::now() + within;
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.get_ref().set_read_timeout(Some(left)).map_err(process("read from"))?;
            match self.stream.fill_buf() {
                Ok([]) => return Err(process("read from")(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => {
                    let end = bytes.iter().position(|&byte| byte == b'\n');
                    let taken = end.map_or(bytes.len(), |end| end + 1);
                    line.extend_from_slice(&bytes[..taken]);
                    self.stream.consume(taken);
                    if end.is_some() || line.len() > MAX_REPLY {
                        break;
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(process("read from")(e)),
            }
        }
        serde_json::from_slice(&line).map_err(|e| process("understand")(e.into()))
    }

    /// Replaces what it does if the writer dies. Once this returned, it will do so.
    pub fn plan(&mut self, plan: Plan) -> Result<(), GuardianError> {
        self.send(&Request::Plan(plan))
    }

    /// Freezes the guest's file systems for at most `limit`; how many. `answer` is how long the agent may take to give
    /// a sign of life.
    pub fn freeze(&mut self, how: &Freezer, answer: Duration, limit: Duration) -> Result<u64, GuardianError> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.frozen = Some(how.clone());
        let request = Request::Freeze { how: how.clone(), answer_ms: millis(answer), limit_ms: millis(limit) };
        let error = match self.send(&request).and_then(|()| self.reply(answer + limit + GRACE)) {
            Ok(Reply::Frozen { count }) => return Ok(count),
            // It has thawed, or is about to.
            Ok(Reply::Failed { why }) => GuardianError::Refused(why),
            Ok(other) => GuardianError::Refused(format!("the guardian process answered {other:?} to a freeze")),
            Err(e) => {
                let _ = how.thaw();
                e
            }
        };
        self.frozen = None;
        Err(error)
    }

    /// Thaws them; whether they were frozen until now.
    pub fn thaw(&mut self) -> Result<bool, GuardianError> {
        let Some(how) = self.frozen.take() else { return Ok(false) };
        match self.send(&Request::Thaw).and_then(|()| self.reply(THAW)) {
            Ok(Reply::Thawed { in_time }) => Ok(in_time),
            Ok(Reply::Failed { why }) => Err(GuardianError::Refused(why)),
            Ok(other) => Err(GuardianError::Refused(format!("the guardian process answered {other:?} to a thaw"))),
            // Without a guardian the guest must be thawed all the same.
            Err(e) => match how.thaw() {
                Ok(()) => Err(e),
                Err(why) => Err(GuardianError::Refused(format!("{e}; and {why}"))),
            },
        }
    }

    /// Ends it: nothing is left to undo.
    pub fn done(mut self) -> Result<(), GuardianError> {
        self.send(&Request::Done)?;
        let deadline = Instant::now() + END;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => return Err(process("wait for")(e)),
            }
        }
        Err(process("wait for")(std::io::ErrorKind::TimedOut.into()))
    }
}
