//! What is started: the machine that a definition describes, changed as the operator says, within what this host has.

use std::fmt;

use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;
use reseal_nbd::server::export_name;

use super::BootError;
use super::described::{Described, DescribedDisk, DescribedNic};

/// Memory of a VM of which nothing is known.
const MEMORY: u64 = 1 << 30;
/// Least that a guest gets.
const LEAST_MEMORY: u64 = 32 << 20;
/// CPUs of a VM of which nothing is known, and most that one gets.
const CPUS: u32 = 2;
pub const MAX_CPUS: u32 = 255;
/// Virtio disks take a PCI slot each, of which a board has 32 for everything.
const MAX_VIRTIO: usize = 20;
/// Places on the IDE buses of a PC.
const MAX_IDE: usize = 4;

/// What kind of processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    X86_64,
    Aarch64,
}

impl Arch {
    /// By the names that QEMU and libvirt have. A 32-bit PC is run by its 64-bit kind.
    pub fn named(name: &str) -> Option<Arch> {
        match name {
            "x86_64" | "i686" | "i386" => Some(Arch::X86_64),
            "aarch64" => Some(Arch::Aarch64),
            _ => None,
        }
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }
}

/// The family of the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chipset {
    Pc,
    Q35,
    Virt,
}

impl Chipset {
    /// QEMU's name of its newest.
    pub fn name(self) -> &'static str {
        match self {
            Chipset::Pc => "pc",
            Chipset::Q35 => "q35",
            Chipset::Virt => "virt",
        }
    }
}

/// What the machine starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    Bios,
    Uefi,
}

/// A controller of SCSI disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScsiModel {
    Virtio,
    Lsi,
    LsiSas,
    Megasas,
    Pvscsi,
}

/// What a disk is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    Virtio,
    Sata,
    Scsi(ScsiModel),
    Ide,
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Bus::Virtio => "virtio",
            Bus::Sata => "sata",
            Bus::Scsi(_) => "scsi",
            Bus::Ide => "ide",
        })
    }
}

/// A network adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nic {
    /// QEMU's name.
    pub model: &'static str,
    pub mac: Option<[u8; 6]>,
}

/// A disk of it. The n-th is node `disk-n` and device `reseal-disk-n`, whatever its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineDisk {
    pub name: DiskName,
    /// The export that it is served as.
    pub export: String,
    pub bus: Bus,
    /// From 1 on.
    pub boot_index: u32,
    pub serial: Option<String>,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub name: String,
    pub uuid: Option<String>,
    pub arch: Arch,
    pub chipset: Chipset,
    pub firmware: Firmware,
    /// Bytes.
    pub memory: u64,
    pub cpus: u32,
    pub local_time: bool,
    /// In the order of the restore point.
    pub disks: Vec<MachineDisk>,
    pub nic: Nic,
}

/// What the operator wants otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overrides {
    pub memory: Option<u64>,
    pub cpus: Option<u32>,
    pub firmware: Option<Firmware>,
    /// Of all disks.
    pub bus: Option<Bus>,
}

/// What this host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSize {
    pub arch: Arch,
    /// Bytes.
    pub memory: u64,
    pub cpus: u32,
}

/// The node of the n-th disk.
pub fn node(nth: usize) -> String {
    format!("disk-{nth}")
}

/// The id of its device.
pub fn device(nth: usize) -> String {
    format!("reseal-disk-{nth}")
}

impl Machine {
    /// The machine of a restore point, and what should be said of it.
    pub fn of(
        point: &Manifest,
        described: Option<&Described>,
        overrides: &Overrides,
        host: &HostSize,
    ) -> Result<(Machine, Vec<String>), BootError> {
        let mut warnings = Vec::new();
        if described.is_none() {
            let why = match &point.definition {
                None => "no definition was captured with it",
                Some(_) => "its definition is of no kind that is understood",
            };
            warnings.push(format!(
                "{why}: the VM gets a machine of this program's choice; see --memory, --cpus, --firmware, --bus"
            ));
        }
        let nothing = Described::default();
        let described = described.unwrap_or(&nothing);
        let arch = arch(described, host)?;
        let mut firmware = overrides.firmware.or(described.firmware).unwrap_or(Firmware::Bios);
        if arch == Arch::Aarch64 {
            firmware = Firmware::Uefi;
        }
        let mut disks = disks(point, described, overrides.bus, &mut warnings);
        let chipset = chipset(arch, described, &disks, &mut warnings);
        if chipset != Chipset::Pc {
            // These boards have none.
            disks.iter_mut().filter(|disk| disk.bus == Bus::Ide).for_each(|disk| disk.bus = Bus::Sata);
        }
        crowd(&mut disks, &mut warnings)?;
        let machine = Machine {
            name: point.vm.as_str().to_owned(),
            uuid: described.uuid.clone(),
            arch,
            chipset,
            firmware,
            memory: memory(described, overrides, host, &mut warnings)?,
            cpus: cpus(described, overrides, host, &mut warnings),
            local_time: described.local_time,
            disks,
            nic: nic(arch, &described.nics, &mut warnings),
        };
        Ok((machine, warnings))
    }
}

fn arch(described: &Described, host: &HostSize) -> Result<Arch, BootError> {
    match (&described.foreign, described.arch) {
        (Some(name), _) => Err(BootError::Machine(format!(
            "the VM is a machine of architecture {name:?}, which can't be started here; its disks can be served with `reseal nbd`"
        ))),
        (None, arch) => Ok(arch.unwrap_or(host.arch)),
    }
}

