//! Moving the disks of a running QEMU: to the end, up to a failure, interrupted, and with who moves them dead in the midst.
//! What a guest would write is written through its devices by QEMU's own means, so that nothing has to boot.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reseal_format::names::DiskName;
use reseal_mountfs::promote::{Ledger, Move, Options, PromoteError, Recorded, Stands, Watch, promote, settle};
use reseal_mountfs::target::{Format, TargetSpec, read_secret};
use reseal_qmp::Client;
use reseal_tests::loops::{Loop, Mount};
use reseal_tests::marker::Marker;
use reseal_tests::process::{Running, bound_to_us, start, system, wait_until};
use reseal_tests::qmp::Qmp;
use reseal_tests::random::Random;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const LENGTH: usize = 48 * MIB;
const DATA: std::ops::Range<usize> = 8 * MIB..20 * MIB;
const TIME: Duration = Duration::from_secs(30);
const PASSPHRASE: &str = "correct horse";

/// A QEMU with two disks on exports, whose guest never begins.
struct Vm {
    folder: tempfile::TempDir,
    qemu: Option<Running>,
    exports: Vec<Option<Running>>,
    /// What the disks must hold.
    content: Vec<RefCell<Vec<u8>>>,
}

fn wait_for_listener(socket: &Path) {
    wait_until(&format!("who listens at {}", socket.display()), TIME, || UnixStream::connect(socket).is_ok());
}

