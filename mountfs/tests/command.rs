//! The binary, as a user or `reseal` starts it.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use reseal_format::geometry::CLUSTER;
use support::{Vault, disk_bytes};

fn command(vault: &Vault) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reseal-mount"));
    command
        .env("RESEAL_REPO", vault.repo())
        .env("RESEAL_KEYRING", vault.folder.path().join("keyring.json"))
        .env("RESEAL_STATE", vault.folder.path().join("state"))
        // The tests are about other things than this machine's swap.
        .arg("--allow-swap")
        .stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn no_fuse() -> bool {
    let missing = File::open("/dev/fuse").is_err();
    if missing {
        eprintln!("skipped: /dev/fuse can't be opened");
    }
    missing
}

fn is_mounted(path: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {} ", path.display()))
}

#[test]
fn in_the_background_it_returns_when_ready_and_umount_waits_for_the_end() {
    if no_fuse() {
        return;
    }
    let vault = Vault::new();
    let (_, time) = vault.backup("web01", b"hello");
    let mountpoint = vault.mountpoint();
    let log = vault.folder.path().join("log");
    let output = run(command(&vault).args(["mount", "--background", "--log"]).arg(&log).arg(&mountpoint));
    assert!(output.status.success(), "{}", error(&output));
    // Ready means ready.
    let disk = mountpoint.join("web01").join(&time).join("disk-0.raw");
    assert_eq!(fs::read(&disk).unwrap(), b"hello");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        table
            .lines()
            .any(|line| line.contains(&mountpoint.display().to_string()) && line.contains("fuse.reseal reseal"))
    );

    let again = run(command(&vault).args(["mount", "--background"]).arg(&mountpoint));
    assert_eq!(again.status.code(), Some(1), "a failure is told by the status");
    assert!(error(&again).contains("is mounted at"), "{}", error(&again));

    let open = File::open(&disk).unwrap();
    let busy = run(command(&vault).arg("umount").arg(&mountpoint));
    assert_eq!(busy.status.code(), Some(1));
    assert!(error(&busy).contains("in use"), "{}", error(&busy));
    drop(open);
    let done = run(command(&vault).arg("umount").arg(&mountpoint));
    assert!(done.status.success(), "{}", error(&done));
    assert!(!is_mounted(&mountpoint));
    let nothing = run(command(&vault).arg("umount").arg(&mountpoint));
    assert_eq!(nothing.status.code(), Some(1));
    assert!(error(&nothing).contains("nothing of reseal is mounted"), "{}", error(&nothing));
    assert_eq!(fs::read_to_string(log).unwrap(), "", "nothing went wrong");
}

#[test]
fn a_signal_unmounts_and_ends_with_status_0_even_while_files_are_open() {
    if no_fuse() {
        return;
    }
    for signal in ["-TERM", "-INT"] {
        let vault = Vault::new();
        vault.backup("web01", &disk_bytes(1, 4 * CLUSTER));
        let mountpoint = vault.mountpoint();
        let mut server =
            command(&vault).arg("mount").arg(&mountpoint).arg("web01").stdout(Stdio::null()).spawn().unwrap();
        let disk = mountpoint.join("web01/latest/disk-0.raw");
        let began = Instant::now();
        while !disk.exists() {
            assert!(began.elapsed() < Duration::from_secs(10) && server.try_wait().unwrap().is_none());
            thread::sleep(Duration::from_millis(10));
        }
        let open = File::open(&disk).unwrap();
        assert!(Command::new("kill").arg(signal).arg(server.id().to_string()).status().unwrap().success());
        assert_eq!(server.wait().unwrap().code(), Some(0));
        assert!(!is_mounted(&mountpoint));
        drop(open);
    }
}

#[test]
fn a_mount_that_was_killed_can_be_mounted_over_or_unmounted() {
    if no_fuse() {
        return;
    }
    let vault = Vault::new();
    vault.backup("web01", b"x");
    let mountpoint = vault.mountpoint();
    let kill = || {
        let mut server = command(&vault).arg("mount").arg(&mountpoint).stdout(Stdio::null()).spawn().unwrap();
        let began = Instant::now();
        while !mountpoint.join("web01").exists() {
            assert!(began.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(10));
        }
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(is_mounted(&mountpoint) && fs::read_dir(&mountpoint).is_err());
    };
    kill();
    let over = run(command(&vault).args(["mount", "--background"]).arg(&mountpoint));
    assert!(over.status.success(), "{}", error(&over));
    assert!(mountpoint.join("web01").exists());
    assert!(run(command(&vault).arg("umount").arg(&mountpoint)).status.success());
    kill();
    let done = run(command(&vault).arg("umount").arg(&mountpoint));
    assert!(done.status.success(), "{}", error(&done));
    assert!(!is_mounted(&mountpoint));
}

#[test]
fn restore_says_where_the_disk_is_now_in_the_clear() {
    let vault = Vault::new();
    let bytes = disk_bytes(2, 20 * CLUSTER + 9);
    let (_, time) = vault.backup("web01", &bytes);
    let out = vault.folder.path().join("out.raw");
    let done = run(command(&vault).arg("restore").arg(format!("web01@{time}")).arg(&out));
    assert!(done.status.success(), "{}", error(&done));
    assert!(String::from_utf8(done.stdout).unwrap().contains("in the clear"));
    assert!(fs::read(&out).unwrap() == bytes);
    let json = run(command(&vault).args(["--json", "restore", "web01@1", "--force"]).arg(&out));
    let text = String::from_utf8(json.stdout).unwrap();
    for part in ["\"vm\":\"web01\"", "\"number\":1", "\"length\":1310729"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    for (arguments, status, says) in [
        (["restore", "web01@1", "out.raw"], 1, "--force overwrites it"),
        (["restore", "web01@7", "new.raw"], 1, "no restore point web01@7"),
        (["restore", "web02@1", "new.raw"], 1, "no VM web02"),
        (["restore", "web01", "new.raw"], 2, "is no restore point"),
        (["restore", "web01@1", "--format=qcow2"], 2, "required"),
    ] {
        let output = run(command(&vault).current_dir(vault.folder.path()).args(arguments));
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", error(&output));
        assert!(error(&output).contains(says), "{arguments:?}: {}", error(&output));
    }
    let format = run(command(&vault).args(["restore", "web01@1", "x", "--format", "vdi"]));
    assert_eq!(format.status.code(), Some(2));
    assert!(error(&format).contains("vdi"), "{}", error(&format));
}

#[test]
fn another_version_is_refused_by_name() {
    let vault = Vault::new();
    let output = run(command(&vault).env("RESEAL_EXPECT_VERSION", "99.1.2").arg("umount").arg("/"));
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).contains("99.1.2") && error(&output).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_name_or_keyring_is_told_before_anything_is_mounted() {
    let vault = Vault::new();
    vault.backup("web01", b"x");
    let mountpoint = vault.mountpoint();
    let mount = |only: &str| run(command(&vault).args(["mount", "--background"]).arg(&mountpoint).arg(only));
    for only in ["web02", "web01@9", "a/b"] {
        let output = mount(only);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{only}: {}", error(&output));
    }
    fs::remove_file(vault.folder.path().join("keyring.json")).unwrap();
    let output = mount("web01");
    assert!(!output.status.success() && error(&output).contains("keyring.json"), "{}", error(&output));
    assert!(!is_mounted(&mountpoint));
}
