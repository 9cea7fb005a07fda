//! Which overlays there are.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use reseal_format::ids::OverlayId;
use reseal_format::keys::Scope;
use reseal_format::time::Timestamp;
use reseal_vault::heads::tenant_folder;

use super::document::{Document, FILE};
use super::folder::{Folder, FolderError};
use super::moved::{Moved, has_vm};

/// The folder's name in a tenant's state folder.
const OVERLAYS: &str = "overlays";

/// What `st_blocks` counts.
const BLOCK: u64 = 512;

/// An overlay that was found.
#[derive(Debug)]
pub struct Found {
    pub folder: PathBuf,
    pub document: Document,
    /// Bytes that its files take.
    pub used: u64,
    /// When something was written last.
    pub changed: Option<Timestamp>,
    pub is_in_use: bool,
}

/// Where the overlays of a tenant are made, unless somebody says otherwise.
pub fn overlays_folder(state: &Path, scope: &Scope) -> PathBuf {
    tenant_folder(state, scope).join(OVERLAYS)
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// The folders in a state folder that may be overlays of any vault and tenant.
pub fn in_state(state: &Path) -> Vec<PathBuf> {
    let tenants = folders(state).into_iter().flat_map(|vault| folders(&vault));
    let all = tenants.flat_map(|tenant| folders(&tenant.join(OVERLAYS)));
    // What was being made when its process died is none.
    all.filter(|folder| !matches!(Folder::document(folder), Ok(None))).collect()
}

/// What is in a folder.
pub fn found_at(folder: &Path) -> Result<Found, FolderError> {
    let document = Folder::document(folder)?.ok_or_else(|| FolderError::Nothing(folder.to_owned()))?;
    let (mut used, mut changed) = (0, None);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(data) = entry.metadata() else { continue };
        used += data.blocks() * BLOCK;
        if entry.path().extension().is_some_and(|extension| extension == FILE) {
            changed = changed.max(Some(data.mtime() * 1000 + data.mtime_nsec() / 1_000_000));
        }
    }
    let is_in_use = Folder::is_in_use(folder) || has_vm(&document, &Moved::read(folder)?);
    Ok(Found { folder: folder.to_owned(), document, used, changed: changed.map(Timestamp), is_in_use })
}

/// The folder that is meant by a path, or by the id of an overlay in the state folder.
pub fn find(state: Option<&Path>, named: &Path) -> Result<PathBuf, FolderError> {
    let nothing = || FolderError::Nothing(named.to_owned());
    if named.is_dir() {
        return Ok(named.to_owned());
    }
    let id = named.to_str().and_then(OverlayId::from_hex).ok_or_else(nothing)?;
    let is_it = |folder: &PathBuf| matches!(Folder::document(folder), Ok(Some(document)) if document.id == id);
    state.map(in_state).unwrap_or_default().into_iter().find(is_it).ok_or_else(nothing)
}
