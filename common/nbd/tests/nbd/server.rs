//! Servers that tests start.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reseal_nbd::NbdUri;

/// A process that ends with the test.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it and waits for its socket.
    pub(crate) fn start(command: &mut Command, socket: &Path) -> Server {
        let _ = std::fs::remove_file(socket);
        let program = command.get_program().to_owned();
        let log = socket.with_extension("log");
        let stderr = File::create(&log).unwrap();
        let child = command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap_or_else(|e| panic!("{program:?}: {e}"));
        let mut server = Server(child);
        let began = Instant::now();
        while !is_ready(socket) {
            let ended = server.0.try_wait().unwrap().is_some();
            assert!(!ended, "{program:?} ended at once: {}", std::fs::read_to_string(&log).unwrap());
            assert!(began.elapsed() < Duration::from_secs(20), "{program:?} makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a file is there and, if it is a socket, somebody listens to it.
fn is_ready(path: &Path) -> bool {
    match std::fs::metadata(path) {
        Ok(data) if data.file_type().is_socket() => UnixStream::connect(path).is_ok(),
        Ok(data) => data.len() > 0,
        Err(_) => false,
    }
}

/// A private folder with a socket in it.
pub(crate) struct Place {
    pub(crate) folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    pub(crate) fn uri(&self, export: &str) -> NbdUri {
        NbdUri::unix(&self.socket(), export)
    }

    /// Serves an image read-only. `more` goes before the image.
    pub(crate) fn qemu_nbd(&self, format: &str, image: &Path, more: &[&str]) -> Server {
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-f", format, "-k"]).arg(self.socket()).args(more).arg(image);
        Server::start(&mut command, &self.socket())
    }

    pub(crate) fn nbdkit(&self, arguments: &[&str]) -> Server {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(self.socket()).args(arguments);
        Server::start(&mut command, &self.socket())
    }
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
