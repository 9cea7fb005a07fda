//! A site that may read restore points of another: lists, manifests, disks over NBD; and who may not, who lies, what breaks.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use reseal_format::layout;
use reseal_format::manifest::Tombstone;
use reseal_format::names::TenantName;
use reseal_nbd::{Export, NbdError, Options, TlsFirst};
use reseal_proto::wire::{
    Begin, Disk, FromSource, FromTarget, Hello, ListPoints, ListVms, NBD_ALPN, PointState, Renew, Show, Shown,
    TroubleCode, VERSION,
};
use reseal_site::Enrolment;
use reseal_tests::enrolled::{Enrolling, between, field, identity, put};
use reseal_tests::far::{open, open_disk, read_whole, reader};
use reseal_tests::library::vm;
use reseal_tests::ports::free_port;
use reseal_tests::process::Run;
use reseal_tests::remote::{Authority, Peer, long_line, private};
use reseal_tests::site::Site;
use reseal_vault::{Class, Points, State, VaultError};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Both sites, and what the server's configuration says more.
fn sites(more: &str) -> Enrolling {
    let mut sites = Enrolling::stopped();
    let path = sites.target.path("serve.toml");
    let text = fs::read_to_string(&path).unwrap();
    private(path, &(text + more));
    sites.start();
    sites
}

/// The words after `--repo FILE`.
fn with(sites: &Enrolling, file: &Path, words: &[&str]) -> Run {
    sites.source.reseal(["--repo", file.to_str().unwrap()].iter().chain(words))
}

/// What `forget` does: a tombstone first, then the manifest goes.
fn forget(site: &Site, name: &str, number: u32) {
    let tenant = site.tenant();
    let point = tenant.point(&vm(name), number).unwrap();
    let tombstone = Tombstone {
        vm: point.manifest.vm.clone(),
        vm_id: point.manifest.vm_id,
        number,
        point_id: point.manifest.point_id,
        digest: point.digest,
        parent: point.manifest.parent,
        reason: "a test".into(),
        created: point.manifest.created,
        fenced: false,
    };
    let of = TenantName::new("default").unwrap();
    let object = tombstone.seal(&tenant.keys(), reseal_vault::random().unwrap()).unwrap();
    tenant.store().create(&layout::tombstone(&of, &vm(name), number), &object).unwrap();
    fs::remove_file(site.vault.join(layout::manifest(&of, &vm(name), number))).unwrap();
}

/// One who has said hello.
fn greeted(sites: &Enrolling, file: &Path) -> Peer {
    let mut peer = Peer::connect(sites.port, &field(file, "server_ca"), Some(&identity(file)));
    peer.say(&FromSource::Hello(Hello { version: VERSION, software: "test".into() }));
    assert!(matches!(peer.hear(), Some(FromTarget::Welcome(_))));
    peer
}

fn show(name: &str, number: u32) -> FromSource {
    FromSource::Show(Show { vm: name.into(), number })
}

/// Why the other side ends the session, which it must.
#[track_caller]
fn trouble(peer: &mut Peer) -> TroubleCode {
    let Some(FromTarget::Trouble(trouble)) = peer.hear() else { panic!("no trouble") };
    assert_eq!(peer.hear(), None, "the session goes on");
    trouble.code
}

