//! The options of whatever lets a restore point be written to, and what they open.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use reseal_cli::{Failure, Output, Status, parse_size};
use reseal_format::ids::OverlayId;
use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;
use reseal_mountfs::overlay::{OverlayError, Unflushed};
use reseal_mountfs::writable::{
    Folder, LEAST, Opened, OverlayDisk, OverlayPlace, WritableError, WritableExports, WrittenDisk, overlays_folder,
};
use reseal_nbd::server::{Exports, export_name};
use reseal_vault::{Tenant, random};

#[derive(Args)]
pub(crate) struct WritableArgs {
    /// Lets clients write: to an overlay, which is encrypted. The restore point stays as it is
    #[arg(long, requires = "only")]
    pub(crate) writable: bool,
    /// Folder of the overlay: one that it holds already is gone on with [default: a new one in the state folder]
    #[arg(long, value_name = "DIR", requires = "writable")]
    overlay: Option<PathBuf>,
    /// Most that the overlay of each disk may take, such as 20G: beyond it clients get "no space left"
    #[arg(long, value_name = "SIZE", requires = "writable", value_parser = parse_limit)]
    overlay_limit: Option<u64>,
    /// Keeps the overlay's key in memory only: what was written is gone with this process
    #[arg(long, requires = "writable")]
    one_time: bool,
    /// Only disks that were not moved elsewhere, instead of none where one was.
    #[arg(skip)]
    left: bool,
    /// What becomes of writes that are not flushed when this process is killed.
    #[arg(skip)]
    unflushed: Unflushed,
}

pub(crate) fn parse_limit(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        limit if limit < LEAST => Err(format!("an overlay needs {}M at least", LEAST >> 20)),
        limit => Ok(limit),
    }
}

/// Disks that are written to by clients.
pub(crate) struct Written {
    pub(crate) id: OverlayId,
    /// Where the overlay is kept; none if it is not.
    pub(crate) folder: Option<PathBuf>,
    is_new: bool,
    disks: Vec<Arc<OverlayDisk>>,
    /// Nobody else has it meanwhile.
    _folder: Option<Folder>,
}

/// Disks that are written to as files.
pub(crate) struct WrittenFiles {
    folder: Option<PathBuf>,
    is_new: bool,
    /// In the order of the manifest.
    pub(crate) disks: Vec<Arc<WrittenDisk>>,
    _folder: Option<Folder>,
}

fn failure(error: &WritableError) -> Failure {
    Failure::of(error.class().into(), error)
}

impl WritableArgs {
    /// What was said by other options.
    pub(crate) fn of(overlay: Option<PathBuf>, overlay_limit: Option<u64>, one_time: bool) -> WritableArgs {
        let unflushed = Unflushed::Lost;
        WritableArgs { writable: true, overlay, overlay_limit, one_time, left: false, unflushed }
    }

    /// The same, of those disks only that are still on the overlay.
    pub(crate) fn left(self) -> WritableArgs {
        WritableArgs { left: true, ..self }
    }

    /// The same, for clients that live on when this process is killed.
    pub(crate) fn keeping(self, unflushed: Unflushed) -> WritableArgs {
        WritableArgs { unflushed, ..self }
    }

    /// Opens the overlays of a point's disks, or of `only` that one, over what `points` has of it. There is a tenant where this
    /// process has its keys.
    pub(crate) fn open(
        &self,
        tenant: Option<&Tenant>,
        state: &Path,
        point: &Manifest,
        only: Option<&DiskName>,
        points: &dyn Exports,
    ) -> Result<Written, Failure> {
        let opened = self.overlays(tenant, state, point, only)?;
        let (id, is_new, path) = (opened.id(), opened.is_new(), opened.folder().map(Path::to_owned));
        let (overlays, folder) = opened.into_parts();
        let mut disks = Vec::new();
        for (name, overlay) in overlays {
            let failed = |e: &dyn std::error::Error| Failure::of(Status::Failed, e);
            let base = points.open(&export_name(&point.vm, point.number, &name)).map_err(|e| failed(&e))?;
            disks.push(Arc::new(OverlayDisk::new(name, base, overlay).map_err(|e| failed(&e))?));
        }
        Ok(Written { id, folder: path, is_new, disks, _folder: folder })
    }

