//! Whether a restore point boots: its guest is started, watched until it does what is expected of it, and ended.
//!
//! ```text
//! QEMU, still paused → console is read, probe asks → goes on → first of: shown, answered, off, paused, too late → verdict
//!                      (console)           (probe)
//! ```
//!
//! Architecture invariant: what a guest says stays in memory. A verdict has this program's words only.

mod console;
mod probe;
mod usernet;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use reseal_cli::human_duration;
use reseal_format::verdict_note::{BootVerdict, Expectation};
use serde_json::json;

use crate::boot::{BootError, Happened, Qemu, RunFolder};
use console::Console;
use probe::{Probe, Question};

/// How often is looked.
const TICK: Duration = Duration::from_millis(100);
/// How often QEMU is asked for the guest's connections.
const ASK: Duration = Duration::from_secs(1);

/// What became of it.
pub struct Checked {
    pub verdict: BootVerdict,
    /// The last lines of the console: the guest's, for a terminal only.
    pub lines: Vec<String>,
}

/// A guest that is watched.
pub struct Check<'a> {
    qemu: &'a mut Qemu,
    expected: &'a Expectation,
    timeout: Duration,
    began: Instant,
    console: Console,
    probe: Option<Probe>,
    /// When connections were asked for last.
    asked: Instant,
}

impl<'a> Check<'a> {
    /// Begins to watch a guest that is still paused, and lets it go.
    pub fn begin(
        qemu: &'a mut Qemu,
        folder: &RunFolder,
        expected: &'a Expectation,
        timeout: Duration,
    ) -> Result<Check<'a>, BootError> {
        let pattern = match expected {
            Expectation::Console(text) => Some(text.as_str()),
            Expectation::Agent | Expectation::Tcp(_) => None,
        };
        let path = folder.console();
        let socket = UnixStream::connect(&path).and_then(|socket| Console::watch(socket, pattern));
        let console = socket.map_err(failed("read", &path))?;
        let question = match expected {
            Expectation::Console(_) => None,
            Expectation::Agent => Some(Question::Agent(folder.agent())),
            Expectation::Tcp(port) => {
                let said = connections(qemu)?;
                let host = usernet::forwarded(&said, *port);
                let missing = || BootError::Machine(format!("QEMU forwards no port to the guest's {port}"));
                Some(Question::Port(host.ok_or_else(missing)?))
            }
        };
        let probe = question.map(Probe::start).transpose().map_err(failed("ask at", &folder.agent()))?;
        let began = Instant::now();
        qemu.go_on()?;
        Ok(Check { qemu, expected, timeout, began, console, probe, asked: began })
    }

    /// Watches until it is known what became of it; `None` if it was `stopped` before.
    pub fn run(mut self, program: &str, stopped: impl Fn() -> bool) -> Option<Checked> {
        let reason = loop {
            if stopped() {
                return None;
            }
            let happened = self.qemu.next(TICK);
            if matches!(happened, Happened::Off | Happened::Died) {
                self.console.drain();
            }
            if self.is_met() {
                break None;
            }
            match happened {
                Happened::Nothing if self.began.elapsed() >= self.timeout => break Some(self.too_late()),
                Happened::Nothing => {}
                Happened::Paused { is_full: true, .. } => {
                    break Some("the guest was paused, for what it wrote was more than there is room for".to_owned());
                }
                Happened::Paused { device, .. } => {
                    break Some(format!("the guest was paused, for its disk {device} could not be read or written"));
                }
                Happened::Off => break Some("the guest switched itself off".to_owned()),
                Happened::Died => break Some("QEMU was killed, or broke down".to_owned()),
            }
        };
        let took_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let verdict = BootVerdict {
            passed: reason.is_none(),
            expected: self.expected.clone(),
            took_ms,
            reason,
            program: program.to_owned(),
        };
        Some(Checked { verdict, lines: self.console.last_lines() })
    }

    fn is_met(&mut self) -> bool {
        if self.probe.as_ref().is_some_and(Probe::has_answered) {
            return true;
        }
        match self.expected {
            Expectation::Console(_) => self.console.is_shown(),
            Expectation::Agent => false,
            Expectation::Tcp(port) => {
                if self.asked.elapsed() < ASK {
                    return false;
                }
                self.asked = Instant::now();
                connections(self.qemu).is_ok_and(|said| usernet::is_taken(&said, *port))
            }
        }
    }

    fn too_late(&self) -> String {
        let within = human_duration(self.timeout);
        match self.expected {
            Expectation::Console(text) => format!("its console did not show {text:?} within {within}"),
            Expectation::Agent => format!("its guest agent did not answer within {within}"),
            Expectation::Tcp(port) => format!("it took no connection at TCP port {port} within {within}"),
        }
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> BootError + 'a {
    move |source| BootError::File { action, path: path.to_owned(), source }
}

/// What QEMU says of the connections of a guest behind its own address translation. There is no other command for this.
fn connections(qemu: &mut Qemu) -> Result<String, BootError> {
    let said = qemu.monitor()?.call("human-monitor-command", json!({ "command-line": "info usernet" }))?;
    Ok(said.as_str().unwrap_or_default().to_owned())
}
