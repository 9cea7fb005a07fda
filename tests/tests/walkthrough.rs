//! What the README shows, in that order, on a small file system: from `init` to `umount`; and a mount whose vault or
//! process goes away.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use reseal_tests::loops::Loop;
use reseal_tests::mounting::{Mounted, is_mounted};
use reseal_tests::process::system;
use reseal_tests::random::Random;
use reseal_tests::site::{Site, copy_folder};

/// Takes a mount in the background away, should the test end early.
struct Background(PathBuf);

impl Drop for Background {
    fn drop(&mut self) {
        if is_mounted(&self.0) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

/// A disk that is one file system with a host name in it.
fn file_system(site: &Site, name: &str, host: &str) -> PathBuf {
    let tree = site.path("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/hostname"), format!("{host}\n")).unwrap();
    fs::write(tree.join("etc/large"), Random::new(1).bytes(3 << 20)).unwrap();
    let disk = site.disk(name);
    let _ = fs::remove_file(&disk);
    let path = disk.to_str().unwrap().to_owned();
    system("mke2fs", &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), &path, "32M"]);
    disk
}

fn hostname(disk: &Path) -> String {
    system("debugfs", &["-R", "cat /etc/hostname", disk.to_str().unwrap()])
}

#[test]
fn everything_that_the_readme_shows_works_in_that_order() {
    let site = Site::bare();
    let (usb, secret) = (site.path("usb"), site.path("secret"));
    fs::create_dir(&usb).unwrap();
    fs::write(&secret, "a passphrase\n").unwrap();
    let kit = usb.join("reseal-recovery.age");
    let words = ["init", "--recovery", kit.to_str().unwrap(), "--recovery-passphrase-file", secret.to_str().unwrap()];
    let said = site.reseal(words).ok().stdout;
    assert!(said.contains(kit.to_str().unwrap()) && said.contains("Next:"), "{said}");

    let web = file_system(&site, "web01.raw", "first");
    let path = web.to_str().unwrap().to_owned();
    let first = site.reseal(["backup", "web01", &path]).ok().stdout;
    assert!(first.starts_with("web01@1 ") && first.contains("stored"), "{first}");
    // In place, as a guest does: the file system is made anew over the same bytes.
    let again = file_system(&site, "web01.raw", "second");
    let second = site.backup("web01", &again);
    assert!(second["stats"]["stored"].as_u64().unwrap() < 2 << 20, "only what changed: {second}");

    let (root, data) = (site.disk("root.raw"), site.disk("data.raw"));
    copy_folder(&web, &root);
    fs::write(&data, Random::new(2).bytes(1 << 20)).unwrap();
    let device = Loop::new(&data);
    let definition = site.path("db01.xml");
    fs::write(&definition, "<domain>db01</domain>").unwrap();
    let (root, data) = (format!("root={}", root.display()), format!("data={}", device.0.display()));
    site.reseal(["backup", "db01", &root, &data, "--definition", definition.to_str().unwrap()]).ok();

    let listed = site.reseal(["list"]).ok().stdout;
    assert_eq!(listed.lines().count(), 4, "{listed}");
    site.reseal(["show", "web01@latest"]).ok();
    assert!(site.reseal(["verify"]).ok().stdout.starts_with("all right: 3 restore points"));

    let mountpoint = site.path("restore");
    fs::create_dir(&mountpoint).unwrap();
    let at = mountpoint.to_str().unwrap();
    let background = Background(mountpoint.clone());
    site.reseal(["mount", at, "--background"]).ok();
    assert_eq!(hostname(&mountpoint.join("web01/latest/disk-0.raw")), "second\n");
    let mut names: Vec<_> =
        fs::read_dir(mountpoint.join("db01/latest/")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let files = ["data.raw", "data.vhd", "data.vmdk", "db01.xml", "root.raw", "root.vhd", "root.vmdk", "vm.json"];
    assert_eq!(names, files);
    assert_eq!(fs::read(mountpoint.join("db01/latest/data.raw")).unwrap(), Random::new(2).bytes(1 << 20));

    let old = site.path("web01-old.raw");
    let restored = site.reseal(["restore", "web01@1", old.to_str().unwrap()]).ok();
    assert!(restored.said().contains("clear"), "it says that the target is in the clear: {restored:#?}");
    assert_eq!(hostname(&old), "first\n");
    site.reseal(["restore", "web01@1", old.to_str().unwrap()]).fails(1, &["--force"]);
    site.reseal(["restore", "web01@2", old.to_str().unwrap(), "--force"]).ok();
    assert_eq!(hostname(&old), "second\n");
    site.reseal(["umount", at]).ok();
    assert!(!is_mounted(&mountpoint));
    drop(background);
    // Options before the verb go through to the other program too.
    site.reseal(["--quiet", "restore", "web01@1", site.path("quiet.raw").to_str().unwrap()]).ok();
}

#[test]
fn a_restore_never_writes_to_a_device_that_is_used_or_too_small() {
    let site = Site::new();
    let disk = site.disk("d.raw");
    fs::write(&disk, Random::new(3).bytes(5 << 20)).unwrap();
    site.backup("vm", &disk);
    let small = site.path("small.img");
    fs::write(&small, vec![7; 4 << 20]).unwrap();
    let device = Loop::new(&small);
    site.reseal(["restore", "vm@1", device.0.to_str().unwrap(), "--force"]).fails(1, &["bytes", "nothing was written"]);
    assert!(fs::read(&small).unwrap() == vec![7; 4 << 20]);
    drop(device);
    let mount = reseal_tests::loops::Mount::ext4(&site.path("used.img"), &site.path("used"), 32 << 20);
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let used = table.lines().find(|line| line.contains(mount.0.to_str().unwrap())).unwrap().split(' ').next().unwrap();
    site.reseal(["restore", "vm@1", used, "--force"]).fails(1, &["in use", "nothing was written"]);
    drop(mount);
    let right = site.path("right.img");
    fs::write(&right, vec![7; 6 << 20]).unwrap();
    let device = Loop::new(&right);
    site.reseal(["restore", "vm@1", device.0.to_str().unwrap()]).fails(1, &["--force"]);
    site.reseal(["restore", "vm@1", device.0.to_str().unwrap(), "--force"]).ok();
    drop(device);
    assert!(fs::read(&right).unwrap()[..5 << 20] == fs::read(&disk).unwrap());
}

/// Reads a file from its start to its end on another thread; how that ended, within a bound.
fn read_bounded(path: &Path, bound: Duration) -> std::io::Result<u64> {
    let (sender, result) = mpsc::channel();
    let path = path.to_owned();
    thread::spawn(move || {
        let copy = || std::io::copy(&mut fs::File::open(path)?, &mut std::io::sink());
        let _ = sender.send(copy());
    });
    result.recv_timeout(bound).expect("a reader waits within a bound")
}

#[test]
fn a_vault_that_goes_away_costs_readers_an_error_and_nothing_more() {
    let site = Site::new();
    let disk = site.disk("d.raw");
    fs::write(&disk, Random::new(4).bytes(8 << 20)).unwrap();
    site.backup("vm", &disk);
    let mounted = Mounted::new(&site, "mnt", &["--io-timeout", "2", "--cache-size", "1M"]);
    let shown = mounted.path.join("vm/latest/disk-0.raw");
    // Its name is known, and nothing of it was read.
    assert_eq!(fs::metadata(&shown).unwrap().len(), 8 << 20);
    let away = site.path("away");
    fs::rename(&site.vault, &away).unwrap();
    // What was listed counts for a second.
    thread::sleep(Duration::from_millis(1100));
    let error = read_bounded(&shown, Duration::from_secs(10)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    fs::rename(&away, &site.vault).unwrap();
    let began = Instant::now();
    while read_bounded(&shown, Duration::from_secs(10)).ok() != Some(8 << 20) {
        assert!(began.elapsed() < Duration::from_secs(10), "the vault is back, and still nothing is read");
        thread::sleep(Duration::from_millis(50));
    }
    mounted.umount(&site).ok();
}

#[test]
fn a_mount_that_is_killed_leaves_no_reader_hanging() {
    let site = Site::new();
    let disk = site.disk("d.raw");
    fs::write(&disk, Random::new(5).bytes(64 << 20)).unwrap();
    site.backup("vm", &disk);
    for after in [1, 5, 20] {
        let mut mounted = Mounted::new(&site, "mnt", &["--cache-size", "1M"]);
        let shown = mounted.path.join("vm/latest/disk-0.raw");
        let readers: Vec<_> = (0..4)
            .map(|nth: u64| {
                let shown = shown.clone();
                thread::spawn(move || {
                    let file = fs::File::open(shown)?;
                    let mut page = [0; 4096];
                    (0..1_000_000u64).try_for_each(|n| file.read_exact_at(&mut page, (n * 7919 + nth) % 16_000 * 4096))
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(after));
        let began = Instant::now();
        mounted.kill();
        for reader in readers {
            assert!(reader.join().unwrap().is_err(), "what served it is dead");
        }
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    // The dead mount is in nobody's way.
    let mounted = Mounted::new(&site, "mnt", &[]);
    let mut first = [0; 1];
    fs::File::open(mounted.path.join("vm/latest/disk-0.raw")).unwrap().read_exact(&mut first).unwrap();
    mounted.umount(&site).ok();
}
