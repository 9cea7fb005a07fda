//! Domains of a real libvirt, backed up while they run: what is read, what is called changed, and what stays behind.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_format::ids::{PointId, VmId};
use reseal_format::manifest::{Disk, Manifest, Stats, method};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_tests::libvirtd::Libvirtd;
use reseal_tests::process::{bound_to_us, run, start, system};
use reseal_writer::BackupError;
use reseal_writer::libvirt::{Libvirt, LibvirtError, LibvirtOptions};
use reseal_writer::live::{Hypervisor, Snapshot, SnapshotDisk};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// What libvirt records in, in bytes.
const GRANULE: u64 = 64 << 10;

/// A libvirt with one domain, and a scratch folder.
struct Site {
    libvirtd: Libvirtd,
    scratch: tempfile::TempDir,
    points: std::cell::Cell<u8>,
}

/// Disk elements: an image of that kind, made first.
fn disk(site: &Site, target: &str, kind: &str) -> String {
    let path = site.image(target);
    let (path_text, size) = (path.to_str().unwrap(), if kind == "big" { "2G" } else { "16M" });
    let (format, encryption) = match kind {
        "luks" => {
            let secret = "11111111-2222-3333-4444-555555555555";
            let file = site.scratch.path().join("secret.xml");
            let xml = format!("<secret ephemeral='yes' private='yes'><uuid>{secret}</uuid></secret>");
            std::fs::write(&file, xml).unwrap();
            site.libvirtd.virsh(&["secret-define", file.to_str().unwrap()]).ok();
            std::fs::write(&file, "passphrase").unwrap();
            site.libvirtd.virsh(&["secret-set-value", secret, "--plain", "--file", file.to_str().unwrap()]).ok();
            let object = format!("secret,id=s,file={}", file.display());
            let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.hash-alg=sha512";
            // It measures processor time, and fails where it measures none.
            let made = (0..10).any(|_| {
                let words = ["create", "-q", "-f", "qcow2", "--object", &object, "-o", options, path_text, size];
                run(Command::new("qemu-img").args(words)).status == Some(0)
            });
            assert!(made);
            std::fs::remove_file(&file).unwrap();
            let secret = format!("<secret type='passphrase' uuid='{secret}'/>");
            ("qcow2", format!("<encryption format='luks'>{secret}</encryption>"))
        }
        "old" => {
            system("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", path_text, size]);
            ("qcow2", String::new())
        }
        "big" => {
            system("qemu-img", &["create", "-q", "-f", "qcow2", path_text, size]);
            ("qcow2", String::new())
        }
        format => {
            system("qemu-img", &["create", "-q", "-f", format, path_text, size]);
            (format, String::new())
        }
    };
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path_text}'>{encryption}\
         </source><target dev='{target}' bus='virtio'/></disk>"
    )
}

impl Site {
    /// A domain `web01` with disks of these kinds: vda, vdb, …
    fn new(kinds: &[&str]) -> Site {
        let scratch = tempfile::tempdir().unwrap();
        permit(scratch.path(), 0o711);
        let site = Site { libvirtd: Libvirtd::start(), scratch, points: 0.into() };
        let name = |nth: usize| format!("vd{}", char::from(b'a' + u8::try_from(nth).unwrap()));
        let disks: String = kinds.iter().enumerate().map(|(nth, kind)| disk(&site, &name(nth), kind)).collect();
        site.libvirtd.domain("web01", &format!("{disks}<disk type='file' device='cdrom'><target dev='sda'/></disk>"));
        site
    }

    fn image(&self, target: &str) -> PathBuf {
        self.libvirtd.images().join(target)
    }

    fn options(&self) -> LibvirtOptions {
        let scratch = Some(self.scratch.path().to_owned());
        LibvirtOptions { scratch, timeout: Duration::from_secs(120), ..LibvirtOptions::new("web01") }
    }

    fn libvirt(&self) -> Libvirt {
        Libvirt::new(self.options())
    }

    fn point(&self) -> PointId {
        self.points.set(self.points.get() + 1);
        PointId::from_bytes([self.points.get(); 16])
    }

    /// Begins a backup, which must succeed.
    #[track_caller]
    fn begin(&self, since: Option<&Manifest>) -> (Libvirt, Snapshot, Manifest) {
        let (mut libvirt, point) = (self.libvirt(), self.point());
        let snapshot = libvirt.begin(point, since).unwrap_or_else(|e| panic!("{e}\n{}", self.libvirtd.log()));
        let manifest = manifest(point, &snapshot, since);
        (libvirt, snapshot, manifest)
    }

