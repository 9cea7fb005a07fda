//! Real mounts, read by the kernel. Where `/dev/fuse` can't be opened they are skipped, which is said.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};

use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64};
use reseal_mountfs::catalog::Shown;
use reseal_mountfs::disks::Disks;
use reseal_mountfs::mount::{MountError, Mounted, Options};
use reseal_vault::Tenant;
use rustix::fs::{SeekFrom, seek};
use support::faults::{Faulty, Mood};
use support::{Model, Numbers, Vault, disk_bytes, flip, journal, model_seek, used};

/// Short, so that the tests are.
const DEADLINE: Duration = Duration::from_millis(500);

struct Mount {
    path: PathBuf,
    lines: Arc<Mutex<Vec<String>>>,
    stop: Box<dyn Fn()>,
    server: Option<JoinHandle<Result<(), MountError>>>,
}

fn mount(vault: &Vault, tenant: Arc<Tenant>, shown: Shown) -> Option<Mount> {
    if let Err(error) = File::open("/dev/fuse") {
        eprintln!("skipped: /dev/fuse can't be opened: {error}");
        return None;
    }
    let (journal, lines) = journal();
    let options = Options { shown, threads: 4, io_timeout: DEADLINE, allow_other: false };
    let path = vault.mountpoint();
    let mounted = Mounted::new(tenant.clone(), Disks::here(tenant, 8 << 20), None, &path, &options, journal).unwrap();
    let stop = Box::new(mounted.stopper());
    Some(Mount { path, lines, stop, server: Some(thread::spawn(|| mounted.wait())) })
}

impl Mount {
    fn end(mut self) {
        (self.stop)();
        self.server.take().unwrap().join().unwrap().unwrap();
        assert_eq!(fs::read_dir(&self.path).unwrap().count(), 0, "nothing is mounted any more");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            (self.stop)();
            let _ = server.join();
        }
    }
}

