//! Whether a restore point is held, so that nothing forgets it, as a note about it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::FormatError;
use crate::dated_note::DatedKind;
use crate::manifest::{MAX_TEXT, Note, clipped};

/// A hold, or its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Whether it is held from then on.
    pub held: bool,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Hold {
    /// The content of such a note. A reason that is too long is cut.
    pub fn content(&self) -> Value {
        let reason = self.reason.as_deref().map(|reason| clipped(reason, MAX_TEXT));
        serde_json::to_value(Hold { held: self.held, reason }).expect("text and a boolean always serialize")
    }

    /// What a note says.
    pub fn of(note: &Note) -> Result<Hold, FormatError> {
        DatedKind::Hold.check(note)?;
        match Hold::deserialize(&note.content) {
            Ok(hold) if hold.reason.as_ref().is_none_or(|reason| reason.len() <= MAX_TEXT) => Ok(hold),
            _ => Err(FormatError::Malformed("it holds no word of a hold")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ids::{PointId, VmId};
    use crate::names::VmName;
    use crate::time::Timestamp;

    fn note(content: Value) -> Note {
        let created = Timestamp(1_795_501_907_123);
        Note {
            note_id: DatedKind::Hold.id(created, [1; 6]),
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([2; 16]),
            number: 3,
            point_id: PointId::from_bytes([4; 16]),
            created,
            kind: "hold".into(),
            content,
        }
    }

    #[test]
    fn a_hold_comes_back_and_what_is_none_is_refused() {
        let hold = Hold { held: true, reason: Some("ä".repeat(MAX_TEXT)) };
        let back = Hold::of(&note(hold.content())).unwrap();
        assert!(back.held && back.reason.unwrap().len() == MAX_TEXT);
        let end = Hold { held: false, reason: None };
        assert_eq!(end.content(), json!({ "held": false }));
        assert_eq!(Hold::of(&note(end.content())), Ok(end));
        for wrong in
            [json!(true), json!({ "reason": "x" }), json!({ "held": true, "reason": "x".repeat(MAX_TEXT + 1) })]
        {
            assert!(Hold::of(&note(wrong)).is_err());
        }
        let mut other = note(json!({ "held": true }));
        other.kind = "boot-reads".into();
        assert!(Hold::of(&other).is_err());
    }
}
