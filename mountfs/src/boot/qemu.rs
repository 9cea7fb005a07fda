//! The process that runs a VM, and its monitor. It outlives who started it, and is found again by its number and its start.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_cli::ProcessId;
use reseal_qmp::{Client, Line};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::host::FirmwareFiles;
use super::{BootError, RunFolder};

/// How long QEMU may take until its monitor answers.
const START: Duration = Duration::from_secs(60);
/// How long a command may take. One that stops the guest waits until an export that is gone is given up.
const ANSWER: Duration = Duration::from_secs(30);
/// How long it may take to tell a guest's agent something.
const AGENT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);
/// Memory: what QEMU itself must put into a file would be a guest's memory or disk, in the clear.
const TEMPORARY: &str = "/dev/shm";

/// What binds it to who starts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tie {
    /// Its console is this terminal.
    pub terminal: bool,
    /// It dies with this process, for nobody else could serve its disks.
    pub life: bool,
}

/// What the guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    Running,
    /// It was paused for an error of a disk.
    IoError,
    /// Anything else, by QEMU's name.
    Other(String),
}

/// What was noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    Nothing,
    /// The guest was paused for an error of a disk, of the overlay that is full if so.
    Paused {
        device: String,
        is_full: bool,
        reason: String,
    },
    /// The guest was switched off, by itself or because somebody asked for it.
    Off,
    /// QEMU was killed, or broke down.
    Died,
}

/// A QEMU.
pub struct Qemu {
    process: ProcessId,
    /// Where it is a child of ours.
    child: Option<Child>,
    /// None once it has gone.
    client: Option<Client>,
    is_off: bool,
}

