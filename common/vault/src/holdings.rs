//! What a vault's tenants have, as far as names and sizes tell; and removing a tenant that has nothing.

use std::sync::Arc;

use reseal_format::layout::{self, PointFile, parse_point_file};
use reseal_format::names::{TenantName, VmName};
use reseal_store::{Store, StoreError};

use crate::leases::{Holder, exclusive, holders};
use crate::notes::NoteNames;
use crate::quota::used;
use crate::record::Record;
use crate::{PackFile, VaultError};

/// The tenants that have a folder, sorted by name. What is no name of a tenant is nobody's.
pub fn tenants(store: &dyn Store) -> Result<Vec<TenantName>, VaultError> {
    let entries = store.list(layout::TENANTS)?;
    let folders = entries.iter().filter(|entry| entry.is_folder);
    let mut names: Vec<_> = folders.filter_map(|entry| TenantName::from_key(&entry.name)).collect();
    names.sort();
    Ok(names)
}

/// Names and sizes of what a tenant has, from listings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Each VM with its restore points that were not forgotten, the forgotten ones, and notes.
    pub vms: Vec<VmHoldings>,
    /// Packs of all generations.
    pub packs: usize,
    /// What a quota counts of them.
    pub pack_bytes: u64,
    /// Bytes of all objects.
    pub bytes: u64,
    /// Keys of all objects but the tenant record.
    keys: Vec<String>,
}

/// What a VM has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmHoldings {
    pub name: VmName,
    pub points: usize,
    pub forgotten: usize,
    /// Its notes of which the latest counts.
    pub notes: NoteNames,
}

impl Holdings {
    /// Lists what a tenant has.
    pub fn of(store: &dyn Store, tenant: &TenantName) -> Result<Holdings, VaultError> {
        let mut holdings = Holdings::default();
        let vms = layout::vms(tenant);
        for entry in store.list(&vms)?.iter().filter(|entry| entry.is_folder) {
            let Some(name) = VmName::from_key(&entry.name) else { continue };
            let (mut points, mut forgotten) = (Vec::new(), Vec::new());
            for (object, length) in holdings.add_all(store, &layout::vm(tenant, &name))? {
                holdings.bytes += length;
                match parse_point_file(&object) {
                    Some(PointFile::Manifest(number)) => points.push(number),
                    Some(PointFile::Tombstone(number)) => forgotten.push(number),
                    None => {}
                }
            }
            let noted = holdings.add_all(store, &layout::notes(tenant, &name))?;
            holdings.bytes += noted.iter().map(|(_, length)| length).sum::<u64>();
            let notes = NoteNames::of(noted.iter().map(|(object, _)| object.as_str()));
            points.retain(|number| !forgotten.contains(number));
            holdings.vms.push(VmHoldings { name, points: points.len(), forgotten: forgotten.len(), notes });
        }
        for (_, length) in holdings.add_all(store, &layout::gc(tenant))? {
            holdings.bytes += length;
        }
        let mut counted = Vec::new();
        let packs = layout::packs(tenant);
        for shelf in store.list(&packs)?.iter().filter(|entry| entry.is_folder) {
            for (object, length) in holdings.add_all(store, &format!("{packs}{}/", shelf.name))? {
                let pack = layout::parse_pack_file(&object);
                counted.extend(pack.map(|(id, generation)| PackFile { id, generation, length }));
                holdings.bytes += length;
            }
        }
        (holdings.packs, holdings.pack_bytes) = (counted.len(), used(&counted));
        holdings.vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(holdings)
    }

    /// Restore points that were not forgotten.
    pub fn points(&self) -> usize {
        self.vms.iter().map(|vm| vm.points).sum()
    }

    /// Takes note of the objects directly in a folder; their names and lengths.
    fn add_all(&mut self, store: &dyn Store, folder: &str) -> Result<Vec<(String, u64)>, VaultError> {
        let mut found = Vec::new();
        for entry in store.list(folder)?.into_iter().filter(|entry| !entry.is_folder) {
            self.keys.push(format!("{folder}{}", entry.name));
            found.push((entry.name, entry.length));
        }
        Ok(found)
    }
}

impl Record {
    /// Removes a tenant that has no restore points, with all that is left of it: what backups left unfinished, and what was
    /// forgotten. The record goes last, so this may be repeated until it succeeds. It is refused while a process has its keys.
    ///
    /// Of a tenant that was erased everything is removed, for nothing of it can be read.
    pub fn remove(&self) -> Result<usize, VaultError> {
        let store: &Arc<dyn Store> = &self.store;
        // Before the others are looked for: see `Tenant::lease`.
        let remover = Holder::this_process(format!("removal of tenant {}", self.name));
        let alone = exclusive(&**store, &self.name, &layout::remove_lease(&self.name), &remover)?;
        // What processes that died have left goes with this.
        for held in holders(&**store, &self.name)? {
            // Without keys nobody can be fenced; of a tenant that was erased nothing counts.
            if !held.end(&**store, self.record.erased.is_some())? {
                return Err(VaultError::Busy { tenant: self.name.clone(), who: held.to_string() });
            }
        }
        let removed = {
            let holdings = Holdings::of(&**store, &self.name)?;
            self.check_empty(&holdings)?;
            for key in &holdings.keys {
                match store.delete(key) {
                    Err(StoreError::NotFound(_)) => {}
                    other => other?,
                }
            }
            holdings.keys.len()
        };
        // What a backup has committed since would now be damaged; with its record it can at least be named.
        self.check_empty(&Holdings::of(&**store, &self.name)?)?;
        // Before the record: folders without it would look like a tenant whose record was lost.
        store.remove_empty(&layout::tenant(&self.name))?;
        if !self.is_current() {
            return Err(StoreError::Changed(self.key()).into());
        }
        store.delete(&self.key())?;
        drop(alone);
        store.remove_empty(&layout::tenant(&self.name))?;
        Ok(removed + 1)
    }

    fn check_empty(&self, holdings: &Holdings) -> Result<(), VaultError> {
        match holdings.points() {
            0 => Ok(()),
            _ if self.record.erased.is_some() => Ok(()),
            points => Err(VaultError::NotEmptyTenant { tenant: self.name.clone(), points }),
        }
    }
}
