//! Restore points that a site without keys sends to another: over mutual TLS, resumed, and from those who lie.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use reseal_proto::wire::{
    Begin, Begun, Commit, Data, Disk, DiskEnd, FromSource, FromTarget, Hello, Need, Offer, Task, TroubleCode, VERSION,
};
use reseal_tests::process::{bound_to_us, start, wait_until};
use reseal_tests::qmp::Qmp;
use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, Peer, Proxy, Sites, long_line};
use reseal_tests::site::{Site, files_below};

const CLUSTER: usize = 65_536;

/// A disk of so many clusters, of which some are holes, and the last is not whole.
fn make_disk(site: &Site, name: &str, clusters: usize, seed: u64) -> PathBuf {
    let path = site.disk(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len((clusters * CLUSTER - 1000) as u64).unwrap();
    let mut random = Random::new(seed);
    for nth in (0..clusters).filter(|nth| nth % 10 != 3) {
        let length = if nth + 1 == clusters { CLUSTER - 1000 } else { CLUSTER };
        file.write_all_at(&random.bytes(length), (nth * CLUSTER) as u64).unwrap();
    }
    path
}

/// Bytes of the disk that are not holes.
fn used(clusters: usize) -> u64 {
    ((0..clusters).filter(|nth| nth % 10 != 3).count() * CLUSTER) as u64
}

#[track_caller]
fn assert_restores(target: &Site, point: &str, disk: &str, right: &Path) {
    let out = target.path(format!("restored-{point}-{disk}"));
    target.restore(point, disk, &out).ok();
    assert!(fs::read(&out).unwrap() == fs::read(right).unwrap(), "{point} {disk} is not what was backed up");
    fs::remove_file(out).unwrap();
}

fn packs_bytes(target: &Site) -> u64 {
    let packs = target.objects().into_iter().filter(|key| key.contains("/packs/"));
    packs.map(|key| fs::metadata(target.vault.join(key)).unwrap().len()).sum()
}

fn points(target: &Site) -> usize {
    target.objects().iter().filter(|key| key.ends_with(".manifest")).count()
}

#[test]
fn what_is_sent_restores_equal_and_what_is_unchanged_is_not_sent_again() {
    let sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let (a, b) = (make_disk(&sites.source, "a", 400, 1), make_disk(&sites.source, "b", 30, 2));
    let named = [format!("a={}", a.display()), format!("b={}", b.display())];
    let words = sites.words(proxy.port, "web01", &[&named[0], &named[1]]);
    let first = sites.source.reseal(&words).ok().json();
    assert_eq!((&first["vm"], &first["number"]), (&"web01".into(), &1.into()));
    assert!(first["stats"]["sent"].as_u64().unwrap() >= used(400));
    assert_restores(&sites.target, "web01@1", "a", &a);
    assert_restores(&sites.target, "web01@1", "b", &b);

    let before = proxy.sent();
    let second = sites.source.reseal(&words).ok().json();
    assert_eq!(second["stats"]["sent"], 0);
    let sent = proxy.sent() - before;
    assert!(sent < (used(400) + used(30)) / 500, "{sent} bytes for an unchanged disk");

    // One cluster changes, and one moves: what the VM has elsewhere is not needed.
    let file = fs::File::options().read(true).write(true).open(&a).unwrap();
    let mut moved = vec![0; CLUSTER];
    file.read_exact_at(&mut moved, 20 * CLUSTER as u64).unwrap();
    file.write_all_at(&moved, 90 * CLUSTER as u64).unwrap();
    file.write_all_at(b"changed", 50 * CLUSTER as u64 + 77).unwrap();
    let third = sites.source.reseal(&words).ok().json();
    assert_eq!(third["stats"]["changed"], CLUSTER as u64);
    for point in ["web01@2", "web01@3"] {
        assert_restores(&sites.target, point, "b", &b);
    }
    assert_restores(&sites.target, "web01@3", "a", &a);
    sites.target.verify();
    assert!(!sites.source.path("state/lookup").exists() && !sites.source.keyring.exists(), "the source has no keys");
}

#[test]
fn one_who_appends_can_not_see_that_another_vm_has_a_block() {
    let sites = Sites::new();
    let disk = make_disk(&sites.source, "disk", 400, 3);
    let path = disk.to_str().unwrap();
    let first = sites.source.reseal(sites.words(sites.port, "one", &[path])).ok().json();
    let stored = packs_bytes(&sites.target);
    let second = sites.source.reseal(sites.words(sites.port, "two", &[path])).ok().json();
    // All is asked for, as if it were new, and none of it is stored again.
    assert_eq!(first["stats"]["sent"], second["stats"]["sent"]);
    let added = packs_bytes(&sites.target) - stored;
    assert!(added < used(400) / 20, "{added} bytes were stored again");
    assert_restores(&sites.target, "two@1", "disk-0", &disk);
    // Cut off and begun again, it is the same: what landed is not needed, whether it was stored or found.
    let mut sent = Vec::new();
    for vm in ["three", "four"] {
        let disk = match vm {
            "three" => disk.clone(),
            _ => make_disk(&sites.source, "other", 400, 33),
        };
        let proxy = Proxy::new(sites.port);
        proxy.cut_after(16 << 20);
        let words = sites.words(proxy.port, vm, &[disk.to_str().unwrap()]);
        sent.push(sites.source.reseal(words).ok().json()["stats"]["sent"].as_u64().unwrap());
        assert_restores(&sites.target, &format!("{vm}@1"), "disk-0", &disk);
    }
    // What was still on its way in buffers, and in an offer of which not all had come, is sent again.
    let most = used(400) + (12 << 20);
    assert!(sent.iter().all(|sent| (used(400)..most).contains(sent)), "{sent:?}");
}

#[test]
fn only_who_is_known_may_come_and_only_for_what_is_named() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let client = authority.issue(|_| {});
    let sites = Sites::with(authority, &[(client, "append", "[\"web01\"]")]);
    let stranger = sites.authority.issue(|_| {});
    let forged = foreign.issue(|_| {});
    let disk = make_disk(&sites.source, "disk", 3, 4);
    let (disk, authority) = (disk.to_str().unwrap(), &sites.authority);
    let attempt = |identity, authority, vm| {
        let file = sites.enrolment("other.reseal", identity, authority, sites.port);
        sites.source.reseal(["--repo", file.to_str().unwrap(), "backup", vm, disk])
    };
    attempt(&stranger, authority, "web01").fails(1, &["does not know the certificate"]);
    attempt(&sites.client, authority, "web02").fails(1, &["may not add restore points of web02"]);
    attempt(&sites.client, &foreign, "web01").fails(2, &["can't be trusted"]);
    // A certificate that another authority issued, or that is not its own.
    attempt(&forged, authority, "web01").fails(1, &["does not accept this site's certificate"]);
    assert_eq!(points(&sites.target), 0);
    assert_eq!(packs_bytes(&sites.target), 0);
    attempt(&sites.client, authority, "web01").ok();
    // A file that others may read is refused before it is used.
    let file = sites.enrolled(sites.port);
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let run = sites.source.reseal(["--repo", file.to_str().unwrap(), "backup", "web01", disk]);
    assert!(run.status != Some(0) && run.stderr.contains("chmod"), "{run:#?}");
    sites.source.reseal(["--repo", file.to_str().unwrap(), "list"]).fails(2, &["chmod 600"]);
    sites.source.reseal(["--repo", file.to_str().unwrap(), "verify"]).fails(2, &["enrolment file"]);
}

