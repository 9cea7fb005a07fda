//! `reseal hold`

use reseal_cli::{CommonArgs, Failure};
use reseal_format::hold_note::Hold;
use reseal_vault::{PointSpec, Points};
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
    let point = tenant.resolve(&spec)?;
    let name = point_name(&point);
    let is_held = tenant.hold_of(&point.manifest, &tenant.note_names(&spec.vm)?)?.is_some();
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
