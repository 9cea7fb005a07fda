//! Which objects of a tenant are sealed under the DEK of which epoch, as trailers and headers say in clear.

use std::collections::BTreeMap;

use reseal_format::FormatError;
use reseal_format::keys::Kind;
use reseal_format::layout::{self, PointFile};
use reseal_format::pack::{TRAILER, Trailer};
use reseal_format::seal::{self, MAX_OBJECT};
use reseal_store::StoreError;

use crate::packs::list_packs;
use crate::{PackFile, Tenant, VaultError};

/// A pack as it is read: the highest of its generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackSeal {
    pub file: PackFile,
    pub kind: Kind,
    pub epoch: u32,
}

/// A manifest, tombstone or note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectSeal {
    pub key: String,
    pub epoch: u32,
    pub length: u64,
}

/// All that a tenant has sealed but the record.
#[derive(Debug, Default)]
pub struct Epochs {
    pub packs: Vec<PackSeal>,
    /// Generations of packs that a higher one has replaced.
    pub superseded: Vec<PackFile>,
    /// Manifests, then tombstones, then notes of each VM.
    pub objects: Vec<ObjectSeal>,
    /// What does not say under which epoch it is.
    pub unknown: Vec<VaultError>,
}

/// Objects of one epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub objects: u64,
    pub bytes: u64,
}

impl Epochs {
    /// Reads the clear part of every object.
    pub fn of(tenant: &Tenant) -> Result<Epochs, VaultError> {
        let mut epochs = Epochs::default();
        epochs.add_packs(tenant)?;
        for vm in tenant.vms()? {
            let folder = layout::vm(&tenant.name, &vm);
            let (mut manifests, mut tombstones) = (Vec::new(), Vec::new());
            for entry in tenant.store.list(&folder)? {
                match layout::parse_point_file(&entry.name) {
                    Some(PointFile::Manifest(_)) => manifests.push(entry.name),
                    Some(PointFile::Tombstone(_)) => tombstones.push(entry.name),
                    None => {}
                }
            }
            let notes = layout::notes(&tenant.name, &vm);
            let in_folder = manifests.into_iter().chain(tombstones).map(|name| format!("{folder}{name}"));
            let in_notes = tenant.store.list(&notes)?.into_iter().map(|entry| entry.name);
            let in_notes = in_notes.filter(|name| layout::parse_note_file(name).is_some());
            for key in in_folder.chain(in_notes.map(|name| format!("{notes}{name}"))) {
                epochs.add_object(tenant, key)?;
            }
        }
        Ok(epochs)
    }

    fn add_packs(&mut self, tenant: &Tenant) -> Result<(), VaultError> {
        let mut files = list_packs(&*tenant.store, &tenant.name)?;
        files.sort_unstable();
        let mut next = files.iter().skip(1);
        for file in &files {
            if next.next().is_some_and(|next| next.id == file.id) {
                self.superseded.push(*file);
                continue;
            }
            match trailer(tenant, *file) {
                Ok(trailer) => self.packs.push(PackSeal { file: *file, kind: trailer.kind, epoch: trailer.epoch }),
                // A rewriting or a prune at the same time: what took its place is there already, and seen the next time.
                Err(VaultError::Store(StoreError::NotFound(_))) => {}
                Err(e) if e.damaged_object().is_some() => self.unknown.push(e),
                Err(e) => return Err(e),
            }
        }
        // Clusters first: until their packs are done, nothing of the rest is in a hurry.
        self.packs.sort_by_key(|pack| pack.kind as u8);
        Ok(())
    }

    fn add_object(&mut self, tenant: &Tenant, key: String) -> Result<(), VaultError> {
        let object = match tenant.store.get(&key, MAX_OBJECT) {
            Err(StoreError::NotFound(_)) => return Ok(()), // forgotten in between
            other => other.map_err(VaultError::from),
        };
        let epoch = object.and_then(|object| {
            let epoch = seal::epoch(&object).map_err(VaultError::damaged(&key))?;
            Ok((epoch, object.len() as u64))
        });
        match epoch {
            Ok((epoch, length)) => self.objects.push(ObjectSeal { key, epoch, length }),
            Err(e) if e.damaged_object().is_some() => self.unknown.push(e),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// How many objects, of how many bytes, each epoch has sealed; those that were superseded don't count.
    pub fn counts(&self) -> BTreeMap<u32, Count> {
        let packs = self.packs.iter().map(|pack| (pack.epoch, pack.file.length));
        let objects = self.objects.iter().map(|object| (object.epoch, object.length));
        let mut counts: BTreeMap<u32, Count> = BTreeMap::new();
        for (epoch, length) in packs.chain(objects) {
            let count = counts.entry(epoch).or_default();
            count.objects += 1;
            count.bytes += length;
        }
        counts
    }
}

/// Reads the trailer of one generation of a pack. No key is needed, and nothing of it is authenticated.
fn trailer(tenant: &Tenant, file: PackFile) -> Result<Trailer, VaultError> {
    let key = layout::pack(&tenant.name, file.id, file.generation);
    let (tail, length) = tenant.store.read_tail(&key, TRAILER)?;
    let cut = FormatError::Malformed("shorter than a trailer; it is cut off");
    let tail = tail.last_chunk::<TRAILER>().ok_or(cut).map_err(VaultError::damaged(&key))?;
    Trailer::decode(tail, length).map_err(VaultError::damaged(&key))
}
