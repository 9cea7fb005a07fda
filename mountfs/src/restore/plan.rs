//! Which disks go where.

use std::path::{Path, PathBuf};

use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;

use super::RestoreError;
use super::target::Target;
use crate::disks::DiskOf;
use crate::files::disk_file;

/// A disk and where it goes.
pub struct PlannedDisk<'a> {
    pub disk: DiskOf<'a>,
    pub path: PathBuf,
    pub(super) target: Target,
}

/// What a restore will do. Every target was looked at, none was written yet.
pub struct Plan<'a> {
    pub disks: Vec<PlannedDisk<'a>>,
}

impl<'a> Plan<'a> {
    /// All disks of a point, or one, to a file, a folder or a block device. Nothing is overwritten without `force`.
    pub fn new(
        manifest: &'a Manifest,
        only: Option<&DiskName>,
        out: &Path,
        force: bool,
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
            let failed = |source| RestoreError::Target { path: out.to_owned(), action: "make the folder", source };
            std::fs::create_dir_all(out).map_err(failed)?;
        }
        let planned = disks.into_iter().map(|disk| {
            let path = if into_folder { out.join(disk_file(disk.disk())) } else { out.to_owned() };
            let target = Target::check(&path, disk.disk().length, force)?;
            Ok(PlannedDisk { disk, path, target })
        });
        Ok(Plan { disks: planned.collect::<Result<_, _>>()? })
    }

    /// Bytes that will be read and written.
    pub fn bytes(&self) -> u64 {
        self.disks.iter().map(|planned| planned.disk.disk().used_clusters * reseal_format::geometry::CLUSTER_U64).sum()
    }
}