#[test]
fn certificates_that_are_named_but_expired_foreign_or_for_reading_are_refused() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let old = authority.issue(|params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let (forged, reader) = (foreign.issue(|_| {}), authority.issue(|_| {}));
    let any = "[\"*\"]";
    let named = [(old.clone(), "append", any), (forged.clone(), "append", any), (reader.clone(), "restore", any)];
    let mut sites = Sites::with(authority, &named);
    let disk = make_disk(&sites.source, "disk", 3, 4);
    for (identity, said) in [
        (&old, "does not accept this site's certificate"),
        (&forged, "does not accept this site's certificate"),
        (&reader, "may not add restore points"),
    ] {
        let file = sites.enrolment("other.reseal", identity, &sites.authority, sites.port);
        let words = ["--repo", file.to_str().unwrap(), "backup", "web01", disk.to_str().unwrap()];
        sites.source.reseal(words).fails(1, &[said]);
    }
    assert_eq!(points(&sites.target), 0);
    let log = sites.stop().ok().stderr;
    assert_eq!(log.matches("refused: invalid peer certificate").count(), 2, "{log}");
    assert!(log.contains("client-2") && log.contains("stopping"), "{log}");
}

/// A client that has begun a restore point.
fn begun(sites: &Sites, vm: &str) -> Peer {
    let mut peer = sites.connect(&sites.client);
    peer.say(&FromSource::Hello(Hello { version: VERSION, software: "a liar".into() }));
    let Some(FromTarget::Welcome(welcome)) = peer.hear() else { panic!("no welcome") };
    assert!(welcome.window >= 32, "a window of {}", welcome.window);
    peer.say(&FromSource::Begin(Begin { vm: vm.into(), resume: None }));
    let Some(FromTarget::Begun(Begun { .. })) = peer.hear() else { panic!("not begun") };
    peer
}

