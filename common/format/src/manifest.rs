//! What is sealed about restore points: the manifest that makes one exist, the tombstone of one that was forgotten,
//! and notes. The plaintext is JSON; unknown fields are ignored, so that later versions may add facts. What may not be
//! ignored they name in `required_features`, which a program that lacks one of them refuses.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::FormatError;
use crate::geometry::{CLUSTER_U64, MAX_DISK};
use crate::ids::{Digest, NoteId, PackId, PointId, VmId};
use crate::index::BlobRef;
use crate::keys::{KEY, Kind};
use crate::layout::MAX_NUMBER;
use crate::lock::Locked;
use crate::names::{DiskName, VmName};
use crate::pack::MAX_BLOBS;
use crate::seal::{Header, open, seal};
use crate::tenant::{TenantKeys, refuse_unknown};
use crate::time::Timestamp;

/// Most disks of a VM.
pub const MAX_DISKS: usize = 256;
/// Longest captured definition, in bytes.
pub const MAX_DEFINITION: usize = 4 << 20;
/// Longest text of a source or warning that is kept, in bytes.
pub const MAX_TEXT: usize = 4096;

/// The record of one restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub vm: VmName,
    pub vm_id: VmId,
    pub number: u32,
    pub point_id: PointId,
    /// Milliseconds since 1970; later than the parent's.
    pub created: Timestamp,
    pub parent: Option<Parent>,
    pub disks: Vec<Disk>,
    pub definition: Option<Definition>,
    pub stats: Stats,
    /// What the administrator should know about the point, such as a source that changed while it was read.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How all that it leads to was locked when it was made, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locked: Option<Locked>,
}

/// The point before it in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub number: u32,
    /// Of the parent's plaintext, so that re-sealing keeps it.
    pub digest: Digest,
}

/// One disk of the point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub name: DiskName,
    /// Bytes.
    pub length: u64,
    /// Root of its index; `None` if the disk is all zeros.
    pub root: Option<Root>,
    /// Clusters that are not holes.
    pub used_clusters: u64,
    /// Where it was read from.
    #[serde(default)]
    pub source: String,
    /// What records, from this moment on, what the next restore point has to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking: Option<Tracking>,
    /// What this point was told about changes, if it was made without reading everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
}

/// A record of changed areas that somebody else keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracking {
    /// One of [`method`].
    pub method: String,
    /// Its name: of the bitmap or checkpoint, or the change id.
    pub id: String,
    /// Whose it is, such as the UUID of a domain; a record of another one's is never used.
    #[serde(default)]
    pub scope: String,
}

/// Who keeps such a record. Text, so that a later version may know more of them.
pub mod method {
    /// A dirty bitmap of QEMU, made by reseal.
    pub const QEMU_BITMAP: &str = "qemu-bitmap";
    /// A checkpoint of libvirt, made by reseal.
    pub const LIBVIRT_CHECKPOINT: &str = "libvirt-checkpoint";
    /// VMware's changed block tracking.
    pub const VMWARE_CHANGE_ID: &str = "vmware-change-id";
    /// A bitmap that the user named.
    pub const USER_BITMAP: &str = "user-bitmap";
    /// What was written over a restore point that was made writable: its name says over which.
    pub const OVERLAY: &str = "overlay";
    /// The restore point that this one is a copy of, compared with the one that its parent is a copy of: its name is that one's id.
    pub const COPY: &str = "copy";
}

/// What was taken as changed, so that the rest needed no reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// One of [`method`].
    pub method: String,
    /// Its name.
    pub id: String,
    /// Number of the restore point since which it tells the changes.
    pub since: u32,
    /// Bytes that it called changed.
    pub changed: u64,
    /// Bytes that it called unchanged and that were read all the same, and found so.
    pub checked: u64,
}

/// Where the root of an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    pub pack: PackId,
    pub generation: u32,
    pub ordinal: u32,
}

impl From<Root> for BlobRef {
    fn from(Root { pack, generation, ordinal }: Root) -> BlobRef {
        BlobRef { pack, generation, ordinal }
    }
}

impl From<BlobRef> for Root {
    fn from(BlobRef { pack, generation, ordinal }: BlobRef) -> Root {
        Root { pack, generation, ordinal }
    }
}

