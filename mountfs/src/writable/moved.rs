//! `moved.json`: which disks of an overlay were moved elsewhere, so that nobody goes on with what is old. It keeps from
//! opening, and is believed for nothing else.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use reseal_format::manifest::MAX_DISKS;
use reseal_format::names::DiskName;
use serde::{Deserialize, Serialize};

use super::document::Document;
use super::folder::{FolderError, failed, sync_folder};
use crate::boot::RunFolder;

/// The file.
pub(super) const MOVED: &str = "moved.json";
/// What it is called before it is whole.
pub(super) const NEW_MOVED: &str = "moved.json.new";
/// Its version. A reader refuses any other.
const VERSION: u16 = 1;
/// Longest that is read: 256 disks with long paths take less.
const MAX: u64 = 2 << 20;

/// A disk that is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedDisk {
    pub name: DiskName,
    /// A file or block device.
    pub target: String,
}

/// The disks that are elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    version: u16,
    pub disks: Vec<MovedDisk>,
}

impl Default for Moved {
    fn default() -> Moved {
        Moved { version: VERSION, disks: Vec::new() }
    }
}

/// Whether a VM runs that has disks on an overlay, even if nobody serves them now.
pub fn has_vm(document: &Document, moved: &Moved) -> bool {
    document.disks.iter().any(|disk| moved.target(&disk.name).is_none()) && RunFolder::of(&document.id).is_held()
}

impl Moved {
    /// Reads it from the folder of an overlay; of one that has none, no disk was moved.
    pub fn read(folder: &Path) -> Result<Moved, FolderError> {
        let path = folder.join(MOVED);
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        let file = match file {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Moved::default()),
            other => other.map_err(failed("open", &path))?,
        };
        let mut bytes = Vec::new();
        file.take(MAX + 1).read_to_end(&mut bytes).map_err(failed("read", &path))?;
        let malformed = |why: String| FolderError::Malformed { path: path.clone(), why };
        if bytes.len() as u64 > MAX {
            return Err(malformed("it is too long".into()));
        }
        let moved: Moved = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
        match (moved.version, moved.disks.len()) {
            (VERSION, ..=MAX_DISKS) => Ok(moved),
            (VERSION, _) => Err(malformed("it has too many disks".into())),
            (version, _) => Err(malformed(format!("it has version {version}, this program reads {VERSION}"))),
        }
    }

    /// Where a disk is, if not on the overlay.
    pub fn target(&self, disk: &DiskName) -> Option<&str> {
        self.disks.iter().find(|moved| moved.name == *disk).map(|moved| moved.target.as_str())
    }

    /// Notes where a disk is: at a target, or on the overlay.
    pub fn set(&mut self, disk: &DiskName, target: Option<String>) {
        self.disks.retain(|moved| moved.name != *disk);
        self.disks.extend(target.map(|target| MovedDisk { name: disk.clone(), target }));
    }

    /// Keeps it durably, whole or not at all. No file says the same as one without disks.
    pub fn put(&self, folder: &Path) -> Result<(), FolderError> {
        let (new, path) = (folder.join(NEW_MOVED), folder.join(MOVED));
        if self.disks.is_empty() {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("remove", &path)(e)),
                _ => return sync_folder(folder),
            }
        }
        let mut text = serde_json::to_vec_pretty(self).expect("text, numbers and lists always serialize");
        text.push(b'\n');
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file: File = options.open(&new).map_err(failed("make", &new))?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("make", &path))?;
        sync_folder(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_and_nothing_else_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let name = |name: &str| DiskName::new(name).unwrap();
        assert_eq!(Moved::read(folder.path()).unwrap(), Moved::default());
        let mut moved = Moved::default();
        moved.set(&name("a"), Some("/dev/vg/a".into()));
        moved.set(&name("b"), Some("/dev/vg/b".into()));
        moved.set(&name("a"), Some("/dev/vg/c".into()));
        moved.put(folder.path()).unwrap();
        assert_eq!(Moved::read(folder.path()).unwrap(), moved);
        assert_eq!(moved.target(&name("a")), Some("/dev/vg/c"));
        moved.set(&name("b"), None);
        assert_eq!(moved.target(&name("b")), None);
        moved.set(&name("a"), None);
        moved.put(folder.path()).unwrap();
        assert!(!folder.path().join(MOVED).exists());
        moved.put(folder.path()).unwrap();
        for bad in ["", "{}", r#"{"version":2,"disks":[]}"#, r#"{"version":1,"disks":[{"name":"../x","target":"y"}]}"#]
        {
            fs::write(folder.path().join(MOVED), bad).unwrap();
            assert!(matches!(Moved::read(folder.path()), Err(FolderError::Malformed { .. })), "{bad}");
        }
        fs::remove_file(folder.path().join(MOVED)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join(MOVED)).unwrap();
        assert!(Moved::read(folder.path()).is_err());
    }
}
