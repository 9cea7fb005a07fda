//! `qemu-nbd` that serves one image on a socket without a name.
//!
//! We bind and listen, and it inherits the socket as systemd would pass it. The name in the file system is removed
//! before it starts: what is left is a handle that only this process has. So nobody else can connect, and however this
//! process ends, no file stays behind; only a kill in the microseconds in which the name is there leaves it, in a folder that
//! nobody else may enter and on which nobody listens any more.

use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::chain::{SECRET_FD, explain, secret_arguments};
use super::{ImageError, ImageFormat};
use reseal_qemu::Secret;
use reseal_qemu::tool::{self, Said, bind, end, find, shorten};

const QEMU_NBD: &str = "qemu-nbd";
/// Name of the export.
pub(super) const EXPORT: &str = "disk";
/// Connections at once: more than a reader opens.
const CLIENTS: u32 = 32;
/// How long it may take to open the image. A LUKS key slot is made to take seconds, on a machine that may be slower
/// than this one.
const READY: Duration = Duration::from_secs(60);
/// The first descriptor that a program takes for a socket passed to it (sd_listen_fds(3)).
const LISTEN_FD: i32 = 3;
/// What a server of the fixed newstyle protocol says first.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT";
/// Longest path of a Unix socket.
const MAX_PATH: usize = 107;

/// A `qemu-nbd` that is ready.
pub(super) struct Server {
    child: Child,
    said: Option<Said>,
    path: PathBuf,
    /// The socket's inode, which `path` leads to.
    _socket: OwnedFd,
}

impl Server {
    pub(super) fn start(
        path: &Path,
        format: ImageFormat,
        spec: &str,
        secret: Option<&Secret>,
    ) -> Result<Server, ImageError> {
        let failed = |source| ImageError::Io { path: path.display().to_string(), action: "serve", source };
        let program = find(QEMU_NBD)?;
        let (listener, socket) = listen().map_err(failed)?;
        // The process id must be in its environment, which is known only once it runs.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]).arg(program).env("LISTEN_FDS", "1");
        command.env_remove("LISTEN_FDNAMES");
        command.args(["--read-only", "--persistent", "--export-name", EXPORT]).arg(format!("--shared={CLIENTS}"));
        let mut inherited = vec![(OwnedFd::from(listener), LISTEN_FD)];
        if let Some(secret) = secret {
            command.args(secret_arguments());
            inherited.push((secret.pipe().map_err(failed)?.into(), SECRET_FD));
        }
        bind(&mut command, inherited).map_err(failed)?;
        let mut child = command.arg(spec).spawn().map_err(failed)?;
        // The descriptors that were kept for it: from here on the socket closes when it ends.
        drop(command);
        drop(child.stdout.take());
        let said = child.stderr.take().map(Said::listen);
        let path_of_socket = PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        let mut server = Server { child, said, path: path_of_socket, _socket: socket };
        match server.wait_until_ready().map_err(failed)? {
            Readiness::Ready => Ok(server),
            Readiness::Ended => Err(explain(path, format, QEMU_NBD, spec, &server.all_said())),
            Readiness::Slow => {
                let (path, said) = (path.display().to_string(), server.all_said());
                let said = shorten(&said, spec, &path);
                Err(ImageError::Slow { path, program: QEMU_NBD, seconds: READY.as_secs(), said })
            }
        }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.path
    }

    pub(super) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it greets. The socket takes connections from the start on; it greets when the image is open.
    fn wait_until_ready(&mut self) -> io::Result<Readiness> {
        let began = Instant::now();
        let mut connection = UnixStream::connect(&self.path)?;
        connection.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut greeting = Vec::new();
        while greeting.len() < GREETING.len() {
            let mut bytes = [0; GREETING.len()];
            match connection.read(&mut bytes[greeting.len()..]) {
                Ok(0) => return Ok(Readiness::Ended),
                Ok(got) => greeting.extend_from_slice(&bytes[greeting.len()..][..got]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Readiness::Ended),
                Err(e) => return Err(e),
            }
            if self.child.try_wait()?.is_some() {
                return Ok(Readiness::Ended);
            }
            if began.elapsed() > READY {
                return Ok(Readiness::Slow);
            }
        }
        Ok(if greeting == GREETING { Readiness::Ready } else { Readiness::Ended })
    }

    /// Ends it; all that it said.
    fn all_said(&mut self) -> String {
        // One that ends by itself says why on its way out.
        if !matches!(tool::wait(&mut self.child, Duration::from_secs(1)), Ok(Some(_))) {
            end(&mut self.child);
        }
        self.said.take().map(Said::text).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.child);
        if let Some(said) = self.said.take() {
            said.text();
        }
    }
}

enum Readiness {
    Ready,
    Ended,
    Slow,
}

/// A socket that listens and has no name, and a handle of it to connect by.
fn listen() -> io::Result<(UnixListener, OwnedFd)> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    let name = format!("reseal-{}", hex::encode(random));
    let mut folder = std::env::temp_dir().join(&name);
    if folder.as_os_str().len() + "/s".len() > MAX_PATH {
        folder = Path::new("/tmp").join(name);
    }
    // Nobody else gets in while the socket has a name.
    DirBuilder::new().mode(0o700).create(&folder)?;
    let path = folder.join("s");
    let listener = UnixListener::bind(&path);
    let socket = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&folder);
    Ok((listener?, socket?))
}
