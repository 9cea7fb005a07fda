//! Removing what reseal has in a QEMU: after a backup, and after a run that died.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::marker::Marker;
use super::names::{LISTENER, MARKER, is_ours};
use super::qmp::{Client, connect};
use crate::guardian::ProcessId;

/// What an NBD server says first.
const NBD_MAGIC: &[u8; 8] = b"NBDMAGIC";
/// Length of its greeting: the magic number twice, in two forms, and flags.
const NBD_GREETING: usize = 18;
/// A client's flags (fixed newstyle), and the option that ends the connection.
const NBD_ABORT: &[u8] = b"\0\0\0\x01IHAVEOPT\0\0\0\x02\0\0\0\0";
/// How long it may take to.
const NBD_ANSWER: Duration = Duration::from_secs(3);
/// Pause before it is asked again whether something is gone.
const AGAIN: Duration = Duration::from_millis(10);
/// How long a monitor that does not answer is tried again.
const MONITOR: Duration = Duration::from_secs(60);

/// What of ours is in a QEMU, and what may stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftovers {
    /// QEMU's monitor.
    pub qmp: PathBuf,
    /// Whose it is: only while the marker names this guardian, anything is removed.
    pub owner: ProcessId,
    /// The socket on which QEMU's NBD server listens if it is ours.
    pub server: Option<PathBuf>,
    /// Bitmaps that stay.
    pub keep: Vec<String>,
    /// How long one command may take.
    pub timeout_ms: u64,
}

