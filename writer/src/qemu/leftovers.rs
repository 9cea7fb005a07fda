//! Removing what reseal has in a QEMU: after a backup, and after a run that died.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reseal_qmp::{Client, MonitorError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::marker::Marker;
use super::names::{LISTENER, MARKER, is_ours};
use crate::guardian::ProcessId;

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
fn fatal<T>(result: Result<T, MonitorError>) -> Result<Option<T>, MonitorError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MonitorError::Refused { .. }) => Ok(None),
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
                Err(QemuError::Monitor(MonitorError::Silent { .. })) if Instant::now() < end => {}
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
        // As long as something is left, the next run must know whose it is.
        if left.is_empty() {
            release(&mut client)?;
        }
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
        match &self.server {
            Some(server) if !others => stop_server(client, server, deadline, left),
            _ => Ok(()),
        }
    }

    fn bitmaps(&self, client: &mut Client, left: &mut Vec<String>) -> Result<(), QemuError> {
        for (node, bitmap) in bitmaps(client)? {
            if is_ours(&bitmap) && !self.keep.contains(&bitmap) {
                let removed = client.call("block-dirty-bitmap-remove", json!({ "node": node, "name": bitmap }));
                match removed {
                    Err(MonitorError::Refused { description, .. }) => {
                        left.push(format!("bitmap {bitmap} of node {node} ({description})"));
                    }
                    other => drop(other?),
                }
            }
        }
        Ok(())
    }
}

/// Stops QEMU's NBD server if it is the one that listens on this socket.
fn stop_server(client: &mut Client, server: &Path, deadline: Instant, left: &mut Vec<String>) -> Result<(), QemuError> {
    // If the writer died in between, or another server was there, QEMU has the listener but does not serve it.
    fatal(client.call("closefd", json!({ "fdname": LISTENER })))?;
    // QEMU 7.2 waits in nbd-server-stop, with the whole VM and for ever, for a client that has not chosen an export.
    // Those that have were disconnected with it.
    while let Some(clients) = connections(server)? {
        if clients == 0 {
            return Ok(fatal(client.call("nbd-server-stop", Value::Null)).map(drop)?);
        }
        if Instant::now() > deadline {
            left.push("an NBD server that somebody is connected to".into());
            return Ok(());
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
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
    Ok(fatal(client.call("closefd", json!({ "fdname": LISTENER }))).map(drop)?)
}

/// Removes the marker of the run.
pub(super) fn release(client: &mut Client) -> Result<(), QemuError> {
    Ok(fatal(client.call("object-del", json!({ "id": MARKER }))).map(drop)?)
}

/// How many clients are connected to a listener of this path; `None` if there is no such listener. Its file may be
/// gone.
fn connections(path: &Path) -> Result<Option<usize>, QemuError> {
    let table = std::fs::read_to_string("/proc/net/unix");
    let table = table.map_err(|e| QemuError::host("see which sockets there are (/proc/net/unix)", e))?;
    Ok(connected(&table, &path.display().to_string()))
}

/// The same, of a table of sockets (proc(5)): a listener has flag 10000, and its end of each connection, which has its
/// path too, is in state 3.
fn connected(table: &str, path: &str) -> Option<usize> {
    let ends = |line: &&str| line.strip_suffix(path).is_some_and(|rest| rest.ends_with(' '));
    let field = |line: &str, nth: usize| line.split_whitespace().nth(nth).unwrap_or_default().to_owned();
    let lines: Vec<_> = table.lines().filter(ends).collect();
    let listens = lines.iter().any(|line| field(line, 3) == "00010000");
    listens.then(|| lines.iter().filter(|line| field(line, 5) == "03").count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_counted() {
        let table = "\
Num       RefCount Protocol Flags    Type St Inode Path
00000000308c686d: 00000002 00000000 00010000 0001 01 1704149 /run/n.sock
00000000b7523d02: 00000003 00000000 00000000 0001 03 1704151 /run/n.sock
00000000b7523d03: 00000003 00000000 00000000 0001 03 1704152 /run/other/run/n.sock
00000000b7523d04: 00000003 00000000 00000000 0001 03     0 /run/n.sock
00000000b7523d05: 00000003 00000000 00000000 0001 03 1704153
";
        assert_eq!(connected(table, "/run/n.sock"), Some(2));
        assert_eq!(connected(table, "/run/other/run/n.sock"), None, "nobody listens any more");
        assert_eq!(connected(table, "/run/m.sock"), None);
    }
}
