//! The folder of a VM that runs: its sockets, and what is where. It follows from the overlay, so that whoever comes back finds it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reseal_cli::{ProcessId, private_folder, runtime_folder};
use reseal_format::ids::OverlayId;
use rustix::fs::{FlockOperation, flock};

use super::BootError;
use super::record::Record;

const RECORD: &str = "boot.json";
/// What it is called before it is whole.
const NEW: &str = "boot.json.new";
const LOG: &str = "qemu.log";
/// Held by QEMU for as long as it runs.
const LOCK: &str = "vm.lock";
/// Held by whoever moves disks.
const PROMOTION: &str = "promote.lock";
/// How often, and with which pause, that lock is tried: who looks whether it is held has it for a moment.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(10);
/// Longest path of a socket.
const MAX_SOCKET: usize = 107;
/// Longest record that is read, and most of a log that is shown.
const MAX_RECORD: u64 = 1 << 20;
const MAX_SAID: usize = 2000;

/// A folder that only this user gets into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> BootError + 'a {
    move |source| BootError::File { action, path: path.to_owned(), source }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
    options
}

impl RunFolder {
    /// That of an overlay, whether it is there or not.
    pub fn of(overlay: &OverlayId) -> RunFolder {
        RunFolder { path: runtime_folder().join(overlay.to_string()) }
    }

    /// One at that path.
    pub fn at(path: impl Into<PathBuf>) -> RunFolder {
        RunFolder { path: path.into() }
    }

