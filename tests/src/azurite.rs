//! Azurite, which answers as Azure's blob storage does, with its data in a folder.

use std::ffi::OsString;
use std::fs;
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use reseal_store::Variables;
use tempfile::TempDir;

use crate::ports::free_port;
use crate::process::{Server, installed, run};
use crate::site::Site;

/// How long a start may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const ACCOUNT: &str = "vaults";
/// In base64, as such keys are.
const KEY: &str = "bm90LXNvLXNlY3JldC1ub3Qtc28tc2VjcmV0LW5vdC0=";
/// Makes a container, if there is none of that name: a request that is signed with the key of the account ("Authorize with Shared Key", Azure Storage documentation).
const MAKE: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.error, urllib.request
port, account, key, container = sys.argv[1:]
path = f"/{account}/{container}"
headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
named = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
text = "PUT" + "\n" * 12 + named + f"/{account}{path}\nrestype:container"
sign = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers["Authorization"] = f"SharedKey {account}:{sign}"
request = urllib.request.Request(f"http://127.0.0.1:{port}{path}?restype=container", method="PUT", headers=headers)
try:
    urllib.request.urlopen(request).read()
except urllib.error.HTTPError as error:
    if error.code != 409:
        raise
"#;

/// The server.
pub struct Azurite {
    // Ends before its folder goes.
    _server: Server,
    folder: TempDir,
    port: u16,
}

/// One server for all tests of a program; each has a container of its own.
pub fn shared() -> &'static Azurite {
    static SHARED: OnceLock<Azurite> = OnceLock::new();
    SHARED.get_or_init(Azurite::start)
}

impl Azurite {
    pub fn start() -> Azurite {
        let program = installed("azurite/node_modules/azurite/dist/src/blob/main.js");
        let folder = tempfile::Builder::new().prefix("reseal-azurite-").tempdir().unwrap();
        let port = free_port();
        let mut words = vec![program.into_os_string()];
        words.extend(["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort"].map(OsString::from));
        words.extend([port.to_string().into(), "--location".into(), folder.path().join("data").into()]);
        let accounts = [("AZURITE_ACCOUNTS", format!("{ACCOUNT}:{KEY}"))];
        let server = Server::start(&installed("azurite/node"), words, &accounts, folder.path());
        let azurite = Azurite { _server: server, folder, port };
        let end = Instant::now() + PATIENCE;
        while !azurite.make("ready") {
            assert!(Instant::now() < end, "Azurite does not answer:\n{}", azurite.log());
            thread::sleep(Duration::from_millis(200));
        }
        azurite
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn make(&self, container: &str) -> bool {
        let port = self.port.to_string();
        run(Command::new("python3").args(["-c", MAKE, &port, ACCOUNT, KEY, container])).status == Some(0)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A site whose vault is to be in a container of that name. Nothing was made there yet.
    pub fn site(&self, container: &str) -> Site {
        self.site_at(container, self.port)
    }

    /// The same, reached at that port.
    pub fn site_at(&self, container: &str, port: u16) -> Site {
        assert!(self.make(container), "no container {container}:\n{}", self.log());
        let mut site = Site::bare();
        site.vault = format!("az://{container}/vaults/one").into();
        let pairs = [
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned()),
            ("AZURE_STORAGE_ENDPOINT", format!("http://127.0.0.1:{port}/{ACCOUNT}")),
            ("RESEAL_LEASE_SECONDS", "6".to_owned()),
        ];
        site.variables = Variables::from(pairs.map(|(name, value)| (name.to_owned(), value)));
        site
    }
}
