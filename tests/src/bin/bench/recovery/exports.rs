//! Reads of an export by the tools that everybody has.

use std::process::Command;

use crate::reads::{RANDOM_MIB, RANDOM_SECONDS, fio};
use crate::{Result, process};

/// 4 KiB reads, so many at once, no block twice; a second.
pub(super) fn random(uri: String, depth: u32) -> Result<f64> {
    let mut command = Command::new("fio");
    command.args([
        "--name=random",
        "--rw=randread",
        "--bs=4k",
        "--ioengine=nbd",
        "--output-format=json",
        "--randrepeat=1",
    ]);
    command.arg(format!("--uri={uri}")).arg(format!("--iodepth={depth}"));
    command.args([format!("--size={RANDOM_MIB}M"), format!("--runtime={RANDOM_SECONDS}")]);
    let job = fio(&mut command)?;
    job["read"]["iops"].as_f64().ok_or_else(|| "fio's output lacks a figure".into())
}

/// A copy of all of it to nowhere, in seconds.
pub(super) fn copied(uri: String) -> Result<f64> {
    Ok(process::run(Command::new("nbdcopy").arg(uri).arg("null:"))?.seconds)
}
