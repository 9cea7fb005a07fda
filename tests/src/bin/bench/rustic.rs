//! rustic, the newest from crates.io, with its defaults.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, DISK, Mount, PASSPHRASE, mountpoint, renewed};
use crate::host::Disks;
use crate::plan::Plan;
use crate::process::{self, Cost};

pub(crate) struct Rustic {
    program: PathBuf,
    home: PathBuf,
}

impl Rustic {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { program: plan.cache.join("rustic/bin/rustic"), home: plan.work.join("rustic") }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("RUSTIC_REPOSITORY", self.repository()).env("RUSTIC_PASSWORD", PASSPHRASE);
        command.env("RUSTIC_CACHE_DIR", self.home.join("cache")).env("RUSTIC_NO_PROGRESS", "true");
        command
    }
}

impl Contender for Rustic {
    fn name(&self) -> &'static str {
        "rustic"
    }

    fn about(&self) -> Result<String> {
        if !self.program.exists() {
            return Err("it is not installed here, or could not be built".into());
        }
        Ok(format!("{}, defaults", process::output(Command::new(&self.program).arg("--version"))?))
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)?;
        process::run(self.command().arg("init")).map(drop)
    }

    fn backup(&mut self, _day: &str, source: &Path) -> Result<Option<Cost>> {
        process::run(self.command().current_dir(source).args(["backup", "--as-path", "/disk.raw", DISK])).map(Some)
    }

    fn repository(&self) -> PathBuf {
        self.home.join("repository")
    }

    fn mount(&mut self, _disks: &Disks) -> Result<Mount> {
        let mountpoint = mountpoint(&self.home)?;
        let file = mountpoint.join(DISK);
        Mount::foreground(self.command().arg("mount").arg(&mountpoint).arg("latest"), mountpoint, file)
    }

    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        let cost = process::run(self.command().args(["restore", "--sparse", "by-content", "latest"]).arg(out))?;
        Ok(Some((out.join(DISK), cost)))
    }
}
