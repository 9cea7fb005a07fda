//! Rewriting a pack: its next generation has the same ordinals, under a new salt and the newest DEK, without the blobs that nothing
//! needs. A change of the data keys and a prune do it; what mends damage (`repair`) puts together by itself what is whole of a pack.
//!
//! ```text
//! next generation, durable → its tables open → the one before goes
//! ```

use std::sync::atomic::{AtomicBool, Ordering};

use reseal_format::layout;
use reseal_format::pack::{MAX_SEALED, PackSealer};
use reseal_store::StoreError;
use reseal_vault::{PackFile, PackHandle, Packs, VaultError, random};
use zeroize::Zeroizing;

use crate::generations::key;
use crate::throttle::Throttle;

/// Bytes of a pack that are read, and written, at once.
const WINDOW: usize = 4 << 20;

/// How packs are rewritten.
pub(crate) struct Rewriting<'a> {
    pub packs: &'a Packs,
    /// For what is read.
    pub throttle: Option<&'a Throttle>,
    /// Set when nothing more is wanted.
    pub stop: &'a AtomicBool,
    /// Told of bytes that are sealed again.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Rewriting<'_> {
    /// Writes the next generation of a pack, with the blobs that `keeps` says; the others are not even read. `None` if it was stopped.
    pub(crate) fn next_generation(
        &self,
        file: PackFile,
        keeps: &dyn Fn(u32) -> bool,
    ) -> Result<Option<PackFile>, VaultError> {
        let handle = open_anew(self.packs, file)?;
        let ids = self.packs.read_ids(&handle)?;
        let tenant = self.packs.tenant();
        let keys = tenant.keys();
        let damaged = |source| VaultError::Damaged { object: handle.key().to_owned(), source };
        let mut sealer = PackSealer::next(&keys, handle.trailer(), random()?).map_err(damaged)?;
        let generation = sealer.generation();
        let mut upload = tenant.upload_next(&layout::pack(tenant.name(), file.id, generation), handle.key())?;
        // With all the room that they may need, so that no plaintext is moved and left behind.
        let mut window = Zeroizing::new(Vec::with_capacity(WINDOW + MAX_SEALED));
        let mut content = Vec::with_capacity(MAX_SEALED);
        let mut sealed = Vec::with_capacity(WINDOW + MAX_SEALED);
        for part in handle.windows(WINDOW, keeps) {
            if !part.is_wanted {
                part.ordinals.for_each(|_| sealer.empty());
                continue;
            }
            if let Some(throttle) = self.throttle {
                throttle.take(part.length as u64, self.stop);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            window.resize(part.length, 0);
            tenant.store().read_once(handle.key(), part.offset, &mut window)?;
            for ordinal in part.ordinals {
                let Some((offset, length)) = handle.lengths().place(ordinal) else {
                    sealer.empty();
                    continue;
                };
                let at = usize::try_from(offset - part.offset).unwrap_or(usize::MAX);
                content.extend_from_slice(handle.open(ordinal, &mut window[at..at + length])?);
                // In place: from here on it is ciphertext.
                sealer.seal(ids[ordinal as usize], &mut content);
                sealed.append(&mut content);
            }
            if sealed.len() >= WINDOW / 4 {
                upload.append(&sealed)?;
                sealed.clear();
            }
            (self.progress)(part.length as u64);
        }
        let length = sealer.object_bytes();
        sealed.extend(sealer.finish());
        upload.append(&sealed)?;
        match upload.finish() {
            Ok(()) => Ok(Some(PackFile { generation, length, ..file })),
            // Somebody was interrupted between this and what follows; it is looked at before the old one goes.
            Err(StoreError::Exists(_)) => {
                let newest = self.packs.newest(file.id)?.filter(|newest| newest.generation >= generation);
                Ok(Some(newest.unwrap_or(PackFile { generation, ..file })))
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// Before an old generation goes, both tables of the new one must open.
pub(crate) fn tables_open(packs: &Packs, new: PackFile) -> Result<(), VaultError> {
    let handle = open_anew(packs, new)?;
    packs.read_ids(&handle).map(drop)
}

/// Opens a pack as the store has it now, whatever of it is kept elsewhere.
pub(crate) fn open_anew(packs: &Packs, file: PackFile) -> Result<PackHandle, VaultError> {
    let tenant = packs.tenant();
    tenant.store().doubt(&key(tenant, &file));
    packs.open_listed(file)
}