impl Vm {
    fn new() -> Vm {
        let folder = tempfile::tempdir().unwrap();
        let mut vm = Vm { folder, qemu: None, exports: Vec::new(), content: Vec::new() };
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-M", "pc", "-m", "64", "-nodefaults", "-display", "none", "-S"]);
        for monitor in ["qmp", "watch"] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", vm.path(monitor).display()));
        }
        for nth in 0..2 {
            let mut content = vec![0; LENGTH];
            content[DATA].copy_from_slice(&Random::new(nth as u64).bytes(DATA.len()));
            let file = fs::File::create_new(vm.path(&format!("{nth}.raw"))).unwrap();
            file.set_len(LENGTH as u64).unwrap();
            file.write_all_at(&content[DATA], DATA.start as u64).unwrap();
            vm.content.push(RefCell::new(content));
            vm.exports.push(None);
            vm.serve(nth);
            let node = json!({
                "driver": "nbd", "node-name": format!("disk-{nth}"), "export": "disk", "reconnect-delay": 1,
                "server": { "type": "unix", "path": vm.path(&format!("{nth}.sock")) }, "discard": "unmap"
            });
            command.arg("-blockdev").arg(node.to_string());
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,id=reseal-disk-{nth},drive=disk-{nth},werror=stop,rerror=stop"));
        }
        vm.qemu = Some(start(bound_to_us(&mut command)));
        wait_for_listener(&vm.path("qmp"));
        vm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&mut self, nth: usize) {
        let socket = self.path(&format!("{nth}.sock"));
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=4", "-f", "raw", "-x", "disk", "-k"]).arg(&socket);
        self.exports[nth] = Some(start(bound_to_us(command.arg(self.path(&format!("{nth}.raw"))))));
        wait_for_listener(&socket);
    }

    fn client(&self) -> Client {
        Client::connect(&self.path("qmp"), TIME).unwrap()
    }

    fn watch(&self) -> Qmp {
        Qmp::connect(&self.path("watch"))
    }

    fn io(&self, nth: usize, command: &str) -> Value {
        let line = format!("qemu-io -d /machine/peripheral/reseal-disk-{nth}/virtio-backend \"{command}\"");
        self.watch().run("human-monitor-command", json!({ "command-line": line }))
    }

    /// Writes as a guest would.
    #[track_caller]
    fn write(&self, nth: usize, at: usize, length: usize, byte: u8) {
        let said = self.io(nth, &format!("write -P {byte} {at} {length}"));
        assert!(!said.to_string().contains("rror"), "{said}");
        self.content[nth].borrow_mut()[at..at + length].fill(byte);
    }

    /// On which node each device stands.
    fn nodes(&self) -> Vec<String> {
        let devices = self.watch().run("query-block", json!({}));
        let node = |entry: &Value| entry["inserted"]["node-name"].as_str().unwrap().to_owned();
        devices.as_array().unwrap().iter().map(node).collect()
    }

    /// Checks that both devices are on their overlays, can be written to, and that QEMU has nothing of a move.
    #[track_caller]
    fn assert_untouched(&self) {
        assert_eq!(self.nodes(), ["disk-0", "disk-1"]);
        let left = self.watch().left_behind();
        assert_eq!(left.jobs, 0, "{left:#?}");
        let ours = |name: &&String| name.starts_with("reseal-");
        assert_eq!(left.nodes.iter().chain(&left.objects).find(ours), None, "{left:#?}");
        for nth in 0..2 {
            self.write(nth, 40 * MIB, 4096, 0x77);
            self.assert_holds(nth, &["-f", "raw", &self.path(&format!("{nth}.raw")).display().to_string()]);
        }
    }

    /// Checks what an image holds, as another program reads it.
    #[track_caller]
    fn assert_holds(&self, nth: usize, image: &[&str]) {
        self.io(nth, "flush");
        let expected = self.path("expected.raw");
        fs::write(&expected, &*self.content[nth].borrow()).unwrap();
        let copied = self.path("copied.raw");
        let words = [&["convert", "-U", "-O", "raw"], image, &[copied.to_str().unwrap()]].concat();
        system("qemu-img", &words);
        assert!(fs::read(&copied).unwrap() == *self.content[nth].borrow(), "disk {nth} differs");
    }

    fn wish(&self, nth: usize, target: &Path, format: Format, encrypted: bool) -> Move {
        let secret = encrypted.then(|| {
            let path = self.path("secret");
            fs::write(&path, PASSPHRASE).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            read_secret(&path).unwrap()
        });
        Move {
            disk: DiskName::new(&format!("d{nth}")).unwrap(),
            nth,
            device: format!("reseal-disk-{nth}"),
            node: format!("disk-{nth}"),
            target: TargetSpec::new(target, format, secret).unwrap(),
        }
    }

    /// Both disks to raw files.
    fn wishes(&self) -> Vec<Move> {
        (0..2).map(|nth| self.wish(nth, &self.path(&format!("target-{nth}")), Format::Raw, false)).collect()
    }

    #[track_caller]
    fn assert_no_targets(&self) {
        for nth in 0..2 {
            assert!(!self.path(&format!("target-{nth}")).exists());
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for process in self.qemu.take().into_iter().chain(self.exports.iter_mut().filter_map(Option::take)) {
            drop(process.kill());
        }
    }
}

/// Does something when disks are to be recorded as moved.
struct Book<'a>(&'a dyn Fn(&[&Move]) -> Result<(), PromoteError>, Vec<String>);

impl Ledger for Book<'_> {
    fn moved(&mut self, moves: &[&Move]) -> Result<(), PromoteError> {
        self.1.extend(moves.iter().map(|wish| wish.disk.to_string()));
        (self.0)(moves)
    }

    fn stayed(&mut self, moves: &[&Move]) -> Result<(), PromoteError> {
        self.1.retain(|name| moves.iter().all(|wish| wish.disk.as_str() != name));
        Ok(())
    }
}

fn quietly(
    client: &mut Client,
    moves: &[Move],
    options: Options,
    stop: &AtomicBool,
) -> Result<Vec<String>, PromoteError> {
    let mut book = Book(&|_| Ok(()), Vec::new());
    let moved = promote(client, moves, options, &mut book, &Watch { progress: &|_| {}, stop });
    assert_eq!(book.1.is_empty(), moved.is_err(), "{moved:?}: {:?}", book.1);
    moved
}

