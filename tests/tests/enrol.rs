//! Sites that are enrolled by command: who comes in, until when, and what a certificate's renewal survives.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, KeyPair};
use reseal_proto::wire::{Begin, FromSource, FromTarget, Hello, Renew, Renewed, TroubleCode, VERSION};
use reseal_tests::enrolled::{Enrolling, between, field, identity, put};
use reseal_tests::ports::free_port;
use reseal_tests::process::Run;
use reseal_tests::remote::{Authority, Identity, Peer, Proxy, Sites, private};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[track_caller]
fn assert_restores(sites: &Enrolling, tenant: &str, point: &str, disk: &Path) {
    let out = sites.target.path("restored");
    let words = ["restore", "--disk", "disk-0", point, out.to_str().unwrap()];
    sites.target.reseal_of(tenant, words).ok();
    assert!(fs::read(&out).unwrap() == fs::read(disk).unwrap(), "{point} is not what was backed up");
    fs::remove_file(out).unwrap();
}

#[test]
fn three_steps_enrol_a_site_and_make_its_first_restore_point() {
    let mut sites = Enrolling::stopped();
    let disk = sites.disk("disk", 3 * MIB);
    // Before or after the server's first start, it is the same.
    let first = sites.enrol("acme", "first", "append", &[]);
    sites.start();
    sites.backup(&first, "web01", &disk).ok();
    let second = sites.enrol("acme", "second", "append", &["--vm", "web02", "--vm", "web03", "--valid", "10"]);
    sites.backup(&second, "web02", &disk).ok();
    assert_restores(&sites, "acme", "web01@1", &disk);
    assert_restores(&sites, "acme", "web02@1", &disk);
    assert_eq!((sites.points("acme"), sites.points("default")), (2, 0));
    for private in [&first, &second, &sites.target.path("authority/authority.pem"), &sites.registered("acme", "first")]
    {
        assert_eq!(mode(private), 0o600, "{}", private.display());
    }
    let listed = sites.tenant(&["clients", "acme", "--json"]).ok().json_lines();
    let of = |nth: usize, name: &str| listed[nth][name].clone();
    assert_eq!((of(0, "client"), of(0, "vms"), of(0, "role")), ("first".into(), ["*"].into(), "append".into()));
    assert_eq!((of(1, "client"), of(1, "vms")), ("second".into(), ["web02", "web03"].into()));
    assert_eq!(of(0, "certificates")[0]["sha256"], identity(&first).sha256);
    assert!(sites.tenant(&["clients", "default", "--json"]).ok().stdout.is_empty());
    assert!(sites.tenant(&["clients"]).ok().stdout.contains("any VM"));
    // The authority's key, and that of a client, are nowhere else.
    let secrets = [first.clone(), sites.target.path("authority/authority.pem")];
    for path in &secrets {
        let key = fs::read_to_string(path).unwrap();
        let key = key.split("PRIVATE KEY-----\n").nth(1).unwrap().lines().next().unwrap().to_owned();
        let mut folders = reseal_tests::site::files_below(&sites.target.path("."));
        folders.extend(reseal_tests::site::files_below(&sites.source.path(".")));
        let found =
            folders.iter().filter(|path| fs::read(path).unwrap().windows(key.len()).any(|at| at == key.as_bytes()));
        assert_eq!(found.count(), 1, "{}", path.display());
    }
}

