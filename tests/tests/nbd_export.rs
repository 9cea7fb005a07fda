//! `reseal nbd` with the clients that everybody uses: they read what `restore` writes, or get an error.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_tests::certificates::write_certificates;
use reseal_tests::model::DiskFile;
use reseal_tests::ports::free_port;
use reseal_tests::process::{Run, Running, bound_to_us, run, signal, start, system};
use reseal_tests::random::Random;
use reseal_tests::site::Site;

/// No multiple of a cluster, a sector, or a page.
const LENGTH: u64 = (24 << 20) + 777;

/// A server until the guard goes.
struct Exported {
    process: Option<Running>,
}

impl Exported {
    fn start(site: &Site, arguments: &[&str], is_ready: impl Fn() -> bool) -> Exported {
        let words = [&["nbd"], arguments].concat();
        let process = start(bound_to_us(&mut site.command("reseal", words)));
        let exported = Exported { process: Some(process) };
        let began = Instant::now();
        while !is_ready() {
            let process = exported.process.as_ref().unwrap();
            assert!(!process.has_ended() && began.elapsed() < Duration::from_secs(30), "no server: {arguments:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        exported
    }

    /// At a socket in the site's folder.
    fn at(site: &Site, arguments: &[&str]) -> (Exported, PathBuf) {
        let socket = site.path("nbd.sock");
        let words = [&["--socket", socket.to_str().unwrap()], arguments].concat();
        (Exported::start(site, &words, || UnixStream::connect(&socket).is_ok()), socket)
    }

    /// Ends it as an administrator does.
    fn stop(mut self) -> Run {
        let process = self.process.take().unwrap();
        signal(process.id(), libc::SIGTERM);
        process.wait()
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.kill();
        }
    }
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{}?socket={}", export.replace('@', "%40"), socket.display())
}

/// Two disks of one VM, the second of which changes, and both its points as `restore` writes them.
struct Vault {
    site: Site,
    restored: Vec<(String, PathBuf)>,
}

impl Vault {
    fn new() -> Vault {
        let site = Site::new();
        let mut random = Random::new(11);
        let disks = ["root", "data"].map(|name| (name.to_owned(), site.disk(name)));
        for (_, path) in &disks {
            let disk = DiskFile::create(path, LENGTH);
            disk.write(0, &random.bytes(3 << 20));
            disk.write(10 << 20, &vec![0x5a; 1 << 20]);
            disk.write(LENGTH - 5000, &random.bytes(5000));
        }
        site.backup_disks("web@1", &disks);
        let changed = fs::File::options().write(true).open(&disks[1].1).unwrap();
        changed.write_all_at(&random.bytes(100_000), 17 << 20).unwrap();
        site.backup_disks("web@1", &disks);
        let mut restored = Vec::new();
        for number in [1, 2] {
            for disk in ["root", "data"] {
                let path = site.path(format!("restored-{number}-{disk}"));
                site.restore(&format!("web@1@{number}"), disk, &path).ok();
                restored.push((format!("web@1@{number}/{disk}"), path));
            }
        }
        assert!(fs::read(&restored[1].1).unwrap() != fs::read(&restored[3].1).unwrap(), "the points differ");
        Vault { site, restored }
    }
}

#[test]
fn the_clients_of_qemu_and_libnbd_read_what_restore_writes() {
    let Vault { site, restored } = Vault::new();
    let (server, socket) = Exported::at(&site, &[]);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    for (export, path) in &restored {
        let (uri, path) = (uri(&socket, export), path.to_str().unwrap());
        system("qemu-img", &["compare", "-f", "raw", "-F", "raw", path, &uri]);
        let copy = site.path("copy");
        let copied = copy.to_str().unwrap();
        system("nbdcopy", &["--connections=4", "--requests=64", &uri, copied]);
        system("cmp", &[path, copied]);
        fs::remove_file(&copy).unwrap();
        system("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", &uri, &created(&copy)]);
        assert!(fs::read(&copy).unwrap()[..usize::try_from(LENGTH).unwrap()] == fs::read(path).unwrap(), "{export}");
        fs::remove_file(&copy).unwrap();
        // Holes are told, so that nobody reads them.
        let map = system("nbdinfo", &["--map", "--totals", &uri]);
        let of = |kind: &str| {
            let line = map.lines().find(|line| line.ends_with(kind)).unwrap_or_else(|| panic!("{kind}: {map}"));
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        assert!(of("data") < (5 << 20) && of("data") + of("hole,zero") == LENGTH, "{map}");
    }
    // The newest point is what is listed, by the name that it keeps.
    let list = system("nbdinfo", &["--list", &uri(&socket, "")]);
    assert!(list.contains("export=\"web@1@2/data\"") && !list.contains("web@1@1/"), "{list}");
    // What `latest` means may change between two connections, so it gets one only.
    let latest = system("nbdinfo", &[&uri(&socket, "web@1@latest/data")]);
    assert!(latest.contains("can_multi_conn: false"), "{latest}");
    let fixed = system("nbdinfo", &[&uri(&socket, "web@1@2/data")]);
    assert!(fixed.contains("can_multi_conn: true") && fixed.contains("is_read_only: true"), "{fixed}");
    let time = site.reseal(["show", "--json", "web@1@1"]).ok().json()["time"].as_str().unwrap().to_owned();
    let (by_time, path) = (uri(&socket, &format!("web@1@{time}/root")), restored[0].1.to_str().unwrap());
    system("qemu-img", &["compare", "-f", "raw", "-F", "raw", path, &by_time]);
    for missing in ["web@1@3/data", "web@1@2/other", "other@1/data", "web@1@2", "", "nonsense"] {
        let run = run(Command::new("nbdinfo").arg(uri(&socket, missing)));
        assert_ne!(run.status, Some(0), "{missing}");
    }
    let end = server.stop().ok();
    assert!(end.stderr.is_empty(), "{end:#?}");
    assert!(!socket.exists());
}

/// An empty file of the size that `qemu-img` writes.
fn created(path: &Path) -> String {
    fs::File::create(path).unwrap().set_len(LENGTH.next_multiple_of(512)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn one_disk_needs_no_name_and_nothing_else_is_served() {
    let Vault { site, restored } = Vault::new();
    let socket = site.path("nbd.sock");
    let arguments = ["--socket", socket.to_str().unwrap(), "--disk", "data", "web@1@latest"];
    // In the background, where it says what `--json` promises.
    let words = [&["nbd", "--json", "--background"][..], &arguments].concat();
    let ready = site.reseal(words).ok().json();
    assert_eq!(ready["uri"], uri(&socket, ""));
    assert_eq!(ready["exports"][0]["name"], "web@1@2/data");
    assert_eq!(ready["exports"][0]["length"], LENGTH);
    let named = ready["exports"][0]["uri"].as_str().unwrap();
    for uri in [named, &uri(&socket, "")] {
        system("qemu-img", &["compare", "-f", "raw", "-F", "raw", restored[3].1.to_str().unwrap(), uri]);
    }
    for other in ["web@1@1/data", "web@1@2/root"] {
        assert_ne!(run(Command::new("nbdinfo").arg(uri(&socket, other))).status, Some(0), "{other}");
    }
    // It was served when it began, so it may have many connections, and stays what it is.
    site.backup_disks("web@1", &["root", "data"].map(|name| (name.to_owned(), site.disk("root"))));
    system("qemu-img", &["compare", "-f", "raw", "-F", "raw", restored[3].1.to_str().unwrap(), &uri(&socket, "")]);
    let taken = site.reseal([&["nbd"][..], &arguments].concat());
    taken.fails(2, &["something listens at"]);
    let holder = system("fuser", &[socket.to_str().unwrap()]);
    signal(holder.trim().parse().unwrap(), libc::SIGTERM);
    let began = Instant::now();
    while socket.exists() {
        assert!(began.elapsed() < Duration::from_secs(10), "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_would_show_a_disk_to_others_is_refused() {
    let Vault { site, .. } = Vault::new();
    let refused = |words: &[&str]| site.reseal([&["nbd"], words].concat());
    refused(&["--listen", "0.0.0.0:0", "web@1@1"]).fails(2, &["without TLS"]);
    refused(&["--listen", "[::]:0"]).fails(2, &["without TLS"]);
    refused(&["web@1@1"]).fails(2, &["--socket"]);
    refused(&["--socket", "s", "web@1@1", "--disk", "other"]).fails(2, &["it has root, data"]);
    refused(&["--socket", "s", "web@1", "--disk", "root"]).fails(2, &["needs a restore point"]);
    refused(&["--socket", "s", "nobody"]).fails(1, &["nobody"]);
    fs::write(site.path("file"), "not a socket").unwrap();
    refused(&["--socket", "file"]).fails(2, &["is no socket"]);
    assert_eq!(fs::read_to_string(site.path("file")).unwrap(), "not a socket");
    // What a server that was killed has left is no obstacle.
    let (mut server, socket) = Exported::at(&site, &[]);
    let _ = server.process.take().unwrap().kill();
    assert!(socket.exists());
    let (server, _) = Exported::at(&site, &[]);
    server.stop().ok();
}

#[test]
fn over_tls_only_clients_with_a_certificate_read() {
    let Vault { site, restored } = Vault::new();
    let (pki, strangers) = (site.path("pki"), site.path("strangers"));
    write_certificates(&pki);
    write_certificates(&strangers);
    // Strangers know the server's authority, but are not known to it.
    fs::copy(pki.join("ca-cert.pem"), strangers.join("ca-cert.pem")).unwrap();
    let port = free_port();
    let file = |name: &str| pki.join(name).to_str().unwrap().to_owned();
    let (cert, key, ca) = (file("server-cert.pem"), file("server-key.pem"), file("ca-cert.pem"));
    let address = format!("127.0.0.1:{port}");
    let words = ["--listen", &address, "--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca, "web@1@2"];
    let server = Exported::start(&site, &words, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let (export, path) = &restored[3];
    let named = export.replace('@', "%40");
    let copy = site.path("copy");
    let tls = |folder: &Path| format!("nbds://localhost:{port}/{named}?tls-certificates={}", folder.display());
    system("nbdcopy", &["--connections=4", &tls(&pki), copy.to_str().unwrap()]);
    system("cmp", &[path.to_str().unwrap(), copy.to_str().unwrap()]);
    let secret = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", pki.display());
    let options = format!(
        "driver=raw,file.driver=nbd,file.host=localhost,file.port={port},file.export={export},file.tls-creds=tls"
    );
    let disk = format!("driver=raw,file.driver=file,file.filename={}", path.display());
    system("qemu-img", &["compare", "--object", &secret, "--image-opts", &disk, &options]);
    // Without TLS, and with another one's certificate, not even the names are told.
    for uri in [format!("nbd://localhost:{port}/{named}"), tls(&strangers)] {
        let refused = run(Command::new("nbdinfo").arg(&uri));
        assert_ne!(refused.status, Some(0), "{uri}");
        let refused = run(Command::new("nbdinfo").args(["--list", &uri]));
        assert!(refused.status != Some(0) && !refused.stdout.contains("data"), "{refused:#?}");
    }
    server.stop().ok();
}

#[test]
fn damage_is_an_error_and_not_zeros() {
    let Vault { site, restored } = Vault::new();
    let (server, socket) = Exported::at(&site, &["web@1@2"]);
    let (export, path) = &restored[3];
    let uri = uri(&socket, export);
    // Each pack of data loses a byte of the first blob, and nothing was read of it before.
    for pack in site.packs(1) {
        let place = site.vault.join(pack);
        let mut bytes = fs::read(&place).unwrap();
        bytes[100] ^= 1;
        fs::write(&place, bytes).unwrap();
    }
    let copy = site.path("copy");
    let failed = run(Command::new("nbdcopy").args([&uri, copy.to_str().unwrap()]));
    assert!(failed.status != Some(0) && failed.stderr.contains("Input/output error"), "{failed:#?}");
    // Reads around it succeed, on a connection that met it.
    let read = |offset: u64, length: u64| format!("read -v {offset} {length}");
    let io = run(Command::new("qemu-io").args([
        "-r",
        "-f",
        "raw",
        "-c",
        &read(17 << 20, 512),
        "-c",
        &read(10 << 20, 512),
        &uri,
    ]));
    assert!(io.said().contains("Input/output error") && io.said().contains("5a 5a 5a 5a"), "{io:#?}");
    assert!(fs::read(path).unwrap()[10 << 20..][..512].iter().all(|byte| *byte == 0x5a));
    let end = server.stop().ok();
    assert!(end.stderr.contains("can't read bytes") && end.stderr.contains("damaged"), "{end:#?}");
}

#[test]
fn clients_do_not_disturb_each_other_even_when_they_are_killed() {
    let Vault { site, restored } = Vault::new();
    let (server, socket) = Exported::at(&site, &[]);
    let copies: Vec<_> = (0..8)
        .map(|nth| {
            let (export, path) = &restored[nth % restored.len()];
            let copy = site.path(format!("copy-{nth}"));
            let words = ["--connections=4".to_owned(), uri(&socket, export), copy.to_str().unwrap().to_owned()];
            (start(Command::new("nbdcopy").args(words)), path, copy)
        })
        .collect();
    for round in 0..20 {
        let reader = start(Command::new("nbdcopy").args([&uri(&socket, &restored[round % 4].0), "null:"]));
        std::thread::sleep(Duration::from_millis(u64::try_from(round).unwrap() * 2));
        let _ = reader.kill();
    }
    for (process, path, copy) in copies {
        process.wait().ok();
        system("cmp", &[path.to_str().unwrap(), copy.to_str().unwrap()]);
    }
    server.stop().ok();
}

#[test]
fn a_server_ends_when_its_tenant_is_erased() {
    let Vault { site, restored } = Vault::new();
    let (mut server, socket) = Exported::at(&site, &[]);
    let uri = uri(&socket, &restored[0].0);
    system("nbdcopy", &[&uri, "null:"]);
    let erased = site.reseal(["tenant", "erase", "default", "--yes", "default", "--json"]).ok().json();
    assert_eq!(erased["still_have_keys"], serde_json::json!([]));
    let end = server.process.take().unwrap().wait().ok();
    assert!(end.stderr.contains("was erased") && end.stderr.contains("the NBD server ends"), "{end:#?}");
    assert!(!socket.exists());
}

#[test]
fn a_point_that_is_made_meanwhile_is_the_latest() {
    let Vault { site, restored } = Vault::new();
    let (server, socket) = Exported::at(&site, &["web@1"]);
    let latest = uri(&socket, "web@1@latest/data");
    system("qemu-img", &["compare", "-f", "raw", "-F", "raw", restored[3].1.to_str().unwrap(), &latest]);
    let changed = fs::File::options().write(true).open(site.disk("data")).unwrap();
    changed.write_all_at(&[7; 1000], 5 << 20).unwrap();
    site.backup_disks("web@1", &["root", "data"].map(|name| (name.to_owned(), site.disk(name))));
    system("qemu-img", &["compare", "-f", "raw", "-F", "raw", site.disk("data").to_str().unwrap(), &latest]);
    server.stop().ok();
}
