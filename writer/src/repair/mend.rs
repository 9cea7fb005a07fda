//! Writes the next generation of a damaged pack: what is good from the generations that are there, the rest from the other vault.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use reseal_format::FormatError;
use reseal_format::ids::BlobId;
use reseal_format::keys::Kind;
use reseal_format::layout;
use reseal_format::ordinals::Ordinals;
use reseal_format::pack::{MAX_SEALED, PackSealer};
use reseal_vault::{PackFile, PackHandle, Packs, VaultError, Wait, random};
use zeroize::Zeroizing;

use super::patient::Patient;
use super::search::Found;
use crate::BackupError;
use crate::content::Content;
use crate::throttle::Throttle;
use crate::verify_pack::{PackVerifier, damage};
use crate::walk::Need;

/// Bytes that are collected before they are appended.
const BUFFER: usize = 1 << 20;
/// What an emptied blob has in the place of an id.
const NO_ID: BlobId = BlobId::from_bytes([0; BlobId::LENGTH]);

/// Contents of index nodes that were made again, by their ordinals in one pack.
pub(super) type Nodes = BTreeMap<u32, Vec<u8>>;

/// What mends packs.
pub(super) struct Mender<'a> {
    pub packs: &'a Packs,
    pub theirs: &'a Packs,
    pub found: &'a Found,
    /// For what is read.
    pub throttle: Option<&'a Throttle>,
}

/// A generation that was written.
pub(super) struct Written {
    pub file: PackFile,
    /// How many blobs are from which restore point of the other vault.
    pub from: BTreeMap<Arc<str>, u64>,
    /// Whether it was read back whole, and has all that is known to be needed.
    pub has_all: bool,
    /// Whether something was left out that nothing is known to need.
    pub has_left_out: bool,
}

/// A generation of ours that opens.
struct Own {
    handle: PackHandle,
    ids: Option<Vec<BlobId>>,
    /// Blobs of it that are known to be damaged.
    bad: Ordinals,
}

impl Own {
    fn has(&self, ordinal: u32) -> bool {
        self.handle.lengths().place(ordinal).is_some()
    }
}

/// Where a blob was found.
enum Origin {
    Ours,
    Theirs(Arc<str>),
}

/// What is left out of a generation.
#[derive(Default)]
struct LeftOut {
    needed: Ordinals,
    /// That nothing is known to need.
    has_others: bool,
}

