//! Disks with overlays as exports: by all the names that the restore point has, every client the same.

use std::collections::HashMap;
use std::sync::Arc;

use reseal_nbd::server::{Disk, Exports, Listed, NotOpened};

use super::disk::OverlayDisk;

/// Exports of one restore point that is written to.
pub struct WritableExports {
    points: Arc<dyn Exports>,
    /// By the name that always means the disk.
    disks: HashMap<String, Arc<OverlayDisk>>,
}

impl WritableExports {
    /// What `points` has, but written to these disks.
    pub fn new(points: Arc<dyn Exports>, disks: &[Arc<OverlayDisk>]) -> WritableExports {
        let disks = disks.iter().map(|disk| (disk.name().to_owned(), disk.clone())).collect();
        WritableExports { points, disks }
    }
}

impl Exports for WritableExports {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        // Also says whether the point is still there.
        let base = self.points.open(name)?;
        match self.disks.get(base.name()) {
            Some(disk) => Ok(disk.clone()),
            // Never what was not written to, for who wants to write.
            None => Err(NotOpened::Unknown(format!("{} has no overlay here", base.name()))),
        }
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        self.points.list()
    }
}
