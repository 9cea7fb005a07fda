//! A real QEMU with two disks, whose guest's writes are made by the monitor in its place.
#![allow(dead_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use reseal_format::ids::{PointId, VmId};
use reseal_format::manifest::{Disk, Manifest, Stats};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_writer::live::{Snapshot, SnapshotDisk};
use reseal_writer::qemu::QemuOptions;
use serde_json::{Value, json};

pub(crate) const MIB: usize = 1 << 20;
/// Length of each disk.
pub(crate) const DISK: usize = 64 * MIB;
/// What QEMU copies and records at once.
pub(crate) const GRAIN: usize = 64 << 10;
pub(crate) const DISKS: [&str; 2] = ["vd0", "sd0"];

/// A monitor, spoken to as simply as can be.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    pub(crate) fn connect(socket: &Path) -> Monitor {
        let end = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => panic!("{}: {e}", socket.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut monitor = Monitor { stream: BufReader::new(stream) };
        monitor.line();
        monitor.ok("qmp_capabilities", json!({}));
        monitor
    }

    /// One that is connected to nothing.
    pub(crate) fn connect_none() -> Monitor {
        Monitor { stream: BufReader::new(UnixStream::pair().unwrap().0) }
    }

    pub(crate) fn close(&mut self) {
        *self = Monitor::connect_none();
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    pub(crate) fn call(&mut self, execute: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({ "execute": execute, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let answer = self.line();
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().to_owned());
            }
        }
    }

    pub(crate) fn ok(&mut self, execute: &str, arguments: Value) -> Value {
        self.call(execute, arguments).unwrap_or_else(|e| panic!("{execute}: {e}"))
    }

    /// Writes as the guest's device would.
    pub(crate) fn write(&mut self, disk: &str, pattern: u8, offset: usize, length: usize) {
        let device = if disk == "vd0" { "/machine/peripheral/vd0/virtio-backend" } else { disk };
        let line = format!("qemu-io -d {device} \"write -P {pattern} {offset} {length}\"");
        assert_eq!(self.ok("human-monitor-command", json!({ "command-line": line })), "");
    }

    /// Names of all that reseal could have left, without bitmaps.
    pub(crate) fn ours(&mut self) -> Vec<String> {
        let mut found = Vec::new();
        let queries = [
            ("query-jobs", json!({}), "id"),
            ("query-block-exports", json!({}), "id"),
            ("query-named-block-nodes", json!({ "flat": true }), "node-name"),
            ("qom-list", json!({ "path": "/objects" }), "name"),
        ];
        for (query, arguments, key) in queries {
            for entry in self.ok(query, arguments).as_array().unwrap() {
                found.extend(entry[key].as_str().filter(|name| name.starts_with("reseal")).map(str::to_owned));
            }
        }
        for set in self.ok("query-fdsets", json!({})).as_array().unwrap() {
            found.push(format!("fdset {set}"));
        }
        if self.call("closefd", json!({ "fdname": "reseal-nbd" })).is_ok() {
            found.push("a socket".into());
        }
        // Only one server can run; if there is none, this starts and ends one.
        let address = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": "0" } });
        match self.call("nbd-server-start", json!({ "addr": address })) {
            Ok(_) => drop(self.ok("nbd-server-stop", json!({}))),
            Err(e) => found.push(e),
        }
        found
    }

    /// Whether a run is at work, or was.
    pub(crate) fn marker(&mut self) -> bool {
        let objects = self.ok("qom-list", json!({ "path": "/objects" }));
        objects.as_array().unwrap().iter().any(|object| object["name"] == "reseal-run")
    }

    /// Disk and name of each bitmap that records.
    pub(crate) fn bitmaps(&mut self) -> BTreeSet<(String, String)> {
        let mut found = BTreeSet::new();
        for entry in self.ok("query-block", json!({})).as_array().unwrap() {
            let disk = if entry["qdev"] == "sd0" { "sd0" } else { "vd0" };
            for bitmap in entry["inserted"]["dirty-bitmaps"].as_array().into_iter().flatten() {
                assert_eq!((&bitmap["recording"], &bitmap["busy"]), (&json!(true), &json!(false)), "{bitmap}");
                found.insert((disk.to_owned(), bitmap["name"].as_str().unwrap().to_owned()));
            }
        }
        found
    }
}

