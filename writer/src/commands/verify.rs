//! `reseal verify`

use std::sync::OnceLock;

use reseal_cli::{CommonArgs, Failure, Progress, Status, hold_keys, human_bytes};
use reseal_format::names::VmName;
use reseal_vault::{Pins, PointSpec, Points};
use reseal_writer::status::Verdicts;
use reseal_writer::verify::{Verify, What};

use super::cores;

/// Arguments of `verify`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A VM, or VM@latest, VM@NUMBER or VM@TIME; without it, every object of the tenant
    #[arg(value_name = "VM|POINT")]
    what: Option<String>,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let output = common.output();
    let opened = common.open()?;
    let what = match &args.what {
        None => What::Everything,
        Some(text) => match PointSpec::parse(text) {
            // A VM's name may look like a point; if there is such a VM, that is what was meant.
            Ok(spec) if !named_like(&opened.tenant.vms()?, text) => {
                let point = opened.tenant.resolve(&spec)?;
                What::Point(spec.vm, point.manifest.number)
            }
            _ => What::Vm(VmName::new(text).map_err(|e| Failure::of(Status::Usage, &e))?),
        },
    };
    let _lease = hold_keys(&opened.tenant, "verify".to_owned(), Pins::All);
    let progress = OnceLock::new();
    let start = |total| drop(progress.set(Progress::bytes(output, "verify", total)));
    let read = |bytes| {
        if let Some(progress) = progress.get() {
            Progress::add(progress, bytes);
        }
    };
    let result =
        Verify::new(opened.tenant.clone(), &opened.heads, &opened.paths.state).run(&what, cores(), start, &read);
    if let Some(progress) = progress.into_inner() {
        progress.finish();
    }
    let report = result?;
    let noted = Verdicts::of_tenant(&opened.paths.state, &opened.tenant.keys().scope()).note(&what, &report);
    if let Err(e) = noted {
        output.warn(format!("`reseal status` will not know of this: {e}"));
    }
    output.json(&report);
    for damage in &report.damaged {
        let hurts = if damage.hurts.is_empty() { "no restore point".to_owned() } else { damage.hurts.join(", ") };
        output.complain(format!("DAMAGED  {}\n         {}\n         hurts {hurts}", damage.object, damage.what));
    }
    let counted = format!(
        "{} points, {} packs, {} blobs, {} read",
        report.points,
        report.packs,
        report.blobs,
        human_bytes(report.bytes)
    );
    if report.damaged.is_empty() {
        output.say(format!("all right: {counted}"));
        return Ok(());
    }
    let message =
        format!("{} damaged objects ({counted}); restore them from a copy of the vault", report.damaged.len());
    Err(Failure::new(Status::Damaged, message))
}

fn named_like(vms: &[VmName], text: &str) -> bool {
    vms.iter().any(|vm| vm.as_str() == text)
}
