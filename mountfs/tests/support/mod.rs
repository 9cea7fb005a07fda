//! What the tests share: small vaults, model disks, and a store that fails on command.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod far;
pub mod faults;
pub mod servers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::frames::{FrameEncoder, FrameShift};
use reseal_format::geometry::{CLUSTER, FANOUT_U64, cluster_count, is_zero, root_level};
use reseal_format::ids::{PointId, VmId};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::Kind;
use reseal_format::manifest::{Definition, Disk, Manifest, Parent, Stats};
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::Keyring;
use reseal_mountfs::journal::Journal;
use reseal_store::{Local, Store};
use reseal_vault::{PackWriter, Tenant, create_tenant, create_vault, random};

/// A vault with one tenant in a folder of its own.
pub struct Vault {
    pub folder: tempfile::TempDir,
    pub tenant: Arc<Tenant>,
    pub shift: FrameShift,
}

/// A disk to be stored: clusters by number; the others are holes.
pub struct Model {
    pub length: u64,
    pub clusters: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    /// A disk of these bytes; zero clusters are holes.
    pub fn of(bytes: &[u8]) -> Model {
        let whole = |part: &[u8]| [part, &vec![0; CLUSTER - part.len()]].concat();
        let clusters = bytes.chunks(CLUSTER).map(whole).enumerate().filter(|(_, cluster)| !is_zero(cluster));
        Model { length: bytes.len() as u64, clusters: clusters.map(|(nth, bytes)| (nth as u64, bytes)).collect() }
    }
}

impl Vault {
    pub fn new() -> Vault {
        let folder = tempfile::tempdir().unwrap();
        let store = Local::new(folder.path().join("vault"));
        let name = TenantName::new("default").unwrap();
        create_vault(&store, "vault").unwrap();
        let keyring = Keyring::create(&folder.path().join("keyring.json"), None).unwrap();
        create_tenant(&store, "vault", &name, &keyring, None).unwrap();
        let tenant = Arc::new(Tenant::open(Arc::new(store), "vault", &name, Arc::new(keyring)).unwrap());
        Vault { folder, tenant, shift: FrameShift::DEFAULT }
    }

    pub fn repo(&self) -> PathBuf {
        self.folder.path().join("vault")
    }

    /// The same tenant, through another store.
    pub fn tenant_over(&self, store: Arc<dyn Store>) -> Arc<Tenant> {
        let path = self.folder.path().join("keyring.json");
        let keyring = Keyring::open(&path, |_| unreachable!("it has no passphrase")).unwrap();
        Arc::new(Tenant::open(store, "vault", &TenantName::new("default").unwrap(), Arc::new(keyring)).unwrap())
    }

