//! A disk of a restore point of another vault.

use std::sync::Arc;

use reseal_format::manifest::Disk;
use reseal_vault::disk::{DiskReader, with_scratch};
use reseal_vault::{VaultError, Wait};

use super::Still;
use crate::BackupError;

/// A disk that is read as the vault has it.
pub struct PointSource {
    reader: Arc<DiskReader>,
    disk: Disk,
    name: String,
}

impl PointSource {
    /// A disk of a point, which is called that.
    pub fn new(reader: Arc<DiskReader>, disk: Disk, name: String) -> PointSource {
        PointSource { reader, disk, name }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that are no holes.
    pub fn used(&self) -> u64 {
        self.disk.used()
    }
}

impl Still for PointSource {
    fn length(&self) -> u64 {
        self.disk.length
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BackupError> {
        let read = with_scratch(0, |tools, _| self.reader.read(&self.disk, offset, buf, Wait::May, tools));
        read.map_err(|source| BackupError::Copied { source })
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>, BackupError> {
        let found = || -> Result<Option<(u64, u64)>, VaultError> {
            let Some(start) = self.reader.next_data(&self.disk, offset)?.filter(|start| *start < self.disk.length)
            else {
                return Ok(None);
            };
            let end = self.reader.next_hole(&self.disk, start)?.min(self.disk.length);
            Ok(Some((start, end)))
        };
        found().map_err(|source| BackupError::Copied { source })
    }
}
