//! Azurite, which answers as Azure's blob storage does, with its data in a folder.
//!
//! It ends with the process that started it: a shell waits beside it for the end of a pipe.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use reseal_store::Variables;
use tempfile::TempDir;

use crate::process::run;
use crate::remote::free_port;
use crate::site::Site;

/// How long a start may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const ACCOUNT: &str = "vaults";
/// In base64, as such keys are.
const KEY: &str = "bm90LXNvLXNlY3JldC1ub3Qtc28tc2VjcmV0LW5vdC0=";
/// Makes a container: a request that is signed with the key of the account ("Authorize with Shared Key", Azure Storage documentation).
const MAKE: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.request
port, account, key, container = sys.argv[1:]
path = f"/{account}/{container}"
headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
named = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
text = "PUT" + "\n" * 12 + named + f"/{account}{path}\nrestype:container"
sign = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers["Authorization"] = f"SharedKey {account}:{sign}"
request = urllib.request.Request(f"http://127.0.0.1:{port}{path}?restype=container", method="PUT", headers=headers)
urllib.request.urlopen(request).read()
"#;

/// A folder of `tests/scripts/setup.sh`'s cache.
fn cache() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::env::var_os("RESEAL_CACHE").map_or_else(|| workspace.join(".cache"), PathBuf::from).join("azurite")
}

/// The server.
pub struct Azurite {
    folder: TempDir,
    port: u16,
    server: Option<Child>,
}

/// One server for all tests of a program; each has a container of its own.
pub fn shared() -> &'static Azurite {
    static SHARED: OnceLock<Azurite> = OnceLock::new();
    SHARED.get_or_init(Azurite::start)
}

impl Azurite {
    pub fn start() -> Azurite {
        let (node, program) = (cache().join("node"), cache().join("node_modules/azurite/dist/src/blob/main.js"));
        assert!(program.exists(), "there is no Azurite at {}: run tests/scripts/setup.sh", program.display());
        let folder = tempfile::Builder::new().prefix("reseal-azurite-").tempdir().unwrap();
        let port = free_port();
        let script =
            r#"node=$0; log=$1; shift; "$node" "$@" >>"$log" 2>&1 & server=$!; read -r _; kill -9 $server; wait"#;
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(node).arg(folder.path().join("log")).arg(program);
        shell.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", &port.to_string()]);
        shell.arg("--location").arg(folder.path().join("data")).env("AZURITE_ACCOUNTS", format!("{ACCOUNT}:{KEY}"));
        let server = shell.stdin(Stdio::piped()).spawn().unwrap();
        let azurite = Azurite { folder, port, server: Some(server) };
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

    /// A site whose vault is to be in a new container of that name. Nothing was made there yet.
    pub fn site(&self, container: &str) -> Site {
        assert!(self.make(container), "no container {container}:\n{}", self.log());
        let mut site = Site::bare();
        site.vault = format!("az://{container}/vaults/one").into();
        let pairs = [
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned()),
            ("AZURE_STORAGE_ENDPOINT", format!("http://127.0.0.1:{}/{ACCOUNT}", self.port)),
            ("RESEAL_LEASE_SECONDS", "6".to_owned()),
        ];
        site.variables = Variables::from(pairs.map(|(name, value)| (name.to_owned(), value)));
        site
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            drop(server.stdin.take());
            let _ = server.wait();
        }
    }
}