impl Mender<'_> {
    /// Writes the next generation, with index nodes that were made again; `None` if nothing would be gained.
    pub(super) fn mend(&self, patient: &Patient<'_>, rebuilt: &Nodes) -> Result<Option<Written>, BackupError> {
        let own = self.own(patient)?;
        let counts = own.iter().map(|own| own.handle.lengths().count());
        let count = counts.chain(patient.need.ordinals.iter().map(|ordinal| ordinal + 1)).max().unwrap_or(0);
        let mut blobs = Blobs::new(self, patient, &own, rebuilt)?;
        let Some(mut sealer) = self.sealer(patient)? else { return Ok(None) };
        let (generation, tenant) = (sealer.generation(), self.packs.tenant());
        let of = patient.generations.first().map_or(patient.need.generation, |newest| newest.generation);
        let of = layout::pack(tenant.name(), patient.id, of);
        let mut upload = tenant.upload_next(&layout::pack(tenant.name(), patient.id, generation), &of)?;
        let mut sealed = Vec::with_capacity(BUFFER + MAX_SEALED);
        let (mut from, mut left_out) = (BTreeMap::<Arc<str>, u64>::new(), LeftOut::default());
        for ordinal in 0..count {
            let Some((id, origin)) = blobs.find(ordinal)? else {
                sealer.empty();
                match patient.need.ordinals.contains(ordinal) {
                    true => _ = left_out.needed.insert(ordinal),
                    false => left_out.has_others |= own.iter().any(|own| own.has(ordinal)),
                }
                continue;
            };
            if let Origin::Theirs(point) = origin {
                *from.entry(point).or_default() += 1;
            }
            // In place: from here on it is ciphertext.
            sealer.seal(id, &mut blobs.blob);
            sealed.extend_from_slice(&blobs.blob);
            if sealed.len() >= BUFFER {
                upload.append(&sealed).map_err(vault)?;
                sealed.clear();
            }
        }
        if !gains(patient, &left_out) {
            return Ok(None);
        }
        let file = PackFile { id: patient.id, generation, length: sealer.object_bytes() };
        sealed.extend(sealer.finish());
        upload.append(&sealed).map_err(vault)?;
        upload.finish().map_err(vault)?;
        let has_all = left_out.needed.is_empty() && self.is_whole(file, patient.need)?;
        let has_left_out = left_out.has_others || patient.is_unreadable;
        Ok(Some(Written { file, from, has_all, has_left_out }))
    }

    /// The generations that open, the newest first.
    fn own(&self, patient: &Patient<'_>) -> Result<Vec<Own>, VaultError> {
        let mut own = Vec::new();
        for (nth, file) in patient.generations.iter().enumerate() {
            let handle = match self.packs.open_generation(file.id, file.generation) {
                Ok(handle) if handle.trailer().kind == patient.need.kind => handle,
                Ok(_) => continue,
                Err(e) => {
                    damage(e)?;
                    continue;
                }
            };
            let ids = match self.packs.read_ids(&handle) {
                Ok(ids) => Some(ids),
                Err(e) => damage(e).map(|_| None)?,
            };
            let bad = if nth == 0 { patient.bad.clone() } else { Ordinals::default() };
            own.push(Own { handle, ids, bad });
        }
        Ok(own)
    }

    /// Begins a generation above all that are known; `None` if there can be none.
    fn sealer(&self, patient: &Patient<'_>) -> Result<Option<PackSealer>, VaultError> {
        let listed = patient.generations.first().map_or(0, |newest| newest.generation);
        let Some(generation) = listed.max(patient.need.generation).checked_add(1) else { return Ok(None) };
        let tenant = self.packs.tenant();
        let sealer = PackSealer::of_generation(&tenant.keys(), patient.need.kind, patient.id, generation, random()?);
        let key = layout::pack(tenant.name(), patient.id, generation);
        sealer.map(Some).map_err(|source| VaultError::Damaged { object: key, source })
    }

    /// Reads back what was written.
    fn is_whole(&self, file: PackFile, need: &Need) -> Result<bool, BackupError> {
        let mut verifier = PackVerifier::new(self.packs, self.throttle).map_err(|_| BackupError::Thread)?;
        Ok(!verifier.verify(file, Some(need), true)?.is_bad())
    }
}

fn vault(error: reseal_store::StoreError) -> VaultError {
    error.into()
}

/// Whether a generation without that has more than there was.
fn gains(patient: &Patient<'_>, left_out: &LeftOut) -> bool {
    if patient.is_unreadable {
        return patient.need.ordinals.iter().any(|ordinal| !left_out.needed.contains(ordinal));
    }
    // That a digest does not match says no more than the blobs that are damaged.
    let is_rest_mended = patient.is_hurt && left_out.needed.is_empty();
    is_rest_mended || patient.bad.iter().any(|ordinal| !left_out.needed.contains(ordinal))
}

/// Finds the blobs of one pack.
struct Blobs<'a> {
    mender: &'a Mender<'a>,
    patient: &'a Patient<'a>,
    own: &'a [Own],
    rebuilt: &'a Nodes,
    content: Content,
    /// The content of the one that was found last. As large as any, so that no plaintext is moved and left behind.
    blob: Zeroizing<Vec<u8>>,
}