#[test]
fn what_can_not_be_enrolled_is_refused_and_leaves_nothing() {
    let sites = Enrolling::stopped();
    let file = sites.enrol("acme", "acme", "append", &[]);
    let (before, registered) = (fs::read(&file).unwrap(), fs::read(sites.registered("acme", "acme")).unwrap());
    let enrol = |tenant: &str, output: &str, more: &[&str]| {
        let words = ["enroll", tenant, "--role", "append", "-o", output];
        sites.tenant(&words.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let new = sites.source.path("new.reseal");
    let new = new.to_str().unwrap();
    enrol("acme", file.to_str().unwrap(), &[]).fails(2, &["exists already", "-o"]);
    enrol("acme", new, &["--name", "acme"]).fails(2, &["a client acme already", "--name"]);
    enrol("nobody", new, &[]).fails(1, &["nobody"]);
    enrol("acme", new, &["--name", "../x"]).fails(2, &["contains '/'"]);
    enrol("acme", new, &["--name", "a\nb"]).fails(2, &["control character"]);
    enrol("acme", new, &["--name", ".."]).fails(2, &["means a folder"]);
    enrol("../acme", new, &[]).fails(2, &["contains '/'"]);
    enrol("acme", new, &["--vm", "a\u{1b}[2J"]).fails(2, &["control character"]);
    enrol("acme", new, &["--valid", "0"]).fails(2, &["valid"]);
    enrol("acme", new, &["--valid", "3651"]).fails(2, &["valid"]);
    enrol("acme", new, &["--address", "backup"]).fails(2, &["HOST:PORT"]);
    enrol("acme", sites.source.path("no/such/folder.reseal").to_str().unwrap(), &[])
        .fails(2, &["folder.reseal", "can't be made"]);
    sites.tenant(&["revoke", "acme", "nobody"]).fails(2, &["no client nobody", "tenant clients acme"]);
    sites.tenant(&["revoke", "acme", "../acme"]).fails(2, &["contains '/'"]);
    sites.target.reseal(["tenant", "erase", "acme", "--yes", "acme"]).ok();
    enrol("acme", new, &[]).fails(2, &["erased"]);
    assert!(!Path::new(new).exists());
    assert_eq!((fs::read(&file).unwrap(), fs::read(sites.registered("acme", "acme")).unwrap()), (before, registered));
    let clients = sites.registered("acme", "acme").parent().unwrap().parent().unwrap().to_owned();
    let left: Vec<_> = reseal_tests::site::files_below(&clients);
    assert_eq!(left.len(), 2, "the client and the lock: {left:?}");
    // A second file of the same name, elsewhere, is another client.
    let other = sites.source.path("elsewhere/default.reseal");
    fs::create_dir(other.parent().unwrap()).unwrap();
    for folder in ["elsewhere", "."] {
        let file = sites.source.path(folder).join("default.reseal");
        enrol("default", file.to_str().unwrap(), &[]).ok();
    }
    assert!(sites.registered("default", "default").exists() && sites.registered("default", "default-2").exists());
}

#[test]
fn an_append_certificate_can_do_nothing_but_append_to_its_vms() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &["--vm", "web01"]);
    sites.backup(&file, "web01", &disk).ok();
    sites.backup(&file, "web02", &disk).fails(1, &["may not add restore points of web02"]);
    let repo = file.to_str().unwrap();
    let out = sites.source.path("out");
    for words in [
        vec!["list"],
        vec!["show", "web01@1"],
        vec!["verify"],
        vec!["tenant", "list"],
        vec!["tenant", "show", "acme"],
        vec!["restore", "web01@1", out.to_str().unwrap()],
    ] {
        let run = sites.source.reseal(["--repo", repo].iter().chain(&words));
        assert!(run.status != Some(0) && run.stdout.is_empty(), "{run:#?}");
    }
    assert!(!out.exists());
    // That the file names another tenant, or more, changes nothing: the certificate counts.
    let text = fs::read_to_string(&file).unwrap();
    private(file.clone(), &text.replace("tenant = \"acme\"", "tenant = \"default\"").replace("\"web01\"", "\"*\""));
    sites.backup(&file, "web02", &disk).fails(1, &["may not add restore points of web02"]);
    sites.backup(&file, "web01", &disk).ok();
    assert_eq!((sites.points("acme"), sites.points("default")), (2, 0));
    for role in ["restore", "admin"] {
        let file = sites.enrol("acme", role, role, &[]);
        sites.backup(&file, "web01", &disk).fails(1, &["may not add restore points"]);
    }
    assert_eq!(sites.points("acme"), 2);
}

