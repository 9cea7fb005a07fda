//! Running the programs that do the work: never through a shell, bounded in time and output.

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::LibvirtError;

/// Longest answer that is read, in bytes: domain XML is the longest, some tens of KiB.
const MAX_ANSWER: u64 = 4 << 20;
/// Longest part of an error message that is passed on, in characters.
const MAX_SAID: usize = 2000;
/// Shortest and longest pause between two looks at whether a program has ended.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// How long a program's output may stay open after its end: something it started may hold it.
const LINGER: Duration = Duration::from_secs(2);

/// A program of the system.
pub(super) struct Program {
    pub name: &'static str,
    /// The packages that it is in, for messages.
    pub package: &'static str,
}

/// The disk images' tool, which makes the scratch files.
pub(super) const QEMU_IMG: Program =
    Program { name: "qemu-img", package: "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL)" };

/// libvirt is reached through its own client: its C library would bind the whole program to it.
pub(super) const VIRSH: Program =
    Program { name: "virsh", package: "libvirt-clients (Debian, Ubuntu) or libvirt-client (Fedora, RHEL)" };

impl Program {
    /// Runs it to its end with this on its standard input; what it printed. No word may be a secret: the system shows them.
    pub(super) fn run(&self, words: &[&str], input: Option<&[u8]>, limit: Duration) -> Result<String, LibvirtError> {
        let line = || format!("{} {}", self.name, words.join(" "));
        let failed = |source| LibvirtError::Run { program: self.name, source };
        let mut command = Command::new(self.name);
        command.args(words).env("LC_ALL", "C").env("LANGUAGE", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => LibvirtError::Missing { program: self.name, package: self.package },
            _ => failed(source),
        })?;
        let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // What ends without reading it says why on its standard error.
            let _ = stdin.write_all(input);
        }
        let Some(status) = wait(&mut child, limit).map_err(failed)? else {
            return Err(LibvirtError::Slow { command: line(), seconds: limit.as_secs() });
        };
        let read = |from: Receiver<Vec<u8>>| from.recv_timeout(LINGER).unwrap_or_default();
        let (stdout, stderr) = (read(stdout), read(stderr));
        if !status.success() {
            let said = said(&String::from_utf8_lossy(&stderr));
            let said = if said.is_empty() { status.to_string() } else { said };
            return Err(LibvirtError::Said { command: line(), said });
        }
        let answer = |why: &str| LibvirtError::Answer { command: line(), why: why.into() };
        if stdout.len() as u64 > MAX_ANSWER {
            return Err(answer("it is too long"));
        }
        String::from_utf8(stdout).map_err(|_| answer("it is not UTF-8"))
    }
}

/// Reads all of it in a thread of its own, and keeps no more than an answer may have.
fn drain(from: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    if let Some(mut from) = from {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.by_ref().take(MAX_ANSWER + 1).read_to_end(&mut bytes);
            let _ = sender.send(bytes);
            // What writes more must not wait for a reader.
            let _ = io::copy(&mut from, &mut io::sink());
        });
    }
    receiver
}

/// Waits for its end; kills it, and returns `None`, if that takes too long.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    let (mut pause, longest) = PAUSE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
}

/// An error message on one line.
fn said(text: &str) -> String {
    let lines = text.lines().map(|line| line.trim().trim_start_matches("error: ")).filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join("; ");
    line.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

/// The client of libvirt.
#[derive(Clone)]
pub(super) struct Virsh {
    /// `None`: its own choice, which is LIBVIRT_DEFAULT_URI if that is set.
    pub uri: Option<String>,
    /// Longest that one command may take.
    pub limit: Duration,
}

impl Virsh {
    /// The words of a command line, the program's name first.
    pub(super) fn line(&self, words: &[&str]) -> Vec<String> {
        let connect = self.uri.iter().flat_map(|uri| ["--connect", uri]);
        [VIRSH.name, "--quiet"].into_iter().chain(connect).chain(words.iter().copied()).map(String::from).collect()
    }

    /// Runs a command; its answer.
    pub(super) fn run(&self, words: &[&str]) -> Result<String, LibvirtError> {
        self.run_with(words, None)
    }

    /// Runs a command that reads `/dev/stdin`; its answer.
    pub(super) fn run_with(&self, words: &[&str], input: Option<&[u8]>) -> Result<String, LibvirtError> {
        let line = self.line(words);
        let words: Vec<_> = line.iter().skip(1).map(String::as_str).collect();
        VIRSH.run(&words, input, self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Program = Program { name: "sh", package: "dash" };
    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_program_is_bounded_in_time_and_output() {
        assert_eq!(SH.run(&["-c", "cat"], Some(b"hello"), LIMIT).unwrap(), "hello");
        let failed = SH.run(&["-c", "printf 'error: a\\n\\nerror: b\\033\\n' >&2; exit 1"], None, LIMIT).unwrap_err();
        assert_eq!(failed.said(), Some("a; b"));
        let silent = SH.run(&["-c", "exit 3"], None, LIMIT).unwrap_err();
        assert_eq!(silent.said(), Some("exit status: 3"));
        let slow = SH.run(&["-c", "exec sleep 100"], None, Duration::from_millis(50));
        assert!(matches!(slow, Err(LibvirtError::Slow { .. })));
        let long = SH.run(&["-c", "head -c 5000000 /dev/zero"], None, LIMIT);
        assert!(matches!(long, Err(LibvirtError::Answer { .. })), "{long:?}");
        let missing = Program { name: "no-such-program-anywhere", package: "p" }.run(&[], None, LIMIT);
        assert!(matches!(missing, Err(LibvirtError::Missing { .. })));
    }

    #[test]
    fn what_a_program_leaves_open_is_not_waited_for() {
        let began = Instant::now();
        SH.run(&["-c", "sleep 60 & exit 0"], None, LIMIT).unwrap();
        assert!(began.elapsed() < Duration::from_secs(15));
    }
}
