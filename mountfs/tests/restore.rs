//! Restores against models: files that stay sparse, and block devices where there are any.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reseal_format::geometry::CLUSTER;
use reseal_format::manifest::Manifest;
use reseal_format::names::{DiskName, VmName};
use reseal_mountfs::disks::Disks;
use reseal_mountfs::restore::{How, Plan, RestoreError, Watch, restore};
use reseal_mountfs::target::{Format, TargetError, read_secret};
use reseal_store::Local;
use support::faults::{Faulty, Mood};
use support::{Model, Vault, disk_bytes, flip, used};

fn manifest(vault: &Vault, number: u32) -> Manifest {
    vault.tenant.point(&VmName::new("web01").unwrap(), number).unwrap().manifest
}

fn reader(vault: &Vault) -> Disks {
    Disks::here(vault.tenant_over(Arc::new(Local::new(vault.repo()))), 16 << 20)
}

fn run(vault: &Vault, out: &Path, force: bool) -> Result<u64, RestoreError> {
    run_with(&reader(vault), &manifest(vault, 1), None, out, force)
}

fn run_with(
    reader: &Disks,
    manifest: &Manifest,
    only: Option<&str>,
    out: &Path,
    force: bool,
) -> Result<u64, RestoreError> {
    let only = only.map(|name| DiskName::new(name).unwrap());
    let plan = Plan::new(manifest, only.as_ref(), out, &How { format: Format::Raw, secret: None, force })?;
    let done = AtomicU64::new(0);
    let progress = |bytes| {
        let _ = done.fetch_add(bytes, Ordering::Relaxed);
    };
    restore(reader, plan, &Watch { progress: &progress, stop: &AtomicBool::new(false) })?;
    Ok(done.load(Ordering::Relaxed))
}

#[test]
fn a_file_equals_the_disk_stays_sparse_and_is_private() {
    let vault = Vault::new();
    let bytes = disk_bytes(1, 300 * CLUSTER + 777);
    vault.backup("web01", &bytes);
    let out = vault.folder.path().join("out.raw");
    assert_eq!(run(&vault, &out, false).unwrap(), used(&bytes));
    assert!(fs::read(&out).unwrap() == bytes);
    let data = fs::metadata(&out).unwrap();
    assert_eq!(data.permissions().mode() & 0o777, 0o600);
    assert!(data.blocks() * 512 <= used(&bytes) + 65_536, "{} of {}", data.blocks() * 512, used(&bytes));
    assert!(matches!(run(&vault, &out, false), Err(RestoreError::Target(TargetError::Exists { .. }))));
    fs::write(&out, vec![0xff; 400 * CLUSTER]).unwrap();
    run(&vault, &out, true).unwrap();
    assert!(fs::read(&out).unwrap() == bytes, "nothing is left of what was there");
}

#[test]
fn several_disks_go_into_a_folder_and_one_goes_where_it_is_told() {
    let vault = Vault::new();
    let disks = ["root", "data"].map(|name| vault.store_disk(name, &Model::of(name.as_bytes())));
    vault.commit("web01", disks.to_vec(), None);
    let manifest = manifest(&vault, 1);
    let path = |name: &str| vault.folder.path().join(name);
    let reader = reader(&vault);
    run_with(&reader, &manifest, None, &path("new/folder"), false).unwrap();
    assert_eq!(fs::read(path("new/folder/root.raw")).unwrap(), b"root");
    assert_eq!(fs::read(path("new/folder/data.raw")).unwrap(), b"data");
    run_with(&reader, &manifest, Some("data"), &path("one.raw"), false).unwrap();
    assert_eq!(fs::read(path("one.raw")).unwrap(), b"data");
    let into_file = run_with(&reader, &manifest, None, &path("one.raw"), true);
    assert!(matches!(into_file, Err(RestoreError::NotAFolder { count: 2, .. })));
    let missing = run_with(&reader, &manifest, Some("swap"), &path("x"), false);
    assert!(missing.unwrap_err().to_string().contains("it has root, data"));
    // One of two is there: nothing of either is written.
    fs::remove_file(path("new/folder/root.raw")).unwrap();
    let again = run_with(&reader, &manifest, None, &path("new/folder"), false);
    assert!(matches!(again, Err(RestoreError::Target(TargetError::Exists { .. }))));
    assert!(!path("new/folder/root.raw").exists());
    assert!(matches!(
        run_with(&reader, &manifest, Some("root"), Path::new("/dev/null"), true),
        Err(RestoreError::Target(TargetError::NotAFile { .. }))
    ));
}

