//! What a captured definition says of the machine. It is untrusted: numbers are bounded where they are used, of texts only those are
//! taken that mean something here, and paths of it are never looked at.

use reseal_format::manifest::Definition;

use super::domain_xml;
use super::machine::{Arch, Bus, Chipset, Firmware, ScsiModel};
use super::machine_json;

/// Most disks and network adapters that are looked at.
pub(super) const MAX_DEVICES: usize = 1024;
/// Longest serial number that a disk has.
const MAX_SERIAL: usize = 20;

/// What was understood. What is not said is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Described {
    pub arch: Option<Arch>,
    /// The name of an architecture that nothing here can be.
    pub foreign: Option<String>,
    pub uuid: Option<String>,
    /// Bytes.
    pub memory: Option<u64>,
    pub cpus: Option<u32>,
    pub firmware: Option<Firmware>,
    pub chipset: Option<Chipset>,
    /// Whether its hardware clock shows local time.
    pub local_time: bool,
    pub disks: Vec<DescribedDisk>,
    pub nics: Vec<DescribedNic>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescribedDisk {
    /// By which the restore point may have it.
    pub name: String,
    /// None if it is on a bus that is not known here.
    pub bus: Option<Bus>,
    /// Lowest first.
    pub boot: Option<u32>,
    pub serial: Option<String>,
}

/// A network adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DescribedNic {
    pub model: Option<String>,
    pub mac: Option<[u8; 6]>,
}

impl Described {
    /// Reads a definition; none if it is of no kind that is known.
    pub fn of(definition: &Definition) -> Option<Described> {
        let text = definition.text.trim_start();
        match text.as_bytes().first()? {
            b'<' => domain_xml::read(text),
            b'{' => machine_json::read(text),
            _ => None,
        }
    }

    pub(super) fn set_arch(&mut self, name: &str) {
        match Arch::named(name) {
            Some(arch) => self.arch = Some(arch),
            None => self.foreign = Some(name.chars().take(MAX_SERIAL).collect()),
        }
    }
}

/// Six bytes, as `52:54:00:12:34:56`.
pub(super) fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // The first bit makes an address one of many.
    (parts.next().is_none() && bytes[0] & 1 == 0).then_some(bytes)
}

/// A serial number that needs no escaping anywhere.
pub(super) fn serial(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    (1..=MAX_SERIAL).contains(&text.len()).then_some(text).filter(|text| text.chars().all(plain)).map(str::to_owned)
}

/// A UUID as it is usually spelt.
pub(super) fn uuid(text: &str) -> Option<String> {
    let dash = |at| matches!(at, 8 | 13 | 18 | 23);
    let fits = text.bytes().enumerate().all(|(at, b)| if dash(at) { b == b'-' } else { b.is_ascii_hexdigit() });
    (text.len() == 36 && fits).then(|| text.to_ascii_lowercase())
}

/// Machine types of QEMU, by family.
pub(super) fn chipset(machine: &str) -> Option<Chipset> {
    match machine {
        "pc" => Some(Chipset::Pc),
        "q35" => Some(Chipset::Q35),
        "virt" => Some(Chipset::Virt),
        _ if machine.starts_with("pc-q35") => Some(Chipset::Q35),
        _ if machine.starts_with("pc-i440fx") => Some(Chipset::Pc),
        _ if machine.starts_with("virt-") => Some(Chipset::Virt),
        _ => None,
    }
}

/// Buses, by the names that libvirt and the captured machine have for them.
pub(super) fn bus(name: &str, scsi: ScsiModel) -> Option<Bus> {
    match name {
        "virtio" => Some(Bus::Virtio),
        "sata" => Some(Bus::Sata),
        "ide" => Some(Bus::Ide),
        "scsi" => Some(Bus::Scsi(scsi)),
        _ => None,
    }
}
