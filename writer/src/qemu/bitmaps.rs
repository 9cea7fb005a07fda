//! Whether a bitmap tells all that changed since the newest restore point.

use reseal_format::manifest::{Manifest, method};

use super::disks::Disk;

/// The bitmaps that the newest restore point names.
pub(super) fn named(since: Option<&Manifest>) -> Vec<String> {
    let disks = since.into_iter().flat_map(|manifest| &manifest.disks);
    let tracked = disks.filter_map(|disk| disk.tracking.as_ref());
    let mut names: Vec<_> =
        tracked.filter(|tracking| tracking.method == method::QEMU_BITMAP).map(|tracking| tracking.id.clone()).collect();
    names.sort();
    names.dedup();
    names
}

/// The bitmap of a disk to start from; otherwise why everything is read.
pub(super) fn usable(disk: &Disk, since: Option<&Manifest>) -> Result<String, String> {
    let manifest = since.ok_or("there is no restore point yet")?;
    let before = manifest.disks.iter().find(|before| before.name == disk.name);
    let before = before.ok_or("the newest restore point does not have this disk")?;
    let tracking = before.tracking.as_ref().ok_or("nothing has recorded changes since the newest restore point")?;
    if tracking.method != method::QEMU_BITMAP {
        return Err(format!("changes since the newest restore point are recorded otherwise ({})", tracking.method));
    }
    if tracking.scope != disk.scope {
        return Err(format!("the newest restore point is of another disk ({}, now {})", tracking.scope, disk.scope));
    }
    if before.length != disk.length {
        return Err(format!("the disk had {} bytes and has {} now", before.length, disk.length));
    }
    let name = &tracking.id;
    let bitmap = disk.bitmaps.iter().find(|bitmap| bitmap["name"] == name.as_str());
    let bitmap = bitmap.ok_or_else(|| {
        format!("the bitmap {name} is gone; the VM was restarted, its disk has another image, or somebody removed it")
    })?;
    let is = |key: &str| bitmap[key].as_bool();
    if is("inconsistent") == Some(true) {
        return Err(format!("the bitmap {name} is inconsistent: QEMU ended without writing it down"));
    }
    if is("recording") != Some(true) {
        return Err(format!("the bitmap {name} was stopped"));
    }
    if is("busy") != Some(false) {
        return Err(format!("the bitmap {name} is in use by somebody else"));
    }
    if bitmap["granularity"].as_u64().unwrap_or(0) == 0 {
        return Err(format!("QEMU does not say how fine the bitmap {name} is"));
    }
    Ok(name.clone())
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::{PointId, VmId};
    use reseal_format::manifest::{Disk as ManifestDisk, Stats, Tracking};
    use reseal_format::names::{DiskName, VmName};
    use reseal_format::time::Timestamp;
    use serde_json::{Value, json};

    use super::*;

    fn manifest(tracking: Option<Tracking>) -> Manifest {
        Manifest {
            vm: VmName::new("vm").unwrap(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 1,
            point_id: PointId::from_bytes([2; 16]),
            created: Timestamp(1),
            parent: None,
            disks: vec![ManifestDisk {
                name: DiskName::new("disk-0").unwrap(),
                length: 1 << 20,
                root: None,
                used_clusters: 0,
                source: String::new(),
                tracking,
                claim: None,
            }],
            definition: None,
            stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
            warnings: vec![],
            locked: None,
        }
    }

    fn disk(bitmap: Value) -> Disk {
        Disk {
            name: DiskName::new("disk-0").unwrap(),
            id: "vd0".into(),
            scope: "vm/vd0".into(),
            node: "n".into(),
            length: 1 << 20,
            persistent: false,
            bitmaps: vec![bitmap],
            file: String::new(),
        }
    }

    #[test]
    fn a_bitmap_is_used_only_if_all_is_right() {
        let good = json!({ "name": "reseal-1", "recording": true, "busy": false, "granularity": 65536, "count": 0 });
        let tracking = |method: &str, id: &str, scope: &str| Tracking {
            method: method.into(),
            id: id.into(),
            scope: scope.into(),
        };
        let right = manifest(Some(tracking(method::QEMU_BITMAP, "reseal-1", "vm/vd0")));
        assert_eq!(usable(&disk(good.clone()), Some(&right)), Ok("reseal-1".into()));
        assert_eq!(named(Some(&right)), ["reseal-1"]);
        for (key, value) in [("inconsistent", json!(true)), ("recording", json!(false)), ("busy", json!(true))] {
            let mut bad = good.clone();
            bad[key] = value;
            assert!(usable(&disk(bad), Some(&right)).is_err(), "{key}");
        }
        let mut longer = disk(good.clone());
        longer.length *= 2;
        assert!(usable(&longer, Some(&right)).is_err());
        assert!(usable(&disk(good.clone()), None).is_err());
        for wrong in [
            None,
            Some(tracking(method::USER_BITMAP, "reseal-1", "vm/vd0")),
            Some(tracking(method::QEMU_BITMAP, "reseal-2", "vm/vd0")),
            Some(tracking(method::QEMU_BITMAP, "reseal-1", "vm/vd1")),
        ] {
            assert!(usable(&disk(good.clone()), Some(&manifest(wrong))).is_err());
        }
    }
}
