//! `overlay.json`: what the folder of an overlay holds. It is no secret, and nobody's word for anything.

use reseal_format::ids::{NoteId, OverlayId, PointId, VaultId};
use reseal_format::manifest::MAX_DISKS;
use reseal_format::names::{DiskName, TenantName, VmName};
use serde::{Deserialize, Serialize};

/// Its version. A reader refuses any other.
pub(super) const VERSION: u16 = 1;

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    pub version: u16,
    pub id: OverlayId,
    pub vault_id: VaultId,
    pub tenant: TenantName,
    pub vm: VmName,
    pub number: u32,
    pub point_id: PointId,
    /// The note that has the key.
    pub note_id: NoteId,
    /// As the restore point has them.
    pub disks: Vec<DocumentDisk>,
}

/// A disk of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentDisk {
    pub name: DiskName,
    /// Bytes of the disk.
    pub length: u64,
    pub id: OverlayId,
}

impl DocumentDisk {
    /// The name of its file.
    pub fn file_name(&self) -> String {
        format!("{}.{FILE}", self.id)
    }
}

/// What the name of a disk's file ends in.
pub(super) const FILE: &str = "overlay";

impl Document {
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("text, numbers and lists always serialize");
        text.push(b'\n');
        text
    }

    /// Decodes it; why not, for people.
    pub fn decode(bytes: &[u8]) -> Result<Document, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if version != VERSION {
            return Err(format!("it has version {version}, this program reads {VERSION}; use a newer reseal"));
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if document.disks.is_empty() || document.disks.len() > MAX_DISKS {
            return Err("it has no disks, or too many".into());
        }
        Ok(document)
    }

    /// The restore point, for people.
    pub fn point(&self) -> String {
        format!("{}@{}", self.vm, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        Document {
            version: VERSION,
            id: OverlayId::from_bytes([1; 16]),
            vault_id: VaultId::from_bytes([2; 16]),
            tenant: TenantName::new("acme").unwrap(),
            vm: VmName::new("web01").unwrap(),
            number: 7,
            point_id: PointId::from_bytes([3; 16]),
            note_id: NoteId::from_bytes([4; 16]),
            disks: vec![DocumentDisk {
                name: DiskName::new("root").unwrap(),
                length: 4097,
                id: OverlayId::from_bytes([5; 16]),
            }],
        }
    }

    #[test]
    fn it_comes_back_as_it_was_and_another_version_is_refused() {
        let bytes = document().encode();
        assert_eq!(Document::decode(&bytes), Ok(document()));
        let text = String::from_utf8(bytes).unwrap();
        assert!(Document::decode(text.replace("\"version\": 1", "\"version\": 2").as_bytes()).is_err());
        assert!(Document::decode(text.replace("web01", "../web01").as_bytes()).is_err());
        assert!(Document::decode(text.replace(&"05".repeat(16), "../../etc/passwd").as_bytes()).is_err());
        assert!(Document::decode(Document { disks: vec![], ..document() }.encode().as_slice()).is_err());
        for at in 0..text.len() {
            let _ = Document::decode(&text.as_bytes()[..at]);
        }
    }
}
