//! A disk as it is served to the program that writes the image, which remembers why it could not be read.

use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::manifest::Manifest;
use reseal_nbd::server::{Disk, DiskError, Exports, Listed, NotOpened, Stretch};
use reseal_vault::disk::with_scratch;
use reseal_vault::{VaultError, Wait};

use crate::disks::{DiskOf, Disks};

/// A disk of a restore point, for one client.
pub(super) struct ServedDisk {
    disks: Disks,
    manifest: Manifest,
    nth: usize,
    failure: Mutex<Option<VaultError>>,
}

impl ServedDisk {
    pub(super) fn new(disks: &Disks, of: DiskOf<'_>) -> ServedDisk {
        ServedDisk { disks: disks.clone(), manifest: of.manifest().clone(), nth: of.nth(), failure: Mutex::new(None) }
    }

    /// The first thing that could not be read.
    pub(super) fn take_failure(&self) -> Option<VaultError> {
        self.failure.lock().take()
    }

    fn of(&self) -> Result<DiskOf<'_>, DiskError> {
        DiskOf::new(&self.manifest, self.nth).ok_or_else(|| DiskError::io("the restore point has no such disk"))
    }

    fn failed(&self, error: VaultError) -> DiskError {
        let told = DiskError::io(error.to_string());
        self.failure.lock().get_or_insert(error);
        told
    }
}

impl Disk for ServedDisk {
    fn name(&self) -> &str {
        self.manifest.disks.get(self.nth).map_or("", |disk| disk.name.as_str())
    }

    fn length(&self) -> u64 {
        self.manifest.disks.get(self.nth).map_or(0, |disk| disk.length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let of = self.of()?;
        let read = with_scratch(0, |tools, _| self.disks.read_on(of, offset, out, &mut 0, Wait::May, tools));
        read.map_err(|e| self.failed(e))
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        let (mut at, end) = (offset, offset + length);
        let mut found = Vec::new();
        while at < end && found.len() < most {
            let (hole, next) = self.disks.stretch(self.of()?, at, end).map_err(|e| self.failed(e))?;
            found.push(Stretch { length: next - at, hole });
            at = next;
        }
        Ok(found)
    }
}

/// That disk by whatever name.
pub(super) struct OneExport(pub(super) Arc<ServedDisk>);

impl Exports for OneExport {
    fn open(&self, _name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        Ok(self.0.clone())
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        Ok(vec![Listed { name: self.0.name().to_owned(), description: String::new() }])
    }
}
