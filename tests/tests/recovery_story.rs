//! A VM is down. Its restore point boots, takes writes, is killed with all that serves it, comes back with what it flushed, and
//! moves to production while it writes; the restore point is as it was.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::agent::{run_in_guest, start_in_guest};
use reseal_tests::booted::{Booted, NOTICED, runs};
use reseal_tests::guest::{BOOT, STALL, check_point, last_count, script, wait_for_count};
use reseal_tests::loops::Mount;
use reseal_tests::marker::Marker;
use reseal_tests::process::{Run, bound_to_us, run, signal, start, system, wait_until};
use reseal_tests::site::{Site, files_below};
use reseal_tests::verifier;
use serde_json::json;

const PARTITION: u32 = 1 << 20;
const PASSPHRASE: &str = "the secret of the disks in production";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Whether a file has a marker that a guest has written many times; quick also where it is long.
fn has(file: &Path, marker: &Marker) -> bool {
    run(Command::new("grep").args(["-q", "-a", "-z", "-F", marker.piece()]).arg(file)).expect(&[0, 1]).status == Some(0)
}

/// A QEMU that lives on without who started it, but not without this test.
struct Orphan(u32);

impl Drop for Orphan {
    fn drop(&mut self) {
        if runs(self.0) {
            signal(self.0, libc::SIGKILL);
        }
    }
}

/// The guest's disks, with a program more, as they are backed up.
fn disks(site: &Site) -> [PathBuf; 2] {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cache = std::env::var_os("RESEAL_CACHE").map_or(workspace.join(".cache"), PathBuf::from).join("disk-guest");
    run(Command::new(script("debian-disk.sh")).arg("--guest").arg(&cache)).ok();
    let made = [site.disk("system.raw"), site.disk("data.raw")];
    for (from, to) in ["base.raw", "data.raw"].iter().zip(&made) {
        system("cp", &["--sparse=always", text(&cache.join(from)), text(to)]);
    }
    let program = verifier::compile(&site.path("verifier"));
    let device = format!("{}?offset={PARTITION}", made[0].display());
    system("debugfs", &["-w", "-R", &format!("write {} /verifier", program.display()), &device]);
    system("debugfs", &["-w", "-R", "set_inode_field /verifier mode 0100755", &device]);
    made
}

/// A disk's bytes out of an image that LUKS encrypts.
fn opened(site: &Site, image: &Path, to: &str) -> PathBuf {
    let (raw, secret) = (site.path(to), site.path("secret"));
    let object = format!("secret,id=key,file={}", secret.display());
    let source = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", image.display());
    system("qemu-img", &["convert", "--object", &object, "--image-opts", &source, "-O", "raw", text(&raw)]);
    raw
}

/// A file of the system disk, after the journal's replay that a start after a power cut begins with.
fn file_of(site: &Site, disk: &Path, name: &str) -> Vec<u8> {
    let (partition, out) = (site.path("partition"), site.path("dumped"));
    let words = [format!("if={}", disk.display()), format!("of={}", partition.display())];
    system("dd", &["bs=1M", "skip=1", "conv=sparse", "status=none", &words[0], &words[1]]);
    run(Command::new("e2fsck").arg("-p").arg(&partition)).expect(&[0, 1]);
    system("debugfs", &["-R", &format!("dump {name} {}", out.display()), text(&partition)]);
    fs::read(&out).unwrap()
}

#[track_caller]
fn wait_for_verified(console: &Path, above: u64) -> u64 {
    let began = Instant::now();
    loop {
        match verifier::last_verified(console) {
            Some(number) if number > above => return number,
            _ => assert!(began.elapsed() < STALL, "the guest does not write on, beyond {above}"),
        }
        sleep(Duration::from_millis(50));
    }
}

/// Moves the disks by a process of its own, which is interrupted once that file is there.
fn promote(site: &Site, words: &[&str], interrupt_after: Option<&Path>) -> Run {
    let words = [&["boot", "vm@1", "--json"], words].concat();
    let process = start(bound_to_us(&mut site.command("reseal", words)));
    let mut is_interrupted = false;
    wait_until("the end of the move", BOOT, || {
        if !is_interrupted && interrupt_after.is_some_and(Path::exists) {
            is_interrupted = true;
            sleep(Duration::from_secs(1));
            signal(process.id(), libc::SIGINT);
        }
        process.has_ended()
    });
    process.wait()
}

/// The same where it must fail, and the guest must not notice.
#[track_caller]
fn fails(site: &Site, words: &[&str], interrupt_after: Option<&Path>, console: &Path, said: &str) {
    promote(site, words, interrupt_after).fails(1, &[said, "with all that it wrote"]);
    wait_for_count(console, last_count(console), STALL);
    wait_for_verified(console, verifier::last_verified(console).unwrap());
}

