//! Snapshots of a real QEMU: they stay as they were, and the bitmaps tell exactly what changed.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that meets what it did not expect ends there

mod qemu_support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reseal_writer::live::{Hypervisor, Snapshot};
use reseal_writer::qemu::Qemu;
use serde_json::{Value, json};

use qemu_support::{DISK, DISKS, GRAIN, MIB, Monitor, Vm, bitmap, dirty, manifest, point, read};

fn assert_shows(snapshot: &Snapshot, model: &[Vec<u8>; 2]) {
    for (disk, model) in snapshot.disks.iter().zip(model) {
        let shown = read(disk);
        assert_eq!(shown.len(), DISK);
        let differs = shown.iter().zip(model).position(|(shown, model)| shown != model);
        assert_eq!(differs, None, "{} differs", disk.name);
    }
}

fn grains(areas: &[(usize, usize)]) -> BTreeSet<usize> {
    areas.iter().flat_map(|&(start, length)| start / GRAIN..(start + length).div_ceil(GRAIN)).collect()
}

fn no_warnings() -> Vec<String> {
    Vec::new()
}

#[test]
fn a_snapshot_stays_and_the_bitmap_tells_what_changed() {
    let mut vm = Vm::start();
    for disk in 0..2 {
        vm.write(disk, 1, 0, 8 * MIB);
        vm.write(disk, 2, DISK - 512, 512);
    }
    let mut qemu = Qemu::new(vm.options());
    let first = qemu.begin(point(1), None).unwrap();
    assert_eq!(first.warnings, no_warnings());
    assert_eq!(first.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), DISKS);
    assert!(first.disks.iter().all(|disk| disk.changes.is_err() && disk.tracking.is_some()));

    // The guest goes on while the disks are read.
    let before = vm.model.clone();
    vm.write(0, 3, MIB, 2 * MIB);
    vm.write(1, 3, 512, 512);
    let folder = vm.folder.clone();
    let (sender, stop) = std::sync::mpsc::channel::<()>();
    let mut monitor = std::mem::replace(&mut vm.monitor, Monitor::connect_none());
    let writer = std::thread::spawn(move || {
        let mut round = 0;
        while stop.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            round = (round + 1) % 100;
            for disk in DISKS {
                monitor.write(disk, 100 + round as u8, 16 * MIB + round * GRAIN, GRAIN);
            }
        }
        monitor
    });
    assert_shows(&first, &before);
    sender.send(()).unwrap();
    vm.monitor = writer.join().unwrap();
    assert_shows(&first, &before);
    assert_scratch_is_sealed(&vm);
    qemu.check().unwrap();
    let since = manifest(1, &first);
    assert_eq!(qemu.end(true), no_warnings());
    vm.assert_clean(&[&bitmap(1)]);

    // A second one, from the first; it is not kept. What was written while the first was read belongs to it.
    for disk in 0..2 {
        vm.write(disk, 0, 16 * MIB, 100 * GRAIN + GRAIN);
        vm.write(disk, 5, 40 * MIB + 512, 512);
    }
    let expected = [
        grains(&[(MIB, 2 * MIB), (16 * MIB, 101 * GRAIN), (40 * MIB + 512, 512)]),
        grains(&[(512, 512), (16 * MIB, 101 * GRAIN), (40 * MIB + 512, 512)]),
    ];
    let began = Instant::now();
    let second = qemu.begin(point(2), Some(&since)).unwrap();
    eprintln!("begun in {:?}", began.elapsed());
    let before = vm.model.clone();
    vm.write(0, 6, 0, 512);
    vm.write(1, 6, 60 * MIB, MIB);
    for (disk, expected) in second.disks.iter().zip(&expected) {
        assert_eq!(&dirty(disk), expected, "{}", disk.name);
    }
    assert_shows(&second, &before);
    let began = Instant::now();
    qemu.check().unwrap();
    assert_eq!(qemu.end(false), no_warnings());
    eprintln!("ended in {:?}", began.elapsed());
    vm.assert_clean(&[&bitmap(1)]);

    // A third one, from the first too.
    let third = qemu.begin(point(3), Some(&since)).unwrap();
    let mut more = expected;
    more[0].extend(grains(&[(0, 512)]));
    more[1].extend(grains(&[(60 * MIB, MIB)]));
    for (disk, expected) in third.disks.iter().zip(&more) {
        assert_eq!(&dirty(disk), expected, "{}", disk.name);
    }
    assert_shows(&third, &vm.model);
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), no_warnings());
    vm.assert_clean(&[&bitmap(3)]);
    assert!(!vm.log().contains("failed"));
    assert_eq!(leftover_files(&folder), Vec::<String>::new());
}

