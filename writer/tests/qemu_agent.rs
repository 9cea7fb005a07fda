//! The guest's file systems are frozen for the moment of the snapshot only, whatever becomes of writer and agent.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that meets what it did not expect ends there

mod qemu_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reseal_writer::guardian::{Freezer, Guardian, Plan, Undo};
use reseal_writer::live::Hypervisor;
use reseal_writer::qemu::Qemu;
use serde_json::{Value, json};

use qemu_support::{Vm, bitmap, point};

const RESEAL: &str = env!("CARGO_BIN_EXE_reseal");
/// Names the folder of the agent to a process that is to be killed.
const CHILD: &str = "RESEAL_TEST_FREEZE";

/// How an agent behaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Good,
    /// Nobody is there to answer.
    Silent,
    /// It may not freeze.
    Unable,
    /// It freezes but is late to say so.
    Late,
}

/// A scripted guest agent.
struct Agent {
    socket: PathBuf,
    commands: Arc<Mutex<Vec<String>>>,
}

impl Agent {
    fn start(folder: &Path, manner: Manner) -> Agent {
        let socket = folder.join("qga.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let commands = Arc::new(Mutex::new(Vec::new()));
        let log = commands.clone();
        std::thread::spawn(move || {
            let mut frozen = false;
            for client in listener.incoming() {
                let mut client = BufReader::new(client.unwrap());
                if manner != Manner::Silent {
                    // What an earlier client did not read.
                    let _ = client.get_mut().write_all(b"{\"return\": {}}\n{\"retu");
                }
                let mut line = Vec::new();
                while client.read_until(b'\n', &mut line).is_ok_and(|got| got > 0) {
                    let start = line.iter().rposition(|&byte| byte == 0xff).map_or(0, |at| at + 1);
                    let command: Value = serde_json::from_slice(&line[start..]).unwrap();
                    line.clear();
                    let name = command["execute"].as_str().unwrap().to_owned();
                    if manner == Manner::Silent {
                        continue;
                    }
                    if !name.starts_with("guest-sync") {
                        log.lock().unwrap().push(name.clone());
                    }
                    let answer = match name.as_str() {
                        "guest-sync-delimited" => json!({ "return": command["arguments"]["id"] }),
                        "guest-fsfreeze-status" => json!({ "return": if frozen { "frozen" } else { "thawed" } }),
                        "guest-fsfreeze-freeze" if manner == Manner::Unable => {
                            json!({ "error": { "class": "GenericError", "desc": "not allowed" } })
                        }
                        "guest-fsfreeze-freeze" => {
                            frozen = true;
                            if manner == Manner::Late {
                                std::thread::sleep(Duration::from_millis(800));
                            }
                            json!({ "return": 2 })
                        }
                        "guest-fsfreeze-thaw" => {
                            let thawed = if frozen { 2 } else { 0 };
                            frozen = false;
                            json!({ "return": thawed })
                        }
                        _ => json!({ "error": { "class": "CommandNotFound", "desc": name } }),
                    };
                    let sentinel: &[u8] = if name == "guest-sync-delimited" { &[0xff] } else { &[] };
                    let answer = [sentinel, answer.to_string().as_bytes(), b"\n"].concat();
                    if client.get_mut().write_all(&answer).is_err() {
                        break;
                    }
                }
            }
        });
        Agent { socket, commands }
    }

    fn commands(&self) -> Vec<String> {
        self.commands.lock().unwrap().clone()
    }

    fn wait_for_thaw(&self, within: Duration) {
        let end = Instant::now() + within;
        while self.commands().last().is_none_or(|last| last != "guest-fsfreeze-thaw") {
            assert!(Instant::now() < end, "still frozen: {:?}", self.commands());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const ALL: [&str; 3] = ["guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];

#[test]
fn file_systems_are_frozen_for_the_moment_only() {
    let mut vm = Vm::start();
    let agent = Agent::start(&vm.folder, Manner::Good);
    let mut options = vm.options();
    options.qga = Some(agent.socket.clone());
    let mut qemu = Qemu::new(options);
    let snapshot = qemu.begin(point(1), None).unwrap();
    assert_eq!(agent.commands(), ALL);
    assert_eq!(snapshot.warnings, Vec::<String>::new());
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), Vec::<String>::new());
    assert_eq!(agent.commands(), ALL);
    vm.assert_clean(&[&bitmap(1)]);
}

#[test]
fn without_an_answer_the_point_is_made_and_says_so() {
    let mut vm = Vm::start();
    let agent = Agent::start(&vm.folder, Manner::Silent);
    let mut options = vm.options();
    options.qga = Some(agent.socket.clone());
    options.agent_patience = Duration::from_millis(300);
    let began = Instant::now();
    let mut qemu = Qemu::new(options);
    let snapshot = qemu.begin(point(1), None).unwrap();
    assert!(began.elapsed() < Duration::from_secs(3));
    assert!(snapshot.warnings.len() == 1 && snapshot.warnings[0].contains("power cut"), "{:?}", snapshot.warnings);
    assert_eq!(agent.commands(), Vec::<String>::new(), "nothing that it could do later");
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), Vec::<String>::new());
    vm.assert_clean(&[&bitmap(1)]);
}

fn freezer(agent: &Agent) -> Freezer {
    Freezer::Agent(agent.socket.clone())
}

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn an_agent_that_refuses_is_asked_to_thaw_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), Manner::Unable);
    let mut guardian = Guardian::start(Path::new(RESEAL)).unwrap();
    let error = guardian.freeze(&freezer(&agent), PATIENCE, PATIENCE).unwrap_err().to_string();
    assert!(error.contains("not allowed"), "{error}");
    agent.wait_for_thaw(PATIENCE);
    guardian.done().unwrap();
}

