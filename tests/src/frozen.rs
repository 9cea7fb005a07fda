//! What the frozen vault under `tests/frozen/v1` holds, as its `expected.json` says it. Made by `bin/freeze.rs` from the disks
//! that were backed up, never from the vault.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::frames::FrameDecoder;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, ClusterIndex, cluster_count};
use reseal_format::ids::{Digest, NoteId, PointId};
use reseal_format::keys::Kind;
use reseal_format::layout;
use reseal_format::manifest::{Disk, Note};
use reseal_format::names::{TenantName, VmName};
use reseal_format::seal::MAX_OBJECT;
use reseal_kms::Keyring;
use reseal_store::Local;
use reseal_vault::heads::Heads;
use reseal_vault::{Packs, State, Tenant, Tree, Wait};
use reseal_writer::verify::{Report, Verify, What};
use serde::{Deserialize, Serialize};

/// Longest disk whose bytes are hashed as a whole; of longer ones, which are sparse, only the clusters are.
pub const MAX_WHOLE: u64 = 128 << 20;

/// The content of a vault.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    pub tenant: String,
    /// By VM, then by number.
    pub points: Vec<ExpectedPoint>,
    pub tombstones: Vec<ExpectedTombstone>,
    pub notes: Vec<ExpectedNote>,
}

/// A restore point.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedPoint {
    pub vm: String,
    pub number: u32,
    pub definition: Option<String>,
    pub disks: Vec<ExpectedDisk>,
}

/// A disk of a restore point.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedDisk {
    pub name: String,
    pub length: u64,
    /// BLAKE3 of all its bytes, if it has at most [`MAX_WHOLE`].
    pub whole: Option<Digest>,
    /// BLAKE3 of (index as 8 bytes, little-endian ‖ 65,536 bytes) of each cluster that is not all zeros, in order; what lies
    /// past the end of the disk counts as zeros.
    pub clusters: Digest,
}

/// A tombstone.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedTombstone {
    pub vm: String,
    pub number: u32,
    pub point_id: PointId,
    pub digest: Digest,
    pub reason: String,
}

/// A note.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedNote {
    pub vm: String,
    pub number: u32,
    pub note_id: NoteId,
    pub kind: String,
    pub content: serde_json::Value,
}

impl ExpectedDisk {
    /// Hashes a disk, given its clusters that are not all zeros, in order and each whole.
    pub fn of<'a>(name: &str, length: u64, clusters: impl Iterator<Item = (u64, &'a [u8])>) -> ExpectedDisk {
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        let mut whole = if length <= MAX_WHOLE { vec![0; size] } else { Vec::new() };
        let mut listed = Vec::new();
        for (index, bytes) in clusters {
            listed.extend(index.to_le_bytes());
            listed.extend(bytes);
            if length <= MAX_WHOLE {
                let start = usize::try_from(index * CLUSTER_U64).unwrap_or(usize::MAX);
                let end = size.min(start + bytes.len());
                whole[start..end].copy_from_slice(&bytes[..end - start]);
            }
        }
        ExpectedDisk {
            name: name.to_owned(),
            length,
            whole: (length <= MAX_WHOLE).then(|| Digest::of(&whole)),
            clusters: Digest::of(&listed),
        }
    }
}

/// A copy of a frozen vault.
pub struct Frozen {
    folder: tempfile::TempDir,
    pub expected: Expected,
}

/// The same, opened.
pub struct Thawed {
    folder: tempfile::TempDir,
    pub expected: Expected,
    tenant: Arc<Tenant>,
    tree: Tree,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), &target).unwrap()),
        }
    }
}

impl Frozen {
    /// Copies the vault of that version.
    pub fn copy(version: &str) -> Frozen {
        let frozen = Path::new(env!("CARGO_MANIFEST_DIR")).join("frozen").join(version);
        let folder = tempfile::tempdir().unwrap();
        copy(&frozen, &folder.path().join("copy"));
        let expected = serde_json::from_slice(&fs::read(frozen.join("expected.json")).unwrap()).unwrap();
        let frozen = Frozen { folder, expected };
        // Version control keeps no such mode, and the keyring demands it.
        fs::set_permissions(frozen.keyring(), Permissions::from_mode(0o600)).unwrap();
        frozen
    }

    /// Folder of the vault.
    pub fn vault(&self) -> PathBuf {
        self.folder.path().join("copy/vault")
    }