    /// Nothing of a backup is there, but the checkpoint that this point names.
    #[track_caller]
    fn expect_clean(&self, kept: Option<&Manifest>) {
        let libvirtd = &self.libvirtd;
        let own = libvirtd.checkpoints("web01").into_iter().filter(|name| name.starts_with("reseal-"));
        let named: Vec<_> = kept.iter().map(|manifest| format!("reseal-{}", manifest.point_id)).collect();
        assert_eq!(own.collect::<Vec<_>>(), named);
        let job = libvirtd.virsh(&["backup-dumpxml", "web01"]);
        assert!(job.status != Some(0), "{job:?}");
        assert!(!libvirtd.virsh(&["secret-list"]).ok().stdout.contains("reseal"));
        let left = std::fs::read_dir(self.scratch.path()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        assert!(left.is_empty(), "{left:?}");
        if libvirtd.virsh(&["domstate", "web01"]).stdout.trim() == "running" {
            let sockets = std::fs::read_dir(libvirtd.sockets("web01")).unwrap();
            let names: Vec<_> = sockets.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            assert!(!names.iter().any(|name| name.contains("reseal")), "{names:?}");
        }
    }
}

fn permit(folder: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// What a pipeline would record.
fn manifest(point: PointId, snapshot: &Snapshot, since: Option<&Manifest>) -> Manifest {
    let disk = |disk: &SnapshotDisk| Disk {
        name: disk.name.clone(),
        length: 16 * MIB,
        root: None,
        used_clusters: 0,
        source: disk.source.clone(),
        tracking: disk.tracking.clone(),
        claim: None,
    };
    Manifest {
        vm: VmName::new("web01").unwrap(),
        vm_id: VmId::from_bytes([1; 16]),
        number: since.map_or(1, |since| since.number + 1),
        point_id: point,
        created: Timestamp(1),
        parent: None,
        disks: snapshot.disks.iter().map(disk).collect(),
        definition: snapshot.definition.clone(),
        stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
        warnings: snapshot.warnings.clone(),
        locked: None,
    }
}

fn uri(disk: &SnapshotDisk) -> String {
    format!("nbd+unix:///{}?socket={}", disk.export, disk.socket.display())
}

/// The bytes that an export shows.
fn content(disk: &SnapshotDisk) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy");
    system("nbdcopy", &[&uri(disk), path.to_str().unwrap()]);
    std::fs::read(path).unwrap()
}

/// The areas that an export calls changed.
fn changed(disk: &SnapshotDisk) -> Vec<(u64, u64)> {
    let bitmap = disk.changes.as_ref().unwrap();
    let map = system("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), &uri(disk)]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let number = |entry: &Value, field: &str| entry[field].as_u64().unwrap();
    let dirty = map.iter().filter(|entry| number(entry, "type") == 1);
    dirty.map(|entry| (number(entry, "offset"), number(entry, "length"))).collect()
}

/// Zeros with these areas written: value, offset, length.
fn model(writes: &[(u8, u64, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(16 * MIB).unwrap()];
    for (value, offset, length) in writes {
        let (from, to) = (usize::try_from(*offset).unwrap(), usize::try_from(offset + length).unwrap());
        bytes[from..to].fill(*value);
    }
    bytes
}

#[track_caller]
fn reason(disk: &SnapshotDisk, part: &str) {
    let why = disk.changes.as_ref().expect_err("it should be read whole");
    assert!(why.contains(part), "{why}");
}

#[track_caller]
fn begin_fails(site: &Site, options: LibvirtOptions) -> (LibvirtError, String) {
    match Libvirt::new(options).begin(site.point(), None) {
        Err(BackupError::Libvirt(e)) => {
            let text = e.to_string();
            (e, text)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_running_domain_is_read_as_it_was_and_later_only_what_changed() {
    let site = Site::new(&["qcow2", "raw", "luks", "old"]);
    let libvirtd = &site.libvirtd;
    let write = |nth, value, offset, length| libvirtd.guest_writes("web01", nth, value, offset, length);
    for nth in 0..4 {
        write(nth, 1, MIB, 3 * MIB);
    }
    libvirtd
        .virsh(&[
            "checkpoint-create-as",
            "web01",
            "daily",
            "--diskspec",
            "vda,checkpoint=bitmap",
            "--diskspec",
            "vdb,checkpoint=no",
            "--diskspec",
            "vdc,checkpoint=no",
            "--diskspec",
            "vdd,checkpoint=no",
        ])
        .ok();

    let (mut libvirt, snapshot, first) = site.begin(None);
    let names: Vec<_> = snapshot.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["vda", "vdb", "vdc", "vdd"]);
    assert!(
        snapshot.warnings.iter().any(|w| w.contains("sda (no medium)") && w.contains("CD-ROM")),
        "{:?}",
        snapshot.warnings
    );
    let definition = snapshot.definition.as_ref().unwrap();
    assert_eq!(definition.file_name, "web01.xml");
    assert!(definition.text.contains("<target dev='vdc'") && !definition.text.contains("s3cret"));
    for nth in 0..4 {
        write(nth, 9, 2 * MIB, 4 * MIB);
    }
    for disk in &snapshot.disks {
        assert!(content(disk) == model(&[(1, MIB, 3 * MIB)]), "{} is not what it was", disk.name);
    }
    reason(&snapshot.disks[0], "no restore point before");
    reason(&snapshot.disks[1], "its image is raw");
    reason(&snapshot.disks[3], "version 2");
    let tracked: Vec<_> = snapshot.disks.iter().map(|disk| disk.tracking.is_some()).collect();
    assert_eq!(tracked, [true, false, true, false]);
    let tracking = snapshot.disks[0].tracking.clone().unwrap();
    assert_eq!(tracking.method, method::LIBVIRT_CHECKPOINT);
    assert!(definition.text.contains(&tracking.scope));
    // What the guest overwrote is on the disk, and must not be readable there.
    let folder = std::fs::read_dir(site.scratch.path()).unwrap().next().unwrap().unwrap().path();
    for nth in 0..4 {
        let scratch = std::fs::read(folder.join(format!("disk-{nth}.qcow2"))).unwrap();
        assert!(scratch.len() as u64 > 2 * MIB && !scratch.windows(512).any(|part| part == [1; 512]));
    }
    libvirt.check().unwrap();
    assert!(libvirt.undo().iter().flatten().any(|word| word == "domjobabort"));
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    assert!(libvirt.undo().is_empty());
    site.expect_clean(Some(&first));

    // The writes made while it was read, and two more.
    write(0, 2, 8 * MIB, 4096);
    write(2, 2, 10 * MIB + GRANULE, GRANULE);
    let (mut libvirt, snapshot, _) = site.begin(Some(&first));
    write(0, 3, 12 * MIB, MIB);
    assert_eq!(changed(&snapshot.disks[0]), [(2 * MIB, 4 * MIB), (8 * MIB, GRANULE)]);
    assert_eq!(changed(&snapshot.disks[2]), [(2 * MIB, 4 * MIB), (10 * MIB + GRANULE, GRANULE)]);
    reason(&snapshot.disks[1], "its image is raw");
    let expected = model(&[(1, MIB, 3 * MIB), (9, 2 * MIB, 4 * MIB), (2, 8 * MIB, 4096)]);
    assert!(content(&snapshot.disks[0]) == expected);
    libvirt.check().unwrap();
    assert_eq!(libvirt.end(false), Vec::<String>::new());
    site.expect_clean(Some(&first));

    // That point was not kept: the changes since the first count on.
    let (mut libvirt, snapshot, third) = site.begin(Some(&first));
    assert_eq!(changed(&snapshot.disks[0]), [(2 * MIB, 4 * MIB), (8 * MIB, GRANULE), (12 * MIB, MIB)]);
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&third));

    let (mut libvirt, snapshot, fourth) = site.begin(Some(&third));
    assert_eq!(changed(&snapshot.disks[0]), []);
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&fourth));
    assert!(libvirtd.checkpoints("web01").contains(&"daily".to_owned()), "another tool's checkpoint stays");

    // It survives an orderly end of the domain, and only what is since then is read.
    libvirtd.virsh(&["destroy", "web01", "--graceful"]).ok();
    assert_eq!(libvirtd.bitmaps(&site.image("vda")).len(), 2);
    libvirtd.virsh(&["start", "web01"]).ok();
    write(0, 4, 0, GRANULE);
    let (mut libvirt, snapshot, fifth) = site.begin(Some(&fourth));
    assert_eq!(changed(&snapshot.disks[0]), [(0, GRANULE)]);
    drop(snapshot);
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&fifth));
}

