//! `boot.json`: what runs on an overlay, and where each of its disks is.

use std::path::PathBuf;

use reseal_cli::ProcessId;
use reseal_format::ids::{OverlayId, PointId};
use reseal_format::manifest::MAX_DISKS;
use reseal_format::names::{DiskName, VmName};
use serde::{Deserialize, Serialize};

/// Its version. A reader refuses any other.
pub const VERSION: u16 = 1;

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub version: u16,
    pub overlay: OverlayId,
    /// Where it is kept; none if it is gone with the process that serves it.
    pub overlay_folder: Option<PathBuf>,
    pub vm: VmName,
    pub number: u32,
    pub point_id: PointId,
    pub qemu: ProcessId,
    /// In the order of the restore point.
    pub disks: Vec<RecordDisk>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordDisk {
    pub name: DiskName,
    /// QEMU's names of it.
    pub node: String,
    pub device: String,
    pub at: DiskAt,
}

/// Where a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAt {
    /// On the overlay.
    Overlay,
    /// It was moved there, and the overlay has only what was before.
    Moved { target: String },
}

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Decodes it; why not, for people.
    pub fn decode(bytes: &[u8]) -> Result<Record, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if version != VERSION {
            return Err(format!(
                "it has version {version}, this program reads {VERSION}; use the reseal that wrote it"
            ));
        }
        let record: Record = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        match record.disks.len() {
            1..=MAX_DISKS => Ok(record),
            _ => Err("it has no disks, or too many".into()),
        }
    }

    /// Whether no disk is on the overlay any more.
    pub fn is_all_moved(&self) -> bool {
        self.disks.iter().all(|disk| disk.at != DiskAt::Overlay)
    }

    /// The first disk that is not on the overlay any more, and where it is.
    pub fn moved(&self) -> Option<(&DiskName, &str)> {
        self.disks.iter().find_map(|disk| match &disk.at {
            DiskAt::Overlay => None,
            DiskAt::Moved { target } => Some((&disk.name, target.as_str())),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_and_another_version_is_refused() {
        let disk = |name: &str, at| RecordDisk {
            name: DiskName::new(name).unwrap(),
            node: "disk-0".into(),
            device: "reseal-disk-0".into(),
            at,
        };
        let record = Record {
            version: VERSION,
            overlay: OverlayId::from_bytes([1; 16]),
            overlay_folder: Some("/scratch/web01".into()),
            vm: VmName::new("web01").unwrap(),
            number: 7,
            point_id: PointId::from_bytes([2; 16]),
            qemu: ProcessId { pid: 8, start: 9 },
            disks: vec![disk("a", DiskAt::Overlay), disk("b", DiskAt::Moved { target: "/dev/vg/b".into() })],
        };
        let bytes = record.encode();
        assert_eq!(Record::decode(&bytes).as_ref(), Ok(&record));
        assert_eq!(record.moved().map(|(name, target)| (name.as_str(), target)), Some(("b", "/dev/vg/b")));
        let text = String::from_utf8(bytes).unwrap();
        assert!(Record::decode(text.replace("\"version\": 1", "\"version\": 2").as_bytes()).is_err());
        assert!(Record::decode(Record { disks: vec![], ..record }.encode().as_slice()).is_err());
        for at in 0..text.len() - 2 {
            assert!(Record::decode(&text.as_bytes()[..at]).is_err());
        }
    }
}
