//! A real system: its restore points boot from the mount, and their file systems are whole.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::path::{Path, PathBuf};
use std::process::Command;

use reseal_tests::model::{DiskFile, ReadDisk};
use reseal_tests::mounting::Mounted;
use reseal_tests::process::system;
use reseal_tests::site::Site;

/// Where the partition begins, see `debian-disk.sh`.
const PARTITION: &str = "?offset=1048576";

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// The small disk and its next day: made once, which takes a minute or two, and then kept.
fn disks() -> (PathBuf, PathBuf) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cache = std::env::var_os("RESEAL_CACHE").map_or(workspace.join(".cache"), PathBuf::from);
    let folder = cache.join("disk-small");
    let made = Command::new(script("debian-disk.sh")).arg("--small").arg(&folder).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (folder.join("base.raw"), folder.join("day1.raw"))
}

/// Backs up the system and its next day.
fn with_points() -> (Site, PathBuf, PathBuf) {
    let site = Site::new();
    let (base, day1) = disks();
    let full = site.backup("debian", &base);
    let next = site.backup("debian", &day1);
    let stored = |point: &serde_json::Value| point["stats"]["stored"].as_u64().unwrap();
    assert!(stored(&full) < 400 << 20 && stored(&next) * 20 < stored(&full), "{full} {next}");
    site.verify();
    (site, base, day1)
}

#[test]
fn a_point_boots_from_the_mount() {
    let (site, ..) = with_points();
    let mounted = Mounted::new(&site, "mnt", &[]);
    let disk = mounted.path.join("debian/latest/disk-0.raw");
    let console = site.path("console");
    let boot = Command::new(script("boot.sh")).arg(&disk).env("RESEAL_BOOT_LOG", &console).output().unwrap();
    assert!(boot.status.success(), "{}", String::from_utf8_lossy(&boot.stderr));
    let said = String::from_utf8_lossy(&std::fs::read(console).unwrap()).into_owned();
    assert!(said.contains("login:"), "{said}");
    mounted.umount(&site).ok();
    site.verify();
}

#[test]
fn file_systems_in_the_mount_are_whole_and_their_files_are_read() {
    let (site, base, day1) = with_points();
    let mounted = Mounted::new(&site, "mnt", &[]);
    for (number, original) in [(1, &base), (2, &day1)] {
        let path = mounted.point(&site, "debian", number).join("disk-0.raw");
        let device = format!("{}{PARTITION}", path.display());
        let checked = system("e2fsck", &["-fn", &device]);
        assert!(!checked.contains("WARNING") && !checked.contains("errors"), "{checked}");
        assert_eq!(system("debugfs", &["-R", "cat /etc/hostname", &device]), "reseal-test\n");
        let original_device = format!("{}{PARTITION}", original.display());
        for command in ["ls -l /etc", "stat /boot/extlinux/extlinux.conf", "cat /usr/lib/os-release"] {
            let [found, wanted] = [&device, &original_device].map(|device| system("debugfs", &["-R", command, device]));
            assert!(found == wanted && !found.is_empty(), "{command}: {found}");
        }
        system("cmp", &[path.to_str().unwrap(), original.to_str().unwrap()]);
        // As sparse as the disk is: whoever copies it with `cp --sparse` or `qemu-img` reads no holes.
        let (shown, source) = (DiskFile::open(&path), DiskFile::open(original));
        let data = |disk: &DiskFile| disk.extents().iter().map(|(start, end)| end - start).sum::<u64>();
        assert!(data(&shown) <= data(&source) + (64 << 20), "{} and {}", data(&shown), data(&source));
    }
    let restored = site.path("restored.raw");
    site.restore("debian@1", "disk-0", &restored).ok();
    system("cmp", &[restored.to_str().unwrap(), base.to_str().unwrap()]);
    mounted.umount(&site).ok();
}
