//! The key of an overlay: in a note of the vault, which dies with the tenant, or in memory only.

use reseal_format::ids::{NoteId, OverlayId};
use reseal_format::keys::KEY;
use reseal_format::layout;
use reseal_format::manifest::{Manifest, Note};
use reseal_format::overlay::OverlayKey;
use reseal_format::overlay_note;
use reseal_store::StoreError;
use reseal_vault::{Tenant, VaultError, random};
use zeroize::Zeroizing;

use super::document::Document;

/// A new one.
pub(super) fn fresh() -> Result<OverlayKey, VaultError> {
    Ok(OverlayKey::from_bytes(Zeroizing::new(random::<KEY>()?)))
}

/// Keeps it in the vault.
pub(super) fn keep(
    tenant: &Tenant,
    point: &Manifest,
    overlay: OverlayId,
    key: &OverlayKey,
) -> Result<NoteId, VaultError> {
    tenant.put_note(point, overlay_note::KIND, overlay_note::content(overlay, key))
}

/// The note that an overlay names. Whose it is shows when it opens.
fn note(tenant: &Tenant, document: &Document) -> Result<Note, VaultError> {
    let Document { vm, number, note_id, .. } = document;
    tenant.note(vm, *number, *note_id).map_err(|e| match e {
        VaultError::Store(StoreError::NotFound(object)) => {
            VaultError::Missing { object, why: "it has the key of the overlay, which can't be opened without it" }
        }
        other => other,
    })
}

/// The key that was kept for an overlay of that point.
pub(super) fn kept(tenant: &Tenant, point: &Manifest, document: &Document) -> Result<OverlayKey, VaultError> {
    let object = layout::note(tenant.name(), &document.vm, document.number, document.note_id);
    let damaged = |source| VaultError::Damaged { object: object.clone(), source };
    let note = note(tenant, document)?;
    if note.point_id != point.point_id {
        return Err(damaged(reseal_format::FormatError::Mismatch("it is about another restore point")));
    }
    overlay_note::key(note, document.id).map_err(damaged)
}

/// Removes the key of an overlay from the vault: what there is of the overlay anywhere can't be opened any more.
pub fn drop_key(tenant: &Tenant, document: &Document) -> Result<(), VaultError> {
    let found = match tenant.note(&document.vm, document.number, document.note_id) {
        Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(()),
        other => other?,
    };
    // What a file beside the vault names is not removed because it names it.
    let object = layout::note(tenant.name(), &document.vm, document.number, document.note_id);
    overlay_note::key(found, document.id).map_err(|source| VaultError::Damaged { object, source })?;
    tenant.drop_note(&document.vm, document.number, document.note_id)
}
