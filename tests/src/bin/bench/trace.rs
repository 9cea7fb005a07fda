//! The reads of a boot: recorded once from the emulator, then replayed against each mount. An emulated boot itself takes
//! nearly as long from any storage, which hides what is to be seen.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::Result;
use crate::contender::{DISK, Mount};
use crate::host::Disks;
use crate::plan::Plan;
use crate::process;

pub(crate) struct Trace {
    reads: Vec<(u64, usize)>,
}

impl Trace {
    /// The trace of the newest disk; recorded if there is none, or an older disk's.
    pub(crate) fn recorded(plan: &Plan, disks: &Disks) -> Result<Self> {
        let path = disks.folder.join("boot-reads.txt");
        let current = match std::fs::metadata(&path) {
            Ok(about) => about.modified()? >= std::fs::metadata(disks.newest())?.modified()?,
            Err(_) => false,
        };
        if !current {
            record(plan, disks, &path)?;
        }
        Self::parse(&std::fs::read_to_string(&path)?)
    }

    fn parse(text: &str) -> Result<Self> {
        let body = text.strip_suffix("end\n").ok_or("the recorded boot has no end")?;
        let read = |line: &str| -> Result<(u64, usize)> {
            let (offset, length) = line.split_once(' ').ok_or("a line of the recorded boot is no read")?;
            Ok((offset.parse()?, length.parse()?))
        };
        Ok(Self { reads: body.lines().map(read).collect::<Result<_>>()? })
    }

    pub(crate) fn summary(&self) -> String {
        let bytes: usize = self.reads.iter().map(|(_, length)| length).sum();
        format!("{} reads of {} MB", self.reads.len(), bytes / 1_000_000)
    }

    /// Offset and length of each.
    pub(crate) fn reads(&self) -> &[(u64, usize)] {
        &self.reads
    }

    pub(crate) fn longest(&self) -> usize {
        self.reads.iter().map(|(_, length)| *length).max().unwrap_or(0)
    }

    /// One read after the other, as fast as they are answered; in seconds.
    pub(crate) fn replay(&self, disk: &Path) -> Result<f64> {
        let disk = File::open(disk)?;
        let mut buffer = vec![0; self.longest()];
        let began = Instant::now();
        for (offset, length) in &self.reads {
            disk.read_exact_at(&mut buffer[..*length], *offset)?;
        }
        Ok(began.elapsed().as_secs_f64())
    }
}

fn record(plan: &Plan, disks: &Disks, path: &PathBuf) -> Result<()> {
    eprintln!("bench: recording the reads of a boot, once");
    let mountpoint = plan.work.join("recording");
    std::fs::create_dir_all(&mountpoint)?;
    let mountpoint = mountpoint.canonicalize()?;
    let log = plan.work.join("boot-reads.part");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("log-reads").arg(&mountpoint).arg(disks.newest()).arg(&log);
    let mount = Mount::foreground(&mut command, mountpoint.clone(), mountpoint.join(DISK))?;
    process::run(Command::new(plan.workspace.join("tests/scripts/boot.sh")).arg(&mount.file))?;
    drop(mount);
    // Another file system perhaps, so not a rename; nothing reads it before it is whole.
    let text = std::fs::read_to_string(&log)?;
    Trace::parse(&text)?;
    Ok(std::fs::write(path, text)?)
}