impl Qemu {
    /// Starts it, unless one runs in that folder, and waits until its monitor answers.
    pub fn start(
        command: &[OsString],
        folder: &RunFolder,
        firmware: Option<&FirmwareFiles>,
        tie: Tie,
    ) -> Result<Qemu, BootError> {
        let lock = folder.lock()?.ok_or_else(|| BootError::Unknown(folder.path().to_owned()))?;
        folder.clear()?;
        if let Some(files) = firmware {
            folder.copy_variables(&files.variables)?;
        }
        let log = folder.new_log()?;
        let mut child = spawn(command, log, lock, tie)?;
        let process = match ProcessId::of(child.id()) {
            Ok(process) => process,
            Err(source) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(BootError::File { action: "look at", path: "/proc".into(), source });
            }
        };
        let until = Instant::now() + START;
        loop {
            if child.try_wait().is_ok_and(|status| status.is_some()) {
                return Err(BootError::Early { said: folder.said() });
            }
            let left = until.saturating_duration_since(Instant::now());
            match Client::connect(&folder.qmp(), left.min(ANSWER)) {
                Ok(client) => {
                    return Ok(Qemu { process, child: Some(child), client: Some(client), is_off: false });
                }
                Err(e) if left.is_zero() => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(e.into());
                }
                Err(_) => sleep(PAUSE),
            }
        }
    }

    /// The one that runs in a folder, if one does.
    pub fn found(folder: &RunFolder) -> Result<Option<Qemu>, BootError> {
        let until = Instant::now() + START;
        // One that has just begun, or is about to end, is waited for.
        while folder.lock()?.is_none() {
            if let Some(process) = folder.process()? {
                match Client::connect(&folder.qmp(), ANSWER) {
                    Ok(client) => return Ok(Some(Qemu { process, child: None, client: Some(client), is_off: false })),
                    Err(e) if process.is_alive() && Instant::now() >= until => return Err(e.into()),
                    Err(_) => {}
                }
            } else if Instant::now() >= until {
                return Err(BootError::Unknown(folder.path().to_owned()));
            }
            sleep(PAUSE);
        }
        Ok(None)
    }

    /// Its number and start.
    pub fn process(&self) -> &ProcessId {
        &self.process
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => self.process.is_alive(),
        }
    }

    /// Its monitor.
    pub fn monitor(&mut self) -> Result<&mut Client, BootError> {
        self.client.as_mut().ok_or_else(|| BootError::Died { said: String::new() })
    }

    fn call(&mut self, command: &str) -> Result<Value, BootError> {
        Ok(self.monitor()?.call(command, Value::Null)?)
    }

    /// What the guest does now.
    pub fn state(&mut self) -> Result<RunState, BootError> {
        let status = self.call("query-status")?;
        Ok(match status["status"].as_str().unwrap_or_default() {
            "running" => RunState::Running,
            "io-error" => RunState::IoError,
            other => RunState::Other(other.to_owned()),
        })
    }

    /// Lets the guest go on.
    pub fn go_on(&mut self) -> Result<(), BootError> {
        self.call("cont").map(drop)
    }

    /// Asks the guest to shut down: by its power button, and by its agent, for there are guests that heed only one of them. Nobody
    /// answers. What is returned is to be kept until the end: an agent hears who stays.
    pub fn ask_to_shut_down(&mut self, folder: &RunFolder) -> Result<Option<Line>, BootError> {
        self.call("system_powerdown")?;
        let until = Instant::now() + AGENT;
        let asked = Line::connect(&folder.agent(), until).and_then(|mut line| {
            line.ask("guest-shutdown", None::<&Value>, None, until)?;
            Ok(line)
        });
        Ok(asked.ok())
    }

    /// Ends it as it is.
    pub fn quit(&mut self) -> Result<(), BootError> {
        self.call("quit").map(drop)
    }

    /// Ends it at once, whatever it does.
    pub fn kill(&mut self) {
        match &mut self.child {
            Some(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {
                let pid = i32::try_from(self.process.pid).ok().and_then(Pid::from_raw);
                let Some(Ok(held)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else { return };
                // The descriptor is of whoever has the number now; that is the one, or there is none.
                if self.process.is_alive() {
                    let _ = pidfd_send_signal(&held, Signal::KILL);
                }
            }
        }
    }

    /// What happens within a time, at the latest after it.
    pub fn next(&mut self, within: Duration) -> Happened {
        let until = Instant::now() + within;
        if let Some(client) = &mut self.client {
            match client.wait_event(&["SHUTDOWN", "BLOCK_IO_ERROR"], until) {
                Ok(Some(event)) if event.name == "SHUTDOWN" => {
                    self.is_off = !matches!(event.data["reason"].as_str(), Some("guest-panic" | "host-error"));
                    return Happened::Nothing;
                }
                Ok(Some(event)) if event.data["action"] == "stop" => return paused(&event.data),
                Ok(_) => {}
                // It ends, and closes its monitor first; or it said something that can't be understood.
                Err(_) => self.client = None,
            }
        }
        match (self.is_alive(), self.is_off) {
            (true, _) => {
                if self.client.is_none() {
                    sleep(until.saturating_duration_since(Instant::now()));
                }
                Happened::Nothing
            }
            (false, true) => Happened::Off,
            (false, false) => Happened::Died,
        }
    }

    /// Waits for its end; whether it came.
    pub fn has_gone_within(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() >= until {
                return false;
            }
            self.next(PAUSE * 5);
        }
        true
    }
}

fn paused(data: &Value) -> Happened {
    let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
    // The device's id is the end of its path; virtio disks have their back end below it.
    let device = text("qom-path");
    let device = device.split('/').find(|part| part.starts_with("reseal-disk-")).unwrap_or_default().to_owned();
    Happened::Paused { device, is_full: data["nospace"] == true, reason: text("reason") }
}

fn spawn(words: &[OsString], log: File, lock: File, tie: Tie) -> Result<Child, BootError> {
    let (program, arguments) = words.split_first().ok_or_else(|| BootError::Machine("there is no command".into()))?;
    let mut command = Command::new(program);
    let failed = |source| BootError::Start { program: PathBuf::from(program), source };
    command.args(arguments).env("TMPDIR", TEMPORARY);
    match tie.terminal {
        true => command.stdin(Stdio::inherit()).stdout(Stdio::inherit()),
        false => command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?),
    };
    command.stderr(log);
    let own = rustix::process::getpid();
    let prepare = move || {
        // What it makes is for its owner only.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        if tie.life {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // Who died before that sends nothing.
            if rustix::process::getppid() != Some(own) {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
        }
        if !tie.terminal {
            rustix::process::setsid()?;
        }
        // QEMU has it from its first moment, whatever becomes of this process.
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only, which need no lock that another thread could hold at the fork.
    unsafe { command.pre_exec(prepare) };
    command.spawn().map_err(failed)
}
