//! A qcow2 image encrypted with LUKS, as QEMU makes and serves it: what a mounted encrypted disk costs without a backup tool.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::contender::{Contender, DISK, Mount, PASSPHRASE, renewed};
use crate::host::{DAYS, Disks};
use crate::plan::Plan;
use crate::process::{self, Cost};

pub(crate) struct Luks {
    home: PathBuf,
}

impl Luks {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self::at(plan, "luks")
    }

    /// In a folder of its own.
    pub(crate) fn at(plan: &Plan, home: &str) -> Self {
        Self { home: plan.work.join(home) }
    }

    pub(crate) fn secret() -> String {
        format!("secret,id=key,data={PASSPHRASE}")
    }

    fn image(&self) -> PathBuf {
        self.repository().join("disk.qcow2")
    }

    /// The image, for a program that takes the options of a block node.
    pub(crate) fn node(&self) -> String {
        format!(
            "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.driver=file,file.filename={}",
            self.image().display()
        )
    }
}

impl Contender for Luks {
    fn name(&self) -> &'static str {
        "qemu-luks"
    }

    fn about(&self) -> Result<String> {
        let version = process::output(Command::new("qemu-storage-daemon").arg("--version"))?;
        let number = version.split(' ').nth(2).unwrap_or("of unknown version");
        Ok(format!("QEMU {number}: qcow2 with LUKS, FUSE export of qemu-storage-daemon"))
    }

    fn renew(&mut self) -> Result<()> {
        renewed(&self.home)?;
        Ok(std::fs::create_dir_all(self.repository())?)
    }

    /// It knows no restore points, so only the newest day is converted: it is then what is mounted.
    fn backup(&mut self, day: &str, source: &Path) -> Result<Option<Cost>> {
        if day != DAYS[DAYS.len() - 1] {
            return Ok(None);
        }
        let convert = || {
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", "raw", "-O", "qcow2", "--object", &Self::secret()]);
            let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.hash-alg=sha512";
            command.args(["-o", options]).arg(source.join(DISK)).arg(self.image());
            process::run(&mut command)
        };
        // It measures how long a key derivation takes, and now and then finds that it can't.
        (0..20).fold(convert(), |made, _| made.or_else(|_| convert())).map(Some)
    }

    fn repository(&self) -> PathBuf {
        self.home.join("repository")
    }

    fn mount(&mut self, _disks: &Disks) -> Result<Mount> {
        // The export covers a file, not a folder.
        let mountpoint = self.home.join("disk.mnt");
        std::fs::write(&mountpoint, [])?;
        let mountpoint = mountpoint.canonicalize()?;
        let mut command = Command::new("qemu-storage-daemon");
        command.args([
            "--object",
            &Self::secret(),
            "--blockdev",
            &format!("{},node-name=disk,read-only=on", self.node()),
        ]);
        command.args([
            "--export",
            &format!("fuse,id=export,node-name=disk,writable=off,mountpoint={}", mountpoint.display()),
        ]);
        Mount::foreground(&mut command, mountpoint.clone(), mountpoint)
    }

    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>> {
        let file = out.join(DISK);
        let mut command = Command::new("qemu-img");
        command.args(["convert", "--object", &Self::secret(), "--image-opts", &self.node(), "-O", "raw"]).arg(&file);
        let cost = process::run(&mut command)?;
        Ok(Some((file, cost)))
    }
}
