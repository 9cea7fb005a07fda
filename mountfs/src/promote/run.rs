//! One move of disks, from their empty targets to devices that stand on them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reseal_qmp::{Client, MonitorError};
use serde::Serialize;
use serde_json::json;

use super::sweep::{delete_source, dismiss, sweep};
use super::vm::{self, Phase};
use super::{Ledger, Move, PromoteError, names};
use crate::target::{Created, TargetError};

/// How long a guest's requests may be held back until all disks are as far. Guests give up a disk after 30 s.
const HELD: Duration = Duration::from_secs(10);
/// How often jobs are looked at, if no event comes before.
const LOOK: Duration = Duration::from_millis(200);
/// The same while the guest's requests are held back.
const LOOK_SOON: Duration = Duration::from_millis(2);
/// What QEMU tells when a look may be worth it.
const EVENTS: [&str; 4] = ["JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_PENDING", "BLOCK_JOB_ERROR"];

/// How disks are moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// What is at a target is overwritten.
    pub force: bool,
    /// Most bytes a second that are copied of each disk; 0 for as many as can be. The guest's own writes come on top.
    pub speed: u64,
}

/// Who watches.
pub struct Watch<'a> {
    /// Told of bytes that were copied, and not of those before.
    pub progress: &'a dyn Fn(u64),
    /// Ends the move, as long as it can be ended.
    pub stop: &'a AtomicBool,
}

/// A disk on its way.
struct Moving<'a> {
    wish: &'a Move,
    target: Created,
    job: String,
    done: u64,
    /// The device stands on the target.
    is_moved: bool,
}

impl Moving<'_> {
    fn failed(&self, why: impl Into<String>) -> PromoteError {
        PromoteError::Failed {
            disk: self.wish.disk.clone(),
            target: self.wish.target.path().to_owned(),
            why: why.into(),
        }
    }
}

/// Bytes of all disks, and that each is where it is moved from.
pub fn lengths(client: &mut Client, moves: &[Move]) -> Result<Vec<u64>, PromoteError> {
    let mut lengths = Vec::new();
    for wish in moves {
        let Move { disk, device, .. } = wish;
        let found = vm::device(client, device)?;
        let found = found.ok_or_else(|| PromoteError::NoDevice { disk: disk.clone(), device: device.clone() })?;
        match found.node == wish.node {
            true => lengths.push(found.length),
            false => return Err(PromoteError::Elsewhere { disk: disk.clone(), node: found.node }),
        }
    }
    Ok(lengths)
}

/// Moves disks of a running VM, all or none; warnings. What an earlier move left in QEMU was settled before.
pub fn promote(
    client: &mut Client,
    moves: &[Move],
    options: Options,
    ledger: &mut dyn Ledger,
    watch: &Watch<'_>,
) -> Result<Vec<String>, PromoteError> {
    let lengths = lengths(client, moves)?;
    // All are looked at before the first is made.
    for (wish, &length) in moves.iter().zip(&lengths) {
        wish.target.demand_rewritable()?;
        wish.target.check(length, options.force)?;
    }
    let mut moving = Vec::new();
    let moved = begin(client, moves, &lengths, options, &mut moving)
        .and_then(|()| copy(client, &mut moving, watch))
        .and_then(|()| turn(client, &mut moving, ledger, watch));
    match moved {
        Ok(()) => Ok(end(client, moving)),
        // QEMU has gone, or does not answer, in a moment after which the targets count: they must stay.
        Err(e @ PromoteError::Unknown { .. }) => {
            moving.into_iter().for_each(|moving| drop(moving.target.finish()));
            Err(e)
        }
        Err(e) => Err(give_up(client, moving, e)),
    }
}

/// Takes everything away that was made, and says what could not be.
fn give_up(client: &mut Client, moving: Vec<Moving<'_>>, error: PromoteError) -> PromoteError {
    let left = match sweep(client) {
        Ok(left) => left,
        // With the VM, all of it has gone.
        Err(e) if e.is_gone() => Vec::new(),
        Err(e) => vec![format!("all that this move has in QEMU ({e})")],
    };
    // Only now QEMU has the files closed that go.
    for moving in moving.into_iter().filter(|moving| moving.is_moved) {
        let _ = delete_source(client, &moving.wish.node);
        let _ = moving.target.finish();
    }
    match (left.is_empty(), error) {
        (false, PromoteError::Failed { disk, target, why }) => {
            PromoteError::Failed { disk, target, why: format!("{why} (besides, QEMU keeps {})", left.join(", ")) }
        }
        (_, error) => error,
    }
}

