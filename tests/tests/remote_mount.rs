//! A site that may read mounts and restores what another has, over `reseal serve`: every file as at the vault, through servers
//! that die and come back, and to its end when the certificate is revoked.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use reseal_tests::enrolled::Enrolling;
use reseal_tests::model::{DiskFile, ReadDisk};
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Run, run, signal, system, wait_until};
use reseal_tests::random::Random;

const MIB: u64 = 1 << 20;
/// How much is compared at a time.
const STEP: usize = 1 << 20;

/// Two sites; the source may send, and read.
struct Reading {
    sites: Enrolling,
    sender: PathBuf,
    reader: PathBuf,
}

impl Reading {
    fn new() -> Reading {
        let sites = Enrolling::new();
        let sender = sites.enrol("acme", "sender", "append", &[]);
        let reader = sites.enrol("acme", "reader", "restore", &[]);
        Reading { sites, sender, reader }
    }

    #[track_caller]
    fn backup(&self, vm: &str, disk: &Path) {
        self.sites.backup(&self.sender, vm, disk).ok();
    }

    /// A disk with data here and there.
    fn sparse(&self, name: &str, length: u64, seed: u64) -> PathBuf {
        let path = self.sites.source.disk(name);
        let disk = DiskFile::create(&path, length);
        let mut random = Random::new(seed);
        for _ in 0..30 {
            let bytes = random.index(400_000) + 1;
            let offset = random.below(length - bytes as u64);
            disk.write(offset, &random.bytes(bytes));
        }
        path
    }

    fn mount(&self, more: &[&str]) -> Mounted {
        Mounted::new(&self.sites.source, "mnt", &[&["--repo", self.reader.to_str().unwrap()], more].concat())
    }

    /// A command of the source, as the reader.
    fn reads(&self, words: &[&str]) -> Run {
        self.sites.source.reseal(["--repo", self.reader.to_str().unwrap()].iter().chain(words))
    }
}

/// All below a folder: what links lead to, what files hold and where they have holes.
fn tree(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        let data = fs::symlink_metadata(&path).unwrap();
        if data.is_dir() {
            let below = tree(&path);
            found.insert(name.clone(), format!("folder of {}", below.len()));
            found.extend(below.into_iter().map(|(below, what)| (name.join(below), what)));
        } else if data.is_symlink() {
            found.insert(name, format!("link to {}", fs::read_link(&path).unwrap().display()));
        } else {
            let (extents, bytes) = (DiskFile::open(&path).extents(), fs::read(&path).unwrap());
            let digest = blake3::hash(&bytes);
            found.insert(
                name,
                format!("{} {} {:?} {digest} {extents:?}", bytes.len(), data.blocks(), data.modified().unwrap()),
            );
        }
    }
    found
}

#[test]
fn a_mount_over_a_site_shows_what_one_of_the_vault_does() {
    let reading = Reading::new();
    let first = reading.sparse("first", 40 * MIB + 512, 1);
    let second = reading.sparse("second", 3 << 30, 2);
    for (vm, disk) in [("web01", &first), ("db01", &second)] {
        reading.backup(vm, disk);
        DiskFile(File::options().write(true).open(disk).unwrap()).write(MIB, &Random::new(9).bytes(100_000));
        reading.backup(vm, disk);
    }
    let here = Mounted::new(&reading.sites.target, "here", &["--tenant", "acme"]);
    let there = reading.mount(&[]);
    assert!(fs::read(there.path.join("web01/latest/disk-0.raw")).unwrap() == fs::read(&first).unwrap());
    // Of the large one only holes and what is between them: that is quick however long it is.
    let large = Path::new("db01/latest/disk-0.raw");
    let (here_disk, there_disk) = (DiskFile::open(&here.path.join(large)), DiskFile::open(&there.path.join(large)));
    let extents = here_disk.extents();
    assert!(extents.len() > 10 && extents == there_disk.extents());
    let (mut expected, mut found) = (vec![0; STEP], vec![0; STEP]);
    for (from, to) in extents {
        for at in (from..to).step_by(STEP) {
            let length = usize::try_from(to - at).unwrap().min(STEP);
            here_disk.read(at, &mut expected[..length]);
            there_disk.read(at, &mut found[..length]);
            assert!(expected[..length] == found[..length], "at {at}");
        }
    }
    assert_eq!(tree(&here.path.join("web01")), tree(&there.path.join("web01")));
    drop((here_disk, there_disk));
    here.umount(&reading.sites.target).ok();

    // One VM, and one point, as with a vault.
    there.umount(&reading.sites.source).ok();
    let one = reading.mount(&["web01"]);
    assert_eq!(tree(&one.path).keys().filter(|path| path.components().count() == 1).count(), 1);
    one.umount(&reading.sites.source).ok();
    let one = reading.mount(&["web01@1"]);
    assert_eq!(fs::read_dir(one.path.join("web01")).unwrap().count(), 1);
    one.umount(&reading.sites.source).ok();
    reading.reads(&["mount", reading.sites.source.path("mnt").to_str().unwrap(), "none"]).fails(1, &["no VM none"]);
}

