//! What stands at a path: nothing, a file, or a block device that nobody else uses.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::TargetError;

/// What stands at the path, once it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing: a file will be made.
    New,
    /// A file that will be overwritten.
    Old,
    /// A block device that will be overwritten.
    Device,
}

impl Place {
    /// Looks at it without changing it. `needs`: bytes that a device must have.
    pub(crate) fn check(path: &Path, needs: u64, force: bool) -> Result<Place, TargetError> {
        let owned = || path.to_owned();
        let data = match std::fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Place::New),
            Err(source) => return Err(TargetError::Io { path: owned(), action: "look at", source }),
            Ok(data) => data,
        };
        if data.file_type().is_block_device() {
            if !force {
                return Err(TargetError::DeviceNeedsForce { path: owned() });
            }
            open_device(path, needs)?;
            return Ok(Place::Device);
        }
        match (data.is_file(), force) {
            (false, _) => Err(TargetError::NotAFile { path: owned() }),
            (true, false) => Err(TargetError::Exists { path: owned() }),
            (true, true) => Ok(Place::Old),
        }
    }

    /// Takes it: a new file is private, an old one is emptied, a device is nobody else's meanwhile.
    pub(crate) fn open(self, path: &Path, needs: u64) -> Result<OpenPlace, TargetError> {
        let failed = |action| move |source| TargetError::Io { path: path.to_owned(), action, source };
        let (file, made) = match self {
            Place::New => {
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
                (file.map_err(failed("make"))?, Some(Made { unfinished: Some(path.to_owned()) }))
            }
            // The inode stays, with its owner and mode; what it held goes, so that holes are holes.
            Place::Old => (OpenOptions::new().write(true).truncate(true).open(path).map_err(failed("open"))?, None),
            Place::Device => (open_device(path, needs)?, None),
        };
        Ok(OpenPlace { file, path: path.to_owned(), is_device: self == Place::Device, made })
    }
}

/// Opens a device that nobody has mounted or otherwise claimed.
fn open_device(path: &Path, needs: u64) -> Result<File, TargetError> {
    let owned = || path.to_owned();
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::EBUSY) => TargetError::DeviceBusy { path: owned() },
        _ => TargetError::Io { path: owned(), action: "open", source },
    };
    let mut file = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(path).map_err(failed)?;
    let has = file.seek(SeekFrom::End(0)).map_err(failed)?;
    match has < needs {
        true => Err(TargetError::TooSmall { path: owned(), has, needs }),
        false => Ok(file),
    }
}

/// A file that was made: it goes, unless it was finished.
struct Made {
    unfinished: Option<PathBuf>,
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = &self.unfinished {
            // If it can't be removed, the error that led here is what the user must know first.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A place that was taken. Dropped unfinished, a file that was made for it is removed.
pub(crate) struct OpenPlace {
    file: File,
    path: PathBuf,
    is_device: bool,
    made: Option<Made>,
}

impl OpenPlace {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn is_device(&self) -> bool {
        self.is_device
    }

    pub(crate) fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> TargetError + use<> {
        let path = self.path.clone();
        move |source| TargetError::Io { path, action, source }
    }

    /// Gives a file that length, as a hole; a device has its own.
    pub(crate) fn set_length(&self, length: u64) -> Result<(), TargetError> {
        match self.is_device {
            true => Ok(()),
            false => self.file.set_len(length).map_err(self.failed("set the length of")),
        }
    }

    /// Makes everything durable, the file's name too.
    pub(crate) fn sync(&self) -> Result<(), TargetError> {
        self.file.sync_all().map_err(self.failed("sync"))?;
        if let (Some(_), Some(folder)) = (&self.made, self.path.parent()) {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(self.failed("sync the folder of"))?;
        }
        Ok(())
    }

    /// The same, and the file stays.
    pub(crate) fn finish(mut self) -> Result<(), TargetError> {
        self.sync()?;
        if let Some(made) = &mut self.made {
            made.unfinished = None;
        }
        Ok(())
    }
}
