//! Notes about restore points: made once, read, and removed.
//!
//! ```text
//! listing of a VM's notes → of a kind, the latest → opened                 (NoteNames)
//!                                                 → verdict, or boot reads
//! ```

use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::FormatError;
use reseal_format::boot_reads::BootReads;
use reseal_format::dated_note::DatedKind;
use reseal_format::ids::NoteId;
use reseal_format::layout;
use reseal_format::manifest::{Manifest, Note};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_format::verdict_note::BootVerdict;
use reseal_store::StoreError;

use crate::leases::Holder;
use crate::tenant::random;
use crate::{Tenant, VaultError};

pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(0))
}

/// The notes of one VM of which the latest counts, as a listing names them. None is opened yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NoteNames(Vec<Name>);

/// Sorted by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    created: Timestamp,
    pub(crate) id: NoteId,
    pub(crate) number: u32,
}

impl NoteNames {
    /// Those among the objects of a VM's folder of notes.
    pub(crate) fn of<'a>(objects: impl Iterator<Item = &'a str>) -> NoteNames {
        let name = |object| {
            let (number, id) = layout::parse_note_file(object)?;
            let (_, created) = DatedKind::of(id)?;
            Some(Name { created, id, number })
        };
        let mut names: Vec<Name> = objects.filter_map(name).collect();
        names.sort_unstable();
        NoteNames(names)
    }

    /// Those of a kind, about points that `counts`; the latest first.
    pub(crate) fn latest(&self, kind: DatedKind, counts: impl Fn(u32) -> bool) -> impl Iterator<Item = Name> {
        let of_kind =
            move |name: &&Name| DatedKind::of(name.id).is_some_and(|(of, _)| of == kind) && counts(name.number);
        self.0.iter().rev().filter(of_kind).copied()
    }
}

/// What became of the last boot of a point that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booted {
    pub time: Timestamp,
    pub number: u32,
    pub verdict: BootVerdict,
}

impl Tenant {
    /// The notes of a VM of which the latest counts, from one listing.
    pub fn note_names(&self, vm: &VmName) -> Result<NoteNames, VaultError> {
        let entries = self.store.list(&layout::notes(&self.name, vm))?;
        Ok(NoteNames::of(entries.iter().map(|entry| entry.name.as_str())))
    }

    /// Opens the latest note of a kind that is about that VM, and about a number that `counts`. One that has gone since it was
    /// listed is none.
    pub(crate) fn latest_note<T>(
        &self,
        of: &Manifest,
        names: &NoteNames,
        kind: DatedKind,
        counts: impl Fn(u32) -> bool,
        read: impl Fn(&Note) -> Result<T, FormatError>,
    ) -> Result<Option<(Note, T)>, VaultError> {
        for Name { number, id, .. } in names.latest(kind, counts) {
            let note = match self.note(&of.vm, number, id) {
                Err(VaultError::Store(StoreError::NotFound(_))) => continue,
                note => note?,
            };
            // A note of another kind whose id happens to look like this; and one of a VM that had this name before.
            if note.kind != kind.name() || note.vm_id != of.vm_id {
                continue;
            }
            let key = layout::note(&self.name, &of.vm, number, id);
            let content = read(&note).map_err(VaultError::damaged(&key))?;
            return Ok(Some((note, content)));
        }
        Ok(None)
    }

    fn booted(
        &self,
        of: &Manifest,
        names: &NoteNames,
        counts: impl Fn(u32) -> bool,
    ) -> Result<Option<(Note, Booted)>, VaultError> {
        let found = self.latest_note(of, names, DatedKind::BootVerdict, counts, BootVerdict::of)?;
        Ok(found.map(|(note, verdict)| {
            let booted = Booted { time: note.created, number: note.number, verdict };
            (note, booted)
        }))
    }

    /// What became of the last boot of this point that was tried.
    pub fn boot_of(&self, point: &Manifest, names: &NoteNames) -> Result<Option<Booted>, VaultError> {
        let found = self.booted(point, names, |number| number == point.number)?;
        Ok(found.filter(|(note, _)| note.point_id == point.point_id).map(|(_, booted)| booted))
    }

    /// What became of the last boot that was tried of any point of the VM that `counts`. `newest` is one of its points.
    pub fn last_boot(
        &self,
        newest: &Manifest,
        names: &NoteNames,
        counts: impl Fn(u32) -> bool,
    ) -> Result<Option<Booted>, VaultError> {
        Ok(self.booted(newest, names, counts)?.map(|(_, booted)| booted))
    }

