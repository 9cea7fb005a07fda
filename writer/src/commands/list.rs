//! `reseal list`

use reseal_cli::{CommonArgs, Failure, Status, human_bytes};
use reseal_format::manifest::Disk;
use reseal_format::names::VmName;
use reseal_site::Reading;
use reseal_vault::{Class, Point, Points, State, VaultError};
use reseal_writer::status::boot as boot_report;

use super::failures::Failures;
use super::{PointJson, point_name};

/// Points that are asked for together: where each answer takes its time, many are under way.
const TOGETHER: usize = 64;

/// Arguments of `list`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the points of this VM
    vm: Option<String>,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let output = common.output();
    let reading = Reading::open(common)?;
    let (points, heads) = (reading.points(), reading.heads());
    let vms = match &args.vm {
        Some(vm) => vec![VmName::new(vm).map_err(|e| Failure::of(Status::Usage, &e))?],
        None => {
            let mut vms = points.vms()?;
            vms.extend(heads.known_vms()?);
            vms.sort();
            vms.dedup();
            vms
        }
    };
    let mut damaged = Failures::new(output);
    let mut shown = 0;
    // Another site does not tell of boots.
    let boot = if reading.tenant().is_some() { "BOOT" } else { "" };
    let header = format!("{:<24} {:<24} {:>10} {:>10} {:>10}  {boot}", "POINT", "TIME", "SIZE", "USED", "ADDED");
    for vm in vms {
        let (chain, rollback) = heads.chain(&*points, &vm)?;
        if chain.last() == 0 && args.vm.is_some() && rollback.is_none() {
            return Err(VaultError::NoVm { vm }.into());
        }
        if let Some(e) = rollback {
            damaged.add(e.into());
        }
        let mut authenticated = 0;
        let notes = reading.tenant().map(|tenant| tenant.note_names(&vm)).transpose()?;
        let numbers: Vec<_> = chain.numbers().collect();
        for (number, found) in numbers.chunks(TOGETHER).flat_map(|some| together(&*points, &vm, some)) {
            // One damaged point must not hide the others.
            let point = match found {
                Ok(Found::Live(point)) => point,
                Ok(Found::Forgotten) => {
                    authenticated = number;
                    continue;
                }
                // It was forgotten since the numbers were listed.
                Err(VaultError::NoPoint { .. }) => continue,
                // A site that is gone is not asked for each of them.
                Err(e @ VaultError::Elsewhere { class: Class::Unreachable, .. }) => return Err(e.into()),
                Err(e) => {
                    damaged.add(e.into());
                    continue;
                }
            };
            if shown == 0 {
                output.say(header.trim_end());
            }
            shown += 1;
            authenticated = number;
            let manifest = &point.manifest;
            let (boot, booted) = match reading.tenant().zip(notes.as_ref()) {
                None => (String::new(), None),
                Some((tenant, notes)) => match tenant.boot_of(manifest, notes) {
                    Ok(None) => ("-".to_owned(), None),
                    Ok(Some(booted)) => (boot_report::brief(&booted), Some(booted)),
                    Err(e) => {
                        damaged.add(e.into());
                        ("damaged".to_owned(), None)
                    }
                },
            };
            let held = match reading.tenant().zip(notes.as_ref()).map(|(tenant, notes)| tenant.hold_of(manifest, notes))
            {
                None => None,
                Some(Ok(held)) => held,
                Some(Err(e)) => {
                    damaged.add(e.into());
                    None
                }
            };
            output.json(&PointJson::new(manifest, booted.as_ref(), held.as_ref()));
            let line = format!(
                "{:<24} {:<24} {:>10} {:>10} {:>10}  {boot:<31}{}{}",
                point_name(&point),
                manifest.created.to_string(),
                human_bytes(manifest.disks.iter().map(|disk| disk.length).sum()),
                human_bytes(manifest.disks.iter().map(Disk::used).sum()),
                human_bytes(manifest.stats.stored),
                if held.is_some() { "  held" } else { "" },
                if manifest.warnings.is_empty() { "" } else { "  see `reseal show`" },
            );
            output.say(line.trim_end());
        }
        heads.remember(reading.record_generation(), &[(vm, authenticated)])?;
    }
    if shown == 0 && damaged.is_empty() {
        output.say("no restore points yet; make one with `reseal backup VM DISK`");
    }
    damaged.end()
}

/// What stands at a number.
enum Found {
    Live(Box<Point>),
    Forgotten,
}

/// Opens what stands at these numbers of a chain.
fn together(points: &dyn Points, vm: &VmName, numbers: &[(u32, State)]) -> Vec<(u32, Result<Found, VaultError>)> {
    let of = |wanted: State| -> Vec<u32> {
        numbers.iter().filter(|(_, state)| *state == wanted).map(|(number, _)| *number).collect()
    };
    let mut live = points.points(vm, &of(State::Live)).into_iter();
    let mut forgotten = points.tombstones(vm, &of(State::Forgotten)).into_iter();
    let missing = |number: u32| VaultError::Missing {
        object: format!("{vm}@{number}"),
        why: "it was removed without `reseal forget`",
    };
    let open = |&(number, state): &(u32, State)| {
        let next = match state {
            State::Live => live.next().map(|point| point.map(|point| Found::Live(Box::new(point)))),
            State::Forgotten => forgotten.next().map(|tombstone| tombstone.map(|_| Found::Forgotten)),
            State::Missing => None,
        };
        (number, next.unwrap_or_else(|| Err(missing(number))))
    };
    numbers.iter().map(open).collect()
}
