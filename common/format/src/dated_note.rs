//! Ids of notes of which the latest counts. Kind and moment stand in the id, and so in the object's name: of many notes a listing tells
//! which one to open.
//!
//! ```text
//! tag of the kind (4) ‖ milliseconds since 1970, big-endian (6) ‖ random (6)
//! ```
//!
//! The name alone proves nothing: the id is sealed with the note, which must be of that kind and moment.

use crate::FormatError;
use crate::ids::NoteId;
use crate::manifest::Note;
use crate::time::Timestamp;

const TAG: usize = 4;
const RANDOM_FROM: usize = 10;
/// Random bytes of such an id.
pub const RANDOM: usize = NoteId::LENGTH - RANDOM_FROM;

/// Kinds of notes with such ids. An id of another kind begins like one of these once in four thousand million times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DatedKind {
    /// What became of a boot: see [`crate::verdict_note`].
    BootVerdict,
    /// What a boot read: see [`crate::boot_reads`].
    BootReads,
    /// Whether a point is held: see [`crate::hold_note`].
    Hold,
}

impl DatedKind {
    const ALL: [DatedKind; 3] = [DatedKind::BootVerdict, DatedKind::BootReads, DatedKind::Hold];

    /// The kind as the note has it.
    pub fn name(self) -> &'static str {
        match self {
            DatedKind::BootVerdict => "boot-verdict",
            DatedKind::BootReads => "boot-reads",
            DatedKind::Hold => "hold",
        }
    }

    /// The kind of that name, if its notes have such ids.
    pub fn of_name(name: &str) -> Option<DatedKind> {
        DatedKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn tag(self) -> &'static [u8; TAG] {
        match self {
            DatedKind::BootVerdict => b"verd",
            DatedKind::BootReads => b"read",
            DatedKind::Hold => b"hold",
        }
    }

    /// The id of a note of that moment.
    pub fn id(self, created: Timestamp, random: [u8; RANDOM]) -> NoteId {
        let mut bytes = [0; NoteId::LENGTH];
        bytes[..TAG].copy_from_slice(self.tag());
        let moment = created.0.clamp(0, Timestamp::LAST.0).to_be_bytes();
        // The last moment that there is takes six bytes.
        bytes[TAG..RANDOM_FROM].copy_from_slice(&moment[2..]);
        bytes[RANDOM_FROM..].copy_from_slice(&random);
        NoteId::from_bytes(bytes)
    }

    /// What an id says, if it is one of these.
    pub fn of(id: NoteId) -> Option<(DatedKind, Timestamp)> {
        let bytes = id.as_bytes();
        let kind = DatedKind::ALL.into_iter().find(|kind| bytes.starts_with(kind.tag()))?;
        let mut moment = [0; 8];
        moment[2..].copy_from_slice(&bytes[TAG..RANDOM_FROM]);
        let created = Timestamp(i64::from_be_bytes(moment));
        created.is_sane().then_some((kind, created))
    }

    /// That an opened note is of the moment that its id says.
    pub fn check(self, note: &Note) -> Result<(), FormatError> {
        match DatedKind::of(note.note_id) {
            _ if note.kind != self.name() => Err(FormatError::Mismatch("it is a note of another kind")),
            Some((kind, created)) if (kind, created) == (self, note.created) => Ok(()),
            _ => Err(FormatError::Mismatch("its id says another time than it does")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_and_moment_come_back_and_ids_sort_by_time() {
        for kind in DatedKind::ALL {
            let at = |ms| kind.id(Timestamp(ms), [0xff; RANDOM]);
            for ms in [0, 1, 255, 256, 1_795_501_907_123, Timestamp::LAST.0] {
                assert_eq!(DatedKind::of(at(ms)), Some((kind, Timestamp(ms))));
            }
            assert!(at(255) < at(256) && at(1_795_501_907_123) < at(1_795_501_907_124));
        }
        assert_eq!(
            DatedKind::BootVerdict.id(Timestamp(0x0102_0304_0506), [7; RANDOM]).as_bytes(),
            b"verd\x01\x02\x03\x04\x05\x06\x07\x07\x07\x07\x07\x07"
        );
        assert_eq!(DatedKind::of(NoteId::from_bytes([0; 16])), None);
        let mut beyond = [0xff; 16];
        beyond[..TAG].copy_from_slice(b"verd");
        assert_eq!(DatedKind::of(NoteId::from_bytes(beyond)), None, "a time that can't be");
    }
}
