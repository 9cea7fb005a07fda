//! The disk's own bytes at a place: a file that stays sparse, or a block device.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::RestoreError;
use crate::target::{OpenPlace, Place};

/// `BLKZEROOUT` of `linux/fs.h`: the device, or the kernel for it, writes zeros.
const BLKZEROOUT: libc::Ioctl = 0x127f;
/// Most zeros of one request, so that an interrupt is heeded in between.
const ZERO_AT_ONCE: u64 = 256 << 20;

/// A target that is being written. Dropped unfinished, a file that was made for it is removed.
pub(super) struct RawTarget(OpenPlace);

impl RawTarget {
    /// Opens it for writing a disk of that length.
    pub(super) fn open(place: Place, path: &Path, length: u64) -> Result<RawTarget, RestoreError> {
        let open = place.open(path, length)?;
        open.set_length(length)?;
        Ok(RawTarget(open))
    }

    /// Whether what is not written keeps what was there before: zeros must be written too.
    pub(super) fn needs_zeros(&self) -> bool {
        self.0.is_device()
    }

    /// Writes bytes at their place.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        Ok(self.0.file().write_all_at(bytes, offset).map_err(self.0.failed("write"))?)
    }

    /// Has what was written there sent to the disk soon, so that the end does not wait for all of it at once.
    pub(super) fn start_writing_back(&self, offset: u64, length: usize) {
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return };
        // SAFETY: the descriptor is open; the call takes numbers only. It is a hint, so its result does not matter.
        unsafe { libc::sync_file_range(self.0.file().as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
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
            let result = unsafe { libc::ioctl(self.0.file().as_raw_fd(), BLKZEROOUT, range.as_ptr()) };
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
    pub(super) fn finish(self) -> Result<(), RestoreError> {
        Ok(self.0.finish()?)
    }
}
