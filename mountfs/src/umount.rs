//! Ending a mount from outside, and waiting until its process is gone.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::fuse::PID_ATTRIBUTE;
use crate::mounts::{MountedAt, Unmount, is_writable, kernel_path, mounted_at, unmount};

/// How long a mount may be in use by something that is about to end: the last reader, or the copy of one that has not yet
/// become another program.
const BUSY: Duration = Duration::from_millis(500);
/// How long the process may take to end by itself.
const BY_ITSELF: Duration = Duration::from_secs(1);
/// How long it may take once it was told to.
const ENDING: Duration = Duration::from_secs(10);
/// The same where it first makes durable what was written to it: as slow as what the overlay is on.
const ENDING_DURABLY: Duration = Duration::from_secs(600);
/// How long a mount may take to name its process. One that does not answer is stopped or broken.
const ASKING: Duration = Duration::from_secs(2);

/// Why a mount was not ended.
#[derive(Debug, thiserror::Error)]
pub enum UmountError {
    #[error("{} can't be looked at: {source}", .path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("nothing of reseal is mounted at {}", .path.display())]
    NotMounted { path: PathBuf },
    #[error("{} is in use; end what reads from it (`fuser -vm {}` shows what) and repeat", .path.display(), .path.display())]
    Busy { path: PathBuf },
    #[error("can't unmount {}: {source}", .path.display())]
    Unmount { path: PathBuf, source: io::Error },
    #[error("{} is unmounted, but its process {pid} has not ended within {} s", .path.display(), .waited.as_secs())]
    StillRunning { path: PathBuf, pid: i32, waited: Duration },
}

/// Unmounts, and waits for the process that served it.
pub fn umount(mountpoint: &Path) -> Result<(), UmountError> {
    let unseen = |source| UmountError::Path { path: mountpoint.to_owned(), source };
    let mut path = kernel_path(mountpoint).map_err(unseen)?;
    if mounted_at(&path).map_err(unseen)? == MountedAt::Nothing
        && let Ok(target) = path.canonicalize()
    {
        // The mountpoint was named through a link.
        path = target;
    }
    if !matches!(mounted_at(&path).map_err(unseen)?, MountedAt::Reseal(_)) {
        return Err(UmountError::NotMounted { path });
    }
    let ending = if is_writable(&path).map_err(unseen)? { ENDING_DURABLY } else { ENDING };
    let process = serving_process(&path);
    let began = Instant::now();
    loop {
        match unmount(&path, Unmount::IfUnused) {
            Ok(()) => break,
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                return Err(UmountError::Unmount { path, source: error });
            }
            Err(_) if began.elapsed() > BUSY => return Err(UmountError::Busy { path }),
            Err(_) => thread::sleep(BUSY / 20),
        }
    }
    match process {
        Some((pid, process)) if !ends(&process, ending) => Err(UmountError::StillRunning { path, pid, waited: ending }),
        _ => Ok(()),
    }
}

/// Waits until a process has ended by itself, and after a while tells it to: a mount that another mount namespace has
/// copied is still there for the process, though not for the user.
fn ends(process: &OwnedFd, ending: Duration) -> bool {
    ended_within(process, BY_ITSELF) || {
        // An error means that it has ended, or is another user's.
        let _ = pidfd_send_signal(process, Signal::TERM);
        ended_within(process, ending)
    }
}

/// The process behind a mount; `None` if it is dead, another user's, or does not answer.
fn serving_process(path: &Path) -> Option<(i32, OwnedFd)> {
    let (sender, answer) = mpsc::channel();
    let path = path.to_owned();
    // On a thread of its own: a mount whose process is stopped would never answer.
    thread::spawn(move || {
        let mut value = [0u8; 16];
        let length = rustix::fs::getxattr(&path, PID_ATTRIBUTE, &mut value[..]).ok();
        let text = length.and_then(|length| std::str::from_utf8(value.get(..length)?).ok());
        let _ = sender.send(text.and_then(|text| text.parse::<i32>().ok()));
    });
    let pid = answer.recv_timeout(ASKING).ok()??;
    // Taken before it is unmounted, so that the number can't have passed to another process.
    Some((pid, pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?))
}

fn ended_within(process: &OwnedFd, time: Duration) -> bool {
    let mut poll = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one initialized structure is passed with its count, and the descriptor is open while it is borrowed.
    unsafe { libc::poll(&mut poll, 1, milliseconds) > 0 }
}
