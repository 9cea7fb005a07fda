//! borg, the newest from PyPI, told to cut at 64 KiB, to skip holes and to compress quickly, as suits disks.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, DISK, Mount, PASSPHRASE, mountpoint, renewed};
use crate::host::Disks;
use crate::plan::Plan;
use crate::process::{self, Cost};

const SETTINGS: [&str; 5] = ["--sparse", "--chunker-params", "fixed,65536", "--compression", "zstd,1"];
// The quickest of its ciphers where the processor computes SHA-256.
const ENCRYPTION: &str = "repokey";

pub(crate) struct Borg {
    program: PathBuf,
    home: PathBuf,
    newest: String,
}

impl Borg {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { program: plan.cache.join("borg/bin/borg"), home: plan.work.join("borg"), newest: String::new() }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("BORG_REPO", self.repository())
            .env("BORG_PASSPHRASE", PASSPHRASE)
            .env("BORG_BASE_DIR", self.home.join("state"));
        command
    }
}

impl Contender for Borg {
    fn name(&self) -> &'static str {
        "borg"
    }

    fn about(&self) -> Result<String> {
        if !self.program.exists() {
            return Err("it is not installed here, or could not be installed".into());
        }
        let version = process::output(Command::new(&self.program).arg("--version"))?;
        Ok(format!("{version}, {ENCRYPTION}, {}", SETTINGS.join(" ")))
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)?;
        process::run(self.command().args(["init", "--encryption", ENCRYPTION])).map(drop)
    }

    fn backup(&mut self, day: &str, source: &Path) -> Result<Option<Cost>> {
        self.newest = format!("::{day}");
        process::run(self.command().current_dir(source).arg("create").args(SETTINGS).args([&self.newest, DISK]))
            .map(Some)
    }

    fn repository(&self) -> PathBuf {
        self.home.join("repository")
    }

    fn mount(&mut self, _disks: &Disks) -> Result<Mount> {
        let mountpoint = mountpoint(&self.home)?;
        let file = mountpoint.join(DISK);
        Mount::foreground(
            self.command().args(["mount", "--foreground", &self.newest]).arg(&mountpoint),
            mountpoint,
            file,
        )
    }

    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        let cost = process::run(self.command().current_dir(out).args(["extract", "--sparse", &self.newest]))?;
        Ok(Some((out.join(DISK), cost)))
    }
}
