//! One attempt: a process that runs `reseal backup`.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use reseal_cli::{Failure, Status};
use serde_json::Value;

use super::Job;
use super::child::{Cut, Whom, apart, wait};
use crate::span;

/// How long a backup may take to end when it is told to: the hypervisor has to let go of what was begun.
const GRACE: Duration = Duration::from_secs(60);
/// Longest answer that is read: a restore point of many disks, with its warnings.
const MAX_ANSWER: u64 = 16 << 20;
/// As much of a line on standard error as is taken.
const MAX_LINE: usize = 4 << 10;

/// How a backup is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// This program.
    pub program: PathBuf,
    /// Vault, tenant, keys and state, as words.
    pub common: Vec<OsString>,
}

/// A restore point that a job has made.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// As `backup --json` prints it.
    pub point: Value,
}

impl Made {
    pub fn number(&self) -> Option<u64> {
        self.point["number"].as_u64()
    }
}

/// What came of it.
pub(super) enum Attempted {
    Made(Made),
    /// It says so itself, and has noted it.
    Failed(Failure),
    /// It did not come to say anything.
    Died(Failure),
}

impl Launch {
    /// The process of a job.
    fn command(&self, job: &Job) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.common).args(["--json", "backup"]).args(job.words());
        command
    }

    /// Makes a restore point. `warn` is told what the backup warns of.
    pub(super) fn attempt(&self, job: &Job, stop: &AtomicBool, warn: &(dyn Fn(&str) + Sync)) -> Attempted {
        let mut command = self.command(job);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        apart(&mut command);
        let failed = |what: String| Failure::new(Status::Failed, what);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return Attempted::Died(failed(format!("a backup can't be started: {e}"))),
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (answer, said, waited) = thread::scope(|scope| {
            let answer = scope.spawn(|| {
                let mut text = String::new();
                let read = stdout.map(|from| from.take(MAX_ANSWER).read_to_string(&mut text));
                if read.is_some_and(|read| read.is_ok()) { text } else { String::new() }
            });
            let said = scope.spawn(|| stderr.map(|from| listen(BufReader::new(from), warn)).unwrap_or_default());
            let waited = wait(&mut child, job.policy.timeout, GRACE, stop, Whom::It);
            (answer.join().unwrap_or_default(), said.join().unwrap_or_default(), waited)
        });
        let (status, cut) = match waited {
            Ok(waited) => waited,
            Err(e) => return Attempted::Died(failed(format!("the backup can't be waited for: {e}"))),
        };
        let why = |otherwise: &str| if said.is_empty() { otherwise.to_owned() } else { said.clone() };
        match (status.code(), cut) {
            // It was done before it heard that it should end.
            (Some(0), _) => match serde_json::from_str::<Value>(answer.trim()) {
                Ok(point) if point["number"].is_u64() => Attempted::Made(Made { point }),
                _ => Attempted::Died(failed("the backup says that it is done, but not what it made".into())),
            },
            (_, Some(Cut::Late)) => {
                let limit = span::show(job.policy.timeout.unwrap_or_default());
                Attempted::Died(failed(format!("the backup took longer than {limit} and was ended")))
            }
            (_, Some(Cut::Stopped)) => {
                Attempted::Died(failed("the backup was ended, for this program is to end".into()))
            }
            (Some(code), None) => {
                let status = match code {
                    2 => Status::Usage,
                    3 => Status::Damaged,
                    4 => Status::Unreachable,
                    _ => Status::Failed,
                };
                Attempted::Failed(Failure::new(status, why("the backup failed and does not say why")))
            }
            (None, None) => {
                let signal = status.signal().unwrap_or(0);
                Attempted::Died(failed(format!("the backup was killed (signal {signal}), which it does not do itself")))
            }
        }
    }
}

/// Hears what a backup says on standard error: passes on warnings, and keeps the last line that tells why it failed.
fn listen(mut from: impl BufRead, warn: &dyn Fn(&str)) -> String {
    let mut why = String::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return why,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        match (text.strip_prefix("warning: "), text.strip_prefix("reseal: ")) {
            (Some(warning), _) => warn(warning),
            (None, Some(failure)) => why = failure.to_owned(),
            // What follows of a line that was too long, or what a program of its own says.
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn warnings_are_passed_on_and_the_reason_is_kept() {
        let warned = RefCell::new(Vec::new());
        let said = format!("warning: a\nreseal: not this\nqemu-nbd: x\nwarning: {}\nreseal: why\n", "y".repeat(10_000));
        let why = listen(said.as_bytes(), &|warning| warned.borrow_mut().push(warning.len()));
        assert_eq!(why, "why");
        assert_eq!(*warned.borrow(), [1, MAX_LINE - "warning: ".len()]);
    }
}