#[test]
fn files_are_pulled_out_of_the_file_system_inside() {
    let reading = Reading::new();
    let source = &reading.sites.source;
    let (content, disk) = (source.path("content"), source.disk("ext4"));
    fs::create_dir_all(content.join("etc")).unwrap();
    let bytes = Random::new(5).bytes(3_000_000);
    fs::write(content.join("etc/hostname"), "web01\n").unwrap();
    fs::write(content.join("large"), &bytes).unwrap();
    DiskFile::create(&disk, 64 * MIB);
    system("mke2fs", &["-q", "-t", "ext4", "-d", content.to_str().unwrap(), disk.to_str().unwrap()]);
    reading.backup("web01", &disk);
    let mounted = reading.mount(&[]);
    let image = mounted.path.join("web01/latest/disk-0.raw");
    let said = system("debugfs", &["-R", "cat /etc/hostname", image.to_str().unwrap()]);
    assert_eq!(said, "web01\n");
    let at = source.path("inside");
    fs::create_dir(&at).unwrap();
    system("mount", &["-o", "ro,noload,loop", image.to_str().unwrap(), at.to_str().unwrap()]);
    let read = (fs::read_to_string(at.join("etc/hostname")), fs::read(at.join("large")));
    system("umount", &[at.to_str().unwrap()]);
    assert_eq!(read.0.unwrap(), "web01\n");
    assert!(read.1.unwrap() == bytes);
    mounted.umount(source).ok();
}

#[test]
fn a_restore_over_a_site_equals_the_disk_is_sparse_and_ends_when_told_to() {
    let mut reading = Reading::new();
    let disk = reading.sparse("disk", 200 * MIB, 3);
    reading.backup("web01", &disk);
    let out = reading.sites.source.path("out.raw");
    let words = ["restore", "--json", "web01@latest", out.to_str().unwrap()];
    let told = reading.reads(&words).ok().json();
    assert_eq!(told["vm"], "web01");
    assert!(fs::read(&out).unwrap() == fs::read(&disk).unwrap());
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(blocks(&out) <= blocks(&disk) + 30 * 131_072, "{} of {}", blocks(&out), blocks(&disk));
    reading.reads(&words).fails(1, &["exists", "--force"]);
    reading.reads(&["restore", "web01@7", "x"]).fails(1, &["web01@7"]);
    reading.reads(&["restore", "web02@latest", "x"]).fails(1, &["no VM web02"]);

    // Whoever may only send reads nothing.
    let sender = reading.sender.to_str().unwrap();
    reading.sites.source.reseal(["--repo", sender, "restore", "web01@latest", "x"]).expect(&[1]);
    reading.sites.stop();
    reading.reads(&["restore", "web01@latest", "x"]).fails(4, &["localhost"]);
    let at = reading.sites.source.path("mnt");
    fs::create_dir_all(&at).unwrap();
    reading.reads(&["mount", at.to_str().unwrap()]).fails(4, &["localhost"]);
    reading.sites.start();

    // As slow as a line may be, so that it can be interrupted, and the server die, in its middle.
    let slow = fs::read_to_string(reading.sites.target.path("serve.toml")).unwrap();
    reading.sites.stop();
    reseal_tests::remote::private(
        reading.sites.target.path("serve.toml"),
        &(slow + "\n[limits]\nclient_rate = \"1M\"\n"),
    );
    reading.sites.start();
    let out = reading.sites.source.path("interrupted.raw");
    let words = ["--repo", reading.reader.to_str().unwrap(), "restore", "web01@latest", out.to_str().unwrap()];
    let restore = reading.sites.source.start(words);
    wait_until("its beginning", Duration::from_secs(10), || out.exists());
    thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    signal(restore.id(), libc::SIGTERM);
    restore.wait().fails(1, &["interrupted"]);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(!out.exists());
}

