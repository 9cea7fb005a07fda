//! The clusters of one disk, as they come: judged, checked, sealed.

use std::collections::{BTreeMap, VecDeque};

use reseal_format::frames::FrameDecoder;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, cluster_count, is_zero};
use reseal_format::ids::BlobId;
use reseal_format::index::BlobRef;
use reseal_format::keys::{Kind, TAG};
use reseal_format::manifest::Manifest;
use reseal_format::pack::{MAX_BLOBS, TARGET_BYTES};
use reseal_proto::wire::{Data, FromTarget, Need, Offer, Task as WireTask};
use zeroize::Zeroizing;

use super::landed::{Landed, Places};
use crate::BackupError;
use crate::assemble::{Assembler, InOrder};
use crate::draft::{Draft, Filling};
use crate::judge::{Judge, Verdict};
use crate::known::{Known, ParentDisk};
use crate::plan::{Task, Unit};
use crate::walk::Collector;
use crate::worker::{Cluster, Done};
use reseal_site::RemoteError;

/// Most offers that may be under way: a connection of 100 ms carries 640 MB/s of the disk with so many.
pub(super) const WINDOW: u16 = 64;

/// The other side broke the protocol.
pub(super) fn broken(what: impl Into<String>) -> BackupError {
    RemoteError::Unexpected { peer: "the source".into(), what: what.into() }.into()
}

/// What arrived, until it has landed: a group is complete when so much has arrived, whether it was stored or found.
#[derive(Default)]
struct Group {
    bytes: u64,
    blobs: u32,
    places: Vec<BlobRef>,
    /// The last blob that was stored, in the one pack that this group has.
    stored: Option<BlobId>,
}

/// What this VM is known to have: the one thing that a need is answered from.
pub(super) struct Own {
    landed: Landed,
    places: Places,
    newest: Option<Manifest>,
    group: Group,
    /// Complete, but perhaps not durable yet.
    closing: VecDeque<Group>,
}

impl Own {
    pub(super) fn new(landed: Landed, places: Places, newest: Option<Manifest>) -> Own {
        Own { landed, places, newest, group: Group::default(), closing: VecDeque::new() }
    }

    /// Where this VM has a blob.
    fn find(&mut self, known: &Known, id: &BlobId) -> Result<Option<BlobRef>, BackupError> {
        // Once, whatever is asked: when it is done must tell nothing.
        if let Some(newest) = self.newest.take() {
            let mut collector = Collector::default();
            collector.disks(&known.tree, &newest.disks)?;
            let data = collector.needed.iter().filter(|(_, need)| need.kind == Kind::DataPack);
            data.for_each(|(pack, need)| self.places.add_pack(*pack, &need.ordinals));
        }
        Ok(known.find_where(id, |place| self.places.contains(place))?)
    }

    /// Counts what arrived, before it is known what becomes of it.
    fn arriving(&mut self, frames: usize) {
        self.group.bytes += (frames + TAG) as u64;
        self.group.blobs += 1;
    }

    fn arrived(&mut self, id: BlobId, place: BlobRef, stored: bool) {
        self.group.places.push(place);
        if stored {
            self.group.stored = Some(id);
        }
    }

    fn is_complete(&self) -> bool {
        self.group.bytes >= TARGET_BYTES || self.group.blobs >= MAX_BLOBS
    }

    /// Ends the group: what is in it lands when it is durable.
    fn end_group(&mut self, assembler: &mut Assembler) -> Result<(), BackupError> {
        self.closing.push_back(std::mem::take(&mut self.group));
        assembler.cut()
    }

    /// Notes what has become durable.
    fn settle(&mut self, assembler: &mut Assembler) -> Result<(), BackupError> {
        assembler.learn();
        let is_durable = |group: &Group| group.stored.is_none_or(|id| assembler.place_of(&id).is_none());
        while let Some(group) = self.closing.pop_front_if(|group| is_durable(group)) {
            let written = self.landed.add(&group.places);
            let path = self.landed.path().display().to_string();
            written.map_err(|source| BackupError::Source { path, action: "write", source })?;
            group.places.into_iter().for_each(|place| self.places.insert(place));
        }
        Ok(())
    }

    /// Nothing comes of the point, but what has arrived lands as far as it can.
    pub(super) fn land(&mut self, draft: &mut Draft) {
        let _ = self.end_group(draft.assembler());
        draft.give_up();
        let _ = self.settle(draft.assembler());
    }

