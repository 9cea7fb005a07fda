//! Small writes that are to be durable soon.

use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::reads::{RANDOM_MIB, RANDOM_SECONDS, fio};

/// Where `fio` writes: the options that say so.
pub(super) fn file(path: &Path) -> Vec<String> {
    vec!["--ioengine=psync".to_owned(), "--direct=0".to_owned(), format!("--filename={}", path.display())]
}

/// The same of an export, one request at a time as well.
pub(super) fn export(uri: String) -> Vec<String> {
    vec!["--ioengine=nbd".to_owned(), "--iodepth=1".to_owned(), format!("--uri={uri}")]
}

/// 4 KiB writes in any order, with an fsync after each 32; a second.
pub(super) fn random(to: &[String]) -> Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=writes", "--rw=randwrite", "--bs=4k", "--fsync=32", "--end_fsync=1", "--fallocate=none"]);
    command.args(["--randrepeat=1", "--thread", "--output-format=json"]).args(to);
    command.args([format!("--size={RANDOM_MIB}M"), format!("--runtime={RANDOM_SECONDS}")]);
    let job = fio(&mut command)?;
    let count = job["write"]["total_ios"].as_f64().zip(job["job_runtime"].as_f64());
    let (writes, milliseconds) = count.ok_or("fio's output lacks a figure")?;
    // With what the last fsync took.
    Ok(writes / milliseconds * 1000.0)
}
