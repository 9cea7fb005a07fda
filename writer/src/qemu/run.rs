//! One snapshot of all disks of a VM, from its beginning to its end.
//!
//! ```text
//! marker → NBD server → per disk: scratch that stands on it → (freeze) one transaction (thaw) → exports
//! ```
//!
//! The transaction starts a job for each disk that copies to scratch whatever the guest is about to overwrite; so the
//! scratch shows the disk as it was. Only when all disks are still, because each has its job, are the bitmaps changed:
//! a new one begins to record, and what the old one has until then is merged into a third that is read.
//!
//! Architecture invariant: nothing is ever cleared or merged back. The old bitmap records until the restore point
//! exists.

use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::ids::PointId;
use reseal_format::manifest::{Definition, MAX_DEFINITION, Manifest, Tracking, method};
use reseal_qmp::{Client, MonitorError};
use serde::Serialize;
use serde_json::{Value, json};

use super::disks::{Disk, attached, refuse_threads, writable};
use super::leftovers::{Leftovers, release};
use super::machine::Machine;
use super::marker::Marker;
use super::names::{DiskParts, LISTENER, bitmap, changes};
use super::run_folder::RunFolder;
use super::scratch::Scratch;
use super::watch::Watch;
use super::{QemuError, QemuOptions, bitmaps};
use crate::guardian::{Freezer, Guardian, Plan, Undo};
use crate::live::{Snapshot, SnapshotDisk};

/// A UUID that nobody chose.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// A disk and what of ours belongs to it.
struct Taken {
    disk: Disk,
    parts: DiskParts,
    /// The bitmap that it goes on from.
    from: Result<String, String>,
}

/// What is at work in QEMU.
pub(super) struct Run {
    // First, so that nobody watches what is being removed.
    watch: Option<Watch>,
    client: Arc<Mutex<Client>>,
    guardian: Guardian,
    folder: RunFolder,
    leftovers: Leftovers,
    point: PointId,
    parts: Vec<DiskParts>,
}

