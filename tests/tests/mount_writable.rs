//! Restore points that are written to through a mount, by the real programs and tools: file systems, loop devices, fio, kills, a full
//! overlay; and the faces of a disk, as other hypervisors' tools see them.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use reseal_tests::enrolled::Enrolling;
use reseal_tests::loops::Loop;
use reseal_tests::marker::Marker;
use reseal_tests::mounting::{Mounted, is_mounted};
use reseal_tests::process::{Run, run, signal, system};
use reseal_tests::random::Random;
use reseal_tests::site::{Site, files_below};
use serde_json::{Value, json};

/// No whole number of blocks, of clusters, or of any geometry's cylinders.
const LENGTH: usize = (24 << 20) + 4096 + 512;

fn site(disks: &[&str]) -> (Site, Vec<u8>) {
    Site::with_point(disks, LENGTH)
}

/// Mounts `vm@1` so that it can be written to.
#[track_caller]
fn writable(site: &Site, at: &str, more: &[&str]) -> (Mounted, PathBuf) {
    let mounted = Mounted::new(site, at, &[&["vm@1", "--writable"], more].concat());
    let raw = mounted.point(site, "vm", 1).join("disk-0.raw");
    (mounted, raw)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A program that must fail, and say so.
#[track_caller]
fn refused(program: &str, arguments: &[&str], said: &str) {
    let run = run(Command::new(program).args(arguments));
    assert!(run.status != Some(0) && run.stderr.contains(said), "{program} should say {said:?}: {run:#?}");
}

fn overlays(site: &Site, folders: &[&str]) -> Vec<Value> {
    let words = [&["overlay", "list", "--json"], folders].concat();
    site.reseal(words).ok().json_lines()
}

/// The restore point is as it was.
#[track_caller]
fn assert_point_is(site: &Site, content: &[u8]) {
    site.verify();
    let to = site.path("restored.raw");
    let _ = fs::remove_file(&to);
    site.restore("vm@1", "disk-0", &to).ok();
    assert!(fs::read(&to).unwrap() == content);
}

#[test]
fn what_was_synced_survives_a_kill_and_an_end_and_the_point_stays_as_it_was() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let overlay = ["--overlay", text(&folder)];
    let marker = Marker::new(3);
    let marked = site.path("marked");
    fs::write(&marked, marker.bytes().repeat(2000)).unwrap();
    let mut wanted = content.clone();
    let (mut mounted, raw) = writable(&site, "mnt", &overlay);
    assert_eq!(fs::metadata(&raw).unwrap().mode() & 0o7777, 0o600);
    // Not at a border of anything; durable when dd has ended.
    let dd = ["bs=1000", "seek=5", "conv=notrunc,fsync", "status=none"];
    system("dd", &[&[&*format!("if={}", text(&marked)), &format!("of={}", text(&raw))], &dd[..]].concat());
    let bytes = fs::read(&marked).unwrap();
    wanted[5000..5000 + bytes.len()].copy_from_slice(&bytes);
    system("fallocate", &["--punch-hole", "--offset", "1M", "--length", "2M", text(&raw)]);
    system("fallocate", &["--zero-range", "--keep-size", "--offset", "15000000", "--length", "3333", text(&raw)]);
    refused("fallocate", &["--length", "1M", text(&raw)], "not supported");
    refused("truncate", &["--size", "1M", text(&raw)], "not permitted");
    wanted[1 << 20..3 << 20].fill(0);
    wanted[15_000_000..15_003_333].fill(0);
    system("sync", &["--data", text(&raw)]);
    mounted.kill();
    drop(mounted);
    for round in 0..2 {
        let (mounted, raw) = writable(&site, "mnt", &overlay);
        assert!(fs::read(&raw).unwrap() == wanted, "round {round}");
        // No sync: what ends the mount makes durable what was written.
        let file = File::options().write(true).open(&raw).unwrap();
        file.write_all_at(&[round; 700], 9_000_000).unwrap();
        wanted[9_000_000..9_000_700].fill(round);
        drop(file);
        match round {
            0 => drop(mounted.umount(&site).ok()),
            _ => {
                signal(mounted.process(), libc::SIGTERM);
                while is_mounted(&mounted.path) {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }
    let (mounted, raw) = writable(&site, "mnt", &overlay);
    assert!(fs::read(&raw).unwrap() == wanted);
    let said = mounted.umount(&site).ok().said();
    assert!(said.contains("writable; goes on with the overlay in"), "{said}");
    // Nothing is in the clear, neither there nor where the mount may have put anything aside.
    for below in [&folder, &site.state, &site.path("tmp"), &site.path("home"), &site.vault] {
        assert_eq!(marker.found_below(below), Vec::<String>::new());
    }
    assert_point_is(&site, &content);
}

#[test]
fn a_file_system_on_it_is_made_filled_trimmed_and_checked() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let (mut mounted, raw) = writable(&site, "mnt", &["--overlay", text(&folder)]);
    system("mke2fs", &["-q", "-F", "-t", "ext4", text(&raw)]);
    let files = Random::new(8).bytes(6 << 20);
    let at = site.path("inside");
    fs::create_dir(&at).unwrap();
    let device = Loop::new(&raw);
    let mount = |device: &Loop| system("mount", &[text(&device.0), text(&at)]);
    mount(&device);
    fs::write(at.join("kept"), &files).unwrap();
    fs::write(at.join("gone"), &files).unwrap();
    system("sync", &["--file-system", text(&at)]);
    let full = fs::metadata(&raw).unwrap().blocks();
    let used = overlays(&site, &[text(&folder)])[0]["used"].as_u64().unwrap();
    fs::remove_file(at.join("gone")).unwrap();
    system("sync", &["--file-system", text(&at)]);
    system("fstrim", &[text(&at)]);
    system("sync", &["--file-system", text(&at)]);
    let now = overlays(&site, &[text(&folder)])[0]["used"].as_u64().unwrap();
    assert!(now + (5 << 20) < used, "what is trimmed gives room back: {used} to {now}");
    assert!(fs::metadata(&raw).unwrap().blocks() <= full);
    fs::write(at.join("after"), &files[..1 << 20]).unwrap();
    let synced = File::open(at.join("after")).unwrap();
    synced.sync_all().unwrap();
    drop(synced);
    // The guest dies with the mount.
    mounted.kill();
    run(Command::new("umount").arg(&at));
    drop((device, mounted));
    let (mounted, raw) = writable(&site, "mnt", &["--overlay", text(&folder)]);
    let device = Loop::new(&raw);
    mount(&device);
    assert!(fs::read(at.join("kept")).unwrap() == files && fs::read(at.join("after")).unwrap() == files[..1 << 20]);
    assert!(!at.join("gone").exists());
    system("umount", &[text(&at)]);
    drop(device);
    system("e2fsck", &["-f", "-n", text(&raw)]);
    let job = [
        "--name=job".to_owned(),
        format!("--filename={}", text(&raw)),
        "--rw=randwrite".into(),
        "--bsrange=512-64k".into(),
        "--size=16M".into(),
        "--verify=crc32c".into(),
        "--fsync=32".into(),
        "--allow_file_create=0".into(),
        "--verify_state_save=0".into(),
    ];
    run(Command::new("fio").args(&job)).ok();
    let direct = ["--direct=1", "--ioengine=libaio", "--iodepth=16", "--bsrange=4k-64k", "--bs_is_seq_rand=0"];
    run(Command::new("fio").args(&job).args(direct)).ok();
    mounted.umount(&site).ok();
    assert_point_is(&site, &content);
}

#[test]
fn a_full_overlay_is_no_space_for_the_writer() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let (mounted, raw) = writable(&site, "mnt", &["--overlay", text(&folder), "--overlay-limit", "6M"]);
    let of = format!("of={}", text(&raw));
    refused("dd", &["if=/dev/urandom", &of, "bs=64k", "count=200", "conv=notrunc"], "No space left on device");
    system("fallocate", &["--punch-hole", "--offset", "0", "--length", "2M", text(&raw)]);
    system("sync", &["--data", text(&raw)]);
    system("dd", &["if=/dev/urandom", &of, "bs=64k", "count=16", "conv=notrunc,fsync", "status=none"]);
    let bytes: u64 = files_below(&folder).iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum();
    assert!(bytes <= (6 << 20) + (64 << 10), "{bytes}");
    let said = mounted.umount(&site).ok().said();
    assert!(said.contains("disk-0.raw") && said.contains("--overlay-limit"), "{said}");
    assert_point_is(&site, &content);
}

#[test]
fn several_mounts_of_one_point_know_nothing_of_each_other_and_only_one_point_is_written_to() {
    let (site, content) = site(&["disk-0", "data"]);
    let folder = site.path("lab");
    let (lab, of_lab) = writable(&site, "lab-mnt", &["--overlay", text(&folder)]);
    let (recovery, of_recovery) = writable(&site, "mnt", &[]);
    let write = |path: &Path, byte| {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&[byte; 10_000], 100).unwrap();
        file.sync_data().unwrap();
    };
    write(&of_lab, 1);
    write(&of_recovery, 2);
    write(&of_recovery.with_file_name("data.raw"), 3);
    let read = |path: &Path| fs::read(path).unwrap()[..10_100].to_vec();
    assert_eq!(read(&of_lab), [&content[..100], &[1; 10_000]].concat());
    assert_eq!(read(&of_recovery), [&content[..100], &[2; 10_000]].concat());
    assert!(fs::read(of_lab.with_file_name("data.raw")).unwrap() == content, "nor do disks of one");
    let listed = overlays(&site, &[text(&folder)]);
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|overlay| overlay["in_use"] == json!(true) && overlay["vm"] == "vm"));
    let try_mount = |words: &[&str]| -> Run { Mounted::try_new(&site, "more", words).err().unwrap() };
    try_mount(&["vm@1", "--writable", "--overlay", text(&folder)]).fails(1, &["in use by another process"]);
    try_mount(&["vm", "--writable"]).fails(2, &["--writable needs one restore point, such as VM@latest"]);
    try_mount(&["--writable"]).fails(2, &["VM|POINT"]);
    try_mount(&["vm@1", "--overlay", "x"]).fails(2, &["--writable"]);
    // What can't be mounted leaves no overlay behind.
    let kept = site.objects().len();
    site.reseal(["mount", text(&site.path("none")), "vm@1", "--writable"]).fails(1, &["can't be used"]);
    assert_eq!((overlays(&site, &[]).len(), site.objects().len()), (1, kept));
    lab.umount(&site).ok();
    recovery.umount(&site).ok();
    // The newest is pinned when it is mounted.
    let mounted = Mounted::new(&site, "mnt", &["vm@latest", "--writable", "--overlay", text(&folder)]);
    site.backup_disks("vm", &[("disk-0".into(), site.disk("disk-0")), ("data".into(), site.disk("data"))]);
    assert_eq!(fs::read_dir(mounted.path.join("vm")).unwrap().count(), 1);
    let raw = mounted.point(&site, "vm", 1).join("disk-0.raw");
    assert_eq!(read(&raw)[100..], [1; 10_000]);
    mounted.umount(&site).ok();
    let run = Mounted::try_new(&site, "mnt", &["vm@latest", "--writable", "--overlay", text(&folder)]).err().unwrap();
    run.fails(2, &["holds the overlay of vm@1", "not of vm@2"]);
}

