//! A writer that is killed after each command that it gives to QEMU: nothing stays behind, and no record of changes is
//! lost.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that meets what it did not expect ends there

mod qemu_support;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reseal_format::manifest::Manifest;
use reseal_writer::live::Hypervisor;
use reseal_writer::qemu::{Qemu, QemuOptions};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde_json::json;

use qemu_support::{DISK, GRAIN, MIB, Vm, bitmap, manifest, point};

/// Names the folder of the VM to a process that is to be killed.
const CHILD: &str = "RESEAL_TEST_CRASH";

/// Stands between a writer and QEMU, and kills the writer when it has passed on so many commands.
struct Proxy {
    passed: Arc<AtomicUsize>,
    victim: Arc<Mutex<Option<(usize, Child)>>>,
}

impl Proxy {
    fn start(folder: &Path) -> Proxy {
        let listener = UnixListener::bind(folder.join("proxy.sock")).unwrap();
        let (passed, victim) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(None)));
        let proxy = Proxy { passed: passed.clone(), victim: victim.clone() };
        let qmp = folder.join("qmp.sock");
        std::thread::spawn(move || {
            for client in listener.incoming() {
                serve(client.unwrap(), &qmp, &passed, &victim);
            }
        });
        proxy
    }
}

fn serve(client: UnixStream, qmp: &Path, passed: &AtomicUsize, victim: &Mutex<Option<(usize, Child)>>) {
    let Ok(qemu) = UnixStream::connect(qmp) else { return };
    let (mut from, mut to) = (qemu.try_clone().unwrap(), client.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(got @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..got]).is_err() {
                return;
            }
        }
    });
    while pass(&client, &qemu) {
        let count = passed.fetch_add(1, Ordering::SeqCst) + 1;
        match &mut *victim.lock().unwrap() {
            Some((at, child)) if count == *at => child.kill().unwrap(),
            _ => {}
        }
    }
    let _ = qemu.shutdown(std::net::Shutdown::Both);
    back.join().unwrap();
}

