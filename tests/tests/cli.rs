//! The command line: what it takes, what it refuses and with which remedy, exit statuses, and JSON.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use reseal_tests::loops::Loop;
use reseal_tests::model::{DiskFile, ModelDisk};
use reseal_tests::process::system;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

/// A small disk with random content.
fn small(site: &Site, name: &str, length: usize) -> PathBuf {
    let path = site.disk(name);
    fs::write(&path, Random::new(length as u64).bytes(length)).unwrap();
    path
}

#[test]
fn init_asks_for_a_decision_about_recovery() {
    let site = Site::bare();
    site.reseal(["init"]).fails(2, &["--recovery"]);
    site.reseal(["init", "--no-recovery", "--recovery", "x"]).fails(2, &["--no-recovery"]);
    assert!(!site.vault.exists() && !site.keyring.exists(), "nothing was made");
    let said = site.reseal(["init", "--no-recovery"]).ok().stdout;
    for text in [site.vault.to_str().unwrap(), site.keyring.to_str().unwrap(), "reseal backup", "key export"] {
        assert!(said.contains(text), "{text:?} in {said}");
    }
    site.reseal(["init", "--no-recovery"]).fails(1, &["tenant default already"]);
    let other = site.reseal(["init", "--no-recovery", "--tenant", "other", "--json"]).ok().json();
    assert_eq!((&other["vault_made"], &other["tenant"]), (&json!(false), &json!("other")));
}

#[test]
fn keys_are_never_made_inside_the_vault() {
    let mut site = Site::bare();
    site.keyring = site.vault.join("keyring.json");
    site.reseal(["init", "--no-recovery"]).fails(2, &["inside the vault", "RESEAL_KEYRING"]);
    assert!(!site.vault.exists());
}

#[test]
fn image_containers_are_taken_by_name_and_content_and_otherwise_refused_with_the_remedy() {
    let site = Site::new();
    for (format, ending, named) in [
        ("qcow2", "qcow2", "qcow2"),
        ("vmdk", "vmdk", "VMDK"),
        ("vhdx", "vhdx", "VHDX"),
        ("vdi", "vdi", "VDI"),
        ("vpc", "vhd", "VHD"),
    ] {
        let hidden = site.disk(&format!("{format}.raw"));
        let path = hidden.to_str().unwrap();
        system("qemu-img", &["create", "-q", "-f", format, path, "8M"]);
        site.reseal(["backup", "vm", path]).fails(2, &[path, named, "--format", "--raw"]);
        let image = site.disk(&format!("disk.{ending}"));
        std::fs::copy(path, &image).unwrap();
        let point = site.reseal(["backup", "--json", "image", image.to_str().unwrap()]).ok().json();
        // VHD counts in cylinders.
        let length = point["disks"][0]["length"].as_u64().unwrap();
        assert!((8 << 20..9 << 20).contains(&length), "the disk inside, not the file: {point}");
        assert_eq!(point["disks"][0]["source"], image.to_str().unwrap());
    }
    site.reseal(["list", "vm"]).fails(1, &["no VM vm"]);
    let image = site.disk("qcow2.raw");
    let point = site.reseal(["backup", "--json", "--raw", "vm", image.to_str().unwrap()]).ok().json();
    assert_eq!(point["number"], 1, "--raw takes it as it is");
}

