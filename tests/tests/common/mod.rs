//! A vault with an object of every kind, for those who change it.
#![allow(dead_code)] // each test file uses its part

use std::fs;
use std::path::PathBuf;

use reseal_format::ids::NoteId;
use reseal_format::layout;
use reseal_format::manifest::{Note, Tombstone};
use reseal_format::names::TenantName;
use reseal_format::time::Timestamp;
use reseal_tests::library::{LibraryDisk, vm};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::site::{Site, files_below};

/// Points of `vm` that are live; the one between them is forgotten.
const LIVE: [u32; 3] = [1, 2, 4];
const FORGOTTEN: u32 = 3;

/// What became of a point's content.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Right,
    Refused,
}

/// A site whose vault is attacked.
pub(crate) struct Victim {
    pub(crate) site: Site,
    disks: Vec<(PathBuf, Vec<u8>)>,
    listed: String,
}

/// The file in which a site remembers what it saw.
pub(crate) fn seen_file(site: &Site) -> PathBuf {
    files_below(&site.state).into_iter().find(|path| path.ends_with("seen.json")).unwrap()
}

impl Victim {
    /// Four points, of which one is forgotten and one has notes; all packs are small, so that all is quick.
    pub(crate) fn new() -> Victim {
        let site = Site::new();
        let mut random = Random::new(99);
        let mut disks = Vec::new();
        let mut content = random.bytes(200_000);
        for number in 1..=4 {
            let at = random.index(100_000);
            random.fill(&mut content[at..at + 90_000]);
            let path = site.disk(&format!("{number}.raw"));
            fs::write(&path, &content).unwrap();
            site.backup("vm", &path);
            disks.push((path, content.clone()));
        }
        let mut victim = Victim { site, disks, listed: String::new() };
        victim.forget();
        victim.note();
        victim.note();
        victim.site.verify();
        victim.listed = victim.site.reseal(["list", "--json"]).ok().stdout;
        victim
    }

    /// What `forget` does: a tombstone first, then the manifest goes.
    fn forget(&self) {
        let tenant = self.site.tenant();
        let point = tenant.point(&vm("vm"), FORGOTTEN).unwrap();
        let tombstone = Tombstone {
            vm: point.manifest.vm.clone(),
            vm_id: point.manifest.vm_id,
            number: FORGOTTEN,
            point_id: point.manifest.point_id,
            digest: point.digest,
            parent: point.manifest.parent,
            reason: "a test".into(),
            created: point.manifest.created,
            fenced: false,
        };
        let name = TenantName::new("default").unwrap();
        let object = tombstone.seal(&tenant.keys(), reseal_vault::random().unwrap()).unwrap();
        tenant.store().create(&layout::tombstone(&name, &vm("vm"), FORGOTTEN), &object).unwrap();
        tenant.store().delete(&layout::manifest(&name, &vm("vm"), FORGOTTEN)).unwrap();
    }

    fn note(&self) {
        let tenant = self.site.tenant();
        let point = tenant.point(&vm("vm"), 2).unwrap().manifest;
        let note = Note {
            note_id: NoteId::from_bytes(reseal_vault::random().unwrap()),
            vm: point.vm.clone(),
            vm_id: point.vm_id,
            number: 2,
            point_id: point.point_id,
            created: Timestamp(point.created.0 + 5),
            kind: "boot-verdict".into(),
            content: serde_json::json!({ "boots": true }),
        };
        let name = TenantName::new("default").unwrap();
        let object = note.seal(&tenant.keys(), reseal_vault::random().unwrap()).unwrap();
        tenant.store().create(&layout::note(&name, &vm("vm"), 2, note.note_id), &object).unwrap();
    }

    /// Manifests, tombstones and notes.
    pub(crate) fn sealed(&self) -> Vec<String> {
        self.site.objects().into_iter().filter(|key| key.contains("/vms/")).collect()
    }

    /// Packs of data and of index nodes.
    pub(crate) fn packs(&self) -> Vec<String> {
        let packs: Vec<_> = self.site.objects().into_iter().filter(|key| key.contains("/packs/")).collect();
        assert_eq!((self.site.packs(1).len(), self.site.packs(2).len(), packs.len()), (4, 4, 8));
        packs
    }

    pub(crate) fn read(&self, key: &str) -> Vec<u8> {
        fs::read(self.site.vault.join(key)).unwrap()
    }

    pub(crate) fn write(&self, key: &str, bytes: &[u8]) {
        fs::write(self.site.vault.join(key), bytes).unwrap();
    }

    /// The path of the disk of a point, counted from 0.
    pub(crate) fn disk(&self, nth: usize) -> &str {
        self.disks[nth].0.to_str().unwrap()
    }

    /// Whether a live point can't be read without an object.
    pub(crate) fn is_needed(&self, key: &str) -> bool {
        assert!(!self.site.vault.join(key).exists());
        !key.contains("/packs/") || LIVE.iter().any(|&number| self.read_point(number) == Content::Refused)
    }