/// The scratch files hold what was overwritten, but not to be read. They have no name, so QEMU's descriptors lead
/// there.
fn assert_scratch_is_sealed(vm: &Vm) {
    let mut total = 0;
    for fd in std::fs::read_dir(format!("/proc/{}/fd", vm.child.id())).unwrap() {
        let fd = fd.unwrap().path();
        let target = std::fs::read_link(&fd).unwrap_or_default();
        if target.starts_with(&vm.folder) && target.to_string_lossy().ends_with("(deleted)") {
            let bytes = std::fs::read(&fd).unwrap();
            total += bytes.len();
            assert!(!bytes.windows(64).any(|part| part == [1; 64]), "plaintext in {}", target.display());
        }
    }
    // The guest overwrote 2 MiB of what it had written.
    assert!(total > 6 * MIB, "{total} bytes of scratch");
}

/// What is in the VM's folder that no test put there.
fn leftover_files(folder: &Path) -> Vec<String> {
    let known = ["a.raw", "b.qcow2", "log", "qmp.sock", "test.sock"];
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !known.contains(&name.as_str())).collect()
}

#[test]
fn a_bitmap_in_the_image_survives_a_shutdown() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    let first = qemu.begin(point(1), None).unwrap();
    let since = manifest(1, &first);
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), no_warnings());
    vm.write(1, 7, 3 * MIB, MIB);
    let mut vm = vm.restart();
    vm.write(1, 7, 5 * MIB, MIB);
    let second = qemu.begin(point(2), Some(&since)).unwrap();
    let reason = second.disks[0].changes.as_ref().unwrap_err();
    assert!(reason.contains("gone"), "the raw image can't keep it: {reason}");
    assert_eq!(dirty(&second.disks[1]), grains(&[(3 * MIB, MIB), (5 * MIB, MIB)]));
    assert_shows(&second, &vm.model);
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), no_warnings());
    vm.assert_clean(&[&bitmap(2)]);
}

#[test]
fn the_machine_is_recorded() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    let definition = qemu.begin(point(1), None).unwrap().definition.unwrap();
    assert_eq!(definition.file_name, "machine.json");
    let machine: Value = serde_json::from_str(&definition.text).unwrap();
    assert_eq!(machine["name"], "web01");
    assert!(machine["machine"].as_str().unwrap().starts_with("pc-q35-"), "{machine}");
    assert_eq!(machine["memory"]["base"], 64 << 20);
    assert_eq!((&machine["cpus"]["count"], &machine["cpus"]["model"]), (&json!(1), &json!("qemu64")));
    assert_eq!(machine["firmware"]["kind"], "bios");
    let disks = &machine["disks"];
    assert_eq!((&disks[0]["id"], &disks[0]["interface"]), (&json!("vd0"), &json!("virtio")));
    assert_eq!((&disks[0]["boot-index"], &disks[0]["name"]), (&json!(1), &json!("vd0")));
    assert_eq!((&disks[1]["id"], &disks[1]["interface"]), (&json!("sd0"), &json!("scsi")));
    assert_eq!(machine["nics"], json!([{ "model": "virtio-net-pci", "mac": "52:54:00:12:34:56" }]));
    assert_eq!(machine["displays"], json!(["VGA"]));
    drop(qemu);
    vm.assert_clean(&[]);
}

#[test]
fn the_server_of_another_program_is_left_alone() {
    let mut vm = Vm::start();
    let address = json!({ "type": "unix", "data": { "path": vm.folder.join("theirs.sock") } });
    vm.monitor.ok("nbd-server-start", json!({ "addr": address }));
    let export = json!({ "type": "nbd", "id": "theirs", "node-name": "a", "name": "theirs" });
    vm.monitor.ok("block-export-add", export);
    let mut qemu = Qemu::new(vm.options());
    let error = qemu.begin(point(1), None).unwrap_err().to_string();
    assert!(error.contains("nbd-server-stop"), "{error}");
    let exports = vm.monitor.ok("query-block-exports", json!({}));
    assert_eq!(exports[0]["id"], "theirs");
    vm.monitor.ok("nbd-server-stop", json!({}));
    vm.assert_clean(&[]);
}

