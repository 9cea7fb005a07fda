//! The overlays of a restore point, open.

use std::fs::File;
use std::path::{Path, PathBuf};

use reseal_format::ids::OverlayId;
use reseal_format::manifest::{Disk, Manifest};
use reseal_format::names::DiskName;
use reseal_format::overlay::OverlayKey;
use reseal_vault::{Class, Tenant, VaultError, random};

use super::document::{Document, DocumentDisk, VERSION};
use super::folder::{Folder, FolderError, make, nameless};
use super::key;
use super::moved::{Moved, has_vm};
use crate::overlay::{Facts, Overlay, OverlayError, Unflushed};

/// Least that an overlay can do anything with: its heads and its journal take 1 MiB.
pub const LEAST: u64 = 4 << 20;

/// Where overlays are, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OverlayPlace {
    /// In a folder of their own, which is gone on with if it holds them already.
    Kept(PathBuf),
    /// The same, of those disks only that are still there: others were moved elsewhere.
    Left(PathBuf),
    /// In files without names in that folder. The key is never stored, and all is gone with the process.
    OneTime(PathBuf),
}

/// Why there are no overlays.
#[derive(Debug, thiserror::Error)]
pub enum WritableError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("{}, disk {disk}: {source}", .folder.display())]
    Overlay { folder: PathBuf, disk: DiskName, source: Box<OverlayError> },
    #[error(
        "{} holds the overlay of {of}, not of {wanted}; choose another folder, or name that restore point", .folder.display()
    )]
    Another { folder: PathBuf, of: String, wanted: String },
    #[error("{} says that it is an overlay of {point}, but has other disks", .folder.display())]
    OtherDisks { folder: PathBuf, point: String },
    #[error(
        "the disk {disk} was moved to {target}, which is newer than the overlay in {}: use that; `reseal overlay drop` removes what \
         nothing needs any more", .folder.display()
    )]
    Moved { folder: PathBuf, disk: DiskName, target: String },
    #[error("{} holds an overlay that is kept; --one-time begins an empty one: choose another folder", .0.display())]
    Occupied(PathBuf),
    #[error(
        "the restore points are another site's, which gives out no keys, so nothing can keep the key of an overlay: add --one-time \
         for one that is gone with this process"
    )]
    Elsewhere,
}

impl WritableError {
    /// What a caller does about it.
    pub fn class(&self) -> Class {
        match self {
            WritableError::Folder(FolderError::Io { .. } | FolderError::InUse(_) | FolderError::Vm(_)) => Class::Failed,
            WritableError::Folder(FolderError::Foreign(_) | FolderError::Nothing(_)) => Class::Usage,
            WritableError::Folder(FolderError::Malformed { .. }) | WritableError::OtherDisks { .. } => Class::Damaged,
            WritableError::Another { .. }
            | WritableError::Occupied(_)
            | WritableError::Moved { .. }
            | WritableError::Elsewhere => Class::Usage,
            WritableError::Vault(error) => error.class(),
            WritableError::Overlay { source, .. } => match &**source {
                OverlayError::Damaged { .. } | OverlayError::Lost { .. } | OverlayError::Another(_) => Class::Damaged,
                OverlayError::Random(error) => error.class(),
                OverlayError::Base(_) | OverlayError::Io { .. } | OverlayError::Full | OverlayError::Broken => {
                    Class::Failed
                }
            },
        }
    }
}

/// Overlays of disks of one restore point.
pub struct Opened {
    id: OverlayId,
    /// Where they are kept.
    folder: Option<Folder>,
    is_new: bool,
    disks: Vec<(DiskName, Overlay<File>)>,
}

impl Opened {
    /// Opens the overlays of a point, or makes them: of all its disks, or of `only` that one. Each may take about `limit` bytes.
    /// `tenant` has the point; where another site has it, there is none.
    pub fn open(
        tenant: Option<&Tenant>,
        point: &Manifest,
        only: Option<&DiskName>,
        place: &OverlayPlace,
        limit: u64,
    ) -> Result<Opened, WritableError> {
        Opened::open_keeping(tenant, point, only, place, limit, Unflushed::Lost)
    }

