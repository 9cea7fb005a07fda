//! Where clients connect: a socket file that only its owner may use, or a TCP port.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use reseal_nbd::server::Connection;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// Clients that the kernel keeps until there is a thread for them.
const BACKLOG: i32 = 64;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("something listens at {} already; end it, or choose another path", .0.display())]
    Taken(PathBuf),
    #[error("{} is there and is no socket; choose another path", .0.display())]
    NoSocket(PathBuf),
    #[error("can't listen at {}: {source}", .path.display())]
    Unix { path: PathBuf, source: io::Error },
    #[error("can't listen at {address}: {source}")]
    Tcp { address: SocketAddr, source: io::Error },
}

/// A socket that is listened to. Its file goes with it.
pub enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener),
}

/// The file of a socket, as long as it is the one that was made.
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn remove(&self) {
        let is_same = |data: std::fs::Metadata| (data.dev(), data.ino()) == (self.device, self.inode);
        if std::fs::symlink_metadata(&self.path).is_ok_and(is_same) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Listener {
    /// From when this returns on, clients can connect.
    pub fn new(address: &Address) -> Result<Listener, ListenError> {
        match address {
            Address::Unix(path) => {
                remove_stale(path)?;
                unix(path).map_err(|source| match source.kind() {
                    // Somebody else was faster.
                    io::ErrorKind::AddrInUse => ListenError::Taken(path.clone()),
                    _ => ListenError::Unix { path: path.clone(), source },
                })
            }
            Address::Tcp(address) => TcpListener::bind(address)
                .map(Listener::Tcp)
                .map_err(|source| ListenError::Tcp { address: *address, source }),
        }
    }

    /// Where it listens: the port is the one that the kernel chose where any was asked for.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Listener::Unix(_, file) => Ok(Address::Unix(file.path.clone())),
            Listener::Tcp(listener) => listener.local_addr().map(Address::Tcp),
        }
    }

    /// Takes the socket's file away, though a thread may still wait for clients.
    pub fn remove_file(&self) {
        if let Listener::Unix(_, file) = self {
            file.remove();
        }
    }

    /// The next client, and where it comes from, if that is anywhere.
    pub(super) fn accept(&self) -> io::Result<(Connection, Option<IpAddr>)> {
        match self {
            Listener::Unix(listener, _) => Ok((Connection::unix(listener.accept()?.0)?, None)),
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Connection::tcp(stream)?, Some(peer.ip())))
            }
        }
    }
}

/// Takes away what a process that died has left.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
        Ok(data) if !data.file_type().is_socket() => return Err(ListenError::NoSocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(ListenError::Taken(path.to_owned())),
        Err(e) => Err(failed(e)),
    }
}

fn unix(path: &Path) -> io::Result<Listener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Before there is a file: it takes this mode, so at no moment may others connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let data = std::fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), device: data.dev(), inode: data.ino() };
    listen(&socket, BACKLOG)?;
    Ok(Listener::Unix(UnixListener::from(socket), file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_private_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("nbd.sock"));
        let Address::Unix(path) = &address else { unreachable!() };
        let listener = Listener::new(&address).unwrap();
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::new(&address), Err(ListenError::Taken(_))), "somebody listens");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_socket_that_nobody_listens_to_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "what a process leaves that died");
        let listener = Listener::new(&Address::Unix(path.clone())).unwrap();
        // Another one has taken the place: that is not ours to remove.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "a file").unwrap();
        drop(listener);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file");
        assert!(matches!(Listener::new(&Address::Unix(path)), Err(ListenError::NoSocket(_))));
    }
}
