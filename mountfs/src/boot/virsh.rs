//! libvirt, by its own client: bounded in time and output, and never through a shell.

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use roxmltree::Document;

use super::BootError;

const PROGRAM: &str = "virsh";
const PACKAGE: &str = "libvirt-clients (Debian, Ubuntu) or libvirt-client (Fedora, RHEL)";
/// Longest answer that is read, and most of an error that is shown.
const MAX_ANSWER: u64 = 4 << 20;
const MAX_SAID: usize = 2000;
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);

/// A domain's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    Off,
    Running,
    /// Paused for an error of a disk.
    IoError,
    Other,
}

/// The libvirt that the environment names, or the usual one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Virsh;

impl Virsh {
    /// Runs a command, which may read from `/dev/stdin`; its answer.
    fn run(self, words: &[&str], input: Option<&[u8]>) -> Result<String, BootError> {
        let line = || format!("{PROGRAM} {}", words.join(" "));
        let failed = |source| BootError::Start { program: PROGRAM.into(), source };
        let mut command = Command::new(PROGRAM);
        command.arg("--quiet").args(words).env("LC_ALL", "C").env("LANGUAGE", "C");
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => BootError::Missing { program: PROGRAM, package: PACKAGE },
            _ => failed(e),
        })?;
        let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // What ends without reading it says why.
            let _ = stdin.write_all(input);
        }
        let until = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                break status;
            }
            if Instant::now() >= until {
                let _ = child.kill();
                let _ = child.wait();
                let said = format!("it did not answer within {} s", LIMIT.as_secs());
                return Err(BootError::Said { command: line(), said });
            }
            thread::sleep(PAUSE);
        };
        let text = |bytes: thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&bytes.join().unwrap_or_default()).into_owned()
        };
        let (stdout, stderr) = (text(stdout), text(stderr));
        match status.success() {
            true => Ok(stdout),
            false => Err(BootError::Said { command: line(), said: said(&stderr) }),
        }
    }

    /// Defines a domain.
    pub fn define(self, xml: &str) -> Result<(), BootError> {
        self.run(&["define", "/dev/stdin"], Some(xml.as_bytes())).map(drop)
    }

    /// Whether there is a domain of that name, and if so whether its disks are at that socket.
    pub fn has(self, name: &str, socket: &str) -> Result<Option<bool>, BootError> {
        let names = self.run(&["list", "--all", "--name"], None)?;
        if !names.lines().any(|line| line.trim() == name) {
            return Ok(None);
        }
        let xml = self.run(&["dumpxml", &format!("--domain={name}")], None)?;
        let is_ours = |document: &Document<'_>| {
            let mut hosts = document.descendants().filter(|node| node.has_tag_name("host"));
            hosts.any(|host| host.attribute("socket") == Some(socket))
        };
        Ok(Some(Document::parse(&xml).is_ok_and(|document| is_ours(&document))))
    }

    pub fn state(self, name: &str) -> Result<DomainState, BootError> {
        let said = self.run(&["domstate", "--reason", &format!("--domain={name}")], None)?;
        Ok(match said.trim() {
            state if state.starts_with("shut off") || state.starts_with("crashed") => DomainState::Off,
            state if state.starts_with("running") => DomainState::Running,
            state if state.starts_with("paused") && state.contains("I/O error") => DomainState::IoError,
            _ => DomainState::Other,
        })
    }

    /// One of `resume`, `shutdown` and `destroy`.
    pub fn tell(self, command: &str, name: &str) -> Result<(), BootError> {
        self.run(&[command, &format!("--domain={name}")], None).map(drop)
    }

    /// User and group that QEMU runs as, where libvirt says so.
    pub fn qemu_user(self) -> Result<Option<(u32, u32)>, BootError> {
        let xml = self.run(&["capabilities"], None)?;
        Ok(Document::parse(&xml).ok().as_ref().and_then(base_label))
    }
}

/// The user and group of the model `dac`, such as `+64055:+64055`.
fn base_label(document: &Document<'_>) -> Option<(u32, u32)> {
    let model = |node: &roxmltree::Node<'_, '_>| node.has_tag_name("model") && node.text() == Some("dac");
    let dac = document
        .descendants()
        .find(|node| node.has_tag_name("secmodel") && node.children().any(|child| model(&child)))?;
    let label = dac.children().find(|node| node.has_tag_name("baselabel"))?.text()?;
    let (user, group) = label.trim().split_once(':')?;
    let number = |text: &str| text.strip_prefix('+').unwrap_or(text).parse().ok();
    Some((number(user)?, number(group)?))
}

/// Reads all of it in a thread of its own, and keeps no more than an answer may have.
fn drain(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.by_ref().take(MAX_ANSWER).read_to_end(&mut bytes);
            // What writes more must not wait for a reader.
            let _ = io::copy(&mut from, &mut io::sink());
        }
        bytes
    })
}

/// An error message on one line.
fn said(text: &str) -> String {
    let lines = text.lines().map(|line| line.trim().trim_start_matches("error: ")).filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join("; ");
    line.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_qemu_is_read_from_the_capabilities() {
        let xml = "<capabilities><host><secmodel><model>apparmor</model><baselabel type='kvm'>x</baselabel></secmodel>\
                   <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+109</baselabel></secmodel></host></capabilities>";
        assert_eq!(base_label(&Document::parse(xml).unwrap()), Some((64055, 109)));
        assert_eq!(base_label(&Document::parse("<capabilities/>").unwrap()), None);
        assert_eq!(said("error: a\n\nerror: b\x1b\n"), "a; b");
    }
}