fn disk(length: u64) -> FromSource {
    let (name, source) = ("disk-0".into(), "a lie".into());
    FromSource::Disk(Disk { name, length, source, tracking: None, said: None })
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// A cluster as frames that are stored as they are.
fn frames(cluster: &[u8]) -> Vec<u8> {
    [&[16, 0xff, 0xff], cluster].concat()
}

fn offer(sequence: u64, first: u64, hashes: &[[u8; 32]]) -> FromSource {
    let clusters: Vec<_> = hashes.iter().copied().map(Some).collect();
    FromSource::Offer(Offer { sequence, first, count: hashes.len() as u64, task: Task::Read, clusters })
}

fn data(sequence: u64, frames: &[Vec<u8>]) -> FromSource {
    FromSource::Data(Data { sequence, frames: frames.to_vec() })
}

fn commit() -> FromSource {
    FromSource::Commit(Commit { duration_ms: 1, definition: None, warnings: Vec::new() })
}

/// Whether a message has an answer.
fn peer_answers(message: &FromSource) -> bool {
    !matches!(message, FromSource::Data(_))
}

#[test]
fn who_lies_about_hashes_lengths_order_or_versions_commits_nothing() {
    let sites = Sites::new();
    let (one, two) = (Random::new(5).bytes(CLUSTER), Random::new(6).bytes(CLUSTER));
    let end = |offers| FromSource::DiskEnd(DiskEnd { offers });
    let length = 3 * CLUSTER as u64;
    let good = [disk(length), offer(0, 0, &[hash(&one)]), data(0, &[frames(&one)])];
    let with = |more: &[FromSource]| good.iter().chain(more).cloned().collect::<Vec<_>>();
    let mut cut_frames = frames(&one);
    cut_frames.pop();
    let zeros = vec![0; CLUSTER];
    let keep = Offer { sequence: 1, first: 1, count: 1, task: Task::Keep, clusters: Vec::new() };
    let lies: Vec<(&str, Vec<FromSource>, &str)> = vec![
        ("another content", vec![good[0].clone(), good[1].clone(), data(0, &[frames(&two)])], "not what was offered"),
        ("cut frames", vec![good[0].clone(), good[1].clone(), data(0, &[cut_frames])], "malformed"),
        ("no frames", vec![good[0].clone(), good[1].clone(), data(0, &[])], "fewer than were needed"),
        ("too many", vec![good[0].clone(), good[1].clone(), data(0, &[frames(&one), frames(&two)])], "more than were"),
        ("zeros", vec![good[0].clone(), offer(0, 0, &[hash(&zeros)]), data(0, &[frames(&zeros)])], "all zeros"),
        ("unasked contents", with(&[data(0, &[frames(&one)])]), "does not wait"),
        ("contents that never come", with(&[offer(1, 1, &[hash(&two)]), end(2)]), "never came"),
        ("an offer that never comes", with(&[end(2)]), "not all of it was offered"),
        ("an offer too many", with(&[end(0)]), "not all of it was offered"),
        ("an offer twice", with(&[offer(0, 1, &[hash(&two)])]), "came twice"),
        ("a place twice", with(&[offer(1, 0, &[hash(&two)]), data(1, &[frames(&two)])]), "does not follow"),
        ("past the end", with(&[offer(1, 3, &[hash(&two)])]), "past the end"),
        ("out of the window", with(&[offer(65, 1, &[hash(&two)])]), "outside of the window"),
        ("keeps what nobody has", with(&[FromSource::Offer(keep)]), "read whole"),
        ("a commit before the end", with(&[end(1), commit()]), "something else than a disk or the end"),
        ("a commit in a disk", with(&[commit()]), "something else than the disk"),
        ("a disk twice", with(&[end(1), disk(length)]), "comes twice"),
        ("no disk", vec![FromSource::Close], "something else than a disk"),
        ("too long a disk", vec![disk(u64::MAX)], "longer than any disk"),
        (
            "a second hello",
            vec![FromSource::Hello(Hello { version: VERSION, software: String::new() })],
            "something else",
        ),
    ];
    for (nth, (lie, messages, said)) in lies.into_iter().enumerate() {
        // What was true of it lands, for this VM.
        let mut peer = begun(&sites, &format!("liar-{nth}"));
        messages.iter().for_each(|message| peer.say(message));
        let trouble = loop {
            match peer.hear() {
                Some(FromTarget::Trouble(trouble)) => break trouble,
                Some(_) => {}
                None => panic!("{lie}: the connection ended without a word"),
            }
        };
        assert!(trouble.code == TroubleCode::Protocol && trouble.message.contains(said), "{lie}: {trouble:?}");
        assert_eq!(peer.hear(), None, "{lie}: it goes on");
    }
    // Before anything was begun.
    for (bytes, said) in [
        (FromSource::Begin(Begin { vm: "x".into(), resume: None }).encode(), "version first"),
        (FromSource::Hello(Hello { version: 77, software: String::new() }).encode(), "speaks version 1"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "kind"),
        ([&[5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..], &[0; 100]].concat(), "claims 4294967295 bytes"),
    ] {
        let mut peer = sites.connect(&sites.client);
        peer.write(&bytes);
        let mut heard = std::iter::from_fn(|| peer.hear()).filter(|message| !matches!(message, FromTarget::Welcome(_)));
        let Some(FromTarget::Trouble(trouble)) = heard.next() else { panic!("{said}: no trouble") };
        assert!(trouble.message.contains(said), "{trouble:?}");
    }
    assert_eq!(points(&sites.target), 0);
    // The same who tells the truth is served, and what the lies left does no harm.
    let mut peer = begun(&sites, "liar");
    let rest = [offer(1, 1, &[hash(&two)]), data(1, &[frames(&two)]), end(2), FromSource::Close, commit()];
    for message in good.iter().chain(&rest) {
        peer.say(message);
        let expected = match (message, peer_answers(message).then(|| peer.hear())) {
            (_, None) => true,
            (FromSource::Disk(_), Some(Some(FromTarget::DiskReady(_)))) => true,
            (FromSource::Offer(offer), Some(Some(FromTarget::Need(need)))) => {
                need == Need { sequence: offer.sequence, clusters: 1 }
            }
            (FromSource::DiskEnd(_), Some(Some(FromTarget::DiskDone))) => true,
            (FromSource::Close, Some(Some(FromTarget::Closed))) => true,
            (FromSource::Commit(_), Some(Some(FromTarget::Committed(committed)))) => committed.number == 1,
            _ => false,
        };
        assert!(expected, "another answer to {message:?}");
    }
    let right = sites.source.disk("right");
    fs::write(&right, [&one[..], &two, &zeros].concat()).unwrap();
    assert_restores(&sites.target, "liar@1", "disk-0", &right);
    sites.target.verify();
}

#[test]
fn two_sessions_of_one_vm_do_not_work_at_once() {
    let sites = Sites::new();
    let _first = begun(&sites, "vm");
    let mut second = sites.connect(&sites.client);
    second.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
    assert!(matches!(second.hear(), Some(FromTarget::Welcome(_))));
    second.say(&FromSource::Begin(Begin { vm: "vm".into(), resume: None }));
    let Some(FromTarget::Trouble(trouble)) = second.hear() else { panic!("no trouble") };
    assert_eq!(trouble.code, TroubleCode::Busy);
    drop(begun(&sites, "other"));
}

#[test]
fn a_connection_that_is_cut_goes_on_and_sends_nothing_twice() {
    let sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let disk = make_disk(&sites.source, "disk", 600, 7);
    proxy.cut_after(20 << 20);
    let run = sites.source.reseal(sites.words(proxy.port, "vm", &[disk.to_str().unwrap()])).ok();
    assert!(run.stderr.contains("trying again"), "{run:#?}");
    // What was on its way when the line was cut is sent again.
    let most = used(600) * 102 / 100 + (12 << 20);
    assert!(proxy.sent() < most, "{} of {}", proxy.sent(), used(600));
    assert_restores(&sites.target, "vm@1", "disk-0", &disk);
    assert_eq!(points(&sites.target), 1);
    sites.target.verify();
}

/// Waits until the source has sent so much.
fn wait_for_bytes(proxy: &Proxy, bytes: u64) {
    wait_until(&format!("byte {bytes} of what is sent"), Duration::from_secs(40), || proxy.sent() >= bytes);
}

#[test]
fn a_server_that_is_killed_and_comes_back_is_found_again() {
    let mut sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let disk = make_disk(&sites.source, "disk", 2400, 8);
    // Held back, so that little is under way when the server dies.
    let mut words = sites.words(proxy.port, "vm", &[disk.to_str().unwrap()]);
    words.extend(["--limit-rate".to_owned(), "60M".to_owned()]);
    let source = sites.source.start(&words);
    // A group has landed.
    let landed = || files_below(&sites.target.state).into_iter().find(|path| path.ends_with("landed/vm"));
    wait_until("what lands", Duration::from_secs(40), || {
        landed().is_some_and(|path| fs::metadata(path).unwrap().len() > 24)
    });
    sites.kill();
    assert_eq!(points(&sites.target), 0);
    sites.start();
    let json = source.wait().ok().json();
    assert_eq!(json["number"], 1);
    // The group that was being filled, and what was under way, was lost; the one that had landed was not.
    let sent = json["stats"]["sent"].as_u64().unwrap();
    assert!(sent < used(2400) + (48 << 20), "{sent} of {}", used(2400));
    assert_restores(&sites.target, "vm@1", "disk-0", &disk);
    sites.target.verify();
}

#[test]
fn a_source_that_is_killed_begins_anew_and_sends_only_what_is_missing() {
    let sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let disk = make_disk(&sites.source, "disk", 800, 9);
    let words = sites.words(proxy.port, "vm", &[disk.to_str().unwrap()]);
    let source = sites.source.start(&words);
    wait_for_bytes(&proxy, 25 << 20);
    source.kill();
    assert_eq!(points(&sites.target), 0);
    let json = sites.source.reseal(&words).ok().json();
    assert_eq!(json["number"], 1);
    let sent = json["stats"]["sent"].as_u64().unwrap();
    assert!(sent < used(800) - (10 << 20), "{sent} of {}", used(800));
    assert_restores(&sites.target, "vm@1", "disk-0", &disk);
    sites.target.verify();
}

#[test]
fn a_server_that_is_stopped_lands_what_came_and_says_so() {
    let mut sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let disk = make_disk(&sites.source, "disk", 800, 10);
    let mut words = sites.words(proxy.port, "vm", &[disk.to_str().unwrap()]);
    words.extend(["--limit-rate".to_owned(), "30M".to_owned()]);
    let source = sites.source.start(&words);
    wait_for_bytes(&proxy, 25 << 20);
    let log = sites.stop().ok().stderr;
    assert!(log.contains("about to stop"), "{log}");
    sites.start();
    let json = source.wait().ok().json();
    let sent = json["stats"]["sent"].as_u64().unwrap();
    assert!(sent < used(800) + (16 << 20), "{sent} of {}", used(800));
    assert_restores(&sites.target, "vm@1", "disk-0", &disk);
}

#[test]
fn told_changes_are_used_over_the_wire_and_a_wrong_word_is_found_out() {
    let sites = Sites::new();
    let disk = make_disk(&sites.source, "disk", 200, 11);
    let length = fs::metadata(&disk).unwrap().len();
    let list = |since: &str, now: &str, areas: &str| {
        let since = if since.is_empty() { String::new() } else { format!("\"changeId\": \"{since}\", ") };
        let path = sites.source.path("changes.json");
        let text = format!(
            "{{{since}\"newChangeId\": \"{now}\", \"startOffset\": 0, \"length\": {length}, \"changedArea\": {areas}}}"
        );
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let backup = |changes: &str, more: &[&str]| {
        let mut words = sites.words(sites.port, "vm", &[disk.to_str().unwrap(), "--changes", changes]);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        sites.source.reseal(words).ok()
    };
    backup(&list("x/0", "x/1", &format!("[{{\"start\": 0, \"length\": {length}}}]")), &[]);
    let file = fs::File::options().write(true).open(&disk).unwrap();
    file.write_all_at(b"changed", 50 * CLUSTER as u64).unwrap();
    let area = format!("[{{\"start\": {}, \"length\": 512}}]", 50 * CLUSTER);
    let json = backup(&list("x/1", "x/2", &area), &["--check-unchanged", "0"]).json();
    assert_eq!((&json["stats"]["read"], &json["warnings"]), (&(CLUSTER as u64).into(), &serde_json::json!([])));
    assert_restores(&sites.target, "vm@2", "disk-0", &disk);
    // A list that is not of this chain, and one that hides a change.
    file.write_all_at(b"again", 60 * CLUSTER as u64).unwrap();
    let json = backup(&list("y/9", "x/3", &area), &[]).json();
    assert!(json["warnings"][0].as_str().unwrap().contains("tells changes since another moment"), "{json}");
    assert_restores(&sites.target, "vm@3", "disk-0", &disk);
    file.write_all_at(b"hidden", 70 * CLUSTER as u64).unwrap();
    let json = backup(&list("x/3", "x/4", &area), &["--check-unchanged", "100"]).json();
    assert!(json["warnings"][0].as_str().unwrap().contains("was wrong"), "{json}");
    assert_restores(&sites.target, "vm@4", "disk-0", &disk);
    sites.target.verify();
}

#[test]
fn a_running_vm_is_sent_by_its_bitmap_and_its_moment_outlasts_a_cut_line() {
    let sites = Sites::new();
    let proxy = Proxy::new(sites.port);
    let mut model = Random::new(12).bytes(400 * CLUSTER);
    let image = sites.source.disk("vm.raw");
    fs::write(&image, &model).unwrap();
    let socket = sites.source.path("vm.qmp");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "q35,accel=tcg", "-m", "64", "-display", "none", "-nodefaults", "-S"]);
    command.args(["-blockdev", &format!("driver=file,filename={},node-name=file", image.display())]);
    command.args(["-blockdev", "driver=raw,file=file,node-name=disk", "-device", "virtio-blk-pci,drive=disk,id=vd0"]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    let vm = start(bound_to_us(&mut command));
    let began = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(began.elapsed() < Duration::from_secs(20) && !vm.has_ended(), "QEMU does not come up");
        thread::sleep(Duration::from_millis(20));
    }
    let write = |pattern: u8, at: usize| {
        let line = format!("qemu-io -d /machine/peripheral/vd0/virtio-backend \"write -P {pattern} {at} 4096\"");
        Qmp::connect(&socket).run("human-monitor-command", serde_json::json!({ "command-line": line }));
    };
    let words = sites.words(proxy.port, "vm", &["--qmp", socket.to_str().unwrap()]);
    proxy.cut_after(8 << 20);
    let run = sites.source.reseal(&words).ok();
    assert!(run.stderr.contains("trying again"), "{run:#?}");
    let right = sites.source.disk("right");
    fs::write(&right, &model).unwrap();
    assert_restores(&sites.target, "vm@1", "disk-0", &right);
    for (pattern, at) in [(7, 0), (8, 99 * CLUSTER + 4096)] {
        write(pattern, at);
        model[at..at + 4096].fill(pattern);
    }
    let json = sites.source.reseal(&words).ok().json();
    assert_eq!((&json["stats"]["read"], &json["warnings"]), (&(2 * CLUSTER as u64).into(), &serde_json::json!([])));
    fs::write(&right, &model).unwrap();
    assert_restores(&sites.target, "vm@2", "disk-0", &right);
    let left = Qmp::connect(&socket).left_behind();
    assert_eq!((left.jobs, left.exports, left.bitmaps.len()), (0, 0, 1), "{left:?}");
    vm.kill();
    sites.target.verify();
}

