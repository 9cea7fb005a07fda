//! The real PyKMIP server, with its database in a folder of its own.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use reseal_kms::{Kmip, KmipConfig};
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use super::free_port;
use super::pki::Pki;

pub(crate) struct PyKmip {
    config: KmipConfig,
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl PyKmip {
    pub(crate) fn start(pki: &Pki) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("policies")).unwrap();
        let port = free_port();
        let text = format!(
            "[server]\nhostname=127.0.0.1\nport={port}\nauth_suite=TLS1.2\ncertificate_path={}\nkey_path={}\n\
             ca_path={}\npolicy_path={}\nenable_tls_client_auth=True\nlogging_level=WARNING\ndatabase_path={}\n",
            pki.cert("server").display(),
            pki.key("server").display(),
            pki.ca().display(),
            folder.path().join("policies").display(),
            folder.path().join("keys.db").display(),
        );
        fs::write(folder.path().join("server.conf"), text).unwrap();
        let mut server = Self { config: pki.config(port, false), folder, port, child: None };
        server.run();
        server
    }

    /// Starts the process and waits until it accepts connections.
    pub(crate) fn run(&mut self) {
        let output = File::create(self.folder.path().join("output")).unwrap();
        let child = Command::new(program())
            .arg("-f")
            .arg(self.folder.path().join("server.conf"))
            .arg("-l")
            .arg(self.folder.path().join("server.log"))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            // Its helper processes end with it.
            .process_group(0)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let patience = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < patience, "PyKMIP does not start: {}", self.output());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the process, at once; the database stays.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let group = Pid::from_child(&child);
            kill_process_group(group, Signal::KILL).unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn kms(&self) -> Kmip {
        Kmip::new(&self.config).unwrap()
    }

    fn output(&self) -> String {
        fs::read_to_string(self.folder.path().join("output")).unwrap_or_default()
    }
}

impl Drop for PyKmip {
    fn drop(&mut self) {
        self.stop();
    }
}

fn program() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = own.ancestors().find(|folder| folder.join("Cargo.lock").exists()).unwrap();
    let cache = std::env::var_os("RESEAL_CACHE").map_or_else(|| workspace.join(".cache"), PathBuf::from);
    let program = cache.join("pykmip/bin/pykmip-server");
    assert!(program.exists(), "{} is missing: run tests/scripts/setup.sh", program.display());
    program
}