fn begin<'a>(
    client: &mut Client,
    moves: &'a [Move],
    lengths: &[u64],
    options: Options,
    moving: &mut Vec<Moving<'a>>,
) -> Result<(), PromoteError> {
    for (wish, &length) in moves.iter().zip(lengths) {
        let target = wish.target.create(length, options.force)?;
        moving.push(Moving { wish, target, job: names::job(wish.nth), done: 0, is_moved: false });
    }
    for moving in moving.iter() {
        open(client, moving)?;
        let arguments = json!({
            "job-id": moving.job,
            "device": moving.wish.node,
            "target": names::target(moving.wish.nth),
            "filter-node-name": names::filter(moving.wish.nth),
            "sync": "full",
            // What the guest writes goes to both at once: however much that is, the copy comes to its end.
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
            "speed": options.speed,
            "auto-finalize": false,
            "auto-dismiss": false,
        });
        refused(client.call("blockdev-mirror", arguments), moving)?;
    }
    Ok(())
}

/// What QEMU refuses is this disk's failure.
fn refused<T>(result: Result<T, MonitorError>, moving: &Moving<'_>) -> Result<T, PromoteError> {
    result.map_err(|e| match e {
        MonitorError::Refused { description, .. } => moving.failed(description),
        other => other.into(),
    })
}

/// Has QEMU open a target.
fn open(client: &mut Client, moving: &Moving<'_>) -> Result<(), PromoteError> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct SecretObject<'a> {
        qom_type: &'a str,
        id: &'a str,
        data: &'a str,
    }
    let wish = moving.wish;
    let (node, id) = (names::target(wish.nth), names::secret(wish.nth));
    if let Some(secret) = wish.target.secret() {
        let object = SecretObject { qom_type: "secret", id: &id, data: secret.expose() };
        client.execute("object-add", Some(&object), None)?;
    }
    let opened = client.call("blockdev-add", moving.target.blockdev(&node, &id));
    if wish.target.secret().is_some() {
        // It is needed no longer: QEMU has the volume's key.
        client.call("object-del", json!({ "id": id }))?;
    }
    match opened {
        Err(MonitorError::Refused { description, .. }) => Err(PromoteError::Unopened {
            disk: wish.disk.clone(),
            target: wish.target.path().to_owned(),
            why: description,
        }),
        other => Ok(other.map(drop)?),
    }
}

