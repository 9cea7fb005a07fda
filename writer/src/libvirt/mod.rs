//! A domain of libvirt that is backed up while it runs.
//!
//! ```text
//! begin: domain → what a killed run left → checkpoint → scratch, secret → job    read: NBD    end: job → checkpoints
//!        (domain)       (leftover)         (checkpoint)  (scratch, secret)  (job)               → secret, scratch
//! ```
//!
//! The job is libvirt's backup in pull mode: QEMU serves each disk, as it is when the job begins, on a Unix socket, and
//! copies what the guest overwrites to a scratch file first. In the same moment a checkpoint begins to record what the
//! next backup has to read. [`session`] joins the steps.
//!
//! Architecture invariant: nothing that outlives the process is known to it alone. Folders, secrets, sockets and
//! checkpoints say by their names whose they are, so that the next `begin` removes what a killed run left; which of two
//! checkpoints counts, the newest manifest says.

mod checkpoint;
mod command;
mod domain;
mod error;
mod job;
mod leftover;
mod scratch;
mod secret;
mod session;
mod socket;
mod watch;
mod xml;

use std::path::PathBuf;
use std::time::Duration;

use reseal_format::ids::PointId;
use reseal_format::manifest::Manifest;

use self::command::Virsh;
use self::domain::Domain;
use self::session::Session;
use crate::BackupError;
use crate::live::{Hypervisor, Snapshot};
pub use error::LibvirtError;

/// Longest that libvirt may take to answer, unless something else is asked for: it waits 30 s itself for whatever else
/// happens to the domain.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Which domain, and how.
#[derive(Debug, Clone)]
pub struct LibvirtOptions {
    /// Name or UUID.
    pub domain: String,
    /// Where libvirt is; `None` leaves it to `virsh`: LIBVIRT_DEFAULT_URI, or its own choice.
    pub uri: Option<String>,
    /// The folder for what the guest overwrites meanwhile, encrypted; `None`: /var/tmp.
    pub scratch: Option<PathBuf>,
    /// The folder in which libvirt has a folder `domain-ID-NAME` for each running domain; `None`: the usual one.
    pub sockets: Option<PathBuf>,
    /// Longest that libvirt may take to answer.
    pub timeout: Duration,
}

impl LibvirtOptions {
    /// With all that has a default.
    pub fn new(domain: &str) -> LibvirtOptions {
        LibvirtOptions { domain: domain.to_owned(), uri: None, scratch: None, sockets: None, timeout: TIMEOUT }
    }
}

/// Told what undoes the backup: command lines to be run in this order, whether or not those before them succeed.
pub type Guard = Box<dyn FnMut(&[Vec<String>]) + Send>;

/// A domain, and its backup while it runs.
pub struct Libvirt {
    options: LibvirtOptions,
    virsh: Virsh,
    guard: Option<Guard>,
    session: Option<Session>,
}

impl Libvirt {
    /// Nothing is asked or changed before [`Hypervisor::begin`].
    pub fn new(options: LibvirtOptions) -> Libvirt {
        let virsh = Virsh { uri: options.uri.clone(), limit: options.timeout };
        Libvirt { options, virsh, guard: None, session: None }
    }

    /// Tells somebody who outlives this process what undoes the backup: before libvirt is asked for anything, and with an
    /// empty list when nothing is left to undo.
    pub fn guarded(mut self, guard: Guard) -> Libvirt {
        self.guard = Some(guard);
        self
    }

    /// What undoes the backup that runs, should this process die: the job ended; secret, socket and scratch gone.
    /// Checkpoints stay: whether the new one or the one before counts, the newest manifest tells the next `begin`.
    pub fn undo(&self) -> Vec<Vec<String>> {
        self.session.as_ref().map_or_else(Vec::new, |session| session.undo(&self.virsh))
    }

    fn tell_guard(&mut self) {
        let undo = self.undo();
        if let Some(guard) = &mut self.guard {
            guard(&undo);
        }
    }

