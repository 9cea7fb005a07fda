//! The guest as a domain of libvirt.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest::{BOOT, Images, STALL, last_count, wait_for_count};
use crate::process::run;
use crate::qmp::LeftBehind;

/// How long libvirt may take to answer after it was started.
const READY: Duration = Duration::from_secs(20);

/// A domain that is defined until this is dropped.
pub struct Domain {
    pub name: String,
    pub uri: String,
    pub console: PathBuf,
    secret: String,
}

/// A libvirt that answers at that URI; the system's own is started if it does not.
fn ensure_libvirt(uri: &str) {
    let answers = || {
        let mut command = Command::new("virsh");
        command.args(["--connect", uri, "list"]).stdin(Stdio::null());
        command.output().is_ok_and(|ended| ended.status.success())
    };
    if answers() {
        return;
    }
    for daemon in ["virtlogd", "libvirtd"] {
        // The log may be served already; what counts is that libvirt answers.
        let _ = Command::new(daemon).arg("--daemon").stdin(Stdio::null()).output();
    }
    let began = Instant::now();
    while !answers() {
        assert!(began.elapsed() < READY, "libvirt does not answer at {uri}");
        sleep(Duration::from_millis(100));
    }
}

impl Domain {
    /// Defines the guest of those images, at the libvirt of that URI.
    pub fn define(images: &Images, uri: &str) -> Domain {
        ensure_libvirt(uri);
        let uuid = || fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().trim().to_owned();
        let secret = uuid();
        let name = format!("reseal-test-{}", &uuid()[..8]);
        let domain = Domain { name, uri: uri.to_owned(), console: images.path("console"), secret };
        let file = images.path("libvirt.xml");
        let xml = format!("<secret ephemeral='yes' private='yes'><uuid>{}</uuid></secret>", domain.secret);
        fs::write(&file, xml).unwrap();
        domain.virsh(&["secret-define", file.to_str().unwrap()]);
        domain.virsh(&["secret-set-value", &domain.secret, "--plain", "--file", images.secret.to_str().unwrap()]);
        fs::write(&file, images.domain_xml(&domain.name, &domain.secret)).unwrap();
        domain.virsh(&["define", file.to_str().unwrap()]);
        domain
    }

    /// Runs `virsh`, which must succeed.
    #[track_caller]
    pub fn virsh(&self, arguments: &[&str]) -> String {
        run(Command::new("virsh").args(["--quiet", "--connect", &self.uri]).args(arguments)).ok().stdout
    }

    /// Switches it on and waits until it counts.
    pub fn counting(&self) {
        // What it showed before it was switched off is no sign of life.
        let _ = fs::remove_file(&self.console);
        self.virsh(&["start", &self.name]);
        let began = Instant::now();
        wait_for_count(&self.console, Some(3), BOOT);
        wait_for_count(&self.console, last_count(&self.console), BOOT.saturating_sub(began.elapsed()));
    }

    /// The count that it showed last.
    pub fn count(&self) -> u64 {
        last_count(&self.console).unwrap()
    }

    /// Waits until it has counted on.
    #[track_caller]
    pub fn counts_on(&self) -> u64 {
        wait_for_count(&self.console, Some(self.count()), STALL)
    }

    /// Takes the power away.
    pub fn kill(&self) {
        self.virsh(&["destroy", &self.name]);
    }

    /// Runs a command of QEMU's monitor.
    fn monitor(&self, command: &str, arguments: &Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        let mut answer: Value =
            serde_json::from_str(&self.virsh(&["qemu-monitor-command", &self.name, &text])).unwrap();
        answer["return"].take()
    }

    /// What a backup could leave behind in its QEMU.
    pub fn left_behind(&self) -> LeftBehind {
        LeftBehind::of(&mut |command, arguments| self.monitor(command, &arguments))
    }

    /// Names of its checkpoints.
    pub fn checkpoints(&self) -> Vec<String> {
        let names = self.virsh(&["checkpoint-list", &self.name, "--name"]);
        names.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// All secrets that libvirt holds.
    pub fn secrets(&self) -> String {
        self.virsh(&["secret-list"])
    }

    /// Whether the guest runs.
    pub fn is_running(&self) -> bool {
        self.virsh(&["domstate", &self.name]).trim() == "running"
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let virsh = |arguments: &[&str]| {
            let _ = Command::new("virsh").args(["--connect", &self.uri]).args(arguments).stdin(Stdio::null()).output();
        };
        virsh(&["destroy", &self.name]);
        virsh(&["undefine", &self.name, "--checkpoints-metadata"]);
        virsh(&["secret-undefine", &self.secret]);
    }
}