fn chipset(arch: Arch, described: &Described, disks: &[MachineDisk], warnings: &mut Vec<String>) -> Chipset {
    let has_ide = disks.iter().any(|disk| disk.bus == Bus::Ide);
    match (arch, described.chipset) {
        (Arch::Aarch64, _) => Chipset::Virt,
        (Arch::X86_64, Some(chipset @ (Chipset::Pc | Chipset::Q35))) => {
            if has_ide && chipset == Chipset::Q35 {
                warnings.push("a q35 machine has no IDE: the disks are on SATA".into());
            }
            chipset
        }
        (Arch::X86_64, _) if has_ide => Chipset::Pc,
        (Arch::X86_64, _) => Chipset::Q35,
    }
}

fn memory(
    described: &Described,
    overrides: &Overrides,
    host: &HostSize,
    warnings: &mut Vec<String>,
) -> Result<u64, BootError> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    match (overrides.memory, described.memory) {
        (Some(memory), _) if memory < LEAST_MEMORY => {
            Err(BootError::Machine(format!("--memory: a VM needs {}M at least", mib(LEAST_MEMORY))))
        }
        (Some(memory), _) => Ok(memory),
        (None, None) => Ok(MEMORY),
        (None, Some(memory)) if memory > host.memory => {
            let given = (host.memory / 2).max(LEAST_MEMORY);
            warnings.push(format!(
                "the VM had {} MiB of memory, more than this machine: it gets {} MiB; see --memory",
                mib(memory),
                mib(given)
            ));
            Ok(given)
        }
        (None, Some(memory)) => Ok(memory.max(LEAST_MEMORY)),
    }
}

fn cpus(described: &Described, overrides: &Overrides, host: &HostSize, warnings: &mut Vec<String>) -> u32 {
    match (overrides.cpus, described.cpus) {
        (Some(cpus), _) => cpus.clamp(1, MAX_CPUS),
        (None, None) => CPUS.min(host.cpus.max(1)),
        (None, Some(cpus)) if cpus > host.cpus => {
            let given = host.cpus.clamp(1, MAX_CPUS);
            warnings.push(format!("the VM had {cpus} CPUs, more than this machine: it gets {given}; see --cpus"));
            given
        }
        (None, Some(cpus)) => cpus.clamp(1, MAX_CPUS),
    }
}

/// The restore point's disks, each as the definition has it. Names count; where none fits, the order does.
fn disks(point: &Manifest, described: &Described, bus: Option<Bus>, warnings: &mut Vec<String>) -> Vec<MachineDisk> {
    let named = |name: &DiskName| described.disks.iter().find(|disk| disk.name == name.as_str());
    let by_name = point.disks.iter().any(|disk| named(&disk.name).is_some());
    let by_order = !by_name && described.disks.len() == point.disks.len();
    if !by_name && !by_order && !described.disks.is_empty() {
        warnings.push(
            "the definition has other disks than the restore point: they are attached as virtio; see --bus".into(),
        );
    }
    let found: Vec<Option<&DescribedDisk>> = point
        .disks
        .iter()
        .enumerate()
        .map(|(nth, disk)| if by_order { described.disks.get(nth) } else { named(&disk.name) })
        .collect();
    // Those that the definition boots from first, then the others as they come.
    let mut order: Vec<usize> = (0..point.disks.len()).collect();
    order.sort_by_key(|&nth| found[nth].and_then(|disk| disk.boot).unwrap_or(u32::MAX));
    let index = |nth: usize| order.iter().position(|&at| at == nth).and_then(|at| u32::try_from(at).ok()).unwrap_or(0);
    let attached = |nth: usize, name: &DiskName| {
        let known = found[nth];
        MachineDisk {
            name: name.clone(),
            export: export_name(&point.vm, point.number, name),
            bus: bus.or_else(|| known.map(|disk| disk.bus.unwrap_or(Bus::Sata))).unwrap_or(Bus::Virtio),
            boot_index: index(nth) + 1,
            serial: known.and_then(|disk| disk.serial.clone()),
        }
    };
    let strange = found.iter().flatten().filter(|disk| disk.bus.is_none()).count();
    if strange > 0 && bus.is_none() {
        warnings.push(format!("disks on a bus that is not known here ({strange}) are on SATA; see --bus"));
    }
    point.disks.iter().enumerate().map(|(nth, disk)| attached(nth, &disk.name)).collect()
}

/// Finds places for more disks than a bus has.
fn crowd(disks: &mut [MachineDisk], warnings: &mut Vec<String>) -> Result<(), BootError> {
    let mut ide = 0;
    for disk in disks.iter_mut().filter(|disk| disk.bus == Bus::Ide) {
        ide += 1;
        if ide > MAX_IDE {
            warnings.push(format!("IDE has {MAX_IDE} places: the disk {} is on SATA", disk.name));
            disk.bus = Bus::Sata;
        }
    }
    match disks.iter().filter(|disk| disk.bus == Bus::Virtio).count() {
        count if count > MAX_VIRTIO => Err(BootError::Machine(format!(
            "{count} virtio disks are more than a machine has slots for ({MAX_VIRTIO}); give --bus scsi"
        ))),
        _ => Ok(()),
    }
}

fn nic(arch: Arch, described: &[DescribedNic], warnings: &mut Vec<String>) -> Nic {
    if described.len() > 1 {
        warnings.push(format!("the VM had {} network adapters; only the first is there", described.len()));
    }
    let first = described.first();
    let model = match first.and_then(|nic| nic.model.as_deref()).unwrap_or_default() {
        _ if arch == Arch::Aarch64 => "virtio-net-pci",
        "e1000e" => "e1000e",
        model if model.starts_with("e1000") => "e1000",
        "rtl8139" => "rtl8139",
        "vmxnet3" => "vmxnet3",
        _ => "virtio-net-pci",
    };
    Nic { model, mac: first.and_then(|nic| nic.mac) }
}
