//! Disks restored as images: what QEMU reads in them, what they take, what is in the clear, and what is left of one that failed.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_tests::enrolled::Enrolling;
use reseal_tests::marker::Marker;
use reseal_tests::process::{Run, bound_to_us, run, signal, start};
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const LENGTH: usize = (24 << 20) + 4096 + 512 + 77;
const HOLE: std::ops::Range<usize> = 4 << 20..20 << 20;
const PASSPHRASE: &str = "correct horse, battery staple";

/// A disk with data around a hole, and a marker in both parts of the data.
fn content(marker: &Marker) -> Vec<u8> {
    let mut content = Random::new(5).bytes(LENGTH);
    content[HOLE].fill(0);
    for at in [0, 1 << 20, HOLE.end + 5000] {
        content[at..at + marker.bytes().len()].copy_from_slice(marker.bytes());
    }
    content
}

/// A site with a restore point of these disks, all alike, and a file with a passphrase.
fn site(disks: &[&str]) -> (Site, Marker, PathBuf) {
    let (site, marker) = (Site::new(), Marker::new(7));
    let content = content(&marker);
    let named: Vec<(String, PathBuf)> = disks.iter().map(|name| ((*name).to_owned(), site.disk(name))).collect();
    for (_, path) in &named {
        fs::write(path, &content).unwrap();
    }
    site.backup_disks("vm", &named);
    let secret = secret(&site, "secret", PASSPHRASE);
    (site, marker, secret)
}