#[test]
fn disks_move_while_they_are_written_to_and_their_targets_have_all_before_it_is_recorded() {
    let vm = Vm::new();
    let (raw, luks) = (vm.path("to,here.raw"), vm.path("t.qcow2"));
    let moves = [vm.wish(0, &raw, Format::Raw, false), vm.wish(1, &luks, Format::Qcow2, true)];
    let before = vm.watch().left_behind();
    let marker = Marker::new(3);
    // Also what was copied already is written to, in parts of a block, and what is a hole.
    let written = Cell::new(0);
    let write = |_| {
        let nth = written.replace(written.get() + 1);
        if nth < 12 {
            let byte = u8::try_from(nth).unwrap();
            vm.write(nth % 2, DATA.start + nth * 300_000 / 512 * 512, 1536, 1 + byte);
            vm.write(nth % 2, 30 * MIB + nth * 65536, 65536, 100 + byte);
        }
    };
    let record = |moves: &[&Move]| {
        assert_eq!(moves.len(), 2);
        assert!(fs::read(&raw).unwrap() == *vm.content[0].borrow(), "the target does not have all yet");
        Ok(())
    };
    let mut book = Book(&record, Vec::new());
    let options = Options { speed: 24 << 20, ..Options::default() };
    let watch = Watch { progress: &write, stop: &AtomicBool::new(false) };
    let warnings = promote(&mut vm.client(), &moves, options, &mut book, &watch).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert!(written.get() > 2, "nothing was written meanwhile");
    assert_eq!(book.1, ["d0", "d1"]);
    assert_eq!(vm.nodes(), ["reseal-target-0", "reseal-target-1"]);
    // QEMU has let go of the exports, and keeps neither jobs nor the passphrase.
    let left = vm.watch().left_behind();
    assert_eq!((left.jobs, &left.objects), (0, &before.objects));
    assert!(!left.nodes.iter().any(|node| node.starts_with("disk-")), "{left:#?}");
    // From now on the guest writes there, and nowhere else.
    let source = fs::read(vm.path("1.raw")).unwrap();
    for nth in 0..2 {
        let text = vm.path("text");
        fs::write(&text, marker.bytes()).unwrap();
        vm.write(nth, 46 * MIB, 4096, 0x55);
        let said = vm.io(nth, &format!("write -s {} {} {}", text.display(), 47 * MIB, MIB / 16));
        assert!(!said.to_string().contains("rror"), "{said}");
        let repeated: Vec<u8> = marker.bytes().iter().copied().cycle().take(MIB / 16).collect();
        vm.content[nth].borrow_mut()[47 * MIB..47 * MIB + MIB / 16].copy_from_slice(&repeated);
    }
    assert!(fs::read(vm.path("1.raw")).unwrap() == source);
    vm.assert_holds(0, &["-f", "raw", raw.to_str().unwrap()]);
    let object = format!("secret,id=key,file={}", vm.path("secret").display());
    let options = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", luks.display());
    vm.assert_holds(1, &["--object", &object, "--image-opts", &options]);
    assert!(marker.is_in(&fs::read(&raw).unwrap()) && !marker.is_in(&fs::read(&luks).unwrap()));
    // What was a hole in the source is one in the targets.
    for target in [&raw, &luks] {
        let data = fs::metadata(target).unwrap();
        assert!(
            data.blocks() * 512 < (DATA.len() + 4 * MIB) as u64,
            "{} takes {}",
            target.display(),
            data.blocks() * 512
        );
        assert_eq!(data.mode() & 0o777, 0o600);
    }
    let again = quietly(&mut vm.client(), &moves, Options::default(), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(again, PromoteError::Elsewhere { .. }), "{again}");
}

