//! The guest as a domain of libvirt.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest::{BOOT, Images, STALL, last_count, wait_for_count};
use crate::libvirtd::Libvirtd;
use crate::qmp::LeftBehind;

/// How long libvirt may take to notice that a domain has died.
const NOTICED: Duration = Duration::from_secs(20);

/// A domain of a libvirt that ends with it.
pub struct Domain {
    pub name: String,
    pub console: PathBuf,
    libvirtd: Libvirtd,
}

impl Domain {
    /// Defines the guest of those images, at a libvirt of its own. They must lie where its QEMU gets at them.
    pub fn define(images: &Images, libvirtd: Libvirtd) -> Domain {
        let secret = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().trim().to_owned();
        let domain = Domain { name: "guest".into(), console: images.path("console"), libvirtd };
        let file = images.path("libvirt.xml");
        let xml = format!("<secret ephemeral='yes' private='yes'><uuid>{secret}</uuid></secret>");
        fs::write(&file, xml).unwrap();
        domain.virsh(&["secret-define", file.to_str().unwrap()]);
        domain.virsh(&["secret-set-value", &secret, "--plain", "--file", images.secret.to_str().unwrap()]);
        fs::write(&file, images.domain_xml(&domain.name, &secret)).unwrap();
        domain.virsh(&["define", file.to_str().unwrap()]);
        domain
    }

    /// Runs `virsh`, which must succeed.
    #[track_caller]
    pub fn virsh(&self, arguments: &[&str]) -> String {
        self.libvirtd.virsh(arguments).ok().stdout
    }

    /// Switches it on and waits until it counts.
    pub fn counting(&self) {
        // Empty, for what it showed before it was switched off is no sign of life; QEMU runs as another user.
        fs::File::create(&self.console).unwrap();
        fs::set_permissions(&self.console, fs::Permissions::from_mode(0o666)).unwrap();
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

    /// Kills its QEMU, which can't clean up.
    pub fn kill(&self) {
        self.libvirtd.kill(&self.name);
        let began = Instant::now();
        while self.is_running() {
            assert!(began.elapsed() < NOTICED, "libvirt does not notice that the domain has died");
            sleep(Duration::from_millis(50));
        }
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
        self.libvirtd.checkpoints(&self.name)
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
