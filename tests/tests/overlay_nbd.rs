//! Restore points that are written to, over NBD: by the real programs and clients, killed, tampered with, full, rekeyed and erased.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

#[path = "overlay/reader.rs"]
mod reader;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_format::ids::{NoteId, OverlayId};
use reseal_tests::library::vm;
use reseal_tests::marker::Marker;
use reseal_tests::process::{Run, Running, bound_to_us, run, signal, start, system};
use reseal_tests::random::Random;
use reseal_tests::site::{Site, files_below};
use serde_json::{Value, json};

const LENGTH: usize = (24 << 20) + 4096 + 512;

fn site(disks: &[&str]) -> (Site, Vec<u8>) {
    Site::with_point(disks, LENGTH)
}

/// A server whose disks are written to.
struct Server {
    process: Option<Running>,
    socket: PathBuf,
}

impl Server {
    #[track_caller]
    fn start(site: &Site, socket: &str, arguments: &[&str]) -> Server {
        Server::try_start(site, socket, arguments).unwrap_or_else(|run| panic!("nothing is served: {run:#?}"))
    }

    /// If it ended before it served, how.
    fn try_start(site: &Site, socket: &str, arguments: &[&str]) -> Result<Server, Run> {
        let socket = site.path(socket);
        let words = [&["nbd", "--socket", socket.to_str().unwrap(), "--writable"], arguments].concat();
        let process = start(bound_to_us(&mut site.command("reseal", words)));
        let server = Server { process: Some(process), socket };
        let began = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            let process = server.process.as_ref().unwrap();
            if process.has_ended() || began.elapsed() > Duration::from_secs(20) {
                return Err({ server }.process.take().unwrap().kill());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // It listens before the overlay is open; whoever is answered knows that it is.
        match server.client("nbdinfo", &["--size"], "disk-0").status {
            Some(0) => Ok(server),
            _ => Err({ server }.process.take().unwrap().wait()),
        }
    }

    fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///vm@1/{disk}?socket={}", self.socket.display())
    }

    fn client(&self, program: &str, arguments: &[&str], disk: &str) -> Run {
        run(Command::new(program).args(arguments).arg(self.uri(disk)))
    }

    /// Commands of `qemu-io`, in one connection. Its exit status says nothing of them, so what it printed is looked at.
    fn qemu_io(&self, disk: &str, commands: &[&str]) -> String {
        let mut words = vec!["-f", "raw", "-t", "none"];
        words.extend(commands.iter().flat_map(|command| ["-c", command]));
        self.client("qemu-io", &words, disk).said()
    }

    #[track_caller]
    fn writes(&self, disk: &str, commands: &[&str]) {
        let said = self.qemu_io(disk, commands);
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    }

    /// The whole disk.
    #[track_caller]
    fn all(&self, site: &Site, disk: &str) -> Vec<u8> {
        let to = site.path("copied.raw");
        let _ = fs::remove_file(&to);
        run(Command::new("nbdcopy").arg(self.uri(disk)).arg(&to)).ok();
        fs::read(&to).unwrap()
    }

    /// Ends it as an administrator does.
    fn stop(mut self) -> Run {
        let process = self.process.take().unwrap();
        signal(process.id(), libc::SIGTERM);
        process.wait()
    }

    fn kill(mut self) {
        self.process.take().unwrap().kill();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(process.kill());
        }
    }
}

/// The files of an overlay that hold blocks.
fn block_files(folder: &Path) -> Vec<PathBuf> {
    files_below(folder).into_iter().filter(|path| path.extension().is_some_and(|it| it == "overlay")).collect()
}

fn room(folder: &Path) -> u64 {
    block_files(folder).iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
}

fn overlays(site: &Site, named: &[&str]) -> Vec<Value> {
    site.reseal([&["overlay", "list", "--json"], named].concat()).ok().json_lines()
}

