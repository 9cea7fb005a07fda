//! Mounts that are written to, by the kernel. Where `/dev/fuse` can't be opened they are skipped, which is said.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64};
use reseal_format::names::VmName;
use reseal_mountfs::catalog::Shown;
use reseal_mountfs::disks::Disks;
use reseal_mountfs::mount::{MountError, Mounted, Options};
use reseal_mountfs::writable::{Opened, OverlayPlace, WrittenDisk};
use reseal_vault::Tenant;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use support::faults::{Faulty, Mood};
use support::{Model, Numbers, Vault, disk_bytes, journal};

/// Short, so that the tests are, and long enough for what must be done meanwhile on a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(1);
const NO_LIMIT: u64 = 1 << 40;
const KEPT: FallocateFlags = FallocateFlags::KEEP_SIZE;

/// The mount of `web01@1`, whose disks are written to an overlay in the folder `overlay` of the vault's.
struct Mount {
    /// The folder of the restore point.
    point: PathBuf,
    lines: Arc<Mutex<Vec<String>>>,
    stop: Box<dyn Fn()>,
    server: Option<JoinHandle<Result<(), MountError>>>,
    disks: Vec<Arc<WrittenDisk>>,
}

fn overlay(vault: &Vault) -> PathBuf {
    vault.folder.path().join("overlay")
}

fn mount(vault: &Vault, tenant: Arc<Tenant>, limit: u64) -> Option<Mount> {
    if let Err(error) = File::open("/dev/fuse") {
        eprintln!("skipped: /dev/fuse can't be opened: {error}");
        return None;
    }
    let vm = VmName::new("web01").unwrap();
    let manifest = tenant.point(&vm, 1).unwrap().manifest;
    let opened = Opened::open(Some(&tenant), &manifest, None, &OverlayPlace::Kept(overlay(vault)), limit).unwrap();
    let (overlays, folder) = opened.into_parts();
    let disks: Vec<_> = overlays.into_iter().map(|(name, overlay)| Arc::new(WrittenDisk::new(name, overlay))).collect();
    let (journal, lines) = journal();
    let options = Options { shown: Shown::Point(vm, 1), threads: 4, io_timeout: DEADLINE, allow_other: false };
    let path = vault.mountpoint();
    let under = Disks::here(tenant.clone(), 8 << 20);
    let mounted = Mounted::writable(tenant, under, None, &path, &options, journal, disks.clone()).unwrap();
    let point = path.join("web01").join(manifest.created.to_string());
    let stop = Box::new(mounted.stopper());
    let server = Some(thread::spawn(move || {
        let ended = mounted.wait();
        drop(folder);
        ended
    }));
    Some(Mount { point, lines, stop, server, disks })
}

impl Mount {
    fn end(mut self) {
        (self.stop)();
        self.server.take().unwrap().join().unwrap().unwrap();
        self.disks.iter().for_each(|disk| disk.close().unwrap());
    }

    fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.point.join(name)).unwrap()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.point.join(name)).unwrap()
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
        mount_or_skip!($vault, $vault.tenant.clone(), NO_LIMIT)
    };
    ($vault:expr, $tenant:expr, $limit:expr) => {
        match mount(&$vault, $tenant, $limit) {
            Some(mount) => mount,
            None => return,
        }
    };
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// Data where a file says that it has some, and everything else zeros.
fn assert_holes_are_zeros(file: &File, bytes: &[u8]) {
    let mut at = 0;
    while at < bytes.len() as u64 {
        let data = seek(file, SeekFrom::Data(at)).unwrap_or(bytes.len() as u64);
        assert!(bytes[size(at)..size(data)].iter().all(|&byte| byte == 0), "hole at {at}");
        if data < bytes.len() as u64 {
            at = seek(file, SeekFrom::Hole(data)).unwrap();
            assert!(at > data);
        } else {
            break;
        }
    }
}

