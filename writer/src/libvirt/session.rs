//! One backup of a domain, from the moment that is read to the last trace of it.

use std::fs;
use std::path::{Path, PathBuf};

use reseal_format::ids::PointId;
use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;

use super::command::Virsh;
use super::domain::{Domain, DomainDisk};
use super::job::{self, BITMAP, Job, Part};
use super::scratch::Scratch;
use super::secret::{self, Secret};
use super::socket::{self, Place};
use super::watch::Watch;
use super::{LibvirtError, checkpoint};
use crate::live::SnapshotDisk;

/// What exists because of a backup.
pub(super) struct Session {
    domain: Domain,
    /// Name of its checkpoint, if any of the disks can be tracked.
    checkpoint: Option<String>,
    scratch: Scratch,
    secret: String,
    socket: PathBuf,
    place: Place,
    /// Whether libvirt was asked to begin: from then on there may be a job and a checkpoint.
    asked: bool,
    watch: Option<Watch>,
}

/// A disk that is backed up.
struct Chosen {
    disk: DomainDisk,
    name: DiskName,
    length: u64,
    /// The checkpoint that holds its changes, or why none does.
    since: Result<String, String>,
}

impl Session {
    /// Makes the folder that the rest is in or named after. libvirt is not asked for anything yet.
    pub(super) fn open(domain: Domain, base: &Path, place: Place, point: PointId) -> Result<Session, LibvirtError> {
        let scratch = Scratch::create(base, &domain.uuid, point)?;
        let socket = place.path(point, scratch.folder()).inspect_err(|_| drop(scratch.remove()))?;
        let tracked = domain.chosen().any(|disk| disk.untracked.is_none());
        let checkpoint = tracked.then(|| checkpoint::name(point));
        Ok(Session { domain, checkpoint, scratch, secret: as_uuid(point), socket, place, asked: false, watch: None })
    }

    /// The domain, as it was when the backup began.
    pub(super) fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Takes the moment; the disks, and what the administrator should know.
    pub(super) fn begin(
        &mut self,
        virsh: &Virsh,
        point: PointId,
        since: Option<&Manifest>,
    ) -> Result<(Vec<SnapshotDisk>, Vec<String>), LibvirtError> {
        let mut chosen = self.choose(virsh, since)?;
        let secret = Secret::new(self.secret.clone())?;
        let lengths: Vec<_> = chosen.iter().map(|disk| disk.length).collect();
        self.scratch.add(&lengths, &secret, self.place.owner())?;
        self.scratch.reserve()?;
        secret.define(virsh, &self.scratch.path("")?)?;
        self.asked = true;
        self.start(virsh, &mut chosen)?;
        let (folder, files) = (self.scratch.folder().to_owned(), self.scratch.files().to_vec());
        self.watch = Some(Watch::start(folder, files, virsh.clone(), self.domain.uuid.clone()));
        let warnings = self.remove_unused(virsh, since, &chosen).into_iter().collect();
        let tracking = |chosen: &Chosen| {
            let tracked = chosen.disk.untracked.is_none();
            tracked.then(|| checkpoint::tracking(&checkpoint::name(point), &self.domain))
        };
        let disks = chosen.iter().map(|chosen| SnapshotDisk {
            name: chosen.name.clone(),
            socket: self.socket.clone(),
            export: chosen.disk.target.clone(),
            changes: chosen.since.clone().map(|_| BITMAP.to_owned()),
            tracking: tracking(chosen),
            source: format!("libvirt domain {}, {}: {}", self.domain.name, chosen.disk.target, chosen.disk.source),
        });
        Ok((disks.collect(), warnings))
    }

    /// The disks that are read, in the domain's order, and what can be said of their changes.
    fn choose(&self, virsh: &Virsh, since: Option<&Manifest>) -> Result<Vec<Chosen>, LibvirtError> {
        let lengths = self.domain.lengths(virsh)?;
        let present = checkpoint::list_own(virsh, &self.domain)?;
        let unknown = |disk: &DomainDisk| LibvirtError::Answer {
            command: "virsh domstats --block".into(),
            why: format!("it lacks the length of {}", disk.target),
        };
        let choose = |disk: &DomainDisk| {
            let length = *lengths.get(&disk.target).ok_or_else(|| unknown(disk))?;
            let name = DiskName::new(&disk.target).map_err(|_| unknown(disk))?;
            let since = checkpoint::usable(disk, length, &self.domain, since, &present);
            Ok(Chosen { disk: disk.clone(), name, length, since })
        };
        self.domain.chosen().map(choose).collect()
    }