#[test]
fn others_may_read_where_they_are_let_and_never_write() {
    let (site, content) = site(&["disk-0"]);
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(site.path(""), open).unwrap();
    let (mounted, raw) = writable(&site, "mnt", &["--one-time", "--allow-other"]);
    let as_nobody = |words: &[&str]| {
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        run(Command::new("setpriv").args(nobody).args(words))
    };
    as_nobody(&["cmp", text(&raw), text(&site.disk("disk-0"))]).ok();
    let of = format!("of={}", text(&raw));
    as_nobody(&["dd", "if=/dev/zero", &of, "bs=4k", "count=1", "conv=notrunc"]).fails(1, &["Permission denied"]);
    as_nobody(&["touch", text(&raw.with_file_name("new"))]).fails(1, &["Permission denied"]);
    assert!(fs::read(&raw).unwrap() == content);
    mounted.umount(&site).ok();
}

/// What `qemu-img` says of an image.
fn info(format: &str, path: &Path) -> Value {
    serde_json::from_str(&system("qemu-img", &["info", "--output=json", "-f", format, text(path)])).unwrap()
}

#[test]
fn faces_open_in_the_tools_of_hypervisors_as_the_same_disk() {
    let site = Site::new();
    // Lengths that no geometry has; one that ends within a sector; a name that a descriptor could not hold.
    let disks = [("disk-0", LENGTH), ("odd", LENGTH + 1), ("large", 200 << 20), ("nbd:x", 1 << 20)];
    let mut named = Vec::new();
    for (name, length) in disks {
        let path = site.disk(name);
        let file = File::create(&path).unwrap();
        file.set_len(length as u64).unwrap();
        file.write_all_at(&Random::new(length as u64).bytes(700_000), length as u64 - 700_000).unwrap();
        named.push((name.to_owned(), path));
    }
    site.backup_disks("vm", &named);
    let check = |point: &Path| {
        for (name, length) in [("disk-0", LENGTH), ("large", 200 << 20)] {
            let at = |extension: &str| point.join(format!("{name}.{extension}"));
            for (format, extension) in [("vmdk", "vmdk"), ("vpc", "vhd")] {
                assert_eq!(info(format, &at(extension))["virtual-size"], length, "{name}.{extension}");
                let (raw, face) = (at("raw"), at(extension));
                system("qemu-img", &["compare", "-f", "raw", "-F", format, text(&raw), text(&face)]);
            }
            // Known without being told.
            assert_eq!(info("vmdk", &at("vmdk"))["format-specific"]["data"]["create-type"], "monolithicFlat");
            let probed = system("qemu-img", &["info", text(&at("vmdk"))]);
            assert!(probed.contains("file format: vmdk"), "{probed}");
        }
        let mut names: Vec<String> =
            fs::read_dir(point).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("odd") || name.starts_with("nbd"));
        names.sort();
        assert_eq!(names, ["nbd:x.raw", "nbd:x.vhd", "odd.raw"]);
    };
    let mounted = Mounted::new(&site, "mnt", &["vm@1"]);
    let point = mounted.point(&site, "vm", 1);
    check(&point);
    let facts: Value = serde_json::from_slice(&fs::read(point.join("vm.json")).unwrap()).unwrap();
    let faces: Vec<_> = facts["disks"].as_array().unwrap().iter().map(|disk| (&disk["vmdk"], &disk["vhd"])).collect();
    let (null, text_of) = (&Value::Null, |text: &str| json!(text));
    assert!(faces.contains(&(&text_of("disk-0.vmdk"), &text_of("disk-0.vhd"))));
    assert!(faces.contains(&(null, null)) && faces.contains(&(null, &text_of("nbd:x.vhd"))));
    mounted.umount(&site).ok();

    // The same of what was written, while it is written to.
    let (mounted, raw) = writable(&site, "mnt", &["--one-time"]);
    let point = raw.parent().unwrap();
    let commands = ["-c", "write -P 7 1M 3M", "-c", "write -z 8M 1M", "-c", "discard 10M 1M"];
    system("qemu-io", &[&["-f", "raw"], &commands[..], &[text(&raw)]].concat());
    check(point);
    let said = system("qemu-io", &["-r", "-f", "vpc", "-c", "read -P 7 1M 3M", text(&point.join("disk-0.vhd"))]);
    assert!(!said.contains("failed"), "{said}");
    let said = mounted.umount(&site).ok().said();
    assert!(said.contains("gone with this process"), "{said}");
    site.verify();
}

