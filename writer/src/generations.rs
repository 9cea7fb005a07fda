//! The generations of packs: which there are, and the removal of those that were replaced or that nothing needs.

use reseal_format::layout;
use reseal_store::StoreError;
use reseal_vault::{PackFile, Tenant, VaultError};

/// The generations of a pack that were listed.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub newest: PackFile,
    /// Those that it has replaced.
    pub older: Vec<PackFile>,
}

/// Brings the generations of each pack together.
pub(crate) fn by_pack(mut files: Vec<PackFile>) -> Vec<Listed> {
    files.sort_unstable();
    let mut packs: Vec<Listed> = Vec::new();
    for file in files {
        match packs.last_mut() {
            Some(pack) if pack.newest.id == file.id => pack.older.push(std::mem::replace(&mut pack.newest, file)),
            _ => packs.push(Listed { newest: file, older: Vec::new() }),
        }
    }
    packs
}

/// What became of a generation that was to go.
pub(crate) enum Removal {
    Done,
    /// Another one was faster.
    WasGone,
    /// The storage does not let go of it, as an object lock does; what it said.
    HeldBack(String),
}

/// Key of a generation of a pack.
pub(crate) fn key(tenant: &Tenant, file: &PackFile) -> String {
    layout::pack(tenant.name(), file.id, file.generation)
}

/// Removes a generation of a pack, in whose place another one is, or none.
pub(crate) fn remove(tenant: &Tenant, file: &PackFile, successor: Option<&PackFile>) -> Result<Removal, VaultError> {
    match tenant.store().delete(&key(tenant, file)) {
        Ok(()) => Ok(Removal::Done),
        Err(StoreError::NotFound(_)) => Ok(Removal::WasGone),
        Err(e) if e.is_refused() => {
            // It may have been locked for longer while it was rewritten, for a restore point that is to find it for as long.
            if let Some(successor) = successor {
                tenant.lock_as(&key(tenant, successor), &key(tenant, file))?;
            }
            Ok(Removal::HeldBack(e.to_string()))
        }
        Err(e) => Err(e.into()),
    }
}