/// Looks at all jobs once; whether each has reached that phase.
fn look(
    client: &mut Client,
    moving: &mut [Moving<'_>],
    phase: &Phase,
    watch: &Watch<'_>,
) -> Result<bool, PromoteError> {
    let jobs = vm::jobs(client)?;
    let mut reached = true;
    for moving in moving {
        let Some(job) = jobs.iter().find(|job| job.id == moving.job) else {
            return Err(moving.failed("somebody has ended its job in QEMU"));
        };
        if let Phase::Ended { error } = &job.phase {
            return Err(moving.failed(error.as_deref().unwrap_or("somebody has cancelled its job in QEMU")));
        }
        if job.done > moving.done {
            (watch.progress)(job.done - moving.done);
            moving.done = job.done;
        }
        reached &= job.phase == *phase;
    }
    Ok(reached)
}

/// Until all targets have what their sources have.
fn copy(client: &mut Client, moving: &mut [Moving<'_>], watch: &Watch<'_>) -> Result<(), PromoteError> {
    loop {
        let is_ready = look(client, moving, &Phase::Ready, watch)?;
        if watch.stop.load(Ordering::Relaxed) {
            return Err(PromoteError::Interrupted);
        }
        if is_ready {
            return Ok(());
        }
        client.wait_event(&EVENTS, Instant::now() + LOOK)?;
    }
}

/// Ends the jobs but for their last step. From each job's end on its guest waits, and QEMU has flushed the target.
fn hold(client: &mut Client, moving: &mut [Moving<'_>], watch: &Watch<'_>) -> Result<(), PromoteError> {
    let until = Instant::now() + HELD;
    let late =
        |moving: &[Moving<'_>]| moving[0].failed(format!("its last bytes took longer than {} s", HELD.as_secs()));
    let mut asked = 0;
    while asked < moving.len() || !look(client, moving, &Phase::Pending, watch)? {
        if Instant::now() > until {
            return Err(late(moving));
        }
        if asked < moving.len() {
            match client.call("job-complete", json!({ "id": moving[asked].job })) {
                Ok(_) => {
                    asked += 1;
                    continue;
                }
                // One that stands still for a moment can't be told.
                Err(MonitorError::Refused { .. }) => {}
                Err(e) => return Err(e.into()),
            }
            look(client, moving, &Phase::Ready, watch)?;
        }
        client.wait_event(&EVENTS, Instant::now() + LOOK_SOON)?;
    }
    Ok(())
}

/// Has the devices stand on their targets.
fn turn(
    client: &mut Client,
    moving: &mut [Moving<'_>],
    ledger: &mut dyn Ledger,
    watch: &Watch<'_>,
) -> Result<(), PromoteError> {
    hold(client, moving, watch)?;
    for moving in moving.iter() {
        moving.target.sync()?;
    }
    let wishes: Vec<&Move> = moving.iter().map(|moving| moving.wish).collect();
    if let Err(e) = ledger.moved(&wishes) {
        // Part of it may be there.
        let _ = ledger.stayed(&wishes);
        return Err(e);
    }
    let mut failed = None;
    for moving in moving.iter_mut() {
        match finalize(client, moving) {
            Ok(()) => moving.is_moved = true,
            Err(e @ PromoteError::Unknown { .. }) => return Err(e),
            Err(e) => drop(failed.get_or_insert(e)),
        }
    }
    let Some(e) = failed else { return Ok(()) };
    let stayed: Vec<&Move> = moving.iter().filter(|moving| !moving.is_moved).map(|moving| moving.wish).collect();
    ledger.stayed(&stayed)?;
    Err(e)
}

/// The last step of one disk. Whatever QEMU says of the job, where the device stands decides: somebody else may have taken
/// the step.
fn finalize(client: &mut Client, moving: &Moving<'_>) -> Result<(), PromoteError> {
    let unknown = |source| PromoteError::Unknown { target: moving.wish.target.path().to_owned(), source };
    let mut why = match client.call("job-finalize", json!({ "id": moving.job })) {
        Err(MonitorError::Refused { description, .. }) => Some(description),
        other => other.map(|_| None).map_err(unknown)?,
    };
    loop {
        let jobs = vm::jobs(client).map_err(unknown)?;
        match jobs.into_iter().find(|job| job.id == moving.job).map(|job| job.phase) {
            Some(Phase::Ended { error }) => {
                why = error.or(why);
                break;
            }
            Some(_) if why.is_none() => {}
            _ => break,
        }
        client.wait_event(&EVENTS, Instant::now() + LOOK_SOON).map_err(unknown)?;
    }
    let stands = vm::device(client, &moving.wish.device).map_err(unknown)?;
    match stands.is_some_and(|device| device.node == names::target(moving.wish.nth)) {
        true => Ok(()),
        false => Err(moving.failed(why.as_deref().unwrap_or("QEMU did not put the device on its target"))),
    }
}

/// What is left to do when the devices stand on their targets; what could not be done.
fn end(client: &mut Client, moving: Vec<Moving<'_>>) -> Vec<String> {
    let mut warnings = Vec::new();
    for moving in moving {
        let wish = moving.wish;
        let removed = dismiss(client, &moving.job).and_then(|()| delete_source(client, &wish.node));
        match removed {
            Ok(true) => {}
            Ok(false) => warnings.push(format!("QEMU keeps {}, on which nothing stands any more", wish.node)),
            Err(e) => warnings.push(format!("QEMU may keep {}, on which nothing stands any more: {e}", wish.node)),
        }
        if let Err(e @ TargetError::Io { .. }) = moving.target.finish() {
            warnings.push(e.to_string());
        }
    }
    // A guest that was paused, because the overlay was full or could not be reached, has room now.
    let let_go = vm::is_paused_by_error(client).and_then(|paused| match paused {
        true => client.call("cont", serde_json::Value::Null).map(drop),
        false => Ok(()),
    });
    if let Err(e) = let_go {
        warnings.push(format!("whether the guest runs could not be seen: {e}"));
    }
    warnings
}