    /// Makes it, unless it is there.
    pub fn make(&self) -> Result<(), BootError> {
        let socket = self.qmp_promote();
        if socket.as_os_str().as_bytes().len() > MAX_SOCKET {
            return Err(BootError::Path { path: self.path.clone(), why: "it is too long" });
        }
        if let Some(base) = self.path.parent() {
            private_folder(base).map_err(failed("make a private folder at", base))?;
        }
        private_folder(&self.path).map_err(failed("make a private folder at", &self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the disks are served.
    pub fn nbd(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    /// QEMU's monitor, for the process that serves.
    pub fn qmp(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// A second one, for moving disks, and for people.
    pub fn qmp_promote(&self) -> PathBuf {
        self.path.join("qmp-promote.sock")
    }

    /// The guest agent.
    pub fn agent(&self) -> PathBuf {
        self.path.join("agent.sock")
    }

    /// The serial console.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    pub fn pid_file(&self) -> PathBuf {
        self.path.join("qemu.pid")
    }

    /// The UEFI variables of this VM.
    pub fn variables(&self) -> PathBuf {
        self.path.join("variables.fd")
    }

    /// What QEMU says, which outlives who started it.
    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// What a QEMU that is started here is to hold; none while another one holds it.
    pub(super) fn lock(&self) -> Result<Option<File>, BootError> {
        self.try_lock(LOCK, FlockOperation::NonBlockingLockExclusive)
    }

    fn try_lock(&self, name: &str, how: FlockOperation) -> Result<Option<File>, BootError> {
        let path = self.path.join(name);
        let lock = private().read(true).write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(failed("make", &path))?;
        match flock(&lock, how) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(failed("lock", &path)(e.into())),
        }
    }

    /// What whoever moves disks of this VM holds meanwhile; none while somebody else does.
    pub fn lock_promotion(&self) -> Result<Option<File>, BootError> {
        for _ in 0..TRIES {
            if let Some(lock) = self.try_lock(PROMOTION, FlockOperation::NonBlockingLockExclusive)? {
                return Ok(Some(lock));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(None)
    }

    /// Whether somebody moves disks of this VM now.
    pub fn is_promoting(&self) -> bool {
        self.path.join(PROMOTION).exists()
            && matches!(self.try_lock(PROMOTION, FlockOperation::NonBlockingLockShared), Ok(None))
    }

    /// Whether a QEMU runs here.
    pub fn is_held(&self) -> bool {
        self.path.exists() && matches!(self.lock(), Ok(None))
    }

    /// The QEMU that runs here: as recorded; or, where who started it was killed before it could, as it says itself.
    pub(super) fn process(&self) -> Result<Option<ProcessId>, BootError> {
        if let Some(record) = self.record()?
            && record.qemu.is_alive()
        {
            return Ok(Some(record.qemu));
        }
        let pid = fs::read_to_string(self.pid_file()).unwrap_or_default().trim().parse().ok();
        Ok(pid.and_then(|pid| ProcessId::of(pid).ok()).filter(ProcessId::is_alive))
    }

    /// An empty log.
    pub(super) fn new_log(&self) -> Result<File, BootError> {
        let path = self.log();
        private().create(true).append(true).truncate(false).open(&path).map_err(failed("make", &path))
    }

    /// The end of what QEMU said, on one line.
    pub fn said(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(file) = private().read(true).open(self.log()) {
            let _ = file.take(MAX_RECORD).read_to_end(&mut bytes);
        }
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let line = lines.join("; ");
        let skip = line.chars().count().saturating_sub(MAX_SAID);
        line.chars().filter(|c| !c.is_control()).skip(skip).collect()
    }

    /// What runs, if something was recorded.
    pub fn record(&self) -> Result<Option<Record>, BootError> {
        let path = self.path.join(RECORD);
        let file = match private().read(true).open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("open", &path))?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_RECORD + 1).read_to_end(&mut bytes).map_err(failed("read", &path))?;
        match bytes.len() as u64 {
            0..=MAX_RECORD => Record::decode(&bytes).map(Some).map_err(|why| BootError::Record { path, why }),
            _ => Err(BootError::Record { path, why: "it is too long".into() }),
        }
    }

    /// Records what runs; whoever reads sees the old or the new.
    pub fn put(&self, record: &Record) -> Result<(), BootError> {
        let (new, path) = (self.path.join(NEW), self.path.join(RECORD));
        let file = private().write(true).create(true).truncate(true).open(&new);
        let mut file = file.map_err(failed("make", &new))?;
        file.write_all(&record.encode()).and_then(|()| file.sync_all()).map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("make", &path))
    }

    /// Copies a firmware's template of variables for this VM.
    pub(super) fn copy_variables(&self, template: &Path) -> Result<(), BootError> {
        let path = self.variables();
        let bytes = fs::read(template).map_err(failed("read", template))?;
        let file = private().write(true).create(true).truncate(true).open(&path);
        file.and_then(|mut file| file.write_all(&bytes)).map_err(failed("write", &path))
    }

    /// Takes away what a VM that is gone has left, but for the socket that is listened to and the lock.
    pub fn clear(&self) -> Result<(), BootError> {
        let own = [
            self.qmp(),
            self.qmp_promote(),
            self.agent(),
            self.console(),
            self.pid_file(),
            self.variables(),
            self.log(),
        ];
        for path in own.into_iter().chain([RECORD, NEW].map(|name| self.path.join(name))) {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("remove", &path)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes it, with all that is ours in it.
    pub fn remove(&self) -> Result<(), BootError> {
        self.clear()?;
        let _ = fs::remove_file(self.nbd());
        for lock in [LOCK, PROMOTION] {
            let _ = fs::remove_file(self.path.join(lock));
        }
        match fs::remove_dir(&self.path) {
            Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
                Err(failed("remove", &self.path)(e))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_is_private_and_goes_with_all_that_is_in_it() {
        let base = tempfile::tempdir().unwrap();
        let folder = RunFolder::at(base.path().join("a/reseal/0123"));
        assert!(folder.make().is_err(), "what is above its base is not made");
        let folder = RunFolder::at(base.path().join("reseal/0123"));
        folder.make().unwrap();
        folder.make().unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700);
        folder.new_log().unwrap().write_all(b"a\n\x1b[2J b\n").unwrap();
        assert_eq!(folder.said(), "a; [2J b");
        assert_eq!(folder.record().unwrap(), None);
        fs::write(folder.path().join(RECORD), "{}").unwrap();
        assert!(matches!(folder.record(), Err(BootError::Record { .. })));
        folder.remove().unwrap();
        assert!(!folder.path().exists());
        assert_eq!(folder.path().parent().map(Path::exists), Some(true));
        let long = RunFolder::at(base.path().join("x".repeat(100)));
        assert!(matches!(long.make(), Err(BootError::Path { .. })));
    }
}
