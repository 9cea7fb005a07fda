//! Puts the pipeline's results back in order, seals what is new, and feeds the index.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use reseal_format::geometry::{CLUSTER_U64, ClusterIndex};
use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::BlobRef;
use reseal_format::keys::Kind;
use reseal_vault::{PackWriter, Tenant};

use crate::BackupError;
use crate::finisher::Finisher;
use crate::index_writer::{IndexWriter, NodeStore, Sink};
use crate::plan::Task;
use crate::worker::{Cluster, Done};

/// What was counted, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counted {
    pub read: u64,
    pub changed: u64,
    pub new: u64,
    /// Of clusters that were said to have changed, or that nobody spoke of.
    pub told: u64,
    /// Of clusters that were said not to have changed, and were read all the same.
    pub checked: u64,
}

/// Seals the blobs of one restore point.
pub(crate) struct Assembler {
    writer: PackWriter,
    finisher: Arc<Finisher>,
    nodes: NodeStore,
    /// New blobs that the lookup does not know yet: those of packs that are not finished.
    session: HashMap<BlobId, BlobRef>,
    pub counted: Counted,
    /// Packs, with their generations, of clusters that the tenant has but the restore point before does not.
    pub shared: BTreeMap<PackId, u32>,
}

impl Assembler {
    pub(crate) fn new(tenant: Arc<Tenant>, finisher: Arc<Finisher>) -> Assembler {
        Assembler {
            writer: PackWriter::new(tenant.clone(), Kind::DataPack),
            finisher,
            nodes: NodeStore::new(tenant),
            session: HashMap::new(),
            counted: Counted::default(),
            shared: BTreeMap::new(),
        }
    }

    /// Forgets the blobs that are durable and in the lookup.
    pub(crate) fn learn(&mut self) {
        for ids in self.finisher.learnt() {
            for id in ids {
                self.session.remove(&id);
            }
        }
    }

    /// Where a blob was stored that is not known to be durable yet.
    pub(crate) fn place_of(&self, id: &BlobId) -> Option<BlobRef> {
        self.session.get(id).copied()
    }

    /// Hands over the pack of clusters as it is.
    pub(crate) fn cut(&mut self) -> Result<(), BackupError> {
        match self.writer.take_last() {
            Some(pack) => self.finisher.submit(pack, true),
            None => Ok(()),
        }
    }

    pub(crate) fn add(&mut self, done: Done, index: &mut IndexWriter<'_>) -> Result<(), BackupError> {
        self.learn();
        let unit = done.unit;
        let clusters = unit.first..unit.first + unit.count;
        self.counted.read += done.read;
        match unit.task {
            Task::Keep => return index.keep(clusters, &mut self.sink()),
            Task::Clear => {
                self.counted.told += unit.count * CLUSTER_U64;
                return index.clear(clusters);
            }
            Task::Check => self.counted.checked += done.read,
            Task::Read => self.counted.told += unit.count * CLUSTER_U64,
        }
        for (cluster, at) in done.clusters.into_iter().zip(clusters) {
            let place = match cluster {
                Cluster::Hole => {
                    index.clear(at..at + 1)?;
                    continue;
                }
                Cluster::Unchanged(place) => place,
                Cluster::Known(place) => {
                    self.counted.changed += CLUSTER_U64;
                    self.shared.insert(place.pack, place.generation);
                    place
                }
                Cluster::New { id, frames } => {
                    self.counted.changed += CLUSTER_U64;
                    self.store(id, frames)?
                }
            };
            index.set(ClusterIndex(at), place, &mut self.sink())?;
        }
        Ok(())
    }

    /// Seals a new blob; where it is.
    pub(crate) fn store(&mut self, id: BlobId, mut frames: Vec<u8>) -> Result<BlobRef, BackupError> {
        // Two threads may have found the same new cluster.
        if let Some(&place) = self.session.get(&id) {
            return Ok(place);
        }
        self.counted.new += CLUSTER_U64;
        let (place, full) = self.writer.add(id, &mut frames)?;
        self.session.insert(id, place);
        if let Some(pack) = full {
            self.finisher.submit(pack, true)?;
        }
        Ok(place)
    }

    /// Where index nodes go.
    pub(crate) fn sink(&mut self) -> Sink<'_> {
        Sink { nodes: &mut self.nodes, finisher: &self.finisher }
    }

    /// Hands over the packs that are not full.
    pub(crate) fn close(&mut self) -> Result<(), BackupError> {
        self.cut()?;
        self.nodes.close(&self.finisher)
    }
}

/// Puts results back in the order of the disk.
#[derive(Default)]
pub(crate) struct InOrder {
    next: u64,
    early: BTreeMap<u64, Done>,
}

impl InOrder {
    /// Takes a result and hands on what is next because of it; how many units that was.
    pub(crate) fn take(
        &mut self,
        done: Done,
        add: &mut dyn FnMut(Done) -> Result<(), BackupError>,
    ) -> Result<usize, BackupError> {
        self.early.insert(done.unit.sequence, done);
        let mut added = 0;
        while let Some(done) = self.early.remove(&self.next) {
            add(done)?;
            self.next += 1;
            added += 1;
        }
        Ok(added)
    }

    /// The number of the first unit that was not handed on.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Whether no unit of that number was taken.
    pub(crate) fn is_new(&self, sequence: u64) -> bool {
        sequence >= self.next && !self.early.contains_key(&sequence)
    }

    /// What was taken and has to wait for what is before it.
    pub(crate) fn take_early(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.early).into_values().collect()
    }

    /// How many units there were, when every result was taken.
    pub(crate) fn finish(self) -> Result<u64, BackupError> {
        if self.early.is_empty() { Ok(self.next) } else { Err(BackupError::Thread) }
    }
}
