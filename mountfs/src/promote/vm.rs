//! What QEMU says of a VM's devices and of the jobs that move its disks.

use reseal_qmp::{Client, MonitorError};
use serde_json::{Value, json};

/// A guest's device, and what it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) node: String,
    /// Bytes that the guest sees.
    pub(super) length: u64,
}

/// Finds a device by its id; none if the VM has no such device, or nothing is in it.
pub(super) fn device(client: &mut Client, id: &str) -> Result<Option<Device>, MonitorError> {
    let devices = client.list("query-block", Value::Null)?;
    let lacks = |what| MonitorError::Answer { command: "query-block".into(), what };
    // A virtio disk's back end has its device's id in the middle of its path.
    let of_id = |entry: &&Value| entry["qdev"].as_str().is_some_and(|path| path.split('/').any(|part| part == id));
    let Some(inserted) = devices.iter().find(of_id).map(|entry| &entry["inserted"]).filter(|it| it.is_object()) else {
        return Ok(None);
    };
    Ok(Some(Device {
        node: inserted["node-name"].as_str().ok_or_else(|| lacks("the node of a disk"))?.to_owned(),
        length: inserted["image"]["virtual-size"].as_u64().ok_or_else(|| lacks("the size of a disk"))?,
    }))
}

/// Nodes on which devices stand.
pub(super) fn nodes_in_use(client: &mut Client) -> Result<Vec<String>, MonitorError> {
    let devices = client.list("query-block", Value::Null)?;
    let nodes = devices.iter().filter_map(|entry| entry["inserted"]["node-name"].as_str());
    Ok(nodes.map(str::to_owned).collect())
}

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    AtWork,
    /// The target has what the source has, and gets what the guest writes.
    Ready,
    /// It has ended well but for its last step, and holds the guest's requests back.
    Pending,
    Ended {
        error: Option<String>,
    },
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) phase: Phase,
    /// Bytes that were copied, of those that are known to be needed.
    pub(super) done: u64,
}

/// The jobs of all moves.
pub(super) fn jobs(client: &mut Client) -> Result<Vec<Job>, MonitorError> {
    let jobs = client.list("query-jobs", Value::Null)?;
    let ours = jobs.iter().filter_map(|job| Some((job["id"].as_str().filter(|id| super::names::is_ours(id))?, job)));
    let parsed = ours.map(|(id, job)| Job {
        id: id.to_owned(),
        phase: match job["status"].as_str().unwrap_or_default() {
            "ready" => Phase::Ready,
            "pending" => Phase::Pending,
            "concluded" => Phase::Ended { error: job["error"].as_str().map(str::to_owned) },
            // Also one that stands still for a moment, while something else needs the disk to be quiet.
            _ => Phase::AtWork,
        },
        done: job["current-progress"].as_u64().unwrap_or(0),
    });
    Ok(parsed.collect())
}

/// Whether the guest was paused for an error of a disk.
pub(super) fn is_paused_by_error(client: &mut Client) -> Result<bool, MonitorError> {
    Ok(client.call("query-status", Value::Null)?["status"] == "io-error")
}

/// What is refused concerns one thing only; anything else is an error.
pub(super) fn unless_refused<T>(result: Result<T, MonitorError>) -> Result<Option<T>, MonitorError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MonitorError::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Deletes a node that nothing stands on; whether it went.
pub(super) fn delete_node(client: &mut Client, node: &str) -> Result<bool, MonitorError> {
    Ok(unless_refused(client.call("blockdev-del", json!({ "node-name": node })))?.is_some())
}