#[test]
fn two_backups_of_one_vm_do_not_meet() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    let snapshot = qemu.begin(point(1), None).unwrap();
    let mut options = vm.options();
    options.timeout = Duration::from_millis(500);
    let began = Instant::now();
    let error = Qemu::new(options.clone()).begin(point(2), None).unwrap_err().to_string();
    assert!(error.contains("one client at a time") && began.elapsed() < Duration::from_secs(5), "{error}");
    // Another monitor of the same VM lets it in, but not far.
    vm.monitor.close();
    options.qmp = vm.folder.join("test.sock");
    options.timeout = Duration::from_secs(10);
    let error = Qemu::new(options).begin(point(2), None).unwrap_err().to_string();
    assert!(error.contains("another backup"), "{error}");
    vm.monitor = Monitor::connect(&vm.folder.join("test.sock"));
    assert_shows(&snapshot, &vm.model);
    qemu.check().unwrap();
    assert_eq!(qemu.end(false), no_warnings());
    vm.assert_clean(&[]);
}

#[test]
fn a_cancelled_job_is_noticed() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    qemu.begin(point(1), None).unwrap();
    qemu.check().unwrap();
    vm.monitor.ok("job-cancel", json!({ "id": "reseal-backup-1" }));
    std::thread::sleep(Duration::from_millis(200));
    let error = qemu.check().unwrap_err().to_string();
    assert!(error.contains("reseal-backup-1") && error.contains("nothing was committed"), "{error}");
    assert_eq!(qemu.end(false), no_warnings());
    vm.assert_clean(&[]);
}

#[test]
fn readers_that_are_still_connected_do_no_harm() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    let snapshot = qemu.begin(point(1), None).unwrap();
    let disk = &snapshot.disks[0];
    // One that reads, one that has not said a word, and one that is killed.
    let reader = || {
        let uri = format!("nbd+unix:///{}?socket={}", disk.export, disk.socket.display());
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", "raw", "-c", "read 0 1M", "-c", "sleep 60000", &uri]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let (mut reading, mut killed) = (reader(), reader());
    let silent = std::os::unix::net::UnixStream::connect(&disk.socket).unwrap();
    // QEMU 7.2 would wait for this one for ever, and the VM with it.
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        drop(silent);
    });
    std::thread::sleep(Duration::from_millis(500));
    killed.kill().unwrap();
    killed.wait().unwrap();
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), no_warnings());
    later.join().unwrap();
    vm.assert_clean(&[&bitmap(1)]);
    reading.kill().unwrap();
    reading.wait().unwrap();
    assert!(vm.child.try_wait().unwrap().is_none());
}

#[test]
fn a_reader_that_stays_keeps_the_server_until_the_next_run() {
    let mut vm = Vm::start();
    let mut options = vm.options();
    options.timeout = Duration::from_secs(2);
    let mut qemu = Qemu::new(options.clone());
    let snapshot = qemu.begin(point(1), None).unwrap();
    let since = manifest(1, &snapshot);
    let silent = std::os::unix::net::UnixStream::connect(&snapshot.disks[0].socket).unwrap();
    qemu.check().unwrap();
    let left = qemu.end(true);
    assert!(left.len() == 1 && left[0].contains("NBD server"), "{left:?}");
    // The VM goes on.
    vm.write(0, 1, 0, MIB);
    drop(silent);
    let end = Instant::now() + Duration::from_secs(20);
    while vm.monitor.marker() {
        assert!(Instant::now() < end, "the guardian goes on trying");
        std::thread::sleep(Duration::from_millis(50));
    }
    let snapshot = qemu.begin(point(2), Some(&since)).unwrap();
    assert_eq!(dirty(&snapshot.disks[0]), grains(&[(0, MIB)]));
    assert_eq!(qemu.end(false), no_warnings());
    vm.assert_clean(&[&bitmap(1)]);
}

