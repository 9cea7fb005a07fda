//! What an overlay is kept on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};

/// A file, or what behaves like one.
pub trait Medium: Send + Sync {
    /// Its length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Fills `out`. What was never written reads as zeros, or is past the end.
    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()>;

    /// Writes all of it.
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;

    /// Makes sure that what is written there later finds room.
    fn reserve(&self, at: u64, length: u64) -> io::Result<()>;

    /// Gives the room back.
    fn punch(&self, at: u64, length: u64) -> io::Result<()>;
}

impl Medium for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(out, at)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self)?)
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        match fallocate(self, FallocateFlags::empty(), at, length) {
            // A file system without it finds out when it is written.
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        match fallocate(self, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length) {
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }
}