#[test]
fn only_what_the_authority_issued_and_the_registry_has_comes_in() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &[]);
    let good = fs::read_to_string(&file).unwrap();
    let refused = "does not accept this site's certificate";
    // Registered, as if somebody could write there, but not good.
    sites.aged("acme", "site", &file, -20..-1);
    sites.backup(&file, "web01", &disk).fails(1, &[refused, "enrolment file"]);
    sites.aged("acme", "site", &file, 1..20);
    sites.backup(&file, "web01", &disk).fails(1, &[refused]);
    let own = sites.aged("acme", "site", &file, -1..20);
    sites.backup(&file, "web01", &disk).ok();
    for forged in [between(&Authority::new(), -1..20), self_signed()] {
        let record = fs::read_to_string(sites.registered("acme", "site")).unwrap();
        private(sites.registered("acme", "site"), &record.replace(&own.sha256, &forged.sha256));
        put(&file, &forged);
        sites.backup(&file, "web01", &disk).fails(1, &[refused]);
        private(sites.registered("acme", "site"), &record);
    }
    // Whoever has the authority's key and nothing else.
    put(&file, &between(&sites.authority(), -1..20));
    sites.backup(&file, "web01", &disk).fails(1, &["does not know the certificate"]);
    // None at all.
    let authority = field(&file, "server_ca");
    let mut nobody = Peer::connect(sites.port, &authority, None);
    nobody.say(&FromSource::Hello(Hello { version: VERSION, software: "nobody".into() }));
    assert_eq!(nobody.hear(), None);
    // The server's own certificate is nobody's.
    private(file.clone(), &good);
    assert_eq!(sites.points("acme"), 1);
    let log = sites.stop();
    assert_eq!(log.matches("refused: invalid peer certificate").count(), 4, "{log}");
}

fn self_signed() -> Identity {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
    use sha2::Digest;
    let sha256 = hex::encode(sha2::Sha256::digest(certificate.der()));
    Identity { certificate: certificate.pem(), key: key.serialize_pem(), sha256 }
}

#[test]
fn a_source_sends_nothing_to_another_server_than_its_own() {
    let (sites, other) = (Enrolling::new(), Enrolling::new());
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &[]);
    let text = fs::read_to_string(&file).unwrap();
    let said = ["can't be trusted", "Compare the enrolment file", "site.reseal"];
    // A server that another authority vouches for, in the place of the right one, and one with another name.
    private(file.clone(), &text.replace(&format!(":{}\"", sites.port), &format!(":{}\"", other.port)));
    sites.backup(&file, "web01", &disk).fails(2, &said);
    private(file.clone(), &text.replace("server_name = \"localhost\"", "server_name = \"backup.example.com\""));
    sites.backup(&file, "web01", &disk).fails(2, &said);
    private(file.clone(), &text);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    sites.backup(&file, "web01", &disk).fails(2, &["chmod 600"]);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    sites.backup(&file, "web01", &disk).ok();
    assert_eq!((sites.points("acme"), other.points("acme")), (1, 0));
}