    /// An empty folder to mount at.
    pub fn mountpoint(&self) -> PathBuf {
        let path = self.folder.path().join("mnt");
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Stores a disk.
    pub fn store_disk(&self, name: &str, model: &Model) -> Disk {
        let mut writer = PackWriter::new(self.tenant.clone(), Kind::DataPack);
        let mut encoder = FrameEncoder::new(self.shift, 1).unwrap();
        let mut children = BTreeMap::new();
        for (&cluster, bytes) in &model.clusters {
            let mut content = Vec::new();
            encoder.encode(bytes, &mut content);
            let (blob, full) = writer.add(self.tenant.keys().dedup().id_of(bytes), &mut content).unwrap();
            assert!(full.is_none(), "a small disk fits one pack");
            children.insert(cluster, blob);
        }
        if let Some(pack) = writer.take_last() {
            pack.finish().unwrap();
        }
        let used_clusters = children.len() as u64;
        let root = self.store_index(children, root_level(model.length));
        Disk {
            name: DiskName::new(name).unwrap(),
            length: model.length,
            root: root.map(Into::into),
            used_clusters,
            source: format!("{name}.img"),
            tracking: None,
            claim: None,
        }
    }

    fn store_index(&self, mut below: BTreeMap<u64, BlobRef>, top: u8) -> Option<BlobRef> {
        if below.is_empty() {
            return None;
        }
        let mut writer = PackWriter::new(self.tenant.clone(), Kind::IndexPack);
        for level in 0..=top {
            let mut groups: BTreeMap<u64, Vec<Option<BlobRef>>> = BTreeMap::new();
            for (at, blob) in below {
                let group = groups.entry(at / FANOUT_U64).or_insert_with(|| vec![None; 1024]);
                group[usize::try_from(at % FANOUT_U64).unwrap()] = Some(blob);
            }
            below = BTreeMap::new();
            for (at, group) in groups {
                let encoded = IndexNode::from_children(level, &group).encode();
                let mut content = IndexNode::compress(&encoded).unwrap();
                let (blob, full) = writer.add(self.tenant.keys().dedup().id_of(&encoded), &mut content).unwrap();
                assert!(full.is_none(), "a small index fits one pack");
                below.insert(at, blob);
            }
        }
        writer.take_last().unwrap().finish().unwrap();
        assert_eq!(below.len(), 1);
        below.into_values().next()
    }

    /// Commits a point of these disks; its number and its time as a name.
    pub fn commit(&self, vm: &str, disks: Vec<Disk>, definition: Option<(&str, &str)>) -> (u32, String) {
        let vm = VmName::new(vm).unwrap();
        let chain = self.tenant.chain(&vm).unwrap();
        let parent = self.tenant.parent_of_next(&vm, &chain).unwrap();
        let number = chain.last() + 1;
        let manifest = Manifest {
            vm_id: parent
                .as_ref()
                .and_then(|(_, point)| point.as_ref())
                .map_or_else(|| VmId::from_bytes(random().unwrap()), |point| point.manifest.vm_id),
            vm,
            number,
            point_id: PointId::from_bytes(random().unwrap()),
            created: Timestamp(1_795_501_907_123 + i64::from(number) * 60_000),
            parent: parent.map(|(parent, _): (Parent, _)| parent),
            disks,
            definition: definition.map(|(name, text)| Definition { file_name: name.into(), text: text.into() }),
            stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
            warnings: vec![],
            locked: None,
        };
        self.tenant.commit(&manifest).unwrap();
        (number, manifest.created.to_string())
    }

    /// Stores and commits one disk of these bytes.
    pub fn backup(&self, vm: &str, bytes: &[u8]) -> (u32, String) {
        self.commit(vm, vec![self.store_disk("disk-0", &Model::of(bytes))], None)
    }

    /// The packs, largest first.
    pub fn packs(&self) -> Vec<PathBuf> {
        let shelves = std::fs::read_dir(self.repo().join("tenants/default/packs")).unwrap();
        let mut packs: Vec<PathBuf> = shelves
            .flat_map(|shelf| std::fs::read_dir(shelf.unwrap().path()).unwrap())
            .map(|pack| pack.unwrap().path())
            .collect();
        packs.sort_by_key(|pack| std::cmp::Reverse(std::fs::metadata(pack).unwrap().len()));
        packs
    }
}

/// Flips one bit of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// Numbers that look random and are the same each time.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Bytes of a disk with everything that makes a difference: holes, clusters that compress, that do not, that are zero in
/// part.
pub fn disk_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed | 1);
    let mut bytes = vec![0; length];
    for cluster in bytes.chunks_mut(CLUSTER) {
        let kind = numbers.below(5);
        let half = cluster.len() / 2;
        match kind {
            0 => {}
            1 => cluster.iter_mut().for_each(|byte| *byte = numbers.next().to_le_bytes()[3]),
            2 => cluster.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 100).to_le_bytes()[0]),
            3 => cluster[half..].iter_mut().for_each(|byte| *byte = numbers.below(7).to_le_bytes()[0] + 1),
            _ => cluster[..half].fill(0x5a),
        }
    }
    bytes
}

/// Bytes of the clusters that hold data, clipped to the disk.
pub fn used(bytes: &[u8]) -> u64 {
    bytes.chunks(CLUSTER).filter(|cluster| !is_zero(cluster)).map(|cluster| cluster.len() as u64).sum()
}

/// `lseek` for data or holes on a model, by cluster.
pub fn model_seek(bytes: &[u8], offset: u64, want_hole: bool) -> Option<u64> {
    let length = bytes.len() as u64;
    let is_hole = |cluster: u64| {
        let start = usize::try_from(cluster).unwrap() * CLUSTER;
        is_zero(&bytes[start..bytes.len().min(start + CLUSTER)])
    };
    let first = offset / CLUSTER as u64;
    let found = (first..cluster_count(length)).find(|&cluster| is_hole(cluster) == want_hole);
    let found = found.map(|cluster| (cluster * CLUSTER as u64).max(offset));
    if want_hole { Some(found.unwrap_or(length)) } else { found }
}

/// A journal whose lines can be read.
pub fn journal() -> (Arc<Journal>, Arc<Mutex<Vec<String>>>) {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let written = lines.clone();
    (Arc::new(Journal::to(move |line| written.lock().push(line.to_owned()))), lines)
}