/// The VM's definition as the hypervisor has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub file_name: String,
    pub text: String,
}

/// What the backup did, in bytes and milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Read from the sources.
    pub read: u64,
    /// Of clusters with data that differ from the parent's.
    pub changed: u64,
    /// Of changed clusters that the tenant did not have.
    pub new: u64,
    /// Added to the vault, packs and their tables, without the manifest.
    pub stored: u64,
    pub duration_ms: u64,
}

/// What remains of a restore point that was forgotten, so that its number is not taken for damage or used again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub vm: VmName,
    pub vm_id: VmId,
    pub number: u32,
    pub point_id: PointId,
    /// Digest of the forgotten manifest's plaintext: what its child names as parent.
    pub digest: Digest,
    pub parent: Option<Parent>,
    pub reason: String,
    pub created: Timestamp,
    /// There never was such a point: a prune gave up waiting for it. Id and digest are random then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fenced: bool,
}

/// A fact about a point that was learnt later. Written once; of several of one kind the latest counts, unless the kind says otherwise.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub note_id: NoteId,
    pub vm: VmName,
    pub vm_id: VmId,
    pub number: u32,
    pub point_id: PointId,
    pub created: Timestamp,
    /// What kind of fact, such as `boot-verdict`.
    pub kind: String,
    pub content: serde_json::Value,
}

/// As much of a text as may be kept.
pub fn clipped(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("text, numbers and lists always serialize")
}

fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FormatError> {
    #[derive(Deserialize)]
    struct Required {
        #[serde(default)]
        required_features: Vec<String>,
    }
    let malformed = |_| FormatError::Malformed("its sealed JSON does not parse");
    let required: Required = serde_json::from_slice(bytes).map_err(malformed)?;
    refuse_unknown(&required.required_features)?;
    serde_json::from_slice(bytes).map_err(malformed)
}

impl Disk {
    /// Bytes that are not holes. Its last cluster may be partly past its end.
    pub fn used(&self) -> u64 {
        (self.used_clusters * CLUSTER_U64).min(self.length)
    }
}

impl Manifest {
    /// Seals it; the object, and the digest that its child will name.
    pub fn seal(&self, keys: &TenantKeys, salt: [u8; KEY]) -> Result<(Vec<u8>, Digest), FormatError> {
        self.check()?;
        let plain = to_json(self);
        let object = seal(keys, &self.header(keys), salt, &plain)?;
        Ok((object, Digest::of(&plain)))
    }

    fn header(&self, keys: &TenantKeys) -> Header {
        Header {
            kind: Kind::Manifest,
            epoch: keys.current_epoch(),
            id: *self.point_id.as_bytes(),
            vm: self.vm_id,
            number: self.number,
            record_generation: keys.record_generation(),
            parent: self.parent.map(|parent| parent.digest),
        }
    }

    /// Opens the manifest that stands where number `number` of `vm` should.
    pub fn open(keys: &TenantKeys, vm: &VmName, number: u32, object: &[u8]) -> Result<(Manifest, Digest), FormatError> {
        let (plain, manifest, digest) = Manifest::open_plain(keys, vm, number, object)?;
        drop(plain);
        Ok((manifest, digest))
    }

    /// The same, and the plaintext, for another site that has no keys.
    pub fn open_plain(
        keys: &TenantKeys,
        vm: &VmName,
        number: u32,
        object: &[u8],
    ) -> Result<(Zeroizing<Vec<u8>>, Manifest, Digest), FormatError> {
        let (header, plain) = open(keys, Kind::Manifest, object)?;
        let (manifest, digest) = Manifest::decode(vm, number, &plain)?;
        let expected =
            Header { epoch: header.epoch, record_generation: header.record_generation, ..manifest.header(keys) };
        if header != expected {
            return Err(FormatError::Mismatch("its header contradicts its content"));
        }
        Ok((plain, manifest, digest))
    }

    /// Reads the plaintext of the manifest of number `number` of `vm`, from somebody who has opened it.
    pub fn decode(vm: &VmName, number: u32, plain: &[u8]) -> Result<(Manifest, Digest), FormatError> {
        let manifest: Manifest = from_json(plain)?;
        if manifest.vm != *vm || manifest.number != number {
            return Err(FormatError::Mismatch("it is another restore point's manifest"));
        }
        manifest.check()?;
        Ok((manifest, Digest::of(plain)))
    }