#[test]
fn what_was_flushed_survives_kills_and_restarts_and_the_point_stays_as_it_was() {
    let (site, mut content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap()];
    let point_before = site.contents();
    let server = Server::start(&site, "a.sock", &arguments);
    assert!(server.all(&site, "disk-0") == content, "before anything is written it is as the restore point");
    server.writes("disk-0", &["write -P 7 100 70000", "write -P 8 5M 64k", "write -z 20M 1M", "flush"]);
    content[100..70_100].fill(7);
    content[5 << 20..(5 << 20) + 65_536].fill(8);
    content[20 << 20..21 << 20].fill(0);
    server.kill();
    for nth in 0..3u8 {
        let server = Server::start(&site, "a.sock", &arguments);
        assert!(server.all(&site, "disk-0") == content, "start {nth}");
        let at = 1_000_000 + usize::from(nth) * 5_000;
        server.writes("disk-0", &[&format!("write -f -P {} {at} 4000", 20 + nth)]);
        content[at..at + 4000].fill(20 + nth);
        // Ended by force, and in peace.
        match nth {
            1 => drop(server.stop().ok()),
            _ => server.kill(),
        }
    }
    let server = Server::start(&site, "a.sock", &arguments);
    assert!(server.all(&site, "disk-0") == content);
    server.stop().ok();
    // But for the key of the overlay, and for what those who were killed said of themselves, nothing in the vault has changed.
    let (before, now) = (&point_before, site.contents());
    let changed: Vec<&String> =
        now.iter().filter(|(key, bytes)| before.get(*key) != Some(bytes)).map(|(key, _)| key).collect();
    assert!(before.keys().all(|key| now.contains_key(key) || key.contains("/leases/")));
    let may = |key: &&String| ["/notes/", "/leases/", "tmp/"].iter().any(|part| key.contains(part));
    assert!(changed.iter().all(may), "{changed:?}");
    assert!(site.objects().iter().any(|key| key.contains("/notes/00000001-")));
    site.verify();
}