#[test]
fn whatever_is_written_and_punched_is_as_in_a_model_and_there_at_the_next_mount() {
    let vault = Vault::new();
    let base = disk_bytes(1, 40 * CLUSTER + 1234);
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&base))], None);
    let (mut model, mut numbers) = (base.clone(), Numbers(7));
    let length = model.len() as u64;
    for round in 0..3 {
        let mount = mount_or_skip!(vault);
        let file = mount.open("root.raw");
        let mut options = OpenOptions::new();
        let aligned = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(mount.point.join("root.raw"));
        let aligned = aligned.unwrap();
        for step in 0..150 {
            let at = numbers.below(length);
            let count = numbers.below(if step % 10 == 0 { 300_000 } else { 9000 }).min(length - at);
            match numbers.below(8) {
                0 => {
                    fallocate(&file, FallocateFlags::PUNCH_HOLE | KEPT, at, count.max(1)).unwrap();
                    model[size(at)..size((at + count.max(1)).min(length))].fill(0);
                }
                1 => {
                    let flags = if at + count < length { FallocateFlags::empty() } else { KEPT };
                    fallocate(&file, FallocateFlags::ZERO_RANGE | flags, at, count.max(1)).unwrap();
                    model[size(at)..size((at + count.max(1)).min(length))].fill(0);
                }
                2 => {
                    // Without the page cache, by whole pages of aligned memory.
                    let block = at / 4096 * 4096;
                    if block + 4096 <= length {
                        #[repr(align(4096))]
                        struct Page([u8; 4096]);
                        let page = Page([u8::try_from(step).unwrap(); 4096]);
                        assert_eq!(aligned.write_at(&page.0, block).unwrap(), 4096);
                        model[size(block)..size(block) + 4096].copy_from_slice(&page.0);
                    }
                }
                _ => {
                    let bytes: Vec<u8> = (0..count).map(|_| numbers.next().to_le_bytes()[5]).collect();
                    file.write_all_at(&bytes, at).unwrap();
                    model[size(at)..size(at + count)].copy_from_slice(&bytes);
                }
            }
            let (from, to) = (size(at.saturating_sub(5000)), size((at + count + 5000).min(length)));
            let mut found = vec![0; to - from];
            file.read_exact_at(&mut found, from as u64).unwrap();
            assert!(found == model[from..to], "round {round}, step {step}: {at}+{count}");
            if step % 40 == 39 {
                file.sync_data().unwrap();
            }
        }
        assert_holes_are_zeros(&file, &model);
        drop((file, aligned));
        assert!(mount.read("root.raw") == model);
        let data = fs::metadata(mount.point.join("root.raw")).unwrap();
        assert_eq!((data.len(), data.mode() & 0o7777), (length, 0o600));
        assert!(data.blocks() * 512 <= length.next_multiple_of(512) && data.blocks() > 0);
        assert!(data.modified().unwrap().elapsed().unwrap() < Duration::from_secs(60));
        assert!(mount.lines.lock().is_empty(), "{:?}", mount.lines.lock());
        mount.end();
    }
    // Without its pages in the kernel's cache.
    let mount = mount_or_skip!(vault);
    assert!(mount.read("root.raw") == model && model != base);
    assert_holes_are_zeros(&mount.open("root.raw"), &model);
    mount.end();
}

