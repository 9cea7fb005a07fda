//! A private folder for the socket on which QEMU serves the snapshot. Only its owner gets in.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use reseal_cli::{private_folder, runtime_folder};

use super::QemuError;
use crate::guardian::ProcessId;

/// Name of the socket.
const SOCKET: &str = "nbd.sock";

/// A folder that goes with the run.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
}

fn make(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

impl RunFolder {
    /// A new one, named after the process that will clean up. Those of dead processes go.
    pub(super) fn new(owner: &ProcessId) -> Result<RunFolder, QemuError> {
        RunFolder::within(&runtime_folder(), owner)
    }

    fn within(base: &Path, owner: &ProcessId) -> Result<RunFolder, QemuError> {
        let failed = |e: io::Error| QemuError::host(format!("make a private folder in {}", base.display()), e);
        private_folder(base).map_err(failed)?;
        for entry in std::fs::read_dir(base).map_err(failed)?.flatten() {
            if owner_of(&entry.file_name().to_string_lossy()).is_some_and(|owner| !owner.is_alive()) {
                drop(RunFolder { path: entry.path() });
            }
        }
        let path = base.join(format!("{}-{}", owner.pid, owner.start));
        make(&path).map_err(failed)?;
        Ok(RunFolder { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// The socket that QEMU will serve.
    pub(super) fn listen(&self) -> Result<UnixListener, QemuError> {
        let socket = self.socket();
        UnixListener::bind(&socket).map_err(|e| QemuError::host(format!("listen on {}", socket.display()), e))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn owner_of(name: &str) -> Option<ProcessId> {
    let (pid, start) = name.split_once('-')?;
    Some(ProcessId { pid: pid.parse().ok()?, start: start.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn folders_of_dead_processes_go() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().join("reseal");
        let own = ProcessId::of(std::process::id()).unwrap();
        let dead = RunFolder::within(&base, &ProcessId { pid: own.pid, start: own.start + 1 }).unwrap();
        dead.listen().unwrap();
        let left = dead.path().to_owned();
        let _killed = std::mem::ManuallyDrop::new(dead);
        assert!(left.exists());
        let folder = RunFolder::within(&base, &own).unwrap();
        assert!(!left.exists());
        assert_eq!(folder.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        folder.listen().unwrap();
        drop(folder);
        assert_eq!(std::fs::read_dir(&base).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().join("reseal");
        std::fs::create_dir(&base).unwrap();
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(RunFolder::within(&base, &ProcessId::of(std::process::id()).unwrap()).is_err());
    }
}
