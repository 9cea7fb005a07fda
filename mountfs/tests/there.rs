//! Disks of another site, read from real NBD servers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reseal_format::geometry::{CLUSTER, CLUSTER_U64, cluster_count};
use reseal_format::ids::{PointId, VmId};
use reseal_format::manifest::{Disk, Manifest, Stats};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_mountfs::catalog::Shown;
use reseal_mountfs::disks::{DiskOf, Disks, There};
use reseal_mountfs::mount::{Mounted, Options};
use reseal_mountfs::restore::{How, Plan, RestoreError, Watch, restore};
use reseal_mountfs::target::Format;
use reseal_vault::disk::Tools;
use reseal_vault::{Class, VaultError, Wait};
use support::servers::{Server, Socket, write_sparse};
use support::{Numbers, Vault, disk_bytes, journal, model_seek, used};

const LIMIT: Duration = Duration::from_secs(4);
const CACHE: usize = 8 << 20;

/// A restore point whose disks have these names and lengths.
fn manifest(disks: &[(String, u64)]) -> Manifest {
    let disk = |(name, length): &(String, u64)| Disk {
        name: DiskName::new(name).unwrap(),
        length: *length,
        source: String::new(),
        root: None,
        used_clusters: cluster_count(*length),
        tracking: None,
        claim: None,
    };
    Manifest {
        vm: VmName::new("web01").unwrap(),
        vm_id: VmId::from_bytes([1; 16]),
        number: 1,
        point_id: PointId::from_bytes([2; 16]),
        created: Timestamp(0),
        parent: None,
        disks: disks.iter().map(disk).collect(),
        definition: None,
        stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
        warnings: vec![],
        locked: None,
    }
}

/// One disk, what it holds, and where it is served.
struct Place {
    folder: tempfile::TempDir,
    bytes: Vec<u8>,
    manifest: Manifest,
    socket: Socket,
    disks: Disks,
}