#[test]
fn faces_show_the_same_bytes_and_what_was_written_and_are_not_written_to() {
    let vault = Vault::new();
    let base = disk_bytes(2, 6 * CLUSTER);
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&base))], None);
    let mount = mount_or_skip!(vault);
    let vhd = || mount.read("root.vhd");
    let before = vhd();
    assert_eq!((before.len(), before[..base.len()] == base), (base.len() + 512, true));
    assert_eq!(&before[base.len()..base.len() + 8], b"conectix");
    // Held open, so that the kernel could keep what it has read of it.
    let mut open = File::open(mount.point.join("root.vhd")).unwrap();
    open.read_to_end(&mut Vec::new()).unwrap();
    let raw = mount.open("root.raw");
    raw.write_all_at(&[0xA5; 5000], 70_000).unwrap();
    fallocate(&raw, FallocateFlags::PUNCH_HOLE | KEPT, 0, CLUSTER_U64).unwrap();
    let wanted = [mount.read("root.raw"), before[base.len()..].to_vec()].concat();
    assert!(vhd() == wanted, "not yet flushed, and seen all the same");
    let mut now = Vec::new();
    open.rewind().unwrap();
    open.read_to_end(&mut now).unwrap();
    assert!(now == wanted && wanted[70_000..75_000] == [0xA5; 5000]);
    // Across the end of the disk, and where its footer is.
    let mut part = [0; 600];
    open.read_exact_at(&mut part, base.len() as u64 - 88).unwrap();
    assert!(part == wanted[base.len() - 88..]);
    assert_holes_are_zeros(&open, &wanted);
    let end = wanted.len() as u64;
    assert_eq!(seek(&open, SeekFrom::Data(end - 512)).unwrap(), end - 512);
    assert_eq!(seek(&open, SeekFrom::Data(end - 1)).unwrap(), end - 1);
    assert_eq!(seek(&open, SeekFrom::Hole(end - 512)).unwrap(), end);
    for name in ["root.vhd", "root.vmdk", "vm.json"] {
        let path = mount.point.join(name);
        assert_eq!(errno(OpenOptions::new().write(true).open(&path)), libc::EROFS, "{name}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o444, "{name}");
    }
    mount.end();
}

