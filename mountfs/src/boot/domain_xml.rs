//! The definition of a libvirt domain, as far as it says what kind of machine it is.

use roxmltree::{Document, Node, ParsingOptions};

use super::described::{Described, DescribedDisk, DescribedNic, MAX_DEVICES, bus, chipset, mac, serial, uuid};
use super::machine::{Firmware, ScsiModel};

/// Most elements, attributes and texts: a domain has some hundreds.
const MAX_NODES: u32 = 100_000;

/// Reads it; none if it is no domain.
pub(super) fn read(text: &str) -> Option<Described> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).ok()?;
    let root = document.root_element();
    root.has_tag_name("domain").then(|| domain(root))
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim).filter(|text| !text.is_empty())
}

fn domain(root: Node<'_, '_>) -> Described {
    let mut described = Described {
        uuid: text(root, "uuid").and_then(uuid),
        memory: child(root, "memory").and_then(bytes),
        cpus: child(root, "vcpu").and_then(cpus),
        local_time: child(root, "clock").is_some_and(|clock| clock.attribute("offset") == Some("localtime")),
        ..Described::default()
    };
    if let Some(os) = child(root, "os") {
        let kind = child(os, "type");
        if let Some(arch) = kind.and_then(|kind| kind.attribute("arch")) {
            described.set_arch(arch);
        }
        described.chipset = kind.and_then(|kind| chipset(kind.attribute("machine")?));
        let in_flash = child(os, "loader").is_some_and(|loader| loader.attribute("type") == Some("pflash"));
        let is_uefi = in_flash || os.attribute("firmware") == Some("efi");
        described.firmware = Some(if is_uefi { Firmware::Uefi } else { Firmware::Bios });
    }
    if let Some(devices) = child(root, "devices") {
        let of_kind =
            |kind: &'static str| devices.children().filter(move |device| device.has_tag_name(kind)).take(MAX_DEVICES);
        let scsi = of_kind("controller").find(|c| c.attribute("type") == Some("scsi"));
        let scsi = scsi.and_then(|controller| controller.attribute("model")).map_or(ScsiModel::Virtio, scsi_model);
        described.disks = of_kind("disk").filter_map(|disk| self::disk(disk, scsi)).collect();
        described.nics = of_kind("interface").map(nic).collect();
    }
    described
}

/// A size with a unit, as libvirt has them.
fn bytes(node: Node<'_, '_>) -> Option<u64> {
    let unit: u64 = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    node.text()?.trim().parse::<u64>().ok()?.checked_mul(unit)
}

/// Those that are switched on.
fn cpus(node: Node<'_, '_>) -> Option<u32> {
    node.attribute("current").or_else(|| node.text())?.trim().parse().ok()
}

fn scsi_model(name: &str) -> ScsiModel {
    match name {
        "lsilogic" => ScsiModel::Lsi,
        "lsisas1068" => ScsiModel::LsiSas,
        "lsisas1078" => ScsiModel::Megasas,
        "vmpvscsi" => ScsiModel::Pvscsi,
        _ => ScsiModel::Virtio,
    }
}

fn disk(node: Node<'_, '_>, scsi: ScsiModel) -> Option<DescribedDisk> {
    if !matches!(node.attribute("device").unwrap_or("disk"), "disk" | "lun") {
        return None;
    }
    let target = child(node, "target")?;
    Some(DescribedDisk {
        name: target.attribute("dev")?.to_owned(),
        bus: target.attribute("bus").and_then(|name| bus(name, scsi)),
        boot: child(node, "boot").and_then(|boot| boot.attribute("order")?.parse().ok()),
        serial: text(node, "serial").and_then(serial),
    })
}

fn nic(node: Node<'_, '_>) -> DescribedNic {
    DescribedNic {
        model: child(node, "model").and_then(|model| model.attribute("type")).map(str::to_owned),
        mac: child(node, "mac").and_then(|address| mac(address.attribute("address")?)),
    }
}
