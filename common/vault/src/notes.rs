//! Notes about restore points: made once, read, and removed.

use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::ids::NoteId;
use reseal_format::layout;
use reseal_format::manifest::{Manifest, Note};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_store::StoreError;

use crate::leases::Holder;
use crate::tenant::random;
use crate::{Tenant, VaultError};

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(0))
}

impl Tenant {
    /// Makes a note about a point; durable when it returns.
    pub fn put_note(&self, point: &Manifest, kind: &str, content: serde_json::Value) -> Result<NoteId, VaultError> {
        let what = format!("note about {}@{}", point.vm, point.number);
        // Before the record is read: whoever changes the data keys waits for those who may still seal under the old ones.
        let _lease = self.lease(&Holder::this_process(what))?;
        self.refresh()?;
        self.settle_new_epoch()?;
        let mut note = Note {
            note_id: NoteId::from_bytes(random()?),
            vm: point.vm.clone(),
            vm_id: point.vm_id,
            number: point.number,
            point_id: point.point_id,
            created: now(),
            kind: kind.to_owned(),
            content,
        };
        let key = layout::note(&self.name, &point.vm, point.number, note.note_id);
        let sealed = note.seal(&self.keys(), random()?);
        note.wipe();
        self.store.create(&key, &sealed.map_err(VaultError::damaged(&key))?)?;
        Ok(note.note_id)
    }

    /// Opens a note.
    pub fn note(&self, vm: &VmName, number: u32, id: NoteId) -> Result<Note, VaultError> {
        let key = layout::note(&self.name, vm, number, id);
        self.open_sealed(&key, |keys, object| Note::open(keys, vm, number, id, object))
    }

    /// Removes a note; one that is gone is gone.
    pub fn drop_note(&self, vm: &VmName, number: u32, id: NoteId) -> Result<(), VaultError> {
        match self.store.delete(&layout::note(&self.name, vm, number, id)) {
            Err(StoreError::NotFound(_)) => Ok(()),
            other => Ok(other?),
        }
    }
}
