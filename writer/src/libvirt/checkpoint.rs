//! Checkpoints: what libvirt records between two restore points, one bitmap of that name in each disk's image.
//!
//! Each bitmap records by itself from its moment on, so that removing a checkpoint changes no other one's, be it
//! reseal's or another tool's.

use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::ids::PointId;
use reseal_format::manifest::{Manifest, Tracking, method};
use reseal_qemu::xml::escape;

use super::LibvirtError;
use super::command::Virsh;
use super::domain::{Domain, DomainDisk};

/// What the names of reseal's own checkpoints start with. The rest is the restore point's id.
const PREFIX: &str = "reseal-";

/// Name of the checkpoint of a restore point.
pub(super) fn name(point: PointId) -> String {
    format!("{PREFIX}{point}")
}

/// Whether reseal made a checkpoint of that name.
fn is_own(name: &str) -> bool {
    name.strip_prefix(PREFIX).and_then(PointId::from_hex).is_some()
}

/// What a restore point says of a disk's changes after it.
pub(super) fn tracking(name: &str, domain: &Domain) -> Tracking {
    Tracking { method: method::LIBVIRT_CHECKPOINT.into(), id: name.into(), scope: domain.uuid.clone() }
}

/// Names of reseal's own checkpoints of a domain.
pub(super) fn list_own(virsh: &Virsh, domain: &Domain) -> Result<Vec<String>, LibvirtError> {
    let names = virsh.run(&["checkpoint-list", &domain.uuid, "--name"])?;
    Ok(names.lines().map(str::trim).filter(|name| is_own(name)).map(str::to_owned).collect())
}

/// The checkpoint whose bitmap in this disk holds all that changed since the newest restore point, or why there is none.
/// `present` are those that libvirt knows.
pub(super) fn usable(
    disk: &DomainDisk,
    length: u64,
    domain: &Domain,
    since: Option<&Manifest>,
    present: &[String],
) -> Result<String, String> {
    if let Some(why) = &disk.untracked {
        return Err(why.clone());
    }
    let since = since.ok_or("there is no restore point before this one")?;
    let number = since.number;
    let before = since.disks.iter().find(|before| before.name.as_str() == disk.target);
    let before = before.ok_or_else(|| format!("restore point {number} has no disk {}", disk.target))?;
    let tracking = before.tracking.as_ref();
    let tracking = tracking.ok_or_else(|| format!("nothing recorded its changes since restore point {number}"))?;
    if tracking.method != method::LIBVIRT_CHECKPOINT || tracking.id != name(since.point_id) {
        return Err(format!("restore point {number} was not made with a checkpoint of libvirt"));
    }
    if tracking.scope != domain.uuid {
        return Err(format!("restore point {number} was made of another domain ({})", tracking.scope));
    }
    if before.length != length {
        return Err(format!("it has {length} bytes, and had {} at restore point {number}", before.length));
    }
    if !present.contains(&tracking.id) {
        return Err(format!("libvirt no longer has the checkpoint {} of restore point {number}", tracking.id));
    }
    Ok(tracking.id.clone())
}

/// The checkpoint that a backup makes.
pub(super) fn xml<'a>(name: &str, disks: impl Iterator<Item = &'a str>) -> String {
    let disks = disks.map(|target| format!("<disk name='{}' checkpoint='bitmap'/>", escape(target)));
    let name = escape(name);
    format!("<domaincheckpoint><name>{name}</name><disks>{}</disks></domaincheckpoint>", disks.collect::<String>())
}