#[test]
fn a_revoked_client_is_sent_away_while_it_sends_and_comes_in_no_more() {
    let mut sites = Enrolling::new();
    let (large, small) = (sites.disk("large", 60 * MIB), sites.disk("small", MIB));
    let (bad, good) = (sites.enrol("acme", "bad", "append", &[]), sites.enrol("acme", "good", "append", &[]));
    let proxy = Proxy::new(sites.port);
    let by_proxy = |file: &Path| {
        let text = fs::read_to_string(file).unwrap();
        private(file.to_owned(), &text.replace(&format!(":{}\"", sites.port), &format!(":{}\"", proxy.port)));
    };
    by_proxy(&bad);
    by_proxy(&good);
    let slowly = |file: &Path, vm: &str| {
        let limit = ["--limit-rate".to_owned(), "10M".to_owned()];
        sites.source.start(Enrolling::words(file, vm, &large).into_iter().chain(limit))
    };
    let (bad_one, good_one) = (slowly(&bad, "bad"), slowly(&good, "good"));
    // One that says nothing at all.
    let mut idle = Peer::connect(sites.port, &field(&bad, "server_ca"), Some(&identity(&bad)));
    idle.say(&FromSource::Hello(Hello { version: VERSION, software: "idle".into() }));
    idle.say(&FromSource::Begin(Begin { vm: "idle".into(), resume: None }));
    assert!(matches!((idle.hear(), idle.hear()), (Some(FromTarget::Welcome(_)), Some(FromTarget::Begun(_)))));
    while proxy.sent() < 10 << 20 {
        thread::sleep(Duration::from_millis(10));
    }
    sites.tenant(&["revoke", "acme", "bad"]).ok();
    let began = Instant::now();
    let Some(FromTarget::Trouble(trouble)) = idle.hear() else { panic!("no trouble") };
    assert_eq!(trouble.code, TroubleCode::NotAllowed);
    let ended = bad_one.wait().fails(1, &["was revoked at this site"]);
    assert!(began.elapsed() < Duration::from_millis(2500), "{:?}: {ended:?}", began.elapsed());
    sites.backup(&bad, "bad", &small).fails(1, &["the certificate was revoked"]);
    good_one.wait().ok();
    assert_eq!(sites.points("acme"), 1);
    assert_restores(&sites, "acme", "good@1", &large);
    // Its name is not given again, and it stays on the list.
    sites
        .tenant(&["enroll", "acme", "--role", "append", "--name", "bad", "-o", "again.reseal"])
        .fails(2, &["had a client"]);
    let listed = sites.tenant(&["clients", "--json"]).ok().json_lines();
    assert!(listed[0]["revoked"].is_string() && listed[1]["revoked"].is_null(), "{listed:?}");
    assert!(sites.tenant(&["revoke", "acme", "bad", "--json"]).ok().json()["revoked_before"].as_bool().unwrap());
    // Also after a restart; and a file that is taken away is as good.
    sites.stop();
    sites.start();
    sites.backup(&bad, "bad", &small).fails(1, &["the certificate was revoked"]);
    fs::remove_file(sites.registered("acme", "good")).unwrap();
    wait_for_a_look();
    sites.backup(&good, "good", &small).fails(1, &["does not know the certificate"]);
}

/// The certificates of a client, as the registry has them: whether each was superseded.
fn superseded(sites: &Enrolling, name: &str) -> Vec<bool> {
    let record = sites.record("acme", name);
    let certificates: &Vec<Value> = record["certificates"].as_array().unwrap();
    certificates.iter().map(|certificate| certificate["superseded"].is_string()).collect()
}

/// A copy of an enrolment file, as it is now.
fn copy(file: &Path, name: &str) -> std::path::PathBuf {
    private(file.with_file_name(name), &fs::read_to_string(file).unwrap())
}

/// What is left of a file without its certificate, key and times.
fn rest(file: &Path) -> String {
    let mut text = fs::read_to_string(file).unwrap();
    for name in ["certificate", "key"] {
        text = text.replace(&field(file, name), "");
    }
    text.lines().filter(|line| !line.starts_with("issued = ") && !line.starts_with("expires = ")).collect()
}

#[test]
fn a_certificate_renews_itself_and_the_old_one_goes_when_the_new_one_is_used() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &["--valid", "90"]);
    // It is early: nothing changes.
    let text = fs::read(&file).unwrap();
    sites.backup(&file, "web01", &disk).ok();
    assert_eq!(fs::read(&file).unwrap(), text);
    sites.aged("acme", "site", &file, -59..31);
    sites.backup(&file, "web01", &disk).ok();
    assert_eq!(superseded(&sites, "site"), [false]);

    let old = sites.aged("acme", "site", &file, -61..29);
    let (before, old_file) = (rest(&file), copy(&file, "old.reseal"));
    let run = sites.backup(&file, "web01", &disk).ok();
    assert_eq!(run.stderr, "");
    let new = identity(&file);
    assert!(new.sha256 != old.sha256 && new.key != old.key);
    assert_eq!((rest(&file), mode(&file)), (before, 0o600));
    assert!(!file.with_file_name("site.reseal.new").exists());
    assert_eq!(superseded(&sites, "site"), [false, false]);
    let record = sites.record("acme", "site");
    assert_eq!((&record["certificates"][1]["sha256"], &record["days"]), (&new.sha256.clone().into(), &90.into()));
    // Until the new one was used, the old one is taken: its answer may have been lost.
    let unused = copy(&old_file, "unused.reseal");
    sites.backup(&unused, "web01", &disk).ok();
    assert_eq!(superseded(&sites, "site"), [false, false, false]);
    sites.backup(&file, "web01", &disk).ok();
    assert_eq!(superseded(&sites, "site"), [true, false, false]);
    sites.backup(&old_file, "web01", &disk).fails(1, &["an older copy"]);
    // The one that came last wins, though it was asked for with the old one.
    sites.backup(&unused, "web01", &disk).ok();
    assert_eq!(superseded(&sites, "site"), [true, true, false]);
    sites.backup(&file, "web01", &disk).fails(1, &["an older copy"]);
    // All the same after a restart.
    let log = sites.stop();
    assert_eq!(log.matches("site has a new certificate").count(), 2, "{log}");
    sites.start();
    sites.backup(&old_file, "web01", &disk).fails(1, &["an older copy"]);
    sites.backup(&unused, "web01", &disk).ok();
}

