//! One run of a file at a time.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use reseal_cli::{Failure, Status};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// The lock of a file of jobs; it ends with this, or with the process.
pub(super) struct Lock(#[expect(dead_code, reason = "held open: closing it ends the lock")] File);

impl Lock {
    /// Takes it. It lies in the state folder, and not at the file, which is replaced when somebody edits it.
    pub(super) fn take(state: &Path, jobs: &Path) -> Result<Lock, Failure> {
        let folder = state.join("jobs");
        let name = hex::encode(&Sha256::digest(jobs.as_os_str().as_bytes())[..16]);
        let open = || -> io::Result<File> {
            DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let path = folder.join(format!("{name}.lock"));
            File::options().create(true).truncate(false).write(true).mode(0o600).open(path)
        };
        let failed = |e: io::Error| Failure::new(Status::Failed, format!("can't lock {}: {e}", folder.display()));
        let file = open().map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Lock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let message =
                    format!("the jobs of {} are being run by another process; wait for its end", jobs.display());
                Err(Failure::new(Status::Failed, message))
            }
            Err(e) => Err(failed(e.into())),
        }
    }
}