#[test]
fn a_server_that_is_killed_and_started_again_costs_readers_time_only() {
    let mut reading = Reading::new();
    let disk = reading.sites.disk("disk", 96 << 20);
    reading.backup("web01", &disk);
    let mounted = reading.mount(&["--cache-size", "8M"]);
    let (image, original) =
        (File::open(mounted.path.join("web01/latest/disk-0.raw")).unwrap(), fs::read(&disk).unwrap());
    let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for reader in 0..3 {
            let (image, original, is_over, reads) = (&image, &original, &is_over, &reads);
            scope.spawn(move || {
                let mut random = Random::new(reader + 1);
                let mut bytes = vec![0; 300_000];
                while !is_over.load(Ordering::Relaxed) {
                    let at = random.index(original.len() - bytes.len());
                    image.read_exact_at(&mut bytes, at as u64).unwrap();
                    assert!(bytes == original[at..at + bytes.len()], "at {at}");
                    // What was read is read from the site again.
                    rustix::fs::fadvise(image, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(500));
            reading.sites.kill();
            thread::sleep(Duration::from_secs(1));
            reading.sites.start();
            let before = reads.load(Ordering::Relaxed);
            wait_until("what readers go on with", Duration::from_secs(30), || {
                reads.load(Ordering::Relaxed) > before + 5
            });
        }
        is_over.store(true, Ordering::Relaxed);
    });
    drop(image);
    mounted.umount(&reading.sites.source).ok();
}

#[test]
fn a_site_that_is_away_is_an_error_in_time_and_read_again_when_it_is_back() {
    let mut reading = Reading::new();
    let disk = reading.sites.disk("disk", 64 << 20);
    reading.backup("web01", &disk);
    let mounted = reading.mount(&["--io-timeout", "3"]);
    let image = File::open(mounted.path.join("web01/latest/disk-0.raw")).unwrap();
    let original = fs::read(&disk).unwrap();
    let read = |at: usize| {
        let mut bytes = vec![0; 10_000];
        image.read_exact_at(&mut bytes, at as u64).map(|()| assert!(bytes == original[at..at + bytes.len()]))
    };
    read(0).unwrap();
    reading.sites.stop();
    let began = Instant::now();
    assert_eq!(read(20 << 20).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    reading.sites.start();
    read(40 << 20).unwrap();
    read(20 << 20).unwrap();
    drop(image);
    let said = mounted.umount(&reading.sites.source).ok().stderr;
    assert!(said.contains("localhost"), "{said}");
}

#[test]
fn a_certificate_that_is_revoked_ends_reading_and_another_begins_it_again() {
    let reading = Reading::new();
    let disk = reading.sites.disk("disk", 64 << 20);
    reading.backup("web01", &disk);
    let mounted = reading.mount(&["--io-timeout", "10"]);
    let image = File::open(mounted.path.join("web01/latest/disk-0.raw")).unwrap();
    let original = fs::read(&disk).unwrap();
    let read = |at: usize| {
        let mut bytes = vec![0; 10_000];
        image.read_exact_at(&mut bytes, at as u64).map(|()| assert!(bytes == original[at..at + bytes.len()]))
    };
    read(0).unwrap();
    reading.sites.tenant(&["revoke", "acme", "reader"]).ok();
    thread::sleep(Duration::from_secs(3));
    for at in [20 << 20, 30 << 20] {
        let began = Instant::now();
        assert_eq!(read(at).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    let names = fs::read_dir(&mounted.path).map(|names| names.count());
    assert_eq!(names.unwrap_err().raw_os_error(), Some(libc::EIO), "nothing is listed either");

    // The same place in the file system, and another certificate in it.
    let new = reading.sites.enrol("acme", "again", "restore", &[]);
    fs::rename(new, &reading.reader).unwrap();
    read(40 << 20).unwrap();
    assert_eq!(fs::read_dir(&mounted.path).unwrap().count(), 1);
    drop(image);
    let said = mounted.umount(&reading.sites.source).ok().stderr;
    assert!(said.contains("localhost") && said.contains("web01"), "{said}");
}

/// A line to a server of this machine: so long one way, and so many bytes a second come back over all of its connections.
fn long_line(to: u16, delay: Duration, rate: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let free = Arc::new(Mutex::new(Instant::now()));
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            one_way(near.try_clone().unwrap(), far.try_clone().unwrap(), delay, |_| {});
            let free = free.clone();
            one_way(far, near, delay, move |bytes| {
                let until = {
                    let mut free = free.lock().unwrap();
                    *free = (*free).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
                    *free
                };
                thread::sleep(until.saturating_duration_since(Instant::now()));
            });
        }
    });
    port
}

/// What a line holds is what is on its way, and some more: as a router's buffer.
fn one_way(mut from: TcpStream, mut to: TcpStream, delay: Duration, pace: impl Fn(usize) + Send + 'static) {
    let (pieces, arriving) = crossbeam_channel::bounded::<(Instant, Vec<u8>)>(64);
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            pace(count);
            if pieces.send((Instant::now() + delay, bytes[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (at, bytes) in arriving {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

#[test]
fn a_stream_over_a_long_line_reaches_half_of_it() {
    const RATE: u64 = 25_000_000;
    let reading = Reading::new();
    let disk = reading.sites.disk("disk", 96 << 20);
    reading.backup("web01", &disk);
    let original = fs::read(&disk).unwrap();
    let port = long_line(reading.sites.port, Duration::from_millis(50), RATE);
    let far = reading.sites.enrol("acme", "far", "restore", &["--address", &format!("localhost:{port}")]);
    let repo = ["--repo", far.to_str().unwrap()];
    let reached = |what: &str, began: Instant| {
        let rate = original.len() as f64 / began.elapsed().as_secs_f64();
        eprintln!("{what}: {:.1} of {:.1} MB/s", rate / 1e6, RATE as f64 / 1e6);
        rate > RATE as f64 / 2.0
    };
    // The best of three: others use this machine, too.
    let mounted = (1..=3).any(|_| {
        let mounted = Mounted::new(&reading.sites.source, "mnt", &repo);
        let began = Instant::now();
        assert!(fs::read(mounted.path.join("web01/latest/disk-0.raw")).unwrap() == original);
        let is_half = reached("a mount", began);
        mounted.umount(&reading.sites.source).ok();
        is_half
    });
    let out = reading.sites.source.path("out");
    let restored = (1..=3).any(|_| {
        let began = Instant::now();
        let words = ["restore", "--force", "web01@latest", out.to_str().unwrap()];
        reading.sites.source.reseal(repo.iter().chain(&words)).ok();
        let is_half = reached("a restore", began);
        assert!(fs::read(&out).unwrap() == original);
        is_half
    });
    assert!(mounted && restored);
}

#[test]
fn a_mount_of_many_points_lists_them_and_holds_few_connections() {
    let reading = Reading::new();
    let disk = reading.sites.disk("disk", 200_000);
    for _ in 0..40 {
        reading.backup("web01", &disk);
    }
    let mounted = reading.mount(&[]);
    let original = fs::read(&disk).unwrap();
    let points: Vec<_> = fs::read_dir(mounted.path.join("web01")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(points.len(), 41);
    for point in &points {
        assert!(fs::read(point.join("disk-0.raw")).unwrap() == original);
    }
    let process = format!("pid={},", mounted.process());
    let sockets = run(std::process::Command::new("ss").args(["-tnp", "state", "established"])).ok().stdout;
    let held = sockets.lines().filter(|line| line.contains(&process)).count();
    assert!((1..=40).contains(&held), "{held} connections");
    mounted.umount(&reading.sites.source).ok();
}
