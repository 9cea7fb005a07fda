//! Running QEMU's programs: what they inherit, how long they may take, how much of what they say is kept.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::io::fcntl_dupfd_cloexec;

/// Most that is kept of what a program prints: descriptions of long chains of images are some 100 KiB.
const MAX_SAID: u64 = 1 << 20;
/// Descriptors from here on are never among those that a program expects at a number of its own.
const HIGH: RawFd = 32;

/// A program that this machine lacks.
#[derive(Debug, thiserror::Error)]
#[error(
    "{program} is not installed. It comes with the package qemu-utils (Debian, Ubuntu) or qemu-img (Fedora and its relatives)"
)]
pub struct Missing {
    pub program: &'static str,
}

/// Finds a program in PATH.
pub fn find(program: &'static str) -> Result<PathBuf, Missing> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places =
        std::env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(program));
    places.find(|place| place.is_file()).ok_or(Missing { program })
}

/// Prepares a program: no input, all that it prints captured, bound to the life of the thread that starts it. It
/// inherits the descriptors at the numbers given, and no others.
pub fn bind(command: &mut Command, inherited: Vec<(OwnedFd, RawFd)>) -> io::Result<()> {
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut moved = Vec::with_capacity(inherited.len());
    let mut held = Vec::new();
    for (fd, number) in inherited {
        // While the number is taken here, nothing that the start of a process needs can come to lie there.
        held.push(fcntl_dupfd_cloexec(&fd, number)?);
        moved.push((fcntl_dupfd_cloexec(fd.as_fd(), HIGH)?, number));
    }
    let parent = std::process::id();
    let prepare = move || {
        let _ = &held;
        for (fd, number) in &moved {
            // SAFETY: a call that takes two numbers; the first is a descriptor that this closure owns.
            if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: a call that takes numbers and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Had the parent ended before that, nobody would send the signal.
        match std::os::unix::process::parent_id() == parent {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: between fork and exec only system calls are made, on what was made before.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// What a program prints, read to its end by a thread, kept as far as is allowed.
pub struct Said(JoinHandle<Vec<u8>>);

impl Said {
    pub fn listen(from: impl Read + Send + 'static) -> Said {
        Said(thread::spawn(move || {
            let mut kept = from.take(MAX_SAID);
            let mut bytes = Vec::new();
            let _ = kept.read_to_end(&mut bytes);
            // What exceeds that is thrown away, so that the program does not wait for a reader.
            let _ = io::copy(&mut kept.into_inner(), &mut io::sink());
            bytes
        }))
    }

    /// All of it, once the program has ended.
    pub fn text(self) -> String {
        String::from_utf8_lossy(&self.0.join().unwrap_or_default()).into_owned()
    }
}

/// A program that has ended.
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a prepared program to its end; `None` if it had to be killed because of the time.
pub fn run(command: Command, limit: Duration) -> io::Result<Option<Ended>> {
    let began = Instant::now();
    run_while(command, &|| began.elapsed() < limit)
}

/// The same for as long as `go_on` says so.
pub fn run_while(mut command: Command, go_on: &dyn Fn() -> bool) -> io::Result<Option<Ended>> {
    let mut child = command.spawn()?;
    // The descriptors that were kept for it.
    drop(command);
    let stdout = child.stdout.take().map(Said::listen);
    let stderr = child.stderr.take().map(Said::listen);
    let status = wait_while(&mut child, go_on)?;
    if status.is_none() {
        end(&mut child);
    }
    let text = |said: Option<Said>| said.map(Said::text).unwrap_or_default();
    let (stdout, stderr) = (text(stdout), text(stderr));
    Ok(status.map(|status| Ended { status, stdout, stderr }))
}

/// Waits for a process; `None` if it has not ended in time.
pub fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    wait_while(child, &|| began.elapsed() < limit)
}

fn wait_while(child: &mut Child, go_on: &dyn Fn() -> bool) -> io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_micros(500);
    loop {
        match child.try_wait()? {
            None if go_on() => thread::sleep(pause),
            ended => return Ok(ended),
        }
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// Ends a process that has nothing to lose.
pub fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// What a program said, for an error: one line, of bounded length, with the image's name where the program repeats its
/// whole specification.
pub fn shorten(said: &str, spec: &str, path: &str) -> String {
    const MAX: usize = 600;
    let said = said.replace(spec, path);
    let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let line = lines.join("; ");
    match line.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.is_empty() => "it said nothing".into(),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_program_has_what_it_inherits_and_no_more() {
        let reader = |text: &[u8]| {
            let (reader, mut writer) = io::pipe().unwrap();
            io::Write::write_all(&mut writer, text).unwrap();
            OwnedFd::from(reader)
        };
        let said = |script: &str, inherited| {
            let mut command = shell(script);
            bind(&mut command, inherited).unwrap();
            run(command, Duration::from_secs(10)).unwrap().unwrap().stdout
        };
        let given = || vec![(reader(b"three "), 3), (reader(b"four"), 4)];
        assert_eq!(said("cat <&3; cat /dev/fd/4", given()), "three four");
        let open = |inherited| said("ls /proc/$$/fd", inherited).lines().map(str::to_owned).collect::<BTreeSet<_>>();
        // Whoever started the tests may have left others open.
        let usual = open(Vec::new());
        let more = open(given());
        assert!(
            more.contains("3") && more.contains("4") && more.len() <= usual.len() + 2,
            "{more:?}, without: {usual:?}"
        );
    }

    #[test]
    fn time_and_output_are_bounded() {
        let mut command = shell("exec sleep 60");
        bind(&mut command, Vec::new()).unwrap();
        let began = Instant::now();
        assert!(run(command, Duration::from_millis(100)).unwrap().is_none());
        assert!(began.elapsed() < Duration::from_secs(10));
        let mut command = shell("head -c 3000000 /dev/zero; echo done >&2");
        bind(&mut command, Vec::new()).unwrap();
        let ended = run(command, Duration::from_secs(10)).unwrap().unwrap();
        assert!(ended.status.success() && ended.stderr == "done\n");
        assert_eq!(ended.stdout.len() as u64, MAX_SAID);
    }

    #[test]
    fn what_is_repeated_is_short() {
        assert_eq!(shorten("a 'json:{}': x\n\n b\n", "json:{}", "/d"), "a '/d': x; b");
        assert_eq!(shorten("", "s", "p"), "it said nothing");
        assert_eq!(shorten(&"é".repeat(1000), "s", "p").chars().count(), 601);
    }
}
