//! libvirt's backup job: what it is asked for, what it says of itself, and its end.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use reseal_qemu::xml::escape;

use super::LibvirtError;
use super::command::Virsh;
use super::domain::Domain;
use super::xml::{child, read};

/// Name of the bitmap of changes in each export.
pub(super) const BITMAP: &str = "reseal-changes";
/// How long to wait between two looks at whether a job has ended.
const POLL: Duration = Duration::from_millis(50);

/// What is asked of the job for a disk.
pub(super) struct Part<'a> {
    pub target: &'a str,
    /// The scratch file; `None` leaves the disk out.
    pub scratch: Option<&'a str>,
    /// The checkpoint since which changes are wanted.
    pub since: Option<&'a str>,
}

/// The job as libvirt wants it described.
pub(super) fn xml<'a>(socket: &str, secret: &str, parts: impl Iterator<Item = Part<'a>>) -> String {
    let mut disks = String::new();
    for part in parts {
        let target = escape(part.target);
        let Some(scratch) = part.scratch else {
            disks.push_str(&format!("<disk name='{target}' backup='no'/>"));
            continue;
        };
        let mode = match part.since {
            Some(since) => {
                format!("backupmode='incremental' incremental='{}' exportbitmap='{BITMAP}'", escape(since))
            }
            None => "backupmode='full'".into(),
        };
        disks.push_str(&format!(
            "<disk name='{target}' backup='yes' type='file' exportname='{target}' {mode}><driver type='qcow2'/>\
             <scratch file='{}'><encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption></scratch>\
             </disk>",
            escape(scratch),
            escape(secret)
        ));
    }
    let socket = escape(socket);
    format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>{disks}</disks></domainbackup>"
    )
}

/// A job that runs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Job {
    /// Where it serves the disks.
    pub socket: Option<PathBuf>,
    /// The folder of its first scratch file.
    pub scratch: Option<PathBuf>,
}

impl Job {
    /// The job of a domain, if there is one.
    pub(super) fn find(virsh: &Virsh, domain: &str) -> Result<Option<Job>, LibvirtError> {
        match virsh.run(&["backup-dumpxml", domain]) {
            Ok(xml) => Job::parse(&xml).map(Some),
            Err(e) => match e.said() {
                Some(said) if said.contains("no domain backup job") || said.contains("not running") => Ok(None),
                _ => Err(e),
            },
        }
    }

    fn parse(xml: &str) -> Result<Job, LibvirtError> {
        read(xml, "virsh backup-dumpxml", "domainbackup", |root| {
            let socket = child(root, "server").and_then(|server| server.attribute("socket"));
            let disks = child(root, "disks").into_iter().flat_map(|disks| disks.children());
            let mut scratch = disks.filter_map(|disk| child(disk, "scratch")?.attribute("file"));
            let folder = scratch.next().and_then(|file| Path::new(file).parent());
            Some(Job { socket: socket.map(PathBuf::from), scratch: folder.map(Path::to_owned) })
        })
    }

    /// How it is told to people.
    pub(super) fn describe(&self) -> String {
        match &self.socket {
            Some(socket) => format!("it serves {}", socket.display()),
            None => "it is another program's".into(),
        }
    }
}

/// Ends the job of that socket, if it runs, and waits for its end. libvirt ends what is read this way by aborting it.
pub(super) fn end(virsh: &Virsh, domain: &Domain, socket: Option<&Path>) -> Result<(), LibvirtError> {
    let runs =
        || Ok::<_, LibvirtError>(Job::find(virsh, &domain.uuid)?.is_some_and(|job| job.socket.as_deref() == socket));
    if !runs()? {
        return Ok(());
    }
    let aborted = virsh.run(&["domjobabort", &domain.uuid]);
    let began = Instant::now();
    while runs()? {
        // Where it could not be aborted it may have ended by itself just then.
        aborted
            .as_ref()
            .map_err(|e| LibvirtError::Said { command: "virsh domjobabort".into(), said: e.to_string() })?;
        if began.elapsed() > virsh.limit {
            let command = "virsh domjobabort".into();
            return Err(LibvirtError::Slow { command, seconds: virsh.limit.as_secs() });
        }
        thread::sleep(POLL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_reads_back() {
        let parts = [
            Part { target: "vda", scratch: Some("/s/a'b/disk-0.qcow2"), since: Some("reseal-x") },
            Part { target: "sda", scratch: None, since: None },
        ];
        let xml = xml("/run/a&b.sock", "u", parts.into_iter());
        let job = Job::parse(&xml).unwrap();
        assert_eq!(job.socket.as_deref(), Some(Path::new("/run/a&b.sock")));
        assert_eq!(job.scratch.as_deref(), Some(Path::new("/s/a'b")));
        let other = Job::parse("<domainbackup mode='push'><disks/></domainbackup>").unwrap();
        assert_eq!(other, Job { socket: None, scratch: None });
        assert!(Job::parse("<domain/>").is_err());
    }
}
