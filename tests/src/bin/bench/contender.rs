//! What each tool can be asked for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::host::{self, Disks};
use crate::plan::Plan;
use crate::process::{self, Cost, Server};
use crate::samples::Samples;
use crate::{Result, borg, luks, null, reseal, restic, rustic};

/// The passphrase of every repository here; they hold nothing but the test disk.
pub(crate) const PASSPHRASE: &str = "benchmark";
/// What the disk is called in each repository.
pub(crate) const DISK: &str = "disk.raw";
/// Longer than any tool needs to mount; shorter than patience.
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

pub(crate) trait Contender {
    fn name(&self) -> &'static str;

    /// Name, version and settings, as the document prints them. Fails if the tool is not there.
    fn about(&self) -> Result<String>;

    /// The tool's program alone, so that it is in memory: its start from disk is not what is measured.
    fn warm(&self) -> Result<()> {
        self.about().map(drop)
    }

    /// An empty repository in place of any earlier one.
    fn renew(&mut self) -> Result<()>;

    /// One restore point from `source`, a folder that holds the day's disk as `DISK`; None where the tool has no such thing.
    fn backup(&mut self, day: &str, source: &Path) -> Result<Option<Cost>>;

    /// Where all that it stores lies.
    fn repository(&self) -> PathBuf;

    /// Makes the newest point readable as a file.
    fn mount(&mut self, disks: &Disks) -> Result<Mount>;

    /// The newest point as a raw file in `out`, an empty folder; its path, and what it cost.
    fn restore(&mut self, out: &Path) -> Result<Option<(PathBuf, Cost)>>;
}

pub(crate) fn all(plan: &Plan, samples: &mut Samples) -> Vec<Box<dyn Contender>> {
    let candidates: Vec<Box<dyn Contender>> = vec![
        Box::new(reseal::Reseal::new(plan)),
        Box::new(restic::Restic::new(plan)),
        Box::new(rustic::Rustic::new(plan)),
        Box::new(borg::Borg::new(plan)),
        Box::new(luks::Luks::new(plan)),
        Box::new(null::Null::new(plan)),
    ];
    let mut present = Vec::new();
    for contender in candidates.into_iter().filter(|contender| plan.includes(contender.name())) {
        match contender.about() {
            Ok(about) => {
                samples.describe(contender.name(), &about);
                present.push(contender);
            }
            Err(error) => {
                eprintln!("bench: {} left out: {error}", contender.name());
                samples.leave_out(contender.name(), &error.to_string());
            }
        }
    }
    present
}

/// A mounted restore point.
pub(crate) struct Mount {
    mountpoint: PathBuf,
    /// The disk in it.
    pub(crate) file: PathBuf,
    server: Serving,
}

enum Serving {
    /// A child that serves until it is unmounted.
    Child(Server),
    /// A process that the tool left in the background, by its name, and the command that ends it.
    Background { name: &'static str, end: Box<Command> },
}

impl Mount {
    /// Starts a program that serves `mountpoint` in the foreground; `file` is where its disk will appear.
    pub(crate) fn foreground(command: &mut Command, mountpoint: PathBuf, file: PathBuf) -> Result<Self> {
        let log = mountpoint.with_extension("log");
        let server = Server::start(command, &log)?;
        let mut mount = Self { mountpoint, file, server: Serving::Child(server) };
        mount
            .wait_for_file()
            .map_err(|error| format!("{error}: {}", std::fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(mount)
    }

    /// What a program that has already gone into the background serves.
    pub(crate) fn background(name: &'static str, end: Command, mountpoint: PathBuf, file: PathBuf) -> Self {
        Self { mountpoint, file, server: Serving::Background { name, end: Box::new(end) } }
    }

    fn wait_for_file(&mut self) -> Result<()> {
        let began = Instant::now();
        // The mountpoint may be the file itself, which was there before.
        while !(host::is_mounted(&self.mountpoint) && self.file.exists()) {
            if let Serving::Child(server) = &mut self.server {
                server.running()?;
            }
            if began.elapsed() > MOUNT_LIMIT {
                return Err(format!("{} did not appear", self.file.display()).into());
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    pub(crate) fn peak_mib(&self) -> Result<f64> {
        match &self.server {
            Serving::Child(server) => process::peak_mib(server.pid()),
            Serving::Background { name, .. } => process::peak_mib(process::find(name, &self.mountpoint)?),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        match &mut self.server {
            Serving::Child(server) => {
                let unmounted =
                    Command::new("umount").arg(&self.mountpoint).status().is_ok_and(|status| status.success());
                if !unmounted || !server.end() {
                    eprintln!("bench: {} did not end cleanly", self.mountpoint.display());
                }
            }
            Serving::Background { end, .. } => {
                if let Err(error) = process::run(end) {
                    eprintln!("bench: {error}");
                }
            }
        }
        if host::is_mounted(&self.mountpoint) {
            host::unmount_below(&self.mountpoint);
        }
    }
}

/// A tool's own folder below the work folder, emptied; its parts are made by whoever needs them.
pub(crate) fn renewed(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)?;
    }
    Ok(std::fs::create_dir_all(folder)?)
}

/// The folder on which a tool mounts.
pub(crate) fn mountpoint(home: &Path) -> Result<PathBuf> {
    let mountpoint = home.join("mnt");
    std::fs::create_dir_all(&mountpoint)?;
    Ok(mountpoint.canonicalize()?)
}
