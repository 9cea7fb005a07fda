//! Another real object store with the interface of S3: Ceph with its gateway. One monitor, and one OSD with its data in a file.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use reseal_store::Variables;
use tempfile::TempDir;

use crate::owner::Owner;
use crate::ports::free_port;
use crate::process::{Server, run};
use crate::site::Site;

/// How long the gateway may take on a busy machine, which makes its pools when it starts first.
const PATIENCE: Duration = Duration::from_secs(120);
const ACCESS: &str = "writer";
const SECRET: &str = "not-so-secret";
const CLUSTER: &str = "6ab07cb1-6c2f-4c1e-9d0b-7d3c7c0f1b01";
const OSD: &str = "8f1f0d0e-0b0a-4b0e-8f0a-0a0b0c0d0e0f";

/// The cluster, with its gateway.
pub struct Ceph {
    // They end before their folder goes.
    servers: Vec<Server>,
    folder: TempDir,
    port: u16,
}

/// One for all tests of a program; each has a bucket of its own.
pub fn shared() -> &'static Ceph {
    static SHARED: OnceLock<Ceph> = OnceLock::new();
    SHARED.get_or_init(Ceph::start)
}

fn configuration(at: &Path, monitor: u16, gateway: u16) -> String {
    let at = at.display();
    format!(
        "[global]
fsid = {CLUSTER}
mon initial members = a
mon host = v2:127.0.0.1:{monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {at}/keyring
run dir = {at}
admin socket =
log to file = false
log to stderr = false
mon cluster log to file = false
mon data = {at}/mon
mon data avail crit = 1
mon allow pool size one = true
osd data = {at}/osd
osd memory target = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
bluestore block size = 34359738368
rgw data = {at}/gateway
rgw frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
"
    )
}

impl Ceph {
    pub fn start() -> Ceph {
        let folder = tempfile::Builder::new().prefix("reseal-ceph-").tempdir().unwrap();
        let (at, monitor, port) = (folder.path(), free_port(), free_port());
        fs::write(at.join("ceph.conf"), configuration(at, monitor, port)).unwrap();
        for name in ["mon", "osd", "gateway"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        let (config, keyring, map) = (at.join("ceph.conf"), at.join("keyring"), at.join("monmap"));
        let tool =
            |program: &str, words: &[&str]| run(Command::new(program).args(words).env("CEPH_CONF", &config)).ok();
        let serve = |program: &str, words: [&str; 3]| {
            let environment = [("CEPH_CONF", config.display().to_string())];
            Server::start(&Path::new("/usr/bin").join(program), words, &environment, at)
        };

        let (keyring, map) = (keyring.to_str().unwrap(), map.to_str().unwrap());
        tool("ceph-authtool", &["--create-keyring", keyring]);
        for name in ["mon.", "client.admin", "client.gateway", "osd.0"] {
            let rights = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"];
            tool("ceph-authtool", &[&["--name", name, "--gen-key", keyring][..], &rights].concat());
        }
        let monitors = format!("[v2:127.0.0.1:{monitor}]");
        tool("monmaptool", &["--create", "--fsid", CLUSTER, "--addv", "a", &monitors, map]);
        tool("ceph-mon", &["--mkfs", "--id", "a", "--monmap", map, "--keyring", keyring]);
        let mut servers = vec![serve("ceph-mon", ["-f", "--id", "a"])];
        tool("ceph", &["osd", "new", OSD]);
        tool("ceph-osd", &["--mkfs", "--id", "0", "--osd-uuid", OSD]);
        servers.push(serve("ceph-osd", ["-f", "--id", "0"]));
        servers.push(serve("radosgw", ["-f", "--name", "client.gateway"]));
        let ceph = Ceph { servers, folder, port };
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < end, "Ceph's gateway does not answer:\n{}", ceph.log());
            thread::sleep(Duration::from_millis(100));
        }
        let user = ["--uid", "writer", "--display-name", "writer", "--access-key", ACCESS, "--secret-key", SECRET];
        tool("radosgw-admin", &[&["--name", "client.gateway", "user", "create"][..], &user].concat());
        // The first object takes seconds, for its pool is made then.
        ceph.site("ready").store().create("ready", b"x").unwrap();
        ceph
    }

    /// What its parts have printed.
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// How long processors were at work for its parts.
    pub fn processor_time(&self) -> Duration {
        self.servers.iter().map(Server::processor_time).sum()
    }

    /// Where the gateway listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    fn variables_at(port: u16) -> Variables {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", ACCESS.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
            // Who dies is not waited for so long.
            ("RESEAL_LEASE_SECONDS", "6".to_owned()),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// Who owns a bucket of that name, which he may have to make.
    pub fn owner(&self, bucket: &str) -> Owner {
        Owner::of(bucket, &Ceph::variables_at(self.port))
    }

    /// A site whose vault is to be in that bucket. Nothing was made there yet.
    pub fn site_in(&self, bucket: &str) -> Site {
        Ceph::site_at(bucket, self.port)
    }

    /// The same, reached at that port.
    pub fn site_at(bucket: &str, port: u16) -> Site {
        let mut site = Site::bare();
        site.vault = format!("s3://{bucket}/vaults/one").into();
        site.variables = Ceph::variables_at(port);
        site
    }

    /// The same, in a new bucket.
    pub fn site(&self, bucket: &str) -> Site {
        self.owner(bucket).make_bucket();
        self.site_in(bucket)
    }
}