    /// By which name an object that is gone is reported: nobody can know that a number was forgotten.
    pub(crate) fn reported_as<'a>(&self, key: &'a str) -> &'a str {
        key.strip_suffix(".forgotten").unwrap_or(key)
    }

    /// `verify` names the object and ends with 3, and nothing wrong is served.
    #[track_caller]
    pub(crate) fn assert_reported(&self, key: &str, how: &str) {
        let run = self.site.reseal(["verify", "--json"]);
        assert_eq!(run.status, Some(3), "{key}, {how}: {run:#?}");
        let damaged = run.json()["damaged"].as_array().unwrap().clone();
        // The last point has no later one that would show its gap; it is missed by what was seen of the VM.
        let is_newest = key.ends_with("00000004.manifest") && !self.site.vault.join(key).exists();
        let named = |object: &str| object.starts_with(key) || (is_newest && key.starts_with(object));
        assert!(damaged.iter().any(|one| named(one["object"].as_str().unwrap())), "{key}, {how}: {damaged:#?}");
        self.assert_never_wrong();
    }

    /// What is read is right, or refused; lists show nothing that is not so.
    #[track_caller]
    pub(crate) fn assert_never_wrong(&self) {
        for number in LIVE {
            self.read_point(number);
        }
        let listed = self.site.reseal(["list", "--json"]).expect(&[0, 1, 3, 4]);
        assert!(listed.stdout.lines().all(|line| self.listed.contains(line)), "{listed:#?}");
        for number in LIVE {
            let shown = self.site.reseal(["show", "--json", &format!("vm@{number}")]).expect(&[0, 1, 3, 4]);
            assert!(self.listed.contains(&shown.stdout), "{shown:#?}");
        }
    }

    /// A damage that may not matter: then all is as before; otherwise no command succeeds wrongly, and none panics.
    #[track_caller]
    pub(crate) fn assert_refused_or_same(&self, how: &str) {
        self.assert_never_wrong();
        let verified = self.site.reseal(["verify"]).expect(&[0, 1, 3, 4]);
        if verified.status == Some(0) {
            let listed = self.site.reseal(["list", "--json"]).ok().stdout;
            assert_eq!(listed, self.listed, "{how}");
            assert!(LIVE.iter().all(|&number| self.read_point(number) == Content::Right), "{how}");
        } else {
            assert!(!verified.said().trim().is_empty(), "{how}");
        }
    }

    /// Reads a point through the library and by a restore, which must agree.
    #[track_caller]
    pub(crate) fn read_point(&self, number: u32) -> Content {
        let right = &self.disks[number as usize - 1].1;
        let tenant = self.site.tenant_in(self.site.store());
        let read = tenant.and_then(|tenant| LibraryDisk::open(&tenant, "vm", number, "disk-0")?.all());
        let out = self.site.path("restored.raw");
        let run = self.site.restore(&format!("vm@{number}"), "disk-0", &out).expect(&[0, 1, 3, 4]);
        if run.status == Some(0) {
            assert!(fs::read(&out).unwrap() == *right, "vm@{number} was restored wrong");
        }
        let _ = fs::remove_file(&out);
        match read {
            Ok(bytes) => {
                assert!(bytes == *right, "vm@{number} was served wrong");
                Content::Right
            }
            Err(_) => {
                assert_ne!(run.status, Some(0), "vm@{number} was restored, though it can't be read");
                Content::Refused
            }
        }
    }

    /// Whatever a mount shows is right, read in the order of its listing; what is not right is an error.
    #[track_caller]
    pub(crate) fn assert_mount_never_wrong(&self) {
        let Ok(mounted) = Mounted::try_new(&self.site, "mnt", &[]) else { return };
        let points = fs::read_dir(mounted.path.join("vm")).into_iter().flatten();
        let mut served = 0;
        for point in points.flatten() {
            let name = point.file_name().into_string().unwrap();
            let Ok(read) = fs::read(point.path().join("disk-0.raw")) else { continue };
            served += 1;
            let line = match name.as_str() {
                "latest" => self.listed.lines().last(),
                time => self.listed.lines().find(|line| line.contains(time)),
            };
            let number = serde_json::from_str::<serde_json::Value>(line.unwrap()).unwrap()["number"].as_u64().unwrap();
            let right = |(_, content): &(PathBuf, Vec<u8>)| *content == read;
            let position = self.disks.iter().position(right).map(|nth| nth as u64 + 1);
            assert!(position == Some(number), "{name} was served wrong: it is {position:?}");
        }
        assert!(served <= LIVE.len() + 1);
        mounted.umount(&self.site).ok();
    }

    /// After all damage was undone.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        self.site.verify();
        assert_eq!(self.site.reseal(["list", "--json"]).ok().stdout, self.listed);
        assert!(LIVE.iter().all(|&number| self.read_point(number) == Content::Right));
    }
}
