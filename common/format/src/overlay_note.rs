//! The key of an overlay, as a note about the restore point that it lies over: sealed under the tenant's keys, and sealed again with them.

use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::FormatError;
use crate::ids::OverlayId;
use crate::keys::KEY;
use crate::manifest::Note;
use crate::overlay::OverlayKey;

/// Its kind. Of several about one point each counts, for its own overlay.
pub const KIND: &str = "overlay";

/// The content of such a note.
pub fn content(overlay: OverlayId, key: &OverlayKey) -> Value {
    json!({ "overlay": overlay, "key": hex::encode(key.expose()) })
}

/// The key of that overlay. What else holds it is overwritten.
pub fn key(mut note: Note, overlay: OverlayId) -> Result<OverlayKey, FormatError> {
    let found = read(&note, overlay);
    note.wipe();
    found
}

fn read(note: &Note, overlay: OverlayId) -> Result<OverlayKey, FormatError> {
    let malformed = FormatError::Malformed("it holds no key of an overlay");
    if note.kind != KIND {
        return Err(FormatError::Mismatch("it is no note of an overlay"));
    }
    let Some(text) = note.content.get("overlay").and_then(Value::as_str) else { return Err(malformed) };
    if OverlayId::from_hex(text) != Some(overlay) {
        return Err(FormatError::Mismatch("it is the note of another overlay"));
    }
    let Some(text) = note.content.get("key").and_then(Value::as_str) else { return Err(malformed) };
    let mut key = Zeroizing::new([0; KEY]);
    hex::decode_to_slice(text, &mut *key).map_err(|_| malformed)?;
    Ok(OverlayKey::from_bytes(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NoteId, PointId, VmId};
    use crate::names::VmName;
    use crate::time::Timestamp;

    fn note(kind: &str, content: Value) -> Note {
        Note {
            note_id: NoteId::from_bytes([1; 16]),
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([2; 16]),
            number: 3,
            point_id: PointId::from_bytes([4; 16]),
            created: Timestamp(5),
            kind: kind.into(),
            content,
        }
    }

    #[test]
    fn a_key_comes_back_from_its_own_note_only_and_is_never_shown() {
        let id = OverlayId::from_bytes([7; 16]);
        let content = content(id, &OverlayKey::from_bytes(Zeroizing::new([0xab; KEY])));
        let note = |kind: &str, content: &Value| note(kind, content.clone());
        assert_eq!(key(note(KIND, &content), id).unwrap().expose(), &[0xab; KEY]);
        assert!(key(note("boot-verdict", &content), id).is_err());
        assert!(key(note(KIND, &content), OverlayId::from_bytes([8; 16])).is_err());
        for (field, value) in [("key", json!("abab")), ("key", json!(5)), ("key", json!("zz")), ("overlay", json!(""))]
        {
            let mut wrong = content.clone();
            wrong[field] = value;
            assert!(key(note(KIND, &wrong), id).is_err(), "{field}");
        }
        assert!(key(note(KIND, &json!([])), id).is_err());
        let mut shown = note(KIND, &content);
        assert!(!format!("{shown:?}").contains("abab"));
        shown.wipe();
        assert_eq!(shown.content, json!({ "overlay": "", "key": "" }));
    }
}