    /// The point exists.
    pub(super) fn committed(&mut self) {
        // What stays is a hint that says too much, and is confirmed before it is used.
        let _ = self.landed.clear();
    }
}

/// An offer whose contents are on their way.
struct Waiting {
    unit: Unit,
    verdicts: Vec<Verdict>,
}

/// Takes the offers of the disk that is being filled.
pub(super) struct Receiver<'a, 'f> {
    filling: &'f mut Filling<'a>,
    own: &'f mut Own,
    judge: Judge<'a>,
    waiting: BTreeMap<u64, Waiting>,
    in_order: InOrder,
    /// Offers that may be under way.
    window: u16,
    /// The first cluster that no offer has told of yet, in the order of the disk.
    reached: u64,
    decoder: FrameDecoder,
    plain: Zeroizing<Vec<u8>>,
}

impl<'a, 'f> Receiver<'a, 'f> {
    pub(super) fn new(
        filling: &'f mut Filling<'a>,
        own: &'f mut Own,
        window: u16,
    ) -> Result<Receiver<'a, 'f>, BackupError> {
        let judge = Judge::new(filling.known, ParentDisk::new(filling.known, filling.parent));
        let failed = |source| BackupError::Source { path: "zstd".into(), action: "get the working memory of", source };
        let decoder = FrameDecoder::new().map_err(failed)?;
        let plain = Zeroizing::new(vec![0; CLUSTER]);
        let (waiting, in_order) = (BTreeMap::new(), InOrder::default());
        Ok(Receiver { filling, own, judge, waiting, in_order, window, reached: 0, decoder, plain })
    }

    /// Takes an offer; what is to be answered.
    pub(super) fn offer(&mut self, offer: &Offer) -> Result<Option<FromTarget>, BackupError> {
        let Offer { sequence, first, count, task, .. } = *offer;
        let is_new = self.in_order.is_new(sequence) && !self.waiting.contains_key(&sequence);
        if !is_new || sequence - self.in_order.next() >= u64::from(self.window) {
            return Err(broken(format!("offer {sequence} came twice, or is outside of the window")));
        }
        if first + count > cluster_count(self.filling.length) {
            return Err(broken(format!("offer {sequence} is past the end of the disk")));
        }
        let task = match task {
            WireTask::Read => Task::Read,
            WireTask::Check => Task::Check,
            WireTask::Keep => Task::Keep,
            WireTask::Clear => Task::Clear,
        };
        if task != Task::Read && !self.filling.keeps {
            return Err(broken(format!("offer {sequence} tells of changes, though the disk is read whole")));
        }
        let unit = Unit { sequence, first, count, task };
        if matches!(task, Task::Keep | Task::Clear) {
            self.done(unit, Vec::new())?;
            return Ok(None);
        }
        let hashes: Vec<_> = offer.clusters.iter().map(|hash| hash.map(blake3::Hash::from_bytes)).collect();
        let (known, own) = (self.filling.known, &mut *self.own);
        let verdicts = self.judge.judge(unit, &hashes, &mut |id| own.find(known, id))?;
        let needed = |(nth, verdict): (usize, &Verdict)| u16::from(matches!(verdict, Verdict::Needed(_))) << nth;
        let clusters = verdicts.iter().enumerate().map(needed).fold(0, |bits, bit| bits | bit);
        match clusters {
            0 => self.done(unit, verdicts.into_iter().filter_map(found).collect())?,
            _ => drop(self.waiting.insert(sequence, Waiting { unit, verdicts })),
        }
        Ok(Some(FromTarget::Need(Need { sequence, clusters })))
    }

    /// Takes the contents that an offer waits for.
    pub(super) fn data(&mut self, data: Data) -> Result<(), BackupError> {
        let sequence = data.sequence;
        let Some(Waiting { unit, verdicts }) = self.waiting.remove(&sequence) else {
            return Err(broken(format!("contents came for offer {sequence}, which does not wait for any")));
        };
        let mut frames = data.frames.into_iter();
        let mut clusters = Vec::with_capacity(verdicts.len());
        for (verdict, at) in verdicts.into_iter().zip(unit.first..) {
            clusters.push(match verdict {
                Verdict::Needed(id) => {
                    let missing = || broken(format!("contents of offer {sequence} are fewer than were needed"));
                    let frames = frames.next().ok_or_else(missing)?;
                    self.check(at, &id, &frames)?;
                    Cluster::New { id, frames }
                }
                other => found(other).ok_or(BackupError::Thread)?,
            });
        }
        if frames.next().is_some() {
            return Err(broken(format!("contents of offer {sequence} are more than were needed")));
        }
        self.done(unit, clusters)
    }

