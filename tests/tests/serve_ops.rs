//! The server as its operator has it: configuration, reload, limits, log, audit, metrics, health; tenants that come and go.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_proto::wire::{Begin, FromSource, FromTarget, Hello, TroubleCode, VERSION};
use reseal_tests::ports::free_port;
use reseal_tests::process::{run, signal, start, wait_until};
use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, Identity, Peer, Proxy, Sites};
use reseal_tests::site::Site;
use rustix::net::{AddressFamily, SocketType};
use serde_json::Value;

/// A disk without holes.
fn make_disk(site: &Site, name: &str, bytes: usize, seed: u64) -> PathBuf {
    let path = site.disk(name);
    fs::write(&path, Random::new(seed).bytes(bytes)).unwrap();
    path
}

/// Status and body of a GET.
fn get(port: u16, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The value of a metric with exactly that name and those labels.
fn metric(port: u16, name: &str) -> f64 {
    let (status, text) = get(port, "/metrics");
    assert_eq!(status, 200, "{text}");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// One source of the tenant `default`, with what else the configuration is to say.
fn sites(more: &str) -> Sites {
    let authority = Authority::new();
    let client = authority.issue(|_| {});
    Sites::configured(authority, &[(client, "default", "append", "[\"*\"]")], more, &|_| {})
}

fn greeted(peer: &mut Peer) {
    peer.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
    assert!(matches!(peer.hear(), Some(FromTarget::Welcome(_))));
}

fn begun(sites: &Sites, identity: &Identity, vm: &str) -> Peer {
    let mut peer = sites.connect(identity);
    greeted(&mut peer);
    peer.say(&FromSource::Begin(Begin { vm: vm.into(), resume: None }));
    let heard = peer.hear();
    assert!(matches!(heard, Some(FromTarget::Begun(_))), "{heard:?}");
    peer
}

/// The trouble that the server tells next, and how long that took.
fn trouble(peer: &mut Peer) -> (TroubleCode, Duration) {
    let began = Instant::now();
    match peer.hear() {
        Some(FromTarget::Trouble(trouble)) => (trouble.code, began.elapsed()),
        other => panic!("{other:?} is no trouble"),
    }
}

fn audit(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn enrolment_of(sites: &Sites, nth: usize, identity: &Identity, port: u16) -> String {
    let path = sites.enrolment(&format!("site-{nth}.reseal"), identity, &sites.authority, port);
    path.to_str().unwrap().to_owned()
}

fn send(sites: &Sites, enrolment: &str, vm: &str, disk: &Path) -> reseal_tests::process::Run {
    sites.source.reseal(["--repo", enrolment, "--json", "backup", vm, disk.to_str().unwrap()])
}

#[test]
fn a_configuration_is_checked_without_starting() {
    let sites = sites("");
    let path = sites.target.path("serve.toml");
    let check = |text: &str| {
        fs::write(&path, text).unwrap();
        sites.target.reseal(["serve", "--check", "--config", path.to_str().unwrap()])
    };
    let right = fs::read_to_string(&path).unwrap();
    assert!(check(&right).ok().stdout.contains("is right"));
    check(&(right.clone() + "[metrics]\nlisten = \"0.0.0.0:9000\"\n")).fails(2, &["must be a loopback address"]);
    check(&(right.clone() + "[limits]\nconnections = 0\n")).fails(2, &["limits.connections is 0"]);
    check(&(right.clone() + "[limits]\nhandshake = 3\n")).fails(2, &["handshake"]);
    let no_such = right.replace("tenant = \"default\"", "tenant = \"nobody\"");
    let refused = check(&no_such);
    assert!(refused.status != Some(0) && refused.stderr.contains("tenant nobody"), "{refused:#?}");
}

#[test]
fn a_reload_takes_up_what_is_right_and_keeps_what_was_where_it_is_wrong() {
    let port = free_port();
    let sites = sites(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    let stranger = sites.authority.issue(|_| {});
    let refused = |identity: &Identity| {
        let mut peer = sites.connect(identity);
        peer.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
        matches!(peer.hear(), Some(FromTarget::Trouble(trouble)) if trouble.code == TroubleCode::NotAllowed)
    };
    assert!(refused(&stranger));
    sites.reload(|text| text + "nonsense");
    wait_until("a refused reload", Duration::from_secs(10), || metric(port, "reseal_reload_failures_total") == 1.0);
    drop(begun(&sites, &sites.client, "vm"));
    sites.reload(|text| {
        let client = format!(
            "[[client]]\nname = \"new\"\ncertificate_sha256 = \"{}\"\ntenant = \"default\"\nrole = \"append\"\nvms = [\"*\"]\n",
            stranger.sha256
        );
        text.replace("nonsense", "").replace("[metrics]", &format!("{client}[metrics]"))
    });
    wait_until("a reload", Duration::from_secs(10), || metric(port, "reseal_reloads_total") == 1.0);
    drop(begun(&sites, &stranger, "other"));
    assert_eq!(metric(port, "reseal_reload_failures_total"), 1.0);
}

#[test]
fn a_client_that_is_removed_while_it_sends_is_ended_at_once() {
    let mut sites = sites("");
    let other = sites.authority.issue(|_| {});
    let entry = |identity: &Identity, vms: &str| {
        let sha256 = &identity.sha256;
        format!(
            "[[client]]\nname = \"x\"\ncertificate_sha256 = \"{sha256}\"\ntenant = \"default\"\nrole = \"append\"\nvms = {vms}\n"
        )
    };
    // One is removed, of one the VM, and one stays.
    let few = sites.authority.issue(|_| {});
    sites.reload(|text| text + &entry(&other, "[\"*\"]") + &entry(&few, "[\"a\", \"b\"]"));
    wait_until("the reload", Duration::from_secs(10), || {
        let mut peer = sites.connect(&few);
        peer.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
        matches!(peer.hear(), Some(FromTarget::Welcome(_)))
    });
    let (mut stays, mut gone, mut narrowed) =
        (begun(&sites, &sites.client, "stays"), begun(&sites, &other, "gone"), begun(&sites, &few, "b"));
    let proxy = Proxy::new(sites.port);
    let disk = make_disk(&sites.source, "disk", 64 << 20, 1);
    let enrolment = enrolment_of(&sites, 7, &other, proxy.port);
    let words = ["--repo", &enrolment, "backup", "sends", disk.to_str().unwrap(), "--limit-rate", "8M"];
    let sending = sites.source.start(words);
    wait_until("something sent", Duration::from_secs(20), || proxy.sent() > 8 << 20);
    sites.reload(|text| text.replace(&entry(&other, "[\"*\"]"), "").replace("[\"a\", \"b\"]", "[\"a\"]"));
    for peer in [&mut gone, &mut narrowed] {
        let (code, took) = trouble(peer);
        assert_eq!(code, TroubleCode::NotAllowed);
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    let began = Instant::now();
    sending.wait().fails(1, &["may not do this any more"]);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(sites.target.reseal(["list", "--json"]).ok().json_lines().len(), 0);
    // The one that stays is served.
    stays.say(&FromSource::Close);
    assert_eq!(trouble(&mut stays).0, TroubleCode::Protocol);
    sites.stop().ok();
}

#[test]
fn an_erased_tenant_goes_and_another_is_served_on() {
    let authority = Authority::new();
    let (acme, globex) = (authority.issue(|_| {}), authority.issue(|_| {}));
    let clients = [(acme.clone(), "acme", "append", "[\"*\"]"), (globex.clone(), "globex", "append", "[\"*\"]")];
    let sites = Sites::configured(authority, &clients, "", &|target| {
        for name in ["acme", "globex"] {
            target.reseal(["tenant", "add", name, "--no-recovery"]).ok();
        }
    });
    let mut erased = begun(&sites, &acme, "vm");
    let disk = make_disk(&sites.source, "disk", 96 << 20, 2);
    let enrolment = enrolment_of(&sites, 1, &globex, sites.port);
    let words = ["--repo", &enrolment, "backup", "vm", disk.to_str().unwrap(), "--limit-rate", "8M"];
    let sending = sites.source.start(words);
    wait_until("a session of the other", Duration::from_secs(20), || !sites.target.unfinished().is_empty());
    // It waits for the server's leases, which go with the session and the keys.
    let began = Instant::now();
    let erased_json = sites.target.reseal(["tenant", "erase", "acme", "--yes", "acme", "--json"]).ok().json();
    assert_eq!(erased_json["still_have_keys"], serde_json::json!([]));
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    assert_eq!(trouble(&mut erased).0, TroubleCode::Failed);
    let mut again = sites.connect(&acme);
    greeted(&mut again);
    again.say(&FromSource::Begin(Begin { vm: "vm".into(), resume: None }));
    assert!(matches!(again.hear(), Some(FromTarget::Trouble(_))));
    sending.wait().ok();
    let out = sites.target.path("restored");
    let words = ["restore", "--disk", "disk-0", "vm@1", out.to_str().unwrap()];
    sites.target.reseal_of("globex", words).ok();
    assert!(fs::read(&out).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn a_tenant_that_nobody_needs_is_locked_and_opened_again() {
    let port = free_port();
    let more = format!("[limits]\nidle_seconds = 1\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
    let sites = sites(&more);
    let unlocked = || metric(port, "reseal_tenant_unlocked{tenant=\"default\"}") == 1.0;
    wait_until("that the tenant is locked", Duration::from_secs(15), || !unlocked());
    assert_eq!(get(port, "/readyz").0, 200);
    let disk = make_disk(&sites.source, "disk", 1 << 20, 3);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    send(&sites, &enrolment, "vm", &disk).ok();
    assert!(unlocked());
    wait_until("that it is locked again", Duration::from_secs(15), || !unlocked());
    // Its restore points grow old all the same.
    assert!(metric(port, "reseal_restore_point_age_seconds{tenant=\"default\",vm=\"vm\"}") < 60.0);
    let held = fs::read_dir(sites.target.tenant_folder().join("leases")).map_or(0, Iterator::count);
    assert_eq!(held, 0, "leases are left");
}

#[test]
fn metrics_and_health_tell_what_happened() {
    let port = free_port();
    let sites = sites(&format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n"));
    assert_eq!((get(port, "/healthz"), get(port, "/readyz")), ((200, "ok\n".into()), (200, "ok\n".into())));
    let disk = make_disk(&sites.source, "disk", 4 << 20, 4);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    send(&sites, &enrolment, "vm", &disk).ok();
    send(&sites, &enrolment, "vm", &disk).ok();
    let session = begun(&sites, &sites.client, "other");
    assert_eq!(metric(port, "reseal_connections"), 1.0);
    drop(session);
    wait_until("the end of the session", Duration::from_secs(10), || metric(port, "reseal_connections") == 0.0);
    let of = |name: &str| metric(port, &format!("{name}{{tenant=\"default\"}}"));
    assert_eq!(of("reseal_commits_total"), 2.0);
    // How its restore points stand, as `reseal status` says it.
    let stands = |name: &str| metric(port, &format!("{name}{{tenant=\"default\",vm=\"vm\"}}"));
    assert_eq!((stands("reseal_restore_point_number"), stands("reseal_last_result")), (2.0, 0.0));
    assert!(stands("reseal_restore_point_age_seconds") < 60.0);
    assert_eq!((of("reseal_clusters_needed_total"), of("reseal_clusters_found_total")), (64.0, 64.0));
    let (received, stored) = (of("reseal_received_bytes_total"), of("reseal_stored_bytes_total"));
    assert!(received > f64::from(4 << 20) && received < f64::from(5 << 20), "{received}");
    assert!(stored > f64::from(4 << 20) && stored < f64::from(5 << 20), "{stored}");
    let sessions = |result: &str| {
        metric(port, &format!("reseal_sessions_total{{tenant=\"default\",role=\"append\",result=\"{result}\"}}"))
    };
    assert_eq!((sessions("done"), sessions("failed")), (2.0, 1.0));
    assert_eq!(metric(port, "reseal_failures_total{code=\"lost\"}"), 1.0);
    assert_eq!(metric(port, "reseal_session_seconds_count{tenant=\"default\",role=\"append\"}"), 3.0);
    assert!(metric(port, "reseal_certificate_not_after_timestamp_seconds") > 1.7e9);
    assert_eq!(of("reseal_kms_reachable"), 1.0);
    // Nothing that a peer says is a label.
    drop(begun(&sites, &sites.client, "strange-name"));
    assert!(!get(port, "/metrics").1.contains("strange-name"));
    assert!(get(port, "/metrics").1.ends_with("# EOF\n"));
    assert_eq!(get(port, "/else").0, 404);
    // Without its vault it is not well, and alive all the same.
    let away = sites.target.path("away");
    fs::rename(&sites.target.vault, &away).unwrap();
    let (status, why) = get(port, "/healthz");
    assert!(status == 503 && why.contains("reseal.json is missing"), "{status} {why}");
    fs::rename(&away, &sites.target.vault).unwrap();
    assert_eq!(get(port, "/healthz").0, 200);
}

#[test]
fn readiness_names_the_tenant_that_can_not_be_opened() {
    let authority = Authority::new();
    let clients = [(authority.issue(|_| {}), "acme", "append", "[\"*\"]")];
    let port = free_port();
    let more = format!("[limits]\nidle_seconds = 1\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
    let sites = Sites::configured(authority, &clients, &more, &|target| {
        target.reseal(["tenant", "add", "acme", "--no-recovery"]).ok();
    });
    wait_until("that the tenant is locked", Duration::from_secs(15), || {
        metric(port, "reseal_tenant_unlocked{tenant=\"acme\"}") == 0.0
    });
    let hidden = sites.target.path("hidden");
    fs::rename(&sites.target.keyring, &hidden).unwrap();
    let mut peer = sites.connect(&sites.client);
    greeted(&mut peer);
    peer.say(&FromSource::Begin(Begin { vm: "vm".into(), resume: None }));
    trouble(&mut peer);
    let (status, why) = get(port, "/readyz");
    assert!(status == 503 && why.contains("tenant acme"), "{status} {why}");
    fs::rename(&hidden, &sites.target.keyring).unwrap();
    wait_until("readiness", Duration::from_secs(20), || get(port, "/readyz").0 == 200);
}

#[test]
fn the_audit_log_tells_of_backups_and_refusals_and_survives_rotation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let sites = sites(&format!("[audit]\nfile = {path:?}\n"));
    let disk = make_disk(&sites.source, "disk", 2 << 20, 5);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    let made = send(&sites, &enrolment, "web01", &disk).ok().json();
    let lines = audit(&path);
    let events: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["started", "connected", "began", "committed"]);
    let committed = &lines[3];
    for (field, value) in [("client", "client-0"), ("tenant", "default"), ("vm", "web01")] {
        assert_eq!(committed[field], value, "{committed}");
    }
    assert_eq!((&committed["number"], &committed["point"]), (&made["number"], &made["point_id"]));
    assert_eq!(committed["certificate_sha256"], sites.client.sha256);
    assert!(committed["received_bytes"].as_u64().unwrap() > 2 << 20);
    assert!(committed["peer"].as_str().unwrap().starts_with("127.0.0.1:") && committed["time"].is_string());
    // It is rotated, and refusals go to the new file.
    let old = folder.path().join("audit.1");
    fs::rename(&path, &old).unwrap();
    signal(sites.server_id(), libc::SIGHUP);
    wait_until("the new file", Duration::from_secs(10), || {
        path.exists() && audit(&path).iter().any(|line| line["event"] == "reloaded")
    });
    let stranger = sites.authority.issue(|_| {});
    let mut peer = sites.connect(&stranger);
    assert_eq!(trouble(&mut peer).0, TroubleCode::NotAllowed);
    let refused = |line: &Value| line["event"] == "refused" && line["why"].as_str().unwrap().contains(&stranger.sha256);
    assert!(audit(&path).iter().any(refused), "{:#?}", audit(&path));
    assert_eq!(audit(&old).len(), 4);
}

#[test]
fn where_nothing_can_be_noted_nothing_is_done() {
    // A device on which every write fails.
    let sites = sites("[audit]\nfile = \"/dev/full\"\n");
    let mut peer = sites.connect(&sites.client);
    assert_eq!(trouble(&mut peer).0, TroubleCode::Unavailable);
    assert_eq!(sites.target.reseal(["list", "--json"]).ok().json_lines().len(), 0);
}

#[test]
fn the_log_is_json_where_that_is_wanted_and_says_whom_a_line_is_about() {
    let mut sites = sites("[log]\nformat = \"json\"\nlevel = \"debug\"\n");
    let disk = make_disk(&sites.source, "disk", 1 << 20, 6);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    send(&sites, &enrolment, "web01", &disk).ok();
    // A line that would break the log, were it not taken for what it is.
    let mut peer = begun(&sites, &sites.client, "vm");
    peer.say(&FromSource::Close);
    trouble(&mut peer);
    let run = sites.stop().ok();
    let lines: Vec<Value> = run.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let made = lines.iter().find(|line| line["message"].as_str().unwrap().starts_with("made web01@1")).unwrap();
    let span = &made["span"];
    assert_eq!(
        (&span["client"], &span["tenant"], &span["vm"]),
        (&"client-0".into(), &"default".into(), &"web01".into())
    );
    assert!(span["connection"].is_u64() && span["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{made}");
    assert!(lines.iter().any(|line| line["level"] == "WARN" && line["span"]["vm"] == "vm"), "{run:#?}");
    assert!(!run.stderr.contains("PRIVATE KEY"));
}

/// A connection from another address of this machine.
fn connect_from(address: Ipv4Addr, port: u16) -> OwnedFd {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrV4::new(address, 0)).unwrap();
    rustix::net::connect(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).unwrap();
    socket
}

#[test]
fn handshakes_that_never_end_keep_nobody_out() {
    let port = free_port();
    let more = format!("[limits]\nhandshakes = 4\nhandshake_seconds = 300\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
    let sites = sites(&more);
    let silent: Vec<_> = (0..40).map(|_| connect_from(Ipv4Addr::new(127, 0, 0, 2), sites.port)).collect();
    let began = Instant::now();
    drop(begun(&sites, &sites.client, "vm"));
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    wait_until("that the oldest go", Duration::from_secs(10), || {
        metric(port, "reseal_connections_refused_total{reason=\"slow\"}") >= 4.0
    });
    drop(silent);
}

#[test]
fn sessions_are_as_many_and_as_long_as_is_allowed() {
    let port = free_port();
    let more = format!(
        "[limits]\nconnections = 3\nconnections_per_client = 2\nsession_seconds = 3\nclient_rate = \"20M\"\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n"
    );
    let sites = sites(&more);
    let began = Instant::now();
    let (mut one, _two) = (begun(&sites, &sites.client, "a"), begun(&sites, &sites.client, "b"));
    let mut three = sites.connect(&sites.client);
    three.say(&FromSource::Hello(Hello { version: VERSION, software: "x".into() }));
    assert_eq!(trouble(&mut three).0, TroubleCode::Unavailable);
    assert_eq!(metric(port, "reseal_connections_refused_total{reason=\"full\"}"), 1.0);
    assert_eq!(trouble(&mut one).0, TroubleCode::Unavailable);
    let took = began.elapsed();
    assert!(took > Duration::from_millis(2500) && took < Duration::from_secs(6), "{took:?}");
    wait_until("room", Duration::from_secs(10), || metric(port, "reseal_connections") == 0.0);
    // A source that is ended so goes on where it was.
    let disk = make_disk(&sites.source, "disk", 80 << 20, 7);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    // 80 MiB at 20 MiB/s are four seconds; what has landed is not sent again.
    let run = send(&sites, &enrolment, "long", &disk).ok();
    assert!(run.stderr.contains("as long as one may"), "{run:#?}");
}

#[test]
fn a_rate_is_held_to_by_clients_that_have_none() {
    let port = free_port();
    let more = format!("[limits]\nclient_rate = \"8M\"\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
    let sites = sites(&more);
    let disk = make_disk(&sites.source, "disk", 32 << 20, 8);
    let enrolment = enrolment_of(&sites, 0, &sites.client, sites.port);
    let began = Instant::now();
    send(&sites, &enrolment, "vm", &disk).ok();
    let took = began.elapsed();
    assert!(took > Duration::from_millis(3500) && took < Duration::from_secs(20), "32 MiB at 8 MiB/s took {took:?}");
    assert!(metric(port, "reseal_rate_limit_waits_total{tenant=\"default\"}") > 10.0);
    // Another limit is in force at once.
    sites.reload(|text| text.replace("\"8M\"", "\"900M\""));
    wait_until("the reload", Duration::from_secs(10), || metric(port, "reseal_reloads_total") == 1.0);
    let disk = make_disk(&sites.source, "disk2", 32 << 20, 9);
    let began = Instant::now();
    send(&sites, &enrolment, "vm2", &disk).ok();
    assert!(began.elapsed() < Duration::from_millis(3500), "{:?}", began.elapsed());
}

#[test]
fn systemd_is_told_when_the_server_is_ready_reloads_and_stops() {
    let mut sites = sites("");
    sites.stop().ok();
    let path = sites.target.path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let config = sites.target.path("serve.toml");
    let mut command = sites.target.command("reseal", ["serve", "--config", config.to_str().unwrap()]);
    let server = start(command.env("NOTIFY_SOCKET", &path));
    let hear = || {
        let mut text = [0; 512];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    assert_eq!(hear(), "READY=1\n");
    signal(server.id(), libc::SIGHUP);
    let reloading = hear();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(hear(), "READY=1\n");
    signal(server.id(), libc::SIGTERM);
    assert_eq!(hear(), "STOPPING=1\n");
    server.wait().ok();
}

#[test]
fn the_unit_is_right_and_hardened() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../writer/systemd/reseal-serve.service");
    // It is looked at as it would be installed, with a program of that name.
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(&unit).unwrap();
    let program = reseal_tests::process::program("reseal");
    assert!(text.contains("ExecStart=/usr/bin/reseal serve"), "{text}");
    let installed = folder.path().join("reseal-serve.service");
    fs::write(&installed, text.replace("/usr/bin/reseal", program.to_str().unwrap())).unwrap();
    let analyze = |words: &[&str]| {
        let run = run(Command::new("systemd-analyze").args(words).arg(&installed));
        assert!(run.status == Some(0), "{run:#?}");
        run
    };
    let verified = analyze(&["verify", "--man=no"]);
    assert!(!verified.said().contains("reseal-serve.service:"), "{verified:#?}");
    // Of 100, less is better: 10 is what systemd calls OK, and most services of a system have 90.
    analyze(&["security", "--offline=true", "--threshold=15"]);
}