#[test]
fn a_vm_that_is_killed_is_an_error_in_time() {
    let mut vm = Vm::start();
    let mut qemu = Qemu::new(vm.options());
    let snapshot = qemu.begin(point(1), None).unwrap();
    let place = snapshot.disks[0].socket.parent().unwrap().to_owned();
    vm.child.kill().unwrap();
    vm.child.wait().unwrap();
    let began = Instant::now();
    let error = qemu.check().unwrap_err().to_string();
    assert!(error.contains("was closed"), "{error}");
    assert_eq!(qemu.end(false), no_warnings());
    assert!(began.elapsed() < Duration::from_secs(2));
    assert!(!place.exists());
    let error = qemu.begin(point(1), None).unwrap_err().to_string();
    assert!(error.contains("is the VM running"), "{error}");
}

/// A file system of its own, if the user may mount one.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Option<Small> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(folder.path());
        mount.status().is_ok_and(|status| status.success()).then_some(Small(folder))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn scratch_that_fills_up_does_not_hurt_the_guest() {
    let Some(small) = Small::new("48m") else { return eprintln!("skipped: this user may not mount") };
    let mut vm = Vm::start();
    // Zeros need no room.
    vm.write(0, 1, 0, DISK);
    let mut options = vm.options();
    options.scratch = small.0.path().to_owned();
    let mut qemu = Qemu::new(options);
    qemu.begin(point(1), None).unwrap();
    for at in 0..60 {
        vm.write(0, 8, at * MIB, MIB);
        std::thread::sleep(Duration::from_millis(10));
    }
    let error = qemu.check().unwrap_err().to_string();
    assert!(error.contains(&small.0.path().display().to_string()) && error.contains("--scratch"), "{error}");
    assert_eq!(qemu.end(false), no_warnings());
    vm.assert_clean(&[]);
    assert!(!vm.log().contains("failed") && !vm.log().contains("rror"), "the guest saw an error");
    let snapshot = Qemu::new(vm.options()).begin(point(2), None).map(|snapshot| snapshot.disks.len());
    assert_eq!(snapshot.unwrap(), 2);
}

#[test]
fn a_disk_in_a_thread_of_its_own_is_refused_where_it_would_end_the_vm() {
    let mut vm = Vm::start_with(",iothread=io0");
    let mut qemu = Qemu::new(vm.options());
    match qemu.begin(point(1), None) {
        Ok(snapshot) => {
            assert_shows(&snapshot, &vm.model);
            assert_shows(&snapshot, &vm.model);
            qemu.check().unwrap();
        }
        Err(e) => assert!(e.to_string().contains("iothread"), "{e}"),
    }
    qemu.end(false);
    vm.assert_clean(&[]);
}

#[test]
fn drives_of_the_old_kind_are_disks_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, length: usize| {
        let path = folder.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(length as u64).unwrap();
        path.display().to_string()
    };
    let drives = [
        format!("if=virtio,format=raw,file={}", file("a.raw", DISK)),
        format!("if=ide,format=raw,file={}", file("b.raw", DISK)),
        format!("if=ide,media=cdrom,format=raw,readonly=on,file={}", file("cd.iso", MIB)),
        format!("if=pflash,unit=0,format=raw,readonly=on,file={}", file("code.fd", MIB)),
        format!("if=pflash,unit=1,format=raw,file={}", file("vars.fd", MIB)),
        format!("if=none,id=unused,format=raw,file={}", file("unused.raw", MIB)),
    ];
    let arguments: Vec<_> = drives.into_iter().flat_map(|drive| ["-drive".to_owned(), drive]).collect();
    let mut vm = Vm::with(folder, &arguments);
    let write = |vm: &mut Vm, drive: &str, offset: usize| {
        let line = format!("qemu-io {drive} \"write -P 9 {offset} 512\"");
        assert_eq!(vm.monitor.ok("human-monitor-command", json!({ "command-line": line })), "");
    };
    let mut qemu = Qemu::new(vm.options());
    let first = qemu.begin(point(1), None).unwrap();
    assert!(first.warnings.len() == 1 && first.warnings[0].starts_with("pflash1 "), "{:?}", first.warnings);
    assert_eq!(first.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["virtio0", "ide0-hd0"]);
    write(&mut vm, "virtio0", MIB);
    assert_shows(&first, &vm.model);
    let since = manifest(1, &first);
    qemu.check().unwrap();
    assert_eq!(qemu.end(true), no_warnings());
    write(&mut vm, "ide0-hd0", 2 * MIB);
    let second = qemu.begin(point(2), Some(&since)).unwrap();
    assert_eq!(dirty(&second.disks[0]), grains(&[(MIB, 512)]));
    assert_eq!(dirty(&second.disks[1]), grains(&[(2 * MIB, 512)]));
    let machine: Value = serde_json::from_str(&second.definition.unwrap().text).unwrap();
    assert_eq!((&machine["firmware"]["kind"], &machine["disks"][1]["interface"]), (&json!("uefi"), &json!("sata")));
    drop(qemu);
    assert_eq!(vm.monitor.ours(), no_warnings());
}