    /// What holds for every manifest: checked before one is written and after one is read.
    fn check(&self) -> Result<(), FormatError> {
        let malformed = |what| Err(FormatError::Malformed(what));
        if !(1..=MAX_NUMBER).contains(&self.number) {
            return malformed("its number is out of range");
        }
        if self.parent.is_some_and(|parent| parent.number >= self.number) {
            return malformed("its number does not follow its parent's");
        }
        if !self.created.is_sane() || self.locked.is_some_and(|locked| !locked.until.is_sane()) {
            return malformed("its time is out of range");
        }
        if self.disks.is_empty() || self.disks.len() > MAX_DISKS {
            return malformed("it has no disks, or too many");
        }
        for (nth, disk) in self.disks.iter().enumerate() {
            if disk.length > MAX_DISK || disk.used_clusters > crate::geometry::cluster_count(disk.length) {
                return malformed("a disk's length is out of range");
            }
            if disk.root.is_some_and(|root| root.ordinal >= MAX_BLOBS) {
                return malformed("a disk's root is out of range");
            }
            let tracked = disk.tracking.iter().flat_map(|tracking| [&tracking.method, &tracking.id, &tracking.scope]);
            let claimed = disk.claim.iter().flat_map(|claim| [&claim.method, &claim.id]);
            if tracked.chain(claimed).any(|text| text.len() > MAX_TEXT) {
                return malformed("the name of a record of changes is too long");
            }
            if disk.claim.as_ref().is_some_and(|claim| claim.since >= self.number) {
                return malformed("it claims changes since a point that is not before it");
            }
            if self.disks[..nth].iter().any(|other| other.name == disk.name) {
                return malformed("two disks have one name");
            }
        }
        if self.definition.as_ref().is_some_and(|definition| definition.text.len() > MAX_DEFINITION) {
            return malformed("its definition is too long");
        }
        Ok(())
    }
}

impl Tombstone {
    /// Seals it.
    pub fn seal(&self, keys: &TenantKeys, salt: [u8; KEY]) -> Result<Vec<u8>, FormatError> {
        let header = Header {
            kind: Kind::Tombstone,
            epoch: keys.current_epoch(),
            id: *self.point_id.as_bytes(),
            vm: self.vm_id,
            number: self.number,
            record_generation: keys.record_generation(),
            parent: self.parent.map(|parent| parent.digest),
        };
        seal(keys, &header, salt, &to_json(self))
    }

    /// Opens the tombstone that stands where number `number` of `vm` should.
    pub fn open(keys: &TenantKeys, vm: &VmName, number: u32, object: &[u8]) -> Result<Tombstone, FormatError> {
        let (plain, tombstone) = Tombstone::open_plain(keys, vm, number, object)?;
        drop(plain);
        Ok(tombstone)
    }

    /// The same, and the plaintext, for another site that has no keys.
    pub fn open_plain(
        keys: &TenantKeys,
        vm: &VmName,
        number: u32,
        object: &[u8],
    ) -> Result<(Zeroizing<Vec<u8>>, Tombstone), FormatError> {
        let (header, plain) = open(keys, Kind::Tombstone, object)?;
        let tombstone = Tombstone::decode(vm, number, &plain)?;
        if (header.number, header.vm, &header.id) != (number, tombstone.vm_id, tombstone.point_id.as_bytes()) {
            return Err(FormatError::Mismatch("it is another restore point's tombstone"));
        }
        Ok((plain, tombstone))
    }

    /// Reads the plaintext of the tombstone of number `number` of `vm`, from somebody who has opened it.
    pub fn decode(vm: &VmName, number: u32, plain: &[u8]) -> Result<Tombstone, FormatError> {
        let tombstone: Tombstone = from_json(plain)?;
        if tombstone.number != number || tombstone.vm != *vm {
            return Err(FormatError::Mismatch("it is another restore point's tombstone"));
        }
        if !tombstone.created.is_sane() {
            return Err(FormatError::Malformed("its time is out of range"));
        }
        Ok(tombstone)
    }
}