    /// Refuses what is not QEMU on this machine: its sockets and files would be elsewhere.
    fn refuse_remote(&self) -> Result<(), LibvirtError> {
        let uri = self.virsh.run(&["uri"])?.trim().to_owned();
        match unusable(&uri) {
            Some(why) => Err(LibvirtError::Uri { uri, why }),
            None => Ok(()),
        }
    }

    fn try_begin(&mut self, point: PointId, since: Option<&Manifest>) -> Result<Snapshot, LibvirtError> {
        self.finish(false);
        self.refuse_remote()?;
        let domain = Domain::find(&self.virsh, &self.options.domain)?;
        let Some(id) = domain.id else {
            return Err(LibvirtError::NotRunning { domain: domain.name.clone(), disks: domain.as_files() });
        };
        domain.refuse_threads(&self.virsh)?;
        let mut warnings: Vec<_> = domain.disks.iter().filter_map(domain::DomainDisk::warning).collect();
        if domain.chosen().next().is_none() {
            let why = if warnings.is_empty() { "it has no disks".into() } else { warnings.join("; ") };
            return Err(LibvirtError::NoDisks { domain: domain.name, why });
        }
        let base = self.options.scratch.clone().unwrap_or_else(|| PathBuf::from(scratch::DEFAULT));
        warnings.extend(leftover::remove(&self.virsh, &domain, &base, since)?);
        let socket = socket::Place::find(self.options.sockets.as_deref(), &domain, id)?;
        self.session = Some(Session::open(domain, &base, socket, point)?);
        self.tell_guard();
        let begun = match &mut self.session {
            Some(session) => session.begin(&self.virsh, point, since),
            None => Ok((Vec::new(), Vec::new())),
        };
        let (disks, said) = match begun {
            Ok(begun) => begun,
            Err(e) => {
                self.finish(false);
                return Err(e);
            }
        };
        warnings.extend(said);
        let definition = self.session.as_ref().and_then(|session| session.domain().definition());
        if definition.is_none() {
            warnings.push("the domain's definition is too long to be kept".into());
        }
        Ok(Snapshot { disks, definition, warnings })
    }

    fn finish(&mut self, kept: bool) -> Vec<String> {
        let Some(mut session) = self.session.take() else { return Vec::new() };
        let warnings = session.end(&self.virsh, kept);
        self.tell_guard();
        warnings
    }
}

/// Why libvirt at that place can't be used, if so.
fn unusable(uri: &str) -> Option<&'static str> {
    let Some((scheme, rest)) = uri.split_once("://") else { return Some("it is not a URI") };
    match scheme.split_once('+').unwrap_or((scheme, "unix")) {
        ("qemu", "unix") if rest.starts_with('/') => None,
        ("qemu", _) => Some("it is on another machine; run reseal there"),
        _ => Some("only QEMU and KVM back up a domain while it runs"),
    }
}

impl Hypervisor for Libvirt {
    fn begin(&mut self, point: PointId, since: Option<&Manifest>) -> Result<Snapshot, BackupError> {
        Ok(self.try_begin(point, since)?)
    }

    fn check(&mut self) -> Result<(), BackupError> {
        match &mut self.session {
            Some(session) => Ok(session.check(&self.virsh)?),
            None => {
                let (domain, why) = (self.options.domain.clone(), "it was not begun".into());
                Err(LibvirtError::Ended { domain, why }.into())
            }
        }
    }

    fn end(&mut self, kept: bool) -> Vec<String> {
        self.finish(kept)
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.finish(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qemu_on_this_machine_is_used() {
        for uri in ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/x"] {
            assert_eq!(unusable(uri), None, "{uri}");
        }
        for uri in ["qemu+ssh://host/system", "qemu+unix://host/system", "qemu://host/system", "xen:///system", "x"] {
            assert!(unusable(uri).is_some(), "{uri}");
        }
    }
}
