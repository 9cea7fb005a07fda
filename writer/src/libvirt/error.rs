//! What can go wrong with a domain of libvirt.

use std::io;
use std::path::PathBuf;

use reseal_cli::Status;

/// A domain that could not be read. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    #[error("{program} is not installed: install the package {package}")]
    Missing { program: &'static str, package: &'static str },
    #[error("can't run {program}: {source}")]
    Run { program: &'static str, source: io::Error },
    #[error(
        "`{command}` did not answer within {seconds} s; see whether libvirtd and QEMU still answer, and how busy the machine is"
    )]
    Slow { command: String, seconds: u64 },
    #[error("`{command}` failed: {said}")]
    Said { command: String, said: String },
    #[error("`{command}` answered with something that can't be used: {why}")]
    Answer { command: String, why: String },
    #[error("libvirt at {uri} can't be used: {why}")]
    Uri { uri: String, why: &'static str },
    #[error("there is no domain {domain:?}: {said}; `virsh list --all` shows their names")]
    NoDomain { domain: String, said: String },
    #[error("{given:?} is the id of a running domain, and ids change; name it: --libvirt {name:?}")]
    Id { given: String, name: String },
    #[error("the domain {domain} does not run, so its disks lie still: back them up directly ({disks})")]
    NotRunning { domain: String, disks: String },
    #[error("the domain {domain} has no writable disk that could be backed up ({why})")]
    NoDisks { domain: String, why: String },
    #[error(
        "a disk of the domain {domain} runs in a thread of its own (iothread=), and QEMU {major} could abort the VM when it is \
             read over NBD; take QEMU 9.0 or newer, or start the domain without iothread= for its disks"
    )]
    Threads { domain: String, major: u64 },
    #[error("another backup of the domain {domain} is running ({by}); wait for it, or end it with `virsh domjobabort`")]
    Busy { domain: String, by: String },
    #[error("QEMU runs the domain {domain} as user {qemu}, whose exports user {own} can't open: run this as root")]
    User { domain: String, qemu: u32, own: u32 },
    #[error("can't {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the path {path:?} can't be used for {what}: {why}")]
    Path { path: PathBuf, what: &'static str, why: &'static str },
    #[error(
        "the scratch folder {folder} has {free} bytes left, and {needed} are needed for what the guest overwrites \
             meanwhile; make room, or name another folder with --scratch"
    )]
    NoRoom { folder: PathBuf, free: u64, needed: u64 },
    #[error(
        "the backup was ended, so that the guest would not meet a full disk: the scratch folder {folder} had only {free} \
             bytes left for what the guest overwrites; make room, or name another folder with --scratch"
    )]
    RanOut { folder: PathBuf, free: u64 },
    #[error(
        "can't begin the backup of the domain {domain} (scratch in {folder}, which QEMU must be able to enter): {said}"
    )]
    Begin { domain: String, folder: PathBuf, said: String },
    #[error("the backup of the domain {domain} ended before everything was read: {why}; nothing was committed")]
    Ended { domain: String, why: String },
    #[error("a thread that made a scratch file ended unexpectedly")]
    Thread,
    #[error("the kernel gives no random bytes: {0}")]
    Random(getrandom::Error),
}

impl LibvirtError {
    /// What the program said, if that was the error.
    pub(super) fn said(&self) -> Option<&str> {
        match self {
            LibvirtError::Said { said, .. } => Some(said),
            _ => None,
        }
    }

    /// The exit status that it leads to.
    pub fn status(&self) -> Status {
        match self {
            LibvirtError::Uri { .. }
            | LibvirtError::NoDomain { .. }
            | LibvirtError::Id { .. }
            | LibvirtError::NotRunning { .. }
            | LibvirtError::NoDisks { .. }
            | LibvirtError::User { .. }
            | LibvirtError::Path { .. } => Status::Usage,
            LibvirtError::Missing { .. }
            | LibvirtError::Run { .. }
            | LibvirtError::Answer { .. }
            | LibvirtError::File { .. }
            | LibvirtError::NoRoom { .. }
            | LibvirtError::RanOut { .. }
            | LibvirtError::Thread
            | LibvirtError::Threads { .. }
            | LibvirtError::Random(_) => Status::Failed,
            LibvirtError::Slow { .. }
            | LibvirtError::Said { .. }
            | LibvirtError::Busy { .. }
            | LibvirtError::Begin { .. }
            | LibvirtError::Ended { .. } => Status::Unreachable,
        }
    }
}
