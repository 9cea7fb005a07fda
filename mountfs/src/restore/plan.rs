//! Which disks go where.

use std::path::Path;
use std::sync::Arc;

use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;
use reseal_qemu::Secret;

use super::RestoreError;
use crate::disks::DiskOf;
use crate::target::{Format, Place, TargetError, TargetSpec};

/// A disk and where it goes.
pub struct PlannedDisk<'a> {
    pub disk: DiskOf<'a>,
    pub target: TargetSpec,
    pub(super) place: Place,
}

/// How disks are written.
#[derive(Clone)]
pub struct How {
    pub format: Format,
    /// With it they are encrypted with LUKS.
    pub secret: Option<Arc<Secret>>,
    /// Overwrites what is there.
    pub force: bool,
}

/// What a restore will do. Every target was looked at, none was written yet.
pub struct Plan<'a> {
    pub disks: Vec<PlannedDisk<'a>>,
}

impl<'a> Plan<'a> {
    /// All disks of a point, or one, to a file, a folder or a block device.
    pub fn new(
        manifest: &'a Manifest,
        only: Option<&DiskName>,
        out: &Path,
        how: &How,
    ) -> Result<Plan<'a>, RestoreError> {
        let point = || format!("{}@{}", manifest.vm, manifest.number);
        let disks: Vec<DiskOf<'_>> =
            DiskOf::all(manifest).filter(|disk| only.is_none_or(|only| disk.disk().name == *only)).collect();
        if let (true, Some(only)) = (disks.is_empty(), only) {
            let has = manifest.disks.iter().map(|disk| disk.name.to_string()).collect();
            return Err(RestoreError::NoDisk { point: point(), disk: only.clone(), has });
        }
        let many = disks.len() > 1;
        if many && out.exists() && !out.is_dir() {
            return Err(RestoreError::NotAFolder { point: point(), count: disks.len(), path: out.to_owned() });
        }
        let into_folder = many || out.is_dir();
        if into_folder && !out.is_dir() {
            let failed = |source| TargetError::Io { path: out.to_owned(), action: "make the folder", source };
            std::fs::create_dir_all(out).map_err(failed)?;
        }
        let planned = disks.into_iter().map(|disk| {
            let name = || format!("{}.{}", disk.disk().name, how.format.ending(how.secret.is_none()));
            let path = if into_folder { out.join(name()) } else { out.to_owned() };
            let target = TargetSpec::new(&path, how.format, how.secret.clone())?;
            let place = target.check(disk.disk().length, how.force)?;
            Ok(PlannedDisk { disk, target, place })
        });
        Ok(Plan { disks: planned.collect::<Result<_, TargetError>>()? })
    }

    /// Bytes that will be read and written.
    pub fn bytes(&self) -> u64 {
        self.disks.iter().map(|planned| planned.disk.disk().used_clusters * reseal_format::geometry::CLUSTER_U64).sum()
    }
}
