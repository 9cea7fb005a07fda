//! Backups that are told what changed: they read no more, and what they are told is believed only as far as it can be.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reseal_tests::library::LibraryDisk;
use reseal_tests::model::{DiskFile, ModelDisk};
use reseal_tests::process::Run;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const CLUSTER: u64 = 65_536;
const LENGTH: u64 = 400 * CLUSTER;

/// A disk, its model, and the areas that changed since the last backup.
struct Disk {
    site: Site,
    path: PathBuf,
    file: DiskFile,
    model: ModelDisk,
    areas: Vec<(u64, u64)>,
    random: Random,
}

impl Disk {
    fn new() -> Disk {
        let site = Site::new();
        let path = site.disk("disk.raw");
        DiskFile::create(&path, LENGTH);
        let file = DiskFile(fs::File::options().read(true).write(true).open(&path).unwrap());
        let model = ModelDisk::new(LENGTH);
        let mut disk = Disk { site, path, file, model, areas: Vec::new(), random: Random::new(11) };
        disk.write(0, 200 * CLUSTER);
        disk.areas.clear();
        disk
    }

    fn write(&mut self, at: u64, length: u64) {
        self.write_unseen(at, length);
        self.areas.push((at, length));
    }

    /// A write that no list will tell of.
    fn write_unseen(&mut self, at: u64, length: u64) {
        let bytes = self.random.bytes(usize::try_from(length).unwrap());
        self.file.write(at, &bytes);
        self.model.write(at, &bytes);
    }

    /// A list of the areas as a file, between two change ids.
    fn list(&mut self, since: Option<&str>, now: Option<&str>) -> PathBuf {
        let areas: Vec<_> =
            self.areas.drain(..).map(|(start, length)| json!({"start": start, "length": length})).collect();
        let list =
            json!({"changeId": since, "newChangeId": now, "startOffset": 0, "length": LENGTH, "changedArea": areas});
        let path = self.site.path("changes.json");
        fs::write(&path, list.to_string()).unwrap();
        path
    }

    fn backup(&self, list: &Path, more: &[&str]) -> Run {
        let words = ["backup", "--json", "vm", self.path.to_str().unwrap(), "--changes", list.to_str().unwrap()];
        self.site.reseal(words.iter().chain(more))
    }

    #[track_caller]
    fn assert_point(&self, point: &Value) {
        let number = u32::try_from(point["number"].as_u64().unwrap()).unwrap();
        let disk = LibraryDisk::open(&self.site.tenant(), "vm", number, "disk-0").unwrap();
        self.model.assert_same(&disk, &format!("point {number}"));
    }
}

fn warned(point: &Value) -> String {
    point["warnings"].to_string()
}

#[test]
fn change_ids_lead_from_one_point_to_the_next_and_to_no_other() {
    let mut disk = Disk::new();
    let list = disk.list(None, Some("52 aa/1"));
    disk.backup(&list, &[]).fails(2, &["no changeId", "--since"]);

    // The first has nothing to start from, and reads everything without a word.
    let list = disk.list(Some("52 aa/0"), Some("52 aa/1"));
    let first = disk.backup(&list, &[]).ok().json();
    assert_eq!((&first["warnings"], &first["disks"][0]["tracking"]["id"]), (&json!([]), &json!("52 aa/1")));
    assert_eq!(first["stats"]["read"], 200 * CLUSTER);

    // Overlapping and unaligned areas; one that ends where the disk has a hole, one of zeros.
    disk.write(10 * CLUSTER + 700, 3 * CLUSTER);
    disk.write(12 * CLUSTER, 4 * CLUSTER);
    disk.write(300 * CLUSTER + 5, 10);
    disk.file.punch(100 * CLUSTER, 8 * CLUSTER);
    disk.model.zero(100 * CLUSTER, 8 * CLUSTER);
    disk.areas.push((100 * CLUSTER, 8 * CLUSTER));
    let list = disk.list(Some("52 aa/1"), Some("52 aa/2"));
    let second = disk.backup(&list, &["--check-unchanged", "0"]).ok().json();
    assert_eq!(second["stats"]["read"], 7 * CLUSTER, "clusters 10 to 15, and 300");
    let claim =
        json!({"method": "vmware-change-id", "id": "52 aa/1", "since": 1, "changed": 15 * CLUSTER, "checked": 0});
    assert_eq!((&second["disks"][0]["claim"], &second["warnings"]), (&claim, &json!([])));
    disk.assert_point(&second);
    let shown = disk.site.reseal(["show", "vm@2"]).ok().said();
    assert!(shown.contains("vmware-change-id 52 aa/1 since vm@1") && shown.contains("52 aa/2"), "{shown}");

    // A list that starts at another moment is not used.
    disk.write(20 * CLUSTER, CLUSTER);
    disk.write_unseen(30 * CLUSTER, CLUSTER);
    let list = disk.list(Some("52 aa/1"), Some("52 aa/3"));
    let third = disk.backup(&list, &["--check-unchanged", "0"]).ok().json();
    assert!(warned(&third).contains("everything was read") && warned(&third).contains("52 aa/2"), "{third}");
    assert!(third["disks"][0]["claim"].is_null());
    disk.assert_point(&third);
    disk.site.verify();
}