/// A VM. It ends with its test.
pub(crate) struct Vm {
    pub(crate) folder: PathBuf,
    pub(crate) child: Child,
    pub(crate) monitor: Monitor,
    /// What the guest believes its disks hold.
    pub(crate) model: [Vec<u8>; 2],
    owned: Option<tempfile::TempDir>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let said = log.lines().filter(|line| !line.starts_with("wrote") && !line.contains(" ops; "));
            eprintln!("QEMU ended with {status:?} and said:\n{}", said.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// Making a LUKS image takes seconds, so it is made once.
fn luks_image() -> &'static Path {
    static IMAGE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let done = (0..50).any(|_| {
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o"]);
            command.arg("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.hash-alg=sha512");
            command.arg(folder.path().join("luks.qcow2")).arg(DISK.to_string());
            command.stderr(Stdio::null()).status().unwrap().success()
        });
        assert!(done, "qemu-img can't make a LUKS image");
        folder
    };
    IMAGE.get_or_init(make).path()
}

impl Vm {
    /// Two disks of zeros: `vd0` is raw, `sd0` is qcow2 with LUKS.
    pub(crate) fn start() -> Vm {
        Vm::start_program(&[])
    }

    /// The same, with a program that the BIOS loads from `vd0`.
    pub(crate) fn start_program(program: &[u8]) -> Vm {
        let owned = tempfile::tempdir().unwrap();
        let folder = owned.path().to_owned();
        let mut first = File::create(folder.join("a.raw")).unwrap();
        first.set_len(DISK as u64).unwrap();
        if !program.is_empty() {
            let mut sector = [0; 512];
            sector[..program.len()].copy_from_slice(program);
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
            first.write_all(&sector).unwrap();
        }
        std::fs::copy(luks_image().join("luks.qcow2"), folder.join("b.qcow2")).unwrap();
        let mut vm = Vm::boot(folder, [vec![0; DISK], vec![0; DISK]]);
        vm.owned = Some(owned);
        vm
    }

    fn boot(folder: PathBuf, model: [Vec<u8>; 2]) -> Vm {
        Vm::boot_with(folder, model, "")
    }

    /// A VM with the devices that these arguments make, and none of its own.
    pub(crate) fn with(owned: tempfile::TempDir, arguments: &[String]) -> Vm {
        let folder = owned.path().to_owned();
        let mut vm = Vm::spawn(folder, [vec![0; DISK], vec![0; DISK]], arguments);
        vm.owned = Some(owned);
        vm
    }

    /// The same with a property more of the device of `vd0`.
    pub(crate) fn start_with(property: &str) -> Vm {
        let vm = Vm::start();
        vm.restart_with(property)
    }

    fn boot_with(folder: PathBuf, model: [Vec<u8>; 2], property: &str) -> Vm {
        let file = |name: &str| folder.join(name).display().to_string();
        let arguments = [
            "-object",
            "secret,id=s,data=abc",
            "-object",
            "iothread,id=io0",
            "-blockdev",
            &format!("driver=file,filename={},node-name=af", file("a.raw")),
            "-blockdev",
            "driver=raw,file=af,node-name=a",
            "-device",
            &format!("virtio-blk-pci,drive=a,id=vd0,bootindex=1{property}"),
            "-blockdev",
            &format!("driver=file,filename={},node-name=bf", file("b.qcow2")),
            "-blockdev",
            "driver=qcow2,file=bf,node-name=b,encrypt.format=luks,encrypt.key-secret=s",
            "-device",
            "virtio-scsi-pci,id=scsi",
            "-device",
            "scsi-hd,drive=b,id=sd0,bus=scsi.0",
            "-device",
            "virtio-net-pci,mac=52:54:00:12:34:56",
            "-device",
            "VGA",
            "-name",
            "web01",
        ];
        Vm::spawn(folder, model, &arguments.map(str::to_owned))
    }