/// Somebody who was welcomed.
fn welcomed(sites: &Enrolling, file: &Path) -> Peer {
    let mut peer = Peer::connect(sites.port, &field(file, "server_ca"), Some(&identity(file)));
    peer.say(&FromSource::Hello(Hello { version: VERSION, software: "by hand".into() }));
    assert!(matches!(peer.hear(), Some(FromTarget::Welcome(_))));
    peer
}

fn request() -> FromSource {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    FromSource::Renew(Renew { request })
}

#[test]
fn any_role_renews_and_only_in_time_and_only_with_a_signed_request() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "reader", "restore", &["--valid", "9"]);
    let mut early = welcomed(&sites, &file);
    early.say(&request());
    assert!(matches!(early.hear(), Some(FromTarget::Renewed(Renewed::Refused(why))) if why.contains("early")));
    sites.aged("acme", "reader", &file, -7..2);
    let mut peer = welcomed(&sites, &file);
    let mut forged = request();
    if let FromSource::Renew(renew) = &mut forged {
        let last = renew.request.len() - 1;
        renew.request[last] ^= 1;
    }
    peer.say(&forged);
    assert!(matches!(peer.hear(), Some(FromTarget::Renewed(Renewed::Refused(why))) if why.contains("signed")));
    // Only one is asked for on a connection, before anything is begun.
    peer.say(&request());
    let Some(FromTarget::Trouble(trouble)) = peer.hear() else { panic!("no trouble") };
    assert_eq!(trouble.code, TroubleCode::Protocol);
    assert_eq!(superseded(&sites, "reader"), [false]);
    let mut peer = welcomed(&sites, &file);
    peer.say(&request());
    let Some(FromTarget::Renewed(Renewed::Issued(certificate))) = peer.hear() else { panic!("no certificate") };
    let record = sites.record("acme", "reader");
    use sha2::Digest;
    assert_eq!(record["certificates"][1]["sha256"], hex::encode(sha2::Sha256::digest(&certificate)));
    assert_eq!(record["role"], "restore");
    // However often it is asked for, a client has few.
    for _ in 0..30 {
        let mut peer = welcomed(&sites, &file);
        peer.say(&request());
        assert!(matches!(peer.hear(), Some(FromTarget::Renewed(Renewed::Issued(_)))));
    }
    assert_eq!(superseded(&sites, "reader").len(), 16);
    drop(welcomed(&sites, &file));
    // A request in the midst of a backup is none.
    let writer = sites.enrol("acme", "writer", "append", &[]);
    let mut begun = welcomed(&sites, &writer);
    begun.say(&FromSource::Begin(Begin { vm: "vm".into(), resume: None }));
    assert!(matches!(begun.hear(), Some(FromTarget::Begun(_))));
    begun.say(&request());
    assert!(matches!(begun.hear(), Some(FromTarget::Trouble(trouble)) if trouble.code == TroubleCode::Protocol));
    drop(begun);
    sites.backup(&writer, "web01", &disk).ok();
    let log = sites.stop();
    assert!(log.contains("reader gets no new certificate"), "{log}");
}

