//! Makes the frozen vault: `RESEAL_FREEZE=1 freeze target/debug/reseal tests/frozen/v1`.
//!
//! Run once a format version, with the `reseal` of that version. What it makes is committed and read by tests for ever after,
//! so it refuses a folder that exists. Tombstone and note come from the library, for no command made them then.

#![allow(clippy::unwrap_used, reason = "a tool of developers fails by panicking")]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use reseal_format::geometry::{CLUSTER, CLUSTER_U64, cluster_count, is_zero};
use reseal_format::ids::NoteId;
use reseal_format::layout;
use reseal_format::manifest::{Note, Tombstone};
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::Keyring;
use reseal_store::Local;
use reseal_tests::frozen::{Expected, ExpectedDisk, ExpectedNote, ExpectedPoint, ExpectedTombstone};
use reseal_vault::{Tenant, random};

const TENANT: &str = "acme & co";
const WEB: &str = "web01";
/// A name that its object keys spell otherwise.
const DB: &str = ".db 01 ä";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A disk as it should be: its clusters that are not all zeros.
#[derive(Default)]
struct Model {
    length: u64,
    clusters: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            let cluster = self.clusters.entry(at / CLUSTER_U64).or_insert_with(|| vec![0; CLUSTER]);
            cluster[usize::try_from(at % CLUSTER_U64).unwrap()] = *byte;
        }
        self.length = self.length.max(offset + bytes.len() as u64);
        self.clusters.retain(|_, cluster| !is_zero(cluster));
    }

    fn resize(&mut self, length: u64) {
        self.length = length;
        self.clusters.split_off(&cluster_count(length));
        if let Some(last) = self.clusters.get_mut(&(length / CLUSTER_U64)) {
            last[usize::try_from(length % CLUSTER_U64).unwrap()..].fill(0);
        }
        self.clusters.retain(|_, cluster| !is_zero(cluster));
    }

    fn save(&self, path: &Path) {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(self.length).unwrap();
        for (index, bytes) in &self.clusters {
            let start = index * CLUSTER_U64;
            let end = usize::try_from((self.length - start).min(CLUSTER_U64)).unwrap();
            file.write_all_at(&bytes[..end], start).unwrap();
        }
    }

    fn expected(&self, name: &str) -> ExpectedDisk {
        ExpectedDisk::of(name, self.length, self.clusters.iter().map(|(index, bytes)| (*index, bytes.as_slice())))
    }
}

/// Bytes that compress well, different for each seed.
fn text(seed: u64, length: u64) -> Vec<u8> {
    let line = |n: u64| format!("{seed} line {} of a file that changes little\n", n * n % 97);
    (0..).flat_map(|n| line(n).into_bytes()).take(usize::try_from(length).unwrap()).collect()
}

/// Bytes that do not compress (xorshift64).
fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(usize::try_from(length).unwrap()).collect()
}

struct Freezer {
    reseal: PathBuf,
    target: PathBuf,
    scratch: tempfile::TempDir,
    points: Vec<ExpectedPoint>,
}