#[test]
fn copies_onto_it_and_holes_in_it_are_right_and_what_is_discarded_gives_its_room_back() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let server = Server::start(&site, "a.sock", &["vm@latest", "--overlay", folder.to_str().unwrap()]);
    let info = server.client("nbdinfo", &["--json"], "disk-0").ok().json();
    let export = &info["exports"][0];
    let wanted = json!({"is_read_only": false, "can_flush": true, "can_fua": true, "can_trim": true, "can_zero": true,
        "can_multi_conn": true, "export-size": LENGTH});
    for (name, value) in wanted.as_object().unwrap() {
        assert_eq!(&export[name], value, "{name}: {export:#}");
    }
    // The restore point's own hole, and what is written into it.
    server.writes("disk-0", &["write -P 9 6M 64k", "write -z -u 16M 128k", "flush"]);
    let map = server.client("nbdinfo", &["--map", "--json"], "disk-0").ok().json();
    let holes: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 3)
        .map(|extent| (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(holes, [(4 << 20, 2 << 20), ((6 << 20) + 65_536, (6 << 20) - 65_536), (16 << 20, 131_072)]);
    // Another disk onto it, by many connections at once.
    let mut other = Random::new(9).bytes(LENGTH);
    other[1 << 20..3 << 20].fill(0);
    let file = site.path("other.raw");
    fs::write(&file, &other).unwrap();
    run(Command::new("nbdcopy").args(["--flush", "--connections=4"]).arg(&file).arg(server.uri("disk-0"))).ok();
    assert!(server.all(&site, "disk-0") == other);
    let compare = ["compare", "-f", "raw", "-F", "raw", file.to_str().unwrap()];
    server.client("qemu-img", &compare, "disk-0").ok();
    let full = room(&folder);
    assert!(full > (LENGTH - (2 << 20)) as u64, "{full}");
    server.writes("disk-0", &["discard 4M 16M", "flush"]);
    let less = room(&folder);
    assert!(less + (15 << 20) < full, "{full} became {less}");
    assert!(server.all(&site, "disk-0")[4 << 20..20 << 20].iter().all(|byte| *byte == 0));
    server.stop().ok();
    // Back to the restore point's content, over what was discarded.
    let server = Server::start(&site, "a.sock", &["vm@latest", "--overlay", folder.to_str().unwrap()]);
    fs::write(&file, &content).unwrap();
    run(Command::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw"])
        .arg(&file)
        .arg(server.uri("disk-0")))
    .ok();
    assert!(server.all(&site, "disk-0") == content);
}

#[test]
fn nbdfuse_shows_a_disk_as_a_file_that_is_read_and_written_by_anybodys_programs() {
    let (site, mut content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let server = Server::start(&site, "a.sock", &["vm@1", "--overlay", folder.to_str().unwrap()]);
    let (mountpoint, ready) = (site.path("nbdfuse"), site.path("nbdfuse.pid"));
    fs::create_dir(&mountpoint).unwrap();
    let mut command = Command::new("nbdfuse");
    command.arg("-P").arg(&ready).arg(mountpoint.join("disk.img")).arg(server.uri("disk-0"));
    let nbdfuse = start(bound_to_us(&mut command));
    let began = Instant::now();
    while !ready.exists() {
        assert!(!nbdfuse.has_ended() && began.elapsed() < Duration::from_secs(20), "nbdfuse does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let file = fs::File::options().read(true).write(true).open(mountpoint.join("disk.img")).unwrap();
    let mut read = vec![0; LENGTH];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == content);
    let new = Random::new(77).bytes(70_000);
    file.write_all_at(&new, 5_000_100).unwrap();
    content[5_000_100..5_070_100].copy_from_slice(&new);
    file.sync_all().unwrap();
    drop(file);
    system("fusermount3", &["-u", mountpoint.to_str().unwrap()]);
    nbdfuse.wait().ok();
    // It was flushed.
    server.kill();
    let server = Server::start(&site, "a.sock", &["vm@1", "--overlay", folder.to_str().unwrap()]);
    assert!(server.all(&site, "disk-0") == content);
}

#[test]
fn a_full_overlay_is_no_space_for_the_guest_and_room_that_is_discarded_can_be_used() {
    let (site, _) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap(), "--overlay-limit", "6M"];
    let server = Server::start(&site, "a.sock", &arguments);
    let said = server.qemu_io("disk-0", &["write -P 1 0 4M", "flush", "write -P 2 8M 4M"]);
    assert!(said.contains("No space left on device"), "{said}");
    assert!(room(&folder) <= (6 << 20) + (64 << 10));
    // What was there is read, and more is written when there is room again.
    server
        .writes("disk-0", &["read -P 1 0 4M", "discard 0 4M", "flush", "write -P 3 8M 3M", "flush", "read -P 3 8M 3M"]);
    let said = server.stop().ok().said();
    assert!(said.contains("can't write bytes") && said.contains("--overlay-limit"), "{said}");
    let more = [&arguments[..3], &["--overlay-limit", "1M"]].concat();
    Server::try_start(&site, "a.sock", &more).err().unwrap().fails(2, &["4M at least"]);
}

#[test]
fn several_overlays_of_one_point_know_nothing_of_each_other_and_each_is_one_processs() {
    let (site, content) = site(&["disk-0", "data"]);
    let folder = site.path("lab");
    let lab = Server::start(&site, "lab.sock", &["vm@1", "--overlay", folder.to_str().unwrap()]);
    let recovery = Server::start(&site, "recovery.sock", &["vm@1"]);
    lab.writes("disk-0", &["write -P 1 0 64k", "flush"]);
    recovery.writes("disk-0", &["write -P 2 0 64k", "flush"]);
    recovery.writes("data", &["write -P 3 0 64k", "flush"]);
    lab.writes("disk-0", &["read -P 1 0 64k"]);
    recovery.writes("disk-0", &["read -P 2 0 64k"]);
    assert!(lab.all(&site, "data") == content, "nor do disks of one");
    // In use, by whatever name.
    let second = ["vm@1", "--overlay", folder.to_str().unwrap()];
    Server::try_start(&site, "c.sock", &second).err().unwrap().fails(1, &["in use"]);
    let listed = overlays(&site, &[folder.to_str().unwrap()]);
    assert_eq!(listed.len(), 2);
    for overlay in &listed {
        let disks: Vec<&str> =
            overlay["disks"].as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap()).collect();
        assert_eq!((&overlay["vm"], &overlay["number"], disks), (&json!("vm"), &json!(1), vec!["disk-0", "data"]));
        assert_eq!(overlay["in_use"], true);
        assert!(overlay["used"].as_u64().unwrap() > 64 << 10);
    }
    let id = listed[0]["id"].as_str().unwrap().to_owned();
    site.reseal(["overlay", "drop", &id]).fails(1, &["in use"]);
    lab.stop().ok();
    recovery.stop().ok();
    // That of the state folder by its id, with its key; the other stays.
    assert_eq!(site.objects().iter().filter(|key| key.contains("/notes/")).count(), 2);
    site.reseal(["overlay", "drop", &id]).ok();
    assert_eq!(site.objects().iter().filter(|key| key.contains("/notes/")).count(), 1);
    assert_eq!(overlays(&site, &[]), Vec::<Value>::new());
    assert!(!Path::new(listed[0]["folder"].as_str().unwrap()).exists());
    let lab = Server::start(&site, "lab.sock", &second);
    lab.writes("disk-0", &["read -P 1 0 64k"]);
    lab.stop().ok();
    site.reseal(["overlay", "drop", folder.to_str().unwrap()]).ok();
    assert!(!folder.exists());
    site.reseal(["overlay", "drop", folder.to_str().unwrap()]).fails(2, &["holds no overlay"]);
    site.verify();
}

#[test]
fn an_overlay_opens_over_its_own_point_only() {
    let (site, _) = site(&["disk-0"]);
    let path = site.disk("disk-0");
    site.backup("vm", &path);
    site.backup("other", &path);
    let folder = site.path("overlay");
    let overlay = ["--overlay", folder.to_str().unwrap()];
    let of = |point| [&[point], &overlay[..]].concat();
    Server::start(&site, "a.sock", &of("vm@1")).stop().ok();
    for point in ["vm@2", "other@1"] {
        let refused = Server::try_start(&site, "b.sock", &of(point)).err().unwrap();
        refused.fails(2, &["holds the overlay of vm@1", &format!("not of {point}")]);
    }
    Server::try_start(&site, "b.sock", &of("vm")).err().unwrap().fails(2, &["needs one restore point"]);
    let one_time = [&of("vm@1")[..], &["--one-time"]].concat();
    Server::try_start(&site, "b.sock", &one_time).err().unwrap().fails(2, &["--one-time begins an empty one"]);
    // What is said in clear decides nothing: with the other point's names in it, the key does not fit.
    let file = folder.join("overlay.json");
    let honest = fs::read_to_string(&file).unwrap();
    let shown = site.reseal(["show", "--json", "vm@2"]).ok().json();
    let document: Value = serde_json::from_str(&honest).unwrap();
    let mut forged = document.clone();
    (forged["number"], forged["point_id"]) = (json!(2), shown["point_id"].clone());
    assert!(forged["point_id"].is_string() && forged["point_id"] != document["point_id"]);
    fs::write(&file, forged.to_string()).unwrap();
    Server::try_start(&site, "b.sock", &of("vm@2")).err().unwrap().fails(3, &["key of the overlay"]);
    fs::write(&file, honest.replace("\"version\": 1", "\"version\": 9")).unwrap();
    Server::try_start(&site, "b.sock", &of("vm@1")).err().unwrap().fails(3, &["version 9"]);
    fs::write(&file, &honest).unwrap();
    // A folder with other things in it is left as it is.
    let letters = site.path("letters");
    fs::create_dir(&letters).unwrap();
    fs::write(letters.join("letter"), "dear").unwrap();
    let foreign = ["vm@1", "--overlay", letters.to_str().unwrap()];
    Server::try_start(&site, "b.sock", &foreign).err().unwrap().fails(2, &["holds other things"]);
    assert_eq!(files_below(&letters), [letters.join("letter")]);
    Server::start(&site, "a.sock", &of("vm@1")).stop().ok();
}

#[test]
fn what_was_changed_in_the_files_is_an_error_and_never_served() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap()];
    let marker = Marker::new(1);
    let server = Server::start(&site, "a.sock", &arguments);
    let file = site.path("marked");
    fs::write(&file, marker.bytes().repeat(1024)).unwrap();
    server.writes("disk-0", &[&format!("write -s {} 0 64k", file.display()), "flush"]);
    let written = server.all(&site, "disk-0");
    assert!(marker.is_in(&written[..65_536]) && written[65_536..] == content[65_536..]);
    server.stop().ok();
    // Nothing is in the clear: neither what was written, nor a key.
    assert_eq!(marker.found_below(&folder), Vec::<String>::new());
    assert_eq!(marker.found_below(&site.state), Vec::<String>::new());
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    for path in files_below(&folder) {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600, "{path:?}");
    }
    let blocks = block_files(&folder).remove(0);
    let whole = fs::read(&blocks).unwrap();
    let mut errors = 0;
    for page in 0..whole.len() / 4096 {
        let bytes = &whole[page * 4096..(page + 1) * 4096];
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut changed = whole.clone();
        changed[page * 4096 + 77] ^= 1;
        fs::write(&blocks, &changed).unwrap();
        match Server::try_start(&site, "a.sock", &arguments) {
            Err(run) => drop(run.expect(&[3])),
            Ok(server) => {
                let to = site.path("read.raw");
                let _ = fs::remove_file(&to);
                let read = run(Command::new("nbdcopy").arg(server.uri("disk-0")).arg(&to));
                match read.status {
                    // One head of two; or the journal ends earlier, and then what it told of never was.
                    Some(0) => {
                        let now = fs::read(&to).unwrap();
                        assert!(now == content || now == written, "page {page}");
                    }
                    _ => {
                        assert!(read.stderr.contains("Input/output error"), "page {page}: {read:#?}");
                        errors += 1;
                    }
                }
                server.kill();
            }
        }
    }
    assert_eq!(errors, 16, "each block that was written");
    fs::write(&blocks, &whole[..whole.len() / 2]).unwrap();
    if let Ok(server) = Server::try_start(&site, "a.sock", &arguments) {
        let said = server.qemu_io("disk-0", &["read 0 64k"]);
        assert!(said.contains("Input/output error"), "{said}");
    }
    fs::write(&blocks, &whole).unwrap();
    assert!(Server::start(&site, "a.sock", &arguments).all(&site, "disk-0") == written);
}

