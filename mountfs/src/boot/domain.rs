//! The same machine as a domain of libvirt, whose disks are exports of ours.

use std::path::Path;

use reseal_qemu::xml::escape;

use super::host::{Accel, Host};
use super::machine::{Bus, Chipset, Firmware, Machine, MachineDisk, ScsiModel};
use super::network::Network;

/// What decides the domain.
#[derive(Debug, Clone)]
pub struct DomainSetup<'a> {
    pub name: &'a str,
    pub machine: &'a Machine,
    pub host: &'a Host,
    pub network: &'a Network,
    /// Where its disks are served.
    pub socket: &'a Path,
    /// Seconds that the guest waits for an export that is gone, before it is paused.
    pub reconnect: u64,
}

/// The name of the n-th disk on a bus: a, b, … z, aa, …
fn target(prefix: &str, nth: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = nth;
    loop {
        letters.push(b'a' + u8::try_from(rest % 26).unwrap_or(0));
        match rest / 26 {
            0 => break,
            more => rest = more - 1,
        }
    }
    letters.reverse();
    format!("{prefix}{}", String::from_utf8_lossy(&letters))
}

/// Why a network can't be had from libvirt.
pub fn refuse_network(network: &Network) -> Result<(), &'static str> {
    match network {
        Network::None | Network::User { restricted: false } | Network::Bridge(_) => Ok(()),
        Network::User { restricted: true } => {
            Err("libvirt has no restricted network; --define takes none, user or bridge=NAME")
        }
        Network::Tap(_) => Err("libvirt makes its own taps; --define takes none, user or bridge=NAME"),
    }
}

/// Its XML.
pub fn domain_xml(setup: &DomainSetup<'_>) -> String {
    let DomainSetup { name, machine, host, .. } = setup;
    let kind = if host.accel == Accel::Kvm { "kvm" } else { "qemu" };
    let firmware = if machine.firmware == Firmware::Uefi { " firmware='efi'" } else { "" };
    let processor = if host.accel == Accel::Kvm { "<cpu mode='host-passthrough'/>" } else { "" };
    let acpi = if machine.chipset == Chipset::Virt { "<acpi/><gic/>" } else { "<acpi/><apic/>" };
    let clock = if machine.local_time { "localtime" } else { "utc" };
    let screen = if machine.chipset == Chipset::Virt { "virtio" } else { "vga" };
    let mut devices = String::new();
    devices.push_str(&format!("    <emulator>{}</emulator>\n", escape(&host.qemu.to_string_lossy())));
    let (mut virtio, mut scsi, mut ide) = (0, 0, 0);
    for disk in &machine.disks {
        let (prefix, nth) = match disk.bus {
            Bus::Virtio => ("vd", &mut virtio),
            Bus::Sata | Bus::Scsi(_) => ("sd", &mut scsi),
            Bus::Ide => ("hd", &mut ide),
        };
        devices.push_str(&self::disk(setup, disk, &target(prefix, *nth)));
        *nth += 1;
    }
    if let Some(model) = machine.disks.iter().find_map(|disk| match disk.bus {
        Bus::Scsi(model) => Some(model),
        _ => None,
    }) {
        devices.push_str(&format!("    <controller type='scsi' index='0' model='{}'/>\n", scsi_model(model)));
    }
    devices.push_str(&interface(setup));
    devices.push_str("    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n");
    devices.push_str("    <serial type='pty'/>\n    <console type='pty'/>\n");
    devices.push_str(&format!("    <video><model type='{screen}'/></video>\n    <memballoon model='none'/>\n"));
    format!(
        "<domain type='{kind}'>\n  <name>{}</name>\n  <memory unit='MiB'>{}</memory>\n  <vcpu>{}</vcpu>\n  \
         <os{firmware}>\n    <type arch='{}' machine='{}'>hvm</type>\n  </os>\n  <features>{acpi}</features>\n  {processor}\n  \
         <clock offset='{clock}'/>\n  <on_poweroff>destroy</on_poweroff>\n  <on_reboot>restart</on_reboot>\n  \
         <on_crash>destroy</on_crash>\n  <devices>\n{devices}  </devices>\n</domain>\n",
        escape(name),
        machine.memory.div_ceil(1 << 20),
        machine.cpus,
        machine.arch.name(),
        machine.chipset.name(),
    )
}

fn disk(setup: &DomainSetup<'_>, disk: &MachineDisk, target: &str) -> String {
    let serial = disk.serial.as_ref().map_or_else(String::new, |serial| format!("<serial>{serial}</serial>"));
    format!(
        "    <disk type='network' device='disk'>\n      \
         <driver name='qemu' type='raw' error_policy='stop' rerror_policy='stop' discard='unmap' detect_zeroes='unmap'/>\n      \
         <source protocol='nbd' name='{}'>\n        <host transport='unix' socket='{}'/>\n        <reconnect delay='{}'/>\n      \
         </source>\n      <target dev='{target}' bus='{}'/>\n      <boot order='{}'/>{serial}\n    </disk>\n",
        escape(&disk.export),
        escape(&setup.socket.to_string_lossy()),
        setup.reconnect,
        disk.bus,
        disk.boot_index,
    )
}

fn interface(setup: &DomainSetup<'_>) -> String {
    let source = match setup.network {
        Network::User { .. } => "type='user'>".to_owned(),
        Network::Bridge(name) => format!("type='bridge'><source bridge='{name}'/>"),
        Network::None | Network::Tap(_) => return String::new(),
    };
    let nic = &setup.machine.nic;
    let model = if nic.model == "virtio-net-pci" { "virtio" } else { nic.model };
    let mac = nic.mac.map_or_else(String::new, |bytes| {
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("<mac address='{}'/>", bytes.join(":"))
    });
    format!("    <interface {source}{mac}<model type='{model}'/></interface>\n")
}

fn scsi_model(model: ScsiModel) -> &'static str {
    match model {
        ScsiModel::Virtio => "virtio-scsi",
        ScsiModel::Lsi => "lsilogic",
        ScsiModel::LsiSas => "lsisas1068",
        ScsiModel::Megasas => "lsisas1078",
        ScsiModel::Pvscsi => "vmpvscsi",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_by_letters() {
        let names = [0, 1, 25, 26, 27, 701, 702].map(|nth| target("vd", nth));
        assert_eq!(names, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]);
    }
}