#[test]
fn nothing_but_the_bytes_of_disks_can_be_changed() {
    let vault = Vault::new();
    let base = disk_bytes(3, 3 * CLUSTER + 100);
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&base))], Some(("web01.xml", "<domain/>")));
    let mount = mount_or_skip!(vault);
    let (raw, path) = (mount.open("root.raw"), mount.point.join("root.raw"));
    let length = base.len() as u64;
    for other in [0, length - 1, length + 1] {
        assert_eq!(errno(raw.set_len(other)), libc::EPERM);
    }
    raw.set_len(length).unwrap();
    raw.set_times(fs::FileTimes::new().set_modified(SystemTime::now()).set_accessed(SystemTime::now())).unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&path)), libc::EPERM);
    assert_eq!(errno(fs::set_permissions(&path, Permissions::from_mode(0o666))), libc::EPERM);
    // As much as is on the disk, and then no more.
    assert_eq!(raw.write_at(&[1; 4096], length - 10).unwrap(), 10);
    assert_eq!(errno(raw.write_at(&[1; 10], length)), libc::EFBIG);
    assert_eq!(errno(raw.write_at(&[1; 10], 1 << 40)), libc::EFBIG);
    assert_eq!(fs::metadata(&path).unwrap().len(), length);
    let allocate = |flags, at, count| fallocate(&raw, flags, at, count).map_err(io::Error::from);
    assert_eq!(errno(allocate(FallocateFlags::empty(), 0, 4096)), libc::EOPNOTSUPP);
    assert_eq!(errno(allocate(KEPT, 0, 4096)), libc::EOPNOTSUPP);
    assert_eq!(errno(allocate(FallocateFlags::ZERO_RANGE, length - 5, 10)), libc::EPERM);
    allocate(FallocateFlags::ZERO_RANGE | KEPT, length - 5, 10).unwrap();
    allocate(FallocateFlags::PUNCH_HOLE | KEPT, length + 5, 1 << 30).unwrap();
    let wanted = [&base[..base.len() - 10], &[1; 5], &[0; 5]].concat();
    assert!(mount.read("root.raw") == wanted);

    let point = &mount.point;
    assert_eq!(errno(File::create_new(point.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(point.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(&path)), libc::EROFS);
    assert_eq!(errno(fs::rename(&path, point.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::hard_link(&path, point.join("new"))), libc::EROFS);
    assert_eq!(errno(std::os::unix::fs::symlink("x", point.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(point)), libc::EROFS);
    assert_eq!(errno(fs::set_permissions(point, Permissions::from_mode(0o777))), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).open(point.join("web01.xml"))), libc::EROFS);
    assert_eq!(errno(File::open(point).unwrap().set_len(0)), libc::EINVAL);
    assert_eq!(fs::read_to_string(point.join("web01.xml")).unwrap(), "<domain/>");
    assert!(mount.lines.lock().is_empty(), "none of it is worth a line: {:?}", mount.lines.lock());
    drop(raw);
    mount.end();
}

#[test]
fn a_write_that_was_refused_for_a_store_that_hangs_never_happens_and_all_that_needs_no_store_goes_on() {
    let vault = Vault::new();
    let mut base = disk_bytes(4, 40 * CLUSTER);
    // No hole, which is known without asking the store.
    base.iter_mut().step_by(CLUSTER).for_each(|byte| *byte = 1);
    let disk = |name| vault.store_disk(name, &Model::of(&base));
    vault.commit("web01", vec![disk("root"), disk("data")], None);
    let store = Faulty::new(vault.tenant.store().clone());
    let mount = mount_or_skip!(vault, vault.tenant_over(store.clone()), NO_LIMIT);
    let (root, data) = (mount.open("root.raw"), mount.open("data.raw"));
    for file in [&root, &data] {
        file.write_all_at(&[2; 8192], 10 * CLUSTER_U64).unwrap();
        file.read_exact_at(&mut [0; 10], 0).unwrap();
    }
    store.set(Mood::Hangs);
    let began = Instant::now();
    // Parts of blocks of the restore point. The kernel sends writes to one file one by one.
    let writer = thread::spawn({
        let root = root.try_clone().unwrap();
        move || [15, 16].map(|cluster| errno(root.write_at(&[0xEE; 100], cluster * CLUSTER_U64 + 50)))
    });
    thread::sleep(DEADLINE / 10);
    // Meanwhile: whole blocks, parts of those that were written, and all of that durable; reads of the same disk, too.
    data.write_all_at(&[3; 4096], 11 * CLUSTER_U64).unwrap();
    data.write_all_at(&[4; 100], 10 * CLUSTER_U64 + 50).unwrap();
    data.sync_data().unwrap();
    let mut found = vec![0; 8192];
    root.read_exact_at(&mut found, 10 * CLUSTER_U64).unwrap();
    assert!(found.iter().all(|&byte| byte == 2));
    data.read_exact_at(&mut found, 10 * CLUSTER_U64).unwrap();
    assert!(found[..50] == [2; 50] && found[50..150] == [4; 100] && found[150..] == [2; 8042]);
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    assert_eq!(writer.join().unwrap(), [libc::EIO; 2]);
    assert!(began.elapsed() < 6 * DEADLINE, "{:?}", began.elapsed());
    store.set(Mood::Answers);
    // What hung has its answer now; had it gone on to write, that would be seen.
    thread::sleep(DEADLINE);
    let mut written = base.clone();
    written[10 * CLUSTER..10 * CLUSTER + 8192].fill(2);
    let (of_root, mut of_data) = (written.clone(), written);
    of_data[10 * CLUSTER..10 * CLUSTER + 8192].copy_from_slice(&found);
    of_data[11 * CLUSTER..11 * CLUSTER + 4096].fill(3);
    drop((root, data));
    let check = |mount: Mount| {
        assert!(mount.read("root.raw") == of_root && mount.read("data.raw") == of_data);
        mount
    };
    let mount = check(mount);
    assert!(mount.lines.lock().iter().any(|line| line.contains("did not answer within 1 s")));
    mount.end();
    check(mount_or_skip!(vault)).end();
}

#[test]
fn a_full_overlay_is_no_space_at_the_very_write_and_room_that_is_given_back_can_be_used() {
    let vault = Vault::new();
    let base = vec![7; 160 * CLUSTER];
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&base))], None);
    let mount = mount_or_skip!(vault, vault.tenant.clone(), 6 << 20);
    let file = mount.open("root.raw");
    let full = (0..160).find_map(|nth| file.write_all_at(&[9; CLUSTER], nth * CLUSTER_U64).err().map(|e| (nth, e)));
    let (first, error) = full.unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(first > 40, "{first}");
    file.sync_data().unwrap();
    let mut found = vec![0; 160 * CLUSTER];
    file.read_exact_at(&mut found, 0).unwrap();
    let first = size(first) * CLUSTER;
    assert!(found[..first].iter().all(|&byte| byte == 9) && found[first + CLUSTER..] == base[first + CLUSTER..]);
    fallocate(&file, FallocateFlags::PUNCH_HOLE | KEPT, 0, 1 << 20).unwrap();
    file.sync_data().unwrap();
    file.write_all_at(&[8; CLUSTER], 100 * CLUSTER_U64).unwrap();
    file.sync_data().unwrap();
    let lines = mount.lines.lock().clone();
    assert!(lines.iter().any(|line| line.contains("root.raw") && line.contains("--overlay-limit")), "{lines:?}");
    drop(file);
    mount.end();
}