#[test]
fn a_checkpoint_that_is_gone_or_broken_is_not_used() {
    let site = Site::new(&["qcow2", "qcow2"]);
    let libvirtd = &site.libvirtd;
    let name = |manifest: &Manifest| format!("reseal-{}", manifest.point_id);
    let keep = |since: Option<&Manifest>| {
        let (mut libvirt, snapshot, manifest) = site.begin(since);
        assert_eq!(libvirt.end(true), Vec::<String>::new());
        (snapshot, manifest)
    };
    let (_, first) = keep(None);
    libvirtd.virsh(&["checkpoint-delete", "web01", &name(&first)]).ok();
    let (snapshot, second) = keep(Some(&first));
    reason(&snapshot.disks[0], "no longer has the checkpoint");
    site.expect_clean(Some(&second));

    // libvirt forgot it, and the bitmaps are still in the images.
    libvirtd.virsh(&["checkpoint-delete", "web01", &name(&second), "--metadata"]).ok();
    let (snapshot, third) = keep(Some(&second));
    reason(&snapshot.disks[1], "no longer has the checkpoint");
    site.expect_clean(Some(&third));

    // One disk lost its bitmap: the other is still told by the same checkpoint.
    libvirtd.guest_writes("web01", 0, 5, MIB, GRANULE);
    let nodes = libvirtd.virsh(&["qemu-monitor-command", "web01", r#"{"execute": "query-named-block-nodes"}"#]).ok();
    let nodes = nodes.json()["return"].as_array().unwrap().clone();
    let of = |image: &str| {
        let holds = |node: &&Value| node["drv"] == "qcow2" && node["file"].as_str().unwrap().ends_with(image);
        nodes.iter().find(holds).unwrap()["node-name"].as_str().unwrap().to_owned()
    };
    let remove = serde_json::json!({"execute": "block-dirty-bitmap-remove",
        "arguments": {"node": of("/vdb"), "name": name(&third)}});
    libvirtd.virsh(&["qemu-monitor-command", "web01", &remove.to_string()]).ok();
    let (mut libvirt, snapshot, fourth) = site.begin(Some(&third));
    assert_eq!(changed(&snapshot.disks[0]), [(MIB, GRANULE)]);
    reason(&snapshot.disks[1], "can't use the checkpoint");
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&fourth));

    // Another domain's, or another length: never used, though the checkpoint exists.
    let (mut other, mut longer) = (fourth.clone(), fourth.clone());
    other.disks[0].tracking.as_mut().unwrap().scope = "0".into();
    longer.disks[0].length += 1;
    for (manifest, why) in [(other, "another domain"), (longer, "bytes")] {
        let (mut libvirt, snapshot, _) = site.begin(Some(&manifest));
        reason(&snapshot.disks[0], why);
        assert_eq!(changed(&snapshot.disks[1]), []);
        libvirt.end(false);
    }
    site.expect_clean(Some(&fourth));
    libvirtd.virsh(&["destroy", "web01", "--graceful"]).ok();
    for disk in ["vda", "vdb"] {
        assert_eq!(libvirtd.bitmaps(&site.image(disk)), [name(&fourth)], "{disk}");
    }
}