impl Place {
    fn of(bytes: Vec<u8>) -> Place {
        let folder = tempfile::tempdir().unwrap();
        write_sparse(&folder.path().join("disk"), &bytes);
        let socket = Socket::new(folder.path().join("nbd.sock"));
        let disks = there(&socket, CACHE);
        let manifest = manifest(&[("disk-0".to_owned(), bytes.len() as u64)]);
        Place { folder, bytes, manifest, socket, disks }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn serve(&self) -> Server {
        Server::qemu_nbd(&self.socket.path, &self.path())
    }

    fn try_read(&self, offset: usize, length: usize, wait: Wait) -> Result<Vec<u8>, VaultError> {
        let of = DiskOf::new(&self.manifest, 0).unwrap();
        let mut out = vec![0xee; length];
        self.disks.read_on(of, offset as u64, &mut out, &mut 0, wait, &mut Tools::new()).map(|()| out)
    }

    #[track_caller]
    fn check(&self, offset: usize, length: usize) {
        let read = self.try_read(offset, length, Wait::May).unwrap();
        assert!(read == self.bytes[offset..offset + length], "{length} bytes from {offset} on");
    }

    /// Reads here and there, which must all be right.
    fn check_some(&self, seed: u64, count: usize) {
        let mut numbers = Numbers(seed | 1);
        for _ in 0..count {
            let offset = usize::try_from(numbers.below(self.bytes.len() as u64)).unwrap();
            let length = usize::try_from(numbers.below(600_000)).unwrap().min(self.bytes.len() - offset);
            self.check(offset, length);
        }
    }
}

fn there(socket: &Socket, cache: usize) -> Disks {
    Disks::There(There::new(socket.clone(), "acme.reseal".to_owned(), cache, LIMIT).unwrap())
}

fn connections(disks: &Disks) -> usize {
    match disks {
        Disks::There(there) => there.connections(),
        Disks::Here(_) => 0,
    }
}

#[test]
fn reads_and_seeks_equal_the_disk_however_many_read() {
    let place = Place::of(disk_bytes(1, 300 * CLUSTER + 512));
    let _server = place.serve();
    assert!(matches!(place.try_read(0, 1, Wait::MustNot), Err(VaultError::WouldBlock)));
    thread::scope(|scope| {
        for reader in 0..8 {
            let place = &place;
            scope.spawn(move || place.check_some(reader * 1_000_003, 60));
        }
    });
    place.check(0, 200);
    assert_eq!(place.try_read(100, 50, Wait::MustNot).unwrap(), place.bytes[100..150], "it is at hand now");
    let of = DiskOf::new(&place.manifest, 0).unwrap();
    let mut numbers = Numbers(7);
    for _ in 0..300 {
        let at = numbers.below(place.bytes.len() as u64);
        assert_eq!(place.disks.next_data(of, at).unwrap(), model_seek(&place.bytes, at, false));
        assert_eq!(place.disks.next_hole(of, at).unwrap(), model_seek(&place.bytes, at, true).unwrap());
    }
    place.check_some(99, 60);
    assert_eq!(place.socket.opened.load(Ordering::Relaxed), 1, "all share what is open");
}

#[test]
fn what_is_asked_for_stops_at_the_end_and_holes_are_not_asked_for() {
    let mut bytes = vec![0; 64 * CLUSTER];
    bytes[40 * CLUSTER..41 * CLUSTER].fill(9);
    let place = Place::of(bytes);
    let server = place.serve();
    let of = DiskOf::new(&place.manifest, 0).unwrap();
    assert_eq!(place.disks.next_data(of, 0).unwrap(), Some(40 * CLUSTER_U64));
    assert_eq!(place.disks.next_data(of, 41 * CLUSTER_U64).unwrap(), None);
    drop(server);
    // The holes are known: they need nobody.
    assert!(place.try_read(0, 40 * CLUSTER, Wait::MustNot).unwrap().iter().all(|&byte| byte == 0));
    assert!(matches!(place.try_read(40 * CLUSTER, 1, Wait::MustNot), Err(VaultError::WouldBlock)));
}

#[test]
fn a_server_that_is_killed_and_comes_back_costs_time_and_no_bytes() {
    let place = Place::of(disk_bytes(2, 400 * CLUSTER));
    let server = place.serve();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let place = &place;
                scope.spawn(move || {
                    (0..6).for_each(|round| {
                        place.check_some(reader * 77 + round, 20);
                        thread::sleep(Duration::from_millis(150));
                    })
                })
            })
            .collect();
        let mut server = Some(server);
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(200));
            drop(server.take());
            thread::sleep(Duration::from_millis(300));
            server = Some(place.serve());
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

#[test]
fn a_server_that_is_gone_is_an_error_in_time_and_forgotten_when_it_is_back() {
    let place = Place::of(disk_bytes(3, 100 * CLUSTER));
    let server = place.serve();
    place.check(0, 1000);
    drop(server);
    for at in [50 * CLUSTER, 60 * CLUSTER] {
        let began = Instant::now();
        let error = place.try_read(at, 90_000, Wait::May).unwrap_err();
        assert_eq!(error.class(), Class::Unreachable, "{error}");
        assert!(began.elapsed() < LIMIT + Duration::from_millis(500), "{:?}", began.elapsed());
    }
    let of = DiskOf::new(&place.manifest, 0).unwrap();
    assert_eq!(place.disks.next_hole(of, 0).unwrap_err().class(), Class::Unreachable);
    let _server = place.serve();
    place.check_some(5, 50);
    let Disks::There(there) = &place.disks else { unreachable!() };
    assert_eq!(there.under_way(), 0, "what was lost is not waited for");
}

#[test]
fn a_server_that_never_answers_holds_nobody_longer_than_the_limit() {
    let place = Place::of(disk_bytes(4, 10 * CLUSTER));
    let listener = UnixListener::bind(&place.socket.path).unwrap();
    thread::spawn(move || listener.incoming().map(Result::unwrap).collect::<Vec<_>>());
    let began = Instant::now();
    let readers = 6;
    thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| assert_eq!(place.try_read(0, 10, Wait::May).unwrap_err().class(), Class::Unreachable));
        }
    });
    assert!(began.elapsed() < LIMIT + Duration::from_millis(500), "{:?}", began.elapsed());
}

