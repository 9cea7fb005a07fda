//! A FUSE file system that does nothing: what remains is what every mount pays.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, Mount, mountpoint, renewed};
use crate::fakefs;
use crate::host::Disks;
use crate::plan::Plan;
use crate::process::Cost;

/// As reseal's mount sets it for itself.
const KERNEL_READAHEAD_KIB: u32 = 2048;

pub(crate) struct Null {
    home: PathBuf,
}

impl Null {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { home: plan.work.join("null") }
    }
}

impl Contender for Null {
    fn name(&self) -> &'static str {
        "null"
    }

    fn about(&self) -> Result<String> {
        Ok("null FUSE file system (constant bytes; `fuser`, threads and options as reseal's mount)".to_owned())
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)
    }

    fn backup(&mut self, _day: &str, _source: &Path) -> Result<Option<Cost>> {
        Ok(None)
    }

    fn repository(&self) -> PathBuf {
        self.home.clone()
    }

    fn mount(&mut self, disks: &Disks) -> Result<Mount> {
        let mountpoint = mountpoint(&self.home)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("null-fs").arg(&mountpoint).arg(disks.length()?.to_string());
        let file = mountpoint.join(fakefs::FILE);
        let mount = Mount::foreground(&mut command, mountpoint, file)?;
        raise_readahead(&mount.file)?;
        Ok(mount)
    }

    fn restore(&mut self, _out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        Ok(None)
    }
}

pub(crate) fn raise_readahead(file: &Path) -> Result<()> {
    let device = rustix::fs::stat(file)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    Ok(std::fs::write(setting, KERNEL_READAHEAD_KIB.to_string())?)
}
