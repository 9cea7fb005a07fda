//! Where disks are read: in a vault that this process has the keys of, or through another site that has them.
//!
//! ```text
//! Here:  range → clusters → leaf → blob → frames → bytes                         (reseal_vault::disk)
//! There: range → holes that are known: zeros                                     (extents)
//!              → blocks that are at hand                                         (block)
//!              → asked for once, whoever wants them ⇉ NBD ⇉ block → all who wait   (remote, opening)
//!        which disks have connections                                            (there)
//! ```
//!
//! Architecture invariant: what is read here costs nothing for there being another way: one comparison a request.

mod block;
mod extents;
mod opening;
mod remote;
mod there;
mod trouble;

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use reseal_format::geometry::ClusterIndex;
use reseal_format::manifest::{Disk, Manifest};
use reseal_vault::disk::{DiskReader, Tools};
use reseal_vault::{Tenant, VaultError, Wait};

pub use there::{Opens, There};

/// How far ahead of the kernel's own readahead clusters are prepared here: it hides 50 ms of delay at 80 MB/s, and is a
/// small part of the cache.
const WINDOW: u64 = 4 << 20;
/// How far that may grow for a reader who has to wait all the same.
const MOST_WINDOW: u64 = 64 << 20;
/// The same of an object store with a cache on a disk: a request takes 20 ms and more, and what it brings waits there. With 64 MiB at most a
/// stream stood still for a quarter of its time.
const FAR_WINDOW: u64 = 16 << 20;
const MOST_FAR_WINDOW: u64 = 256 << 20;
/// Manifests that are opened at a time: enough to hide the delay of an object store behind one another.
const OPENERS: usize = 16;
/// Stretches of a restore that are under way where each waits for a long line.
const READERS: usize = 16;

/// A disk of a restore point.
#[derive(Clone, Copy)]
pub struct DiskOf<'a> {
    manifest: &'a Manifest,
    nth: usize,
    disk: &'a Disk,
}

impl<'a> DiskOf<'a> {
    /// The disk of that place in the manifest.
    pub fn new(manifest: &'a Manifest, nth: usize) -> Option<DiskOf<'a>> {
        Some(DiskOf { manifest, nth, disk: manifest.disks.get(nth)? })
    }

    /// All disks of a manifest.
    pub fn all(manifest: &'a Manifest) -> impl Iterator<Item = DiskOf<'a>> {
        manifest.disks.iter().enumerate().map(move |(nth, disk)| DiskOf { manifest, nth, disk })
    }

    /// The restore point that it is of.
    pub fn manifest(self) -> &'a Manifest {
        self.manifest
    }

    /// Its place in the manifest.
    pub fn nth(self) -> usize {
        self.nth
    }

    /// What the manifest says of it.
    pub fn disk(self) -> &'a Disk {
        self.disk
    }

    /// How many of `length` bytes from `offset` on it has.
    pub fn clip(self, offset: u64, length: usize) -> usize {
        DiskReader::clip(self.disk, offset, length)
    }
}

/// What a sequential reader is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// How far ahead of it is read at first.
    pub window: u64,
    /// How far at most, where it has to wait all the same.
    pub most: u64,
    /// Whether it is read ahead of always, and not only after it had to wait.
    pub is_always: bool,
}

/// Reads disks.
#[derive(Clone)]
pub enum Disks {
    Here(Arc<DiskReader>),
    There(Arc<There>),
}

impl Disks {
    /// Those of a tenant; at most about so many bytes are kept.
    pub fn here(tenant: Arc<Tenant>, cache_bytes: usize) -> Disks {
        Disks::Here(Arc::new(DiskReader::new(tenant, cache_bytes)))
    }