    /// The same, where it matters what becomes of writes that are not flushed. Of what nobody keeps it does not.
    pub fn open_keeping(
        tenant: Option<&Tenant>,
        point: &Manifest,
        only: Option<&DiskName>,
        place: &OverlayPlace,
        limit: u64,
        unflushed: Unflushed,
    ) -> Result<Opened, WritableError> {
        let is_wanted = |name: &DiskName| only.is_none_or(|only| only == name);
        match (place, tenant) {
            (OverlayPlace::OneTime(folder), _) => one_time(point, is_wanted, folder, limit),
            (OverlayPlace::Kept(_) | OverlayPlace::Left(_), None) => Err(WritableError::Elsewhere),
            (OverlayPlace::Kept(path) | OverlayPlace::Left(path), Some(tenant)) => {
                let folder = Folder::take(path)?;
                let moved = Moved::read(path)?;
                let is_left = |name: &DiskName| is_wanted(name) && moved.target(name).is_none();
                if let (OverlayPlace::Kept(_), Some(disk)) = (place, moved.disks.iter().find(|it| is_wanted(&it.name)))
                {
                    let (folder, disk, target) = (path.clone(), disk.name.clone(), disk.target.clone());
                    return Err(WritableError::Moved { folder, disk, target });
                }
                match Folder::document(path)? {
                    // What a guest was told is written must not be lost under it.
                    Some(document) if unflushed != Unflushed::TakenUp && has_vm(&document, &moved) => {
                        Err(FolderError::Vm(path.clone()).into())
                    }
                    Some(document) => go_on(tenant, point, is_left, folder, &document, (limit, unflushed)),
                    None => begin(tenant, point, is_wanted, folder, (limit, unflushed)),
                }
            }
        }
    }

    /// Its id.
    pub fn id(&self) -> OverlayId {
        self.id
    }

    /// Where it is kept.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(Folder::path)
    }

    /// Whether it was made just now.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The overlays, and what is held for as long as they are in use.
    pub fn into_parts(self) -> (Vec<(DiskName, Overlay<File>)>, Option<Folder>) {
        (self.disks, self.folder)
    }
}

fn facts(point: &Manifest, nth: usize, disk: &Disk, id: OverlayId) -> Facts {
    let number = u16::try_from(nth).unwrap_or(u16::MAX);
    Facts { overlay: *id.as_bytes(), point: *point.point_id.as_bytes(), disk: number, length: disk.length }
}

fn copy(key: &OverlayKey) -> OverlayKey {
    OverlayKey::from_bytes(zeroize::Zeroizing::new(*key.expose()))
}

fn random_id() -> Result<OverlayId, VaultError> {
    Ok(OverlayId::from_bytes(random()?))
}

fn in_overlay(folder: &Path, disk: &Disk, source: OverlayError) -> WritableError {
    WritableError::Overlay { folder: folder.to_owned(), disk: disk.name.clone(), source: Box::new(source) }
}

fn one_time(
    point: &Manifest,
    is_wanted: impl Fn(&DiskName) -> bool,
    folder: &Path,
    limit: u64,
) -> Result<Opened, WritableError> {
    make(folder)?;
    if Folder::document(folder)?.is_some() {
        return Err(WritableError::Occupied(folder.to_owned()));
    }
    let mut disks = Vec::new();
    for (nth, disk) in point.disks.iter().enumerate().filter(|(_, disk)| is_wanted(&disk.name)) {
        let failed = |source| in_overlay(folder, disk, source);
        let facts = facts(point, nth, disk, random_id()?);
        let overlay = Overlay::create(nameless(folder)?, key::fresh()?, facts, limit).map_err(failed)?;
        disks.push((disk.name.clone(), overlay));
    }
    Ok(Opened { id: random_id()?, folder: None, is_new: true, disks })
}