/// Passes on one command, and what descriptors come with it.
fn pass(client: &UnixStream, qemu: &UnixStream) -> bool {
    let mut bytes = [0; 16 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let Ok(got) = rustix::net::recvmsg(client, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) else {
        return false;
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.bytes == 0 {
        return false;
    }
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let line = [IoSlice::new(&bytes[..got.bytes])];
    rustix::net::sendmsg(qemu, &line, &mut control, SendFlags::NOSIGNAL).is_ok()
}

/// Makes point 2 after point 1, as a process of its own.
#[test]
#[ignore = "is started by the test below, to be killed"]
fn child() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let since: Manifest = serde_json::from_slice(&std::fs::read(folder.join("since.json")).unwrap()).unwrap();
    let mut options = QemuOptions::new(folder.join("proxy.sock"), folder.clone());
    options.program = env!("CARGO_BIN_EXE_reseal").into();
    let mut qemu = Qemu::new(options);
    let snapshot = qemu.begin(point(2), Some(&since)).unwrap();
    assert!(snapshot.disks.iter().all(|disk| disk.changes.is_ok()));
    qemu.check().unwrap();
    std::fs::write(folder.join("checked"), "").unwrap();
    assert_eq!(qemu.end(true), Vec::<String>::new());
}

fn start_child(folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored"]).env(CHILD, folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the guardian has ended, which removes the marker last.
fn wait_for_guardian(vm: &mut Vm) {
    let end = Instant::now() + Duration::from_secs(30);
    while vm.monitor.marker() {
        assert!(Instant::now() < end, "the guardian has not cleaned up");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A state in which point 1 is the newest.
fn make_first(vm: &Vm) {
    let mut qemu = Qemu::new(vm.options());
    let snapshot = qemu.begin(point(1), None).unwrap();
    std::fs::write(vm.folder.join("since.json"), serde_json::to_vec(&manifest(1, &snapshot)).unwrap()).unwrap();
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), Vec::<String>::new());
}

#[test]
fn a_writer_killed_at_any_command_leaves_nothing() {
    let mut vm = Vm::start();
    let proxy = Proxy::start(&vm.folder);
    make_first(&vm);
    assert!(start_child(&vm.folder).wait().unwrap().success());
    vm.assert_clean(&[&bitmap(2)]);
    let commands = proxy.passed.swap(0, Ordering::SeqCst);
    assert!(commands > 30, "{commands}");
    let (first, second) = (bitmap(1), bitmap(2));
    let mut seen = [0; 3];
    for at in 1..=commands {
        make_first(&vm);
        let checked = vm.folder.join("checked");
        let _ = std::fs::remove_file(&checked);
        proxy.passed.store(0, Ordering::SeqCst);
        *proxy.victim.lock().unwrap() = Some((at, start_child(&vm.folder)));
        // The victim's command may be the last that it gave.
        let end = Instant::now() + Duration::from_secs(30);
        while proxy.victim.lock().unwrap().as_mut().is_some_and(|(_, child)| child.try_wait().unwrap().is_none()) {
            assert!(Instant::now() < end, "not killed at command {at}");
            std::thread::sleep(Duration::from_millis(5));
        }
        *proxy.victim.lock().unwrap() = None;
        wait_for_guardian(&mut vm);
        let present = vm.monitor.bitmaps();
        let has = |name: &str| present.iter().filter(|(_, bitmap)| bitmap == name).count();
        match (has(&first), has(&second)) {
            (2, 0) => seen[0] += 1,
            // The point may have been committed by then.
            (2, 2) if checked.exists() => seen[1] += 1,
            (0..=2, 2) if checked.exists() => seen[2] += 1,
            // Just between the plan for that and the file that says so.
            (2, 2) => seen[1] += 1,
            other => panic!("killed at command {at}: {other:?} in {present:?}"),
        }
        let names: Vec<_> = present.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(vm.monitor.ours(), Vec::<String>::new(), "killed at command {at}, with {names:?}");
    }
    assert!(seen[0] > 20 && seen[2] > 0, "{seen:?}");
    // What is left of either outcome, the next run removes.
    make_first(&vm);
    vm.assert_clean(&[&first]);
    assert!(vm.child.try_wait().unwrap().is_none());
}

#[test]
fn what_writer_and_guardian_left_the_next_run_removes() {
    let mut vm = Vm::start();
    vm.write(0, 1, 0, 8 * MIB);
    make_first(&vm);
    let since: Manifest = serde_json::from_slice(&std::fs::read(vm.folder.join("since.json")).unwrap()).unwrap();
    // A dead run, by hand: a marker of a process that is none, and one thing of each kind.
    let marker = json!({ "guardian": { "pid": 4_000_000_000_u32, "start": 1 }, "server": vm.folder.join("old.sock") });
    let object = json!({ "qom-type": "authz-simple", "id": "reseal-run", "identity": marker.to_string() });
    vm.monitor.ok("object-add", object);
    vm.monitor.ok("object-add", json!({ "qom-type": "secret", "id": "reseal-secret-0", "data": "x" }));
    let address = json!({ "type": "unix", "data": { "path": vm.folder.join("old.sock") } });
    vm.monitor.ok("nbd-server-start", json!({ "addr": address }));
    let image = vm.folder.join("old.qcow2");
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(DISK.to_string()).status();
    assert!(made.unwrap().success());
    vm.monitor.ok("blockdev-add", json!({ "driver": "file", "node-name": "reseal-file-0", "filename": image }));
    let node = json!({ "driver": "qcow2", "node-name": "reseal-scratch-0", "file": "reseal-file-0", "backing": "a" });
    vm.monitor.ok("blockdev-add", node);
    let job = json!({
        "job-id": "reseal-backup-0", "device": "a", "target": "reseal-scratch-0", "sync": "none", "auto-dismiss": false,
    });
    vm.monitor.ok("blockdev-backup", job);
    let old = bitmap(7);
    vm.monitor.ok("block-dirty-bitmap-add", json!({ "node": "a", "name": old, "disabled": true }));
    let export = json!({
        "type": "nbd", "id": "reseal-export-0", "node-name": "reseal-scratch-0", "name": "x",
        "bitmaps": [{ "node": "a", "name": old }],
    });
    vm.monitor.ok("block-export-add", export);
    vm.write(0, 2, MIB, GRAIN);

    let mut qemu = Qemu::new(vm.options());
    let snapshot = qemu.begin(point(2), Some(&since)).unwrap();
    assert_eq!(qemu_support::dirty(&snapshot.disks[0]), [MIB / GRAIN].into());
    assert_eq!(qemu_support::read(&snapshot.disks[0]), vm.model[0]);
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), Vec::<String>::new());
    vm.assert_clean(&[&bitmap(2)]);
}
