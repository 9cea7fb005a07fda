//! What kind of machine the VM is, for whoever starts it again.

use reseal_qmp::Client;
use serde::Serialize;
use serde_json::{Value, json};

use super::disks::{Attached, outer};

/// Version of [`Machine`].
const VERSION: u32 = 1;
/// Devices of a VM that are looked at.
const MAX_DEVICES: usize = 4096;

/// The machine as `machine.json` records it. What QEMU does not tell is null or empty.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Machine {
    /// Version of this record; fields may be added without a new one.
    version: u32,
    /// QEMU's version and the distributor's name for it.
    qemu: String,
    name: Option<String>,
    uuid: Option<String>,
    /// Machine type, such as `pc-q35-7.2`.
    machine: Option<String>,
    /// Architecture, such as `x86_64`.
    target: Option<String>,
    /// Whether it is accelerated by KVM.
    kvm: Option<bool>,
    memory: Memory,
    cpus: Cpus,
    firmware: Firmware,
    /// Order of kinds of devices to boot from, as in `-boot order=cad`, where no device has a boot index.
    boot_order: Option<String>,
    /// Disks and drives with a medium, also those that are not backed up.
    disks: Vec<MachineDisk>,
    nics: Vec<Nic>,
    /// Models of graphics adapters, such as `virtio-vga`.
    displays: Vec<String>,
    /// Models of serial ports and other consoles, such as `isa-serial`.
    consoles: Vec<String>,
}