#[test]
fn a_source_that_changes_while_it_is_read_is_said_so() {
    let site = Site::new();
    let path = small(&site, "busy.raw", 48 << 20);
    let (stop, started) = (AtomicBool::new(false), AtomicBool::new(false));
    let run = thread::scope(|scope| {
        scope.spawn(|| {
            let file = fs::File::options().write(true).open(&path).unwrap();
            for count in 0u64.. {
                file.write_all_at(&count.to_le_bytes(), 4096 * (count % 1000)).unwrap();
                started.store(true, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        while !started.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        let run = site.reseal(["backup", "--json", "vm", path.to_str().unwrap()]);
        stop.store(true, Ordering::Relaxed);
        run
    });
    let run = run.ok();
    assert!(run.stderr.contains("warning:") && run.stderr.contains("was written to"), "{run:#?}");
    assert_eq!(run.json()["warnings"].as_array().unwrap().len(), 1);
    let shown = site.reseal(["show", "vm@1"]).ok().stdout;
    assert!(shown.contains("was written to while it was read"), "{shown}");
    site.verify();
}

#[test]
fn a_source_that_lies_still_gives_no_warning() {
    let site = Site::new();
    let path = small(&site, "still.raw", 100_000);
    assert_eq!(site.backup("vm", &path)["warnings"], json!([]));
}

#[test]
fn names_that_could_leave_their_place_are_refused() {
    let site = Site::new();
    let disk = small(&site, "d.raw", 5000);
    let disk = disk.to_str().unwrap();
    let before = site.objects();
    for name in ["../x", "a/b", "..", ".", "", "a\nb", "a\x1b[2J", &"x".repeat(81), "/etc/passwd"] {
        let run = site.reseal(["backup", "--", name, disk]).fails(2, &["VM name"]);
        assert!(!run.stderr.trim_end().contains(['\n', '\x1b']), "the name must not drive the terminal: {run:#?}");
        site.reseal(["list", "--", name]).fails(2, &["VM name"]);
        site.reseal(["--tenant", name, "list"]).fails(2, &[]);
        site.reseal(["backup", "vm", &format!("{name}={disk}")]).expect(&[1, 2]);
    }
    assert_eq!(site.objects(), before);
    for name in ["web 01", "ä@ö", "-x", "...", "50%", "a\\b", "$(id)"] {
        site.reseal(["backup", "--quiet", "--", name, disk]).ok();
        let points = site.reseal(["list", "--json", "--", name]).ok().json_lines();
        assert_eq!(points[0]["vm"], name);
        site.reseal(["show", "--", &format!("{name}@latest")]).ok();
        site.reseal(["verify", "--", &format!("{name}@1")]).ok();
        site.reseal(["verify", "--", name]).ok();
    }
    assert_eq!(site.verify()["points"], 7);
}

#[test]
fn several_disks_must_be_named_and_have_one_name_each() {
    let site = Site::new();
    let (a, b) = (small(&site, "a.raw", 70_000), small(&site, "b.raw", 80_000));
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    site.reseal(["backup", "vm", a, b]).fails(2, &["NAME=DISK"]);
    site.reseal(["backup", "vm", &format!("x={a}"), &format!("x={b}")]).fails(2, &["two disks are named x"]);
    site.reseal(["backup", "vm"]).fails(2, &["DISK"]);
    site.reseal(["backup", "vm", "/nonexistent/disk.raw"]).fails(1, &["/nonexistent/disk.raw"]);
    site.reseal(["backup", "vm", "nbd://127.0.0.1:1/disk"]).fails(4, &["nbd://127.0.0.1:1/disk"]);
    site.reseal(["backup", "vm", "nbd://host/disk?tls=no"]).fails(2, &["tls"]);
    site.reseal(["backup", "vm", site.path("disks").to_str().unwrap()]).fails(2, &["neither a regular file"]);
    let named = [("root".to_owned(), PathBuf::from(a)), ("data=1".to_owned(), PathBuf::from(b))];
    let point = site.backup_disks("vm", &named[..1]);
    assert_eq!(point["disks"][0]["name"], "root");
    let point = site.backup_disks("vm", &[named[0].clone(), ("data".into(), PathBuf::from(b))]);
    let names: Vec<_> = point["disks"].as_array().unwrap().iter().map(|disk| disk["name"].clone()).collect();
    assert_eq!(names, ["root", "data"]);
    site.verify();
}

/// The fields that `--json` of a point has, for ever; fields may be added.
fn check_point_json(point: &Value) {
    for (field, is_right) in [
        ("vm", Value::is_string as fn(&Value) -> bool),
        ("number", Value::is_u64),
        ("time", Value::is_string),
        ("point_id", Value::is_string),
        ("parent", |value| value.is_null() || value.is_u64()),
        ("disks", Value::is_array),
        ("definition", |value| value.is_null() || value.is_string()),
        ("stats", Value::is_object),
        ("warnings", Value::is_array),
    ] {
        assert!(point.get(field).is_some_and(is_right), "{field} of {point}");
    }
    for disk in point["disks"].as_array().unwrap() {
        assert!(
            disk["name"].is_string() && disk["length"].is_u64() && disk["used"].is_u64() && disk["source"].is_string()
        );
    }
    for field in ["read", "changed", "new", "stored", "duration_ms"] {
        assert!(point["stats"][field].is_u64(), "{field} of {point}");
    }
}

#[test]
fn json_has_its_documented_fields_and_only_json_is_printed() {
    let site = Site::new();
    let disk = small(&site, "d.raw", 300_000);
    let definition = site.path("web01.xml");
    fs::write(&definition, "<domain><name>web01</name></domain>").unwrap();
    let words = ["backup", "--json", "web01", disk.to_str().unwrap(), "--definition", definition.to_str().unwrap()];
    let first = site.reseal(words).ok();
    assert_eq!(first.stderr, "");
    check_point_json(&first.json());
    assert_eq!(first.json()["definition"], "web01.xml");
    assert_eq!(first.json()["stats"]["read"], 300_000);
    let second = site.backup("web01", &disk);
    assert_eq!((&second["parent"], &second["stats"]["stored"]), (&json!(1), &json!(0)));
    let listed = site.reseal(["list", "--json"]).ok().json_lines();
    assert_eq!(listed.len(), 2);
    listed.iter().for_each(check_point_json);
    assert_eq!(listed[0], first.json());
    let report = site.reseal(["verify", "--json"]).ok().json();
    for field in ["points", "packs", "blobs", "bytes"] {
        assert!(report[field].is_u64(), "{field} of {report}");
    }
    assert_eq!((&report["points"], &report["damaged"]), (&json!(2), &json!([])));
    let made = site.reseal(["init", "--json", "--no-recovery", "--tenant", "b"]).ok().json();
    for field in ["vault", "vault_made", "tenant", "keyring", "recovery_kit"] {
        assert!(made.get(field).is_some(), "{field} of {made}");
    }
    let quiet = site.reseal(["backup", "--quiet", "web01", disk.to_str().unwrap()]).ok();
    assert_eq!(quiet.said(), "");
}

#[test]
fn a_point_is_named_in_three_forms() {
    let site = Site::new();
    let disk = small(&site, "d.raw", 100_000);
    let one = site.backup("vm", &disk);
    let two = site.backup("vm", &disk);
    let show = |point: &str| site.reseal(["show", "--json", point]).ok().json();
    assert_eq!(show("vm@1"), one);
    assert_eq!(show(&format!("vm@{}", one["time"].as_str().unwrap())), one);
    assert_eq!(show(&format!("vm@{}", two["time"].as_str().unwrap())), two);
    assert_eq!(show("vm@latest"), two);
    let shown = site.reseal(["show", "vm@2"]).ok().stdout;
    assert!(shown.contains("vm@2") && shown.contains("parent      vm@1"), "{shown}");
    for (point, status) in [("vm@3", 1), ("vm@0", 1), ("other@1", 1), ("vm", 2), ("vm@", 2), ("vm@x", 2), ("@1", 2)] {
        let run = site.reseal(["show", point]).expect(&[status]);
        assert!(run.stderr.contains(point.split('@').next().unwrap()), "{run:#?}");
    }
    let listed = site.reseal(["list", "vm"]).ok().stdout;
    assert!(listed.contains("vm@1") && listed.contains("vm@2") && listed.contains(one["time"].as_str().unwrap()));
    site.reseal(["list", "other"]).fails(1, &["no VM other", "reseal list"]);
}

#[test]
fn a_vault_that_is_not_there_is_said_with_the_remedy() {
    let site = Site::bare();
    let mut command = site.command("reseal", ["list"]);
    command.env_remove("RESEAL_REPO");
    reseal_tests::process::run(&mut command).fails(2, &["--repo", "RESEAL_REPO"]);
    site.reseal(["list"]).expect(&[1, 4]);
    site.reseal(["init", "--no-recovery"]).ok();
    site.reseal(["list", "--repo", "/nonexistent"]).fails(1, &["/nonexistent", "reseal init"]);
    site.reseal(["list", "--repo", "ftp://bucket/x"]).fails(2, &["ftp://", "s3://"]);
    site.reseal(["list", "--tenant", "nobody"]).fails(1, &["no tenant nobody", "reseal tenant add"]);
    site.reseal(["list", "--wrong"]).fails(2, &["--wrong"]);
    assert!(site.reseal(["list"]).ok().stdout.contains("reseal backup"), "an empty vault says what to do next");
}

#[test]
fn a_block_device_is_backed_up_to_its_last_byte() {
    let site = Site::new();
    let path = site.disk("device.raw");
    let mut random = Random::new(11);
    let mut model = ModelDisk::new((3 << 20) + 512);
    let file = DiskFile::create(&path, model.length);
    for at in [0, 70_000, 2 << 20, (3 << 20) - 100] {
        let bytes = random.bytes(5000);
        model.write(at, &bytes);
        file.write(at, &bytes);
    }
    let device = Loop::new(&path);
    let point = site.backup("vm", &device.0);
    assert_eq!(point["disks"][0]["length"], model.length);
    assert_eq!(point["warnings"], json!([]));
    let tenant = site.tenant();
    let disk = reseal_tests::library::LibraryDisk::open(&tenant, "vm", 1, "disk-0").unwrap();
    model.assert_same(&disk, "the device");
    site.verify();
}

#[test]
fn a_definition_is_kept_and_one_that_is_too_long_is_refused() {
    let site = Site::new();
    let disk = small(&site, "d.raw", 100_000);
    let disk = disk.to_str().unwrap();
    let definition = site.path("vm.xml");
    let path = definition.to_str().unwrap();
    site.reseal(["backup", "vm", disk, "--definition", path]).fails(2, &[path]);
    fs::write(&definition, "x".repeat((4 << 20) + 1)).unwrap();
    site.reseal(["backup", "vm", disk, "--definition", path]).fails(2, &[path, "4.0 MiB"]);
    fs::write(&definition, [0xFF, 0xFE]).unwrap();
    site.reseal(["backup", "vm", disk, "--definition", path]).fails(2, &[path]);
    let text = "<domain>ä\0</domain>".repeat(1000);
    fs::write(&definition, &text).unwrap();
    site.reseal(["backup", "vm", disk, "--definition", path]).ok();
    let point = site.tenant().point(&reseal_tests::library::vm("vm"), 1).unwrap();
    assert_eq!(point.manifest.definition.unwrap().text, text);
}

#[test]
fn an_empty_disk_and_one_of_a_byte_are_disks() {
    let site = Site::new();
    for (name, content) in [("empty", &b""[..]), ("byte", b"x"), ("zeros", &[0; 200_000])] {
        let path = site.disk(name);
        fs::write(&path, content).unwrap();
        let point = site.backup(name, &path);
        assert_eq!(point["disks"][0]["length"], content.len());
        let disk = reseal_tests::library::LibraryDisk::open(&site.tenant(), name, 1, "disk-0").unwrap();
        assert_eq!(disk.all().unwrap(), content);
    }
    assert_eq!(site.verify()["points"], 3);
}