fn begin(
    tenant: &Tenant,
    point: &Manifest,
    is_wanted: impl Fn(&DiskName) -> bool,
    folder: Folder,
    (limit, unflushed): (u64, Unflushed),
) -> Result<Opened, WritableError> {
    folder.clear()?;
    // A folder that was named by an id in the state folder has that one.
    let named = folder.path().file_name().and_then(|name| OverlayId::from_hex(name.to_str()?));
    let (id, key) = (named.map_or_else(random_id, Ok)?, key::fresh()?);
    let (mut named, mut disks) = (Vec::new(), Vec::new());
    for (nth, disk) in point.disks.iter().enumerate() {
        let named_disk = DocumentDisk { name: disk.name.clone(), length: disk.length, id: random_id()? };
        let failed = |source| in_overlay(folder.path(), disk, source);
        let file = folder.create_file(&named_disk.file_name())?;
        let overlay =
            Overlay::create_keeping(file, copy(&key), facts(point, nth, disk, named_disk.id), limit, unflushed);
        let overlay = overlay.map_err(failed)?;
        match is_wanted(&disk.name) {
            true => disks.push((disk.name.clone(), overlay)),
            false => overlay.close().map_err(failed)?,
        }
        named.push(named_disk);
    }
    folder.sync()?;
    let note_id = key::keep(tenant, point, id, &key)?;
    let document = Document {
        version: VERSION,
        id,
        vault_id: tenant.keys().scope().vault,
        tenant: tenant.name().clone(),
        vm: point.vm.clone(),
        number: point.number,
        point_id: point.point_id,
        note_id,
        disks: named,
    };
    if let Err(e) = folder.put(&document) {
        // A key of nothing; should it stay, it does no harm.
        let _ = tenant.drop_note(&point.vm, point.number, note_id);
        return Err(e.into());
    }
    Ok(Opened { id, folder: Some(folder), is_new: true, disks })
}

fn go_on(
    tenant: &Tenant,
    point: &Manifest,
    is_wanted: impl Fn(&DiskName) -> bool,
    folder: Folder,
    document: &Document,
    (limit, unflushed): (u64, Unflushed),
) -> Result<Opened, WritableError> {
    let path = || folder.path().to_owned();
    let is_same = document.vault_id == tenant.keys().scope().vault
        && document.tenant == *tenant.name()
        && (&document.vm, document.number, document.point_id) == (&point.vm, point.number, point.point_id);
    if !is_same {
        let name = |tenant, vm, number| format!("{vm}@{number} of tenant {tenant}");
        let mut of = name(&document.tenant, &document.vm, document.number);
        if document.vault_id != tenant.keys().scope().vault {
            of = format!("{of} in another vault");
        }
        return Err(WritableError::Another {
            folder: path(),
            of,
            wanted: name(tenant.name(), &point.vm, point.number),
        });
    }
    let same_disks = document.disks.len() == point.disks.len()
        && document
            .disks
            .iter()
            .zip(&point.disks)
            .all(|(named, disk)| (&named.name, named.length) == (&disk.name, disk.length));
    if !same_disks {
        return Err(WritableError::OtherDisks { folder: path(), point: document.point() });
    }
    let key = key::kept(tenant, point, document)?;
    let mut disks = Vec::new();
    for (nth, (named, disk)) in document.disks.iter().zip(&point.disks).enumerate() {
        if is_wanted(&disk.name) {
            let failed = |source| in_overlay(folder.path(), disk, source);
            let file = folder.open_file(&named.file_name())?;
            let overlay = Overlay::open_keeping(file, copy(&key), facts(point, nth, disk, named.id), limit, unflushed)
                .map_err(failed)?;
            disks.push((disk.name.clone(), overlay));
        }
    }
    Ok(Opened { id: document.id, folder: Some(folder), is_new: false, disks })
}
