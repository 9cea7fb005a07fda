//! A Debian guest that runs by emulation alone and keeps counting across its two disks, to be backed up meanwhile.
//!
//! The first disk, `system`, is a qcow2 encrypted with LUKS; the second, `data`, a plain one. The guest writes n to the
//! first, durably, then n to the second, then n + 1 to the first (`scripts/guest/counter.c`): [`check_point`] tells
//! whether two disks are of one moment.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::marker::Marker;
use crate::process::{Run, Running, bound_to_us, run, start, system};
use crate::qmp::Qmp;

/// Where the system's partition begins, in MiB; see `debian-disk.sh`.
const PARTITION_MIB: u32 = 1;
/// Of the system disk.
pub const SECRET: &str = "the secret of the guest's system disk";
/// How long the guest may take from power-on to counting: some 15 s on two idle cores, minutes on busy ones.
pub const BOOT: Duration = Duration::from_secs(240);
/// How long the count may stand still while the guest is well.
pub const STALL: Duration = Duration::from_secs(60);

/// A script of the tests.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// The images of one guest, in a folder of the caller's.
pub struct Images {
    pub folder: PathBuf,
    pub system: PathBuf,
    pub data: PathBuf,
    /// A file with the secret of the first.
    pub secret: PathBuf,
}

impl Images {
    /// Makes fresh ones from the disk in the cache, which is made once.
    pub fn new(folder: &Path) -> Images {
        Images::with(folder, SECRET, None)
    }

    /// The same with another secret, and with a marker in a file of the system disk.
    pub fn with(folder: &Path, secret: &str, marker: Option<&Marker>) -> Images {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let cache = std::env::var_os("RESEAL_CACHE").map_or(workspace.join(".cache"), PathBuf::from);
        let disks = cache.join("disk-guest");
        let made = Command::new(script("debian-disk.sh")).arg("--guest").arg(&disks).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let folder = folder.to_owned();
        let at = |name: &str| folder.join(name);
        let images =
            Images { system: at("system.qcow2"), data: at("data.qcow2"), secret: at("secret"), folder: folder.clone() };
        fs::write(&images.secret, secret).unwrap();
        let object = format!("secret,id=key,file={}", images.secret.display());
        let encrypted = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.hash-alg=sha512";
        let raw = match marker {
            None => disks.join("base.raw"),
            Some(marker) => marked(&disks.join("base.raw"), &images, marker),
        };
        convert(&["--object", &object, "-o", encrypted], &raw, &images.system);
        convert(&[], &disks.join("data.raw"), &images.data);
        images
    }

    /// A path in the folder of the images.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A disk as QEMU is given it.
    fn node(&self, name: &str) -> Value {
        let (path, encrypted) = match name {
            "system" => (&self.system, true),
            _ => (&self.data, false),
        };
        let mut node = json!({
            "driver": "qcow2",
            "node-name": name,
            "discard": "unmap",
            "file": { "driver": "file", "filename": path },
        });
        if encrypted {
            node["encrypt"] = json!({ "format": "luks", "key-secret": "key" });
        }
        node
    }

    /// The same guest as a libvirt domain, whose secret libvirt has under that UUID.
    pub fn domain_xml(&self, name: &str, secret_uuid: &str) -> String {
        let disk = |path: &Path, target: &str, encryption: &str| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='{}'>\
                 {encryption}</source><target dev='{target}' bus='virtio'/></disk>",
                path.display()
            )
        };
        let luks = format!("<encryption format='luks'><secret type='passphrase' uuid='{secret_uuid}'/></encryption>");
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>1024</memory><vcpu>2</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><features><acpi/></features>\
             <on_reboot>destroy</on_reboot><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{}{}\
             <serial type='file'><source path='{}'/><target port='0'/></serial>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <memballoon model='none'/></devices></domain>",
            disk(&self.system, "vda", &luks),
            disk(&self.data, "vdb", ""),
            self.path("console").display(),
        )
    }
}

/// A copy of the system disk with a file of its own.
fn marked(base: &Path, images: &Images, marker: &Marker) -> PathBuf {
    let [raw, file] = ["marked.raw", "marker"].map(|name| images.path(name));
    let [from, to] = [base, &raw].map(|path| path.to_str().unwrap());
    system("cp", &["--sparse=always", from, to]);
    fs::write(&file, marker.bytes().repeat(1000)).unwrap();
    let device = format!("{to}?offset={}", PARTITION_MIB << 20);
    system("debugfs", &["-w", "-R", &format!("write {} /marker", file.display()), &device]);
    raw
}

/// Makes an image of a raw disk.
fn convert(options: &[&str], raw: &Path, image: &Path) {
    // For a LUKS key slot QEMU measures the processor; on a busy machine it can find that it took no time at all.
    for _ in 0..20 {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2", "-m", "4", "-W"]).args(options).arg(raw).arg(image);
        let ended = run(&mut command);
        if ended.status == Some(0) {
            return;
        }
        assert!(ended.stderr.contains("CPU usage"), "{ended:#?}");
    }
    panic!("{} could not be made", image.display());
}

/// The count that a console showed last; `None` if it shows none yet.
pub fn last_count(console: &Path) -> Option<u64> {
    let said = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    // The last line may be cut off.
    let whole = &said[..said.rfind('\n')?];
    whole.lines().rev().find_map(|line| line.split("counter ").nth(1)?.trim().parse().ok())
}