#[test]
fn a_block_device_is_a_target_when_that_is_asked_for_and_the_guest_sees_the_disks_own_length() {
    let vm = Vm::new();
    let behind = [vm.path("device-0"), vm.path("device-1")];
    let devices = behind.each_ref().map(|file| {
        // One is longer than the disk, and what was there before is not zeros.
        let length = if file.ends_with("device-0") { LENGTH + 16 * MIB } else { LENGTH };
        fs::write(file, vec![0xEE; length]).unwrap();
        Loop::new(file)
    });
    let moves = || [0, 1].map(|nth| vm.wish(nth, &devices[nth].0, Format::Raw, false));
    let go_on = AtomicBool::new(false);
    let refused = quietly(&mut vm.client(), &moves(), Options::default(), &go_on).unwrap_err();
    assert!(refused.to_string().contains("--force"), "{refused}");
    vm.assert_untouched();
    assert!(behind.iter().all(|file| fs::read(file).unwrap().iter().all(|byte| *byte == 0xEE)));

    let force = Options { force: true, ..Options::default() };
    // A device that is too short is found out before anything is written.
    let short = vm.path("short");
    fs::write(&short, vec![0xEE; LENGTH - MIB]).unwrap();
    let short = Loop::new(&short);
    let too_short = [vm.wish(0, &devices[0].0, Format::Raw, false), vm.wish(1, &short.0, Format::Raw, false)];
    let refused = quietly(&mut vm.client(), &too_short, force, &go_on).unwrap_err();
    assert!(refused.to_string().contains("bytes, the disk"), "{refused}");
    vm.assert_untouched();

    assert_eq!(quietly(&mut vm.client(), &moves(), force, &go_on).unwrap(), Vec::<String>::new());
    assert_eq!(vm.nodes(), ["reseal-target-0", "reseal-target-1"]);
    for (nth, file) in behind.iter().enumerate() {
        vm.write(nth, LENGTH - 4096, 4096, 0x55);
        // Behind its end nothing can be written: QEMU says so on its own output only.
        vm.io(nth, &format!("write -P 1 {LENGTH} 4096"));
        vm.io(nth, "flush");
        let held = fs::read(file).unwrap();
        assert!(held[..LENGTH] == *vm.content[nth].borrow(), "device {nth} differs");
        assert!(held[LENGTH..].iter().all(|byte| *byte == 0xEE), "written beyond the disk");
    }
}

#[test]
fn a_move_that_fails_is_interrupted_or_can_t_be_recorded_leaves_the_vm_as_it_was() {
    let mut vm = Vm::new();
    let go_on = AtomicBool::new(false);
    // The second target runs out of space when the first may be whole.
    let small = Mount::tmpfs(&vm.path("small"), 4 << 20);
    let full = [vm.wishes().remove(0), vm.wish(1, &small.0.join("t.qcow2"), Format::Qcow2, true)];
    let failed = quietly(&mut vm.client(), &full, Options::default(), &go_on).unwrap_err();
    assert!(failed.to_string().contains("No space left"), "{failed}");
    assert!(failed.to_string().contains("with all that it wrote"), "{failed}");
    assert_eq!(fs::read_dir(&small.0).unwrap().count(), 0);
    vm.assert_no_targets();
    vm.assert_untouched();

    let stop = AtomicBool::new(false);
    let watch = Watch { progress: &|_| stop.store(true, Ordering::Relaxed), stop: &stop };
    let slow = Options { speed: 4 << 20, ..Options::default() };
    let mut book = Book(&|_| Ok(()), Vec::new());
    let stopped = promote(&mut vm.client(), &vm.wishes(), slow, &mut book, &watch).unwrap_err();
    assert!(matches!(stopped, PromoteError::Interrupted), "{stopped}");
    assert_eq!(book.1, Vec::<String>::new());
    vm.assert_no_targets();
    vm.assert_untouched();

    let refuse = |_: &[&Move]| Err(PromoteError::Record("no".into()));
    let watch = Watch { progress: &|_| {}, stop: &go_on };
    let mut book = Book(&refuse, Vec::new());
    let refused = promote(&mut vm.client(), &vm.wishes(), Options::default(), &mut book, &watch).unwrap_err();
    assert!(matches!(refused, PromoteError::Record(_)), "{refused}");
    assert_eq!(book.1, Vec::<String>::new());
    vm.assert_no_targets();
    vm.assert_untouched();

    // What is there is no target, and no first target is made for nothing.
    fs::write(vm.path("target-1"), "precious").unwrap();
    let exists = quietly(&mut vm.client(), &vm.wishes(), Options::default(), &go_on).unwrap_err();
    assert!(matches!(exists, PromoteError::Target(_)), "{exists}");
    assert_eq!(fs::read_to_string(vm.path("target-1")).unwrap(), "precious");
    fs::remove_file(vm.path("target-1")).unwrap();
    vm.assert_no_targets();

    // Who serves the overlay is killed: when it is back, the move can be made.
    let export = RefCell::new(vm.exports[1].take());
    let kill = |_| drop(export.borrow_mut().take().map(Running::kill));
    let watch = Watch { progress: &kill, stop: &go_on };
    let mut book = Book(&|_| Ok(()), Vec::new());
    let died = promote(&mut vm.client(), &vm.wishes(), slow, &mut book, &watch).unwrap_err();
    assert!(matches!(died, PromoteError::Failed { .. }), "{died}");
    assert_eq!(book.1, Vec::<String>::new());
    vm.serve(1);
    vm.assert_no_targets();
    vm.assert_untouched();
    // QEMU may need a while to connect again.
    let began = Instant::now();
    while let Err(e) = quietly(&mut vm.client(), &vm.wishes(), Options::default(), &go_on) {
        assert!(matches!(e, PromoteError::Failed { .. }) && began.elapsed() < TIME * 2, "{e}");
        vm.assert_no_targets();
        std::thread::sleep(Duration::from_secs(1));
    }
    for nth in 0..2 {
        vm.write(nth, 41 * MIB, 4096, 0x66);
        vm.assert_holds(nth, &["-f", "raw", &vm.path(&format!("target-{nth}")).display().to_string()]);
    }
}

