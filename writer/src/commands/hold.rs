//! `reseal hold`

use reseal_cli::{CommonArgs, Failure, Opened};
use reseal_format::hold_note::Hold;
use reseal_vault::{PointSpec, Points, VaultError, Which};
use serde_json::json;

use super::point_name;

/// Arguments of `hold`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// VM@latest, VM@NUMBER or VM@TIME
    point: String,
    /// Why, for whoever wonders later
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Ends it
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let spec = PointSpec::parse(&args.point)?;
    let opened = common.open()?;
    let tenant = &opened.tenant;
    opened.heads.whole_chain(&**tenant, &spec.vm)?;
    let point = match tenant.resolve(&spec) {
        // A prune heeds it all the same.
        Err(e)
            if args.release
                && (e.damaged_object().is_some()
                    || matches!(e, VaultError::NoPoint { .. } | VaultError::NoVm { .. })) =>
        {
            return release_damaged(common, &opened, &spec, e);
        }
        point => point?,
    };
    let name = point_name(&point);
    let is_held = match tenant.hold_of(&point.manifest, &tenant.note_names(&spec.vm)?) {
        // A newer note takes the place of one that can't be opened.
        Err(e) if args.release && e.damaged_object().is_some() => true,
        held => held?.is_some(),
    };
    if is_held || !args.release {
        tenant.set_hold(&point.manifest, &Hold { held: !args.release, reason: args.reason.clone() })?;
    }
    let output = common.output();
    output.json(&json!({ "point": name, "held": !args.release, "was_held": is_held, "reason": args.reason }));
    output.say(match (args.release, is_held) {
        (false, _) => format!("{name} is held: nothing forgets it until `reseal hold {name} --release`"),
        (true, true) => format!("{name} is not held any more"),
        (true, false) => format!("{name} was not held"),
    });
    Ok(())
}

/// Ends the hold of a restore point of which nothing is known but its number.
fn release_damaged(common: &CommonArgs, opened: &Opened, spec: &PointSpec, error: VaultError) -> Result<(), Failure> {
    let Which::Number(number) = spec.which else { return Err(error.into()) };
    let (tenant, vm) = (&opened.tenant, &spec.vm);
    if tenant.held_numbers(vm, |of| of == number)?.is_empty() {
        return Err(error.into());
    }
    tenant.release_damaged(vm, number)?;
    let (output, name) = (common.output(), format!("{vm}@{number}"));
    output.json(&json!({ "point": name, "held": false, "was_held": true, "reason": null }));
    output.say(format!("{name} can't be opened; it is not held any more"));
    Ok(())
}