#[test]
fn an_overlay_outlives_new_data_keys_and_dies_with_the_tenant_and_one_time_with_its_process() {
    let (site, content) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap()];
    let server = Server::start(&site, "a.sock", &arguments);
    server.writes("disk-0", &["write -P 5 0 1M", "flush"]);
    // While it is in use, and between two uses.
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    server.writes("disk-0", &["read -P 5 0 1M", "write -P 6 1M 1M", "flush"]);
    server.stop().ok();
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    site.reseal(["rekey", "--kek"]).ok();
    let server = Server::start(&site, "a.sock", &arguments);
    server.writes("disk-0", &["read -P 5 0 1M", "read -P 6 1M 1M"]);
    server.stop().ok();

    let scratch = site.path("scratch");
    let one_time = ["vm@1", "--one-time", "--overlay", scratch.to_str().unwrap()];
    let server = Server::start(&site, "b.sock", &one_time);
    server.writes("disk-0", &["write -P 7 0 1M", "flush", "read -P 7 0 1M"]);
    assert_eq!(files_below(&scratch), Vec::<PathBuf>::new(), "its files have no names");
    server.kill();
    assert_eq!(site.objects().iter().filter(|key| key.contains("/notes/")).count(), 1, "nor is its key anywhere");
    let server = Server::start(&site, "b.sock", &one_time);
    assert!(server.all(&site, "disk-0") == content);
    server.stop().ok();
    site.verify();

    // Its key is taken away, and then all of the tenant's.
    let note = site.objects().into_iter().find(|key| key.contains("/notes/")).unwrap();
    let kept = fs::read(site.vault.join(&note)).unwrap();
    fs::remove_file(site.vault.join(&note)).unwrap();
    Server::try_start(&site, "a.sock", &arguments).err().unwrap().fails(3, &["key of the overlay"]);
    fs::write(site.vault.join(&note), kept).unwrap();
    site.reseal(["tenant", "erase", "default", "--yes", "default"]).ok();
    Server::try_start(&site, "a.sock", &arguments).err().unwrap().fails(3, &["erased"]);
    let dropped = site.reseal(["overlay", "drop", folder.to_str().unwrap()]).ok();
    assert!(dropped.stderr.contains("stays in the vault"), "{dropped:#?}");
    assert!(!folder.exists());
}