/// Whether the other side can't be asked any more. What it refuses concerns one thing only.
fn fatal<T>(result: Result<T, QemuError>) -> Result<Option<T>, QemuError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(QemuError::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names of ours among the values of a key.
fn ours<'a>(list: &'a [Value], key: &'a str) -> impl Iterator<Item = String> + 'a {
    list.iter().filter_map(move |entry| entry[key].as_str()).filter(|name| is_ours(name)).map(str::to_owned)
}

impl Leftovers {
    /// Connects and removes all, as often as it takes for a minute. A VM that has ended has nothing left.
    pub(crate) fn remove(&self) -> Result<(), String> {
        let end = Instant::now() + MONITOR;
        loop {
            match self.try_remove() {
                Ok(left) if left.is_empty() => return Ok(()),
                Ok(left) => return Err(left.join("; ")),
                Err(e) if e.is_gone() => return Ok(()),
                Err(QemuError::Silent { .. }) if Instant::now() < end => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    }

    fn try_remove(&self) -> Result<Vec<String>, QemuError> {
        let mut client = Client::connect(&self.qmp, Duration::from_millis(self.timeout_ms))?;
        // The marker comes first and goes last: without it, what there is belongs to another run.
        if !Marker::read(&mut client)?.is_some_and(|marker| marker.guardian == self.owner) {
            return Ok(Vec::new());
        }
        let left = self.sweep(&mut client)?;
        release(&mut client)?;
        Ok(left)
    }

    /// Removes all but the marker; what could not be.
    pub(crate) fn sweep(&self, client: &mut Client) -> Result<Vec<String>, QemuError> {
        let mut left = Vec::new();
        self.exports(client, &mut left)?;
        jobs(client, &mut left)?;
        nodes(client, &mut left)?;
        self.bitmaps(client, &mut left)?;
        secrets(client)?;
        descriptors(client)?;
        Ok(left)
    }

    fn exports(&self, client: &mut Client, left: &mut Vec<String>) -> Result<(), QemuError> {
        let deadline = Instant::now() + client.timeout();
        let mut asked = Vec::new();
        let others = loop {
            let exports = client.list("query-block-exports", Value::Null)?;
            let present: Vec<_> = ours(&exports, "id").collect();
            if present.is_empty() {
                break exports.iter().any(|export| export["type"] == "nbd");
            }
            if Instant::now() > deadline {
                left.push(format!("NBD exports of QEMU: {}", present.join(", ")));
                break true;
            }
            for id in present.into_iter().filter(|id| !asked.contains(id)).collect::<Vec<_>>() {
                fatal(client.call("block-export-del", json!({ "id": id, "mode": "hard" })))?;
                asked.push(id);
            }
            std::thread::sleep(AGAIN);
        };
        // Somebody's export may have come to our server meanwhile; then it is theirs.
        if !others && self.server.as_deref().is_some_and(answers_nbd) {
            fatal(client.call("nbd-server-stop", Value::Null))?;
        }
        Ok(())
    }

    fn bitmaps(&self, client: &mut Client, left: &mut Vec<String>) -> Result<(), QemuError> {
        for (node, bitmap) in bitmaps(client)? {
            if is_ours(&bitmap) && !self.keep.contains(&bitmap) {
                let removed = client.call("block-dirty-bitmap-remove", json!({ "node": node, "name": bitmap }));
                match removed {
                    Err(QemuError::Refused { description, .. }) => {
                        left.push(format!("bitmap {bitmap} of node {node} ({description})"));
                    }
                    other => drop(other?),
                }
            }
        }
        Ok(())
    }
}

/// Node and name of each bitmap that can be removed.
fn bitmaps(client: &mut Client) -> Result<Vec<(String, String)>, QemuError> {
    let nodes = client.list("query-named-block-nodes", json!({ "flat": true }))?;
    let mut found = Vec::new();
    for node in nodes.iter().filter(|node| node["ro"] != true) {
        let names = node["dirty-bitmaps"].as_array().into_iter().flatten().filter_map(|bitmap| bitmap["name"].as_str());
        let node = node["node-name"].as_str().unwrap_or_default();
        found.extend(names.map(|name| (node.to_owned(), name.to_owned())));
    }
    Ok(found)
}

/// Cancels jobs and waits until they are gone.
pub(super) fn jobs(client: &mut Client, left: &mut Vec<String>) -> Result<(), QemuError> {
    let deadline = Instant::now() + client.timeout();
    loop {
        let jobs = client.list("query-jobs", Value::Null)?;
        let present: Vec<_> = ours(&jobs, "id").collect();
        if present.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            left.push(format!("block jobs of QEMU: {}", present.join(", ")));
            return Ok(());
        }
        for job in jobs.iter().filter(|job| job["id"].as_str().is_some_and(is_ours)) {
            let command = if job["status"] == "concluded" { "job-dismiss" } else { "job-cancel" };
            fatal(client.call(command, json!({ "id": job["id"] })))?;
        }
        std::thread::sleep(AGAIN);
    }
}

/// Deletes nodes, those that stand on others first.
fn nodes(client: &mut Client, left: &mut Vec<String>) -> Result<(), QemuError> {
    let deadline = Instant::now() + client.timeout();
    loop {
        let nodes = client.list("query-named-block-nodes", json!({ "flat": true }))?;
        let present: Vec<_> = ours(&nodes, "node-name").collect();
        if present.is_empty() {
            return Ok(());
        }
        let mut gone = 0;
        for node in &present {
            gone += usize::from(fatal(client.call("blockdev-del", json!({ "node-name": node })))?.is_some());
        }
        if gone == 0 {
            if Instant::now() > deadline {
                left.push(format!("block nodes of QEMU: {}", present.join(", ")));
                return Ok(());
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// Names of the objects of ours.
fn objects(client: &mut Client) -> Result<Vec<String>, QemuError> {
    let listed = fatal(client.list("qom-list", json!({ "path": "/objects" })))?.unwrap_or_default();
    Ok(ours(&listed, "name").collect())
}

fn secrets(client: &mut Client) -> Result<(), QemuError> {
    for object in objects(client)? {
        if object != MARKER {
            fatal(client.call("object-del", json!({ "id": object })))?;
        }
    }
    Ok(())
}

fn descriptors(client: &mut Client) -> Result<(), QemuError> {
    for set in client.list("query-fdsets", Value::Null)? {
        let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
        if ours(fds, "opaque").next().is_some() {
            fatal(client.call("remove-fd", json!({ "fdset-id": set["fdset-id"] })))?;
        }
    }
    // It is there only if the server was refused or the writer died in between.
    fatal(client.call("closefd", json!({ "fdname": LISTENER }))).map(drop)
}

/// Removes the marker of the run.
pub(super) fn release(client: &mut Client) -> Result<(), QemuError> {
    fatal(client.call("object-del", json!({ "id": MARKER }))).map(drop)
}

/// Whether somebody serves NBD there. A socket that QEMU was given but does not serve stays silent.
fn answers_nbd(socket: &Path) -> bool {
    let ask = || {
        let mut stream = connect(socket, Instant::now() + NBD_ANSWER).ok()?;
        stream.set_read_timeout(Some(NBD_ANSWER)).ok()?;
        let mut greeting = [0; NBD_GREETING];
        stream.read_exact(&mut greeting).ok()?;
        // A polite end, so that nothing is logged as an error. Whether it gets there does not matter.
        let _ = stream.write_all(NBD_ABORT).and_then(|()| stream.read(&mut [0; 64]));
        Some(greeting.starts_with(NBD_MAGIC))
    };
    ask().unwrap_or(false)
}
