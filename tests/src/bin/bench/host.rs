//! The machine: its disks for the test, its page cache, its mounts, and what the document says about it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::plan::Plan;
use crate::{Result, process};

/// The states of the test disk, oldest first.
pub(crate) const DAYS: [&str; 3] = ["base", "day1", "day2"];

pub(crate) struct Disks {
    pub(crate) folder: PathBuf,
    /// What the disks hold and how much changed, as the script that made them says.
    pub(crate) summary: String,
}

impl Disks {
    pub(crate) fn path(&self, day: &str) -> PathBuf {
        self.folder.join(format!("{day}.raw"))
    }

    pub(crate) fn newest(&self) -> PathBuf {
        self.path(DAYS[DAYS.len() - 1])
    }

    pub(crate) fn length(&self) -> Result<u64> {
        Ok(std::fs::metadata(self.newest())?.len())
    }
}

pub(crate) fn require_root() -> Result<()> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err("run as root: it mounts and drops caches".into()) }
}

/// Installs what is missing and makes the disks, both once.
pub(crate) fn prepare(plan: &Plan) -> Result<Disks> {
    let script = |name: &str| {
        let mut command = Command::new(plan.workspace.join("tests/scripts").join(name));
        command.env("RESEAL_CACHE", &plan.cache);
        command
    };
    eprintln!("bench: preparing (what is missing is installed and made, once)");
    if !script("setup.sh").arg("bench").status()?.success() {
        return Err("tests/scripts/setup.sh bench failed".into());
    }
    let folder = plan.cache.join("disk");
    let summary = script("debian-disk.sh").arg(&folder).stderr(std::process::Stdio::inherit()).output()?;
    if !summary.status.success() {
        return Err("tests/scripts/debian-disk.sh failed".into());
    }
    Ok(Disks { folder, summary: String::from_utf8_lossy(&summary.stdout).trim().to_owned() })
}

/// Everything that was written reaches the disk, and the page cache forgets it.
pub(crate) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    Ok(())
}

/// Reads what a sparse file holds, so that a backup of it is not a test of the disk it lies on.
pub(crate) fn warm(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap_or(length);
        at = start;
        while at < end {
            let read = file.read_at(&mut buffer, at)?;
            if read == 0 {
                return Ok(());
            }
            at += read as u64;
        }
    }
    Ok(())
}

/// What a file or a folder takes on disk: lengths of files, less their holes.
pub(crate) fn stored_mib(path: &Path) -> Result<f64> {
    fn bytes(path: &Path) -> std::io::Result<u64> {
        let about = std::fs::symlink_metadata(path)?;
        if !about.is_dir() {
            return Ok(about.len().min(about.blocks() * 512));
        }
        std::fs::read_dir(path)?.map(|entry| bytes(&entry?.path())).sum()
    }
    Ok(bytes(path)? as f64 / f64::from(1 << 20))
}

/// Ends every mount below a folder, including those that an earlier, interrupted run left. Lazily: a process that still
/// reads must not keep the mount.
pub(crate) fn unmount_below(folder: &Path) {
    let Ok(folder) = folder.canonicalize() else { return };
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    let mut below: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    below.retain(|mountpoint| Path::new(mountpoint).starts_with(&folder));
    for mountpoint in below.into_iter().rev() {
        eprintln!("bench: unmounting {mountpoint}, left over");
        let _ = Command::new("umount").args(["--lazy", mountpoint]).status();
    }
}

pub(crate) fn is_mounted(mountpoint: &Path) -> bool {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return false };
    mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|mounted| Path::new(mounted) == mountpoint))
}

/// The part of the processors' time that nobody used during one second, in percent.
pub(crate) fn idle_percent() -> Result<f64> {
    let times = || -> Result<(f64, f64)> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        let times: Vec<f64> = line.split_whitespace().skip(1).map(str::parse).collect::<std::result::Result<_, _>>()?;
        Ok((times.iter().sum(), times.get(3).copied().unwrap_or(0.0) + times.get(4).copied().unwrap_or(0.0)))
    };
    let (all, idle) = times()?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let (all_later, idle_later) = times()?;
    Ok(100.0 * (idle_later - idle) / (all_later - all).max(1.0))
}

/// The processor, memory, kernel and file system under which the figures were taken.
pub(crate) fn describe(work: &Path) -> String {
    let first = |path: &str, key: &str| -> String {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let value = text.lines().find(|line| line.starts_with(key)).and_then(|line| line.split_once(':'));
        value.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let memory: f64 = first("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // What follows the numbers names a distribution's build or a machine's owner.
    let kernel: String = release.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let kind = process::output(Command::new("findmnt").args(["-n", "-o", "FSTYPE", "--target"]).arg(work));
    format!(
        "{processors} × {}, {:.0} GiB of memory, Linux {}, {}",
        first("/proc/cpuinfo", "model name"),
        memory / f64::from(1 << 20),
        kernel.trim_end_matches('.'),
        kind.unwrap_or_else(|_| "unknown file system".to_owned()),
    )
}

pub(crate) fn today() -> String {
    process::output(Command::new("date").args(["--utc", "+%Y-%m-%d"])).unwrap_or_default()
}