/// Without the content, which may be a key.
impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note { note_id, vm, number, kind, .. } = self;
        write!(f, "Note({note_id} of {vm}@{number}, {kind})")
    }
}

fn wipe(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => text.zeroize(),
        serde_json::Value::Array(values) => values.iter_mut().for_each(wipe),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(wipe),
        _ => {}
    }
}

impl Note {
    /// Overwrites the texts of the content: of a note that holds a key, nothing else removes it from memory.
    pub fn wipe(&mut self) {
        wipe(&mut self.content);
    }

    /// Seals it.
    pub fn seal(&self, keys: &TenantKeys, salt: [u8; KEY]) -> Result<Vec<u8>, FormatError> {
        let header = Header {
            kind: Kind::Note,
            epoch: keys.current_epoch(),
            id: *self.note_id.as_bytes(),
            vm: self.vm_id,
            number: self.number,
            record_generation: keys.record_generation(),
            parent: None,
        };
        seal(keys, &header, salt, &Zeroizing::new(to_json(self)))
    }

    /// Opens the note of that id about number `number` of `vm`. That it is about the point that has this number now, its
    /// reader checks by the point's id.
    pub fn open(keys: &TenantKeys, vm: &VmName, number: u32, id: NoteId, object: &[u8]) -> Result<Note, FormatError> {
        let (header, plain) = open(keys, Kind::Note, object)?;
        let note: Note = from_json(&plain)?;
        let same = (header.number, header.vm, &header.id) == (number, note.vm_id, id.as_bytes());
        if !same || note.number != number || note.note_id != id || note.vm != *vm {
            return Err(FormatError::Mismatch("it is another note"));
        }
        if !note.created.is_sane() {
            return Err(FormatError::Malformed("its time is out of range"));
        }
        Ok(note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::tests::keys;

    fn manifest() -> Manifest {
        Manifest {
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 2,
            point_id: PointId::from_bytes([2; 16]),
            created: Timestamp(1_795_501_907_123),
            parent: Some(Parent { number: 1, digest: Digest::from_bytes([3; 32]) }),
            disks: vec![Disk {
                name: DiskName::new("disk-0").unwrap(),
                length: 70_000,
                root: Some(Root { pack: PackId::from_bytes([4; 16]), generation: 0, ordinal: 5 }),
                used_clusters: 2,
                source: "web01.raw".into(),
                tracking: None,
                claim: None,
            }],
            definition: Some(Definition { file_name: "web01.xml".into(), text: "<domain/>".into() }),
            stats: Stats { read: 1, changed: 2, new: 3, stored: 4, duration_ms: 5 },
            warnings: vec![],
            locked: None,
        }
    }

    #[test]
    fn a_manifest_opens_only_where_it_belongs() {
        let keys = keys(1);
        let (object, digest) = manifest().seal(&keys, [7; 32]).unwrap();
        let web01 = VmName::new("web01").unwrap();
        assert_eq!(Manifest::open(&keys, &web01, 2, &object).unwrap(), (manifest(), digest));
        assert!(Manifest::open(&keys, &web01, 3, &object).is_err());
        assert!(Manifest::open(&keys, &VmName::new("web02").unwrap(), 2, &object).is_err());
    }

    #[test]
    fn what_was_opened_elsewhere_is_checked_as_what_is_opened_here() {
        let keys = keys(1);
        let (object, digest) = manifest().seal(&keys, [7; 32]).unwrap();
        let web01 = VmName::new("web01").unwrap();
        let (plain, _, _) = Manifest::open_plain(&keys, &web01, 2, &object).unwrap();
        assert_eq!(Manifest::decode(&web01, 2, &plain).unwrap(), (manifest(), digest));
        let mismatch = |decoded: Result<_, FormatError>| matches!(decoded, Err(FormatError::Mismatch(_)));
        assert!(mismatch(Manifest::decode(&web01, 3, &plain)));
        assert!(mismatch(Manifest::decode(&VmName::new("web02").unwrap(), 2, &plain)));
        let mut wrong = manifest();
        wrong.disks[0].used_clusters = u64::MAX;
        assert!(matches!(Manifest::decode(&web01, 2, &to_json(&wrong)), Err(FormatError::Malformed(_))));
        assert!(Manifest::decode(&web01, 2, &plain[..plain.len() - 1]).is_err());
        let tombstone = Tombstone {
            vm: web01.clone(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 2,
            point_id: PointId::from_bytes([2; 16]),
            digest,
            parent: None,
            reason: "old".into(),
            created: Timestamp(1),
            fenced: false,
        };
        let object = tombstone.seal(&keys, [9; 32]).unwrap();
        let (plain, opened) = Tombstone::open_plain(&keys, &web01, 2, &object).unwrap();
        assert_eq!((Tombstone::decode(&web01, 2, &plain).unwrap(), opened), (tombstone.clone(), tombstone));
        assert!(Tombstone::decode(&web01, 1, &plain).is_err());
    }

    #[test]
    fn the_digest_survives_resealing() {
        let (one, digest) = manifest().seal(&keys(1), [7; 32]).unwrap();
        let (two, same) = manifest().seal(&keys(1), [8; 32]).unwrap();
        assert_ne!(one, two);
        assert_eq!(digest, same);
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_features_refused() {
        let keys = keys(1);
        let header = manifest().header(&keys);
        let open = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json = serde_json::to_value(manifest()).unwrap();
            change(&mut json);
            let plain = serde_json::to_vec(&json).unwrap();
            let object = seal(&keys, &header, [7; 32], &plain).unwrap();
            let (opened, digest) = Manifest::open(&keys, &VmName::new("web01").unwrap(), 2, &object)?;
            assert_eq!(digest, Digest::of(&plain), "unknown fields are part of the digest");
            Ok(opened)
        };
        assert_eq!(open(&|json| json["disks"][0]["change_id"] = "52 de".into()), Ok(manifest()));
        let refused = open(&|json| json["required_features"] = serde_json::json!(["x"]));
        assert_eq!(refused, Err(FormatError::Feature("x".into())));
    }

    #[test]
    fn contradictions_are_refused_before_writing() {
        let mut twice = manifest();
        twice.disks.push(twice.disks[0].clone());
        assert!(twice.seal(&keys(1), [7; 32]).is_err());
        let mut orphan = manifest();
        orphan.number = 1;
        assert!(orphan.seal(&keys(1), [7; 32]).is_err());
        let mut escaped = manifest();
        escaped.definition = Some(Definition { file_name: "x".into(), text: "\0".repeat(MAX_DEFINITION) });
        assert!(escaped.seal(&keys(1), [7; 32]).is_err(), "longer as JSON than as text");
        let mut huge = manifest();
        huge.disks[0].length = u64::MAX;
        assert!(huge.seal(&keys(1), [7; 32]).is_err());
    }

    #[test]
    fn tombstones_and_notes_open_only_where_they_belong() {
        let keys = keys(1);
        let web01 = VmName::new("web01").unwrap();
        let tombstone = Tombstone {
            vm: web01.clone(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 2,
            point_id: PointId::from_bytes([2; 16]),
            digest: Digest::from_bytes([3; 32]),
            parent: None,
            reason: "policy".into(),
            created: Timestamp(5),
            fenced: false,
        };
        let object = tombstone.seal(&keys, [1; 32]).unwrap();
        assert_eq!(Tombstone::open(&keys, &web01, 2, &object).unwrap(), tombstone);
        assert!(Tombstone::open(&keys, &web01, 1, &object).is_err());
        let note = Note {
            note_id: NoteId::from_bytes([9; 16]),
            vm: web01.clone(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 2,
            point_id: PointId::from_bytes([2; 16]),
            created: Timestamp(6),
            kind: "boot-verdict".into(),
            content: serde_json::json!({"booted": true}),
        };
        let object = note.seal(&keys, [1; 32]).unwrap();
        assert_eq!(Note::open(&keys, &web01, 2, note.note_id, &object).unwrap(), note);
        assert!(Note::open(&keys, &web01, 3, note.note_id, &object).is_err());
        assert!(Note::open(&keys, &web01, 2, NoteId::from_bytes([8; 16]), &object).is_err());
        assert!(Note::open(&keys, &VmName::new("web02").unwrap(), 2, note.note_id, &object).is_err());
    }
}
