//! A restore point that the real program boots, until the guard goes: then nothing of it runs any more.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Run, Running, bound_to_us, signal, start, wait_until};
use crate::qmp::Qmp;
use crate::site::Site;

/// How long QEMU may take until it runs.
const READY: Duration = Duration::from_secs(60);
/// How long a program may take to notice what happens.
pub const NOTICED: Duration = Duration::from_secs(60);

/// Whether a process runs. One that has ended and that its parent has not looked at does not.
pub fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .is_some_and(|state| !"ZX".contains(state))
}

/// A VM on an overlay.
pub struct Booted {
    process: Option<Running>,
    pub overlay: PathBuf,
    /// Known once there is an overlay.
    pub run: PathBuf,
    /// QEMU's process.
    pub qemu: u32,
}

/// The run folder of an overlay.
pub fn run_folder(overlay: &Path) -> Option<PathBuf> {
    let document: Value = serde_json::from_slice(&fs::read(overlay.join("overlay.json")).ok()?).ok()?;
    let base = match rustix::process::geteuid().is_root() {
        true => PathBuf::from("/run/reseal"),
        false => PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?).join("reseal"),
    };
    Some(base.join(document["id"].as_str()?))
}

/// What is recorded of a VM that runs.
pub fn record(run: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(run.join("boot.json")).ok()?).ok()
}

impl Booted {
    /// Boots a point on an overlay, by emulation, with further arguments; or takes up the VM that runs on it.
    #[track_caller]
    pub fn start(site: &Site, point: &str, overlay: &Path, arguments: &[&str]) -> Booted {
        Booted::try_start(site, point, overlay, arguments).unwrap_or_else(|run| panic!("nothing runs: {run:#?}"))
    }

    /// If it ended before the VM ran, how.
    pub fn try_start(site: &Site, point: &str, overlay: &Path, arguments: &[&str]) -> Result<Booted, Run> {
        let words = ["boot", point, "--accel", "tcg", "--overlay", overlay.to_str().unwrap()];
        let process = start(bound_to_us(&mut site.command("reseal", [&words[..], arguments].concat())));
        let own = process.id();
        let mut booted = Booted { process: Some(process), overlay: overlay.to_owned(), run: PathBuf::new(), qemu: 0 };
        let began = Instant::now();
        loop {
            if booted.process.as_ref().unwrap().has_ended() || began.elapsed() > READY {
                return Err(booted.process.take().unwrap().kill());
            }
            if let Some(run) = run_folder(overlay) {
                let recorded = record(&run).and_then(|record| u32::try_from(record["qemu"]["pid"].as_u64()?).ok());
                booted.run = run;
                // Whoever takes up a VM listens again.
                if let Some(qemu) = recorded.filter(|qemu| runs(*qemu) && is_served(&booted.run, own)) {
                    booted.qemu = qemu;
                    return Ok(booted);
                }
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// The process that serves.
    pub fn id(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// A monitor beside the one that the program uses.
    pub fn monitor(&self) -> Qmp {
        Qmp::connect(&self.run.join("qmp-promote.sock"))
    }

    /// What the guest does, as QEMU calls it.
    pub fn state(&self) -> String {
        self.monitor().run("query-status", serde_json::json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Kills what serves. The VM stays.
    pub fn kill_server(&mut self) {
        self.process.take().unwrap().kill();
    }

    /// Kills the VM.
    pub fn kill_qemu(&self) {
        signal(self.qemu, libc::SIGKILL);
        wait_until("QEMU's end", NOTICED, || !runs(self.qemu));
    }

    /// Ends it as an administrator does; how that went.
    pub fn stop(mut self) -> Run {
        signal(self.id(), libc::SIGTERM);
        self.wait_long()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Run {
        self.wait_long()
    }

    fn wait_long(&mut self) -> Run {
        let process = self.process.take().unwrap();
        // A guest takes its time.
        wait_until("the program's end", NOTICED * 4, || process.has_ended());
        process.wait()
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(process.kill());
        }
        if self.qemu != 0 && runs(self.qemu) && record(&self.run).is_some_and(|r| r["qemu"]["pid"] == self.qemu) {
            signal(self.qemu, libc::SIGKILL);
            let began = Instant::now();
            while runs(self.qemu) && began.elapsed() < NOTICED {
                sleep(Duration::from_millis(5));
            }
            let _ = fs::remove_dir_all(&self.run);
        }
    }
}

/// Whether the process has the socket of the disks.
fn is_served(run: &Path, process: u32) -> bool {
    let listens = std::os::unix::net::UnixStream::connect(run.join("nbd.sock")).is_ok();
    listens && runs(process)
}