#[test]
fn a_disk_of_another_length_is_not_read() {
    let mut place = Place::of(disk_bytes(5, 10 * CLUSTER));
    place.manifest.disks[0].length -= 4096;
    let _server = place.serve();
    let error = place.try_read(0, 10, Wait::May).unwrap_err();
    assert!(error.class() == Class::Damaged && error.to_string().contains("by its restore point"), "{error}");
}

#[test]
fn what_a_site_can_not_read_is_lost_alone() {
    let place = Place::of((0..64 * CLUSTER).map(|at| (at / 1000).to_le_bytes()[0] | 1).collect());
    let (from, to) = (20 * CLUSTER, 21 * CLUSTER);
    let pread = format!(
        "pread=end=$(($4+$3)); if [ $4 -lt {to} ] && [ $end -gt {from} ]; then echo EIO bad >&2; exit 1; fi; \
         dd if={} bs=4096 skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
        place.path().display()
    );
    let size = format!("get_size=echo {}", place.bytes.len());
    let _server = Server::nbdkit(&place.socket.path, &["eval", &size, &pread]);
    // It is in the middle of what is asked for at once.
    let of = DiskOf::new(&place.manifest, 0).unwrap();
    place.disks.prepare(of, 0..64, &mut Tools::new()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| place.check(0, 20 * CLUSTER));
        scope.spawn(|| place.check(21 * CLUSTER, 43 * CLUSTER));
        scope.spawn(|| {
            let error = place.try_read(19 * CLUSTER, 3 * CLUSTER, Wait::May).unwrap_err();
            assert_eq!(error.class(), Class::Damaged, "{error}");
            assert!(error.to_string().contains(&format!("bytes {from} to {to}")), "{error}");
        });
    });
    assert!(place.try_read(from, 1, Wait::May).is_err(), "again");
    place.check(from - 10, 10);
    assert_eq!(place.socket.opened.load(Ordering::Relaxed), 1, "nothing had to be opened anew");
}

#[test]
fn a_reader_of_many_disks_holds_few_connections() {
    let folder = tempfile::tempdir().unwrap();
    let disks: Vec<_> = (0..90).map(|nth| (format!("d{nth}"), 3 * CLUSTER_U64)).collect();
    let contents: Vec<_> = (0..90u8).map(|nth| vec![nth + 1; 3 * CLUSTER]).collect();
    fs::create_dir(folder.path().join("disks")).unwrap();
    for ((name, _), bytes) in disks.iter().zip(&contents) {
        fs::write(folder.path().join("disks").join(name), bytes).unwrap();
    }
    let socket = Socket::new(folder.path().join("nbd.sock"));
    let _server = Server::nbdkit(&socket.path, &["file", &format!("dir={}", folder.path().join("disks").display())]);
    let manifest = manifest(&disks);
    let disks = there(&socket, CACHE);
    let most = thread::scope(|scope| {
        let readers: Vec<_> = (0..6usize)
            .map(|reader| {
                let (manifest, disks, contents) = (&manifest, &disks, &contents);
                scope.spawn(move || {
                    let mut most = 0;
                    for nth in (0..90).map(|step| (step * 7 + reader * 13) % 90) {
                        let mut out = vec![0; 3 * CLUSTER];
                        let of = DiskOf::new(manifest, nth).unwrap();
                        disks.read_on(of, 0, &mut out, &mut 0, Wait::May, &mut Tools::new()).unwrap();
                        assert!(out == contents[nth]);
                        most = most.max(connections(disks));
                    }
                    most
                })
            })
            .collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).max().unwrap()
    });
    assert!((1..=40).contains(&most), "{most} connections");
}

