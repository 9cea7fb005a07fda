//! One tool's turn in one round: three backups, four cold mounts, one restore.

use std::path::Path;
use std::time::Instant;

use crate::contender::{Contender, DISK, renewed};
use crate::host::{self, DAYS, Disks};
use crate::plan::Plan;
use crate::samples::{Quantity, Samples};
use crate::trace::Trace;
use crate::{Result, process, reads};

pub(crate) fn take(
    plan: &Plan,
    disks: &Disks,
    trace: &Trace,
    contender: &mut dyn Contender,
    round: usize,
    samples: &mut Samples,
) -> Result<()> {
    contender.renew()?;
    back_up(plan, disks, contender, samples)?;
    read(disks, trace, contender, samples)?;
    restore(plan, disks, contender, round, samples)
}

/// The newest day's disk under the one name that every backup sees, as a VM's disk keeps its name.
pub(crate) fn present(disk: &Path, source: &Path) -> Result<()> {
    renewed(source)?;
    let link = source.join(DISK);
    if std::fs::hard_link(disk, &link).is_err() {
        process::run(std::process::Command::new("cp").arg("--sparse=always").arg(disk).arg(&link))?;
    }
    host::warm(&link)
}

fn back_up(plan: &Plan, disks: &Disks, contender: &mut dyn Contender, samples: &mut Samples) -> Result<()> {
    let source = plan.work.join("source");
    let mut peak: f64 = 0.0;
    for ((day, taken), stored) in DAYS.iter().zip(Quantity::BACKUP).zip(Quantity::STORED) {
        present(&disks.path(day), &source)?;
        contender.warm()?;
        rustix::fs::sync();
        if let Some(cost) = contender.backup(day, &source)? {
            samples.add(contender.name(), taken, cost.seconds);
            samples.add(contender.name(), stored, host::stored_mib(&contender.repository())?);
            peak = peak.max(cost.peak_mib);
        }
    }
    if peak > 0.0 {
        samples.add(contender.name(), Quantity::BackupPeak, peak);
    }
    Ok(())
}

enum Reading {
    Sequential,
    RandomOne,
    RandomFour,
    Boot,
}

fn read(disks: &Disks, trace: &Trace, contender: &mut dyn Contender, samples: &mut Samples) -> Result<()> {
    let name = contender.name();
    let mut peak: f64 = 0.0;
    for reading in [Reading::Sequential, Reading::RandomOne, Reading::RandomFour, Reading::Boot] {
        host::drop_caches()?;
        contender.warm()?;
        let began = Instant::now();
        // Mounted anew each time: what a server keeps in memory would warm the next reading.
        let mount = contender.mount(disks)?;
        reads::first_byte(&mount.file)?;
        samples.add(name, Quantity::FirstByte, began.elapsed().as_secs_f64() * 1000.0);
        match reading {
            Reading::Sequential => samples.add(name, Quantity::Sequential, reads::sequential(&mount.file)?),
            Reading::RandomOne => {
                let random = reads::random(&mount.file, 1)?;
                samples.add(name, Quantity::RandomOne, random.per_second);
                samples.add(name, Quantity::RandomOneP50, random.p50_us);
                samples.add(name, Quantity::RandomOneP99, random.p99_us);
            }
            Reading::RandomFour => {
                let random = reads::random(&mount.file, 4)?;
                samples.add(name, Quantity::RandomFour, random.per_second);
                samples.add(name, Quantity::RandomFourP50, random.p50_us);
                samples.add(name, Quantity::RandomFourP99, random.p99_us);
            }
            Reading::Boot => samples.add(name, Quantity::BootReads, trace.replay(&mount.file)?),
        }
        peak = peak.max(mount.peak_mib()?);
    }
    samples.add(name, Quantity::MountPeak, peak);
    Ok(())
}

fn restore(
    plan: &Plan,
    disks: &Disks,
    contender: &mut dyn Contender,
    round: usize,
    samples: &mut Samples,
) -> Result<()> {
    let out = plan.work.join("restored");
    renewed(&out)?;
    host::drop_caches()?;
    contender.warm()?;
    if let Some((file, cost)) = contender.restore(&out)? {
        samples.add(contender.name(), Quantity::Restore, cost.seconds);
        // A quick answer that is wrong is none.
        if round == 0 {
            process::run(std::process::Command::new("cmp").arg(file).arg(disks.newest()))?;
        }
    }
    Ok(std::fs::remove_dir_all(&out)?)
}