#[test]
fn a_domain_that_dies_is_an_error_and_leaves_nothing() {
    let site = Site::new(&["qcow2", "qcow2"]);
    let (mut libvirt, _, first) = site.begin(None);
    libvirt.end(true);

    let (mut libvirt, _, _) = site.begin(Some(&first));
    site.libvirtd.kill("web01");
    let began = Instant::now();
    let died = loop {
        match libvirt.check() {
            Err(e) => break e,
            Ok(()) => assert!(began.elapsed() < Duration::from_secs(10)),
        }
    };
    assert!(died.to_string().contains("ended before everything was read"), "{died}");
    let warnings = libvirt.end(false);
    assert!(warnings.iter().all(|w| w.contains("checkpoint")), "only QEMU can remove its bitmaps: {warnings:?}");
    let left = std::fs::read_dir(site.scratch.path()).unwrap().count();
    assert_eq!(left, 0);
    assert!(!site.libvirtd.virsh(&["secret-list"]).ok().stdout.contains("reseal"));

    let (still, text) = begin_fails(&site, site.options());
    assert!(matches!(still, LibvirtError::NotRunning { .. }) && text.contains("vda=/var/lib/libvirt"), "{text}");

    site.libvirtd.virsh(&["start", "web01"]).ok();
    let (mut libvirt, snapshot, second) = site.begin(Some(&first));
    reason(&snapshot.disks[0], "can't use the checkpoint");
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&second));
    let (mut libvirt, snapshot, _) = site.begin(Some(&second));
    assert_eq!(changed(&snapshot.disks[0]), []);
    libvirt.end(false);
    site.expect_clean(Some(&second));

    // Ended by somebody else.
    let (mut libvirt, _, _) = site.begin(Some(&second));
    site.libvirtd.virsh(&["domjobabort", "web01"]).ok();
    let began = Instant::now();
    while libvirt.check().is_ok() {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(libvirt.end(false), Vec::<String>::new());
    site.expect_clean(Some(&second));
}