#[test]
fn a_lie_that_is_found_makes_the_backup_read_everything() {
    let mut disk = Disk::new();
    let list = disk.list(Some("a"), Some("b"));
    disk.backup(&list, &[]).ok();
    disk.write(5 * CLUSTER, CLUSTER);
    disk.write_unseen(390 * CLUSTER, 512);
    let list = disk.list(Some("b"), Some("c"));
    let found = disk.backup(&list, &["--check-unchanged", "100"]).ok().json();
    let told = warned(&found);
    assert!(told.contains("vmware-change-id b was wrong") && told.contains(&(390 * CLUSTER).to_string()), "{found}");
    assert!(found["disks"][0]["claim"].is_null());
    // Two clusters changed, however often they were read.
    assert_eq!(found["stats"]["changed"], 2 * CLUSTER);
    disk.assert_point(&found);

    // A true one passes the same test, and so it is recorded.
    disk.write(6 * CLUSTER, CLUSTER);
    let list = disk.list(Some("c"), None);
    let passed = disk.backup(&list, &["--check-unchanged", "100"]).ok().json();
    assert_eq!(passed["disks"][0]["claim"]["checked"], 399 * CLUSTER);
    assert_eq!((&passed["stats"]["changed"], &passed["warnings"]), (&json!(CLUSTER), &json!([])));
    disk.assert_point(&passed);

    // Of a hole nothing is read, and yet it is seen that data was there.
    disk.file.punch(48 * CLUSTER, 32 * CLUSTER);
    disk.model.zero(48 * CLUSTER, 32 * CLUSTER);
    let list = disk.list(None, None);
    let punched = disk.backup(&list, &["--since", "vm@latest", "--check-unchanged", "100"]).ok().json();
    assert!(warned(&punched).contains(&format!("the bytes from {} on", 48 * CLUSTER)), "{punched}");
    disk.assert_point(&punched);

    // Unless told otherwise some of the user's word is checked.
    let list = disk.list(None, None);
    let checked = disk.backup(&list, &["--since", "vm@latest"]).ok().json();
    let share = checked["disks"][0]["claim"]["checked"].as_u64().unwrap();
    assert!((3 * CLUSTER..=5 * CLUSTER).contains(&share), "1 % of 400 clusters: {share}");
}

#[test]
fn lists_that_can_not_be_about_the_disk_are_refused_by_name() {
    let mut disk = Disk::new();
    let list = disk.list(Some("a"), Some("b"));
    disk.backup(&list, &[]).ok();
    fs::write(&list, r#"{"startOffset": 0, "length": 5, "changedArea": [{"start": 1, "length": 5}]}"#).unwrap();
    disk.backup(&list, &["--since", "vm@1"]).fails(2, &["changes.json", "outside of its window"]);
    fs::write(&list, "nonsense").unwrap();
    disk.backup(&list, &["--since", "vm@1"]).fails(2, &["changes.json", "QueryChangedDiskAreas"]);
    let list = disk.list(None, None);
    disk.backup(&list, &["--since", "other@1"]).fails(2, &["--since other@1"]);
    disk.backup(&list, &["--since", "vm@7"]).fails(1, &["vm@7"]);
    // Areas past the disk's end: the list is another disk's, or of another day.
    disk.write_unseen(0, 10);
    let past = json!({"startOffset": 0, "length": 2 * LENGTH, "changedArea": [{"start": LENGTH - 5, "length": 6}]});
    fs::write(&list, past.to_string()).unwrap();
    let read = disk.backup(&list, &["--since", "vm@1"]).ok().json();
    assert!(warned(&read).contains("past the disk's end"), "{read}");
    disk.assert_point(&read);
    // A window of half the disk says nothing of the other half.
    disk.write_unseen(399 * CLUSTER, CLUSTER);
    let half = json!({"startOffset": 0, "length": LENGTH / 2, "changedArea": []});
    fs::write(&list, half.to_string()).unwrap();
    let read = disk.backup(&list, &["--since", "vm@latest", "--check-unchanged", "0"]).ok().json();
    assert_eq!((&read["stats"]["changed"], &read["warnings"]), (&json!(CLUSTER), &json!([])));
    disk.assert_point(&read);
}

#[test]
fn what_is_known_to_be_damaged_is_read_again_though_it_did_not_change() {
    let mut disk = Disk::new();
    let list = disk.list(Some("a"), Some("b"));
    disk.backup(&list, &[]).ok();
    let pack = disk.site.vault.join(&disk.site.packs(1)[0]);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[1000] ^= 1;
    fs::write(&pack, bytes).unwrap();
    disk.site.reseal(["verify"]).expect(&[3]);
    let list = disk.list(Some("b"), Some("c"));
    let mended = disk.backup(&list, &["--check-unchanged", "0"]).ok().json();
    assert_eq!((&mended["stats"]["read"], &mended["stats"]["new"]), (&json!(CLUSTER), &json!(CLUSTER)));
    disk.assert_point(&mended);
    disk.site.reseal(["verify", "vm@2"]).ok();
}

#[test]
fn a_limit_on_the_rate_is_kept() {
    let disk = Disk::new();
    let began = Instant::now();
    disk.site.reseal(["backup", "vm", disk.path.to_str().unwrap(), "--limit-rate", "10M"]).ok();
    // 12.5 MiB, of which the first MiB and a tenth of a second's worth go at once.
    assert!(began.elapsed() > Duration::from_secs_f64(1.0), "{:?}", began.elapsed());
    disk.site.reseal(["backup", "vm", disk.path.to_str().unwrap(), "--limit-rate", "0"]).fails(2, &["limit-rate"]);
}
