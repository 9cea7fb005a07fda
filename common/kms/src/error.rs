//! What went wrong: with which file and key, and what to do about it.
//!
//! A message never holds a secret, nor text from a file that may hold one. The cause is in `source()` and not repeated.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// What a caller does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The KMS, or the key in it, can't be had now: bring it back and retry (exit status 4).
    Unreachable,
    /// Something stored is altered, cut short, or belongs to another key (exit status 3).
    Damaged,
    /// What was asked for is wrong in itself (exit status 2).
    Usage,
    /// Anything else (exit status 1).
    Failed,
}

/// Any failure of this crate.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KmsError {
    // Names, passphrases, lengths.
    #[error("{name:?} can't name a key: use 1 to 128 of A-Z a-z 0-9 . _ -, starting with a letter or digit")]
    InvalidName { name: String },
    #[error("the passphrase is empty: type one, or do without")]
    EmptyPassphrase,
    #[error("{what} of {len} bytes: at most {limit} are allowed")]
    TooLong { what: &'static str, len: usize, limit: usize },

    // Files.
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is larger than {limit} bytes: it is no keyring and no recovery kit", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("{} holds keys, and others may access it (mode {mode:04o}): run `chmod 600 {}`", path.display(), path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{} holds keys and belongs to user {owner}, not to you (user {user}): run as its owner, or `chown` it", path.display())]
    ForeignOwner { path: PathBuf, owner: u32, user: u32 },
    #[error("another process keeps {} locked: wait for it, or end it", path.display())]
    Busy { path: PathBuf },

    // The keyring.
    #[error("there is no keyring at {}: set RESEAL_KEYRING to where it is, or bring the keys back with `reseal key import KIT`", path.display())]
    KeyringMissing { path: PathBuf },
    #[error("there is a keyring at {} already: it is kept as it is", path.display())]
    KeyringExists { path: PathBuf },
    #[error("the keyring {} ends too early: restore it from a copy, or bring the keys back with `reseal key import KIT`", path.display())]
    KeyringTruncated { path: PathBuf },
    #[error("the keyring {} is damaged ({what}): restore it from a copy, or bring the keys back with `reseal key import KIT`", path.display())]
    KeyringCorrupt { path: PathBuf, what: String },
    #[error("the keyring {} has format version {found}, this program knows {known}: use a newer reseal", path.display())]
    KeyringVersion { path: PathBuf, found: u64, known: u64 },
    #[error("the keyring {} is full ({limit} keys): keep further tenants' keys in another one", path.display())]
    KeyringFull { path: PathBuf, limit: usize },
    #[error("the keyring {} needs its passphrase, which can't be had", path.display())]
    PassphraseUnavailable { path: PathBuf, source: io::Error },
    #[error("wrong passphrase for the keyring {}: try again (if it is surely right, the file is damaged: restore it from a copy)", path.display())]
    WrongPassphrase { path: PathBuf },
    #[error("the passphrase of the keyring {} was changed by another process: open it again with the new one", path.display())]
    PassphraseChanged { path: PathBuf },

    // Keys.
    #[error("the key {key} is not in the keyring {}: bring it with `reseal key import KIT` from its recovery kit", path.display())]
    KeyMissing { path: PathBuf, key: String },
    #[error("the key {key} is in the keyring {} already: choose another name", path.display())]
    KeyExists { path: PathBuf, key: String },
    #[error("the keyring {} has another key named {key}: nothing was imported; import into another keyring (RESEAL_KEYRING)", path.display())]
    KeyConflict { path: PathBuf, key: String },

    // A KMS over the network. `kms` is its kind and address, as the operator's configuration has it.
    #[error(
        "{kms} can't be reached for the key {key} ({what}): see that it runs and that the network is up, then try again"
    )]
    NotReached { kms: String, key: String, what: String },
    #[error("{kms} is sealed, so the key {key} can't be used: unseal it, then try again")]
    Sealed { kms: String, key: String },
    #[error("{kms} refuses to {action} with the key {key} ({what}): see that the credentials are valid and allow it")]
    Denied { kms: String, key: String, action: &'static str, what: String },
    #[error("{kms} has no key {key}: bring the key back, or correct the KMS in the configuration")]
    NoSuchKey { kms: String, key: String },
    #[error("{kms} has a key {key} already: choose another name")]
    KeyTaken { kms: String, key: String },
    #[error("{kms} has a key {key} that can't be trusted with this ({what})")]
    UnfitKey { kms: String, key: String, what: &'static str },
    #[error("{kms} answered what makes no sense for the key {key} ({what}): is it really such a KMS?")]
    BadAnswer { kms: String, key: String, what: String },
    #[error(
        "{kms} does not open this tenant's record with the key {key}: the record is altered or belongs to another vault or tenant, or it is another key of that name"
    )]
    NotOpened { kms: String, key: String },
    #[error(
        "{kms} does not open this tenant's record with the key {key}: a version of that key wrapped it which is no longer allowed to decrypt; either an old record was put back (restore the newest one), or min_decryption_version was raised before `reseal rekey --kek` (lower it again)"
    )]
    Retired { kms: String, key: String },
    #[error("the KMS configuration {}: {what}", path.display())]
    Config { path: PathBuf, what: String },
    #[error("{}, a file that the KMS configuration names: {what}", path.display())]
    ConfigNames { path: PathBuf, what: String },

    // Wrapped payloads.
    #[error("what was wrapped under the key {key} is cut short to {len} bytes: restore the tenant record from a copy")]
    WrappedTruncated { key: String, len: usize },
    #[error("what was wrapped under the key {key} is too long ({len} bytes): restore the tenant record from a copy")]
    WrappedTooLong { key: String, len: usize },
    #[error(
        "what was wrapped under the key {key} has format version {found}, this program knows {known}: use a newer reseal, or restore the tenant record from a copy"
    )]
    WrappedVersion { key: String, found: u8, known: u8 },
    #[error("the key {key} of the keyring {} does not open this tenant's record: the record is altered or belongs to another vault or tenant, or the keyring has another key of that name", path.display())]
    Unwrap { path: PathBuf, key: String },

    // Recovery kits.
    #[error("there is no recovery kit at {}: check the path, and that its medium is mounted", path.display())]
    KitMissing { path: PathBuf },
    #[error("{} exists already and is not overwritten: name another file", path.display())]
    KitExists { path: PathBuf },
    #[error("can't write the recovery kit {}: {what}", path.display())]
    KitInvalid { path: PathBuf, what: &'static str },
    #[error("{} is no recovery kit: it is neither an age file nor a sheet with one", path.display())]
    NotAKit { path: PathBuf },
    #[error("the recovery kit {} is sealed to age recipients: give one of their identities (--recovery-identity FILE)", path.display())]
    KitNeedsIdentity { path: PathBuf },
    #[error("the recovery kit {} is under a passphrase, not sealed to age recipients: leave out --recovery-identity", path.display())]
    KitNeedsPassphrase { path: PathBuf },
    #[error("the recovery kit {} is sealed to other age recipients: give an identity of one of those", path.display())]
    KitOtherRecipients { path: PathBuf },
    #[error("the sheet {} was not copied right: {what}; compare with the paper and correct it", path.display())]
    SheetMiscopied { path: PathBuf, what: String },
    #[error("the recipient {text:?} can't be used: {what}")]
    Recipient { text: String, what: &'static str },
    #[error("{count} recipients for one recovery kit: give 1 to {limit}")]
    Recipients { count: usize, limit: usize },
    #[error("{}: {what}", path.display())]
    AgeFile { path: PathBuf, what: String },
    #[error("wrong passphrase for the recovery kit {}: try again (if it is surely right, the kit is damaged: use another copy)", path.display())]
    KitWrongPassphrase { path: PathBuf },
    #[error("the recovery kit {} is damaged or cut short ({what}): use another copy", path.display())]
    KitCorrupt { path: PathBuf, what: String },
    #[error("the recovery kit {} has format version {found}, this program knows {known}: use a newer reseal", path.display())]
    KitVersion { path: PathBuf, found: u64, known: u64 },
    #[error("the passphrase of the recovery kit {} costs 2^{required} to check, more than the allowed 2^{limit}: reseal wrote no such kit", path.display())]
    KitTooCostly { path: PathBuf, required: u8, limit: u8 },

    // The machine.
    #[error("the kernel gives no random bytes")]
    Random(#[source] getrandom::Error),
    #[error("can't turn the passphrase into a key: that takes {memory_kib} KiB of memory; free some and retry")]
    Kdf { memory_kib: u32 },
}

impl KmsError {
    /// Whether the key is not there: whoever repeats an interrupted erasure takes that as done.
    pub fn is_key_missing(&self) -> bool {
        matches!(self, Self::KeyMissing { .. } | Self::NoSuchKey { .. })
    }

    /// Whether a key of that name is there already.
    pub fn is_key_taken(&self) -> bool {
        matches!(self, Self::KeyExists { .. } | Self::KeyTaken { .. })
    }

    /// Whether the wrapped bytes were not opened, as far as the KMS was asked.
    pub fn is_not_opened(&self) -> bool {
        matches!(self, Self::Unwrap { .. } | Self::NotOpened { .. } | Self::Retired { .. })
    }

    /// What to do about it. Exhaustive on purpose: a new variant forces the decision.
    pub fn class(&self) -> Class {
        match self {
            Self::Io { .. } | Self::Busy { .. } => Class::Unreachable,
            Self::KeyringMissing { .. } | Self::KeyMissing { .. } => Class::Unreachable,
            Self::KitMissing { .. } => Class::Unreachable,
            Self::NotReached { .. } | Self::Sealed { .. } | Self::Denied { .. } => Class::Unreachable,
            Self::NoSuchKey { .. } | Self::BadAnswer { .. } => Class::Unreachable,

            Self::KeyringTruncated { .. } | Self::KeyringCorrupt { .. } => Class::Damaged,
            Self::WrappedTruncated { .. } | Self::WrappedTooLong { .. } => Class::Damaged,
            Self::WrappedVersion { .. } | Self::Unwrap { .. } => Class::Damaged,
            Self::KitCorrupt { .. } | Self::NotOpened { .. } | Self::Retired { .. } => Class::Damaged,
            Self::SheetMiscopied { .. } => Class::Damaged,

            Self::InvalidName { .. } | Self::EmptyPassphrase | Self::TooLong { .. } => Class::Usage,
            Self::KitExists { .. } | Self::KitInvalid { .. } | Self::NotAKit { .. } => Class::Usage,
            Self::KitNeedsIdentity { .. } | Self::KitNeedsPassphrase { .. } => Class::Usage,
            Self::Recipient { .. } | Self::Recipients { .. } | Self::AgeFile { .. } => Class::Usage,
            Self::Config { .. } | Self::ConfigNames { .. } => Class::Usage,

            Self::NotAFile { .. } | Self::TooLarge { .. } => Class::Failed,
            Self::Exposed { .. } | Self::ForeignOwner { .. } => Class::Failed,
            Self::KeyringExists { .. } | Self::KeyringVersion { .. } | Self::KeyringFull { .. } => Class::Failed,
            Self::PassphraseUnavailable { .. } | Self::PassphraseChanged { .. } => Class::Failed,
            Self::WrongPassphrase { .. } | Self::KitWrongPassphrase { .. } => Class::Failed,
            Self::KitOtherRecipients { .. } => Class::Failed,
            Self::KeyExists { .. } | Self::KeyConflict { .. } => Class::Failed,
            Self::KeyTaken { .. } | Self::UnfitKey { .. } => Class::Failed,
            Self::KitVersion { .. } | Self::KitTooCostly { .. } => Class::Failed,
            Self::Random(_) | Self::Kdf { .. } => Class::Failed,
        }
    }
}