#[test]
fn over_another_sites_points_only_what_is_gone_with_the_process_can_be_written() {
    let sites = Enrolling::new();
    let (sender, reader) =
        (sites.enrol("acme", "sender", "append", &[]), sites.enrol("acme", "reader", "restore", &[]));
    let disk = sites.disk("disk", 3 << 20);
    sites.backup(&sender, "web01", &disk).ok();
    let content = fs::read(&disk).unwrap();
    let words = ["--repo", text(&reader), "web01@latest", "--writable"];
    let refused = Mounted::try_new(&sites.source, "mnt", &words).err().unwrap();
    refused.fails(2, &["gives out no keys", "--one-time"]);
    let mounted = Mounted::new(&sites.source, "mnt", &[&words[..], &["--one-time"]].concat());
    let point = fs::read_dir(mounted.path.join("web01")).unwrap().next().unwrap().unwrap().path();
    let file = File::options().read(true).write(true).open(point.join("disk-0.raw")).unwrap();
    file.write_all_at(&[9; 100], 1_000_001).unwrap();
    file.sync_data().unwrap();
    let mut wanted = content.clone();
    wanted[1_000_001..1_000_101].fill(9);
    assert!(fs::read(point.join("disk-0.raw")).unwrap() == wanted);
    assert!(fs::read(point.join("disk-0.vhd")).unwrap()[..wanted.len()] == wanted);
    drop(file);
    mounted.umount(&sites.source).ok();
    let mounted = Mounted::new(&sites.source, "mnt", &["--repo", text(&reader), "web01"]);
    assert!(fs::read(mounted.path.join("web01/latest/disk-0.raw")).unwrap() == content);
    mounted.umount(&sites.source).ok();
}
