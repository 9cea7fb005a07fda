//! A kit on paper: the age file in base64, in numbered lines that each carry a check, so that a line which was typed wrong is
//! named.
//!
//! ```text
//! -----BEGIN RESEAL KIT, 25 LINES-----
//!  1: YWdlLWVuY3J5cHRp b24ub3JnL3YxCi0+ IHNjcnlwdCBhLzFh QUFBQUFBQUFBQUFB  efc109
//! …
//! -----END RESEAL KIT-----
//! ```
//!
//! The check is the first six hexadecimal digits of the SHA-256 of `NUMBER:TEXT` without blanks: anybody can compute it, and
//! lines that were exchanged are found too. Blanks, empty lines and line breaks mean nothing, and what stands before and
//! after is ignored.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::corrupt;
use crate::{KmsError, base64};

/// Characters of a line, as in age's armor, and how many stand together.
const LINE: usize = 64;
const GROUP: usize = 16;

/// Characters of a check.
const CHECK: usize = 6;

/// How the first and the last line begin, without anything but letters and digits.
const BEGIN: &str = "BEGINRESEALKIT";
const END: &str = "ENDRESEALKIT";

/// How many wrong lines a message names.
const MAX_NAMED: usize = 12;

/// Longest name of the kit's file that stands on the sheet.
const MAX_NAME: usize = 60;

/// The sheet of an age file. It needs two pages at most, at 80 columns, unless the kit has many keys.
pub(super) fn encode(age: &[u8], name: &str, printed: &str, under_passphrase: bool) -> String {
    let text = base64::encode(age);
    let lines: Vec<&str> = pieces(&text, LINE).collect();
    let (opens, age_option) = match under_passphrase {
        true => ("the passphrase of this kit", ""),
        false => ("one of the age identities that it was sealed to", " -i IDENTITY"),
    };
    let identity = if under_passphrase { "" } else { " \\\n      --recovery-identity IDENTITY" };
    let name: String = name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
    let count = lines.len();
    let mut sheet = format!(
        "RECOVERY KIT OF A RESEAL TENANT

Keeps the tenant's restore points readable when the machine with the keyring, or
the KMS with the tenant's key, is gone. It opens with
{opens}, and with nothing else.
Whoever has both, and the vault, reads everything. Keep them apart from each
other and from the vault.

Printed       {printed}
File          {name}
Tenant        ________________________________________________
Vault         ________________________________________________
Other half    ________________________________________________

To use it, type or scan the lines from BEGIN to END, both included, into a file.
Blanks and line breaks mean nothing; capitals do. A line that was copied wrong
will be named. On any machine with reseal and access to the vault:

  reseal list --repo VAULT --tenant TENANT --recovery-kit FILE{identity}

The same option goes with show, verify, mount and restore. To go on with backups
under a new key:

  reseal key import FILE --repo VAULT{identity}

Without reseal: the texts between number and check are the base64 of an age file
(age-encryption.org), without blanks:

  base64 -d TEXTS | age -d{age_option}

A check is the start of the SHA-256 of NUMBER:TEXT, without blanks.

-----BEGIN RESEAL KIT, {count} LINES-----
"
    );
    for (nth, line) in lines.into_iter().enumerate() {
        let groups: Vec<&str> = pieces(line, GROUP).collect();
        let width = LINE + LINE / GROUP - 1;
        let _ = writeln!(sheet, "{:>2}: {:<width$}  {}", nth + 1, groups.join(" "), check(nth + 1, line));
    }
    sheet.push_str("-----END RESEAL KIT-----\n");
    sheet
}

/// Text in pieces of some length; the last one may be shorter. It is base64, so each byte is a character.
fn pieces(text: &str, length: usize) -> impl Iterator<Item = &str> {
    (0..text.len()).step_by(length).map(move |at| &text[at..text.len().min(at + length)])
}

fn check(number: usize, text: &str) -> String {
    hex::encode(Sha256::digest(format!("{number}:{text}")))[..CHECK].to_owned()
}

/// The age file of a sheet; none if it is no sheet.
pub(super) fn decode(path: &Path, file: &[u8]) -> Result<Option<Vec<u8>>, KmsError> {
    let text = String::from_utf8_lossy(file);
    let mut lines = text.lines();
    let Some(begin) = lines.by_ref().map(essence).find(|line| line.starts_with(BEGIN)) else { return Ok(None) };
    let count = begin.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix("LINES")?.parse::<usize>().ok());
    // Each line takes a byte at least, so a count beyond that is not what was printed.
    let count = count.filter(|count| (1..=file.len()).contains(count));
    let count = count.ok_or_else(|| corrupt(path, "its BEGIN line, which says how many lines follow"))?;
    let numbered = numbered(lines);
    let line = |number: usize| match numbered.get(&number).map(Vec::as_slice) {
        None => Err(format!("line {number} is missing")),
        Some([line]) => text_of(number, line).ok_or_else(|| format!("line {number} does not match its check")),
        Some(_) => Err(format!("line {number} is there twice")),
    };
    let strangers = numbered.keys().filter(|number| !(1..=count).contains(*number)).map(|number| match number {
        0 => "a line has no number".to_owned(),
        _ => format!("there is a line {number}, of {count}"),
    });
    let mut wrong = (1..=count).filter_map(|number| line(number).err()).chain(strangers);
    let named: Vec<String> = wrong.by_ref().take(MAX_NAMED).collect();
    if !named.is_empty() {
        let more = match wrong.count() {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        return Err(KmsError::SheetMiscopied { path: path.to_owned(), what: named.join(", ") + &more });
    }
    let whole: String = (1..=count).filter_map(|number| line(number).ok()).collect();
    let age = base64::decode(&whole).ok_or_else(|| corrupt(path, "its lines make no base64"))?;
    Ok(Some(age.to_vec()))
}

/// A line's letters and digits, in capitals.
fn essence(line: &str) -> String {
    line.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_uppercase()).collect()
}

/// What stands under each number up to the last line, without blanks. A line without a colon goes on with the one before; what
/// has no number is under 0.
fn numbered<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeMap<usize, Vec<String>> {
    let mut found: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let mut current = 0;
    for line in lines.map(|line| line.replace(char::is_whitespace, "")) {
        if line.starts_with('-') || essence(&line).starts_with(END) {
            break;
        }
        match line.split_once(':') {
            Some((number, rest)) => {
                current = number.parse().unwrap_or(0);
                found.entry(current).or_default().push(rest.to_owned());
            }
            None if line.is_empty() => {}
            None => {
                let entry = found.entry(current).or_default();
                match entry.last_mut() {
                    Some(last) => last.push_str(&line),
                    None => entry.push(line),
                }
            }
        }
    }
    found
}

/// The text of a line, if its check is right.
fn text_of(number: usize, line: &str) -> Option<&str> {
    let (text, given) = line.split_at_checked(line.len().checked_sub(CHECK)?)?;
    (!text.is_empty() && check(number, text).eq_ignore_ascii_case(given)).then_some(text)
}
