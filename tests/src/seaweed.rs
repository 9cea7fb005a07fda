//! A real object store with the interface of S3: SeaweedFS, with its data in a folder, so that it can be killed and started again.

use std::fs;
use std::iter;
use std::net::TcpListener;
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use reseal_store::{Bucket, Store, Variables};
use tempfile::TempDir;

use crate::owner::Owner;
use crate::ports::free_port;
use crate::process::{Server, installed};
use crate::site::Site;

/// How long a start may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same where it can be tried once more.
const FIRST_PATIENCE: Duration = Duration::from_secs(30);
const ACCESS: &str = "writer";
const SECRET: &str = "not-so-secret";

/// The server, with buckets of its own.
pub struct Seaweed {
    // Ends before its folder goes.
    server: Mutex<Option<Server>>,
    folder: TempDir,
    /// Of master, volumes, filer and S3; that of gRPC is 10,000 higher, each.
    ports: [u16; 4],
    /// The only access key that it knows.
    access: &'static str,
}

/// Ports that nobody has now, nor those 10,000 above them.
fn free_ports() -> [u16; 4] {
    let below =
        || iter::repeat_with(|| free_port() - 10_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    [(); 4].map(|()| below().unwrap())
}

/// One server for all tests of a program that do it no harm; each has a bucket of its own.
pub fn shared() -> &'static Seaweed {
    static SHARED: OnceLock<Seaweed> = OnceLock::new();
    SHARED.get_or_init(Seaweed::start)
}

impl Seaweed {
    pub fn start() -> Seaweed {
        Seaweed::start_for(ACCESS)
    }

    /// One that knows another access key.
    pub fn start_for(access: &'static str) -> Seaweed {
        for _ in 0..2 {
            // Another program may have taken a port since it was looked at.
            let seaweed = Seaweed::new(access);
            if seaweed.launch(FIRST_PATIENCE) {
                return seaweed;
            }
        }
        let seaweed = Seaweed::new(access);
        seaweed.start_again();
        seaweed
    }

    fn new(access: &'static str) -> Seaweed {
        let folder = tempfile::Builder::new().prefix("reseal-seaweed-").tempdir().unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        let identities = format!(
            r#"{{"identities":[{{"name":"w","credentials":[{{"accessKey":"{access}","secretKey":"{SECRET}"}}],"actions":["Admin","Read","Write","List","Tagging"]}}]}}"#
        );
        fs::write(folder.path().join("s3.json"), identities).unwrap();
        Seaweed { folder, ports: free_ports(), server: Mutex::new(None), access }
    }

    /// Starts it; whether it answers within that time.
    fn launch(&self, patience: Duration) -> bool {
        let at = self.folder.path().display();
        let [master, volume, filer, s3] = self.ports;
        let options = format!(
            "server -dir {at}/data -ip 127.0.0.1 -ip.bind 127.0.0.1 -s3 -s3.config {at}/s3.json -s3.iam=false -s3.port.iceberg 0 -s3.port.lance 0 \
             -master.port {master} -volume.port {volume} -filer.port {filer} -s3.port {s3} -volume.max 100 -volume.minFreeSpace 64MiB \
             -master.volumeSizeLimitMB 512 -master.telemetry=false -master.electionTimeout 1s -master.heartbeatInterval 100ms"
        );
        // One volume for each bucket is enough.
        let growth = [("WEED_MASTER_VOLUME_GROWTH_COPY_1", "1".to_owned())];
        let server = Server::start(&installed("seaweed/bin/weed"), options.split(' '), &growth, self.folder.path());
        *self.server.lock().unwrap() = Some(server);
        let end = Instant::now() + patience;
        while !self.answers() {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(Duration::from_millis(100));
        }
        true
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Whether all its parts work together: a bucket can be made, and an object in it.
    fn answers(&self) -> bool {
        let bucket = Bucket::open_with("s3://ready", &self.variables()).unwrap();
        self.try_bucket("ready")
            && self.answers_at(self.ports[3])
            && bucket.create("ready", b"x").or_else(exists).is_ok()
    }

    fn answers_at(&self, port: u16) -> bool {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    }

    /// Ends the server as a power cut would.
    pub fn kill(&self) {
        drop(self.server.lock().unwrap().take());
    }

    /// Starts it again, with what it had.
    pub fn start_again(&self) {
        assert!(self.launch(PATIENCE), "SeaweedFS does not answer:\n{}", self.log());
    }

    /// How long processors were at work for it since it was started.
    pub fn processor_time(&self) -> Duration {
        self.server.lock().unwrap().as_ref().unwrap().processor_time()
    }

    /// Where its S3 interface listens.
    pub fn port(&self) -> u16 {
        self.ports[3]
    }

    /// What a program needs to know to use it.
    pub fn variables(&self) -> Variables {
        self.variables_at(self.port())
    }

    /// The same through a proxy that listens there.
    pub fn variables_at(&self, port: u16) -> Variables {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", self.access.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// Makes a bucket, if there is none of that name; its address with a prefix.
    pub fn bucket(&self, name: &str) -> String {
        assert!(self.try_bucket(name), "no bucket {name}:\n{}", self.log());
        format!("s3://{name}/vaults/one")
    }

    fn try_bucket(&self, name: &str) -> bool {
        let made = ureq::post(format!("http://127.0.0.1:{}/buckets/{name}/", self.ports[2])).send_empty();
        matches!(made, Ok(_) | Err(ureq::Error::StatusCode(409)))
    }

    /// A site whose vault is to be in a bucket of that name in which objects can be locked; and who owns the bucket.
    pub fn locked_site(&self, name: &str) -> (Site, Owner) {
        let owner = Owner::of(name, &self.variables());
        owner.make_bucket_with_locks();
        let mut site = Site::bare();
        site.vault = format!("s3://{name}/vaults/one").into();
        site.variables = self.variables();
        site.variables.insert("RESEAL_LEASE_SECONDS".into(), "6".into());
        (site, owner)
    }

    /// A site whose vault is to be in a bucket of that name, reached at that port. Nothing was made there yet.
    pub fn site_at(&self, name: &str, port: u16) -> Site {
        let mut site = Site::bare();
        site.vault = self.bucket(name).into();
        site.variables = self.variables_at(port);
        // Who dies is not waited for so long.
        site.variables.insert("RESEAL_LEASE_SECONDS".into(), "6".into());
        site
    }

    /// A site with an empty vault in a bucket of that name.
    pub fn site(&self, name: &str) -> Site {
        let site = self.site_at(name, self.port());
        site.reseal(["init", "--no-recovery"]).ok();
        site
    }
}

fn exists(error: reseal_store::StoreError) -> Result<(), reseal_store::StoreError> {
    match error {
        reseal_store::StoreError::Exists(_) => Ok(()),
        other => Err(other),
    }
}