    /// Keeps what became of a boot; durable when it returns.
    pub fn note_boot(&self, point: &Manifest, verdict: &BootVerdict) -> Result<NoteId, VaultError> {
        self.put_note(point, DatedKind::BootVerdict.name(), verdict.content())
    }

    /// What the last boot of the VM read, whichever of its points that was. `point` is one of them.
    pub fn boot_reads(&self, point: &Manifest) -> Result<Option<BootReads>, VaultError> {
        let names = self.note_names(&point.vm)?;
        let found = self.latest_note(point, &names, DatedKind::BootReads, |_| true, BootReads::of)?;
        Ok(found.map(|(_, reads)| reads))
    }

    /// Keeps what a boot read, in the place of what is known of the VM; durable when it returns.
    pub fn note_boot_reads(&self, point: &Manifest, reads: &BootReads) -> Result<NoteId, VaultError> {
        let before = self.note_names(&point.vm)?;
        let id = self.put_note(point, DatedKind::BootReads.name(), reads.content())?;
        // Each has all that is wanted, so the others only take space. Should one stay, the latest counts.
        for name in before.latest(DatedKind::BootReads, |_| true) {
            self.drop_note(&point.vm, name.number, name.id)?;
        }
        Ok(id)
    }

    /// Makes a note about a point; durable when it returns.
    pub fn put_note(&self, point: &Manifest, kind: &str, content: serde_json::Value) -> Result<NoteId, VaultError> {
        let what = format!("note about {}@{}", point.vm, point.number);
        // Before the record is read: whoever changes the data keys waits for those who may still seal under the old ones.
        let lease = self.lease(&Holder::this_process(what))?;
        self.refresh()?;
        self.settle_new_epoch()?;
        let created = now();
        let note_id = match DatedKind::of_name(kind) {
            Some(kind) => kind.id(created, random()?),
            None => NoteId::from_bytes(random()?),
        };
        let mut note = Note {
            note_id,
            vm: point.vm.clone(),
            vm_id: point.vm_id,
            number: point.number,
            point_id: point.point_id,
            created,
            kind: kind.to_owned(),
            content,
        };
        let key = layout::note(&self.name, &point.vm, point.number, note.note_id);
        let sealed = note.seal(&self.keys(), random()?);
        note.wipe();
        self.store.create(&key, &sealed.map_err(VaultError::damaged(&key))?)?;
        // Who has ended it may have changed the keys since.
        if let Err(e) = lease.check() {
            lease.take_back(&key)?;
            return Err(e.into());
        }
        Ok(note.note_id)
    }

    /// Opens a note.
    pub fn note(&self, vm: &VmName, number: u32, id: NoteId) -> Result<Note, VaultError> {
        let key = layout::note(&self.name, vm, number, id);
        self.open_sealed(&key, |keys, object| Note::open(keys, vm, number, id, object))
    }

    /// Removes a note; one that is gone is gone.
    pub fn drop_note(&self, vm: &VmName, number: u32, id: NoteId) -> Result<(), VaultError> {
        match self.store.hide(&layout::note(&self.name, vm, number, id)) {
            Err(StoreError::NotFound(_)) => Ok(()),
            other => Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_of_a_kind_is_known_from_names() {
        let name = |kind: DatedKind, number: u32, ms: i64, random: u8| {
            format!("{number:08}-{}.note", kind.id(Timestamp(ms), [random; 6]))
        };
        let [verdict, reads] = [DatedKind::BootVerdict, DatedKind::BootReads];
        let mut objects = [
            name(verdict, 1, 300, 1),
            name(verdict, 2, 100, 2),
            name(verdict, 2, 200, 3),
            name(reads, 2, 900, 4),
            format!("00000002-{}.note", NoteId::from_bytes([0xee; 16])),
            "x".to_owned(),
        ];
        for _ in 0..objects.len() {
            objects.rotate_left(1);
            let names = NoteNames::of(objects.iter().map(String::as_str));
            let latest = |kind, only: Option<u32>| {
                let first = names.latest(kind, |number| only.is_none_or(|only| only == number)).next();
                first.map(|name| (name.number, name.created.0))
            };
            assert_eq!(latest(verdict, None), Some((1, 300)));
            assert_eq!(latest(verdict, Some(2)), Some((2, 200)));
            assert_eq!(latest(verdict, Some(3)), None);
            assert_eq!(latest(reads, None), Some((2, 900)));
        }
    }
}