#[test]
fn a_restore_that_fails_removes_what_it_made_and_only_that() {
    let vault = Vault::new();
    let bytes = disk_bytes(2, 100 * CLUSTER);
    vault.backup("web01", &bytes);
    let out = vault.folder.path().join("out.raw");
    let pack = vault.packs()[0].clone();
    let middle = usize::try_from(fs::metadata(&pack).unwrap().len() / 2).unwrap();
    flip(&pack, middle);
    let error = run(&vault, &out, false).unwrap_err();
    assert!(error.to_string().contains("failed authentication"), "{error}");
    assert!(!out.exists());
    fs::write(&out, b"old").unwrap();
    assert!(run(&vault, &out, true).is_err());
    assert!(out.exists(), "what was there before stays, though not its content");
    flip(&pack, middle);
    run(&vault, &out, true).unwrap();

    let faulty = Faulty::new(vault.tenant.store().clone());
    let broken = Disks::here(vault.tenant_over(faulty.clone()), 16 << 20);
    faulty.set(Mood::Fails);
    let new = vault.folder.path().join("new.raw");
    assert!(run_with(&broken, &manifest(&vault, 1), None, &new, false).is_err());
    assert!(!new.exists());

    let plan_manifest = manifest(&vault, 1);
    let how = How { format: Format::Raw, secret: None, force: false };
    let plan = Plan::new(&plan_manifest, None, &new, &how).unwrap();
    let stopped = restore(&reader(&vault), plan, &Watch { progress: &|_| (), stop: &AtomicBool::new(true) });
    assert!(matches!(stopped, Err(RestoreError::Interrupted)));
    assert!(!new.exists());
}

#[test]
fn an_image_that_is_interrupted_while_it_is_written_is_removed() {
    let vault = Vault::new();
    vault.backup("web01", &disk_bytes(4, 600 * CLUSTER));
    let (manifest, disks, stop) = (manifest(&vault, 1), reader(&vault), AtomicBool::new(false));
    for format in [Format::Qcow2, Format::Vmdk] {
        let out = vault.folder.path().join(format!("out.{format}"));
        let how = How { format, secret: None, force: false };
        stop.store(false, Ordering::Relaxed);
        let progress = |bytes| {
            assert!(out.exists());
            stop.fetch_or(bytes > 0, Ordering::Relaxed);
        };
        let plan = Plan::new(&manifest, None, &out, &how).unwrap();
        match restore(&disks, plan, &Watch { progress: &progress, stop: &stop }) {
            Err(RestoreError::Interrupted) => assert!(!out.exists(), "{format}"),
            other => panic!("{format}: {other:?}"),
        }
    }
}