/// Not a test: the process that [`a_killed_backup_is_cleaned_up_by_the_next`] kills.
#[test]
#[ignore = "run by another test"]
fn begins_and_waits() {
    let Some(scratch) = std::env::var_os("RESEAL_TEST_SCRATCH") else { return };
    let options = LibvirtOptions { scratch: Some(scratch.into()), ..LibvirtOptions::new("web01") };
    let mut libvirt = Libvirt::new(options);
    libvirt.begin(PointId::from_bytes([0xee; 16]), None).unwrap();
    println!("begun");
    std::thread::sleep(Duration::from_secs(300));
}

#[test]
fn a_killed_backup_is_cleaned_up_by_the_next() {
    let site = Site::new(&["qcow2", "raw"]);
    let (mut libvirt, _, first) = site.begin(None);
    libvirt.end(true);
    site.libvirtd.guest_writes("web01", 0, 7, MIB, GRANULE);
    let killed = |wait: &dyn Fn()| {
        let own = std::env::current_exe().unwrap();
        let mut command = Command::new(own);
        command.args(["--exact", "begins_and_waits", "--ignored", "--nocapture"]);
        command.env("RESEAL_TEST_SCRATCH", site.scratch.path());
        let child = start(bound_to_us(&mut command));
        wait();
        child.kill();
    };
    let began = || site.libvirtd.virsh(&["backup-dumpxml", "web01"]).status == Some(0);
    let until_begun = || {
        let start = Instant::now();
        while !began() {
            assert!(start.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // Its first point may not be the domain's: it has removed the checkpoint that it does not know.
    killed(&|| {
        until_begun();
        let (busy, text) = begin_fails(&site, site.options());
        assert!(matches!(busy, LibvirtError::Busy { .. }) && text.contains("reseal uses"), "{text}");
    });
    assert!(began(), "nobody has ended it yet");
    // With another scratch folder, what was left is found all the same.
    let elsewhere = tempfile::tempdir().unwrap();
    permit(elsewhere.path(), 0o711);
    let mut libvirt = Libvirt::new(LibvirtOptions { scratch: Some(elsewhere.path().to_owned()), ..site.options() });
    let point = site.point();
    let snapshot = libvirt.begin(point, Some(&first)).unwrap();
    let second = manifest(point, &snapshot, Some(&first));
    let said = snapshot.warnings.iter().find(|w| w.contains("interrupted")).unwrap();
    for part in ["a job", "a secret", "scratch files", "the checkpoint reseal-eeee"] {
        assert!(said.contains(part), "{said}");
    }
    reason(&snapshot.disks[0], "no longer has the checkpoint");
    assert_eq!(libvirt.end(true), Vec::<String>::new());
    site.expect_clean(Some(&second));

    // At any other moment of its beginning.
    for millis in [100, 250] {
        killed(&|| std::thread::sleep(Duration::from_millis(millis)));
        let (mut libvirt, _, kept) = site.begin(None);
        libvirt.check().unwrap();
        assert_eq!(libvirt.end(true), Vec::<String>::new());
        site.expect_clean(Some(&kept));
    }

    // What the guard was told undoes all but the checkpoint.
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let hears = told.clone();
    let mut libvirt = site.libvirt().guarded(Box::new(move |undo| hears.lock().unwrap().push(undo.to_vec())));
    libvirt.begin(site.point(), None).unwrap();
    let undo = told.lock().unwrap()[0].clone();
    for line in &undo {
        run(Command::new(&line[0]).args(&line[1..])).ok();
    }
    let start = Instant::now();
    while began() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    libvirt.end(false);
    assert_eq!(told.lock().unwrap().last(), Some(&Vec::new()));
    site.expect_clean(None);
}

#[test]
fn what_can_not_be_backed_up_is_refused_with_the_remedy() {
    let site = Site::new(&["qcow2"]);
    let libvirtd = &site.libvirtd;
    let named = |name: &str| LibvirtOptions { domain: name.into(), ..site.options() };
    let (e, text) = begin_fails(&site, named("web02"));
    assert!(matches!(e, LibvirtError::NoDomain { .. }) && text.contains("virsh list"), "{text}");
    for hostile in ["--all", "-c", "a b; true", ""] {
        assert!(matches!(
            begin_fails(&site, named(hostile)).0,
            LibvirtError::NoDomain { .. } | LibvirtError::Said { .. }
        ));
    }
    let (e, text) = begin_fails(&site, named("1"));
    assert!(matches!(e, LibvirtError::Id { .. }) && text.contains("web01"), "{text}");
    let (e, text) = begin_fails(&site, LibvirtOptions { uri: Some("test:///default".into()), ..site.options() });
    assert!(matches!(e, LibvirtError::Uri { .. }) && text.contains("QEMU"), "{text}");

    // Another tool's backup is running.
    let xml = site.scratch.path().join("job.xml");
    let job = "<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/other.sock'/>\
               <disks><disk name='vda' type='file'><scratch file='/var/lib/libvirt/images/other'/></disk></disks>\
               </domainbackup>";
    std::fs::write(&xml, job).unwrap();
    libvirtd.virsh(&["backup-begin", "web01", xml.to_str().unwrap()]).ok();
    std::fs::remove_file(&xml).unwrap();
    let (e, text) = begin_fails(&site, site.options());
    assert!(matches!(e, LibvirtError::Busy { .. }) && text.contains("other.sock"), "{text}");
    assert_eq!(libvirtd.virsh(&["backup-dumpxml", "web01"]).status, Some(0), "it is not touched");
    libvirtd.virsh(&["domjobabort", "web01"]).ok();

    // QEMU can't enter the scratch folder.
    let closed = tempfile::tempdir().unwrap();
    permit(closed.path(), 0o700);
    let options = LibvirtOptions { scratch: Some(closed.path().to_owned()), ..site.options() };
    let (e, text) = begin_fails(&site, options);
    assert!(matches!(e, LibvirtError::Begin { .. }) && text.contains("enter"), "{text}");
    assert_eq!(std::fs::read_dir(closed.path()).unwrap().count(), 0);
    let missing = LibvirtOptions { scratch: Some("/nowhere/at/all".into()), ..site.options() };
    assert!(begin_fails(&site, missing).1.contains("/nowhere/at/all"));
    site.expect_clean(None);
}

#[test]
fn a_full_scratch_folder_ends_the_backup_and_not_the_guest() {
    let site = Site::new(&["qcow2", "big"]);
    let libvirtd = &site.libvirtd;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let options = |size: &str| {
        system("mount", &["-t", "tmpfs", "-o", &format!("size={size},mode=711"), "tmpfs", path]);
        LibvirtOptions { scratch: Some(folder.path().to_owned()), ..site.options() }
    };
    let (e, text) = begin_fails(&site, options("100M"));
    assert!(matches!(e, LibvirtError::NoRoom { .. }) && text.contains("--scratch"), "{text}");
    system("umount", &[path]);

    // Zeros that are overwritten take no room.
    let write = |value, offset| libvirtd.guest_writes("web01", 1, value, offset, 16 * MIB);
    (0..32).for_each(|nth| write(1, nth * 16 * MIB));
    let mut libvirt = Libvirt::new(options("500M"));
    libvirt.begin(site.point(), None).unwrap();
    let mut written = 0;
    let failed = loop {
        write(3, written);
        written += 16 * MIB;
        match libvirt.check() {
            Err(e) => break e,
            Ok(()) => assert!(written < 512 * MIB, "the watch does not see it"),
        }
    };
    assert!(matches!(failed, BackupError::Libvirt(LibvirtError::RanOut { .. })), "{failed}");
    assert_eq!(libvirtd.virsh(&["domstate", "web01"]).ok().stdout.trim(), "running");
    assert_eq!(libvirt.end(false), Vec::<String>::new());
    site.expect_clean(None);
    system("umount", &[path]);
}
