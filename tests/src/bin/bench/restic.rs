//! restic, as Debian has it, with its defaults.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, DISK, Mount, PASSPHRASE, mountpoint, renewed};
use crate::host::Disks;
use crate::plan::Plan;
use crate::process::{self, Cost};

pub(crate) struct Restic {
    home: PathBuf,
}

impl Restic {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { home: plan.work.join("restic") }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("restic");
        command.env("RESTIC_REPOSITORY", self.repository()).env("RESTIC_PASSWORD", PASSPHRASE);
        command.env("RESTIC_CACHE_DIR", self.home.join("cache"));
        command
    }
}

impl Contender for Restic {
    fn name(&self) -> &'static str {
        "restic"
    }

    fn about(&self) -> Result<String> {
        let version = process::output(Command::new("restic").arg("version"))?;
        Ok(format!("{}, defaults", version.split(' ').take(2).collect::<Vec<_>>().join(" ")))
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)?;
        process::run(self.command().arg("init")).map(drop)
    }

    fn backup(&mut self, _day: &str, source: &Path) -> Result<Option<Cost>> {
        process::run(self.command().current_dir(source).args(["backup", DISK])).map(Some)
    }

    fn repository(&self) -> PathBuf {
        self.home.join("repository")
    }

    fn mount(&mut self, _disks: &Disks) -> Result<Mount> {
        let mountpoint = mountpoint(&self.home)?;
        let file = mountpoint.join("snapshots/latest").join(DISK);
        Mount::foreground(self.command().arg("mount").arg(&mountpoint), mountpoint, file)
    }

    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        let cost = process::run(self.command().args(["restore", "latest", "--target"]).arg(out))?;
        Ok(Some((out.join(DISK), cost)))
    }
}