#[test]
fn a_client_that_stalls_or_floods_is_held_back_and_harms_no_other() {
    let sites = Sites::new();
    // One says nothing after the first word, one never ends its handshake, one sends more offers than the window has and
    // reads no answer.
    let mut silent = sites.connect(&sites.client);
    silent.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
    let _half = std::net::TcpStream::connect(("127.0.0.1", sites.port)).unwrap();
    let mut flood = begun(&sites, "flood");
    flood.say(&disk(1 << 40));
    (0..100).for_each(|sequence| flood.say(&offer(sequence, sequence, &[[7; 32]])));
    let path = make_disk(&sites.source, "disk", 50, 13);
    let began = Instant::now();
    sites.source.reseal(sites.words(sites.port, "vm", &[path.to_str().unwrap()])).ok();
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_restores(&sites.target, "vm@1", "disk-0", &path);
    let mut heard = std::iter::from_fn(|| flood.hear());
    let needs = heard.by_ref().take_while(|message| !matches!(message, FromTarget::Trouble(_))).count();
    assert_eq!(needs, 1 + 64, "it was served beyond its window");
}

#[test]
fn a_long_line_is_used_by_many_offers_at_once() {
    let sites = Sites::new();
    let rate = 25_000_000_u32;
    let line = long_line(sites.port, Duration::from_millis(50), rate.into());
    let proxy = Proxy::new(line);
    let disk = make_disk(&sites.source, "disk", 2400, 14);
    let source = sites.source.start(sites.words(proxy.port, "vm", &[disk.to_str().unwrap()]));
    // Between two moments while it sends: how long a session takes to begin and to end is another matter.
    wait_for_bytes(&proxy, 20_000_000);
    let (began, before) = (Instant::now(), proxy.sent());
    wait_for_bytes(&proxy, 120_000_000);
    let reached = (proxy.sent() - before) as f64 / began.elapsed().as_secs_f64();
    // One unit after the other would reach a fifth. How much it is on an idle machine, the bench says.
    assert!(reached > 0.5 * f64::from(rate), "{reached} of {rate} bytes a second");
    source.wait().ok();
    assert_restores(&sites.target, "vm@1", "disk-0", &disk);
}
