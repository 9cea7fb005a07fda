//! Passphrases: from a file, or from the terminal without echo. Never from an argument, which others can see.

use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::Path;

use reseal_kms::Passphrase;

use crate::{Failure, Status};

/// Longest first line of a passphrase file.
const MAX_LINE: u64 = 4096;

fn from_file(path: &Path) -> io::Result<Passphrase> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let file = std::fs::File::open(path).map_err(named)?;
    // The capacity is reserved, so that no part of the passphrase is moved and left behind.
    let mut line = String::with_capacity(usize::try_from(MAX_LINE).unwrap_or(0));
    BufReader::new(file.take(MAX_LINE)).read_line(&mut line).map_err(named)?;
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Passphrase::new(line).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display())))
}

fn from_terminal(prompt: &str) -> io::Result<Passphrase> {
    if !io::stdin().is_terminal() {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "no terminal to ask at; give it in a file"));
    }
    Passphrase::new(rpassword::prompt_password(prompt)?).map_err(io::Error::other)
}

/// Reads a passphrase that exists.
pub fn read_passphrase(file: Option<&Path>, prompt: &str) -> io::Result<Passphrase> {
    match file {
        Some(path) => from_file(path),
        None => from_terminal(prompt),
    }
}

/// Reads a new passphrase; from a terminal twice. `option` names the way to give it without a terminal.
pub fn read_new_passphrase(file: Option<&Path>, what: &str, option: &str) -> Result<Passphrase, Failure> {
    let failed = |e: io::Error| Failure::new(Status::Usage, format!("the passphrase of {what}: {e} ({option})"));
    let first = read_passphrase(file, &format!("New passphrase of {what}: ")).map_err(failed)?;
    if file.is_none() {
        let again = from_terminal("The same again: ").map_err(failed)?;
        if first.expose() != again.expose() {
            return Err(Failure::new(Status::Usage, "the two passphrases differ; nothing was done"));
        }
    }
    Ok(first)
}
