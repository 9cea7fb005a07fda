//! The verbs of `reseal`, one a module.

pub(crate) mod backup;
mod clients;
pub(crate) mod copy;
pub(crate) mod delegate;
mod failures;
pub(crate) mod forget;
mod forgetting;
pub(crate) mod hold;
pub(crate) mod init;
mod keep;
pub(crate) mod key;
pub(crate) mod key_import;
pub(crate) mod kit;
pub(crate) mod list;
pub(crate) mod new_tenant;
mod other_vault;
pub(crate) mod prune;
pub(crate) mod rekey;
mod rekey_data;
mod repair;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod show;
pub(crate) mod sources;
pub(crate) mod status;
pub(crate) mod tenant;
pub(crate) mod verify;

use std::thread::available_parallelism;

use reseal_format::manifest::{Claim, Disk, Manifest, Stats, Tracking};
use reseal_format::names::{DiskName, VmName};
use reseal_vault::{Booted, HeldPoint, Point};
use reseal_writer::status::boot;
use serde::Serialize;
use serde_json::{Value, json};

/// Threads for work that keeps a core busy.
pub(crate) fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// A restore point as `--json` prints it. Stable: fields are only ever added.
#[derive(Serialize)]
pub(crate) struct PointJson<'a> {
    vm: &'a VmName,
    number: u32,
    time: String,
    point_id: String,
    parent: Option<u32>,
    disks: Vec<DiskJson<'a>>,
    definition: Option<&'a str>,
    stats: Stats,
    warnings: &'a [String],
    /// What became of the last boot that was tried; none where another site has the keys.
    boot: Option<Value>,
    /// Since when it is held, and why, if it is; none where another site has the keys.
    held: Option<Value>,
    /// Until when all that it leads to was locked in the object store when it was made, if it was.
    locked_until: Option<String>,
}

#[derive(Serialize)]
struct DiskJson<'a> {
    name: &'a DiskName,
    length: u64,
    used: u64,
    source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracking: Option<&'a Tracking>,
    #[serde(skip_serializing_if = "Option::is_none")]
    claim: Option<&'a Claim>,
}

impl<'a> PointJson<'a> {
    pub(crate) fn new(manifest: &'a Manifest, booted: Option<&Booted>, held: Option<&HeldPoint>) -> PointJson<'a> {
        let disk = |disk: &'a Disk| DiskJson {
            name: &disk.name,
            length: disk.length,
            used: disk.used(),
            source: &disk.source,
            tracking: disk.tracking.as_ref(),
            claim: disk.claim.as_ref(),
        };
        PointJson {
            vm: &manifest.vm,
            number: manifest.number,
            time: manifest.created.to_string(),
            point_id: manifest.point_id.to_string(),
            parent: manifest.parent.map(|parent| parent.number),
            disks: manifest.disks.iter().map(disk).collect(),
            definition: manifest.definition.as_ref().map(|definition| definition.file_name.as_str()),
            stats: manifest.stats,
            warnings: &manifest.warnings,
            boot: booted.map(boot::json),
            held: held.map(|held| json!({ "since": held.since.to_rfc3339(), "reason": held.reason })),
            locked_until: manifest.locked.map(|locked| locked.until.to_rfc3339()),
        }
    }
}

/// A point's name as `list` prints it and every command takes it.
pub(crate) fn point_name(point: &Point) -> String {
    format!("{}@{}", point.manifest.vm, point.manifest.number)
}
