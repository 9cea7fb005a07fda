//! A libvirt of one test's own, with domains that need no guest system.
//!
//! libvirt as root has fixed folders, so the test's thread gets a mount namespace in which they are the test's. What the
//! thread starts is in it too; other threads and the machine's own libvirt are not. The daemon and its domains get a
//! process namespace: they end with its first process, whatever becomes of the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::process::{Run, bound_to_us, run, system};

/// The folders that libvirt has, by the names of those that they are.
const FOLDERS: [(&str, &str); 4] =
    [("lib", "/var/lib/libvirt"), ("etc", "/etc/libvirt"), ("run", "/run/libvirt"), ("log", "/var/log/libvirt")];
/// What libvirt learns once of QEMU, which takes it seconds: shared by all tests.
const CACHE: &str = "/var/cache/libvirt";
/// The first process of the namespace, which also reaps the domains' processes: libvirt waits until they are gone.
const INIT: &str = "libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid & wait $!";
/// How long a daemon may take to answer.
const LIMIT: Duration = Duration::from_secs(30);
/// QEMU runs as the user that Debian's packages make. No other daemon, no device namespace, no control groups: the test may
/// run in a container.
const QEMU_CONF: &str = "user = \"libvirt-qemu\"\ngroup = \"libvirt-qemu\"\nstdio_handler = \"file\"\nnamespaces = []\n\
                         cgroup_controllers = []\n";

/// The daemon. It ends with this, and so do its domains.
pub struct Libvirtd {
    folder: TempDir,
    daemon: Child,
}

impl Libvirtd {
    /// Starts it, as root. The packages libvirt-daemon-system and libvirt-clients must be there.
    pub fn start() -> Libvirtd {
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: a call that takes a number. It gives this thread a mount namespace of its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "needs root: {}", std::io::Error::last_os_error());
        system("mount", &["--make-rprivate", "/"]);
        // What the test mounts later the daemon sees too, and not the other way round.
        system("mount", &["--make-rshared", "/"]);
        let folders = FOLDERS.map(|(own, usual)| (folder.path().join(own), usual));
        let cache = std::env::current_exe().unwrap().with_file_name("libvirt-cache");
        for (own, usual) in folders.into_iter().chain([(cache, CACHE)]) {
            fs::create_dir_all(&own).unwrap();
            fs::create_dir_all(usual).unwrap();
            system("mount", &["--bind", own.to_str().unwrap(), usual]);
        }
        fs::create_dir("/var/lib/libvirt/images").unwrap();
        fs::write("/etc/libvirt/qemu.conf", QEMU_CONF).unwrap();
        fs::write("/etc/libvirt/libvirtd.conf", "auth_unix_rw = \"none\"\n").unwrap();
        let log = fs::File::create("/var/log/libvirt/libvirtd.log").unwrap();
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "slave", "sh", "-c", INIT]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = bound_to_us(&mut command).spawn().unwrap();
        let libvirtd = Libvirtd { folder, daemon };
        let began = Instant::now();
        while libvirtd.virsh(&["uri"]).status != Some(0) {
            assert!(began.elapsed() < LIMIT, "libvirtd does not answer: {}", libvirtd.log());
            thread::sleep(Duration::from_millis(50));
        }
        libvirtd
    }

    /// Where images lie.
    pub fn images(&self) -> &'static Path {
        Path::new("/var/lib/libvirt/images")
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log/libvirtd.log")).unwrap_or_default()
    }

    /// Runs a command of its client.
    pub fn virsh(&self, words: &[&str]) -> Run {
        run(Command::new("virsh").arg("--quiet").args(words))
    }

    /// Defines a domain with these `<disk>` elements, and starts it.
    pub fn domain(&self, name: &str, disks: &str) {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}\
             <graphics type='vnc' passwd='s3cret'><listen type='none'/></graphics></devices></domain>"
        );
        let path = self.folder.path().join("domain.xml");
        fs::write(&path, xml).unwrap();
        self.virsh(&["define", path.to_str().unwrap()]).ok();
        self.virsh(&["start", name]).ok();
    }

    /// Writes bytes of one value to a virtio disk, as the guest's driver would.
    #[track_caller]
    pub fn guest_writes(&self, domain: &str, nth: usize, value: u8, offset: u64, length: u64) {
        let device = format!("/machine/peripheral/virtio-disk{nth}/virtio-backend");
        let command = format!("qemu-io -d {device} \"write -P {value} {offset} {length}\"");
        let said = self.virsh(&["qemu-monitor-command", domain, "--hmp", &command]).ok().stdout;
        assert!(!said.contains("rror") && !said.contains("failed"), "the guest's write failed: {said}");
    }

    /// Kills a domain's QEMU, which can't clean up.
    pub fn kill(&self, domain: &str) {
        let unshare = self.daemon.id();
        let init = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        let pid = fs::read_to_string(format!("/run/libvirt/qemu/{domain}.pid")).unwrap();
        system("nsenter", &["--pid", "--target", init.trim(), "kill", "-KILL", pid.trim()]);
    }

    /// Names of a domain's checkpoints.
    pub fn checkpoints(&self, domain: &str) -> Vec<String> {
        let names = self.virsh(&["checkpoint-list", domain, "--name"]).ok().stdout;
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// Names of the bitmaps in an image that no QEMU has open for writing.
    pub fn bitmaps(&self, image: &Path) -> Vec<String> {
        let info = system("qemu-img", &["info", "-U", "--output=json", image.to_str().unwrap()]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Folder of a running domain's sockets.
    pub fn sockets(&self, domain: &str) -> PathBuf {
        let id = self.virsh(&["domid", domain]).ok().stdout;
        Path::new("/var/lib/libvirt/qemu").join(format!("domain-{}-{domain}", id.trim()))
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        for usual in FOLDERS.map(|(_, usual)| usual).into_iter().chain([CACHE]) {
            run(Command::new("umount").args(["--lazy", usual]));
        }
    }
}
