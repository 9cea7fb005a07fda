//! Makes index nodes again that are lost. Which clusters they led to the other vault knows, and our packs tell where we have these.
//!
//! Nodes below a lost one are somewhere, but nothing tells where: they are made again too, in packs of their own, as are clusters that are
//! not found.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use reseal_format::geometry::FANOUT;
use reseal_format::ids::BlobId;
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::pack::MAX_SEALED;
use reseal_vault::{FinishingPack, PackWriter, Tenant, Tree, Wait};
use zeroize::Zeroizing;

use super::search::LostNode;
use crate::BackupError;
use crate::content::Content;
use crate::known::Known;
use crate::throttle::Throttle;
use crate::verify_pack::damage;
use crate::walk::Place;

/// What makes index nodes again.
pub(super) struct Rebuilder<'a> {
    tenant: &'a Tenant,
    /// What we have.
    known: &'a Known,
    theirs: &'a Tree,
    throttle: Option<&'a Throttle>,
    content: Content,
    /// The content of a cluster. As large as any, so that no plaintext is moved and left behind.
    blob: Zeroizing<Vec<u8>>,
    nodes: PackWriter,
    clusters: PackWriter,
    /// What is durable.
    made: Made,
    /// What is in packs that are not full yet.
    pending: Made,
}

/// What was made anew, so that what is needed twice is made once.
#[derive(Default)]
struct Made {
    clusters: HashMap<BlobId, BlobRef>,
    /// Nodes, by where theirs are.
    nodes: HashMap<Place, BlobRef>,
}

impl<'a> Rebuilder<'a> {
    pub(super) fn new(
        tenant: &'a Arc<Tenant>,
        known: &'a Known,
        theirs: &'a Tree,
        throttle: Option<&'a Throttle>,
    ) -> Result<Rebuilder<'a>, BackupError> {
        Ok(Rebuilder {
            tenant,
            known,
            theirs,
            throttle,
            content: Content::new().map_err(|_| BackupError::Thread)?,
            blob: Zeroizing::new(Vec::with_capacity(MAX_SEALED)),
            nodes: PackWriter::new(tenant.clone(), Kind::IndexPack),
            clusters: PackWriter::new(tenant.clone(), Kind::DataPack),
            made: Made::default(),
            pending: Made::default(),
        })
    }

    /// The content of a node that is lost, all below which is durable; `None` if the other vault lacks something of it, too.
    pub(super) fn node(&mut self, lost: &LostNode) -> Result<Option<Vec<u8>>, BackupError> {
        for there in &lost.there {
            if let Some(plain) = self.encoded(there.blob, lost.level)? {
                self.finish()?;
                return Ok(Some(compressed(&plain)?));
            }
            self.give_up();
        }
        Ok(None)
    }

    /// Makes durable what was written so far.
    fn finish(&mut self) -> Result<(), BackupError> {
        let last = [self.clusters.take_last(), self.nodes.take_last()];
        last.into_iter().flatten().try_for_each(finished)?;
        let Made { clusters, nodes } = std::mem::take(&mut self.pending);
        self.made.clusters.extend(clusters);
        self.made.nodes.extend(nodes);
        Ok(())
    }

    /// Nothing leads to what was written so far: what is not in full packs never existed.
    fn give_up(&mut self) {
        drop((self.clusters.take_last(), self.nodes.take_last()));
        self.pending = Made::default();
    }

    /// The plaintext of the node that maps what theirs does.
    fn encoded(&mut self, their: BlobRef, level: u8) -> Result<Option<Vec<u8>>, BackupError> {
        let theirs = match self.theirs.node(their, level, Wait::May) {
            Ok(node) => node,
            Err(e) => return Ok(damage(e).map(|_| None)?),
        };
        let mut children = vec![None; FANOUT];
        for (slot, child) in children.iter_mut().enumerate() {
            let Some(their) = theirs.get(slot) else { continue };
            let ours = match level {
                0 => self.cluster(their)?,
                _ => self.below(their, level - 1)?,
            };
            // A node that lacks one of its children would show zeros there.
            let Some(ours) = ours else { return Ok(None) };
            *child = Some(ours);
        }
        Ok(Some(IndexNode::from_children(level, &children).encode()))
    }

    /// A node below one that is lost.
    fn below(&mut self, their: BlobRef, level: u8) -> Result<Option<BlobRef>, BackupError> {
        let there = (their.pack, their.ordinal);
        if let Some(place) = self.made.nodes.get(&there).or_else(|| self.pending.nodes.get(&there)) {
            return Ok(Some(*place));
        }
        let Some(plain) = self.encoded(their, level)? else { return Ok(None) };
        let id = self.tenant.keys().dedup().id_of(&plain);
        let (place, full) = self.nodes.add(id, &mut compressed(&plain)?)?;
        full.map_or(Ok(()), finished)?;
        self.pending.nodes.insert(there, place);
        Ok(Some(place))
    }

    /// Where we have a cluster of theirs. One that is not found is stored.
    fn cluster(&mut self, their: BlobRef) -> Result<Option<BlobRef>, BackupError> {
        if let Err(e) = self.theirs.packs().read_blob(Kind::DataPack, their, Wait::May, &mut self.blob) {
            return Ok(damage(e).map(|_| None)?);
        }
        if let Some(throttle) = self.throttle {
            throttle.take(self.blob.len() as u64, &AtomicBool::new(false));
        }
        let Ok(id) = self.content.id(self.tenant.keys().dedup(), Kind::DataPack, &self.blob) else { return Ok(None) };
        if let Some(place) = self.made.clusters.get(&id).or_else(|| self.pending.clusters.get(&id)) {
            return Ok(Some(*place));
        }
        if let Some(place) = self.known.find(&id)? {
            return Ok(Some(place));
        }
        let (place, full) = self.clusters.add(id, &mut self.blob)?;
        full.map_or(Ok(()), finished)?;
        self.pending.clusters.insert(id, place);
        Ok(Some(place))
    }
}

fn finished(pack: FinishingPack) -> Result<(), BackupError> {
    pack.finish()?;
    Ok(())
}

fn compressed(plain: &[u8]) -> Result<Vec<u8>, BackupError> {
    let failed = |source| BackupError::Source { path: "an index node".into(), action: "compress", source };
    IndexNode::compress(plain).map_err(failed)
}
