//! Restore points without disks: packs, index and manifests of as many clusters as one likes, through the vault's own commit path. The
//! clusters hold nothing that could be read as a disk.

use std::collections::BTreeSet;
use std::sync::Arc;

use reseal_format::geometry::{CLUSTER_U64, FANOUT, FANOUT_U64, root_level};
use reseal_format::ids::{BlobId, PointId, VmId};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::{Disk, Manifest, Parent, Root, Stats};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_vault::{FinishingPack, Holder, PackWriter, Tenant};

use crate::random::Random;

/// The time of the first point; each is a day later than the one before.
const FIRST: i64 = 1_600_000_000_000;
const DAY: i64 = 86_400_000;

/// A VM with one disk.
pub struct Synthetic {
    tenant: Arc<Tenant>,
    vm: VmName,
    vm_id: VmId,
    /// Bytes of a cluster as it is stored.
    stored: usize,
    random: Random,
    /// By level: the children of all its nodes, one after the other; the clusters first.
    levels: Vec<Vec<Option<BlobRef>>>,
    length: u64,
    last: Option<Parent>,
}

impl Synthetic {
    /// A disk of so many clusters, none of which is there yet.
    pub fn new(tenant: Arc<Tenant>, vm: &str, clusters: usize, stored: usize) -> Synthetic {
        let length = clusters as u64 * CLUSTER_U64;
        let mut levels = vec![vec![None; clusters]];
        for _ in 0..root_level(length) {
            let nodes = levels.last().map_or(0, Vec::len).div_ceil(FANOUT);
            levels.push(vec![None; nodes]);
        }
        let vm_id = VmId::from_bytes([0x51; 16]);
        Synthetic {
            tenant,
            vm: VmName::new(vm).unwrap(),
            vm_id,
            stored,
            random: Random::new(1),
            levels,
            length,
            last: None,
        }
    }

    fn full(pack: Option<FinishingPack>) {
        if let Some(pack) = pack {
            pack.finish().unwrap();
        }
    }

    fn some_id(&mut self) -> BlobId {
        let mut id = [0; 32];
        self.random.fill(&mut id);
        BlobId::from_bytes(id)
    }

    /// Makes the next point, in which these clusters are others.
    pub fn point(&mut self, changed: impl IntoIterator<Item = usize>) {
        let number = self.last.map_or(1, |last| last.number + 1);
        let holder = Holder::this_process("synthetic".to_owned()).making(self.vm.clone(), number);
        let _lease = self.tenant.lease(&holder).unwrap();
        let (mut data, mut index) = (
            PackWriter::new(self.tenant.clone(), Kind::DataPack),
            PackWriter::new(self.tenant.clone(), Kind::IndexPack),
        );
        let mut touched = BTreeSet::new();
        let mut content = Vec::new();
        for cluster in changed {
            content.resize(self.stored, 0);
            self.random.fill(&mut content);
            let id = self.some_id();
            let (place, full) = data.add(id, &mut content).unwrap();
            Synthetic::full(full);
            content.clear();
            self.levels[0][cluster] = Some(place);
            touched.insert(cluster / FANOUT);
        }
        Synthetic::full(data.take_last());
        let mut root = None;
        for level in 0..self.levels.len() {
            let mut above = BTreeSet::new();
            for node in std::mem::take(&mut touched) {
                let children = &self.levels[level][node * FANOUT..];
                let mut children = children[..children.len().min(FANOUT)].to_vec();
                children.resize(FANOUT, None);
                let node_level = u8::try_from(level).unwrap();
                let mut encoded =
                    IndexNode::compress(&IndexNode::from_children(node_level, &children).encode()).unwrap();
                let id = self.some_id();
                let (place, full) = index.add(id, &mut encoded).unwrap();
                Synthetic::full(full);
                match self.levels.get_mut(level + 1) {
                    Some(parents) => {
                        parents[node] = Some(place);
                        above.insert(node / FANOUT);
                    }
                    None => root = Some(Root::from(place)),
                }
            }
            touched = above;
        }
        Synthetic::full(index.take_last());
        let used = self.levels[0].iter().filter(|place| place.is_some()).count() as u64;
        let mut point_id = [0; 16];
        self.random.fill(&mut point_id);
        let disk = Disk {
            name: DiskName::new("disk-0").unwrap(),
            length: self.length,
            root,
            used_clusters: used,
            source: "synthetic".to_owned(),
            tracking: None,
            claim: None,
        };
        assert!(self.length <= CLUSTER_U64 * FANOUT_U64.pow(u32::try_from(self.levels.len()).unwrap()));
        let manifest = Manifest {
            vm: self.vm.clone(),
            vm_id: self.vm_id,
            number,
            point_id: PointId::from_bytes(point_id),
            created: Timestamp(FIRST + i64::from(number) * DAY),
            parent: self.last,
            disks: vec![disk],
            definition: None,
            stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
            warnings: Vec::new(),
            locked: None,
        };
        let digest = self.tenant.commit(&manifest).unwrap();
        self.last = Some(Parent { number, digest });
    }
}
