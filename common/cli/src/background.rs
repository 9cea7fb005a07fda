//! `--background`: the command returns when the work has begun, and a process of its own goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::process::{Pid, WaitOptions, setsid, waitpid};

/// The two sides of the fork.
pub enum Side {
    /// The command that the user started: it waits, and this is its exit status.
    Command(u8),
    /// The process that goes on.
    Server(Detach),
}

/// What the process that goes on does when it is ready.
pub struct Detach {
    ready: OwnedFd,
    log: Option<File>,
}

/// Splits the process in two. The terminal stays with the server until it is ready, for a passphrase and for errors.
///
/// # Safety
/// No other thread may run.
pub unsafe fn split(log: Option<&Path>) -> io::Result<Side> {
    // Opened before anything else, so that an error still has somebody to tell.
    let open = |path| OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let log = log.map(open).transpose()?;
    let (mut told, ready) = io::pipe()?;
    // SAFETY: the caller is the only thread, so no lock is held in the copy.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Server(Detach { ready: ready.into(), log })),
        child if child > 0 => {
            drop(ready);
            let mut byte = [0];
            match told.read(&mut byte)? {
                1 => Ok(Side::Command(0)),
                _ => Ok(Side::Command(exit_status(child)?)),
            }
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// The status of a server that ended before it was ready.
fn exit_status(child: i32) -> io::Result<u8> {
    let status = waitpid(Pid::from_raw(child), WaitOptions::empty())?;
    let code = status.and_then(|(_, status)| status.exit_status()).and_then(|code| u8::try_from(code).ok());
    // 0 without having been ready, or killed by a signal: a failure either way.
    Ok(code.filter(|&code| code != 0).unwrap_or(1))
}

impl Detach {
    /// Leaves the terminal and lets the command return.
    pub fn detach(self) -> io::Result<()> {
        setsid()?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        replace(&null, libc::STDIN_FILENO)?;
        let said = self.log.as_ref().unwrap_or(&null);
        replace(said, libc::STDOUT_FILENO)?;
        replace(said, libc::STDERR_FILENO)?;
        File::from(self.ready).write_all(&[1])
    }
}

fn replace(file: &File, descriptor: i32) -> io::Result<()> {
    // SAFETY: `file` is open; the descriptor is one of the three standard ones, which nothing in this process owns.
    match unsafe { libc::dup2(file.as_raw_fd(), descriptor) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