/// A file that only its owner may read, whose first line is a passphrase.
fn secret(site: &Site, name: &str, passphrase: &str) -> PathBuf {
    let path = site.path(name);
    fs::write(&path, format!("{passphrase}\nthe rest is not read\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Compares an image with the disk that was backed up, as QEMU sees them.
fn compare(site: &Site, disk: &str, image: &Path, driver: &str, passphrase: Option<&str>) -> Run {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "--image-opts"]);
    let name = text(image).replace(',', ",,");
    let mut options = format!("driver={driver},file.driver=file,file.filename={name}");
    if let Some(passphrase) = passphrase {
        // QEMU takes all bytes of a file.
        let path = site.path("for-qemu");
        fs::write(&path, passphrase).unwrap();
        command.args(["--object", &format!("secret,id=s,file={}", path.display())]);
        options += if driver == "luks" { ",key-secret=s" } else { ",encrypt.format=luks,encrypt.key-secret=s" };
    }
    let raw = format!("driver=raw,file.driver=file,file.filename={}", site.disk(disk).display());
    command.args([&raw, &options]);
    patiently(command)
}

/// Runs what makes or opens a LUKS key slot, which takes seconds of a processor that is alone, and minutes where others build.
fn patiently(mut command: Command) -> Run {
    let (running, began) = (start(bound_to_us(&mut command)), Instant::now());
    while !running.has_ended() && began.elapsed() < Duration::from_secs(600) {
        std::thread::sleep(Duration::from_millis(20));
    }
    running.wait()
}

fn info(image: &Path) -> Value {
    run(Command::new("qemu-img").args(["info", "--output=json", text(image)])).ok().json()
}

#[test]
fn images_hold_the_disk_stay_sparse_and_say_that_they_are_in_the_clear() {
    let (site, ..) = site(&["root", "data"]);
    for (format, ending) in [("qcow2", "qcow2"), ("vmdk", "vmdk")] {
        let folder = site.path(format!("{format}, with a comma"));
        let words = ["restore", "--format", format, "vm@1", text(&folder)];
        let said = site.reseal(words).ok().stdout;
        assert!(said.contains(&format!("what is there now is in the clear, as {format}")), "{said}");
        for disk in ["root", "data"] {
            let image = folder.join(format!("{disk}.{ending}"));
            compare(&site, disk, &image, format, None).ok();
            let data = fs::metadata(&image).unwrap();
            assert_eq!(data.permissions().mode() & 0o777, 0o600);
            let (room, most) = (data.blocks() * 512, LENGTH - HOLE.len() + (1 << 20));
            assert!(room <= most as u64, "{format}: {room} bytes of at most {most}");
            let info = info(&image);
            assert_eq!(
                (&info["format"], &info["virtual-size"]),
                (&json!(format), &json!(LENGTH.next_multiple_of(512)))
            );
            if format == "vmdk" {
                assert_eq!(info["format-specific"]["data"]["create-type"], "streamOptimized", "what vSphere imports");
            }
        }
        // Nothing is overwritten, unless that is asked for; then nothing of it is left.
        site.reseal(words).fails(1, &["exists; --force overwrites it"]);
        fs::write(folder.join(format!("root.{ending}")), vec![0xff; 1 << 20]).unwrap();
        site.reseal([&words[..], &["--force"]].concat()).ok();
        compare(&site, "root", &folder.join(format!("root.{ending}")), format, None).ok();
    }
    let out = site.path("one.qcow2");
    let json =
        site.reseal(["restore", "--json", "--disk", "data", "--format", "qcow2", "vm@1", text(&out)]).ok().json();
    let disk = &json["disks"][0];
    assert_eq!(
        (&disk["name"], &disk["format"], &disk["encrypted"], &disk["path"]),
        (&json!("data"), &json!("qcow2"), &json!(false), &json!(out))
    );
    site.reseal(["restore", "--format", "vhd", "vm@1", "x"]).fails(2, &["there are raw, qcow2 and vmdk"]);
}

#[test]
fn what_is_encrypted_opens_with_its_passphrase_only_and_holds_nothing_in_the_clear() {
    let (site, marker, file) = site(&["disk-0"]);
    let point_before = site.contents();
    for (format, driver, name) in [("qcow2", "qcow2", "out.qcow2"), ("raw", "luks", "out.luks")] {
        let out = site.path(name);
        let words = ["restore", "--format", format, "--luks-secret", text(&file), "vm@1", text(&out)];
        let run = patiently(site.command("reseal", words)).ok();
        assert!(run.stdout.contains("LUKS") && !run.stdout.contains("in the clear"), "{run:#?}");
        assert!(!run.said().contains(PASSPHRASE));
        compare(&site, "disk-0", &out, driver, Some(PASSPHRASE)).ok();
        assert!(!marker.is_in(&fs::read(&out).unwrap()), "{name}");
        assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let wrong = compare(&site, "disk-0", &site.path("out.qcow2"), "qcow2", Some("correct horse"));
    assert!(wrong.status != Some(0) && wrong.stderr.contains("Invalid password"), "{wrong:#?}");
    // The file that closed it opens it for a backup.
    let image = site.path("out.qcow2");
    let words = ["backup", "--json", "again", text(&image), "--image-secret", text(&file)];
    let made = patiently(site.command("reseal", words)).ok().json();
    assert_eq!(made["disks"][0]["length"].as_u64(), Some(LENGTH.next_multiple_of(512) as u64), "{made:#}");
    // An image with a hole takes no more room for being encrypted.
    let room = fs::metadata(site.path("out.qcow2")).unwrap().blocks() * 512;
    assert!(room <= (LENGTH - HOLE.len() + (4 << 20)) as u64, "{room}");
    // Nobody else has been given anything of it.
    assert_eq!(marker.found_below(&site.state), Vec::<String>::new());
    assert_eq!(marker.found_below(&site.path("tmp")), Vec::<String>::new());
    assert!(point_before.keys().all(|key| site.objects().contains(key) || key.contains("/leases/")));
}

#[test]
fn a_secret_that_others_can_read_or_that_is_none_is_refused_before_anything_is_made() {
    let (site, _, file) = site(&["disk-0"]);
    let out = site.path("out.qcow2");
    let restore = |format: &str, file: &Path| {
        site.reseal(["restore", "--format", format, "--luks-secret", text(file), "vm@1", text(&out)])
    };
    restore("vmdk", &file).fails(2, &["a VMDK image can't be encrypted"]);
    restore("qcow2", &site.path("none")).fails(2, &["--luks-secret", "No such file"]);
    restore("qcow2", &secret(&site, "empty", "")).fails(2, &["its first line is empty"]);
    fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    restore("qcow2", &file).fails(2, &["others may access it (mode 0640)", "chmod 600"]);
    assert!(!out.exists());
    // Nor without QEMU's program, which is named with where it comes from.
    let mut command = site.command("reseal", ["restore", "--format", "qcow2", "vm@1", text(&out)]);
    run(command.env("PATH", site.path("home"))).fails(1, &["qemu-img is not installed", "qemu-utils"]);
    assert!(!out.exists());
}

#[test]
fn a_disk_that_is_damaged_is_named_and_leaves_no_image() {
    let (site, ..) = site(&["disk-0"]);
    let pack = site.packs(1).remove(0);
    let path = site.vault.join(&pack);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    for format in ["qcow2", "vmdk"] {
        let out = site.path(format!("out.{format}"));
        let run = site.reseal(["restore", "--format", format, "vm@1", text(&out)]);
        run.fails(3, &["disk disk-0", &pack, "failed authentication"]);
        assert!(!out.exists(), "{format}");
    }
}

#[test]
fn one_that_is_interrupted_ends_and_leaves_no_image() {
    let (site, _, file) = site(&["disk-0"]);
    let out = site.path("out.qcow2");
    // LUKS takes its time to make a key, so there is one to interrupt.
    let words = ["restore", "--format", "qcow2", "--luks-secret", text(&file), "vm@1", text(&out)];
    let restoring = start(bound_to_us(&mut site.command("reseal", words)));
    let began = Instant::now();
    while !out.exists() {
        assert!(!restoring.has_ended() && began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    // Meanwhile others see the programs that run, and not the passphrase.
    let mut seen = Vec::new();
    while seen.is_empty() {
        assert!(!restoring.has_ended() && began.elapsed() < Duration::from_secs(60));
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", restoring.id())).unwrap();
        let told = |child: &str| {
            ["cmdline", "environ"].map(|file| fs::read(format!("/proc/{child}/{file}")).unwrap_or_default()).concat()
        };
        seen = children.split_whitespace().map(told).map(|told| String::from_utf8_lossy(&told).into_owned()).collect();
        seen.retain(|told| told.contains("qemu-img"));
    }
    assert!(seen.iter().all(|told| told.contains("/dev/fd/") && !told.contains("horse")), "{seen:?}");
    signal(restoring.id(), libc::SIGINT);
    restoring.wait().fails(1, &["interrupted; what was written so far is no disk"]);
    assert!(!out.exists());
}

#[test]
fn another_sites_restore_points_become_images_too() {
    let sites = Enrolling::new();
    let sender = sites.enrol("acme", "sender", "append", &[]);
    let reader = sites.enrol("acme", "reader", "restore", &[]);
    let disk = sites.source.disk("disk-0");
    fs::write(&disk, content(&Marker::new(7))).unwrap();
    sites.backup(&sender, "vm", &disk).ok();
    let out = sites.source.path("out.qcow2");
    sites.source.reseal(["--repo", text(&reader), "restore", "--format", "qcow2", "vm@1", text(&out)]).ok();
    compare(&sites.source, "disk-0", &out, "qcow2", None).ok();
    let room = fs::metadata(&out).unwrap().blocks() * 512;
    assert!(room <= (LENGTH - HOLE.len() + (1 << 20)) as u64, "{room}");
}
