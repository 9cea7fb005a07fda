//! Reads through a mount.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::{Result, process};

/// The part of the disk that is read: nearly all of it is in use.
const SEQUENTIAL_MIB: u32 = 1000;
pub(crate) const RANDOM_MIB: u32 = 1200;
pub(crate) const RANDOM_SECONDS: u32 = 6;
/// Where the test disk's file system begins: a byte that every reader wants first.
const FIRST_BYTE: u64 = 1 << 20;

pub(crate) fn first_byte(disk: &Path) -> Result<()> {
    Ok(File::open(disk)?.read_exact_at(&mut [0; 512], FIRST_BYTE)?)
}

/// In MB/s, as `dd` counts them.
pub(crate) fn sequential(disk: &Path) -> Result<f64> {
    let mut command = Command::new("dd");
    command
        .arg(format!("if={}", disk.display()))
        .args(["of=/dev/null", "bs=1M"])
        .arg(format!("count={SEQUENTIAL_MIB}"));
    let cost = process::run(&mut command)?;
    Ok(f64::from(SEQUENTIAL_MIB) * f64::from(1 << 20) / 1e6 / cost.seconds)
}

pub(crate) struct Random {
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// 4 KiB reads, each reader in a part of its own, so that none finds what another has brought in; no block twice.
pub(crate) fn random(disk: &Path, readers: u32) -> Result<Random> {
    let part = format!("{}M", RANDOM_MIB / readers);
    let mut command = Command::new("fio");
    command.args([
        "--name=random",
        "--rw=randread",
        "--bs=4k",
        "--ioengine=psync",
        "--direct=0",
        "--invalidate=1",
        "--readonly",
    ]);
    command.args(["--thread", "--group_reporting", "--output-format=json", "--randrepeat=1"]);
    command.arg(format!("--filename={}", disk.display())).arg(format!("--numjobs={readers}"));
    command.args([
        format!("--size={part}"),
        format!("--offset_increment={part}"),
        format!("--runtime={RANDOM_SECONDS}"),
    ]);
    let job = fio(&mut command)?;
    let read = &job["read"];
    let number = |value: &Value| value.as_f64().ok_or("fio's output lacks a figure");
    let percentile = |name: &str| number(&read["clat_ns"]["percentile"][name]).map(|nanoseconds| nanoseconds / 1000.0);
    Ok(Random {
        per_second: number(&read["iops"])?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
    })
}

/// Runs `fio` with `--output-format=json`; what it says of its one job.
pub(crate) fn fio(command: &mut Command) -> Result<Value> {
    let text = process::output(command)?;
    // Notes may come before the document.
    let mut document: Value = serde_json::from_str(text.find('{').and_then(|at| text.get(at..)).unwrap_or_default())?;
    let job = document["jobs"][0].take();
    if job["error"] != 0 {
        return Err("fio failed".into());
    }
    Ok(job)
}
