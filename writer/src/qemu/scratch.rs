//! Scratch: where QEMU keeps, for as long as the backup reads, what the guest overwrites. That is guest plaintext, so
//! it is encrypted under a secret that is never written down; and the file has no name, so it goes with its last user.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use zeroize::Zeroizing;

use super::QemuError;
use super::scratch_image::{PASSPHRASE, image};

/// What is reserved at least, if the disk is that long.
const RESERVE: u64 = 1 << 30;
/// Less than this is not worth a reservation.
const LEAST: u64 = 1 << 20;
/// The fill level at which there is an end: what a fast guest writes between two looks at it.
const MARGIN: u64 = 512 << 20;

/// The scratch file of one disk.
pub(super) struct Scratch {
    file: File,
    folder: PathBuf,
    passphrase: Zeroizing<String>,
    reserved: u64,
    /// The longest that it can get.
    most: u64,
    margin: u64,
}

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// What it can still grow by, reserved or free.
    pub(super) left: u64,
    /// What it might still need.
    pub(super) wanted: u64,
    pub(super) margin: u64,
}

impl Room {
    /// Whether the guest might soon see a write fail.
    pub(super) fn is_short(&self) -> bool {
        self.left < self.wanted.min(self.margin)
    }
}

impl Scratch {
    /// Makes one for a disk of `length` bytes, and reserves room for `reserve` bytes of changes, as far as there is.
    pub(super) fn new(folder: &Path, length: u64, reserve: Option<u64>) -> Result<Scratch, QemuError> {
        let failed = |e: io::Error| QemuError::host(format!("make a scratch file in {}", folder.display()), e);
        let mut secret = Zeroizing::new([0; PASSPHRASE / 2]);
        getrandom::fill(&mut *secret).map_err(QemuError::random)?;
        let mut text = Zeroizing::new([0; PASSPHRASE]);
        hex::encode_to_slice(*secret, &mut *text).map_err(|e| QemuError::host("make a secret", io::Error::other(e)))?;
        let passphrase = Zeroizing::new(String::from_utf8_lossy(&*text).into_owned());
        let (bytes, end) = image(length, &text)?;
        let file = nameless(folder).map_err(failed)?;
        file.write_all_at(&bytes, 0).and_then(|()| file.set_len(end)).map_err(failed)?;
        // Tables take a 4,096th of the data; small disks a few clusters.
        let most = end + length + length / 1024 + (4 << 20);
        let mut scratch = Scratch { file, folder: folder.to_owned(), passphrase, reserved: 0, most, margin: MARGIN };
        let room = scratch.room().map_err(failed)?;
        scratch.margin = MARGIN.min(room.left / 4);
        let wish = reserve.unwrap_or((length / 10).max(RESERVE)).saturating_add(end);
        scratch.reserve(wish.min(most).min(end + room.left.saturating_sub(scratch.margin)));
        Ok(scratch)
    }

    /// Takes room from the file system, as much of it as it gives.
    fn reserve(&mut self, mut wish: u64) {
        while wish >= LEAST {
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, wish) {
                Ok(()) => return self.reserved = wish,
                Err(rustix::io::Errno::NOSPC) => wish /= 2,
                // A file system that can't. Its free space is watched all the same.
                Err(_) => return,
            }
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn passphrase(&self) -> &str {
        &self.passphrase
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn room(&self) -> io::Result<Room> {
        let used = self.file.metadata()?.size();
        let system = fstatvfs(&self.file)?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        let left = free.saturating_add(self.reserved.saturating_sub(used));
        Ok(Room { left, wanted: self.most.saturating_sub(used), margin: self.margin })
    }
}

/// A file without a name, for this user only.
fn nameless(folder: &Path) -> io::Result<File> {
    match private().custom_flags(libc::O_TMPFILE).open(folder) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
            soon_nameless(folder)
        }
        other => other,
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// The same where the file system makes no file without a name. A writer that dies just here leaves an empty file.
fn soon_nameless(folder: &Path) -> io::Result<File> {
    let mut name = [0; 16];
    getrandom::fill(&mut name).map_err(|e| io::Error::other(e.to_string()))?;
    let path = folder.join(format!("reseal-scratch-{}", hex::encode(name)));
    let file = private().create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_has_no_name_and_room() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(folder.path(), 8 << 20, None).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let data = scratch.file.metadata().unwrap();
        assert_eq!(data.mode() & 0o777, 0o600);
        assert!(data.blocks() * 512 >= 8 << 20, "room for the whole disk");
        assert!(data.len() < 4 << 20);
        let room = scratch.room().unwrap();
        assert!(room.left >= 8 << 20 && room.wanted <= 20 << 20 && !room.is_short(), "{room:?}");
    }

    #[test]
    fn a_file_can_also_lose_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = soon_nameless(folder.path()).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_can_not_be_needed_is_not_missed() {
        let room = |left, wanted| Room { left, wanted, margin: 100 };
        assert!(room(99, 200).is_short());
        assert!(!room(100, 200).is_short());
        assert!(!room(60, 50).is_short());
        assert!(room(40, 50).is_short());
    }
}