    /// Fills `out` from `offset` and byte `done` of it on, which grows with what is filled. With [`Wait::MustNot`] it answers
    /// [`VaultError::WouldBlock`] where it might have to wait.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn read_on(
        &self,
        of: DiskOf<'_>,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        match self {
            Disks::Here(reader) => reader.read_on(of.disk, offset, out, done, wait, tools),
            Disks::There(there) => there.read_on(of, offset, out, done, wait),
        }
    }

    /// The same for what would have to wait, and may.
    pub fn read_waiting(
        &self,
        of: DiskOf<'_>,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        tools: &mut Tools,
    ) -> Result<(), VaultError> {
        if let Disks::Here(reader) = self {
            let missing = ClusterIndex::of_byte(offset + *done as u64).0;
            // What fails here fails again below, unless there is a way around it.
            let _ = reader.prepare(of.disk, missing..missing + 1, tools);
        }
        self.read_on(of, offset, out, done, Wait::May, tools)
    }

    /// Prepares for clusters that who reads in order will want soon. May wait.
    pub fn prepare(&self, of: DiskOf<'_>, clusters: Range<u64>, tools: &mut Tools) -> Result<(), VaultError> {
        match self {
            Disks::Here(reader) => reader.prepare_stream(of.disk, clusters, tools),
            Disks::There(there) => there.prepare(of, clusters),
        }
    }

    /// Where data begins at or after `offset`; `None` if only holes follow.
    pub fn next_data(&self, of: DiskOf<'_>, offset: u64) -> Result<Option<u64>, VaultError> {
        match self {
            Disks::Here(reader) => reader.next_data(of.disk, offset),
            Disks::There(there) => there.next_data(of, offset),
        }
    }

    /// Where a hole begins at or after `offset`, which must be on the disk; its end counts as one.
    pub fn next_hole(&self, of: DiskOf<'_>, offset: u64) -> Result<u64, VaultError> {
        match self {
            Disks::Here(reader) => reader.next_hole(of.disk, offset),
            Disks::There(there) => there.next_hole(of, offset),
        }
    }

    /// Whether there is a hole at `offset`, and up to where, at most `end`, it is so.
    pub fn stretch(&self, of: DiskOf<'_>, offset: u64, end: u64) -> Result<(bool, u64), VaultError> {
        match self {
            Disks::Here(reader) => reader.stretch(of.disk, offset, end),
            Disks::There(there) => match there.next_data(of, offset)? {
                Some(data) if data == offset => Ok((false, there.next_hole(of, offset)?.min(end))),
                data => Ok((true, data.unwrap_or(end).min(end))),
            },
        }
    }

    /// Somebody is about to read a disk: where each request takes long, what leads to its clusters is fetched in the background.
    pub fn warm(&self, manifest: &Manifest, nth: usize) {
        if let Disks::Here(reader) = self
            && let Some(disk) = manifest.disks.get(nth)
        {
            reader.warm_later(disk);
        }
    }

    /// How sequential readers are read ahead of.
    pub fn reach(&self) -> Reach {
        match self {
            Disks::Here(reader) if reader.fetches_aside() => {
                Reach { window: FAR_WINDOW, most: MOST_FAR_WINDOW, is_always: false }
            }
            Disks::Here(_) => Reach { window: WINDOW, most: MOST_WINDOW, is_always: false },
            Disks::There(there) => Reach { window: there.window(), most: there.window(), is_always: true },
        }
    }

    /// How many readers at a time make a whole disk come fastest: as many as cores that open blobs, or enough to fill a
    /// line.
    pub fn readers(&self) -> usize {
        match self {
            Disks::Here(reader) if !reader.is_far() => thread::available_parallelism().map_or(1, usize::from),
            Disks::Here(_) | Disks::There(_) => READERS,
        }
    }

    /// How many threads open many manifests: enough to hide the delay of a store, while a site answers many questions at once.
    pub fn openers(&self) -> usize {
        match self {
            Disks::Here(_) => OPENERS,
            Disks::There(_) => 1,
        }
    }

    /// Whoever waits for another site waits no longer.
    pub fn stop(&self) {
        if let Disks::There(there) = self {
            there.stop();
        }
    }
}