#[test]
fn bytes_of_the_overlay_that_were_changed_are_an_error_and_a_line() {
    let vault = Vault::new();
    let base = disk_bytes(5, 4 * CLUSTER);
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&base))], None);
    let mount = mount_or_skip!(vault);
    mount.open("root.raw").write_all_at(&[0x5C; CLUSTER], CLUSTER_U64).unwrap();
    mount.end();
    let is_blocks = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "overlay");
    let mut files = fs::read_dir(overlay(&vault)).unwrap().map(|entry| entry.unwrap().path());
    let file = OpenOptions::new().read(true).write(true).open(files.find(is_blocks).unwrap()).unwrap();
    // Blocks are after the journal; one bit of each page that could be one.
    let mut bytes = vec![0; size(file.metadata().unwrap().len())];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let written = bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0));
    let last: Vec<usize> = written.map(|(nth, _)| nth).collect::<Vec<_>>().into_iter().rev().take(16).collect();
    last.iter().for_each(|nth| file.write_all_at(&[bytes[nth * 4096 + 9] ^ 1], *nth as u64 * 4096 + 9).unwrap());
    let mount = mount_or_skip!(vault);
    let file = mount.open("root.raw");
    assert_eq!(errno(file.read_exact_at(&mut [0; 4096], CLUSTER_U64)), libc::EIO);
    assert_eq!(errno(file.write_all_at(&[1; 10], CLUSTER_U64 + 5)), libc::EIO, "nor is it made part of what is whole");
    file.write_all_at(&[1; 4096], CLUSTER_U64).unwrap();
    file.read_exact_at(&mut [0; 4096], CLUSTER_U64).unwrap();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    let lines = mount.lines.lock().clone();
    assert!(lines.iter().any(|line| line.contains("web01@1 root.raw") && line.contains("block 16")), "{lines:?}");
    drop(file);
    mount.end();
}

#[test]
fn nothing_of_a_mount_with_an_overlay_is_left_in_the_clear() {
    let vault = Vault::new();
    vault.commit("web01", vec![vault.store_disk("root", &Model::of(&disk_bytes(6, 4 * CLUSTER)))], None);
    let mount = mount_or_skip!(vault);
    let marker = b"a marker that is looked for, 7e1f";
    mount.open("root.raw").write_all_at(&marker.repeat(3000), 1000).unwrap();
    mount.end();
    let is_clear = |path: &Path| fs::read(path).unwrap().windows(16).any(|part| part == &marker[..16]);
    let files: Vec<PathBuf> = fs::read_dir(overlay(&vault)).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 3 && !files.iter().any(|path| is_clear(path)));
}
