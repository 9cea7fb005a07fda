//! Programs that are run, timed and weighed.

use std::io::{Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::process::Running;

use crate::Result;

/// What one run of a program cost.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    /// The most memory that it, or a process that it waited for, ever had resident.
    pub(crate) peak_mib: f64,
}

/// How long a server may take to see that it is unmounted, and then to obey.
const BY_ITSELF: Duration = Duration::from_millis(500);
const WHEN_ASKED: Duration = Duration::from_secs(10);

/// How much of a program's complaint an error repeats.
const COMPLAINT: usize = 2000;

/// Runs a program to its end; anything but success is an error that holds what the program said.
pub(crate) fn run(command: &mut Command) -> Result<Cost> {
    let mut said = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said.try_clone()?);
    let began = Instant::now();
    let child = command.spawn().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    let (status, peak_mib) = wait_weighed(child)?;
    let seconds = began.elapsed().as_secs_f64();
    if status.success() {
        return Ok(Cost { seconds, peak_mib });
    }
    said.rewind()?;
    let mut text = String::new();
    said.read_to_string(&mut text)?;
    let tail: String = text.chars().rev().take(COMPLAINT).collect::<Vec<_>>().into_iter().rev().collect();
    Err(format!("{:?}: {status}: {}", command.get_program(), tail.trim()).into())
}

/// What a program prints, without what surrounds it.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if !output.status.success() {
        return Err(format!("{:?}: {}", command.get_program(), output.status).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The standard library waits without asking what the process used.
fn wait_weighed(child: Child) -> Result<(ExitStatus, f64)> {
    let pid = i32::try_from(child.id())?;
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which zero bytes are a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live local values of the types that the call fills in.
        if unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } == pid {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
    Ok((ExitStatus::from_raw(status), usage.ru_maxrss as f64 / 1024.0))
}

/// The most memory that a running process ever had resident.
pub(crate) fn peak_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("the process has no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// Waits until a program has ended, and not for what the kernel knows of it; the most memory that it had. What the kernel says at its end counts
/// what this process had, too; one that has just ended has none.
pub(crate) fn peak_until_end(running: &Running) -> f64 {
    let mut peak = 0.0;
    while !running.has_ended() {
        peak = peak_mib(running.id()).unwrap_or(peak);
        sleep(Duration::from_millis(2));
    }
    peak
}

/// How long processors were at work for what this process has started and waited for.
pub(crate) fn time_of_children() -> Duration {
    // SAFETY: rusage is plain numbers, for which zero bytes are a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live local value of the type that the call fills in.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    let duration = |time: libc::timeval| {
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_usec * 1000).unwrap_or(0))
    };
    duration(usage.ru_utime) + duration(usage.ru_stime)
}

/// The process of the given name that has `argument` among its arguments: one that has left its parent.
pub(crate) fn find(wanted: &str, argument: &Path) -> Result<u32> {
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end between the listing and the reading.
        let Ok(name) = std::fs::read_to_string(format!("/proc/{pid}/comm")) else { continue };
        let Ok(arguments) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if name.trim() == wanted
            && arguments.split(|byte| *byte == 0).any(|part| part == argument.as_os_str().as_bytes())
        {
            return Ok(pid);
        }
    }
    Err(format!("no {wanted} serves {}", argument.display()).into())
}

/// A process that serves a mount; it ends when this is dropped, whatever happened.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = std::fs::File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().map_err(|error| format!("{:?}: {error}", command.get_program()))?))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn running(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("the serving process ended: {status}").into()),
        }
    }

    /// Asks the process to end, now that nothing is mounted any more: not all do so by themselves.
    pub(crate) fn end(&mut self) -> bool {
        if self.ended_within(BY_ITSELF) {
            return true;
        }
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw) {
            // Fails only if it has just ended.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        self.ended_within(WHEN_ASKED)
    }

    fn ended_within(&mut self, limit: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < limit {
            if matches!(self.0.try_wait(), Ok(Some(_)) | Err(_)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
