//! Which disks a VM has, and what they are called.

use std::collections::BTreeMap;

use reseal_format::geometry::MAX_DISK;
use reseal_format::manifest::{MAX_DISKS, Manifest, method};
use reseal_format::names::{DiskName, MAX_NAME};
use reseal_qmp::{Client, MonitorError};
use serde_json::{Value, json};

use super::QemuError;

/// Longest text that tells a disk from others, as it is.
const MAX_SCOPE: usize = 512;
/// Name of a disk that is the only one.
const ONLY_DISK: &str = "disk-0";

/// A disk that the guest may write to.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) name: DiskName,
    /// What somebody called it in QEMU.
    pub(super) id: String,
    /// Which disk of which VM it is, whatever image it has.
    pub(super) scope: String,
    /// The node on which the guest's device stands.
    pub(super) node: String,
    pub(super) length: u64,
    /// Whether its image keeps bitmaps while the VM is off.
    pub(super) persistent: bool,
    pub(super) bitmaps: Vec<Value>,
    /// For people.
    pub(super) file: String,
}

/// A device of the guest with a medium, as QEMU lists it.
#[derive(Debug, Clone)]
pub(super) struct Attached {
    /// The device's id, or the drive's, or the node's: the first that somebody chose.
    pub(super) id: String,
    /// Path of the device.
    pub(super) path: String,
    /// Type of the device, such as `scsi-hd`.
    pub(super) kind: String,
    pub(super) removable: bool,
    pub(super) inserted: Value,
}

impl Attached {
    /// The firmware, or its variables.
    pub(super) fn is_flash(&self) -> bool {
        self.kind.starts_with("cfi.pflash") || self.path.starts_with("/machine/system.flash")
    }

    /// A CD or floppy drive.
    pub(super) fn is_drive(&self) -> bool {
        self.removable || self.kind.ends_with("-cd") || self.kind == "floppy"
    }

    pub(super) fn read_only(&self) -> bool {
        self.inserted["ro"] == true
    }

    pub(super) fn length(&self) -> Option<u64> {
        self.inserted["image"]["virtual-size"].as_u64()
    }
}

/// The first version whose NBD server may serve a disk that has a thread of its own. Those before abort the whole VM
/// when a client of such an export disconnects: they count clients from that thread, and insist on the main one.
const THREADS_SAFE: u64 = 9;

/// An error if reading one of these disks could end the VM.
pub(super) fn refuse_threads(client: &mut Client, all: &[Attached]) -> Result<(), QemuError> {
    if client.version().major >= THREADS_SAFE {
        return Ok(());
    }
    for disk in all.iter().filter(|disk| !disk.is_flash()) {
        // The thread is the device's, or of the controller whose bus the device is on.
        let device = outer(&disk.path).to_owned();
        let bus = client.call("qom-get", json!({ "path": device, "property": "parent_bus" }));
        let bus = bus.ok().as_ref().and_then(Value::as_str).map(str::to_owned);
        let controller = bus.as_deref().and_then(|bus| bus.rsplit_once('/')).map(|(owner, _)| outer(owner).to_owned());
        for owner in std::iter::once(device).chain(controller) {
            let thread = client.call("qom-get", json!({ "path": owner, "property": "iothread" }));
            if thread.is_ok_and(|thread| thread.as_str().is_some_and(|thread| !thread.is_empty())) {
                return Err(QemuError::Unusable(format!(
                    "disk {} runs in a thread of its own (iothread=), and QEMU {} could abort the VM when it is read over \
                     NBD; take QEMU {THREADS_SAFE}.0 or newer, or start the VM without iothread= for its disks",
                    disk.id,
                    client.version()
                )));
            }
        }
    }
    Ok(())
}

/// The device that was asked for, of which QEMU made an inner one.
pub(super) fn outer(path: &str) -> &str {
    path.strip_suffix("/virtio-backend").unwrap_or(path)
}