/// A loop device over a file, if this machine has them.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Option<Loop> {
        let output = Command::new("losetup").arg("--find").arg("--show").arg(file).output().ok()?;
        let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        fs::metadata(&path).ok().filter(|data| data.file_type().is_block_device()).map(|_| Loop(path))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_gets_the_disk_with_its_zeros_and_only_by_force() {
    let vault = Vault::new();
    let bytes = disk_bytes(3, 64 * CLUSTER + 512);
    vault.backup("web01", &bytes);
    let backing = vault.folder.path().join("backing");
    fs::write(&backing, vec![0xff; 80 * CLUSTER]).unwrap();
    let Some(device) = Loop::new(&backing) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    assert!(matches!(run(&vault, &device.0, false), Err(RestoreError::Target(TargetError::DeviceNeedsForce { .. }))));
    run(&vault, &device.0, true).unwrap();
    let got = fs::read(&device.0).unwrap();
    assert!(got[..bytes.len()] == bytes);
    assert!(got[bytes.len()..].iter().all(|&byte| byte == 0xff), "what is behind the disk is left alone");
    // Somebody has it: so says the kernel to whoever wants it for himself.
    let claim = fs::OpenOptions::new().read(true).write(true).custom_flags_excl().open(&device.0).unwrap();
    assert!(matches!(run(&vault, &device.0, true), Err(RestoreError::Target(TargetError::DeviceBusy { .. }))));
    drop(claim);
    drop(device);
    fs::write(&backing, vec![0; 8 * CLUSTER]).unwrap();
    let small = Loop::new(&backing).unwrap();
    assert!(matches!(run(&vault, &small.0, true), Err(RestoreError::Target(TargetError::TooSmall { .. }))));
}

#[test]
fn a_luks_volume_on_a_device_has_the_disk_and_no_image_goes_there() {
    let vault = Vault::new();
    let bytes = disk_bytes(3, 64 * CLUSTER + 512);
    vault.backup("web01", &bytes);
    let at = |name: &str| vault.folder.path().join(name);
    fs::write(at("secret"), "correct horse\n").unwrap();
    fs::write(at("bare-secret"), "correct horse").unwrap();
    fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    // A header, the disk, and a rest.
    fs::write(at("backing"), vec![0xff; bytes.len() + 4040 * 512 + 4096]).unwrap();
    let Some(device) = Loop::new(&at("backing")) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    let (manifest, disks) = (manifest(&vault, 1), reader(&vault));
    let secret = Some(read_secret(&at("secret")).unwrap());
    let plan = |format, secret| Plan::new(&manifest, None, &device.0, &How { format, secret, force: true });
    let image = plan(Format::Qcow2, None).err().unwrap();
    assert!(matches!(image, RestoreError::Target(TargetError::ImageOnDevice { .. })), "{image}");
    let watch = Watch { progress: &|_| (), stop: &AtomicBool::new(false) };
    restore(&disks, plan(Format::Raw, secret.clone()).unwrap(), &watch).unwrap();
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    fs::write(at("disk"), &bytes).unwrap();
    let read = Command::new("qemu-img")
        .args(["convert", "--image-opts", "-O", "raw", "--object"])
        .arg(format!("secret,id=s,file={}", name(&at("bare-secret"))))
        .arg(format!("driver=luks,key-secret=s,file.driver=host_device,file.filename={}", name(&device.0)))
        .arg(at("read"))
        .status()
        .unwrap();
    assert!(read.success());
    let read = fs::read(at("read")).unwrap();
    assert_eq!(read.len(), bytes.len() + 4096, "the device was longer");
    assert!(read[..bytes.len()] == bytes);
    let rest = fs::read(&device.0).unwrap();
    assert!(rest[rest.len() - 4096..].iter().all(|byte| *byte == 0xff), "what is behind the disk is left alone");
    drop(device);
    fs::write(at("backing"), vec![0; bytes.len() + 4040 * 512 - 512]).unwrap();
    let small = Loop::new(&at("backing")).unwrap();
    let how = How { format: Format::Raw, secret, force: true };
    let refused = Plan::new(&manifest, None, &small.0, &how).err().unwrap();
    assert!(matches!(refused, RestoreError::Target(TargetError::TooSmall { .. })), "{refused}");
}

trait Exclusive {
    fn custom_flags_excl(&mut self) -> &mut Self;
}

impl Exclusive for fs::OpenOptions {
    fn custom_flags_excl(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, libc::O_EXCL)
    }
}