impl Freezer {
    fn reseal(&self, args: &[&str]) {
        let mut command = Command::new(&self.reseal);
        command.args(["--repo", self.path("vault").to_str().unwrap(), "--tenant", TENANT, "--allow-swap", "--quiet"]);
        command.args(["--keyring", self.path("keyring.json").to_str().unwrap()]);
        command.args(["--state", self.scratch.path().join("state").to_str().unwrap()]);
        assert!(command.args(args).current_dir(self.scratch.path()).status().unwrap().success(), "{args:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    fn backup(&mut self, vm: &str, definition: Option<&str>, options: &[&str], disks: &[(&str, &Model)]) {
        let mut args = vec!["backup".to_owned(), vm.to_owned()];
        args.extend(options.iter().map(|option| (*option).to_owned()));
        if let Some(text) = definition {
            std::fs::write(self.scratch.path().join("definition.xml"), text).unwrap();
            args.extend(["--definition".to_owned(), "definition.xml".to_owned()]);
        }
        for (name, model) in disks {
            model.save(&self.scratch.path().join(format!("{name}.raw")));
            args.push(format!("{name}={name}.raw"));
        }
        self.reseal(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let number = 1 + self.points.iter().filter(|point| point.vm == vm).count();
        self.points.push(ExpectedPoint {
            vm: vm.to_owned(),
            number: u32::try_from(number).unwrap(),
            definition: definition.map(str::to_owned),
            disks: disks.iter().map(|(name, model)| model.expected(name)).collect(),
        });
    }

    /// Four points: growth past one leaf, holes, shrinking, disks that go and come, every frame size.
    fn web(&mut self) {
        let (mut root, mut data) = (Model::default(), Model::default());
        root.write(0, &text(1, 200 * KIB));
        root.write(MIB, &noise(2, 40 * KIB));
        root.write(2 * MIB, &text(1, 64 * KIB));
        root.resize(3 * MIB + 5);
        data.write(10, &text(3, 99_990));
        let xml = "<domain type='kvm'>\n  <name>web01</name>\n</domain>\n";
        self.backup(WEB, Some(xml), &["--frame", "16"], &[("root", &root), ("data", &data)]);

        root.resize(70 * MIB);
        root.write(69 * MIB + 1234, &text(4, 70 * KIB));
        root.write(70 * KIB, b"changed in place");
        data.resize(40_000);
        self.backup(WEB, None, &["--frame", "32", "--level", "3"], &[("root", &root), ("data", &data)]);

        let mut swap = Model::default();
        swap.resize(MIB);
        root.write(MIB, &vec![0; 64 << 10]);
        self.backup(WEB, Some(xml), &["--frame", "64", "--level", "19"], &[("root", &root), ("swap", &swap)]);

        root.resize(150_001);
        self.backup(WEB, None, &[], &[("root", &root)]);
    }

    /// Two points of a disk so long that its index has three levels.
    fn db(&mut self) {
        let mut disk = Model::default();
        disk.write(5 * MIB, &text(5, 128 * KIB));
        disk.write((64 << 30) + 100 * MIB, &noise(6, 20 * KIB));
        disk.resize((65 << 30) + 512);
        self.backup(DB, None, &["--frame", "64"], &[("disk-0", &disk)]);
        disk.write(66 * MIB, &text(7, 100));
        self.backup(DB, None, &["--frame", "16"], &[("disk-0", &disk)]);
    }

    /// Forgets the second point of the web server, and adds a note about its third.
    fn finish(mut self) {
        let store = Arc::new(Local::new(self.path("vault")));
        let name = TenantName::new(TENANT).unwrap();
        let keyring = Keyring::open(&self.path("keyring.json"), |_| unreachable!("it has no passphrase")).unwrap();
        let tenant = Tenant::open(store, "vault", &name, Arc::new(keyring)).unwrap();
        let vm = VmName::new(WEB).unwrap();
        let gone = tenant.point(&vm, 2).unwrap();
        let later = |ms| Timestamp(gone.manifest.created.0 + ms);
        let tombstone = Tombstone {
            vm: vm.clone(),
            vm_id: gone.manifest.vm_id,
            number: 2,
            point_id: gone.manifest.point_id,
            digest: gone.digest,
            parent: gone.manifest.parent,
            reason: "frozen".into(),
            created: later(60_000),
            fenced: false,
        };
        let object = tombstone.seal(&tenant.keys(), random().unwrap()).unwrap();
        tenant.store().create(&layout::tombstone(&name, &vm, 2), &object).unwrap();
        tenant.store().delete(&layout::manifest(&name, &vm, 2)).unwrap();
        self.points.retain(|point| (point.vm.as_str(), point.number) != (WEB, 2));

        let noted = tenant.point(&vm, 3).unwrap().manifest;
        let note = Note {
            note_id: NoteId::from_bytes(random().unwrap()),
            vm: vm.clone(),
            vm_id: noted.vm_id,
            number: 3,
            point_id: noted.point_id,
            created: later(120_000),
            kind: "boot-verdict".into(),
            content: serde_json::json!({ "booted": true, "seconds": 31 }),
        };
        let object = note.seal(&tenant.keys(), random().unwrap()).unwrap();
        tenant.store().create(&layout::note(&name, &vm, 3, note.note_id), &object).unwrap();

        let expected = Expected {
            tenant: TENANT.into(),
            points: self.points,
            tombstones: vec![ExpectedTombstone {
                vm: WEB.into(),
                number: 2,
                point_id: tombstone.point_id,
                digest: tombstone.digest,
                reason: tombstone.reason,
            }],
            notes: vec![ExpectedNote {
                vm: WEB.into(),
                number: 3,
                note_id: note.note_id,
                kind: note.kind,
                content: note.content,
            }],
        };
        let text = serde_json::to_string_pretty(&expected).unwrap() + "\n";
        std::fs::write(self.target.join("expected.json"), text).unwrap();
        std::fs::remove_file(self.target.join("keyring.json.lock")).unwrap();
        std::fs::remove_dir(self.target.join("vault/tmp")).unwrap();
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    assert!(std::env::var_os("RESEAL_FREEZE").is_some(), "set RESEAL_FREEZE if you mean it");
    let [_, reseal, target] = &args[..] else { panic!("usage: freeze RESEAL FOLDER") };
    std::fs::create_dir(target).expect("a frozen vault is never made anew");
    let mut freezer = Freezer {
        reseal: std::path::absolute(reseal).unwrap(),
        target: std::path::absolute(target).unwrap(),
        scratch: tempfile::tempdir().unwrap(),
        points: Vec::new(),
    };
    freezer.reseal(&["init", "--no-recovery"]);
    freezer.db();
    freezer.web();
    freezer.finish();
}