#[test]
fn a_vm_is_recovered_killed_recovered_again_and_moved_to_production_without_losing_a_write() {
    let site = Site::new();
    let [system_disk, data_disk] = disks(&site);
    let original = fs::read(&system_disk).unwrap();
    site.backup_disks("vm", &[("system".into(), system_disk.clone()), ("data".into(), data_disk)]);
    fs::remove_file(system_disk).unwrap();
    let secret = site.path("secret");
    fs::write(&secret, PASSPHRASE).unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let (overlay, console) = (site.path("overlay"), site.path("console"));
    let marker = Marker::new(71);
    let arguments = ["--console", text(&console)];

    // It runs, and writes.
    let mut booted = Booted::start(&site, "vm@1", &overlay, &arguments);
    wait_for_count(&console, Some(3), BOOT);
    let agent = booted.run.join("agent.sock");
    let write = format!("echo {} >/marker && sync /marker", marker.text().repeat(100));
    run_in_guest(&agent, "/bin/sh", &["-c", &write], BOOT);
    let flushed = wait_for_count(&console, last_count(&console), STALL);
    // All that runs of it is killed.
    booted.kill_server();
    booted.kill_qemu();
    for file in files_below(&overlay) {
        assert!(!has(&file, &marker), "{} has what the guest wrote", file.display());
    }

    // It comes back with what it had flushed.
    fs::remove_file(&console).unwrap();
    let mut booted = Booted::start(&site, "vm@1", &overlay, &arguments);
    let count = wait_for_count(&console, None, BOOT);
    assert!(count >= flushed, "the guest had counted to {flushed}, and begins again at {count}");
    run_in_guest(&agent, "/bin/grep", &["-q", marker.piece(), "/marker"], BOOT);
    start_in_guest(&agent, "/verifier", &["/verified"], BOOT);
    wait_for_verified(&console, 0);

    // A target without room, and one that is interrupted, cost it nothing.
    let small = Mount::tmpfs(&site.path("small"), 64 << 20);
    let data_to = format!("data={}", site.path("data.qcow2").display());
    let luks = ["--promote-format", "qcow2", "--luks-secret", text(&secret)];
    let full = format!("system={}", small.0.join("system.qcow2").display());
    let on = ["--overlay", text(&overlay), "--promote"];
    let words = [&on[..], &[&full, "--promote", &data_to]].concat();
    fails(&site, &words, None, &console, "No space left on device");
    assert_eq!(fs::read_dir(&small.0).unwrap().count(), 0);
    drop(small);
    let production = [site.path("system.qcow2"), site.path("data.qcow2")];
    let system_to = format!("system={}", production[0].display());
    let words = [&on[..], &[&system_to, "--promote", &data_to], &luks].concat();
    let slowly = [&on[..], &[&system_to, "--promote", &data_to, "--limit-rate", "8M"]].concat();
    fails(&site, &slowly, Some(&production[0]), &console, "interrupted");
    assert!(!production.iter().any(|image| image.exists()));

    // To production, while it writes.
    let promoted = promote(&site, &words, None).ok().json();
    assert_eq!((&promoted["event"], &promoted["left"]), (&json!("promoted"), &json!([])));
    assert!(promoted["disks"].as_array().unwrap().iter().all(|disk| disk["encrypted"] == true), "{promoted}");
    // Nobody is needed any more for it to run.
    let qemu = Orphan(std::mem::take(&mut booted.qemu));
    assert!(booted.wait().ok().stdout.contains("runs on without reseal"));
    assert!(runs(qemu.0));
    let verified = wait_for_verified(&console, verifier::last_verified(&console).unwrap() + 1);
    wait_for_count(&console, last_count(&console), STALL);
    // The overlay is old, and nobody goes on with it by mistake.
    site.reseal(["nbd", "vm@1", "--socket", "x", "--writable", "--overlay", text(&overlay)])
        .fails(2, &["was moved to", text(&production[0])]);
    site.reseal(["overlay", "drop", text(&overlay)]).ok();
    assert!(!overlay.exists());

    // Without power: what it was told is durable is at the target.
    signal(qemu.0, libc::SIGKILL);
    wait_until("QEMU's end", NOTICED, || !runs(qemu.0));
    let (count, last) = (last_count(&console).unwrap(), verifier::last_verified(&console).unwrap());
    assert!(last >= verified);
    for image in &production {
        assert!(!has(image, &marker), "{} is in the clear", image.display());
    }
    let [system_raw, data_raw] = [opened(&site, &production[0], "s.raw"), opened(&site, &production[1], "d.raw")];
    assert!(has(&system_raw, &marker), "it would be found");
    let counts = check_point(&system_raw, &data_raw);
    assert!(counts.data >= count || counts.system >= count, "{counts:?}, and the guest had shown {count}");
    verifier::check(&file_of(&site, &system_raw, "/verified"), last);

    // The restore point is what it was.
    site.verify();
    let restored = site.path("restored.raw");
    site.restore("vm@1", "system", &restored).ok();
    assert!(fs::read(&restored).unwrap() == original);
}