#[test]
fn who_is_killed_or_cut_off_around_a_renewal_has_a_file_that_works() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &["--valid", "90"]);
    let key_of = |file: &Path| identity(file).sha256;
    // The line is cut after each so many bytes of the source: in the handshake, in the request, or before its answer.
    let mut renewed = 0;
    for bytes in (600..3200).step_by(200) {
        let old = sites.aged("acme", "site", &file, -61..29);
        let proxy = Proxy::new(sites.port);
        let text = fs::read_to_string(&file).unwrap();
        let there = (format!(":{}\"", sites.port), format!(":{}\"", proxy.port));
        private(file.clone(), &text.replace(&there.0, &there.1));
        proxy.cut_after(bytes);
        // That the connection was lost may end it, but not the file.
        sites.backup(&file, "web01", &disk).expect(&[0, 2, 4]);
        let text = fs::read_to_string(&file).unwrap();
        private(file.clone(), &text.replace(&there.1, &there.0));
        renewed += u32::from(key_of(&file) != old.sha256);
        sites.backup(&file, "web01", &disk).ok();
        sites.backup(&file, "web01", &disk).ok();
    }
    assert!(renewed > 0, "none was renewed on the connection that was cut, or on the one after");
    // The source dies.
    for delay in [20, 30, 40, 45, 50, 55, 60, 70, 80] {
        sites.aged("acme", "site", &file, -61..29);
        let source = sites.source.start(Enrolling::words(&file, "web01", &disk));
        thread::sleep(Duration::from_millis(delay));
        source.kill();
        sites.backup(&file, "web01", &disk).ok();
        assert_eq!(mode(&file), 0o600);
        sites.backup(&file, "web01", &disk).ok();
        assert!(!file.with_file_name("site.reseal.new").exists(), "what one who was killed left behind is removed");
    }
    // The server dies.
    for delay in [20, 30, 40, 50, 60, 80] {
        sites.aged("acme", "site", &file, -61..29);
        let source = sites.source.start(Enrolling::words(&file, "web01", &disk));
        thread::sleep(Duration::from_millis(delay));
        sites.kill();
        sites.start();
        source.wait().expect(&[0, 4]);
        sites.backup(&file, "web01", &disk).ok();
        sites.backup(&file, "web01", &disk).ok();
    }
    let faults = sites.tenant(&["clients"]).ok();
    assert_eq!(faults.stderr, "");
}

#[test]
fn several_processes_of_a_source_renew_at_once_and_all_go_on() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", 4 * MIB);
    let file = sites.enrol("acme", "site", "append", &["--valid", "90"]);
    for round in 0..4 {
        let old = sites.aged("acme", "site", &file, -61..29);
        let started: Vec<_> =
            (0..4).map(|nth| sites.source.start(Enrolling::words(&file, &format!("vm{nth}"), &disk))).collect();
        started.into_iter().for_each(|source| drop(source.wait().ok()));
        assert!(identity(&file).sha256 != old.sha256);
        assert_eq!(superseded(&sites, "site").len(), 2, "one renewed it, and the others saw that");
        sites.backup(&file, "vm0", &disk).ok();
        assert_eq!(superseded(&sites, "site"), [true, false], "round {round}");
    }
    assert_eq!(sites.points("acme"), 20);
}

