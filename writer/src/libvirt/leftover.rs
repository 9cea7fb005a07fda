//! What a killed backup of a domain left behind, and its removal.

use std::path::Path;

use reseal_format::manifest::Manifest;

use super::command::Virsh;
use super::domain::Domain;
use super::job::{self, Job};
use super::scratch::{self, Found};
use super::{LibvirtError, checkpoint, secret, socket};

/// Removes it, and says so to the administrator. An error if it is not left behind: something else backs the domain up.
/// Of the checkpoints only that of the newest restore point stays.
pub(super) fn remove(
    virsh: &Virsh,
    domain: &Domain,
    base: &Path,
    since: Option<&Manifest>,
) -> Result<Option<String>, LibvirtError> {
    let busy = |by| LibvirtError::Busy { domain: domain.name.clone(), by };
    let job = Job::find(virsh, &domain.uuid)?;
    let of_job = job.as_ref().and_then(|job| job.scratch.clone());
    let of_job = of_job.filter(|folder| scratch::is_own(folder, &domain.uuid));
    if let Some(job) = job.as_ref().filter(|_| of_job.is_none()) {
        return Err(busy(job.describe()));
    }
    // Secrets and the job name folders that a run with another --scratch made.
    let secrets = secret::find(virsh, &domain.uuid)?;
    let mut folders = scratch::find(base, &domain.uuid)?;
    folders.extend(of_job);
    folders.extend(secrets.iter().map(|(_, folder)| folder.clone()));
    folders.sort();
    folders.dedup();
    let looked: Vec<_> = folders.into_iter().map(|folder| (scratch::look(&folder), folder)).collect();
    if let Some((_, folder)) = looked.iter().find(|(found, _)| *found == Found::InUse) {
        return Err(busy(format!("reseal uses {}", folder.display())));
    }
    let mut left = Vec::new();
    if let Some(job) = job {
        job::end(virsh, domain, job.socket.as_deref())?;
        left.push("a job".to_owned());
        if let Some(socket) = job.socket {
            socket::remove_left(&socket)?;
        }
    }
    for (uuid, _) in secrets {
        secret::undefine(virsh, &uuid)?;
        left.push("a secret".into());
    }
    for (_, folder) in looked.iter().filter(|(found, _)| *found == Found::Left) {
        scratch::remove(folder)?;
        left.push(format!("scratch files in {}", folder.display()));
    }
    let named = since.map(|since| checkpoint::name(since.point_id));
    for name in checkpoint::list_own(virsh, domain)?.iter().filter(|name| Some(*name) != named.as_ref()) {
        checkpoint::remove(virsh, domain, name)?;
        left.push(format!("the checkpoint {name}"));
    }
    let said = || format!("an interrupted backup of {} had left {}; that was removed", domain.name, left.join(", "));
    Ok((!left.is_empty()).then(said))
}
