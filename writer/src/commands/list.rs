//! `reseal list`

use reseal_cli::{CommonArgs, Failure, Status, human_bytes};
use reseal_format::manifest::Disk;
use reseal_format::names::VmName;
use reseal_vault::{State, VaultError};

use super::{PointJson, point_name};

/// Arguments of `list`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the points of this VM
    vm: Option<String>,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let output = common.output();
    let opened = common.open()?;
    let tenant = &opened.tenant;
    let vms = match &args.vm {
        Some(vm) => vec![VmName::new(vm).map_err(|e| Failure::of(Status::Usage, &e))?],
        None => {
            let mut vms = tenant.vms()?;
            vms.extend(opened.heads.known_vms()?);
            vms.sort();
            vms.dedup();
            vms
        }
    };
    let mut damaged: Option<Failure> = None;
    // Each is named; the last one ends the command.
    let mut damage = |failure: Failure| {
        if let Some(before) = damaged.replace(failure) {
            output.warn(before.message);
        }
    };
    let mut shown = 0;
    let header = format!("{:<24} {:<24} {:>10} {:>10} {:>10}", "POINT", "TIME", "SIZE", "USED", "ADDED");
    for vm in vms {
        let (chain, rollback) = opened.heads.chain(&**tenant, &vm)?;
        if chain.last() == 0 && args.vm.is_some() && rollback.is_none() {
            return Err(VaultError::NoVm { vm }.into());
        }
        if let Some(e) = rollback {
            damage(e.into());
        }
        let mut authenticated = 0;
        for (number, state) in chain.numbers() {
            match state {
                State::Forgotten => {
                    match tenant.tombstone(&vm, number) {
                        Ok(_) => authenticated = number,
                        Err(e) => damage(e.into()),
                    }
                    continue;
                }
                State::Missing => {
                    let message = format!("{vm}@{number} is missing: it was removed without `reseal forget`");
                    damage(Failure::new(Status::Damaged, message));
                    continue;
                }
                State::Live => {}
            }
            // One damaged point must not hide the others.
            let point = match tenant.point(&vm, number) {
                Ok(point) => point,
                Err(e) => {
                    damage(e.into());
                    continue;
                }
            };
            if shown == 0 {
                output.say(&header);
            }
            shown += 1;
            authenticated = number;
            let manifest = &point.manifest;
            output.json(&PointJson::new(manifest));
            output.say(format!(
                "{:<24} {:<24} {:>10} {:>10} {:>10}{}",
                point_name(&point),
                manifest.created.to_string(),
                human_bytes(manifest.disks.iter().map(|disk| disk.length).sum()),
                human_bytes(manifest.disks.iter().map(Disk::used).sum()),
                human_bytes(manifest.stats.stored),
                if manifest.warnings.is_empty() { "" } else { "  see `reseal show`" },
            ));
        }
        opened.heads.remember(tenant.record_generation(), &[(vm, authenticated)])?;
    }
    if shown == 0 && damaged.is_none() {
        output.say("no restore points yet; make one with `reseal backup VM DISK`");
    }
    damaged.map_or(Ok(()), Err)
}
