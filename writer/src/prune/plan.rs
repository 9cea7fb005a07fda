//! Which packs go, and which are worth rewriting.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use reseal_format::condemned::{Blobs, Condemned};
use reseal_format::ordinals::Ordinals;
use reseal_vault::{PackFile, Packs, VaultError};

use crate::BackupError;
use crate::spread::spread;
use crate::walk::{Need, Needed};

/// The generations of a pack that were listed.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub newest: PackFile,
    /// Those that it has replaced.
    pub older: Vec<PackFile>,
}

/// What is to become of the packs.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What is about to go.
    pub condemned: Condemned,
    /// Packs of which nothing is needed.
    pub unneeded: Vec<Listed>,
    /// Packs that are mostly unused.
    pub mostly_unused: Vec<Listed>,
    /// Packs that stay as they are, but have older generations.
    pub superseded: Vec<Listed>,
    pub sizes: Sizes,
    /// Packs that are needed, and can't be opened or are missing.
    pub damaged: BTreeMap<String, String>,
}

/// Bytes of packs.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Sizes {
    /// Of all that were listed.
    pub all: u64,
    /// That nothing needs, in packs that stay as they are.
    pub unused: u64,
    /// That will be freed.
    pub to_free: u64,
}

/// Brings the generations of each pack together.
fn by_pack(mut files: Vec<PackFile>) -> Vec<Listed> {
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

/// Which blobs of a pack nothing needs, and how many bytes they have.
fn unused(packs: &Packs, file: PackFile, need: &Need) -> Result<(Ordinals, u64, u64), VaultError> {
    let handle = packs.open_listed(file)?;
    let (mut ordinals, mut bytes) = (Ordinals::default(), 0);
    for ordinal in (0..handle.lengths().count()).filter(|ordinal| !need.ordinals.contains(*ordinal)) {
        if let Some((_, length)) = handle.lengths().place(ordinal) {
            ordinals.insert(ordinal);
            bytes += length as u64;
        }
    }
    Ok((ordinals, bytes, handle.trailer().blob_bytes))
}

impl Plan {
    /// Compares what there is with what is needed. A pack of which at least so many percent are unused is rewritten.
    pub(super) fn new(
        packs: &Packs,
        listed: Vec<PackFile>,
        needed: &Needed,
        percent: u8,
        threads: usize,
    ) -> Result<Plan, BackupError> {
        let listed = by_pack(listed);
        let plan = Mutex::new(Plan::default());
        spread(&listed, threads, &AtomicBool::new(false), |pack| {
            let file = pack.newest;
            let older: u64 = pack.older.iter().map(|file| file.length).sum();
            let found = needed.get(&file.id).map(|need| unused(packs, file, need)).transpose();
            let mut plan = plan.lock();
            plan.sizes.all += file.length + older;
            match found {
                Ok(None) => {
                    plan.sizes.to_free += file.length + older;
                    plan.condemned.add(file.id, Blobs::All);
                    plan.unneeded.push(pack.clone());
                    return Ok(());
                }
                Ok(Some((ordinals, bytes, of))) if bytes > 0 && bytes * 100 >= of * u64::from(percent) => {
                    plan.sizes.to_free += bytes + older;
                    plan.condemned.add(file.id, Blobs::Some(ordinals));
                    plan.mostly_unused.push(pack.clone());
                    return Ok(());
                }
                Ok(Some((_, bytes, _))) => plan.sizes.unused += bytes,
                Err(e) => match e.damaged_object() {
                    // Who reads it says what is wrong with it; here it only stays.
                    Some(object) => {
                        plan.damaged.insert(object.to_owned(), e.to_string());
                        return Ok(());
                    }
                    None => return Err(e.into()),
                },
            }
            if !pack.older.is_empty() {
                plan.sizes.to_free += older;
                plan.superseded.push(pack.clone());
            }
            Ok(())
        })?;
        Ok(plan.into_inner())
    }
}
