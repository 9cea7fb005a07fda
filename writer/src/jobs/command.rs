//! Commands of the administrator, before and after a backup.

use std::io;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::child::{Cut, Whom, apart, wait};
use crate::span;

/// How long a command may take to end when it is told to.
const GRACE: Duration = Duration::from_secs(5);
/// Most words, and most bytes of all: what fits any system's limit.
const MAX_WORDS: usize = 256;
const MAX_BYTES: usize = 64 << 10;

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub words: Vec<String>,
}

impl Command {
    /// Checks one; none if there are no words.
    pub(super) fn new(key: &str, words: Vec<String>) -> Result<Option<Command>, String> {
        let Some(program) = words.first() else { return Ok(None) };
        if !program.starts_with('/') {
            return Err(format!(
                "{key}: {program:?} is no absolute path of a program; nothing is looked for in PATH, and no shell is used"
            ));
        }
        if words.iter().any(|word| word.contains('\0')) {
            return Err(format!("{key}: a word with a NUL byte can't be given to a program"));
        }
        if words.len() > MAX_WORDS || words.iter().map(String::len).sum::<usize>() > MAX_BYTES {
            return Err(format!("{key}: at most {MAX_WORDS} words of {MAX_BYTES} bytes"));
        }
        Ok(Some(Command { words }))
    }

    /// Runs it with these variables, for so long at most. What it prints goes to standard error. What is wrong, if anything is.
    pub(super) fn run(&self, variables: &[(&str, String)], limit: Duration, stop: &AtomicBool) -> Result<(), String> {
        let program = &self.words[0];
        let mut command = std::process::Command::new(program);
        command.args(&self.words[1..]).envs(variables.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(io::stderr());
        apart(&mut command);
        let mut child = command.spawn().map_err(|e| format!("{program} can't be started: {e}"))?;
        let waited = wait(&mut child, Some(limit), GRACE, stop, Whom::Group);
        match waited.map_err(|e| format!("{program} can't be waited for: {e}"))? {
            (_, Some(Cut::Late)) => Err(format!("{program} took longer than {} and was ended", span::show(limit))),
            (_, Some(Cut::Stopped)) => Err(format!("{program} was ended, for this program is to end")),
            (status, None) if status.success() => Ok(()),
            (status, None) => Err(format!("{program} failed: {status}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn run(words: &[&str], limit: u64) -> Result<(), String> {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        let command = Command::new("before", words).unwrap().unwrap();
        command.run(&[("RESEAL_VM", "web 01".into())], Duration::from_secs(limit), &AtomicBool::new(false))
    }

    #[test]
    fn a_command_is_told_what_it_is_for_and_its_failure_is_said() {
        run(&["/bin/sh", "-c", "test \"$RESEAL_VM\" = 'web 01'"], 10).unwrap();
        assert!(run(&["/bin/sh", "-c", "exit 7"], 10).unwrap_err().contains("/bin/sh failed: exit status: 7"));
        assert!(run(&["/no/such/program"], 10).unwrap_err().contains("can't be started"));
    }

    #[test]
    fn a_command_that_hangs_is_ended_with_all_that_it_started() {
        let (began, folder) = (Instant::now(), tempfile::tempdir().unwrap());
        let pid = folder.path().join("pid");
        let script = format!("trap '' TERM; sleep 600 & echo $! > {}; wait; wait", pid.display());
        let said = run(&["/bin/sh", "-c", &script], 1).unwrap_err();
        assert!(said.contains("took longer than 1s"), "{said}");
        assert!(began.elapsed() < Duration::from_secs(30));
        let pid = std::fs::read_to_string(pid).unwrap();
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        let gone = || stat().map_or(true, |stat| stat.contains(") Z "));
        while !gone() {
            assert!(began.elapsed() < Duration::from_secs(30), "the shell's child still runs");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