macro_rules! mount_or_skip {
    ($vault:expr) => {
        mount_or_skip!($vault, $vault.tenant.clone(), Shown::All)
    };
    ($vault:expr, $tenant:expr, $shown:expr) => {
        match mount(&$vault, $tenant, $shown) {
            Some(mount) => mount,
            None => return,
        }
    };
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn points_are_folders_with_disks_facts_and_the_definition() {
    let vault = Vault::new();
    let bytes = disk_bytes(1, 3 * CLUSTER + 5);
    let disks = || vec![vault.store_disk("root", &Model::of(&bytes)), vault.store_disk("data", &Model::of(b"x"))];
    let (_, first) = vault.commit("web01", disks(), Some(("web01.xml", "<domain/>")));
    let (_, second) = vault.commit("web01", disks(), Some(("../../evil", "<domain/>")));
    let mount = mount_or_skip!(vault);
    assert_eq!(names(&mount.path), ["web01"]);
    let vm = mount.path.join("web01");
    assert_eq!(names(&vm), [first.as_str(), second.as_str(), "latest"]);
    assert_eq!(fs::read_link(vm.join("latest")).unwrap(), Path::new(&second));
    assert_eq!(names(&vm.join(&first)), ["data.raw", "root.raw", "vm.json", "web01.xml"]);
    assert_eq!(names(&vm.join("latest/")), ["data.raw", "definition", "root.raw", "vm.json"]);
    assert_eq!(fs::read_to_string(vm.join("latest/definition")).unwrap(), "<domain/>");
    assert!(fs::read_to_string(vm.join(&first).join("vm.json")).unwrap().contains("\"number\": 1"));
    assert!(fs::read(vm.join("latest/root.raw")).unwrap() == bytes);
    assert_eq!(fs::read(vm.join("latest/data.raw")).unwrap(), b"x");

    let data = fs::metadata(vm.join(&first).join("root.raw")).unwrap();
    assert_eq!(data.blocks(), used(&bytes).div_ceil(512));
    let made = UNIX_EPOCH + Duration::from_millis(1_795_501_907_123 + 60_000);
    assert_eq!(data.modified().unwrap(), made);
    assert_eq!(fs::metadata(vm.join(&first)).unwrap().modified().unwrap(), made);
    let again = fs::metadata(vm.join(&first).join("root.raw")).unwrap();
    assert_eq!(data.ino(), again.ino());

    for wrong in ["web02", "web01/yesterday", "web01/2026-11-24T06:32:47.123Z", "web01/latest/none", "..."] {
        assert_eq!(errno(fs::metadata(mount.path.join(wrong))), libc::ENOENT, "{wrong}");
    }
    assert_eq!(errno(File::create(mount.path.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::write(vm.join("latest/root.raw"), b"x")), libc::EROFS);
    assert!(mount.lines.lock().is_empty(), "wrong names are not worth a line: {:?}", mount.lines.lock());
    mount.end();
}

#[test]
fn reads_and_seeks_of_several_readers_equal_the_model() {
    let vault = Vault::new();
    let bytes = Arc::new(disk_bytes(2, 150 * CLUSTER + 12_345));
    let (_, time) = vault.backup("web01", &bytes);
    let mount = mount_or_skip!(vault);
    let path = mount.path.join("web01").join(time).join("disk-0.raw");
    let readers: Vec<_> = (0..4u64)
        .map(|seed| {
            let (path, bytes) = (path.clone(), bytes.clone());
            thread::spawn(move || {
                let file = File::open(path).unwrap();
                let mut numbers = Numbers(seed + 100);
                for _ in 0..400 {
                    let offset = usize::try_from(numbers.below(bytes.len() as u64)).unwrap();
                    let length = usize::try_from(numbers.below(200_000)).unwrap().min(bytes.len() - offset);
                    let mut got = vec![0; length];
                    file.read_exact_at(&mut got, offset as u64).unwrap();
                    assert!(got == bytes[offset..offset + length], "{offset}+{length}");
                    let found = seek(&file, SeekFrom::Hole(offset as u64)).ok();
                    assert_eq!(found, model_seek(&bytes, offset as u64, true), "hole from {offset}");
                    let found = seek(&file, SeekFrom::Data(offset as u64)).ok();
                    assert_eq!(found, model_seek(&bytes, offset as u64, false), "data from {offset}");
                }
            })
        })
        .collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    let mut whole = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut whole).unwrap();
    assert!(whole == *bytes);
    let end = seek(File::open(&path).unwrap(), SeekFrom::Data(bytes.len() as u64));
    assert_eq!(end.unwrap_err().raw_os_error(), libc::ENXIO);
    mount.end();
}

#[test]
fn new_points_and_vms_appear_and_a_limited_mount_stays_limited() {
    let vault = Vault::new();
    vault.backup("web01", b"one");
    let all = mount_or_skip!(vault);
    let latest = all.path.join("web01/latest/disk-0.raw");
    assert_eq!(fs::read(&latest).unwrap(), b"one");
    let (_, time) = vault.backup("web01", b"two");
    assert_eq!(fs::read(&latest).unwrap(), b"two", "at once");
    assert_eq!(names(&all.path.join("web01")).len(), 3);
    assert_eq!(fs::read(all.path.join("web01").join(time).join("disk-0.raw")).unwrap(), b"two");
    vault.backup("db 01", b"three");
    assert_eq!(names(&all.path), ["db 01", "web01"]);
    all.end();

    let web01 = || reseal_format::names::VmName::new("web01").unwrap();
    let one_vm = mount(&vault, vault.tenant.clone(), Shown::Vm(web01())).unwrap();
    assert_eq!(names(&one_vm.path), ["web01"]);
    assert_eq!(errno(fs::metadata(one_vm.path.join("db 01"))), libc::ENOENT);
    one_vm.end();
    let one_point = mount(&vault, vault.tenant.clone(), Shown::Point(web01(), 1)).unwrap();
    let shown = names(&one_point.path.join("web01"));
    assert_eq!(shown.len(), 1, "no other point, and no latest: {shown:?}");
    assert_eq!(fs::read(one_point.path.join("web01").join(&shown[0]).join("disk-0.raw")).unwrap(), b"one");
    assert_eq!(errno(fs::metadata(one_point.path.join("web01/latest"))), libc::ENOENT);
    one_point.end();
}

#[test]
fn any_legal_name_is_shown_and_none_escapes() {
    let vault = Vault::new();
    let hostile = ["latest", ".hidden", "...", "50%", "%2F..%2F", "ä ö\u{1f600}", "a@b", "-rf", "a\\b", "*", "$(id)"];
    for name in hostile {
        vault.commit(name, vec![vault.store_disk(name, &Model::of(name.as_bytes()))], Some((name, "text")));
    }
    // What is in the vault's folder but is no VM's.
    fs::create_dir_all(vault.repo().join("tenants/default/vms/..%2Fescape")).unwrap();
    fs::create_dir_all(vault.repo().join("tenants/default/vms/a b")).unwrap();
    let mount = mount_or_skip!(vault);
    let mut wanted = hostile.to_vec();
    wanted.sort_unstable();
    assert_eq!(names(&mount.path), wanted);
    for name in hostile {
        let point = mount.path.join(name).join("latest");
        assert_eq!(fs::read(point.join(format!("{name}.raw"))).unwrap(), name.as_bytes());
        assert_eq!(fs::read_to_string(point.join(name)).unwrap(), "text");
    }
    mount.end();
}

#[test]
fn a_store_that_hangs_or_fails_costs_a_reader_its_deadline_and_then_works_again() {
    let vault = Vault::new();
    let mut bytes = disk_bytes(3, 40 * CLUSTER);
    // No hole, which is known without asking the store.
    bytes.iter_mut().step_by(CLUSTER).for_each(|byte| *byte = 1);
    let disk = |name| vault.store_disk(name, &Model::of(&bytes));
    let (_, time) = vault.commit("web01", vec![disk("one"), disk("two")], None);
    vault.backup("web02", b"other");
    let store = Faulty::new(vault.tenant.store().clone());
    let mount = mount_or_skip!(vault, vault.tenant_over(store.clone()), Shown::All);
    let point = mount.path.join("web01").join(&time);
    for (mood, disk) in [(Mood::Hangs, "one.raw"), (Mood::Fails, "two.raw")] {
        let file = File::open(point.join(disk)).unwrap();
        let mut part = vec![0; 4096];
        file.read_exact_at(&mut part, 0).unwrap();
        store.set(mood);
        let began = Instant::now();
        let readers: Vec<_> = (0..24u64)
            .map(|nth| {
                let file = file.try_clone().unwrap();
                thread::spawn(move || errno(file.read_exact_at(&mut [0; 512], (15 + nth) * CLUSTER_U64)))
            })
            .collect();
        let failed = readers.into_iter().map(|reader| reader.join().unwrap()).filter(|&e| e == libc::EIO).count();
        assert_eq!(failed, 24);
        // More readers than workers, and each is refused in time. So are names, whose manifests must be opened.
        assert_eq!(errno(fs::read_dir(&mount.path).map(drop)), libc::EIO);
        assert_eq!(errno(fs::metadata(mount.path.join("web02/latest/"))), libc::EIO);
        assert!(began.elapsed() < 8 * DEADLINE, "{mood:?}: {:?}", began.elapsed());
        // What is known is served all the same.
        file.read_exact_at(&mut part, 0).unwrap();
        assert!(part == bytes[..4096]);
        store.set(Mood::Answers);
        let mut whole = vec![0; bytes.len()];
        file.read_exact_at(&mut whole, 0).unwrap();
        assert!(whole == bytes, "it works again after {mood:?}");
    }
    let lines = mount.lines.lock().clone();
    assert!(lines.iter().any(|line| line.contains("did not answer within 0.5 s")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("web01@1 one.raw")), "{lines:?}");
    mount.end();
}

#[test]
fn a_mount_ends_at_once_while_the_store_hangs_and_a_file_is_open() {
    let vault = Vault::new();
    let (_, time) = vault.backup("web01", &disk_bytes(4, 40 * CLUSTER));
    let store = Faulty::new(vault.tenant.store().clone());
    let mount = mount_or_skip!(vault, vault.tenant_over(store.clone()), Shown::All);
    let file = File::open(mount.path.join("web01").join(&time).join("disk-0.raw")).unwrap();
    file.read_exact_at(&mut [0; 1], 0).unwrap();
    store.set(Mood::Hangs);
    let reader = thread::spawn({
        let file = file.try_clone().unwrap();
        move || file.read_exact_at(&mut [0; 1], 30 * CLUSTER_U64)
    });
    thread::sleep(DEADLINE / 5);
    let began = Instant::now();
    mount.end();
    assert_eq!(errno(reader.join().unwrap()), libc::EIO);
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    drop(file);
    store.set(Mood::Answers);
}

#[test]
fn damaged_data_is_an_error_with_a_line_that_names_point_pack_and_ordinal() {
    let vault = Vault::new();
    let bytes = vec![0x77; CLUSTER * 2];
    let mut bytes = [bytes, disk_bytes(5, 30 * CLUSTER)].concat();
    bytes.iter_mut().step_by(CLUSTER).for_each(|byte| *byte |= 1);
    let (_, time) = vault.backup("web01", &bytes);
    let pack = vault.packs()[0].clone();
    flip(&pack, 10);
    let mount = mount_or_skip!(vault);
    let file = File::open(mount.path.join("web01").join(time).join("disk-0.raw")).unwrap();
    for _ in 0..3 {
        assert_eq!(errno(file.read_exact_at(&mut [0; 4096], 8192)), libc::EIO);
    }
    let mut rest = vec![0; bytes.len() - CLUSTER];
    file.read_exact_at(&mut rest, CLUSTER_U64).unwrap();
    assert!(rest == bytes[CLUSTER..], "what is not damaged is served");
    let lines = mount.lines.lock().clone();
    assert_eq!(lines.len(), 1, "said once: {lines:?}");
    let name = pack.file_name().unwrap().to_str().unwrap();
    for part in ["web01@1 disk-0.raw", name, "blob 0", "failed authentication"] {
        assert!(lines[0].contains(part), "{part} in {lines:?}");
    }
    mount.end();
}

#[test]
fn a_damaged_manifest_is_left_out_and_its_name_is_an_error() {
    let vault = Vault::new();
    let times: Vec<String> = (0..5).map(|nth| vault.backup("web01", &[nth]).1).collect();
    flip(&vault.repo().join("tenants/default/vms/web01/00000003.manifest"), 300);
    let mount = mount_or_skip!(vault);
    let vm = mount.path.join("web01");
    // Whether the damaged one is what was asked for can't be known; the others are found all the same.
    assert_eq!(errno(fs::metadata(vm.join(&times[2]))), libc::EIO);
    for nth in [0u8, 1, 3, 4] {
        assert_eq!(fs::read(vm.join(&times[usize::from(nth)]).join("disk-0.raw")).unwrap(), [nth]);
    }
    let mut wanted: Vec<&str> = times.iter().map(String::as_str).filter(|time| *time != times[2]).collect();
    wanted.push("latest");
    assert_eq!(names(&vm), wanted);
    let lines = mount.lines.lock().clone();
    assert!(lines.iter().any(|line| line.contains("web01@3 is left out")), "{lines:?}");
    mount.end();
}

#[test]
fn thousands_of_points_are_listed_and_cost_no_manifest_twice() {
    let vault = Vault::new();
    let disk = vault.store_disk("disk-0", &Model::of(b"the same"));
    for _ in 0..300 {
        vault.commit("web01", vec![disk.clone()], None);
    }
    let store = Faulty::new(vault.tenant.store().clone());
    let mount = mount_or_skip!(vault, vault.tenant_over(store.clone()), Shown::All);
    let vm = mount.path.join("web01");
    let listed = names(&vm);
    assert_eq!(listed.len(), 301);
    let reads = store.reads.load(Ordering::Relaxed);
    assert_eq!(names(&vm), listed);
    assert!(store.reads.load(Ordering::Relaxed) - reads <= 3, "a second listing opens nothing");
    assert_eq!(fs::read(vm.join(&listed[150]).join("disk-0.raw")).unwrap(), b"the same");
    mount.end();
}

#[test]
fn a_mountpoint_that_is_wrong_or_taken_is_refused() {
    let vault = Vault::new();
    vault.backup("web01", b"x");
    let mount = mount_or_skip!(vault);
    let options = Options { shown: Shown::All, threads: 1, io_timeout: DEADLINE, allow_other: false };
    let again = |path: &Path| {
        let (tenant, disks) = (vault.tenant.clone(), Disks::here(vault.tenant.clone(), 1 << 20));
        Mounted::new(tenant, disks, None, path, &options, journal().0).map(drop)
    };
    assert!(matches!(again(&mount.path), Err(MountError::Mounted { .. })));
    assert!(matches!(again(&vault.folder.path().join("none")), Err(MountError::Mountpoint { .. })));
    assert!(matches!(again(&vault.folder.path().join("keyring.json")), Err(MountError::NotAFolder { .. })));
    mount.end();
}
