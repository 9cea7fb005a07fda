//! Instant recovery: what a VM that runs from a restore point gets, beside a raw file and beside QEMU's own encryption.
//!
//! All sides take their turns within each round, repositories cold; `stands` has what is read and who serves it, `client` reads an
//! export as a VM does, `exports` and `writes` measure.

mod client;
mod exports;
mod stands;
mod writes;

use crate::Result;
use crate::host::{self, Disks};
use crate::live::{Figure, median};
use crate::plan::Plan;
use crate::samples::Samples;
use crate::trace::Trace;

use stands::Stands;

/// What must be reached, as a multiple of the other side.
const BOOT: f64 = 0.5;
const WRITES: f64 = 0.7;
const RANDOM: f64 = 1.3;
const COPY: f64 = 1.5;
/// Requests on their way at once.
const DEPTH: u32 = 16;

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: instant recovery");
    let trace = Trace::recorded(plan, disks)?;
    let home = plan.work.join("recovery");
    host::unmount_below(&home);
    let stands = Stands::new(plan, disks)?;
    let parts = [boot(plan, &stands, &trace), random(plan, &stands), copy(plan, &stands), writes(plan, &stands)];
    host::unmount_below(&home);
    let mut found = Vec::new();
    for part in parts {
        match part {
            Ok(figures) => found.extend(figures),
            Err(error) => eprintln!("bench: instant recovery, a part is missing: {error}"),
        }
    }
    samples.recovery = found;
    Ok(())
}

/// Medians of several sides that take their turns.
fn medians<const N: usize>(plan: &Plan, mut taken: [impl FnMut() -> Result<f64>; N]) -> Result<[f64; N]> {
    let mut all = [const { Vec::new() }; N];
    for round in 0..plan.rounds.max(3) {
        for nth in 0..N {
            // Each round begins with another one.
            let nth = (nth + round) % N;
            all[nth].push(taken[nth]()?);
        }
    }
    Ok(all.map(median))
}

type Side<'a> = Box<dyn FnMut() -> Result<f64> + 'a>;

/// One figure of two sides, of which more is better.
fn beside(what: impl Into<String>, other: &str, least: Option<f64>, own: f64, others: f64, unit: &str) -> Figure {
    let digits = if own < 10.0 { 2 } else { 0 };
    Figure {
        what: what.into(),
        bound: least.map(|least| format!("{least} × {other}")).unwrap_or_default(),
        measured: format!("{:.2} × {other}: {own:.digits$} beside {others:.digits$} {unit}", own / others),
        met: least.map(|least| own / others >= least),
    }
}

fn boot(plan: &Plan, stands: &Stands, trace: &Trace) -> Result<Vec<Figure>> {
    let sides: [Side<'_>; 4] = [
        Box::new(|| stands.passed_through().and_then(|raw| trace.replay(raw.file()))),
        Box::new(|| stands.mount().and_then(|mount| trace.replay(mount.file()))),
        Box::new(|| stands.export(&[]).and_then(|export| client::replay(export.socket(), trace))),
        Box::new(|| stands.luks_export().and_then(|export| client::replay(export.socket(), trace))),
    ];
    let [raw, mount, export, luks] = medians(plan, sides)?;
    // Boots a second, so that more is better here, too.
    let figure = |what: &str, other: &str, least, own: f64, others: f64| Figure {
        measured: format!("{:.2} × {other}: {own:.2} s beside {others:.2} s", others / own),
        ..beside(what, other, least, 1.0 / own, 1.0 / others, "")
    };
    Ok(vec![
        figure("the reads of a boot, cold, from the mount", "the raw file", Some(BOOT), mount, raw),
        figure("the reads of a boot, cold, from NBD", "the raw file", Some(BOOT), export, raw),
        figure("the reads of a boot, cold, from NBD beside the mount", "the mount", None, export, mount),
        figure("the reads of a boot, cold, from NBD beside qemu-nbd on LUKS", "qemu-nbd", None, export, luks),
    ])
}

fn random(plan: &Plan, stands: &Stands) -> Result<Vec<Figure>> {
    let depth = |depth| -> Result<[f64; 2]> {
        let sides: [Side<'_>; 2] = [
            Box::new(move || stands.export(&[]).and_then(|export| exports::random(export.uri(), depth))),
            Box::new(move || stands.luks_export().and_then(|export| exports::random(export.uri(), depth))),
        ];
        medians(plan, sides)
    };
    let ([own, luks], [own_one, luks_one]) = (depth(DEPTH)?, depth(1)?);
    let figure = |depth: u32, least, own, luks| {
        beside(
            format!("NBD, 4 KiB random reads, {depth} at once, cold"),
            "qemu-nbd on LUKS",
            least,
            own,
            luks,
            "reads/s",
        )
    };
    Ok(vec![figure(DEPTH, Some(RANDOM), own, luks), figure(1, None, own_one, luks_one)])
}

fn copy(plan: &Plan, stands: &Stands) -> Result<Vec<Figure>> {
    let used = stands.used_mb()?;
    let sides: [Side<'_>; 2] = [
        Box::new(|| stands.export(&[]).and_then(|export| exports::copied(export.uri())).map(|seconds| used / seconds)),
        Box::new(|| {
            stands.luks_export().and_then(|export| exports::copied(export.uri())).map(|seconds| used / seconds)
        }),
    ];
    let [own, luks] = medians(plan, sides)?;
    Ok(vec![beside("NBD, nbdcopy into null:, cold", "qemu-nbd on LUKS", Some(COPY), own, luks, "MB in use/s")])
}

fn writes(plan: &Plan, stands: &Stands) -> Result<Vec<Figure>> {
    let sides: [Side<'_>; 5] = [
        Box::new(|| stands.writable_mount().and_then(|mount| writes::random(&writes::file(mount.file())))),
        Box::new(|| stands.passed_through_to_write().and_then(|raw| writes::random(&writes::file(raw.file())))),
        Box::new(|| stands.luks_overlay().and_then(|overlay| writes::random(&writes::file(overlay.file())))),
        Box::new(|| {
            let export = stands.export(&["--writable", "--one-time"])?;
            writes::random(&writes::export(export.uri()))
        }),
        Box::new(|| stands.luks_overlay_export().and_then(|export| writes::random(&writes::export(export.uri())))),
    ];
    let [mount, raw, luks, export, luks_export] = medians(plan, sides)?;
    let figure = |what: &str, other: &str, least, own, others| {
        beside(format!("4 KiB random writes, fsync each 32, {what}"), other, least, own, others, "writes/s")
    };
    Ok(vec![
        figure("an overlay through the mount", "a raw file through FUSE", Some(WRITES), mount, raw),
        figure("an overlay through the mount", "a LUKS overlay through QEMU's FUSE", None, mount, luks),
        figure("an overlay through NBD", "a LUKS overlay through qemu-nbd", None, export, luks_export),
    ])
}