    /// Whether frames are what was offered.
    fn check(&mut self, at: u64, id: &BlobId, frames: &[u8]) -> Result<(), BackupError> {
        let decoded = self.decoder.decode(frames, &mut self.plain);
        decoded.map_err(|e| broken(format!("the frames of the cluster at byte {} are {e}", at * CLUSTER_U64)))?;
        if is_zero(&self.plain) {
            return Err(broken(format!(
                "the cluster at byte {} is all zeros, and was not offered so",
                at * CLUSTER_U64
            )));
        }
        match self.filling.known.packs.tenant().keys().dedup().id_of(&self.plain) == *id {
            true => Ok(()),
            false => Err(broken(format!("the cluster at byte {} is not what was offered", at * CLUSTER_U64))),
        }
    }

    /// Takes a unit of which all is there, and adds what is next on the disk.
    fn done(&mut self, unit: Unit, clusters: Vec<Cluster>) -> Result<(), BackupError> {
        let Receiver { filling, own, in_order, reached, .. } = self;
        let read = match unit.task {
            Task::Read | Task::Check => unit.length(filling.length) as u64,
            Task::Keep | Task::Clear => 0,
        };
        in_order.take(Done { unit, read, clusters }, &mut |done| {
            let Unit { sequence, first, count, .. } = done.unit;
            if first < *reached || (filling.keeps && first > *reached) {
                return Err(broken(format!("offer {sequence} does not follow the one before it on the disk")));
            }
            *reached = first + count;
            add(filling, own, done)
        })?;
        Ok(())
    }

    /// The disk comes to nothing: what has arrived of it, out of order, is kept all the same.
    pub(super) fn salvage(&mut self) -> Result<(), BackupError> {
        for done in self.in_order.take_early() {
            for cluster in done.clusters {
                if let Cluster::New { id, frames } = cluster {
                    keep(self.filling.known, self.filling.assembler, self.own, id, frames)?;
                }
            }
        }
        Ok(())
    }

    /// Ends the disk after so many offers.
    pub(super) fn end(&mut self, offers: u64) -> Result<(), BackupError> {
        if let Some(sequence) = self.waiting.keys().next() {
            return Err(broken(format!("the disk ended, but contents of offer {sequence} never came")));
        }
        let whole = !self.filling.keeps || self.reached == cluster_count(self.filling.length);
        match std::mem::take(&mut self.in_order).finish() {
            Ok(taken) if taken == offers && whole => Ok(()),
            _ => Err(broken("the disk ended, but not all of it was offered")),
        }
    }
}

/// What needs no contents.
fn found(verdict: Verdict) -> Option<Cluster> {
    match verdict {
        Verdict::Hole => Some(Cluster::Hole),
        Verdict::Unchanged(place) => Some(Cluster::Unchanged(place)),
        Verdict::Known(place) => Some(Cluster::Known(place)),
        Verdict::Needed(_) => None,
    }
}

/// Adds a unit, in the order of the disk. One that was read goes cluster by cluster, so that a group ends where its pack does.
fn add(filling: &mut Filling<'_>, own: &mut Own, done: Done) -> Result<(), BackupError> {
    let Filling { known, assembler, index, length, .. } = filling;
    if done.unit.task != Task::Read {
        return assembler.add(done, index);
    }
    for (cluster, first) in done.clusters.into_iter().zip(done.unit.first..) {
        let cluster = match cluster {
            Cluster::New { id, frames } => keep(known, assembler, own, id, frames)?,
            other => other,
        };
        let unit = Unit { first, count: 1, ..done.unit };
        assembler.add(Done { unit, read: unit.length(*length) as u64, clusters: vec![cluster] }, index)?;
    }
    own.settle(assembler)
}

/// Finds or stores what arrived.
fn keep(
    known: &Known,
    assembler: &mut Assembler,
    own: &mut Own,
    id: BlobId,
    frames: Vec<u8>,
) -> Result<Cluster, BackupError> {
    own.arriving(frames.len());
    // Only now, and without a word to the other side.
    let found = known.find(&id)?;
    let place = match found {
        Some(place) => place,
        None => assembler.store(id, frames)?,
    };
    own.arrived(id, place, found.is_none());
    if own.is_complete() {
        own.end_group(assembler)?;
    }
    Ok(Cluster::Known(place))
}