fn audit(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The value of a metric with exactly that name and those labels.
fn metric(port: u16, name: &str) -> f64 {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// Opens an export of any name.
fn by_name(file: &Path, export: &str) -> Result<Export, NbdError> {
    let enrolment = Enrolment::read(file).unwrap();
    let mut config = (*enrolment.tls()).clone();
    config.alpn_protocols = vec![NBD_ALPN.to_vec()];
    let (address, server) = (enrolment.address().to_owned(), enrolment.server());
    let first = TlsFirst { address, server, config: config.into(), export: export.to_owned() };
    Export::open_tls(&first, &Options::default())
}

#[track_caller]
fn assert_reads(file: &Path, name: &str, number: u32, right: &Path) {
    let export = open(&reader(file), name, number).unwrap();
    assert!(
        read_whole(&export, |_| {}).unwrap() == fs::read(right).unwrap(),
        "{name}@{number} is not what was backed up"
    );
}

fn expect_err<T>(result: Result<T, VaultError>) -> VaultError {
    result.err().expect("it is refused")
}

#[test]
fn what_a_restore_certificate_lists_shows_and_reads_is_what_the_vault_has() {
    let sites = Enrolling::new();
    let disks: Vec<PathBuf> = (0..4).map(|nth| sites.disk(&format!("disk-{nth}"), 3 * MIB + nth * 777)).collect();
    for disk in &disks {
        sites.target.backup("web01", disk);
    }
    let pair = [("root".to_owned(), disks[0].clone()), ("data".to_owned(), disks[1].clone())];
    sites.target.backup_disks("db ä", &pair);
    forget(&sites.target, "web01", 2);
    let file = sites.enrol("default", "reader", "restore", &[]);
    for words in [&["list", "--json"][..], &["list", "web01", "--json"], &["list"], &["show", "web01@latest", "--json"]]
    {
        let (here, there) = (sites.target.reseal(words).ok(), with(&sites, &file, words).ok());
        // What became of boots is not told to another site.
        let boot = |line: &str| line.trim_end_matches("  BOOT").trim_end_matches("  -").to_owned() + "\n";
        let here: String = here.stdout.lines().map(boot).collect();
        assert_eq!((here, there.stderr), (there.stdout, String::new()), "{words:?}");
    }
    for point in ["web01@1", "db ä@latest"] {
        let words = ["show", point];
        assert_eq!(sites.target.reseal(words).ok().stdout, with(&sites, &file, &words).ok().stdout);
    }
    let time = with(&sites, &file, &["show", "web01@3", "--json"]).ok().json()["time"].as_str().unwrap().to_owned();
    assert_eq!(with(&sites, &file, &["show", &format!("web01@{time}"), "--json"]).ok().json()["number"], 3);
    for (words, status) in [
        (["show", "web01@9"], 1),
        (["show", "web01@2"], 1),
        (["show", "nobody@1"], 1),
        (["list", "nobody"], 1),
        (["show", "web01"], 2),
    ] {
        let here = sites.target.reseal(words).expect(&[status]);
        assert_eq!(here.stderr, with(&sites, &file, &words).expect(&[status]).stderr);
    }
    let far = reader(&file);
    assert_eq!(far.vms().unwrap(), [vm("db ä"), vm("web01")]);
    let chain = far.chain(&vm("web01")).unwrap();
    assert_eq!(chain, sites.target.tenant().chain(&vm("web01")).unwrap());
    assert_eq!(chain.numbers().nth(1), Some((2, State::Forgotten)));
    assert_eq!(far.chain(&vm("nobody")).unwrap().last(), 0);
    assert_eq!(far.point(&vm("web01"), 3).unwrap(), sites.target.tenant().point(&vm("web01"), 3).unwrap());
    assert_eq!(far.tombstone(&vm("web01"), 2).unwrap(), sites.target.tenant().tombstone(&vm("web01"), 2).unwrap());
    for number in [1, 3, 4] {
        assert_reads(&file, "web01", number, &disks[number as usize - 1]);
    }
    for (name, disk) in &pair {
        let export = open_disk(&far, "db ä", 1, name).unwrap();
        assert!(export.has_allocation());
        assert!(read_whole(&export, |_| {}).unwrap() == fs::read(disk).unwrap());
    }
    assert!(matches!(open(&far, "web01", 2), Err(VaultError::NoPoint { .. })));
    assert!(matches!(open(&far, "web01", 9), Err(VaultError::NoPoint { .. })));
    assert!(matches!(open_disk(&far, "web01", 1, "other"), Err(VaultError::NoPoint { .. })));
    // What needs the vault says so.
    with(&sites, &file, &["verify"]).fails(2, &["is a file", "where the vault is"]);
    with(&sites, &file, &["status"]).ok();
}

#[test]
fn holes_are_told_and_not_sent() {
    let port = free_port();
    let sites = sites(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    let disk = sites.source.disk("sparse");
    let handle = fs::File::create(&disk).unwrap();
    handle.set_len(256 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&handle, &[7; 70_000], 100 << 20).unwrap();
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    assert_reads(&file, "web01", 1, &disk);
    let sent = metric(port, "reseal_sent_bytes_total{tenant=\"default\"}");
    assert!((70_000.0..2e6).contains(&sent), "{sent} bytes");
}

#[test]
fn an_append_certificate_reads_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let sites = sites(&format!("[audit]\nfile = {path:?}\n"));
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("default", "site", "append", &[]);
    sites.backup(&file, "web01", &disk).ok();
    for question in [
        FromSource::ListVms(ListVms { after: None }),
        FromSource::ListPoints(ListPoints { vm: "web01".into(), after: 0 }),
        show("web01", 1),
    ] {
        let mut peer = greeted(&sites, &file);
        peer.say(&question);
        assert_eq!(trouble(&mut peer), TroubleCode::NotAllowed);
        // Nor in the middle of a restore point.
        let mut peer = greeted(&sites, &file);
        peer.say(&FromSource::Begin(Begin { vm: "web02".into(), resume: None }));
        assert!(matches!(peer.hear(), Some(FromTarget::Begun(_))));
        peer.say(&question);
        assert_eq!(trouble(&mut peer), TroubleCode::Protocol);
    }
    for words in [&["list"][..], &["show", "web01@1"]] {
        let run = with(&sites, &file, words).fails(1, &["may add restore points and not read them"]);
        assert!(run.stdout.is_empty(), "{run:#?}");
    }
    let refused = expect_err(open(&reader(&file), "web01", 1));
    assert!(refused.class() == Class::Failed && refused.to_string().contains("not read them"), "{refused}");
    let lines = audit(&path);
    assert!(lines.iter().filter(|line| line["event"] == "refused").count() >= 6, "{lines:#?}");
    assert!(lines.iter().all(|line| line["event"] != "read"), "{lines:#?}");
}

#[test]
fn a_restore_certificate_adds_nothing() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    for role in ["restore", "admin"] {
        let file = sites.enrol("default", role, role, &[]);
        sites.backup(&file, "web01", &disk).fails(1, &["may not add restore points of web01, only read them"]);
        let mut peer = greeted(&sites, &file);
        peer.say(&FromSource::ListVms(ListVms { after: None }));
        assert!(matches!(peer.hear(), Some(FromTarget::Vms(vms)) if vms.names.is_empty() && !vms.more));
        peer.say(&FromSource::Begin(Begin { vm: "web01".into(), resume: None }));
        assert_eq!(trouble(&mut peer), TroubleCode::NotAllowed);
    }
    assert_eq!(sites.points("default"), 0);
}

#[test]
fn of_vms_that_are_not_its_own_a_client_learns_nothing() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    for name in ["web01", "web02", "web03"] {
        sites.target.backup(name, &disk);
    }
    sites.target.reseal_of("acme", ["backup", "other", disk.to_str().unwrap()]).ok();
    let file = sites.enrol("default", "reader", "restore", &["--vm", "web01", "--vm", "web03", "--vm", "later"]);
    let far = reader(&file);
    assert_eq!(far.vms().unwrap(), [vm("web01"), vm("web03")]);
    let listed = with(&sites, &file, &["list", "--json"]).ok().json_lines();
    assert_eq!(listed.iter().map(|point| &point["vm"]).collect::<Vec<_>>(), ["web01", "web03"]);
    // One that is there, and is not its own; one that is not there; one of another tenant.
    for name in ["web02", "none", "other"] {
        let said = |run: Run| run.fails(1, &[]).stderr.replace(name, "VM");
        assert_eq!(
            said(with(&sites, &file, &["list", name])),
            "reseal: there is no VM VM; `reseal list` shows what there is\n"
        );
        assert_eq!(far.chain(&vm(name)).unwrap().last(), 0);
        let (none, disk) = (far.point(&vm(name), 1), open(&far, name, 1));
        assert!(matches!((none, disk), (Err(VaultError::NoPoint { .. }), Err(VaultError::NoPoint { .. }))));
        let mut peer = greeted(&sites, &file);
        peer.say(&show(name, 1));
        let Some(FromTarget::Shown(Shown::Refused(trouble))) = peer.hear() else { panic!("it is shown") };
        let said = trouble.message.replace(name, "VM");
        assert_eq!((trouble.code, said.as_str()), (TroubleCode::Unknown, "the restore point VM@1 does not exist"));
    }
    assert_reads(&file, "web03", 1, &disk);
    // What the enrolment file says of tenant and VMs is for people: the registry counts.
    let text = fs::read_to_string(&file).unwrap();
    private(file.clone(), &text.replace("tenant = \"default\"", "tenant = \"acme\"").replace("\"web01\"", "\"*\""));
    assert_eq!(reader(&file).vms().unwrap(), [vm("web01"), vm("web03")]);
}