#[test]
fn what_a_dead_move_left_is_finished_if_it_was_recorded_and_cancelled_if_not() {
    let vm = Vm::new();
    let moves = vm.wishes();
    let devices: Vec<String> = moves.iter().map(|wish| wish.device.clone()).collect();
    let recorded = |moved: [bool; 2]| -> Vec<Recorded<'_>> {
        let disk = |(nth, is_moved)| Recorded { nth, device: &devices[nth], node: ["disk-0", "disk-1"][nth], is_moved };
        moved.into_iter().enumerate().map(disk).collect()
    };
    let die = || {
        // Dead at the moment when both wait for their last step. What was made is not removed then.
        let panics = |_: &[&Move]| panic!("killed");
        let mut book = Book(&panics, Vec::new());
        let watch = Watch { progress: &|_| {}, stop: &AtomicBool::new(false) };
        let killed = AssertUnwindSafe(|| promote(&mut vm.client(), &moves, Options::default(), &mut book, &watch));
        catch_unwind(killed).unwrap_err();
    };
    die();
    assert_eq!(vm.watch().left_behind().jobs, 2);
    let stand = settle(&mut vm.client(), &recorded([false, false])).unwrap();
    assert_eq!(stand, [Stands::Overlay, Stands::Overlay]);
    vm.assert_untouched();
    // Only one of them was recorded: that can't be, but nothing is lost.
    die();
    let stand = settle(&mut vm.client(), &recorded([true, false])).unwrap();
    assert_eq!(stand, [Stands::Target, Stands::Overlay]);
    assert_eq!(vm.nodes(), ["reseal-target-0", "disk-1"]);
    assert_eq!(vm.watch().left_behind().jobs, 0);
    let stand = settle(&mut vm.client(), &recorded([true, true])).unwrap();
    assert_eq!(stand, [Stands::Target, Stands::Overlay], "what was recorded is no proof");
    vm.write(1, 41 * MIB, 4096, 0x66);
    vm.assert_holds(1, &["-f", "raw", &vm.path("1.raw").display().to_string()]);
}

#[test]
fn a_vm_without_the_disk_is_told() {
    let vm = Vm::new();
    let mut wish = vm.wishes().remove(0);
    wish.device = "reseal-disk-9".into();
    let failed = quietly(&mut vm.client(), &[wish], Options::default(), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(failed, PromoteError::NoDevice { .. }), "{failed}");
    vm.assert_untouched();
}