#[test]
fn what_can_not_be_renewed_is_said_and_the_backup_is_made() {
    let sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let file = sites.enrol("acme", "site", "append", &["--valid", "90"]);
    sites.aged("acme", "site", &file, -61..29);
    let warned = |run: Run, said: &[&str]| {
        let run = run.ok();
        assert!(said.iter().all(|said| run.stderr.contains(said)), "{run:#?}");
    };
    // Nothing can be written where the new file has to be.
    fs::create_dir(file.with_file_name("site.reseal.new")).unwrap();
    let before = fs::read(&file).unwrap();
    warned(sites.backup(&file, "web01", &disk), &["could not be renewed", "goes on until", "site.reseal.new"]);
    assert_eq!(fs::read(&file).unwrap(), before);
    fs::remove_dir(file.with_file_name("site.reseal.new")).unwrap();
    // The target can't issue it.
    let authority = sites.target.path("authority/authority.pem");
    fs::rename(&authority, sites.target.path("elsewhere.pem")).unwrap();
    fs::create_dir(&authority).unwrap();
    warned(sites.backup(&file, "web01", &disk), &["could not be renewed", "its log says why"]);
    fs::remove_dir(&authority).unwrap();
    fs::rename(sites.target.path("elsewhere.pem"), &authority).unwrap();
    // By way of a symbolic link, the file itself is renewed.
    let link = sites.source.path("link.reseal");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert_eq!(sites.backup(&link, "web01", &disk).ok().stderr, "");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && fs::read(&file).unwrap() != before);
    assert_eq!(sites.points("acme"), 3);
}

/// The server looks at the registry each second.
fn wait_for_a_look() {
    thread::sleep(Duration::from_millis(1600));
}

#[test]
fn hostile_files_of_the_registry_hinder_nobody_else() {
    let mut sites = Enrolling::new();
    let disk = sites.disk("disk", MIB);
    let (good, bad) =
        (sites.enrol("acme", "good", "append", &[]), sites.enrol("acme", "bad", "append", &["--vm", "web01"]));
    sites.backup(&bad, "web01", &disk).ok();
    let path = sites.registered("acme", "bad");
    let text = fs::read_to_string(&path).unwrap();
    let folder = path.parent().unwrap().to_owned();
    for hostile in
        ["", "{}", &text[..text.len() / 2], &text.replace("\"bad\"", "\"../../../etc/x\""), &"[".repeat(200_000)]
    {
        private(path.clone(), hostile);
        wait_for_a_look();
        sites.backup(&bad, "web01", &disk).fails(1, &["does not know the certificate"]);
        sites.backup(&good, "web01", &disk).ok();
    }
    // Another's rights are not had by taking his name, or that of another tenant.
    private(path.clone(), &text.replace("\"bad\"", "\"good\""));
    wait_for_a_look();
    sites.backup(&bad, "web02", &disk).fails(1, &["does not know the certificate"]);
    fs::create_dir_all(folder.with_file_name("default")).unwrap();
    private(folder.with_file_name("default").join("bad.json"), &text);
    private(folder.join("..evil.json"), "x");
    private(folder.join("a b.json"), &text);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    sites.backup(&bad, "web01", &disk).fails(1, &["does not know the certificate"]);
    let listed = sites.tenant(&["clients", "--json"]).fails(1, &["bad.json", "a b.json"]);
    assert_eq!(listed.json_lines().len(), 1);
    private(path, &text);
    sites.backup(&bad, "web01", &disk).ok();
    let log = sites.stop();
    assert!(log.contains("acme/bad.json") && log.contains("default/bad.json"), "{log}");
}

