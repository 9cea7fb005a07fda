//! The libraries under the programs: for what a command line can't show, such as single reads of a store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::manifest::{Disk, Manifest};
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_kms::{Keyring, Kms};
use reseal_store::{Bucket, Local, Store, is_address};
use reseal_vault::disk::{DiskReader, Tools};
use reseal_vault::heads::Heads;
use reseal_vault::{Tenant, VaultError, Wait};
use reseal_writer::BackupError;
use reseal_writer::backup::{Backup, CopyOf, Disks, Encoding, Input, Vault};
use reseal_writer::source::Source;

use crate::model::ReadDisk;
use crate::site::Site;

/// Bytes of cache that a reader of a test has.
const CACHE: usize = 8 << 20;

/// A name of a VM.
pub fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

impl Site {
    /// The vault as a store.
    pub fn store(&self) -> Arc<dyn Store> {
        match self.vault.to_str().filter(|vault| is_address(vault)) {
            Some(address) => Arc::new(Bucket::open_with(address, &self.variables).unwrap()),
            None => Arc::new(Local::new(&self.vault)),
        }
    }

    /// Opens the tenant in this process.
    pub fn tenant(&self) -> Arc<Tenant> {
        self.tenant_in(self.store()).unwrap()
    }

    /// Opens the tenant in that store, which holds this site's vault.
    pub fn tenant_in(&self, store: Arc<dyn Store>) -> Result<Arc<Tenant>, VaultError> {
        let keyring = Keyring::open(&self.keyring, |_| Err(std::io::ErrorKind::NotFound.into()))?;
        self.tenant_of(store, Arc::new(keyring))
    }

    /// The same with that KMS.
    pub fn tenant_of(&self, store: Arc<dyn Store>, kms: Arc<dyn Kms>) -> Result<Arc<Tenant>, VaultError> {
        let name = TenantName::new("default").unwrap();
        Ok(Arc::new(Tenant::open(store, "vault", &name, kms)?))
    }

    /// What this site remembers.
    pub fn heads(&self, tenant: &Tenant) -> Heads {
        Heads::new(&self.state, &tenant.keys().scope(), false)
    }
}

/// Backs up one disk in this process. There is no lookup at `state`: one that a process opens stays open in it.
pub fn backup(tenant: &Arc<Tenant>, heads: &Heads, name: &str, disk: &Path) -> Result<Manifest, BackupError> {
    backup_as(tenant, heads, vm(name), DiskName::new("disk-0").unwrap(), disk, None)
}

/// The same of a disk of that name, as what a copy of another vault's point would be.
pub fn backup_as(
    tenant: &Arc<Tenant>,
    heads: &Heads,
    vm: VmName,
    name: DiskName,
    disk: &Path,
    copy_of: Option<CopyOf>,
) -> Result<Manifest, BackupError> {
    let backup = Backup {
        vm,
        disks: Disks::Given(vec![Input { name, source: Source::open(disk)?, said: None, tracking: None }]),
        definition: None,
        copy_of,
        encoding: Encoding::DEFAULT,
        throttle: None,
        expect: &|_| (),
        say: &|_| (),
        workers: 2,
        progress: &|_| {},
    };
    let to = Vault { tenant: tenant.clone(), heads, state: PathBuf::from("/dev/null/no-lookup") };
    Ok(backup.run(to)?.manifest)
}

/// A disk of a restore point, read without FUSE.
pub struct LibraryDisk {
    reader: DiskReader,
    disk: Disk,
}

impl LibraryDisk {
    /// Opens a disk of a point.
    pub fn open(tenant: &Arc<Tenant>, name: &str, number: u32, disk: &str) -> Result<LibraryDisk, VaultError> {
        let point = tenant.point(&vm(name), number)?;
        let found = point.manifest.disks.into_iter().find(|found| found.name.as_str() == disk);
        Ok(LibraryDisk {
            reader: DiskReader::new(tenant.clone(), CACHE),
            disk: found.expect("the point has that disk"),
        })
    }

    /// Reads a range, or tells why not.
    pub fn try_read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), VaultError> {
        self.reader.read(&self.disk, offset, bytes, Wait::May, &mut Tools::new())
    }

    /// The whole disk, which must be small.
    pub fn all(&self) -> Result<Vec<u8>, VaultError> {
        let mut bytes = vec![0xEE; usize::try_from(self.disk.length).unwrap()];
        self.try_read(0, &mut bytes)?;
        Ok(bytes)
    }
}

impl ReadDisk for LibraryDisk {
    fn length(&self) -> u64 {
        self.disk.length
    }

    fn extents(&self) -> Vec<(u64, u64)> {
        let mut extents = Vec::new();
        let mut at = 0;
        while let Some(start) = self.reader.next_data(&self.disk, at).unwrap().filter(|&start| start < self.disk.length)
        {
            at = self.reader.next_hole(&self.disk, start).unwrap();
            extents.push((start, at));
        }
        extents
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.try_read(offset, bytes).unwrap();
    }
}