/// Waits until a console shows a higher count than that; the count.
///
/// # Panics
/// If it does not in time; with what the console showed.
#[track_caller]
pub fn wait_for_count(console: &Path, above: Option<u64>, limit: Duration) -> u64 {
    let began = Instant::now();
    loop {
        match last_count(console) {
            Some(count) if above.is_none_or(|above| count > above) => return count,
            _ => {}
        }
        if began.elapsed() > limit {
            let said = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
            let lines: Vec<_> = said.lines().rev().take(20).collect();
            panic!("the guest does not count beyond {above:?}; its console, latest line first: {lines:#?}");
        }
        sleep(Duration::from_millis(50));
    }
}

/// A guest that runs in a QEMU of ours.
pub struct Guest {
    process: Option<Running>,
    /// For the backup.
    pub qmp: PathBuf,
    pub qga: PathBuf,
    pub console: PathBuf,
    watch: PathBuf,
}

impl Guest {
    /// Switches it on.
    pub fn start(images: &Images) -> Guest {
        let [qmp, qga, watch, console] = ["qmp", "qga", "watch", "console"].map(|name| images.path(name));
        for old in [&qmp, &qga, &watch, &console] {
            let _ = fs::remove_file(old);
        }
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024", "-display", "none", "-nic", "none"]);
        command.args(["-no-reboot", "-monitor", "none"]);
        let with = |prefix: &str, path: &Path, rest: &str| {
            [OsString::from(prefix), path.into(), rest.into()].into_iter().collect::<OsString>()
        };
        command.arg("-serial").arg(with("file:", &console, ""));
        for monitor in [&qmp, &watch] {
            command.arg("-qmp").arg(with("unix:", monitor, ",server=on,wait=off"));
        }
        command.arg("-chardev").arg(with("socket,id=qga0,server=on,wait=off,path=", &qga, ""));
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"]);
        command.arg("-object").arg(with("secret,id=key,file=", &images.secret, ""));
        for (name, order) in [("system", ",bootindex=1"), ("data", "")] {
            command.arg("-blockdev").arg(images.node(name).to_string());
            command.arg("-device").arg(format!("virtio-blk-pci,drive={name},id={name}{order}"));
        }
        // What QEMU itself must put into a file would be the guest's memory or disk, in the clear.
        let process = start(bound_to_us(command.env("TMPDIR", "/dev/shm")));
        Guest { process: Some(process), qmp, qga, console, watch }
    }

    /// Switches it on and waits until it counts.
    pub fn counting(images: &Images) -> Guest {
        let mut guest = Guest::start(images);
        let began = Instant::now();
        while last_count(&guest.console).is_none() && began.elapsed() < BOOT {
            if guest.process.as_ref().unwrap().has_ended() {
                panic!("QEMU ended: {:#?}", guest.process.take().unwrap().wait());
            }
            sleep(Duration::from_millis(50));
        }
        wait_for_count(&guest.console, Some(3), BOOT.saturating_sub(began.elapsed()));
        guest
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

    /// A monitor beside the one that backups use.
    pub fn monitor(&self) -> Qmp {
        Qmp::connect(&self.watch)
    }

    /// Asks the agent in the guest whether it is there.
    pub fn agent_answers(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(&self.qga) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = [0; 64];
        let asked = stream.write_all(b"{\"execute\": \"guest-ping\"}\n").and_then(|()| stream.read(&mut answer));
        asked.is_ok_and(|got| answer[..got].starts_with(b"{\"return\""))
    }

    /// Takes the power away.
    pub fn kill(mut self) -> Run {
        self.process.take().unwrap().kill()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(process.kill());
        }
    }
}

/// What the disks of a restore point hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub system: u64,
    pub data: u64,
}

/// Checks that two raw disks are whole and of one moment. They are changed: what a guest does at its start after a
/// power cut is done here, the journal replayed and what was unlinked while open removed; then all must be clean.
#[track_caller]
pub fn check_point(system_disk: &Path, data_disk: &Path) -> Counts {
    // e2fsck opens a file system anew after the replay, and forgets where in a disk it began.
    let partition = system_disk.with_extension("partition");
    let [from, to] =
        [("if=", system_disk), ("of=", &partition)].map(|(word, path)| format!("{word}{}", path.display()));
    system("dd", &["bs=1M", &format!("skip={PARTITION_MIB}"), "conv=sparse", "status=none", &from, &to]);
    let count = |device: &Path, path: &str| {
        let device = device.to_str().unwrap();
        let replayed = run(Command::new("e2fsck").args(["-p", device])).expect(&[0, 1]);
        assert!(!replayed.said().contains("UNEXPECTED"), "{replayed:#?}");
        run(Command::new("e2fsck").args(["-fn", device])).ok();
        // The file is there from the first count on.
        let text = system("debugfs", &["-R", &format!("cat {path}"), device]);
        text.trim().parse::<u64>().unwrap_or_else(|e| panic!("{path} in {device} holds {text:?}: {e}"))
    };
    let counts = Counts { system: count(&partition, "/var/lib/counter"), data: count(data_disk, "/counter") };
    fs::remove_file(partition).unwrap();
    let Counts { system, data } = counts;
    assert!(system == data || system == data + 1, "the disks are of different moments: {system} and {data}");
    counts
}

/// Boots two raw disks without writing to them, until a login is asked for; what the console showed.
#[track_caller]
pub fn boot(system_disk: &Path, data_disk: &Path, console: &Path) -> String {
    let second =
        format!("file={},format=raw,if=virtio,snapshot=on", data_disk.display().to_string().replace(',', ",,"));
    let mut command = Command::new(script("boot.sh"));
    let booted = command.arg(system_disk).args(["-drive", &second]).env("RESEAL_BOOT_LOG", console).output().unwrap();
    assert!(booted.status.success(), "{}", String::from_utf8_lossy(&booted.stderr));
    String::from_utf8_lossy(&fs::read(console).unwrap()).into_owned()
}
