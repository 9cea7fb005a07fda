//! Writing packs: blobs are sealed and appended one after the other; a full pack is handed to the caller to be finished,
//! which waits for the disk and so is worth another thread.

use std::sync::Arc;

use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::BlobRef;
use reseal_format::keys::Kind;
use reseal_format::layout;
use reseal_format::pack::PackSealer;
use reseal_store::Upload;

use crate::tenant::random;
use crate::{Tenant, VaultError};

/// Bytes that are collected before they are appended: fewer, larger writes.
const BUFFER: usize = 1 << 20;

/// Writes blobs of one kind into packs.
pub struct PackWriter {
    tenant: Arc<Tenant>,
    kind: Kind,
    open: Option<OpenPack>,
}

struct OpenPack {
    sealer: PackSealer,
    upload: Box<dyn Upload>,
    buffer: Vec<u8>,
    ids: Vec<BlobId>,
}

/// A pack that takes no more blobs. It does not exist before [`FinishingPack::finish`].
pub struct FinishingPack(OpenPack);

impl PackWriter {
    /// A writer; no pack is started before the first blob.
    pub fn new(tenant: Arc<Tenant>, kind: Kind) -> PackWriter {
        PackWriter { tenant, kind, open: None }
    }

    fn start(&self) -> Result<OpenPack, VaultError> {
        let id = PackId::from_bytes(random()?);
        let key = layout::pack(&self.tenant.name, id, 0);
        let sealer = PackSealer::new(&self.tenant.keys(), self.kind, id, random()?);
        let sealer = sealer.map_err(VaultError::damaged(layout::tenant_record(&self.tenant.name)))?;
        let upload = self.tenant.upload(&key)?;
        Ok(OpenPack { sealer, upload, buffer: Vec::with_capacity(BUFFER * 2), ids: Vec::new() })
    }

    /// Seals a blob (in place: `content` is ciphertext afterwards) and appends it. Its place, and the pack if this
    /// filled it.
    pub fn add(&mut self, id: BlobId, content: &mut Vec<u8>) -> Result<(BlobRef, Option<FinishingPack>), VaultError> {
        let mut pack = match self.open.take() {
            Some(pack) => pack,
            None => self.start()?,
        };
        let ordinal = pack.sealer.seal(id, content);
        pack.ids.push(id);
        pack.buffer.extend_from_slice(content);
        if pack.buffer.len() >= BUFFER {
            pack.upload.append(&pack.buffer)?;
            pack.buffer.clear();
        }
        let blob = BlobRef { pack: pack.sealer.id(), generation: 0, ordinal };
        if pack.sealer.is_full() {
            return Ok((blob, Some(FinishingPack(pack))));
        }
        self.open = Some(pack);
        Ok((blob, None))
    }

    /// The pack that was started and is not full.
    pub fn take_last(&mut self) -> Option<FinishingPack> {
        self.open.take().map(FinishingPack)
    }
}

impl FinishingPack {
    /// Bytes of the object that it will be.
    pub fn bytes(&self) -> u64 {
        self.0.sealer.object_bytes()
    }

    /// Writes the tables and makes the pack durable. Its id, and the ids of its blobs by ordinal.
    pub fn finish(self) -> Result<(PackId, Vec<BlobId>), VaultError> {
        let OpenPack { sealer, mut upload, mut buffer, ids } = self.0;
        let id = sealer.id();
        buffer.extend_from_slice(&sealer.finish());
        upload.append(&buffer)?;
        upload.finish()?;
        Ok((id, ids))
    }
}