#[test]
fn one_who_is_revoked_while_he_reads_is_cut_off_and_comes_in_no_more() {
    let sites = sites("[limits]\nclient_rate = \"8M\"\n");
    let disk = sites.disk("disk", 64 * MIB);
    sites.target.backup("web01", &disk);
    let (bad, good) = (sites.enrol("default", "bad", "restore", &[]), sites.enrol("default", "good", "restore", &[]));
    let mut idle = greeted(&sites, &bad);
    thread::scope(|scope| {
        let good = scope.spawn(|| assert_reads(&good, "web01", 1, &disk));
        let (come, coming) = crossbeam_channel::bounded(1);
        let bad = &bad;
        let reading = scope.spawn(move || {
            let export = open(&reader(bad), "web01", 1).unwrap();
            let read = read_whole(&export, |_| {
                let _ = come.try_send(());
            });
            (read, Instant::now())
        });
        coming.recv().unwrap();
        sites.tenant(&["revoke", "default", "bad"]).ok();
        let began = Instant::now();
        assert_eq!(trouble(&mut idle), TroubleCode::NotAllowed);
        assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
        let (read, ended) = reading.join().unwrap();
        let failed = read.expect_err("it does not get all");
        assert!(ended - began < Duration::from_secs(4), "{:?}: {failed}", ended - began);
        assert!(failed.to_string().contains("was revoked at this site"), "{failed}");
        good.join().unwrap();
    });
    let refused = expect_err(open(&reader(&bad), "web01", 1));
    assert!(refused.class() == Class::Failed && refused.to_string().contains("revoked"), "{refused}");
    with(&sites, &bad, &["list"]).fails(1, &["the certificate was revoked"]);
}