#[test]
fn a_freeze_that_takes_too_long_is_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), Manner::Late);
    let mut guardian = Guardian::start(Path::new(RESEAL)).unwrap();
    let error = guardian.freeze(&freezer(&agent), PATIENCE, Duration::from_millis(300)).unwrap_err().to_string();
    assert!(error.contains("did not answer"), "{error}");
    agent.wait_for_thaw(PATIENCE);
    guardian.done().unwrap();
}

#[test]
fn the_guardian_thaws_at_its_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), Manner::Good);
    let mut guardian = Guardian::start(Path::new(RESEAL)).unwrap();
    assert_eq!(guardian.freeze(&freezer(&agent), PATIENCE, Duration::from_millis(300)).unwrap(), 2);
    agent.wait_for_thaw(Duration::from_secs(2));
    assert!(!guardian.thaw().unwrap(), "it was not in time");
    assert_eq!(guardian.freeze(&freezer(&agent), PATIENCE, PATIENCE).unwrap(), 2);
    assert!(guardian.thaw().unwrap());
    guardian.done().unwrap();
}

#[test]
fn programs_can_freeze_and_thaw_too() {
    let folder = tempfile::tempdir().unwrap();
    let touch = |name: &str| vec!["touch".to_owned(), folder.path().join(name).display().to_string()];
    let mut guardian = Guardian::start(Path::new(RESEAL)).unwrap();
    let how = Freezer::Commands { freeze: touch("frozen"), thaw: touch("thawed") };
    guardian.freeze(&how, PATIENCE, PATIENCE).unwrap();
    assert!(folder.path().join("frozen").exists() && !folder.path().join("thawed").exists());
    assert!(guardian.thaw().unwrap());
    assert!(folder.path().join("thawed").exists());
    guardian.plan(Plan { undo: vec![Undo::Run(touch("undone"))] }).unwrap();
    let id = guardian.id().clone();
    // The end of the socket without a word.
    drop(guardian);
    let end = Instant::now() + PATIENCE;
    while !folder.path().join("undone").exists() {
        assert!(Instant::now() < end && id.is_alive());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Freezes, and waits to be killed or stopped.
#[test]
#[ignore = "is started by the tests below"]
fn child() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let limit: u64 = std::fs::read_to_string(folder.join("limit")).unwrap().parse().unwrap();
    let mut guardian = Guardian::start(Path::new(RESEAL)).unwrap();
    let how = Freezer::Agent(folder.join("qga.sock"));
    guardian.freeze(&how, PATIENCE, Duration::from_millis(limit)).unwrap();
    std::fs::write(folder.join("frozen"), guardian.id().pid.to_string()).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

fn frozen_child(folder: &Path, limit: u64) -> Child {
    std::fs::write(folder.join("limit"), limit.to_string()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored"]).env(CHILD, folder).stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !folder.join("frozen").exists() {
        assert!(Instant::now() < end, "never frozen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_killed_writer_leaves_no_guest_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), Manner::Good);
    let mut child = frozen_child(folder.path(), 50_000);
    assert_eq!(agent.commands(), ALL[..2]);
    child.kill().unwrap();
    child.wait().unwrap();
    agent.wait_for_thaw(Duration::from_secs(2));
    let guardian = std::fs::read_to_string(folder.path().join("frozen")).unwrap();
    let end = Instant::now() + PATIENCE;
    while Path::new("/proc").join(&guardian).join("cmdline").exists() {
        assert!(Instant::now() < end, "the guardian outlives its work");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_stopped_writer_leaves_no_guest_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), Manner::Good);
    let mut child = frozen_child(folder.path(), 1500);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    agent.wait_for_thaw(Duration::from_secs(4));
    child.kill().unwrap();
    child.wait().unwrap();
}
