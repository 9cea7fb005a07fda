//! A regular file or a block device that holds the raw bytes of a disk.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use reseal_format::geometry::MAX_DISK;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use super::Still;
use crate::BackupError;

/// A disk that lies still.
pub struct FileSource {
    file: File,
    path: String,
    length: u64,
    before: Version,
}

/// What changes when somebody writes to the source.
#[derive(Debug, PartialEq, Eq)]
enum Version {
    File {
        length: u64,
        modified: (i64, i64),
    },
    /// Sectors written since boot; `None` where the system does not count them.
    Device {
        written: Option<u64>,
    },
}

impl Version {
    fn of(data: &Metadata) -> Version {
        if data.file_type().is_block_device() {
            Version::Device { written: sectors_written(data.rdev()) }
        } else {
            Version::File { length: data.len(), modified: (data.mtime(), data.mtime_nsec()) }
        }
    }
}

/// The counter of written sectors of a block device: the seventh field of its `stat`
/// (Documentation/block/stat.rst of the Linux kernel).
fn sectors_written(device: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    stat.split_whitespace().nth(6)?.parse().ok()
}

impl FileSource {
    /// Opens a disk. Its bytes are the disk's, whatever they look like: whether a file is an image of another format is
    /// decided before (`image::decide`).
    pub fn open(path: &Path) -> Result<FileSource, BackupError> {
        let name = path.display().to_string();
        let failed = |action| {
            let path = name.clone();
            move |source| BackupError::Source { path, action, source }
        };
        // To open a pipe would wait for somebody to write to it.
        let found = std::fs::metadata(path).map_err(failed("open"))?;
        if !found.is_file() && !found.file_type().is_block_device() {
            return Err(BackupError::NotADisk { path: name });
        }
        let file = File::open(path).map_err(failed("open"))?;
        let data = file.metadata().map_err(failed("read"))?;
        let length = if data.file_type().is_block_device() {
            seek(&file, SeekFrom::End(0)).map_err(|e| failed("measure")(e.into()))?
        } else if data.is_file() {
            data.len()
        } else {
            return Err(BackupError::NotADisk { path: name });
        };
        if length > MAX_DISK {
            return Err(BackupError::TooLarge { path: name, length, max: MAX_DISK });
        }
        let source = FileSource { file, length, before: Version::of(&data), path: name };
        // A hint that costs nothing when it is ignored.
        let _ = fadvise(&source.file, 0, None, Advice::Sequential);
        Ok(source)
    }

    /// Its path, as given.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// About how many bytes will be read: what is allocated.
    pub fn expected(&self) -> u64 {
        match (&self.before, self.file.metadata()) {
            (Version::File { .. }, Ok(data)) => self.length.min(data.blocks() * 512),
            _ => self.length,
        }
    }

    /// An error if the file is shorter than when it was opened: what is gone must not count as a hole.
    fn whole(&self) -> Result<(), BackupError> {
        let end = match self.file.metadata() {
            Ok(data) if data.is_file() => data.len(),
            _ => return Ok(()),
        };
        match end < self.length {
            true => Err(BackupError::Shrank { path: self.path.clone(), end, length: self.length }),
            false => Ok(()),
        }
    }

    /// Whether somebody has written to it since it was opened.
    pub fn changed(&self) -> Result<bool, BackupError> {
        let data = self.file.metadata();
        let data = data.map_err(|source| BackupError::Source { path: self.path.clone(), action: "look at", source })?;
        Ok(Version::of(&data) != self.before)
    }
}

impl Still for FileSource {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BackupError> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) => return Err(BackupError::Shrank { path: self.path.clone(), end: at, length: self.length }),
                Ok(got) => done += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(BackupError::Source {
                        path: format!("{} at byte {at}", self.path),
                        action: "read",
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>, BackupError> {
        if offset >= self.length {
            return Ok(None);
        }
        let failed = |e: rustix::io::Errno| BackupError::Source {
            path: self.path.clone(),
            action: "find the holes of",
            source: e.into(),
        };
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return self.whole().map(|()| None),
            // Block devices, and file systems that do not tell: all is data.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => return Ok(Some((offset, self.length))),
            Err(e) => return Err(failed(e)),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?;
        Ok((start < self.length).then(|| (start, end.min(self.length))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(FileSource::open(folder.path()), Err(BackupError::NotADisk { .. })));
    }

    #[test]
    fn holes_are_stepped_over_and_changes_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(&[1; 4096], 3 << 20).unwrap();
        let source = FileSource::open(&path).unwrap();
        let (start, end) = source.next_data(0).unwrap().unwrap();
        assert!(start <= 3 << 20 && end >= (3 << 20) + 4096 && end - start < 1 << 20);
        assert_eq!(source.next_data(end).unwrap(), None);
        assert!(source.is_hole(0, 1 << 20).unwrap() && source.is_hole(9 << 20, 1 << 20).unwrap());
        assert!(!source.is_hole(3 << 20, 4096).unwrap() && !source.is_hole(0, 10 << 20).unwrap());
        assert!(!source.changed().unwrap());
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.write_all_at(&[1; 4096], 0).unwrap();
        assert!(source.changed().unwrap());
        file.set_len(5).unwrap();
        assert!(matches!(source.read_at(0, &mut [0; 10]), Err(BackupError::Shrank { end: 5, .. })));
        assert!(matches!(source.next_data(1 << 20), Err(BackupError::Shrank { end: 5, .. })));
    }
}