/// All devices with a medium.
pub(super) fn attached(client: &mut Client) -> Result<Vec<Attached>, QemuError> {
    let mut found = Vec::new();
    for entry in client.list("query-block", Value::Null)? {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (device, inserted) = (text(&entry["device"]), entry["inserted"].clone());
        let qdev = text(&entry["qdev"]);
        // A drive that no device uses is not the guest's.
        if !inserted.is_object() || qdev.is_empty() {
            continue;
        }
        let path = if qdev.starts_with('/') { qdev.clone() } else { format!("/machine/peripheral/{qdev}") };
        let kind = client.call("qom-get", json!({ "path": path, "property": "type" }));
        let kind = kind.ok().as_ref().and_then(Value::as_str).unwrap_or_default().to_owned();
        let id = stable_id(&qdev, &device, inserted["node-name"].as_str().unwrap_or_default());
        found.push(Attached { id, path, kind, removable: entry["removable"] == true, inserted });
    }
    Ok(found)
}

/// What somebody chose to call it. Names that QEMU makes up (`#block123`, `device[1]`) come last.
fn stable_id(qdev: &str, device: &str, node: &str) -> String {
    let chosen = qdev.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    let id = chosen.unwrap_or(if qdev.starts_with('/') { "" } else { qdev });
    let first = [id, device, node].into_iter().find(|id| !id.is_empty() && !id.starts_with('#'));
    first.unwrap_or(qdev).to_owned()
}

/// The disks to back up, and what is left out that somebody might miss.
pub(super) fn writable(
    all: &[Attached],
    vm: &str,
    since: Option<&Manifest>,
    chosen: &BTreeMap<String, DiskName>,
) -> Result<(Vec<Disk>, Vec<String>), QemuError> {
    let mut warnings = Vec::new();
    let mut taken: Vec<&Attached> = Vec::new();
    for disk in all {
        let left_out = match disk {
            _ if disk.is_flash() && disk.read_only() => None,
            _ if disk.is_flash() => Some("holds the firmware's variables"),
            _ if disk.is_drive() && disk.read_only() => None,
            _ if disk.is_drive() => Some("is a removable medium"),
            _ if disk.read_only() => Some("is read-only"),
            _ => {
                taken.push(disk);
                None
            }
        };
        warnings
            .extend(left_out.map(|why| format!("{} of the VM is not part of the restore point: it {why}", disk.id)));
    }
    if taken.is_empty() || taken.len() > MAX_DISKS {
        let count = taken.len();
        return Err(QemuError::Unusable(format!(
            "the VM has {count} writable disks; between 1 and {MAX_DISKS} can be backed up"
        )));
    }
    let scopes: Vec<_> = taken.iter().map(|disk| scope(vm, &disk.id)).collect();
    let names = names(&taken, &scopes, since, chosen)?;
    let mut disks = Vec::new();
    for ((disk, scope), name) in taken.into_iter().zip(scopes).zip(names) {
        disks.push(describe(disk, scope, name)?);
    }
    Ok((disks, warnings))
}

/// Tells the disk from all others. Names of any length must fit a manifest.
fn scope(vm: &str, id: &str) -> String {
    let text = format!("{vm}/{id}");
    if text.len() <= MAX_SCOPE { text } else { blake3::hash(text.as_bytes()).to_string() }
}

fn describe(disk: &Attached, scope: String, name: DiskName) -> Result<Disk, QemuError> {
    let inserted = &disk.inserted;
    let lacks = |what| MonitorError::Answer { command: "query-block".into(), what };
    let length = disk.length().ok_or_else(|| lacks("the size of a disk"))?;
    if length == 0 || length > MAX_DISK {
        let id = &disk.id;
        return Err(QemuError::Unusable(format!("disk {id} has {length} bytes, which no disk of a vault can have")));
    }
    let data = &inserted["image"]["format-specific"]["data"];
    Ok(Disk {
        name,
        id: disk.id.clone(),
        scope,
        node: inserted["node-name"].as_str().ok_or_else(|| lacks("the node of a disk"))?.to_owned(),
        length,
        // Version 2 of the format ("0.10") can't.
        persistent: inserted["drv"] == "qcow2" && data["compat"] == "1.1",
        bitmaps: inserted["dirty-bitmaps"].as_array().cloned().unwrap_or_default(),
        file: inserted["image"]["filename"].as_str().unwrap_or_default().to_owned(),
    })
}