    /// Begins the job. A disk whose checkpoint libvirt refuses is asked for whole.
    fn start(&self, virsh: &Virsh, chosen: &mut [Chosen]) -> Result<(), LibvirtError> {
        let (domain, scratch) = (&self.domain, &self.scratch);
        let write = |name: &str, text: String| {
            let path = scratch.path(name)?;
            let written = fs::write(&path, text);
            written.map_err(|source| LibvirtError::File { action: "write", path: PathBuf::from(&path), source })?;
            Ok::<_, LibvirtError>(path)
        };
        let socket = self.socket.to_string_lossy();
        let mut words = vec!["backup-begin".to_owned(), domain.uuid.clone(), "--reuse-external".into()];
        if let Some(name) = &self.checkpoint {
            let tracked = chosen.iter().filter(|chosen| chosen.disk.untracked.is_none());
            let text = checkpoint::xml(name, tracked.map(|chosen| chosen.disk.target.as_str()));
            words.extend(["--checkpointxml".into(), write("checkpoint.xml", text)?]);
        }
        loop {
            let parts = domain.disks.iter().map(|disk| {
                let nth = chosen.iter().position(|chosen| chosen.disk == *disk);
                let since = nth.and_then(|nth| chosen[nth].since.as_deref().ok());
                Part { target: &disk.target, scratch: nth.map(|nth| &*scratch.files()[nth].path), since }
            });
            let job = write("job.xml", job::xml(&socket, &self.secret, parts))?;
            let words: Vec<_> = words.iter().map(String::as_str).chain(["--backupxml", &job]).collect();
            let Err(e) = virsh.run(&words) else { return Ok(()) };
            let Some(said) = e.said() else { return Err(e) };
            let refused = refused(chosen, said);
            if refused.is_empty() {
                let folder = scratch.folder().to_owned();
                return Err(LibvirtError::Begin { domain: domain.name.clone(), folder, said: said.into() });
            }
            for nth in refused {
                if let Ok(since) = &chosen[nth].since {
                    chosen[nth].since = Err(format!("libvirt can't use the checkpoint {since}: {said}"));
                }
            }
        }
    }

    /// Removes the checkpoint of the newest point if no disk starts from it: what is broken or gone records nothing.
    fn remove_unused(&self, virsh: &Virsh, since: Option<&Manifest>, chosen: &[Chosen]) -> Option<String> {
        let since = since?;
        let name = checkpoint::name(since.point_id);
        let made = checkpoint::tracking(&name, &self.domain);
        let exists = since.disks.iter().any(|disk| disk.tracking.as_ref() == Some(&made));
        let used = chosen.iter().any(|chosen| chosen.since.as_ref() == Ok(&name));
        if !exists || used {
            return None;
        }
        let removed = checkpoint::remove(virsh, &self.domain, &name);
        removed.err().map(|e| format!("the checkpoint {name}, which can't be used, was not removed: {e}"))
    }

    /// An error unless the job still runs that began with this session.
    pub(super) fn check(&mut self, virsh: &Virsh) -> Result<(), LibvirtError> {
        if let Some(found) = self.watch.as_mut().and_then(Watch::found) {
            return Err(found);
        }
        let job = Job::find(virsh, &self.domain.uuid);
        if let Ok(Some(job)) = &job
            && job.socket.as_ref() == Some(&self.socket)
        {
            return Ok(());
        }
        // The watch may have ended it a moment ago, and be about to say why.
        if let Some(found) = self.watch.as_mut().and_then(Watch::stop) {
            return Err(found);
        }
        let why = match job {
            Ok(_) => match Domain::find(virsh, &self.domain.uuid) {
                Ok(now) if now.id == self.domain.id => "its job was ended or failed; libvirt's log may say why".into(),
                Ok(Domain { id: Some(_), .. }) => "the domain was stopped, and started again".into(),
                Ok(_) => "the domain was stopped".into(),
                Err(e) => e.to_string(),
            },
            Err(e) => e.to_string(),
        };
        Err(LibvirtError::Ended { domain: self.domain.name.clone(), why })
    }