#[test]
fn who_is_expired_foreign_or_nobody_reads_nothing() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    let own = sites.aged("default", "reader", &file, -1..20);
    let refused = |what: &str, said: &str| {
        with(&sites, &file, &["list"]).fails(1, &[said]);
        let refused = expect_err(open(&reader(&file), "web01", 1));
        assert!(refused.class() == Class::Failed, "{what}: {refused}");
    };
    sites.aged("default", "reader", &file, -20..-1);
    refused("expired", "does not accept this site's certificate");
    let record = fs::read_to_string(sites.registered("default", "reader")).unwrap();
    let forged = between(&Authority::new(), -1..20);
    let aged = identity(&file);
    private(sites.registered("default", "reader"), &record.replace(&aged.sha256, &forged.sha256));
    put(&file, &forged);
    refused("foreign", "does not accept this site's certificate");
    put(&file, &between(&sites.authority(), -1..20));
    refused("unknown", "does not know the certificate");
    for alpn in [&b"reseal/1"[..], NBD_ALPN] {
        let mut nobody = Peer::speaking(alpn, sites.port, &field(&file, "server_ca"), None);
        nobody.say(&FromSource::Hello(Hello { version: VERSION, software: "nobody".into() }));
        assert_eq!(nobody.read(1), None);
    }
    let mut other = Peer::speaking(b"http/1.1", sites.port, &field(&file, "server_ca"), Some(&own));
    other.write(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(other.read(1), None);
}

