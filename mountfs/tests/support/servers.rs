//! NBD servers that tests start.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reseal_format::geometry::{CLUSTER, is_zero};
use reseal_format::names::{DiskName, VmName};
use reseal_mountfs::disks::Opens;
use reseal_nbd::{Export, NbdError, NbdUri, Options};
use reseal_vault::{Class, VaultError};

/// A process that ends with the test.
pub struct Server(Child);

impl Server {
    /// Starts it and waits for its socket.
    pub fn start(command: &mut Command, socket: &Path) -> Server {
        let _ = std::fs::remove_file(socket);
        let log = socket.with_extension("log");
        let child = command.stdin(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut server = Server(child);
        let began = Instant::now();
        while UnixStream::connect(socket).is_err() {
            let ended = server.0.try_wait().unwrap().is_some();
            assert!(!ended, "it ended at once: {}", std::fs::read_to_string(&log).unwrap());
            assert!(began.elapsed() < Duration::from_secs(20), "it makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// Serves a raw disk.
    pub fn qemu_nbd(socket: &Path, disk: &Path) -> Server {
        let mut command = Command::new("qemu-nbd");
        Server::start(
            command.args(["-r", "-t", "-f", "raw", "-e", "0", "-x", "disk-0", "-k"]).arg(socket).arg(disk),
            socket,
        )
    }

    /// Serves what a plugin has.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> Server {
        let mut command = Command::new("nbdkit");
        Server::start(command.args(["--foreground", "--readonly", "--unix"]).arg(socket).args(arguments), socket)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens each disk as the export of its name at a socket.
#[derive(Clone)]
pub struct Socket {
    pub path: PathBuf,
    /// How often a disk was opened.
    pub opened: Arc<AtomicUsize>,
}

impl Socket {
    pub fn new(path: PathBuf) -> Socket {
        Socket { path, opened: Arc::default() }
    }
}

impl Opens for Socket {
    fn open(&self, _vm: &VmName, _number: u32, disk: &DiskName) -> Result<Export, VaultError> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let second = Duration::from_secs(1);
        let options = Options { timeout: second, give_up: second, ..Options::default() };
        Export::open(&NbdUri::unix(&self.path, disk.as_str()), &options, None).map_err(|error| {
            let class = match &error {
                NbdError::Unreachable { .. } => Class::Unreachable,
                _ => Class::Failed,
            };
            VaultError::Elsewhere { message: error.to_string(), class }
        })
    }
}

/// Writes a disk whose zero clusters are holes.
pub fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (nth, cluster) in bytes.chunks(CLUSTER).enumerate().filter(|(_, cluster)| !is_zero(cluster)) {
        file.write_all_at(cluster, (nth * CLUSTER) as u64).unwrap();
    }
}