impl Run {
    /// Connects, and removes what an earlier run left.
    pub(super) fn open(options: &QemuOptions, point: PointId, since: Option<&Manifest>) -> Result<Run, QemuError> {
        let qmp = std::path::absolute(&options.qmp).map_err(|e| QemuError::host("find the current folder", e))?;
        let client = Client::connect(&qmp, options.timeout)?;
        let guardian = Guardian::start(&options.program)?;
        let folder = RunFolder::new(guardian.id())?;
        let leftovers = Leftovers {
            qmp,
            owner: guardian.id().clone(),
            server: Some(folder.socket()),
            keep: bitmaps::named(since),
            timeout_ms: u64::try_from(options.timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let marker = Marker { guardian: guardian.id().clone(), server: folder.socket() };
        let client = Arc::new(Mutex::new(client));
        let mut run = Run { watch: None, client, guardian, folder, leftovers, point, parts: Vec::new() };
        // From here on a writer that dies leaves nothing.
        let plan = run.plan();
        run.guardian.plan(plan)?;
        let before = marker.claim(&mut run.client.lock())?;
        match run.clean(before) {
            Ok(()) => Ok(run),
            Err(e) => Err(run.give_up(e)),
        }
    }

    fn clean(&mut self, before: Option<Marker>) -> Result<(), QemuError> {
        let old = Leftovers { server: before.map(|before| before.server), ..self.leftovers.clone() };
        let left = old.sweep(&mut self.client.lock())?;
        match left.is_empty() {
            true => Ok(()),
            false => Err(QemuError::Unusable(format!(
                "an earlier backup left in QEMU what can't be removed: {}; remove it by hand, or restart the VM",
                left.join("; ")
            ))),
        }
    }

    fn plan(&self) -> Plan {
        let undo = [
            Undo::Qmp(self.leftovers.clone()),
            Undo::Remove(self.folder.socket()),
            Undo::Remove(self.folder.path().to_owned()),
        ];
        Plan { undo: undo.into() }
    }

    /// Undoes all after an error, which it returns.
    pub(super) fn give_up(self, error: QemuError) -> QemuError {
        let before = self.leftovers.keep.clone();
        let left = self.end(false, &before);
        match left.is_empty() || error.is_gone() {
            true => error,
            false => QemuError::Unusable(format!("{error}; besides, {}", left.join("; "))),
        }
    }

    /// Takes the moment.
    pub(super) fn take(&mut self, options: &QemuOptions, since: Option<&Manifest>) -> Result<Snapshot, QemuError> {
        let client = self.client.clone();
        let mut client = client.lock();
        let uuid = client.call("query-uuid", Value::Null)?;
        let name = client.call("query-name", Value::Null)?;
        let vm = [&uuid["UUID"], &name["name"]].into_iter().filter_map(Value::as_str).find(|text| *text != NO_UUID);
        let all = attached(&mut client)?;
        refuse_threads(&mut client, &all)?;
        let (disks, mut warnings) = writable(&all, vm.unwrap_or("-"), since, &options.names)?;
        let ids = disks.iter().map(|disk| (disk.id.clone(), disk.name.as_str().to_owned()));
        let machine = Machine::of(&mut client, &all, &ids.collect::<Vec<_>>());
        self.serve(&mut client)?;
        let mut scratches = Vec::new();
        let mut taken = Vec::new();
        for (nth, disk) in disks.into_iter().enumerate() {
            let parts = DiskParts::of(nth);
            let scratch = Scratch::new(&options.scratch, disk.length, options.scratch_reserve)?;
            add_scratch(&mut client, &disk, &parts, &scratch)?;
            scratches.push(scratch);
            self.parts.push(parts.clone());
            taken.push(Taken { from: bitmaps::usable(&disk, since), disk, parts });
        }
        let watch = Watch::start(self.client.clone(), Arc::new(scratches))?;
        self.watch = Some(watch);
        self.transaction(&mut client, options, &taken, &mut warnings)?;
        let mut snapshot = Vec::new();
        for taken in taken {
            snapshot.push(self.export(&mut client, taken, vm)?);
        }
        let text = machine.to_text();
        let definition = (text.len() <= MAX_DEFINITION).then(|| Definition { file_name: "machine.json".into(), text });
        if definition.is_none() {
            warnings.push("the description of the machine is too long to be kept".into());
        }
        Ok(Snapshot { disks: snapshot, definition, warnings })
    }

    /// Lets QEMU serve NBD on a socket of ours.
    fn serve(&self, client: &mut Client) -> Result<(), QemuError> {
        let listener = self.folder.listen()?;
        client.execute("getfd", Some(&json!({ "fdname": LISTENER })), Some(listener.as_fd()))?;
        drop(listener);
        let address = json!({ "addr": { "type": "fd", "data": { "str": LISTENER } } });
        match client.call("nbd-server-start", address) {
            Err(MonitorError::Refused { description, .. }) => Err(QemuError::Unusable(format!(
                "QEMU can't serve the snapshot over NBD ({description}); if another program has started the NBD server \
                     of this VM, end that first (`nbd-server-stop`): QEMU has but one"
            ))),
            other => Ok(other.map(drop)?),
        }
    }

    /// The moment itself. With an agent, file systems are frozen around it.
    fn transaction(
        &mut self,
        client: &mut Client,
        options: &QemuOptions,
        taken: &[Taken],
        warnings: &mut Vec<String>,
    ) -> Result<(), QemuError> {
        const CONSISTENT: &str = "the restore point is as after a power cut";
        let mut frozen = false;
        if let Some(qga) = &options.qga {
            let qga = std::path::absolute(qga).map_err(|e| QemuError::host("find the current folder", e))?;
            match self.guardian.freeze(&Freezer::Agent(qga), options.agent_patience, options.freeze_limit) {
                Ok(_) => frozen = true,
                Err(e) => warnings.push(format!("the guest's file systems were not frozen ({e}): {CONSISTENT}")),
            }
        }
        let result = self.try_transaction(client, taken, warnings);
        if frozen {
            match self.guardian.thaw() {
                Ok(true) => {}
                Ok(false) => warnings.push(format!(
                    "the guest's file systems were thawed before the snapshot was there, after {} s: {CONSISTENT}",
                    options.freeze_limit.as_secs()
                )),
                Err(e) => warnings.push(format!("after the snapshot: {e}; thaw them with guest-fsfreeze-thaw")),
            }
        }
        result
    }

    /// Some images can't keep another bitmap (a full or unusual header): then the bitmaps live in memory only.
    fn try_transaction(
        &self,
        client: &mut Client,
        taken: &[Taken],
        warnings: &mut Vec<String>,
    ) -> Result<(), QemuError> {
        let persistent = taken.iter().any(|taken| taken.disk.persistent);
        match client.call("transaction", json!({ "actions": self.actions(taken, true) })) {
            Err(MonitorError::Refused { description, .. }) if persistent => {
                client.call("transaction", json!({ "actions": self.actions(taken, false) }))?;
                warnings.push(format!(
                    "the record of changes will not survive a shutdown of the VM, because it can't be kept in the \
                     image: {description}"
                ));
                Ok(())
            }
            other => Ok(other.map(drop)?),
        }
    }

    fn actions(&self, taken: &[Taken], persistent: bool) -> Vec<Value> {
        // Jobs first: a disk stands still from its job's action to the end of the transaction, so no write can fall
        // between its snapshot and its bitmaps.
        let mut actions: Vec<_> = taken
            .iter()
            .map(|Taken { disk, parts, .. }| {
                let data = json!({
                    "job-id": parts.job, "device": disk.node, "target": parts.scratch, "sync": "none",
                    // A job that failed stays to be seen.
                    "auto-dismiss": false,
                });
                json!({ "type": "blockdev-backup", "data": data })
            })
            .collect();
        for Taken { disk, from, .. } in taken {
            let node = &disk.node;
            let add = |data| json!({ "type": "block-dirty-bitmap-add", "data": data });
            let name = bitmap(self.point);
            actions.push(add(json!({ "node": node, "name": name, "persistent": persistent && disk.persistent })));
            if let Ok(from) = from {
                let name = changes(self.point);
                let mut narrow = json!({ "node": node, "name": name, "disabled": true });
                // As fine as the one that is read from.
                let old = disk.bitmaps.iter().find(|bitmap| bitmap["name"] == from.as_str());
                if let Some(granularity) = old.and_then(|old| old["granularity"].as_u64()) {
                    narrow["granularity"] = granularity.into();
                }
                actions.push(add(narrow));
                let data = json!({ "node": node, "target": name, "bitmaps": [from] });
                actions.push(json!({ "type": "block-dirty-bitmap-merge", "data": data }));
            }
        }
        actions
    }

    fn export(&self, client: &mut Client, taken: Taken, vm: Option<&str>) -> Result<SnapshotDisk, QemuError> {
        let Taken { disk, parts, from } = taken;
        let export = disk.name.as_str().to_owned();
        let mut arguments = json!({
            "type": "nbd", "id": parts.export, "node-name": parts.scratch, "name": export, "writable": false,
        });
        let changes = from.map(|_| changes(self.point));
        if let Ok(name) = &changes {
            arguments["bitmaps"] = json!([{ "node": disk.node, "name": name }]);
        }
        client.call("block-export-add", arguments)?;
        Ok(SnapshotDisk {
            source: format!("disk {} of the running VM {} ({})", disk.id, vm.unwrap_or("without a name"), disk.file),
            name: disk.name,
            socket: self.folder.socket(),
            export,
            changes,
            tracking: Some(Tracking {
                method: method::QEMU_BITMAP.to_owned(),
                id: bitmap(self.point),
                scope: disk.scope,
            }),
        })
    }

    /// An error unless all jobs have run since the moment. From here on a writer that dies may have committed, so both
    /// bitmaps stay until the next run knows.
    pub(super) fn check(&mut self) -> Result<(), QemuError> {
        let mut client = self.client.lock();
        let jobs = client.list("query-jobs", Value::Null)?;
        let exports = client.list("query-block-exports", Value::Null)?;
        drop(client);
        // After the jobs were looked at: if it gave them up since, they are found gone, and this is why.
        if let Some(reason) = self.watch.as_ref().and_then(Watch::verdict) {
            return Err(QemuError::Lost(reason));
        }
        for parts in &self.parts {
            let job = jobs.iter().find(|job| job["id"] == parts.job.as_str());
            let state = job.map_or("gone", |job| job["status"].as_str().unwrap_or("unknown"));
            let error = job.and_then(|job| job["error"].as_str());
            if error.is_some() || !matches!(state, "running" | "ready" | "paused" | "standby") {
                let error = error.map(|error| format!(": {error}")).unwrap_or_default();
                return Err(QemuError::Lost(format!(
                    "QEMU's job {} that keeps the snapshot is {state}{error}",
                    parts.job
                )));
            }
            let export = exports.iter().find(|export| export["id"] == parts.export.as_str());
            if !export.is_some_and(|export| export["shutting-down"] == false) {
                return Err(QemuError::Lost(format!("QEMU's export {} of the snapshot was ended", parts.export)));
            }
        }
        let new = bitmap(self.point);
        if !self.leftovers.keep.contains(&new) {
            self.leftovers.keep.push(new);
        }
        let plan = self.plan();
        Ok(self.guardian.plan(plan)?)
    }

    fn undo(&mut self) -> Result<Vec<String>, QemuError> {
        self.watch = None;
        let mut client = self.client.lock();
        let left = self.leftovers.sweep(&mut client)?;
        if left.is_empty() {
            release(&mut client)?;
        }
        Ok(left)
    }

    /// Ends it, but for the bitmaps `since` if no restore point was made; what could not be cleaned up.
    pub(super) fn end(mut self, kept: bool, since: &[String]) -> Vec<String> {
        const GOES_ON: &str = "the guardian process goes on trying, and the next backup will";
        self.leftovers.keep = if kept { vec![bitmap(self.point)] } else { since.to_vec() };
        let trouble = match self.undo() {
            Ok(left) if left.is_empty() => None,
            Ok(left) => Some(format!("QEMU still has {}; {GOES_ON}", left.join(", "))),
            Err(e) if e.is_gone() => None,
            Err(e) => Some(format!("QEMU could not be cleaned up yet ({e}); {GOES_ON}")),
        };
        match trouble {
            None => self.guardian.done().err().map(|e| e.to_string()).into_iter().collect(),
            // Without a word at its end, the guardian does what it was told to.
            Some(trouble) => {
                let plan = self.plan();
                let _ = self.guardian.plan(plan);
                vec![trouble]
            }
        }
    }
}

/// A scratch node that shows the disk except where something was copied to it.
fn add_scratch(client: &mut Client, disk: &Disk, parts: &DiskParts, scratch: &Scratch) -> Result<(), QemuError> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct SecretObject<'a> {
        qom_type: &'a str,
        id: &'a str,
        data: &'a str,
    }
    let lacks = MonitorError::Answer { command: "add-fd".into(), what: "a set" };
    let added = client.execute("add-fd", Some(&json!({ "opaque": parts.file })), Some(scratch.fd()))?;
    let set = added["fdset-id"].as_u64().ok_or(lacks)?;
    client.call(
        "blockdev-add",
        json!({
            "driver": "file", "node-name": parts.file, "filename": format!("/dev/fdset/{set}"),
            // Nobody else can open it.
            "locking": "off",
        }),
    )?;
    let secret = SecretObject { qom_type: "secret", id: &parts.secret, data: scratch.passphrase() };
    client.execute("object-add", Some(&secret), None)?;
    client.call(
        "blockdev-add",
        json!({
            "driver": "qcow2", "node-name": parts.scratch, "file": parts.file, "backing": disk.node,
            "encrypt": { "format": "luks", "key-secret": parts.secret },
        }),
    )?;
    // The image is open; nobody needs it any more.
    client.call("object-del", json!({ "id": parts.secret }))?;
    Ok(())
}