#[test]
fn connections_that_nobody_uses_are_closed() {
    let place = Place::of(disk_bytes(6, 20 * CLUSTER));
    let _server = place.serve();
    place.check(0, 20 * CLUSTER);
    assert!(connections(&place.disks) > 0);
    let began = Instant::now();
    while connections(&place.disks) > 0 {
        assert!(began.elapsed() < Duration::from_secs(25));
        thread::sleep(Duration::from_millis(100));
    }
    place.disks.stop();
    assert!(matches!(place.try_read(0, 1, Wait::MustNot), Ok(_) | Err(VaultError::WouldBlock)));
}

#[test]
fn a_stream_over_a_long_line_is_not_bound_by_its_delay() {
    if let Err(error) = File::open("/dev/fuse") {
        eprintln!("skipped: /dev/fuse can't be opened: {error}");
        return;
    }
    let vault = Vault::new();
    let mut bytes = disk_bytes(7, 48 << 20);
    // No holes: each byte has to cross the line.
    bytes.iter_mut().step_by(1000).for_each(|byte| *byte |= 1);
    let (_, time) = vault.backup("web01", &bytes);
    let disk = vault.folder.path().join("disk");
    fs::write(&disk, &bytes).unwrap();
    let socket = Socket::new(vault.folder.path().join("nbd.sock"));
    let file = format!("file={}", disk.display());
    let _server =
        Server::nbdkit(&socket.path, &["--filter=delay", "file", &file, "rdelay=100ms", "delay-extents=100ms"]);
    let (journal, lines) = journal();
    let options = Options { shown: Shown::All, threads: 4, io_timeout: LIMIT, allow_other: false };
    let path = vault.mountpoint();
    let disks = there(&socket, 64 << 20);
    let mounted = Mounted::new(vault.tenant.clone(), disks, None, &path, &options, journal).unwrap();
    let stop = mounted.stopper();
    let server = thread::spawn(|| mounted.wait());
    let began = Instant::now();
    let read = fs::read(path.join("web01").join(time).join("disk-0.raw")).unwrap();
    let took = began.elapsed();
    assert!(read == bytes);
    stop();
    server.join().unwrap().unwrap();
    assert!(lines.lock().is_empty(), "{:?}", lines.lock());
    eprintln!("48 MiB over a line of 100 ms took {took:?}");
    // Half of a line of 200 Mbit/s. Cluster by cluster it would take 77 s.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

fn run(place: &Place, out: &std::path::Path, stop: &AtomicBool) -> Result<(), RestoreError> {
    let plan = Plan::new(&place.manifest, None, out, &How { format: Format::Raw, secret: None, force: false })?;
    restore(&place.disks, plan, &Watch { progress: &|_| (), stop })
}

#[test]
fn a_restored_disk_equals_the_disk_and_stays_sparse() {
    let place = Place::of(disk_bytes(8, 500 * CLUSTER + 512));
    let _server = place.serve();
    let out = place.folder.path().join("out");
    run(&place, &out, &AtomicBool::new(false)).unwrap();
    assert!(fs::read(&out).unwrap() == place.bytes);
    let blocks = fs::metadata(&out).unwrap().blocks() * 512;
    assert!(blocks <= used(&place.bytes) + 65_536, "{blocks} of {}", used(&place.bytes));
}

#[test]
fn a_restore_ends_when_it_is_told_to_and_leaves_nothing() {
    let place = Place::of(disk_bytes(9, 100 * CLUSTER));
    let file = format!("file={}", place.path().display());
    let _server = Server::nbdkit(&place.socket.path, &["--filter=delay", "file", &file, "rdelay=30"]);
    let out = place.folder.path().join("out");
    let stop = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    thread::scope(|scope| {
        let stopped = stop.clone();
        let disks = place.disks.clone();
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(300));
            stopped.store(true, Ordering::Relaxed);
            disks.stop();
        });
        assert!(matches!(run(&place, &out, &stop), Err(RestoreError::Interrupted)));
    });
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(!out.exists());
}