#[test]
fn a_file_system_is_made_and_checked_and_fio_finds_what_it_wrote() {
    let (site, _) = site(&["disk-0"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap()];
    let server = Server::start(&site, "a.sock", &arguments);
    let job = [
        "--name=job".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", server.uri("disk-0")),
        "--rw=randwrite".into(),
        "--bsrange=512-64k".into(),
        "--size=16M".into(),
        "--verify=crc32c".into(),
        "--iodepth=16".into(),
        "--fsync=32".into(),
        "--verify_state_save=0".into(),
    ];
    run(Command::new("fio").args(job)).ok();
    // An ext4 that is made in a file, and copied onto the disk with its holes.
    let (files, image) = (site.path("files"), site.path("ext4.raw"));
    fs::create_dir(&files).unwrap();
    fs::write(files.join("a"), Random::new(3).bytes(3 << 20)).unwrap();
    let made = fs::File::create(&image).unwrap();
    made.set_len(LENGTH as u64).unwrap();
    system("mke2fs", &["-q", "-t", "ext4", "-d", files.to_str().unwrap(), image.to_str().unwrap()]);
    let length = made.metadata().unwrap().len();
    made.write_all_at(b"tail", length - 4).unwrap();
    run(Command::new("nbdcopy").args(["--flush", "--connections=3"]).arg(&image).arg(server.uri("disk-0"))).ok();
    server.kill();
    let server = Server::start(&site, "a.sock", &arguments);
    let back = site.path("back.raw");
    fs::write(&back, server.all(&site, "disk-0")).unwrap();
    assert!(fs::read(&back).unwrap() == fs::read(&image).unwrap());
    system("e2fsck", &["-f", "-n", back.to_str().unwrap()]);
    server.stop().ok();
    site.verify();
}

#[test]
fn its_files_are_as_the_documents_say() {
    let (site, content) = site(&["disk-0", "data"]);
    let folder = site.path("overlay");
    let arguments = ["vm@1", "--overlay", folder.to_str().unwrap()];
    for (nth, commands) in [
        ["write -P 1 0 300k", "flush", "write -P 2 100k 8k", "write -z 1M 64k"],
        ["write -P 3 4k 512", "discard 8k 16k", "flush", "write -P 4 25169920 512"],
    ]
    .iter()
    .enumerate()
    {
        let server = Server::start(&site, "a.sock", &arguments);
        server.writes("data", commands);
        assert!(server.all(&site, "disk-0") == content, "{nth}");
        server.stop().ok();
    }
    let server = Server::start(&site, "a.sock", &arguments);
    let shown = server.all(&site, "data");
    server.stop().ok();

    let document: Value = serde_json::from_slice(&fs::read(folder.join("overlay.json")).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let note = site.tenant().note(&vm("vm"), 1, NoteId::from_hex(&text(&document["note_id"])).unwrap()).unwrap();
    assert_eq!((note.kind.as_str(), &note.content["overlay"]), ("overlay", &document["id"]));
    let key = hex::decode(text(&note.content["key"])).unwrap();
    for (nth, disk) in document["disks"].as_array().unwrap().iter().enumerate() {
        let id = OverlayId::from_hex(&text(&disk["id"])).unwrap();
        let file = fs::read(folder.join(format!("{id}.overlay"))).unwrap();
        let read = reader::read(&file, &key, id.as_bytes());
        assert_eq!(hex::encode(read.point), text(&document["point_id"]));
        assert_eq!((usize::from(read.disk), read.length), (nth, LENGTH as u64));
        let mut now = content.clone();
        now.resize(LENGTH.next_multiple_of(4096), 0);
        for (block, bytes) in &read.blocks {
            let at = usize::try_from(*block).unwrap() * 4096;
            now[at..at + 4096].copy_from_slice(bytes);
        }
        now.truncate(LENGTH);
        match nth {
            0 => assert!(read.blocks.is_empty() && now == content),
            _ => assert!(
                now == shown && read.blocks.len() > 75 && read.flushes > 6,
                "{} {}",
                read.blocks.len(),
                read.flushes
            ),
        }
    }
}

#[test]
fn a_committed_overlay_reads_as_the_documents_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../common/format/tests/golden/disk.overlay");
    let key: [u8; 32] = std::array::from_fn(|i| 0x11 + u8::try_from(i).unwrap());
    let id: [u8; 16] = std::array::from_fn(|i| 0x21 + u8::try_from(i).unwrap());
    let read = reader::read(&fs::read(path).unwrap(), &key, &id);
    assert_eq!((read.disk, read.length, read.flushes), (1, 1 << 40, 2));
    let block: Vec<u8> = (0..4096).map(|i| b"golden bytes "[i * i / 77 % 13]).collect();
    assert_eq!(read.blocks.len(), 301);
    assert!(read.blocks[&(1 << 33)] == block && read.blocks[&5] == [0; 4096]);
}