    fn spawn(folder: PathBuf, model: [Vec<u8>; 2], arguments: &[String]) -> Vm {
        let log = File::options().append(true).create(true).open(folder.join("log")).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35,accel=tcg", "-m", "64", "-display", "none", "-nodefaults"]).args(arguments);
        for socket in ["qmp.sock", "test.sock"] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", folder.join(socket).display()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let monitor = Monitor::connect(&folder.join("test.sock"));
        Vm { folder, child, monitor, model, owned: None }
    }

    /// A clean shutdown and a new start.
    pub(crate) fn restart(self) -> Vm {
        self.restart_with("")
    }

    fn restart_with(mut self, property: &str) -> Vm {
        self.monitor.ok("quit", json!({}));
        self.child.wait().unwrap();
        let (folder, owned, model) = (self.folder.clone(), self.owned.take(), self.model.clone());
        drop(self);
        let mut vm = Vm::boot_with(folder, model, property);
        vm.owned = owned;
        vm
    }

    pub(crate) fn options(&self) -> QemuOptions {
        let mut options = QemuOptions::new(self.folder.join("qmp.sock"), self.folder.clone());
        options.program = env!("CARGO_BIN_EXE_reseal").into();
        options
    }

    pub(crate) fn write(&mut self, disk: usize, pattern: u8, offset: usize, length: usize) {
        self.monitor.write(DISKS[disk], pattern, offset, length);
        self.model[disk][offset..offset + length].fill(pattern);
    }

    /// What QEMU and the writes have said.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap()
    }

    /// Nothing of ours is in the VM but these bitmaps, on both disks.
    pub(crate) fn assert_clean(&mut self, bitmaps: &[&str]) {
        assert_eq!(self.monitor.ours(), Vec::<String>::new());
        let expected =
            bitmaps.iter().flat_map(|name| DISKS.map(|disk| (disk.to_owned(), (*name).to_owned()))).collect();
        assert_eq!(self.monitor.bitmaps(), expected);
    }
}

/// The whole disk as the export shows it.
pub(crate) fn read(disk: &SnapshotDisk) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.raw");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "raw"]).arg(uri(disk)).arg(&out);
    assert!(command.status().unwrap().success());
    std::fs::read(out).unwrap()
}

fn uri(disk: &SnapshotDisk) -> String {
    format!("nbd+unix:///{}?socket={}", disk.export, disk.socket.display())
}

/// Numbers of the grains that the bitmap of the export calls dirty.
pub(crate) fn dirty(disk: &SnapshotDisk) -> BTreeSet<usize> {
    let name = disk.changes.as_ref().unwrap();
    let mut command = Command::new("nbdinfo");
    command.arg("--json").arg(format!("--map=qemu:dirty-bitmap:{name}")).arg(uri(disk));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let map: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut grains = BTreeSet::new();
    for extent in map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1) {
        let number = |key: &str| extent[key].as_u64().unwrap() as usize;
        let (start, end) = (number("offset"), number("offset") + number("length"));
        assert_eq!((start % GRAIN, end % GRAIN), (0, 0));
        grains.extend(start / GRAIN..end / GRAIN);
    }
    grains
}

/// A different point for each number.
pub(crate) fn point(number: u8) -> PointId {
    PointId::from_bytes([number; 16])
}

/// The manifest of a point that was made of this snapshot.
pub(crate) fn manifest(number: u8, snapshot: &Snapshot) -> Manifest {
    let disk = |disk: &SnapshotDisk| Disk {
        name: disk.name.clone(),
        length: DISK as u64,
        root: None,
        used_clusters: 0,
        source: disk.source.clone(),
        tracking: disk.tracking.clone(),
        claim: None,
    };
    Manifest {
        vm: VmName::new("web01").unwrap(),
        vm_id: VmId::from_bytes([9; 16]),
        number: number.into(),
        point_id: point(number),
        created: Timestamp(1_795_501_907_123),
        parent: None,
        disks: snapshot.disks.iter().map(disk).collect(),
        definition: None,
        stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
        warnings: vec![],
        locked: None,
    }
}

/// The bitmap of a point.
pub(crate) fn bitmap(number: u8) -> String {
    format!("reseal-{}", point(number))
}
