//! The whole job, with real parts: a VM on an encrypted disk whose key is in the customer's KMS is backed up over the wire while it
//! runs; the provider seals it under a key in a KMS of his own; the customer's site, with its KMS, is gone; the VM boots.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::guest::{Guest, Images, boot, check_point};
use reseal_tests::marker::Marker;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Run, Running, signal};
use reseal_tests::remote::Tapped;
use reseal_tests::site::Site;
use serde_json::{Value, json};

use servers::bao::Bao;
use servers::pki::Pki;
use servers::pykmip::PyKmip;
use servers::{Config, free_port};

const TENANT: &str = "acme-corporation-of-nowhere";
const VM: &str = "the-web-server-of-acme";

/// The customer's site: his KMS, which keeps the passphrase of his disk, and his VM.
struct Customer {
    bao: Bao,
    site: Site,
    guest: Guest,
    images: Images,
    passphrase: String,
}

impl Customer {
    fn new(marker: &Marker) -> Customer {
        let bao = Bao::start();
        bao.must("POST", "sys/mounts/disks", &json!({ "type": "kv", "options": { "version": "2" } }));
        let random = bao.must("POST", "sys/tools/random/32", &json!({ "format": "hex" }));
        let made = random["data"]["random_bytes"].as_str().unwrap();
        bao.must("POST", "disks/data/web01", &json!({ "data": { "luks": made } }));
        // As his hypervisor gets it.
        let kept = bao.must("GET", "disks/data/web01", &Value::Null);
        let passphrase = kept["data"]["data"]["luks"].as_str().unwrap().to_owned();
        let site = Site::bare();
        let images = Images::with(&site.path("disks"), &passphrase, Some(marker));
        assert!(!marker.found_below(&site.path("disks")).is_empty(), "the search finds what is there");
        fs::remove_file(images.path("marked.raw")).unwrap();
        let guest = Guest::counting(&images);
        Customer { bao, site, guest, images, passphrase }
    }

    fn backup(&self, enrolment: &Path) -> Value {
        let [repo, qmp, qga] = [enrolment, &self.guest.qmp, &self.guest.qga].map(|path| path.to_str().unwrap());
        let words = ["--repo", repo, "backup", "--json", VM, "--qmp", qmp, "--qga", qga];
        self.site.reseal(words).ok().json()
    }
}

/// The provider's site: the vault, the server, and the KMS.
struct Provider {
    site: Site,
    _kmip: PyKmip,
    _pki: Pki,
    port: u16,
    server: Option<Running>,
}

impl Provider {
    fn new() -> Provider {
        let pki = Pki::new();
        let kmip = PyKmip::start(&pki);
        let mut site = Site::bare();
        Config::default().kmip("hsm", &pki, &kmip).tenant(&format!("{TENANT} = \"hsm\"")).write(&mut site);
        site.reseal_of(TENANT, ["init", "--no-recovery"]).ok();
        let port = free_port();
        let vault = &site.vault;
        let config = format!("listen = \"127.0.0.1:{port}\"\naddress = \"localhost:{port}\"\nrepo = {vault:?}\n");
        servers::private_file(&site.path("serve.toml"), &config);
        let server = site.start(["serve", "--config", site.path("serve.toml").to_str().unwrap()]);
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(30) && !server.has_ended(), "the server does not come up");
            sleep(Duration::from_millis(20));
        }
        Provider { site, _kmip: kmip, _pki: pki, port, server: Some(server) }
    }

    /// One file for a source, by way of a port.
    fn enroll(&self, port: u16, to: PathBuf) -> PathBuf {
        let (config, address) = (self.site.path("serve.toml"), format!("localhost:{port}"));
        let words = ["tenant", "enroll", TENANT, "--role", "append", "--vm", VM, "--address", &address];
        let files = ["--config", config.to_str().unwrap(), "-o", to.to_str().unwrap()];
        self.site.reseal(words.iter().chain(&files)).ok();
        to
    }

    fn stop(&mut self) -> Run {
        let server = self.server.take().unwrap();
        signal(server.id(), libc::SIGTERM);
        server.wait()
    }

    /// Restores the disks of a point, the system's first.
    fn restore(&self, point: &str) -> [PathBuf; 2] {
        self.disks(point).map(|name| {
            let to = self.site.disk(&format!("{point}-{name}.raw"));
            let words = ["restore", "--disk", &name, point, to.to_str().unwrap()];
            self.site.reseal_of(TENANT, words).ok();
            to
        })
    }

    fn disks(&self, point: &str) -> [String; 2] {
        let point = self.site.reseal_of(TENANT, ["show", "--json", point]).ok().json();
        let mut disks: Vec<_> = point["disks"].as_array().unwrap().clone();
        disks.sort_by_key(|disk| std::cmp::Reverse(disk["length"].as_u64().unwrap()));
        [0, 1].map(|nth: usize| disks[nth]["name"].as_str().unwrap().to_owned())
    }
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn the_source_and_its_kms_are_gone_and_the_vm_boots_at_the_target() {
    let marker = Marker::new(44);
    let mut provider = Provider::new();
    let line = Tapped::new(provider.port);
    let Customer { mut bao, site: source, guest, images, passphrase } = {
        let customer = Customer::new(&marker);
        let enrolment = provider.enroll(line.port, customer.site.path("acme.reseal"));
        let first = customer.backup(&enrolment);
        let counted = customer.guest.counts_on();
        let second = customer.backup(&enrolment);
        let sent = |point: &Value| point["stats"]["sent"].as_u64().unwrap();
        assert_eq!((&first["number"], &second["number"]), (&json!(1), &json!(2)));
        assert!(sent(&second) * 10 < sent(&first), "its bitmap told what changed: {second}");
        assert!(counted > 3);
        customer
    };

    // Nothing in clear on the wire, nor at the target.
    let heard = line.heard();
    assert!(heard.len() > 50 << 20, "{} bytes were heard", heard.len());
    assert!(!marker.is_in(&heard));
    for name in [VM, TENANT, &passphrase] {
        assert!(!holds(&heard, name), "{name} was heard");
    }
    assert_eq!(marker.found_below(&provider.site.path("")), Vec::<String>::new());
    for file in reseal_tests::site::files_below(&provider.site.path("")) {
        assert!(!holds(&fs::read(&file).unwrap(), &passphrase), "{} holds the customer's passphrase", file.display());
    }

    // The worst night.
    drop(guest);
    bao.kill();
    let counts_before = counted_at(&source);
    drop((bao, images, source));
    provider.stop().ok();

    let [system_disk, data_disk] = provider.restore(&format!("{VM}@2"));
    assert!(!marker.found_below(&provider.site.path("disks")).is_empty(), "it was restored");
    let counts = check_point(&system_disk, &data_disk);
    assert!(counts.data > 3 && counts.data <= counts_before, "{counts:?} of {counts_before}");
    let mounted = Mounted::new(&provider.site, "mnt", &["--tenant", TENANT]);
    let [system_disk, data_disk] =
        provider.disks(&format!("{VM}@2")).map(|name| mounted.path.join(VM).join(format!("latest/{name}.raw")));
    let said = boot(&system_disk, &data_disk, &provider.site.path("booted"));
    assert!(said.contains("login:"), "{said}");
    mounted.umount(&provider.site).ok();
    let report = provider.site.reseal_of(TENANT, ["verify", "--json"]).ok().json();
    assert_eq!(report["damaged"], json!([]));
}

/// What the guest had counted when its power went.
fn counted_at(source: &Site) -> u64 {
    reseal_tests::guest::last_count(&source.path("disks/console")).unwrap()
}
