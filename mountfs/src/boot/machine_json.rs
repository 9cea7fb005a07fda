//! The machine as a backup over QMP records it.

use serde::Deserialize;
use serde_json::Value;

use super::described::{Described, DescribedDisk, DescribedNic, MAX_DEVICES, bus, chipset, mac, uuid};
use super::machine::{Firmware, ScsiModel};

/// The fields that matter here. Each is taken as whatever it is: one that is wrong spoils no other.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Recorded {
    version: u64,
    #[serde(default)]
    uuid: Value,
    #[serde(default)]
    machine: Value,
    #[serde(default)]
    target: Value,
    #[serde(default)]
    memory: Value,
    #[serde(default)]
    cpus: Value,
    #[serde(default)]
    firmware: Value,
    #[serde(default)]
    disks: Value,
    #[serde(default)]
    nics: Value,
}

/// Reads it; none if it is no such record.
pub(super) fn read(text: &str) -> Option<Described> {
    let recorded: Recorded = serde_json::from_str(text).ok().filter(|recorded: &Recorded| recorded.version == 1)?;
    let mut described = Described {
        uuid: recorded.uuid.as_str().and_then(uuid),
        memory: memory(&recorded.memory),
        cpus: recorded.cpus["count"].as_u64().and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0),
        firmware: match recorded.firmware["kind"].as_str() {
            Some("uefi") => Some(Firmware::Uefi),
            Some("bios") => Some(Firmware::Bios),
            _ => None,
        },
        chipset: recorded.machine.as_str().and_then(chipset),
        disks: entries(&recorded.disks).filter_map(disk).collect(),
        nics: entries(&recorded.nics).map(nic).collect(),
        ..Described::default()
    };
    if let Some(target) = recorded.target.as_str() {
        described.set_arch(target);
    }
    Some(described)
}

fn entries(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten().take(MAX_DEVICES)
}

fn memory(memory: &Value) -> Option<u64> {
    memory["base"].as_u64()?.checked_add(memory["plugged"].as_u64().unwrap_or(0))
}

fn disk(disk: &Value) -> Option<DescribedDisk> {
    // Drives of the guest's that are no disks of it.
    if disk["read-only"] == true || matches!(disk["device"].as_str(), Some("ide-cd" | "scsi-cd" | "floppy")) {
        return None;
    }
    Some(DescribedDisk {
        name: disk["name"].as_str().or_else(|| disk["id"].as_str())?.to_owned(),
        bus: disk["interface"].as_str().and_then(|name| bus(name, ScsiModel::Virtio)),
        boot: disk["boot-index"].as_u64().and_then(|index| u32::try_from(index).ok()),
        serial: None,
    })
}

fn nic(nic: &Value) -> DescribedNic {
    DescribedNic { model: nic["model"].as_str().map(str::to_owned), mac: nic["mac"].as_str().and_then(mac) }
}
