//! The guardian's own process: `reseal guardian`, started by the writer only.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use reseal_cli::{Failure, Status};
use reseal_qmp::Agent;

use super::message::{Freezer, Plan, Reply, Request, run_command};

/// Longest request: a plan names some hundred things.
const MAX_REQUEST: usize = 4 << 20;

/// Runs the guardian on its standard input, the socket that the writer made.
pub fn run() -> Result<(), Failure> {
    let failed = |what: String| Failure::new(Status::Failed, what);
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(Failure::new(Status::Usage, "`guardian` is started by `reseal backup`, not by hand"));
    }
    detach().map_err(|e| failed(format!("can't detach from the terminal: {e}")))?;
    let stream = stdin.as_fd().try_clone_to_owned().map(UnixStream::from);
    let stream = stream.map_err(|e| failed(format!("can't take the writer's socket: {e}")))?;
    let left = serve(stream).map_err(|e| failed(format!("lost the writer: {e}")))?;
    match left.is_empty() {
        true => Ok(()),
        false => Err(failed(format!("the backup ended early, and not all could be undone: {}", left.join("; ")))),
    }
}

/// Its own session, so that no terminal's signal reaches it; and those that ask a program to end are meant for the
/// writer.
fn detach() -> io::Result<()> {
    // A leader of a group can't; then it is nobody's child in the foreground either.
    let _ = rustix::process::setsid();
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT] {
        // SAFETY: ignoring a signal installs no handler.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    std::env::set_current_dir("/")
}

/// File systems that are frozen, and until when.
struct Frozen {
    how: Freezer,
    until: Instant,
}

/// Does what the writer asks until it is done; when the writer is gone without a word, thaws and undoes. Returns what
/// could not be undone.
fn serve(stream: UnixStream) -> io::Result<Vec<String>> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let mut plan = Plan::default();
    let mut frozen: Option<Frozen> = None;
    let mut expired = false;
    answer(&stream, &Reply::Ready);
    loop {
        let request = match next_line(&mut stream, &mut line, frozen.as_ref().map(|frozen| frozen.until))? {
            Next::Line => serde_json::from_slice(&line),
            Next::Late => {
                expired = true;
                if let Some(Frozen { how, .. }) = frozen.take() {
                    // The writer hears of it when it asks for the thaw.
                    let _ = how.thaw();
                }
                continue;
            }
            Next::End => return Ok(undo(frozen, &plan)),
        };
        line.clear();
        match request {
            Ok(Request::Plan(new)) => plan = new,
            Ok(Request::Freeze { how, answer_ms, limit_ms }) => {
                expired = false;
                frozen = freeze(&stream, how, Duration::from_millis(answer_ms), Duration::from_millis(limit_ms));
            }
            Ok(Request::Thaw) => {
                let thawed = frozen.take().map_or(Ok(()), |frozen| frozen.how.thaw());
                let reply = match thawed {
                    Ok(()) => Reply::Thawed { in_time: !expired },
                    Err(why) => Reply::Failed { why },
                };
                answer(&stream, &reply);
            }
            Ok(Request::Done) => return Ok(undo(frozen, &Plan::default())),
            Err(_) => return Ok(undo(frozen, &plan)),
        }
    }
}

fn undo(frozen: Option<Frozen>, plan: &Plan) -> Vec<String> {
    let thawed = frozen.map_or(Ok(()), |frozen| frozen.how.thaw());
    let undone = plan.undo.iter().map(|step| step.carry_out());
    std::iter::once(thawed).chain(undone).filter_map(Result::err).collect()
}

/// Tells the writer. If it is gone, the next read says so.
fn answer(stream: &BufReader<UnixStream>, reply: &Reply) {
    if let Ok(mut line) = serde_json::to_vec(reply) {
        line.push(b'\n');
        let _ = stream.get_ref().write_all(&line);
    }
}

/// Freezes and answers. Whatever goes wrong after the agent was asked to freeze, it is asked to thaw.
fn freeze(stream: &BufReader<UnixStream>, how: Freezer, patience: Duration, limit: Duration) -> Option<Frozen> {
    let fail = |why: String| {
        answer(stream, &Reply::Failed { why });
        None
    };
    let mut agent = match &how {
        Freezer::Agent(socket) => {
            let deadline = Instant::now() + patience;
            let ready = Agent::connect(socket, deadline)
                .and_then(|mut agent| Ok((agent.is_frozen(deadline)?, agent)))
                .map_err(|e| e.to_string());
            match ready {
                Ok((false, agent)) => Some(agent),
                Ok((true, _)) => return fail("the guest's file systems are frozen already, by somebody else".into()),
                Err(why) => return fail(why),
            }
        }
        Freezer::Commands { .. } => None,
    };
    let until = Instant::now() + limit;
    let result = match (&how, &mut agent) {
        (Freezer::Commands { freeze, .. }, _) => run_command(freeze, limit).map(|()| 0),
        (Freezer::Agent(_), Some(agent)) => agent.freeze(until).map_err(|e| e.to_string()),
        (Freezer::Agent(_), None) => Ok(0),
    };
    // The agent serves one client at a time, and the thaw comes over a connection of its own.
    drop(agent);
    match result {
        Ok(count) => {
            answer(stream, &Reply::Frozen { count });
            Some(Frozen { how, until })
        }
        Err(why) => {
            answer(stream, &Reply::Failed { why });
            let _ = how.thaw();
            None
        }
    }
}

enum Next {
    Line,
    Late,
    End,
}

/// Appends to `line` until it is whole.
fn next_line(stream: &mut BufReader<UnixStream>, line: &mut Vec<u8>, until: Option<Instant>) -> io::Result<Next> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Next::Late);
        }
        stream.get_ref().set_read_timeout(left)?;
        match stream.fill_buf() {
            Ok([]) => return Ok(Next::End),
            Ok(bytes) => {
                let end = bytes.iter().position(|&byte| byte == b'\n');
                let taken = end.map_or(bytes.len(), |end| end + 1);
                line.extend_from_slice(&bytes[..taken]);
                stream.consume(taken);
                if end.is_some() {
                    return Ok(Next::Line);
                }
                if line.len() > MAX_REQUEST {
                    return Ok(Next::End);
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A writer that is gone may look like this too.
            Err(_) => return Ok(Next::End),
        }
    }
}
