//! Where the disks of a VM are that runs, once what a move left behind that died has been brought to its end.

use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_qmp::{Client, MonitorError};
use serde_json::json;

use super::names;
use super::sweep::{delete_source, sweep};
use super::vm::{self, Phase, unless_refused};

const AGAIN: Duration = Duration::from_millis(10);
/// How long the last step of a job may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Where a disk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stands {
    Overlay,
    Target,
}

/// A disk as QEMU has it, and whether it is recorded as moved.
pub struct Recorded<'a> {
    pub nth: usize,
    pub device: &'a str,
    pub node: &'a str,
    pub is_moved: bool,
}

/// Ends all that is left of a move in QEMU, the way that was recorded; then where each disk stands. A move that waits for its
/// last step is finished if it was recorded, for then its target has all; anything else is cancelled.
pub fn settle(client: &mut Client, disks: &[Recorded<'_>]) -> Result<Vec<Stands>, MonitorError> {
    for disk in disks.iter().filter(|disk| disk.is_moved) {
        finish(client, &names::job(disk.nth))?;
    }
    sweep(client)?;
    let mut stand = Vec::new();
    for disk in disks {
        let device = vm::device(client, disk.device)?;
        let is_moved = device.is_some_and(|device| names::is_target(&device.node));
        if is_moved {
            delete_source(client, disk.node)?;
        }
        stand.push(if is_moved { Stands::Target } else { Stands::Overlay });
    }
    Ok(stand)
}

/// Takes the last step of a job, if that is what it waits for.
fn finish(client: &mut Client, job: &str) -> Result<(), MonitorError> {
    let until = Instant::now() + LIMIT;
    let mut is_asked = false;
    loop {
        let phase = vm::jobs(client)?.into_iter().find(|found| found.id == job).map(|found| found.phase);
        match phase {
            Some(Phase::Pending) if !is_asked => {
                unless_refused(client.call("job-finalize", json!({ "id": job })))?;
                is_asked = true;
            }
            Some(Phase::Pending | Phase::AtWork) if is_asked && Instant::now() < until => sleep(AGAIN),
            _ => return Ok(()),
        }
    }
}