/// A name for each disk: the one that the user chose, the one that it had, or one made from its id.
fn names(
    disks: &[&Attached],
    scopes: &[String],
    since: Option<&Manifest>,
    chosen: &BTreeMap<String, DiskName>,
) -> Result<Vec<DiskName>, QemuError> {
    let before = |scope: &String| {
        let same = |tracking: &reseal_format::manifest::Tracking| {
            tracking.method == method::QEMU_BITMAP && tracking.scope == *scope
        };
        since?.disks.iter().find(|disk| disk.tracking.as_ref().is_some_and(same)).map(|disk| disk.name.clone())
    };
    let mut names: Vec<Option<DiskName>> = Vec::new();
    for (disk, scope) in disks.iter().zip(scopes) {
        let name = chosen.get(&disk.id).cloned().or_else(|| before(scope));
        let name = name.filter(|name| !names.iter().flatten().any(|other| other == name));
        names.push(name);
    }
    for at in 0..disks.len() {
        if names[at].is_none() {
            let wish = if disks.len() == 1 { ONLY_DISK } else { disks[at].id.as_str() };
            names[at] = Some(free_name(wish, &names)?);
        }
    }
    Ok(names.into_iter().flatten().collect())
}

/// The wish made legal, with a number if it is taken.
fn free_name(wish: &str, taken: &[Option<DiskName>]) -> Result<DiskName, QemuError> {
    let legal = |c: char| if c == '/' || c == '=' || c.is_control() { '-' } else { c };
    let mut stem: String = wish.trim_start_matches('/').chars().map(legal).collect();
    // Room for a number.
    while stem.len() > MAX_NAME - 4 {
        stem.pop();
    }
    if matches!(stem.as_str(), "" | "." | "..") {
        stem = "disk".into();
    }
    for number in 1..=MAX_DISKS {
        let name = if number == 1 { stem.clone() } else { format!("{stem}-{number}") };
        let name = DiskName::new(&name).map_err(|e| QemuError::Unusable(e.to_string()))?;
        if !taken.iter().flatten().any(|other| *other == name) {
            return Ok(name);
        }
    }
    Err(QemuError::Unusable(format!("too many disks are called {wish}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str) -> Attached {
        let inserted = json!({
            "node-name": "n", "drv": "qcow2", "ro": false,
            "image": { "virtual-size": 1 << 20, "filename": "x", "format-specific": { "data": { "compat": "1.1" } } },
        });
        Attached { id: id.into(), path: String::new(), kind: "scsi-hd".into(), removable: false, inserted }
    }

    fn named(disks: &[Attached]) -> Vec<String> {
        let (disks, _) = writable(disks, "vm", None, &BTreeMap::new()).unwrap();
        disks.iter().map(|disk| disk.name.as_str().to_owned()).collect()
    }

    #[test]
    fn ids_are_what_somebody_chose() {
        assert_eq!(stable_id("/machine/peripheral/vd0/virtio-backend", "drive0", "node0"), "vd0");
        assert_eq!(stable_id("sd0", "", "node0"), "sd0");
        assert_eq!(stable_id("/machine/peripheral-anon/device[1]/virtio-backend", "virtio0", "#block1"), "virtio0");
        assert_eq!(stable_id("/machine/unattached/device[1]", "", "node0"), "node0");
        assert_eq!(stable_id("/machine/unattached/device[1]", "", "#block1"), "/machine/unattached/device[1]");
    }

    #[test]
    fn names_are_legal_and_differ() {
        assert_eq!(named(&[disk("vd0")]), ["disk-0"]);
        assert_eq!(named(&[disk("a/b=c"), disk("a-b-c"), disk("..")]), ["a-b-c", "a-b-c-2", "disk"]);
        let long = "ä".repeat(100);
        let names = named(&[disk(&long), disk(&long)]);
        assert!(names[0] != names[1] && names.iter().all(|name| name.len() <= MAX_NAME));
    }

    #[test]
    fn only_writable_disks_are_taken() {
        let mut cd = disk("cd0");
        (cd.removable, cd.inserted["ro"]) = (true, true.into());
        let mut still = disk("still");
        still.inserted["ro"] = true.into();
        let mut flash = disk("pflash1");
        flash.kind = "cfi.pflash01".into();
        let all = [cd.clone(), still, flash, disk("vd0")];
        let (disks, warnings) = writable(&all, "vm", None, &BTreeMap::new()).unwrap();
        assert_eq!(disks.len(), 1);
        assert!(disks[0].persistent);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(writable(&[cd], "vm", None, &BTreeMap::new()).is_err());
    }
}