    /// Opens the overlays of all disks of a point, which a mount lays over what it reads.
    pub(crate) fn open_files(
        &self,
        tenant: Option<&Tenant>,
        state: &Path,
        point: &Manifest,
    ) -> Result<WrittenFiles, Failure> {
        let opened = self.overlays(tenant, state, point, None)?;
        let (is_new, path) = (opened.is_new(), opened.folder().map(Path::to_owned));
        let (overlays, folder) = opened.into_parts();
        let disks = overlays.into_iter().map(|(name, overlay)| Arc::new(WrittenDisk::new(name, overlay)));
        Ok(WrittenFiles { folder: path, is_new, disks: disks.collect(), _folder: folder })
    }

    fn overlays(
        &self,
        tenant: Option<&Tenant>,
        state: &Path,
        point: &Manifest,
        only: Option<&DiskName>,
    ) -> Result<Opened, Failure> {
        let place = self.place(tenant, state)?;
        let limit = self.overlay_limit.unwrap_or(u64::MAX);
        Opened::open_keeping(tenant, point, only, &place, limit, self.unflushed).map_err(|e| failure(&e))
    }

    fn place(&self, tenant: Option<&Tenant>, state: &Path) -> Result<OverlayPlace, Failure> {
        let own = || match tenant {
            Some(tenant) => overlays_folder(state, &tenant.keys().scope()),
            None => state.join("overlays"),
        };
        // A process in the background is independent of the folder that it was started in.
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(|e| Failure::new(Status::Usage, format!("--overlay: {e}")));
        Ok(match (&self.overlay, self.one_time) {
            (Some(path), false) if self.left => OverlayPlace::Left(absolute(path)?),
            (Some(path), false) => OverlayPlace::Kept(absolute(path)?),
            (Some(path), true) => OverlayPlace::OneTime(absolute(path)?),
            (None, false) => OverlayPlace::Kept(absolute(&own())?.join(OverlayId::from_bytes(random()?).to_string())),
            (None, true) => OverlayPlace::OneTime(absolute(&own())?),
        })
    }
}

impl Written {
    /// What `points` has, but written to.
    pub(crate) fn exports(&self, points: Arc<dyn Exports>) -> Arc<dyn Exports> {
        Arc::new(WritableExports::new(points, &self.disks))
    }

    /// Says where it is, and what ends it.
    pub(crate) fn say(&self, output: Output, end: &str) {
        let where_to = where_to(self.folder.as_deref(), self.is_new);
        output.say(format!("writable, decrypted as it is read; {where_to}; {end}"));
    }

    /// Makes all durable. What comes afterwards gets errors.
    pub(crate) fn close(&self) -> Result<(), Failure> {
        close(self.folder.as_deref(), self.disks.iter().map(|disk| (disk.disk_name(), disk.close())))
    }
}

impl WrittenFiles {
    /// What becomes of what is written.
    pub(crate) fn where_to(&self) -> String {
        where_to(self.folder.as_deref(), self.is_new)
    }

    /// Makes all durable. What comes afterwards gets errors.
    pub(crate) fn close(&self) -> Result<(), Failure> {
        close(self.folder.as_deref(), self.disks.iter().map(|disk| (disk.name(), disk.close())))
    }
}

fn where_to(folder: Option<&Path>, is_new: bool) -> String {
    match (folder, is_new) {
        (None, _) => "what is written is gone with this process".to_owned(),
        (Some(folder), true) => format!("what is written goes to {}", folder.display()),
        (Some(folder), false) => format!("goes on with the overlay in {}", folder.display()),
    }
}

/// The last failure of disks that were all closed.
fn close<'a>(
    folder: Option<&Path>,
    closed: impl Iterator<Item = (&'a DiskName, Result<(), OverlayError>)>,
) -> Result<(), Failure> {
    let failed = closed.filter_map(|(disk, closed)| Some((disk, closed.err()?))).last();
    failed.map_or(Ok(()), |(disk, e)| {
        let folder = folder.unwrap_or_else(|| Path::new("")).to_owned();
        Err(failure(&WritableError::Overlay { folder, disk: disk.clone(), source: Box::new(e) }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_leaves_room_for_what_an_overlay_itself_needs() {
        assert_eq!(parse_limit("4M"), Ok(LEAST));
        assert_eq!(parse_limit("2T"), Ok(2 << 40));
        for bad in ["", "1M", "4095K", "0", "x"] {
            assert!(parse_limit(bad).is_err(), "{bad}");
        }
    }
}