/// Removes a checkpoint and its bitmaps.
///
/// libvirt refuses to remove one that lacks a bitmap in one of its disks, and does not see bitmaps whose checkpoint is
/// gone; both would slow the guest's writes for ever. Then it is told again of a checkpoint of that name, of one disk at a
/// time, and removes what is there.
pub(super) fn remove(virsh: &Virsh, domain: &Domain, name: &str) -> Result<(), LibvirtError> {
    let delete = |how: &[&str]| virsh.run(&[&["checkpoint-delete", &domain.uuid, name], how].concat());
    let refused = match delete(&[]) {
        Ok(_) => return Ok(()),
        Err(e) if e.said().is_none() => return Err(e),
        Err(e) => e,
    };
    if Domain::find(virsh, &domain.uuid)?.id.is_none() {
        return Err(refused);
    }
    let _ = delete(&["--metadata"]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    for disk in domain.chosen().filter(|disk| disk.untracked.is_none()) {
        let time = format!("<creationTime>{now}</creationTime><disks>");
        let again = xml(name, [disk.target.as_str()].into_iter()).replacen("<disks>", &time, 1);
        let redefine = ["checkpoint-create", &domain.uuid, "/dev/stdin", "--redefine"];
        if virsh.run_with(&redefine, Some(again.as_bytes())).is_ok() && delete(&[]).is_err() {
            delete(&["--metadata"])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::VmId;
    use reseal_format::manifest::{Disk, Stats};
    use reseal_format::names::{DiskName, VmName};
    use reseal_format::time::Timestamp;

    use super::*;

    const UUID: &str = "2b9fa4c4-5a09-4f0c-9bd5-6b6ac2d3c4a1";
    const POINT: PointId = PointId::from_bytes([7; 16]);

    fn domain() -> Domain {
        let (name, uuid) = ("web01".into(), UUID.into());
        Domain { name, uuid, id: Some(1), owner: None, disks: Vec::new(), threads: false, xml: String::new() }
    }

    fn manifest(domain: &Domain) -> Manifest {
        let disk = Disk {
            name: DiskName::new("vda").unwrap(),
            length: 100,
            root: None,
            used_clusters: 0,
            source: String::new(),
            tracking: Some(tracking(&name(POINT), domain)),
            claim: None,
        };
        Manifest {
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 4,
            point_id: POINT,
            created: Timestamp(1),
            parent: None,
            disks: vec![disk],
            definition: None,
            stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
            warnings: vec![],
            locked: None,
        }
    }

    #[test]
    fn only_the_checkpoint_of_the_newest_point_of_this_domain_is_used() {
        let domain = domain();
        let disk = |target: &str, untracked: Option<&str>| DomainDisk {
            target: target.into(),
            source: String::new(),
            left_out: None,
            untracked: untracked.map(String::from),
        };
        let (vda, good, present) = (disk("vda", None), manifest(&domain), [name(POINT)]);
        let since = |manifest: &Manifest| usable(&vda, 100, &domain, Some(manifest), &present);
        assert_eq!(since(&good), Ok(name(POINT)));
        let changed = |change: &dyn Fn(&mut Manifest)| {
            let mut manifest = good.clone();
            change(&mut manifest);
            since(&manifest).unwrap_err()
        };
        let of =
            |change: &dyn Fn(&mut Tracking)| changed(&|manifest| change(manifest.disks[0].tracking.as_mut().unwrap()));
        assert!(changed(&|m| m.disks[0].tracking = None).contains("nothing recorded"));
        assert!(changed(&|m| m.point_id = PointId::from_bytes([8; 16])).contains("not made with"));
        assert!(of(&|t| t.id = "daily".into()).contains("not made with"));
        assert!(of(&|t| t.method = method::QEMU_BITMAP.into()).contains("not made with"));
        assert!(of(&|t| t.scope = UUID.replace('2', "3")).contains("another domain"));
        assert!(usable(&vda, 101, &domain, Some(&good), &present).unwrap_err().contains("101 bytes"));
        assert!(usable(&vda, 100, &domain, Some(&good), &[]).unwrap_err().contains("no longer has"));
        assert!(usable(&vda, 100, &domain, None, &present).unwrap_err().contains("no restore point"));
        assert!(usable(&disk("vdb", None), 100, &domain, Some(&good), &present).unwrap_err().contains("no disk vdb"));
        assert_eq!(usable(&disk("vda", Some("raw")), 100, &domain, Some(&good), &present), Err("raw".into()));
    }

    #[test]
    fn only_own_names_are_own() {
        assert!(is_own(&name(POINT)));
        for other in ["reseal-", "reseal-daily", "daily", &name(POINT)[1..], &format!("{}0", name(POINT))] {
            assert!(!is_own(other), "{other}");
        }
        assert!(xml("a'b", ["v<d"].into_iter()).contains("<name>a&apos;b</name><disks><disk name='v&lt;d'"));
    }
}