/// For the BIOS: counts, and writes the number to the first disk, then to the second, for ever; after 16 numbers to
/// the next of 128 cylinders.
const COUNTER: [u8; 48] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0xbb, 0x00, 0x80, // mov bx, 0x8000
    0x66, 0xff, 0x06, 0x00, 0x80, // again: inc dword [0x8000]
    0x8b, 0x0e, 0x00, 0x80, // mov cx, [0x8000]
    0xc1, 0xe9, 0x04, // shr cx, 4
    0x83, 0xe1, 0x7f, // and cx, 0x7f
    0x88, 0xcd, // mov ch, cl
    0xb1, 0x03, // mov cl, 3
    0xba, 0x80, 0x00, // mov dx, 0x80
    0xb8, 0x01, 0x03, // mov ax, 0x0301
    0x51, // push cx
    0xcd, 0x13, // int 0x13
    0x59, // pop cx
    0xba, 0x81, 0x00, // mov dx, 0x81
    0xb8, 0x01, 0x03, // mov ax, 0x0301
    0xcd, 0x13, // int 0x13
    0xeb, 0xd9, // jmp again
];

/// The highest number on a disk. Sectors of it begin with a number and are zero otherwise; the boot sector is not.
fn highest(disk: &[u8]) -> u32 {
    let number = |sector: &[u8]| u32::from_le_bytes(sector[..4].try_into().unwrap());
    disk.chunks_exact(512).skip(1).map(number).max().unwrap()
}

#[test]
fn a_guest_that_writes_in_order_to_two_disks_is_never_seen_reversed() {
    let mut vm = Vm::start_program(&COUNTER);
    let mut qemu = Qemu::new(vm.options());
    let mut since = None;
    let mut copies = [vec![0; DISK], vec![0; DISK]];
    let mut kept = copies.clone();
    let (mut before, mut partly) = (0, 0);
    std::thread::sleep(Duration::from_secs(3));
    for round in 1..=12 {
        let snapshot = qemu.begin(point(round), since.as_ref()).unwrap();
        for (disk, copy) in snapshot.disks.iter().zip(&mut copies) {
            let whole = read(disk);
            if disk.changes.is_ok() {
                // What the bitmap calls unchanged is taken from the point before.
                let changed = dirty(disk);
                partly += usize::from(!changed.is_empty() && changed.len() < 100);
                for at in changed.into_iter().map(|grain| grain * GRAIN) {
                    copy[at..at + GRAIN].copy_from_slice(&whole[at..at + GRAIN]);
                }
                assert!(*copy == whole, "{} in round {round}: the bitmap missed a change", disk.name);
            } else {
                *copy = whole;
            }
        }
        let (first, second) = (highest(&copies[0]), highest(&copies[1]));
        assert!(first == second || first == second + 1, "round {round}: {first} and {second}");
        assert!(first > before, "round {round}: the guest stands still at {first}");
        before = first;
        qemu.check().unwrap();
        // Every third is not kept: the next goes on from the one before it.
        if round % 3 == 0 {
            assert_eq!(qemu.end(false), no_warnings());
            copies = kept.clone();
        } else {
            kept = copies.clone();
            since = Some(manifest(round, &snapshot));
            assert_eq!(qemu.end(true), no_warnings());
        }
    }
    assert!(partly > 10, "{partly} bitmaps told something from nothing");
    assert!(vm.child.try_wait().unwrap().is_none());
}
