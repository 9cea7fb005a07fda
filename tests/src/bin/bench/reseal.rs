//! reseal, through its command line as a user has it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, DISK, Mount, mountpoint, renewed};
use crate::host::Disks;
use crate::plan::Plan;
use crate::process::{self, Cost};

pub(crate) const VM: &str = "web01";
/// The program that serves a mount, by the name that the kernel shows.
const SERVER: &str = "reseal-mount";

pub(crate) struct Reseal {
    program: PathBuf,
    home: PathBuf,
}

impl Reseal {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self::at(plan, "reseal")
    }

    /// With a vault, keyring and state of its own, so that several can be measured side by side.
    pub(crate) fn at(plan: &Plan, home: &str) -> Self {
        Self { program: plan.programs.join("reseal"), home: plan.work.join(home) }
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("RESEAL_REPO", self.repository()).env("RESEAL_KEYRING", self.home.join("keyring.json"));
        command.env("RESEAL_STATE", self.home.join("state"));
        command
    }

    /// A mount with more arguments, and a disk in it.
    pub(crate) fn mounted(&self, arguments: &[&str], disk: &str) -> Result<Mount> {
        let mountpoint = mountpoint(&self.home)?;
        process::run(self.command().arg("mount").arg(&mountpoint).args(arguments).arg("--background"))?;
        let mut end = self.command();
        end.arg("umount").arg(&mountpoint);
        let file = mountpoint.join(disk);
        Ok(Mount::background(SERVER, end, mountpoint, file))
    }
}

impl Contender for Reseal {
    fn name(&self) -> &'static str {
        "reseal"
    }

    fn about(&self) -> Result<String> {
        if !self.program.exists() {
            return Err("there is no reseal beside this program: build it with `cargo build --release`".into());
        }
        let version = process::output(self.command().arg("--version"))?;
        if version.is_empty() {
            Err("the reseal beside this program does nothing".into())
        } else {
            Ok(format!("{version}, defaults"))
        }
    }

    fn warm(&self) -> Result<()> {
        process::output(self.command().arg("--version"))?;
        process::output(Command::new(self.program.with_file_name(SERVER)).arg("--version")).map(drop)
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)?;
        process::run(self.command().args(["init", "--no-recovery"])).map(drop)
    }

    fn backup(&mut self, _day: &str, source: &Path) -> Result<Option<Cost>> {
        process::run(self.command().args(["backup", VM]).arg(source.join(DISK))).map(Some)
    }

    fn repository(&self) -> PathBuf {
        self.home.join("vault")
    }

    fn mount(&mut self, _disks: &Disks) -> Result<Mount> {
        self.mounted(&[], &format!("{VM}/latest/disk-0.raw"))
    }

    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        let file = out.join(DISK);
        let cost = process::run(self.command().args(["restore", &format!("{VM}@latest")]).arg(&file))?;
        Ok(Some((file, cost)))
    }
}