impl<'a> Blobs<'a> {
    fn new(
        mender: &'a Mender<'a>,
        patient: &'a Patient<'a>,
        own: &'a [Own],
        rebuilt: &'a Nodes,
    ) -> Result<Blobs<'a>, BackupError> {
        let content = Content::new().map_err(|_| BackupError::Thread)?;
        let blob = Zeroizing::new(Vec::with_capacity(MAX_SEALED));
        Ok(Blobs { mender, patient, own, rebuilt, content, blob })
    }

    /// Finds a blob, and leaves its content in `blob`; its id, and where it is from.
    fn find(&mut self, ordinal: u32) -> Result<Option<(BlobId, Origin)>, VaultError> {
        let expected = self.expected(ordinal);
        for own in self.own {
            if let Some(id) = self.ours(own, ordinal, expected)? {
                return Ok(Some((id, Origin::Ours)));
            }
        }
        if !self.patient.need.ordinals.contains(ordinal) {
            return Ok(None);
        }
        match self.patient.need.kind {
            Kind::DataPack => self.theirs(ordinal, expected),
            _ => self.made_again(ordinal),
        }
    }

    /// The id that the blob has to have, if any table of ids tells.
    fn expected(&self, ordinal: u32) -> Option<BlobId> {
        let ids = self.own.iter().filter_map(|own| own.ids.as_ref()?.get(ordinal as usize).copied());
        ids.into_iter().find(|id| *id != NO_ID)
    }

    /// The id of what is in `blob`, if it is what was expected.
    fn id(&mut self, expected: Option<BlobId>) -> Option<BlobId> {
        let keys = self.mender.packs.tenant().keys();
        let found = self.content.id(keys.dedup(), self.patient.need.kind, &self.blob).ok()?;
        expected.is_none_or(|expected| expected == found).then_some(found)
    }

    fn take(&self, bytes: usize) {
        if let Some(throttle) = self.mender.throttle {
            throttle.take(bytes as u64, &AtomicBool::new(false));
        }
    }

    /// A blob of a generation of ours.
    fn ours(&mut self, own: &Own, ordinal: u32, expected: Option<BlobId>) -> Result<Option<BlobId>, VaultError> {
        let Some((offset, length)) = own.handle.lengths().place(ordinal).filter(|_| !own.bad.contains(ordinal)) else {
            return Ok(None);
        };
        self.take(length);
        self.blob.resize(length, 0);
        let store = self.mender.packs.tenant().store();
        if let Err(e) = store.read_at(own.handle.key(), offset, &mut self.blob) {
            damage(e.into())?;
            return Ok(None);
        }
        let Ok(plain) = own.handle.open(ordinal, &mut self.blob).map(|plain| plain.len()) else { return Ok(None) };
        self.blob.truncate(plain);
        Ok(self.id(expected))
    }

    /// The same cluster in the other vault.
    fn theirs(&mut self, ordinal: u32, expected: Option<BlobId>) -> Result<Option<(BlobId, Origin)>, VaultError> {
        let found = self.mender.found;
        for there in found.clusters.get(&(self.patient.id, ordinal)).into_iter().flatten() {
            match self.mender.theirs.read_blob(Kind::DataPack, there.blob, Wait::May, &mut self.blob) {
                Ok(()) => {
                    self.take(self.blob.len());
                    if let Some(id) = self.id(expected) {
                        return Ok(Some((id, Origin::Theirs(there.point.clone()))));
                    }
                }
                Err(e) => _ = damage(e)?,
            }
        }
        Ok(None)
    }

    /// An index node that was made again. It maps what the lost one did, but need not be the same to the byte.
    fn made_again(&mut self, ordinal: u32) -> Result<Option<(BlobId, Origin)>, VaultError> {
        let Some(node) = self.rebuilt.get(&ordinal) else { return Ok(None) };
        self.blob.clear();
        self.blob.extend_from_slice(node);
        let object = || format!("index node {ordinal} of pack {}", self.patient.id);
        let broken = VaultError::Damaged { object: object(), source: FormatError::Malformed("it was made wrong") };
        let id = self.id(None).ok_or(broken)?;
        let point = self.mender.found.nodes.get(&(self.patient.id, ordinal)).and_then(|lost| lost.there.first());
        Ok(Some((id, point.map_or(Origin::Ours, |there| Origin::Theirs(there.point.clone())))))
    }
}
