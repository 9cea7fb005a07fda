//! Processes that are waited for with an end: a limit of time, or the end of this program.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How often is looked.
const LOOK: Duration = Duration::from_millis(25);

/// Why a process was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// It took too long.
    Late,
    /// This program is to end.
    Stopped,
}

/// Who is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whom {
    /// The process: what it has started is its own business, and may have to outlive it for a moment.
    It,
    /// And all that it has started.
    Group,
}

/// Puts a process into a group of its own, so that what a terminal sends goes to us alone; and should we be killed, it is told to
/// end, so that what we no longer look after does not go on beside the next run.
pub(super) fn apart(command: &mut std::process::Command) {
    command.process_group(0);
    // SAFETY: prctl is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}

/// Waits for the end of a process, which is to be one that is [`apart`]. After `limit`, or when `stop` is set, it is told to end,
/// and killed if it has not after `grace`.
pub(super) fn wait(
    child: &mut Child,
    limit: Option<Duration>,
    grace: Duration,
    stop: &AtomicBool,
    whom: Whom,
) -> io::Result<(ExitStatus, Option<Cut>)> {
    let began = Instant::now();
    let mut cut: Option<(Cut, Instant)> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            if cut.is_some() && whom == Whom::Group {
                // What it left behind.
                send(child, Signal::KILL, whom);
            }
            return Ok((status, cut.map(|(why, _)| why)));
        }
        match cut {
            None if stop.load(Ordering::Relaxed) => {
                cut = Some((Cut::Stopped, Instant::now()));
                send(child, Signal::TERM, whom);
            }
            None if limit.is_some_and(|limit| began.elapsed() > limit) => {
                cut = Some((Cut::Late, Instant::now()));
                send(child, Signal::TERM, whom);
            }
            Some((_, since)) if since.elapsed() > grace => send(child, Signal::KILL, whom),
            _ => {}
        }
        std::thread::sleep(LOOK);
    }
}

/// Sends a signal. The process is one of ours that was not waited for before, or its group may still have others.
fn send(child: &Child, signal: Signal, whom: Whom) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    let _ = match whom {
        Whom::It => kill_process(pid, signal),
        Whom::Group => kill_process_group(pid, signal),
    };
}