#[test]
fn questions_may_be_many_at_once_and_lies_end_only_the_session_that_tells_them() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    let mut peer = greeted(&sites, &file);
    for number in 0..300 {
        peer.say(&show("web01", number % 3));
    }
    peer.say(&FromSource::ListPoints(ListPoints { vm: "web01".into(), after: 0 }));
    peer.say(&FromSource::ListVms(ListVms { after: Some("web01".into()) }));
    for number in 0..300 {
        match peer.hear() {
            Some(FromTarget::Shown(Shown::Manifest(_))) if number % 3 == 1 => {}
            Some(FromTarget::Shown(Shown::Refused(trouble))) if number % 3 != 1 => {
                assert_eq!(trouble.code, TroubleCode::Unknown);
            }
            other => panic!("{number}: {other:?}"),
        }
    }
    let Some(FromTarget::Points(points)) = peer.hear() else { panic!("no points") };
    assert_eq!((points.numbers, points.more), (vec![(1, PointState::Live)], false));
    assert!(matches!(peer.hear(), Some(FromTarget::Vms(vms)) if vms.names.is_empty()));
    let after = |message: &FromSource| {
        let mut peer = greeted(&sites, &file);
        peer.say(message);
        trouble(&mut peer)
    };
    for wrong in [
        show("", 1),
        show("..", 1),
        show("a/b", 1),
        show("a\u{1b}[2J", 1),
        FromSource::ListPoints(ListPoints { vm: "a\0".into(), after: u32::MAX }),
        FromSource::Hello(Hello { version: VERSION, software: "again".into() }),
        FromSource::Disk(Disk { name: "a".into(), length: 1, source: "b".into(), tracking: None, said: None }),
        FromSource::Close,
    ] {
        assert_eq!(after(&wrong), TroubleCode::Protocol, "{wrong:?}");
    }
    // Not after a question.
    let mut peer = greeted(&sites, &file);
    peer.say(&show("web01", 1));
    peer.say(&FromSource::Renew(Renew { request: vec![0x30; 100] }));
    assert!(matches!(peer.hear(), Some(FromTarget::Shown(_))));
    assert_eq!(trouble(&mut peer), TroubleCode::Protocol);
    // Lengths that can't be, and some that do not fit what is there.
    for (kind, claim, payload) in [
        (0x30, 85 + 1, &[][..]),
        (0x31, 89, &[]),
        (0x32, u32::MAX, &[]),
        (0x30, 5, &[1, 0, 0, 0, 9]),
        (0x30, 1, &[2]),
        (0x32, 8, &[0xff; 8]),
        (0x31, 9, &[0, 0, 0, 1, 0xff, 0, 0, 0, 1]),
        (0x33, 0, &[]),
    ] {
        let mut peer = greeted(&sites, &file);
        let mut bytes = vec![kind, 0, 0, 0];
        bytes.extend(u32::to_be_bytes(claim));
        bytes.extend(payload);
        peer.write(&bytes);
        assert_eq!(trouble(&mut peer), TroubleCode::Protocol, "{kind:#x} {claim}");
    }
    // NBD, and what is none.
    for garbage in [&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"[..], &[0xff; 64], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut peer = Peer::speaking(NBD_ALPN, sites.port, &field(&file, "server_ca"), Some(&identity(&file)));
        peer.write(garbage);
        assert_eq!(peer.read(8).as_deref(), Some(&b"NBDMAGIC"[..]));
        while peer.read(1).is_some() {}
    }
    for export in
        ["", "web01", "web01@1/../x", "web01@latest/nothing", "web01@0/disk-0", "@", "/", "\u{1b}[2J@1/disk-0"]
    {
        assert!(by_name(&file, export).is_err(), "{export:?}");
    }
    assert!(by_name(&file, "web01@latest/disk-0").is_ok() && by_name(&file, "web01@1").is_ok());
    assert_reads(&file, "web01", 1, &disk);
    let log = sites.stop();
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn what_is_damaged_is_told_and_the_rest_is_read() {
    let port = free_port();
    let mut sites = sites(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    let disks: Vec<PathBuf> = (1..=3).map(|nth| sites.disk(&format!("disk-{nth}"), nth * 3 * MIB)).collect();
    for disk in &disks {
        sites.target.backup("web01", disk);
    }
    let file = sites.enrol("default", "reader", "restore", &[]);
    // The manifest of the second point, and a pack of the third: the first that only it has.
    let flip = |path: PathBuf, at: usize| {
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
    };
    let manifest = layout::manifest(&TenantName::new("default").unwrap(), &vm("web01"), 2);
    flip(sites.target.vault.join(&manifest), 200);
    let newest = |key: &String| fs::metadata(sites.target.vault.join(key)).unwrap().modified().unwrap();
    let pack = sites.target.packs(1).into_iter().max_by_key(newest).unwrap();
    flip(sites.target.vault.join(&pack), 4000);
    let listed = with(&sites, &file, &["list", "--json"]).fails(3, &["web01@2", "damaged or missing at this site"]);
    assert_eq!(listed.json_lines().iter().map(|point| point["number"].clone()).collect::<Vec<_>>(), [1, 3]);
    let far = reader(&file);
    let results = far.points(&vm("web01"), &[1, 2, 3]);
    assert!(matches!(&results[..], [Ok(_), Err(e), Ok(_)] if e.class() == Class::Damaged));
    assert!(open(&far, "web01", 2).is_err());
    let failed = read_whole(&open(&far, "web01", 3).unwrap(), |_| {}).expect_err("damage is an error, never zeros");
    assert!(failed.to_string().contains("can't read bytes"), "{failed}");
    assert_reads(&file, "web01", 1, &disks[0]);
    assert!(metric(port, "reseal_read_failures_total{tenant=\"default\",code=\"damaged\"}") >= 2.0);
    assert!(metric(port, "reseal_read_failures_total{tenant=\"default\",code=\"failed\"}") >= 1.0);
    let log = sites.stop();
    let pack = pack.rsplit('/').next().unwrap().split('.').next().unwrap();
    assert!(log.contains(&manifest) && log.contains(pack), "{log}");
}

#[test]
fn each_disk_that_is_read_is_in_the_audit_log_before_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let sites = sites(&format!("[audit]\nfile = {path:?}\n"));
    let disk = sites.disk("disk", 2 * MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    let reads = || audit(&path).into_iter().filter(|line| line["event"] == "read").collect::<Vec<_>>();
    with(&sites, &file, &["list"]).ok();
    assert!(reads().is_empty());
    let far = reader(&file);
    let export = open(&far, "web01", 1).unwrap();
    let lines = reads();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    let line = &lines[0];
    for (name, value) in [("client", "reader"), ("tenant", "default"), ("vm", "web01"), ("disk", "disk-0")] {
        assert_eq!(line[name], value);
    }
    assert_eq!((line["number"].clone(), &line["certificate_sha256"]), (1.into(), &identity(&file).sha256.into()));
    assert!(line["peer"].is_string() && line["connection"].is_u64());
    read_whole(&export, |_| {}).unwrap();
    drop(export);
    let began = Instant::now();
    let sent = loop {
        let ended = audit(&path).into_iter().filter(|line| line["event"] == "ended");
        let sent: u64 = ended.map(|line| line["sent_bytes"].as_u64().unwrap()).sum();
        if sent >= 2 * MIB as u64 || began.elapsed() > Duration::from_secs(5) {
            break sent;
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(sent, 2 * MIB as u64);
    assert!(open(&far, "web01", 7).is_err() && open(&far, "nobody", 1).is_err());
    // What is not there was not read; each connection opens the disk for itself.
    assert!(reads().iter().all(|line| line["number"] == 1), "{:#?}", reads());
}

#[test]
fn where_nothing_can_be_noted_nothing_is_read() {
    let mut sites = Enrolling::new();
    sites.target.backup("web01", &sites.disk("disk", MIB));
    let file = sites.enrol("default", "reader", "restore", &[]);
    sites.stop();
    let path = sites.target.path("serve.toml");
    let text = fs::read_to_string(&path).unwrap();
    private(path, &(text + "[audit]\nfile = \"/dev/full\"\n"));
    sites.start();
    with(&sites, &file, &["list"]).fails(4, &["can't note what is done"]);
    assert!(open(&reader(&file), "web01", 1).is_err());
    // Nor is anybody enrolled; who is revoked is, and that is said.
    let other = sites.source.path("other.reseal");
    let words = ["enroll", "default", "--role", "restore", "-o", other.to_str().unwrap()];
    sites.tenant(&words).fails(2, &["nobody was enrolled", "audit log"]);
    assert!(!other.exists() && !sites.registered("default", "other").exists());
    sites.tenant(&["revoke", "default", "reader"]).fails(2, &["is revoked, but that could not be noted"]);
    assert!(sites.record("default", "reader")["revoked"].is_string());
}

#[test]
fn who_is_enrolled_and_revoked_is_in_the_audit_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let sites = sites(&format!("[audit]\nfile = {path:?}\n"));
    let file = sites.enrol("acme", "reader", "restore", &[]);
    let own = identity(&file).sha256;
    let of = |event: &str| audit(&path).into_iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    let is_own =
        |line: &Value| line["client"] == "reader" && line["tenant"] == "acme" && line["certificate_sha256"] == own;
    assert!(matches!(&of("enrolled")[..], [line] if is_own(line)), "{:#?}", audit(&path));
    sites.tenant(&["revoke", "acme", "reader"]).ok();
    sites.tenant(&["revoke", "acme", "reader"]).ok();
    assert!(matches!(&of("revoked")[..], [line] if is_own(line)), "{:#?}", audit(&path));
    // One whose file can't be made is not enrolled, and the log says that too.
    let words = ["enroll", "acme", "--role", "restore", "-o", "/dev/null/x.reseal"];
    sites.tenant(&words).fails(2, &["can't be made"]);
    assert!(of("failed").iter().any(|line| line["client"] == "x"), "{:#?}", audit(&path));
}

#[test]
fn a_server_that_was_away_is_found_again_and_one_that_is_away_is_said_to_be() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", 8 * MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    let far = reader(&file);
    assert_eq!(far.vms().unwrap(), [vm("web01")]);
    let export = open(&far, "web01", 1).unwrap();
    sites.kill();
    let away = expect_err(far.vms());
    assert!(away.class() == Class::Unreachable, "{away}");
    assert!(expect_err(open(&far, "web01", 1)).class() == Class::Unreachable);
    with(&sites, &file, &["list"]).fails(4, &["was lost"]);
    sites.start();
    assert_eq!(far.vms().unwrap(), [vm("web01")]);
    assert!(read_whole(&export, |_| {}).unwrap() == fs::read(&disk).unwrap());
    // One that stops in an orderly way does not wait for those who read.
    let began = Instant::now();
    sites.stop();
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    sites.start();
    assert_eq!(far.vms().unwrap(), [vm("web01")]);
    assert!(read_whole(&export, |_| {}).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn readers_are_held_to_the_rate_and_to_the_number_of_connections() {
    let port = free_port();
    let sites = sites(&format!(
        "[limits]\nclient_rate = \"8M\"\nconnections_per_client = 3\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n"
    ));
    let disk = sites.disk("disk", 24 * MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    let began = Instant::now();
    assert_reads(&file, "web01", 1, &disk);
    assert!(began.elapsed() > Duration::from_millis(1500), "24 MiB in {:?}", began.elapsed());
    assert!(metric(port, "reseal_sent_bytes_total{tenant=\"default\"}") >= (24 * MIB) as f64);
    assert!(metric(port, "reseal_rate_limit_waits_total{tenant=\"default\"}") > 0.0);
    let began = Instant::now();
    while metric(port, "reseal_connections") > 0.0 {
        assert!(began.elapsed() < Duration::from_secs(10), "readers that have gone are still there");
        thread::sleep(Duration::from_millis(20));
    }
    let mut held: Vec<Peer> = (0..3).map(|_| greeted(&sites, &file)).collect();
    let full = expect_err(open(&reader(&file), "web01", 1));
    assert!(full.to_string().contains("as many sessions as it can take"), "{full}");
    with(&sites, &file, &["list"]).fails(4, &["as many sessions as it can take"]);
    held.iter_mut().for_each(Peer::end);
    drop(held);
    let began = Instant::now();
    while open(&reader(&file), "web01", 1).is_err() {
        assert!(began.elapsed() < Duration::from_secs(5), "places are not given back");
    }
}

#[test]
fn a_certificate_is_renewed_by_who_only_reads() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    sites.target.backup("web01", &disk);
    let file = sites.enrol("default", "reader", "restore", &[]);
    for words in [Some(&["list"][..]), None] {
        let old = sites.aged("default", "reader", &file, -20..2);
        thread::sleep(Duration::from_millis(1600));
        match words {
            Some(words) => drop(with(&sites, &file, words).ok()),
            None => assert_reads(&file, "web01", 1, &disk),
        }
        assert_ne!(identity(&file).sha256, old.sha256);
    }
    // One that was renewed by another process is taken up.
    let far = reader(&file);
    far.vms().unwrap();
    sites.aged("default", "reader", &file, -1..30);
    thread::sleep(Duration::from_millis(1600));
    assert_eq!(far.vms().unwrap(), [vm("web01")]);
    assert!(open(&far, "web01", 1).is_ok());
}

#[test]
fn a_long_line_costs_a_long_list_little() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", 4096);
    for _ in 0..40 {
        sites.target.backup("web01", &disk);
    }
    for number in [3, 9, 10, 11, 25] {
        forget(&sites.target, "web01", number);
    }
    let file = sites.enrol("default", "reader", "restore", &[]);
    let port = long_line(sites.port, Duration::from_millis(50), 10_000_000);
    let text = fs::read_to_string(&file).unwrap();
    private(file.clone(), &text.replace(&format!(":{}\"", sites.port), &format!(":{port}\"")));
    let began = Instant::now();
    let listed = with(&sites, &file, &["list", "--json"]).ok().json_lines();
    assert_eq!(listed.len(), 35);
    // Connection, TLS, hello, VMs, numbers, manifests, tombstones: not one way and back for each of the forty.
    assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
}