/// In bytes.
#[derive(Debug, Serialize)]
struct Memory {
    base: Option<u64>,
    /// Added while it ran.
    plugged: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Cpus {
    count: usize,
    /// Such as `host` or `qemu64`.
    model: Option<String>,
    /// As in `-smp`: sockets, cores, threads and the like.
    topology: Value,
}

#[derive(Debug, Serialize)]
struct Firmware {
    /// `uefi` if it lies in flash, otherwise `bios`.
    kind: &'static str,
    /// The image that a BIOS comes from.
    image: Option<String>,
    /// Flash: the firmware and its variables.
    flash: Vec<Flash>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Flash {
    file: Option<String>,
    read_only: bool,
    length: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MachineDisk {
    /// What somebody called it.
    id: String,
    /// Its name in the restore point, if it is backed up.
    name: Option<String>,
    /// `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`, or the type of device where it is another.
    interface: String,
    /// Type of device, such as `scsi-hd`.
    device: String,
    /// The bus it is on, as QEMU names its path.
    bus: Option<String>,
    /// Lowest first; none if it is not chosen to boot from.
    boot_index: Option<i64>,
    length: Option<u64>,
    /// Format of its image.
    format: Option<String>,
    read_only: bool,
}

#[derive(Debug, Serialize)]
struct Nic {
    model: String,
    mac: Option<String>,
}

/// Beginnings of the types of network adapters.
const NICS: [&str; 13] = [
    "virtio-net",
    "e1000",
    "igb",
    "rtl8139",
    "vmxnet3",
    "ne2k",
    "pcnet",
    "i8255",
    "i82562",
    "i82801",
    "usb-net",
    "tulip",
    "vfio-pci",
];
/// Of graphics adapters.
const DISPLAYS: [&str; 9] =
    ["VGA", "virtio-vga", "virtio-gpu", "qxl", "cirrus-vga", "bochs", "vmware-svga", "secondary-vga", "ati-vga"];
/// Of consoles.
const CONSOLES: [&str; 6] = ["isa-serial", "pci-serial", "virtconsole", "virtio-serial", "sclpconsole", "pl011"];

/// Asks, without minding a refusal: what is not told is not recorded.
fn ask(client: &mut Client, execute: &str, arguments: Value) -> Value {
    client.call(execute, arguments).unwrap_or_default()
}

fn property(client: &mut Client, path: &str, name: &str) -> Value {
    ask(client, "qom-get", json!({ "path": path, "property": name }))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

impl Machine {
    /// Asks QEMU. `names` maps ids of disks to their names in the restore point.
    pub(super) fn of(client: &mut Client, attached: &[Attached], names: &[(String, String)]) -> Machine {
        let cpus = ask(client, "query-cpus-fast", Value::Null);
        let memory = ask(client, "query-memory-size-summary", Value::Null);
        let model = cpus[0]["qom-path"].as_str().map(|path| property(client, path, "type"));
        let target = text(&cpus[0]["target"]);
        let suffix = format!("-{}-cpu", target.as_deref().unwrap_or_default());
        let devices = devices(client);
        let of_kind = |kinds: &[&str]| -> Vec<(String, String)> {
            devices.iter().filter(|(_, kind)| kinds.iter().any(|begin| kind.starts_with(begin))).cloned().collect()
        };
        let models = |kinds: &[&str]| of_kind(kinds).into_iter().map(|(_, kind)| kind).collect();
        let (displays, consoles) = (models(&DISPLAYS), models(&CONSOLES));
        let nics = of_kind(&NICS)
            .into_iter()
            .map(|(path, model)| Nic { mac: text(&property(client, &path, "mac")), model })
            .collect();
        Machine {
            version: VERSION,
            qemu: client.version().to_string(),
            name: text(&ask(client, "query-name", Value::Null)["name"]),
            uuid: text(&ask(client, "query-uuid", Value::Null)["UUID"]),
            machine: text(&property(client, "/machine", "type"))
                .map(|kind| kind.strip_suffix("-machine").unwrap_or(&kind).to_owned()),
            kvm: ask(client, "query-kvm", Value::Null)["enabled"].as_bool(),
            memory: Memory { base: memory["base-memory"].as_u64(), plugged: memory["plugged-memory"].as_u64() },
            cpus: Cpus {
                count: cpus.as_array().map_or(0, Vec::len),
                model: model.as_ref().and_then(text).map(|kind| kind.strip_suffix(&suffix).unwrap_or(&kind).to_owned()),
                topology: property(client, "/machine", "smp"),
            },
            target,
            firmware: firmware(client, attached),
            boot_order: text(&property(client, "/machine", "boot")["order"]),
            disks: attached.iter().filter(|disk| !disk.is_flash()).map(|disk| record(client, disk, names)).collect(),
            nics,
            displays,
            consoles,
        }
    }

    /// As it is kept.
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

fn firmware(client: &mut Client, attached: &[Attached]) -> Firmware {
    let flash: Vec<_> = attached
        .iter()
        .filter(|device| device.is_flash())
        .map(|device| Flash {
            file: text(&device.inserted["image"]["filename"]),
            read_only: device.read_only(),
            length: device.length(),
        })
        .collect();
    let kind = if flash.is_empty() { "bios" } else { "uefi" };
    Firmware { kind, image: text(&property(client, "/machine", "firmware")), flash }
}

fn record(client: &mut Client, disk: &Attached, names: &[(String, String)]) -> MachineDisk {
    // The boot index of a virtio disk is its outer device's.
    let device = outer(&disk.path);
    let bus = text(&property(client, device, "parent_bus"));
    let controller =
        bus.as_deref().and_then(|bus| bus.rsplit_once('/')).map(|(owner, _)| property(client, owner, "type"));
    let on = |part: &str| controller.as_ref().and_then(Value::as_str).is_some_and(|kind| kind.contains(part));
    let interface = match disk.kind.as_str() {
        kind if kind.starts_with("virtio-blk") => "virtio",
        kind if kind.starts_with("ide-") && on("ahci") => "sata",
        kind if kind.starts_with("ide-") => "ide",
        kind if kind.starts_with("scsi-") && on("usb") => "usb",
        kind if kind.starts_with("scsi-") => "scsi",
        kind if kind.starts_with("nvme") => "nvme",
        kind => kind,
    };
    let index = property(client, device, "bootindex").as_i64();
    MachineDisk {
        id: disk.id.clone(),
        name: names.iter().find(|(id, _)| *id == disk.id).map(|(_, name)| name.clone()),
        interface: interface.to_owned(),
        device: disk.kind.clone(),
        bus,
        boot_index: index.filter(|index| *index >= 0),
        length: disk.length(),
        format: text(&disk.inserted["drv"]),
        read_only: disk.read_only(),
    }
}

/// Path and type of the VM's devices, those of its board too.
fn devices(client: &mut Client) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"] {
        let listed = ask(client, "qom-list", json!({ "path": folder }));
        for entry in listed.as_array().into_iter().flatten() {
            let kind = entry["type"].as_str().and_then(|kind| kind.strip_prefix("child<")?.strip_suffix('>'));
            if let (Some(kind), Some(name)) = (kind, entry["name"].as_str()) {
                found.push((format!("{folder}/{name}"), kind.to_owned()));
            }
        }
    }
    found.truncate(MAX_DEVICES);
    found.sort();
    found
}
