//! Takes away what a move has in QEMU, by its names. The guest's devices stay where they stand.

use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_qmp::{Client, MonitorError};
use serde_json::json;

use super::names;
use super::vm::{self, Phase, delete_node, unless_refused};

/// Pause before it is asked again whether something is gone.
const AGAIN: Duration = Duration::from_millis(10);
/// How long jobs and nodes are waited for. A job may have requests at a source or target that does not answer.
const LIMIT: Duration = Duration::from_secs(60);

/// Cancels jobs, deletes nodes and secrets; what could not be.
pub(super) fn sweep(client: &mut Client) -> Result<Vec<String>, MonitorError> {
    let until = Instant::now() + LIMIT;
    let mut left = jobs(client, until)?;
    left.extend(nodes(client, until)?);
    let objects = client.list("qom-list", json!({ "path": "/objects" }))?;
    for id in objects.iter().filter_map(|object| object["name"].as_str()).filter(|id| names::is_ours(id)) {
        unless_refused(client.call("object-del", json!({ "id": id })))?;
    }
    Ok(left)
}

/// Cancels all jobs, in whatever state, and waits until they are gone.
fn jobs(client: &mut Client, until: Instant) -> Result<Vec<String>, MonitorError> {
    let mut asked = Vec::new();
    loop {
        let jobs = vm::jobs(client)?;
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        if Instant::now() > until {
            return Ok(jobs.into_iter().map(|job| format!("the job {}", job.id)).collect());
        }
        for job in jobs {
            if let Phase::Ended { .. } = job.phase {
                unless_refused(client.call("job-dismiss", json!({ "id": job.id })))?;
            } else if !asked.contains(&job.id) {
                unless_refused(client.call("job-cancel", json!({ "id": job.id })))?;
                asked.push(job.id);
            }
        }
        sleep(AGAIN);
    }
}

/// Deletes all nodes but those that devices stand on.
fn nodes(client: &mut Client, until: Instant) -> Result<Vec<String>, MonitorError> {
    let used = vm::nodes_in_use(client)?;
    loop {
        let nodes = client.list("query-named-block-nodes", json!({ "flat": true }))?;
        let ours = nodes.iter().filter_map(|node| node["node-name"].as_str()).filter(|name| names::is_target(name));
        let unused: Vec<&str> = ours.filter(|name| !used.iter().any(|used| used == name)).collect();
        if unused.is_empty() {
            return Ok(Vec::new());
        }
        let mut gone = 0;
        for node in &unused {
            gone += usize::from(delete_node(client, node)?);
        }
        if gone == 0 {
            if Instant::now() > until {
                return Ok(unused.iter().map(|node| format!("the node {node}")).collect());
            }
            sleep(AGAIN);
        }
    }
}

/// Deletes a source that nothing stands on any more, with which QEMU lets go of its export.
pub(super) fn delete_source(client: &mut Client, node: &str) -> Result<bool, MonitorError> {
    let until = Instant::now() + LIMIT;
    loop {
        let nodes = client.list("query-named-block-nodes", json!({ "flat": true }))?;
        let is_there = nodes.iter().any(|entry| entry["node-name"].as_str() == Some(node));
        if !is_there || delete_node(client, node)? {
            return Ok(true);
        }
        if Instant::now() > until {
            return Ok(false);
        }
        sleep(AGAIN);
    }
}

/// Ends the record of a job that has ended.
pub(super) fn dismiss(client: &mut Client, job: &str) -> Result<(), MonitorError> {
    unless_refused(client.call("job-dismiss", json!({ "id": job }))).map(drop)
}
