//! Where a disk is written to: a file that stays sparse, or a block device that nobody else uses.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::RestoreError;

/// `BLKZEROOUT` of `linux/fs.h`: the device, or the kernel for it, writes zeros.
const BLKZEROOUT: libc::Ioctl = 0x127f;
/// Most zeros of one request, so that an interrupt is heeded in between.
const ZERO_AT_ONCE: u64 = 256 << 20;

/// What stands at the path, once it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing: a file will be made.
    New,
    /// A file that will be overwritten.
    Old,
    /// A block device that will be overwritten.
    Device,
}

impl Target {
    /// Looks at a target without changing it.
    pub(super) fn check(path: &Path, length: u64, force: bool) -> Result<Target, RestoreError> {
        let owned = || path.to_owned();
        let data = match std::fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Target::New),
            Err(source) => return Err(RestoreError::Target { path: owned(), action: "look at", source }),
            Ok(data) => data,
        };
        if data.file_type().is_block_device() {
            if !force {
                return Err(RestoreError::DeviceNeedsForce { path: owned() });
            }
            open_device(path, length)?;
            return Ok(Target::Device);
        }
        match (data.is_file(), force) {
            (false, _) => Err(RestoreError::NotAFile { path: owned() }),
            (true, false) => Err(RestoreError::Exists { path: owned() }),
            (true, true) => Ok(Target::Old),
        }
    }

    /// Opens it for writing a disk of that length.
    pub(super) fn open(self, path: &Path, length: u64) -> Result<OpenTarget, RestoreError> {
        let failed = |action| move |source| RestoreError::Target { path: path.to_owned(), action, source };
        let (file, made) = match self {
            Target::New => {
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
                (file.map_err(failed("make"))?, Some(Made { unfinished: Some(path.to_owned()) }))
            }
            // The inode stays, with its owner and mode; what it held goes, so that holes are holes.
            Target::Old => (OpenOptions::new().write(true).truncate(true).open(path).map_err(failed("open"))?, None),
            Target::Device => (open_device(path, length)?, None),
        };
        let target = OpenTarget { file, path: path.to_owned(), is_device: self == Target::Device, made };
        if !target.is_device {
            target.file.set_len(length).map_err(failed("set the length of"))?;
        }
        Ok(target)
    }
}

/// Opens a device that nobody has mounted or otherwise claimed.
fn open_device(path: &Path, length: u64) -> Result<File, RestoreError> {
    let owned = || path.to_owned();
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::EBUSY) => RestoreError::DeviceBusy { path: owned() },
        _ => RestoreError::Target { path: owned(), action: "open", source },
    };
    let mut file = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(path).map_err(failed)?;
    let has = file.seek(SeekFrom::End(0)).map_err(failed)?;
    match has < length {
        true => Err(RestoreError::TooSmall { path: owned(), has, needs: length }),
        false => Ok(file),
    }
}

/// A file that this restore has made: it goes, unless it was finished.
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

/// A target that is being written. Dropped unfinished, a file that was made for it is removed.
pub(super) struct OpenTarget {
    file: File,
    path: PathBuf,
    is_device: bool,
    made: Option<Made>,
}

impl OpenTarget {
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> RestoreError {
        let path = self.path.clone();
        move |source| RestoreError::Target { path, action, source }
    }

    /// Whether what is not written keeps what was there before: zeros must be written too.
    pub(super) fn needs_zeros(&self) -> bool {
        self.is_device
    }

    /// Writes bytes at their place.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        self.file.write_all_at(bytes, offset).map_err(self.failed("write"))
    }

    /// Has what was written there sent to the disk soon, so that the end does not wait for all of it at once.
    pub(super) fn start_writing_back(&self, offset: u64, length: usize) {
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return };
        // SAFETY: the descriptor is open; the call takes numbers only. It is a hint, so its result does not matter.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    }

    /// Makes a part of a device zeros. `go_on` is asked in between.
    pub(super) fn zero(
        &self,
        from: u64,
        to: u64,
        go_on: &dyn Fn() -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let mut at = from;
        while at < to {
            go_on()?;
            let range = [at, (to - at).min(ZERO_AT_ONCE)];
            // SAFETY: `BLKZEROOUT` reads two u64, offset and length, which is what it is given.
            let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, range.as_ptr()) };
            if result != 0 {
                self.write_zeros(range[0], range[1])?;
            }
            at += range[1];
        }
        Ok(())
    }

    /// For a device that refuses the request, or a part that is not a multiple of its sectors.
    fn write_zeros(&self, from: u64, length: u64) -> Result<(), RestoreError> {
        let zeros = vec![0; 1 << 20];
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(zeros.len());
            self.write(from + done, &zeros[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    /// Makes everything durable. The file stays.
    pub(super) fn finish(mut self) -> Result<(), RestoreError> {
        self.file.sync_all().map_err(self.failed("sync"))?;
        if let Some(mut made) = self.made.take() {
            if let Some(folder) = self.path.parent() {
                let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
                File::open(folder).and_then(|folder| folder.sync_all()).map_err(self.failed("sync the folder of"))?;
            }
            made.unfinished = None;
        }
        Ok(())
    }
}
