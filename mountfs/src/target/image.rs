//! Images as QEMU makes them and is told of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_qemu::{secret, tool};
use serde_json::{Value, json};

use super::{Format, TargetError, TargetSpec};

const QEMU_IMG: &str = "qemu-img";
/// How long it may take: a LUKS key slot is made to take seconds, on a machine that may be slower than this one.
const LIMIT: Duration = Duration::from_secs(300);
/// Bytes of a sector: QEMU's disks are whole ones.
const SECTOR: u64 = 512;
/// What QEMU puts before the content of a LUKS volume: the header, and room for eight slots with keys of 512 bits.
pub(super) const LUKS_HEADER: u64 = 4040 * SECTOR;
/// Where `qemu-img` finds the secret, and what it is called there.
pub(crate) const SECRET_FD: i32 = 4;
pub(crate) const SECRET_ID: &str = "target";

/// The length that a disk has in QEMU.
pub(super) fn sectors(length: u64) -> u64 {
    length.next_multiple_of(SECTOR)
}

/// The program that makes images.
pub(crate) fn find_program(target: &Path) -> Result<PathBuf, TargetError> {
    tool::find(QEMU_IMG).map_err(|source| TargetError::Missing { path: target.to_owned(), source })
}

/// A path as QEMU is told it. What stands before a colon it takes for a protocol, but not where a slash came first.
pub(super) fn name(path: &Path) -> Result<String, TargetError> {
    let failed = |source| TargetError::Io { path: path.to_owned(), action: "find", source };
    let absolute = std::path::absolute(path).map_err(failed)?;
    absolute.into_os_string().into_string().map_err(|_| TargetError::Name { path: path.to_owned() })
}

/// How often `qemu-img` is run where it could not measure how fast the machine is, as it does for LUKS: it looks at processor times, which on
/// a busy virtual machine may stand still for as long as it looks.
const TRIES: u32 = 5;
const NOT_MEASURED: &str = "Unable to get accurate CPU usage";

/// Has `qemu-img` make it, in the file or on the device that is there.
pub(super) fn create(spec: &TargetSpec, name: &str, length: u64, go_on: &dyn Fn() -> bool) -> Result<(), TargetError> {
    for _ in 1..TRIES {
        match create_once(spec, name, length, go_on) {
            Err(TargetError::NotMade { said, .. }) if said.contains(NOT_MEASURED) => {}
            other => return other,
        }
    }
    create_once(spec, name, length, go_on)
}

fn create_once(spec: &TargetSpec, name: &str, length: u64, go_on: &dyn Fn() -> bool) -> Result<(), TargetError> {
    let path = || spec.path.clone();
    let failed = |source| TargetError::Io { path: path(), action: "make", source };
    let (format, options) = match (spec.format, spec.is_clear()) {
        (Format::Raw, true) => ("raw", String::new()),
        (Format::Raw, false) => ("luks", format!("key-secret={SECRET_ID}")),
        (Format::Qcow2, true) => ("qcow2", "compat=1.1".into()),
        (Format::Qcow2, false) => ("qcow2", format!("compat=1.1,encrypt.format=luks,encrypt.key-secret={SECRET_ID}")),
        (Format::Vmdk, _) => ("vmdk", "subformat=streamOptimized,adapter_type=lsilogic".into()),
    };
    let mut command = Command::new(find_program(&spec.path)?);
    command.args(["create", "-q", "-f", format]);
    if !options.is_empty() {
        command.args(["-o", &options]);
    }
    let mut inherited = Vec::new();
    if let Some(secret) = &spec.secret {
        command.args(secret::arguments(SECRET_ID, SECRET_FD));
        inherited.push((secret.pipe().map_err(failed)?.into(), SECRET_FD));
    }
    command.arg(name).arg(sectors(length).to_string());
    tool::bind(&mut command, inherited).map_err(failed)?;
    let began = Instant::now();
    let ended = tool::run_while(command, &|| began.elapsed() < LIMIT && go_on());
    let said = match ended.map_err(failed)? {
        Some(ended) if ended.status.success() => return Ok(()),
        Some(ended) => tool::shorten(&ended.stderr, name, name),
        None => format!("it was ended after {} s", began.elapsed().as_secs()),
    };
    Err(TargetError::NotMade { path: path(), said })
}

/// What `blockdev-add` is told. On a device, which may be longer than the disk, the guest sees no more than `shown` bytes.
pub(super) fn blockdev(spec: &TargetSpec, name: &str, shown: Option<u64>, node: &str, secret: &str) -> Value {
    let driver = if shown.is_some() { "host_device" } else { "file" };
    let file = json!({ "driver": driver, "filename": name, "discard": "unmap" });
    let mut image = match (spec.format, spec.is_clear()) {
        (Format::Raw, true) => json!({ "driver": "raw", "file": file }),
        (Format::Raw, false) => json!({ "driver": "luks", "key-secret": secret, "file": file }),
        (Format::Qcow2, true) => json!({ "driver": "qcow2", "file": file }),
        (Format::Qcow2, false) => {
            json!({ "driver": "qcow2", "encrypt": { "format": "luks", "key-secret": secret }, "file": file })
        }
        (Format::Vmdk, _) => json!({ "driver": "vmdk", "file": file }),
    };
    if let Some(length) = shown {
        if !spec.is_clear() {
            image = json!({ "driver": "raw", "file": image });
        }
        image["size"] = json!(sectors(length));
    }
    image["discard"] = json!("unmap");
    image["node-name"] = json!(node);
    image
}

/// The same for `--target-image-opts`, without a length: what is written there is as long as the disk.
pub(super) fn options(spec: &TargetSpec, name: &str, is_device: bool, secret: &str) -> String {
    let driver = if is_device { "host_device" } else { "file" };
    let image = match (spec.format, spec.is_clear()) {
        (Format::Raw, true) => "driver=raw".to_owned(),
        (Format::Raw, false) => format!("driver=luks,key-secret={secret}"),
        (Format::Qcow2, true) => "driver=qcow2".to_owned(),
        (Format::Qcow2, false) => format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret={secret}"),
        (Format::Vmdk, _) => "driver=vmdk".to_owned(),
    };
    // A comma ends an option, two of them are one.
    let name = name.replace(',', ",,");
    format!("{image},discard=unmap,file.driver={driver},file.filename={name}")
}
