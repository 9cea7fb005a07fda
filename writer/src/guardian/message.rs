//! What writer and guardian say to each other: one JSON object a line.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reseal_qmp::{MonitorError, thaw_surely};
use serde::{Deserialize, Serialize};

use crate::qemu::Leftovers;

/// How long a command of a plan may run.
const COMMAND: Duration = Duration::from_secs(60);
/// How long a thaw is tried.
const THAW: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    Plan(Plan),
    Freeze { how: Freezer, answer_ms: u64, limit_ms: u64 },
    Thaw,
    Done,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply {
    Ready,
    Frozen { count: u64 },
    Thawed { in_time: bool },
    Failed { why: String },
}

/// What is undone when the writer dies, in this order. Each step is tried, whatever becomes of the others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub undo: Vec<Undo>,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Undo {
    /// Removes what reseal has in a QEMU.
    Qmp(Leftovers),
    /// Runs a program with its arguments, without a shell.
    Run(Vec<String>),
    /// Removes a file, or a folder that is empty by then.
    Remove(PathBuf),
}

/// How a guest's file systems are frozen and thawed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freezer {
    /// By the guest agent behind this socket.
    Agent(PathBuf),
    /// By programs with their arguments.
    Commands { freeze: Vec<String>, thaw: Vec<String> },
}

impl Freezer {
    /// Thaws, as often as it takes within a minute.
    pub(super) fn thaw(&self) -> Result<(), String> {
        let thawed = match self {
            Freezer::Agent(socket) => match thaw_surely(socket, THAW) {
                Err(MonitorError::Connect { .. }) => Ok(()),
                other => other.map(drop).map_err(|e| e.to_string()),
            },
            Freezer::Commands { thaw, .. } => run_command(thaw, COMMAND),
        };
        thawed.map_err(|e| format!("the guest's file systems could not be thawed: {e}"))
    }
}

impl Undo {
    pub(super) fn carry_out(&self) -> Result<(), String> {
        match self {
            Undo::Qmp(leftovers) => leftovers.remove(),
            Undo::Run(arguments) => run_command(arguments, COMMAND),
            Undo::Remove(path) => remove(path).map_err(|e| format!("can't remove {}: {e}", path.display())),
        }
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => std::fs::remove_dir(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Runs a program within a time.
pub(super) fn run_command(arguments: &[String], within: Duration) -> Result<(), String> {
    let Some((program, rest)) = arguments.split_first() else { return Err("a command of the plan is empty".into()) };
    let failed = |what: String| format!("{}: {what}", arguments.join(" "));
    let mut command = Command::new(program);
    command.args(rest).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let deadline = Instant::now() + within;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(status.to_string())),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("still running after {} s", within.as_secs())));
            }
            Err(e) => return Err(failed(e.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_reads_back() {
        let plan = Plan {
            undo: vec![
                Undo::Run(vec!["virsh".into(), "domjobabort".into(), "web01".into()]),
                Undo::Remove("/run/reseal/x".into()),
            ],
        };
        let text = serde_json::to_string(&Request::Plan(plan.clone())).unwrap();
        assert_eq!(text, r#"{"plan":{"undo":[{"run":["virsh","domjobabort","web01"]},{"remove":"/run/reseal/x"}]}}"#);
        match serde_json::from_str(&text).unwrap() {
            Request::Plan(read) => assert_eq!(read, plan),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_end_within_their_time() {
        let command = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(run_command(&command("true"), COMMAND), Ok(()));
        assert!(run_command(&command("false"), COMMAND).is_err());
        assert!(run_command(&[], COMMAND).is_err());
        let late = run_command(&command("sleep 60"), Duration::from_millis(50)).unwrap_err();
        assert!(late.contains("still running"), "{late}");
    }

    #[test]
    fn what_is_gone_counts_as_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("y"), "").unwrap();
        assert!(remove(&path).is_err(), "a folder that holds something else");
        remove(&path.join("y")).unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