    /// Removes all of it but what the next backup needs; what could not be removed.
    pub(super) fn end(&mut self, virsh: &Virsh, kept: bool) -> Vec<String> {
        if let Some(mut watch) = self.watch.take() {
            watch.stop();
        }
        let mut failed = Vec::new();
        let mut note = |what: String, result: Result<(), LibvirtError>| {
            if let Err(e) = result {
                failed
                    .push(format!("{what} could not be removed, which the next backup of the domain tries again: {e}"));
            }
        };
        if self.asked {
            note("the backup job".into(), job::end(virsh, &self.domain, Some(&self.socket)));
            note("checkpoints".into(), self.end_checkpoints(virsh, kept));
        }
        note("the secret of the scratch files".into(), secret::undefine(virsh, &self.secret));
        note(format!("the socket {}", self.socket.display()), socket::remove(&self.socket));
        note(format!("the scratch folder {}", self.scratch.folder().display()), self.scratch.remove());
        failed
    }

    /// Removes the checkpoints that no restore point starts from: former ones if the point is kept, otherwise the new one.
    fn end_checkpoints(&self, virsh: &Virsh, kept: bool) -> Result<(), LibvirtError> {
        let new = self.checkpoint.as_ref();
        let present = checkpoint::list_own(virsh, &self.domain)?;
        for name in present.iter().filter(|name| (Some(*name) == new) != kept) {
            checkpoint::remove(virsh, &self.domain, name)?;
        }
        Ok(())
    }

    /// What undoes it should this process die; see [`super::Libvirt::undo`].
    pub(super) fn undo(&self, virsh: &Virsh) -> Vec<Vec<String>> {
        let words = |words: [&str; 4]| words.map(String::from).to_vec();
        let (socket, folder) = (self.socket.to_string_lossy(), self.scratch.folder().to_string_lossy());
        vec![
            virsh.line(&["domjobabort", &self.domain.uuid]),
            virsh.line(&["secret-undefine", &self.secret]),
            words(["rm", "-f", "--", &socket]),
            words(["rm", "-rf", "--", &folder]),
        ]
    }
}

/// Which of the disks that start from a checkpoint libvirt refuses: those that it names, or all if it speaks of
/// checkpoints at all.
fn refused(chosen: &[Chosen], said: &str) -> Vec<usize> {
    if !said.contains("bitmap") && !said.to_lowercase().contains("checkpoint") {
        return Vec::new();
    }
    let start = |nth: &usize| chosen[*nth].since.is_ok();
    let named = |nth: &usize| said.contains(&format!("'{}'", chosen[*nth].disk.target));
    let named: Vec<_> = (0..chosen.len()).filter(start).filter(named).collect();
    if named.is_empty() { (0..chosen.len()).filter(start).collect() } else { named }
}

/// The restore point's id, spelt as a UUID.
fn as_uuid(point: PointId) -> String {
    let hex = point.to_string();
    let mut uuid = String::with_capacity(hex.len() + 4);
    for (at, c) in hex.chars().enumerate() {
        if matches!(at, 8 | 12 | 16 | 20) {
            uuid.push('-');
        }
        uuid.push(c);
    }
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::domain::is_uuid;

    #[test]
    fn an_id_is_spelt_as_a_uuid() {
        let uuid = as_uuid(PointId::from_bytes([0xa1; 16]));
        assert_eq!(uuid, "a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1");
        assert!(is_uuid(&uuid));
    }

    #[test]
    fn the_disks_that_libvirt_names_are_read_whole() {
        let disk = |target: &str, since: Result<&str, &str>| Chosen {
            disk: DomainDisk { target: target.into(), source: String::new(), left_out: None, untracked: None },
            name: DiskName::new(target).unwrap(),
            length: 1,
            since: since.map(String::from).map_err(String::from),
        };
        let chosen = [disk("vda", Ok("c")), disk("vdb", Ok("c")), disk("vdc", Err("raw"))];
        let broken = "checkpoint inconsistent: missing or broken bitmap 'c' for disk 'vdb'";
        assert_eq!(refused(&chosen, broken), [1]);
        assert_eq!(refused(&chosen, "Bad checkpoint"), [0, 1]);
        assert!(refused(&chosen, "failed to bind the socket of disk 'vda'").is_empty());
        assert!(refused(&chosen[2..], broken).is_empty(), "nothing to give up");
    }
}
