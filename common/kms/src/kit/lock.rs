//! What a kit is sealed to, and what opens it: a passphrase, or age's X25519 recipients and their identities.
//!
//! A passphrase also proves that whoever sealed the kit knew it. Recipients prove nothing: anybody may seal to them.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use age::armor::{ArmoredWriter, Format};
use age::secrecy::SecretString;
use age::{Encryptor, scrypt, x25519};
use aws_lc_rs::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::rand::SystemRandom;

use super::sealed;
use crate::{KmsError, Passphrase, private_file};

/// log2 of the scrypt cost of a new kit: 256 MiB, under a second on a server, and what `age` itself takes. Fixed, not measured on
/// this machine: the one that recovers may be smaller.
pub(super) const WORK_FACTOR: u8 = 18;

/// Highest cost that is accepted: 1 GiB. A hostile kit must not take the machine's memory.
pub(super) const MAX_WORK_FACTOR: u8 = 20;

/// Most recipients of a kit, and identities that are tried on one: the header stays small, and its cost bounded.
const MAX_PEOPLE: usize = 64;

/// Largest file of recipients or identities.
const MAX_FILE: u64 = 64 * 1024;

/// How a secret of age begins: text that does is never shown.
const IDENTITY: &str = "AGE-SECRET-KEY-1";

/// What a new kit is sealed to.
#[derive(Debug)]
pub enum KitLock {
    /// Whoever knows it opens the kit.
    Passphrase(Passphrase),
    /// Each alone opens the kit.
    Recipients(Vec<Recipient>),
}

/// A public age key, `age1…`: it seals, and only its identity opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient(x25519::Recipient);

/// What opens a kit.
pub enum KitKey {
    /// What it was sealed with.
    Passphrase(Passphrase),
    /// Of which one is enough.
    Identities(Vec<x25519::Identity>),
}

impl fmt::Debug for KitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passphrase(_) => f.write_str("KitKey(passphrase, redacted)"),
            Self::Identities(identities) => write!(f, "KitKey({} identities, redacted)", identities.len()),
        }
    }
}

impl FromStr for Recipient {
    type Err = KmsError;

    fn from_str(text: &str) -> Result<Self, KmsError> {
        let refused = |what| Err(KmsError::Recipient { text: shown(text), what });
        if text.to_ascii_uppercase().starts_with(IDENTITY) {
            return refused("it is an identity, which is secret; `age-keygen -y` shows its recipient");
        }
        let Ok(recipient) = x25519::Recipient::from_str(text) else {
            return refused("it is no age X25519 recipient, age1 and 58 more letters and digits");
        };
        if !is_strong(text) {
            return refused("anybody could open what is sealed to it");
        }
        Ok(Self(recipient))
    }
}

/// As much of a recipient as a message shows.
fn shown(text: &str) -> String {
    match text.to_ascii_uppercase().contains("SECRET-KEY") {
        true => "AGE-SECRET-KEY-…".to_owned(),
        false => text.chars().take(80).collect(),
    }
}

/// Whether a secret shared with this public key is one: there are points that give zeros to everybody, and age would not go on
/// with those.
fn is_strong(recipient: &str) -> bool {
    let Ok((_, point)) = bech32::decode(recipient) else { return false };
    let Ok(own) = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()) else { return false };
    agreement::agree_ephemeral(own, UnparsedPublicKey::new(&X25519, &point), (), |_| Ok(())).is_ok()
}

impl KitLock {
    /// Recipients that each open the kit.
    pub fn recipients(recipients: Vec<Recipient>) -> Result<Self, KmsError> {
        if recipients.is_empty() || recipients.len() > MAX_PEOPLE {
            return Err(KmsError::Recipients { count: recipients.len(), limit: MAX_PEOPLE });
        }
        Ok(Self::Recipients(recipients))
    }

    pub(super) fn seal(&self, plaintext: &[u8], work_factor: u8) -> io::Result<Vec<u8>> {
        let encryptor = match self {
            Self::Passphrase(passphrase) => {
                let mut recipient = scrypt::Recipient::new(secret(passphrase));
                recipient.set_work_factor(work_factor);
                Encryptor::with_recipients(std::iter::once(&recipient as &dyn age::Recipient))
            }
            Self::Recipients(recipients) => {
                Encryptor::with_recipients(recipients.iter().map(|Recipient(one)| one as &dyn age::Recipient))
            }
        };
        let encryptor = encryptor.map_err(io::Error::other)?;
        let armor = ArmoredWriter::wrap_output(Vec::new(), Format::AsciiArmor)?;
        let mut writer = encryptor.wrap_output(armor)?;
        writer.write_all(plaintext)?;
        writer.finish()?.finish()
    }
}

/// age keeps its own copy, and wipes it.
pub(super) fn secret(passphrase: &Passphrase) -> SecretString {
    SecretString::from(passphrase.expose())
}

/// The recipients of a file: one a line, empty lines and those that begin with `#` left out.
pub fn read_recipients(path: &Path) -> Result<Vec<Recipient>, KmsError> {
    let wrong = |what: String| KmsError::AgeFile { path: path.to_owned(), what };
    let bytes = private_file::read(path, MAX_FILE)?.ok_or_else(|| wrong("there is no such file".into()))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("it is not UTF-8".into()))?;
    let parse = |(number, line): (usize, &str)| {
        line.parse::<Recipient>().map_err(|error| wrong(format!("line {number}: {error}")))
    };
    let recipients = entries(text).map(parse).collect::<Result<Vec<_>, _>>()?;
    match recipients.is_empty() {
        true => Err(wrong("there is no recipient in it".into())),
        false => Ok(recipients),
    }
}

/// The identities of a file that only its owner may read. One under a passphrase, as `age -p` makes it, opens with that;
/// `passphrase` is asked only then.
pub fn read_identities(
    path: &Path,
    passphrase: impl FnOnce(&Path) -> io::Result<Passphrase>,
) -> Result<KitKey, KmsError> {
    let wrong = |what: &str| KmsError::AgeFile { path: path.to_owned(), what: what.to_owned() };
    let bytes = private_file::read_private(path, MAX_FILE)?.ok_or_else(|| wrong("there is no such file"))?;
    let opened = match sealed::is_age(&bytes) {
        true => {
            let asked =
                passphrase(path).map_err(|e| wrong(&format!("it needs its passphrase, which can't be had: {e}")))?;
            sealed::open(path, &bytes, &KitKey::Passphrase(asked)).map_err(|error| match error {
                KmsError::KitWrongPassphrase { .. } => wrong("wrong passphrase for these identities: try again"),
                _ => wrong("it is an age file, but not of identities under a passphrase, or it is damaged"),
            })?
        }
        false => bytes,
    };
    let text = std::str::from_utf8(&opened).map_err(|_| wrong("it is not UTF-8"))?;
    // The text is never quoted: it is secret, or something else altogether.
    let parse = |(number, line): (usize, &str)| {
        let what = || wrong(&format!("line {number} is no age X25519 identity ({IDENTITY}…)"));
        x25519::Identity::from_str(line).map_err(|_| what())
    };
    let identities = entries(text).map(parse).collect::<Result<Vec<_>, _>>()?;
    match identities.len() {
        0 => Err(wrong("there is no identity in it")),
        1..=MAX_PEOPLE => Ok(KitKey::Identities(identities)),
        _ => Err(wrong("there are more than 64 identities in it")),
    }
}

/// What counts of a file with one entry a line, and the numbers of the lines.
fn entries(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(nth, line)| (nth + 1, line.trim()));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}