    /// The keyring, which has no passphrase.
    pub fn keyring(&self) -> PathBuf {
        self.folder.path().join("copy/keyring.json")
    }

    /// Opens it.
    pub fn thaw(self) -> Thawed {
        let keyring = Keyring::open(&self.keyring(), |_| unreachable!("it has no passphrase")).unwrap();
        let name = TenantName::new(&self.expected.tenant).unwrap();
        let store = Arc::new(Local::new(self.vault()));
        let tenant = Arc::new(Tenant::open(store, "frozen", &name, Arc::new(keyring)).unwrap());
        let tree = Tree::new(Arc::new(Packs::new(tenant.clone(), 8 << 20)), 8 << 20);
        Thawed { folder: self.folder, expected: self.expected, tenant, tree }
    }
}

impl Thawed {
    /// Reads a disk cluster by cluster and hashes it.
    fn disk(&self, disk: &Disk) -> ExpectedDisk {
        let mut decoder = FrameDecoder::new().unwrap();
        let mut clusters = Vec::new();
        let (mut at, end) = (ClusterIndex(0), cluster_count(disk.length));
        while let Some(cluster) = self.tree.next(disk, at, end, false).unwrap() {
            let blob = self.tree.blob(disk, cluster, Wait::May).unwrap().unwrap();
            let (mut content, mut plain) = (Vec::new(), vec![0; CLUSTER]);
            self.tree.packs().read_blob(Kind::DataPack, blob, Wait::May, &mut content).unwrap();
            decoder.decode(&content, &mut plain).unwrap();
            clusters.push((cluster.0, plain));
            at = ClusterIndex(cluster.0 + 1);
        }
        assert_eq!(clusters.len() as u64, disk.used_clusters, "{}", disk.name);
        let clusters = clusters.iter().map(|(index, bytes)| (*index, bytes.as_slice()));
        ExpectedDisk::of(disk.name.as_str(), disk.length, clusters)
    }

    fn notes(&self, vm: &VmName) -> Vec<ExpectedNote> {
        let folder = layout::notes(self.tenant.name(), vm);
        let open = |name: &str| {
            let (number, id) = layout::parse_note_file(name).unwrap();
            let object = self.tenant.store().get(&format!("{folder}{name}"), MAX_OBJECT).unwrap();
            let note = Note::open(&self.tenant.keys(), vm, number, id, &object).unwrap();
            assert_eq!(note.point_id, self.tenant.point(vm, number).unwrap().manifest.point_id);
            ExpectedNote { vm: vm.to_string(), number, note_id: note.note_id, kind: note.kind, content: note.content }
        };
        self.tenant.store().list(&folder).unwrap().iter().map(|entry| open(&entry.name)).collect()
    }

    /// All that the vault holds, in the form of what it should hold.
    pub fn content(&self) -> Expected {
        let tenant = self.tenant.name().to_string();
        let mut found = Expected { tenant, points: Vec::new(), tombstones: Vec::new(), notes: Vec::new() };
        for vm in self.tenant.vms().unwrap() {
            for (number, state) in self.tenant.chain(&vm).unwrap().numbers() {
                match state {
                    State::Live => {
                        let manifest = self.tenant.point(&vm, number).unwrap().manifest;
                        found.points.push(ExpectedPoint {
                            vm: vm.to_string(),
                            number,
                            definition: manifest.definition.map(|definition| definition.text),
                            disks: manifest.disks.iter().map(|disk| self.disk(disk)).collect(),
                        });
                    }
                    State::Forgotten => {
                        let tombstone = self.tenant.tombstone(&vm, number).unwrap();
                        found.tombstones.push(ExpectedTombstone {
                            vm: vm.to_string(),
                            number,
                            point_id: tombstone.point_id,
                            digest: tombstone.digest,
                            reason: tombstone.reason,
                        });
                    }
                    State::Missing => panic!("{vm}@{number} is missing"),
                }
            }
            found.notes.extend(self.notes(&vm));
        }
        found
    }

    /// Verifies every object of the tenant.
    pub fn verify(&self) -> Report {
        let state = self.folder.path().join("state");
        let heads = Heads::new(&state, &self.tenant.keys().scope(), false);
        Verify::new(self.tenant.clone(), &heads, &state).run(&What::Everything, 2, |_| {}, &|_| {}).unwrap()
    }
}
