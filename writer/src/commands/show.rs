//! `reseal show`

use std::time::Duration;

use reseal_cli::{CommonArgs, Failure, human_bytes, human_duration};
use reseal_format::lock::Locked;
use reseal_format::manifest::Manifest;
use reseal_site::Reading;
use reseal_vault::{Booted, HeldPoint, PointSpec, State, Tenant, VaultError};
use reseal_writer::status::boot;

use super::{PointJson, point_name};

/// Arguments of `show`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// VM@latest, VM@NUMBER or VM@TIME
    point: String,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let output = common.output();
    let spec = PointSpec::parse(&args.point)?;
    let reading = Reading::open(common)?;
    let points = reading.points();
    let chain = reading.heads().whole_chain(&*points, &spec.vm)?;
    let point = points.resolve(&spec)?;
    let manifest = &point.manifest;
    // Its manifest may be there for a while: somebody reads it, or it is locked.
    if chain.numbers().any(|(number, state)| (number, state) == (manifest.number, State::Forgotten)) {
        return Err(VaultError::NoPoint { vm: spec.vm, point: point_name(&point) }.into());
    }
    // A note that is damaged does not hide the point.
    let (noted, damaged) = match reading.tenant().map(|tenant| noted(tenant, manifest)) {
        None => (Noted::default(), None),
        Some(Ok(noted)) => (noted, None),
        Some(Err(e)) => (Noted::default(), Some(e)),
    };
    output.json(&PointJson::new(manifest, noted.booted.as_ref(), noted.held.as_ref()));
    output.say(format!("point       {}", point_name(&point)));
    output.say(format!("time        {}", manifest.created));
    output.say(format!("id          {}", manifest.point_id));
    let parent = manifest.parent.map_or("none".to_owned(), |parent| format!("{}@{}", manifest.vm, parent.number));
    output.say(format!("parent      {parent}"));
    for disk in &manifest.disks {
        let (length, used) = (human_bytes(disk.length), human_bytes(disk.used()));
        output.say(format!("disk        {}: {length}, {used} used, from {}", disk.name, disk.source));
        if let Some(claim) = &disk.claim {
            let (changed, checked) = (human_bytes(claim.changed), human_bytes(claim.checked));
            let since = format!("{} {} since {}@{}", claim.method, claim.id, manifest.vm, claim.since);
            output.say(format!("            only changes read: {changed} by {since}; of the rest {checked} checked"));
        }
        if let Some(tracking) = &disk.tracking {
            output.say(format!("            changes from here on: {} {}", tracking.method, tracking.id));
        }
    }
    if let Some(definition) = &manifest.definition {
        output.say(format!("definition  {}, {}", definition.file_name, human_bytes(definition.text.len() as u64)));
    }
    let stats = &manifest.stats;
    output.say(format!("read        {}", human_bytes(stats.read)));
    output.say(format!("changed     {}", human_bytes(stats.changed)));
    output.say(format!("new         {}", human_bytes(stats.new)));
    output.say(format!("stored      {}", human_bytes(stats.stored)));
    output.say(format!("took        {}", human_duration(Duration::from_millis(stats.duration_ms))));
    if let Some(HeldPoint { since, reason }) = &noted.held {
        let why = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        output.say(format!("held        since {since}{why}"));
    }
    if let Some(Locked { until, mode }) = manifest.locked {
        output.say(format!("locked      until {until}, {}, all that it leads to", mode.name()));
    }
    if let Some(booted) = &noted.booted {
        output.say(format!("boot        {}", boot::whole(booted)));
    }
    for warning in &manifest.warnings {
        output.say(format!("warning     {warning}"));
    }
    damaged.map_or(Ok(()), |e| Err(e.into()))
}

/// What was noted about a point.
#[derive(Default)]
struct Noted {
    booted: Option<Booted>,
    held: Option<HeldPoint>,
}

fn noted(tenant: &Tenant, point: &Manifest) -> Result<Noted, VaultError> {
    let names = tenant.note_names(&point.vm)?;
    Ok(Noted { booted: tenant.boot_of(point, &names)?, held: tenant.hold_of(point, &names)? })
}
