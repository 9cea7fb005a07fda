//! `overlay`: which there are, and the end of one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use reseal_cli::{CommonArgs, Failure, Output, Status, harden, human_bytes};
use reseal_format::ids::{OverlayId, PointId, VaultId};
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_mountfs::writable::{Folder, FolderError, Found, Moved, drop_key, find, found_at, has_vm, in_state};
use serde::Serialize;

#[derive(Args)]
pub(crate) struct OverlayArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Lists the overlays in the state folder, and those in folders that are named
    List {
        #[arg(value_name = "DIR")]
        folders: Vec<PathBuf>,
    },
    /// Removes an overlay with all that was written, and its key from the vault
    Drop {
        #[arg(value_name = "DIR|ID")]
        overlay: PathBuf,
    },
}

/// A disk of an overlay, as `--json` shows it.
#[derive(Serialize)]
struct DiskJson {
    name: DiskName,
    length: u64,
}

/// An overlay, as `--json` shows it.
#[derive(Serialize)]
struct OverlayJson {
    folder: PathBuf,
    id: OverlayId,
    vault: VaultId,
    tenant: TenantName,
    vm: VmName,
    number: u32,
    point_id: PointId,
    disks: Vec<DiskJson>,
    used: u64,
    in_use: bool,
    /// As times of restore points are shown.
    changed: Option<String>,
}

pub(crate) fn overlay(common: &CommonArgs, arguments: &OverlayArgs) -> Result<(), Failure> {
    match &arguments.verb {
        Verb::List { folders } => list(common, folders),
        Verb::Drop { overlay } => drop_overlay(common, overlay),
    }
}

fn failure(error: &FolderError) -> Failure {
    let status = match error {
        FolderError::Io { .. } | FolderError::InUse(_) | FolderError::Vm(_) => Status::Failed,
        FolderError::Foreign(_) | FolderError::Nothing(_) => Status::Usage,
        FolderError::Malformed { .. } => Status::Damaged,
    };
    Failure::of(status, error)
}

fn list(common: &CommonArgs, named: &[PathBuf]) -> Result<(), Failure> {
    let output = common.output();
    let state = common.paths()?.state;
    // Shown as what works from anywhere.
    let mut all = in_state(&std::path::absolute(&state).unwrap_or(state));
    all.extend(named.iter().cloned());
    let (mut shown, mut failed) = (0, None);
    for folder in all {
        match found_at(&folder) {
            Ok(found) => {
                if shown == 0 {
                    output.say(format!(
                        "{:<24} {:<12} {:>10} {:>8} {:<24} FOLDER",
                        "POINT", "TENANT", "USED", "IN USE", "CHANGED"
                    ));
                }
                shown += 1;
                show(output, found);
            }
            // Each is named; the last one ends the command.
            Err(e) => {
                if let Some(before) = failed.replace(failure(&e)) {
                    output.warn(before.message);
                }
            }
        }
    }
    if shown == 0 && failed.is_none() {
        output.say("there are no overlays");
    }
    failed.map_or(Ok(()), Err)
}

fn show(output: Output, found: Found) {
    let Found { folder, document, used, changed, is_in_use } = found;
    output.say(format!(
        "{:<24} {:<12} {:>10} {:>8} {:<24} {}",
        document.point(),
        document.tenant.as_str(),
        human_bytes(used),
        if is_in_use { "yes" } else { "no" },
        changed.map_or_else(String::new, |changed| changed.to_string()),
        folder.display()
    ));
    let disks = document.disks.into_iter().map(|disk| DiskJson { name: disk.name, length: disk.length }).collect();
    output.json(&OverlayJson {
        folder,
        id: document.id,
        vault: document.vault_id,
        tenant: document.tenant,
        vm: document.vm,
        number: document.number,
        point_id: document.point_id,
        disks,
        used,
        in_use: is_in_use,
        changed: changed.map(|changed| changed.to_string()),
    });
}

fn drop_overlay(common: &CommonArgs, named: &std::path::Path) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let state = common.paths().ok().map(|paths| paths.state);
    let path = find(state.as_deref(), named).map_err(|e| failure(&e))?;
    let folder = Folder::existing(&path).map_err(|e| failure(&e))?;
    // One that can't be understood may go all the same; then nobody knows where its key is.
    let document = Folder::document(&path);
    if let Ok(Some(document)) = &document
        && Moved::read(&path).is_ok_and(|moved| has_vm(document, &moved))
    {
        return Err(failure(&FolderError::Vm(path)));
    }
    // The key first: without it, copies of the files are worth nothing.
    let key = match &document {
        Err(e) => Err(e.to_string()),
        Ok(None) => Err("nothing says which it is".to_owned()),
        Ok(Some(document)) => {
            let common = CommonArgs { tenant: document.tenant.to_string(), ..common.clone() };
            common.open().map_err(|e| e.message).and_then(|opened| {
                match opened.tenant.keys().scope().vault == document.vault_id {
                    true => drop_key(&opened.tenant, document).map_err(|e| e.to_string()),
                    false => Err(format!("--repo is not the vault {}", document.vault_id)),
                }
            })
        }
    };
    folder.remove().map_err(|e| failure(&e))?;
    match key {
        Ok(()) => output.say(format!("{} and its key are removed", path.display())),
        Err(why) => {
            output.say(format!("{} is removed", path.display()));
            output.warn(format!("its key, which opens nothing else, stays in the vault: {why}"));
        }
    }
    output.json(&serde_json::json!({ "dropped": path }));
    Ok(())
}
