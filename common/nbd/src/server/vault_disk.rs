//! A disk of a restore point as a disk to be served.

use std::sync::Arc;

use reseal_cli::human_bytes;
use reseal_format::geometry::{CLUSTER_U64, cluster_count};
use reseal_format::manifest;
use reseal_vault::disk::{DiskReader, with_scratch};
use reseal_vault::{Point, VaultError, Wait};

use super::point_name::export_name;
use super::{Disk, DiskError, Stretch};

/// Most bytes that one wish for a cache prepares: more would drive out what others read.
const MOST_CACHED: u64 = 8 << 20;

/// One disk of an opened point, decrypted as it is read.
pub struct VaultDisk {
    reader: Arc<DiskReader>,
    point: Arc<Point>,
    nth: usize,
    name: String,
    is_fixed: bool,
}

impl VaultDisk {
    /// The disk of that place in the manifest, if there is one. `is_fixed`: the name by which it was asked for will never
    /// mean another point.
    pub fn new(reader: Arc<DiskReader>, point: Arc<Point>, nth: usize, is_fixed: bool) -> Option<VaultDisk> {
        let manifest = &point.manifest;
        let name = export_name(&manifest.vm, manifest.number, &manifest.disks.get(nth)?.name);
        Some(VaultDisk { reader, point, nth, name, is_fixed })
    }

    fn disk(&self) -> &manifest::Disk {
        &self.point.manifest.disks[self.nth]
    }
}

/// When a point was made and how large its disk is, for people.
pub(super) fn describe(point: &Point, disk: &manifest::Disk) -> String {
    format!("{}, {}", point.manifest.created, human_bytes(disk.length))
}

fn failed(error: VaultError) -> DiskError {
    // Whatever is wrong, with the store, the keys or the bytes: what was asked for can't be read.
    DiskError::io(error.to_string())
}

impl Disk for VaultDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> Option<String> {
        Some(describe(&self.point, self.disk()))
    }

    fn length(&self) -> u64 {
        self.disk().length
    }

    fn is_fixed(&self) -> bool {
        self.is_fixed
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        with_scratch(0, |tools, _| self.reader.read(self.disk(), offset, out, Wait::May, tools)).map_err(failed)
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Option<Result<(), DiskError>> {
        let read = with_scratch(0, |tools, _| self.reader.read(self.disk(), offset, out, Wait::MustNot, tools));
        match read {
            Err(VaultError::WouldBlock) => None,
            other => Some(other.map_err(failed)),
        }
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        let (mut at, end) = (offset, offset + length);
        let mut found = Vec::new();
        while at < end && found.len() < most {
            let (hole, next) = self.reader.stretch(self.disk(), at, end).map_err(failed)?;
            found.push(Stretch { length: next - at, hole });
            at = next;
        }
        Ok(found)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let end = offset + length.min(MOST_CACHED);
        let clusters = offset / CLUSTER_U64..cluster_count(end);
        with_scratch(0, |tools, _| self.reader.prepare(self.disk(), clusters, tools)).map_err(failed)
    }
}