/// One's own PKI, with a list of what it revoked, and a server that also takes who is enrolled by command.
#[test]
fn an_own_pki_with_a_revocation_list_works_beside_clients_that_are_enrolled() {
    let authority = Authority::new();
    let of = |serial: u8, days: std::ops::Range<i64>| {
        let at = |days: i64| {
            let now = std::time::SystemTime::now() + Duration::from_secs(400 * 86_400);
            let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
            let since = now.as_secs() as i64 + (days - 400) * 86_400;
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since.try_into().unwrap())
        };
        authority.issue(|params| {
            params.serial_number = Some(rcgen::SerialNumber::from_slice(&[serial]));
            (params.not_before, params.not_after) = (at(days.start), at(days.end));
        })
    };
    let (good, revoked, ending) = (of(1, -250..100), of(2, -250..100), of(3, -300..10));
    let list = authority.revoke(&[&[2]]);
    let any = "[\"*\"]";
    let named = [(good, "append", any), (revoked, "append", any), (ending, "append", any)];
    let mut sites = Sites::with(authority, &named);
    let config = sites.target.path("serve.toml");
    let text = fs::read_to_string(&config).unwrap();
    let crl = private(sites.target.path("list.pem"), &list);
    // As `openssl x509 -text` writes it.
    let ca = format!("Subject: \\x \"\"\"\n{}", sites.authority.pem);
    let ca = private(sites.target.path("ca.pem"), &ca);
    sites.stop().ok();
    private(config.clone(), &text.replace("[tls]\n", &format!("[tls]\ncrl = {crl:?}\n")));
    sites.start();
    let disk = sites.source.disk("disk");
    fs::write(&disk, vec![7; 100_000]).unwrap();
    let backup = |sites: &Sites, nth: usize| {
        let file = sites.enrolment("pki.reseal", &named[nth].0, &sites.authority, sites.port);
        let before = fs::read(&file).unwrap();
        let run = sites.source.reseal(Enrolling::words(&file, "web01", &disk));
        assert_eq!(fs::read(&file).unwrap(), before);
        run
    };
    // Its renewal is the PKI's own business, and said when it becomes urgent.
    assert_eq!(backup(&sites, 0).ok().stderr, "");
    backup(&sites, 1).fails(1, &["does not accept this site's certificate"]);
    let run = backup(&sites, 2).ok();
    assert!(run.stderr.contains("its own PKI has to renew it"), "{run:#?}");
    // Who is to be enrolled by command has to know the server by its own authority.
    let enroll = |name: &str| {
        let file = sites.source.path(name);
        let words = ["tenant", "enroll", "default", "--role", "append", "--address"].map(str::to_owned);
        let more = [format!("localhost:{}", sites.port), "--config".into(), config.display().to_string()];
        let run = sites.target.reseal(words.into_iter().chain(more).chain(["-o".into(), file.display().to_string()]));
        (run, file)
    };
    enroll("first.reseal").0.fails(2, &["server_ca"]);
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("[tls]\n", &format!("address = \"localhost:{}\"\n[tls]\nserver_ca = {ca:?}\n", sites.port));
    private(config.clone(), &text);
    let (run, file) = enroll("second.reseal");
    run.ok();
    // The server, which had no authority of its own, sees that it has one now.
    wait_for_a_look();
    sites.source.reseal(Enrolling::words(&file, "web02", &disk)).ok();
    backup(&sites, 0).ok();
    backup(&sites, 1).fails(1, &["does not accept this site's certificate"]);
    let listed = sites.target.reseal(["tenant", "clients", "--json", "--config", config.to_str().unwrap()]).ok();
    let enrolled: Vec<_> = listed.json_lines().iter().map(|client| client["enrolled"].as_bool().unwrap()).collect();
    assert_eq!(enrolled, [true, false, false, false]);
}

#[test]
fn clients_of_a_tenant_that_was_erased_keep_no_server_from_being_ready() {
    let mut sites = Enrolling::stopped();
    let port = free_port();
    let path = sites.target.path("serve.toml");
    let text = fs::read_to_string(&path).unwrap();
    private(path.clone(), &(text + &format!("[metrics]\nlisten = \"127.0.0.1:{port}\"\n")));
    let file = sites.enrol("acme", "gone", "restore", &[]);
    let disk = sites.disk("disk", MIB);
    sites.target.reseal(["tenant", "erase", "acme", "--yes", "acme"]).ok();
    sites.target.reseal(["serve", "--check", "--config", path.to_str().unwrap()]).ok();
    sites.start();
    let ready = || {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(ready().contains(" 200 "), "{}", ready());
    // Who comes as one is told, and the server stays ready for the others.
    let run = sites.source.reseal(["--repo", file.to_str().unwrap(), "list"]);
    assert!(run.status != Some(0) && run.stderr.contains("can't be opened"), "{run:#?}");
    assert!(ready().contains(" 200 "), "{}", ready());
    let other = sites.enrol("default", "other", "append", &[]);
    sites.backup(&other, "web01", &disk).ok();
    let log = sites.stop();
    assert!(log.contains("tenant acme was erased; its clients can be revoked"), "{log}");
    assert!(!log.lines().any(|line| line.contains("WARN") && line.contains("was erased at")), "{log}");
}
