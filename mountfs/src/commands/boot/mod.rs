//! `boot`: a restore point runs, on an overlay that this process serves.

mod arguments;
mod check;
mod define;
mod promotion;
mod session;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use reseal_cli::{CommonArgs, Failure, finish, harden};
use reseal_format::ids::OverlayId;
use reseal_mountfs::boot::{RunFolder, quoted};
use reseal_vault::random;
use serde::Serialize;

pub(crate) use arguments::BootArgs;

use super::background::detached;
use crate::PROGRAM;

/// How long a guest waits for a disk whose export is gone, before it is paused. Drivers of guests give up after 30 s, and a guest that
/// is paused notices nothing.
const RECONNECT: Duration = Duration::from_secs(10);

/// What `--json` says where nothing is started.
#[derive(Serialize)]
struct Printed<'a> {
    point: String,
    /// None if it would be a new one.
    overlay: Option<PathBuf>,
    run_folder: PathBuf,
    exports: Vec<&'a str>,
    command: Vec<String>,
}

/// Boots, and serves until the guest is off.
pub(crate) fn boot(common: &CommonArgs, arguments: &BootArgs) -> ExitCode {
    if let Err(failure) = arguments.refuse(common.output()) {
        return finish(PROGRAM, Err(failure));
    }
    if arguments.print {
        return finish(PROGRAM, print(common, arguments));
    }
    if arguments.check.check {
        return finish(PROGRAM, check::run(common, arguments));
    }
    match promotion::served_elsewhere(arguments) {
        Ok(None) => {}
        Ok(Some((folder, record))) => {
            return finish(PROGRAM, promotion::promote_served(common, arguments, &folder, &record));
        }
        Err(failure) => return finish(PROGRAM, Err(failure)),
    }
    // A client's thread that hangs in a dead store does not hold up the end: with this thread the process ends.
    // SAFETY: nothing has started a thread yet.
    match unsafe { detached(arguments.background, arguments.log.as_deref()) } {
        Ok(detach) => finish(
            PROGRAM,
            match &arguments.define {
                None => session::run(common, arguments, detach),
                Some(name) => define::run(common, arguments, name, detach),
            },
        ),
        Err(code) => code,
    }
}

/// Prints what would be done. The run folder of an overlay that is not there yet is another one each time.
fn print(common: &CommonArgs, arguments: &BootArgs) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let opened = common.open()?;
    let point = arguments.point(&opened.tenant)?;
    let (machine, host) = arguments.machine(&point, output)?;
    let there = arguments.overlay_id();
    let id = match there {
        Some(id) => id,
        None => OverlayId::from_bytes(random()?),
    };
    let folder = RunFolder::of(&id);
    if let Some(given) = &arguments.define {
        let xml = define::xml(arguments, &define::name(given, &machine)?, &machine, &host, &folder)?;
        output.say(xml.trim_end());
        output.json(&serde_json::json!({ "domain": xml }));
        return Ok(());
    }
    let command = arguments.command(&machine, &host, &folder, common.allow_swap);
    let command = command.map_err(|e| arguments::failure(&e))?;
    for disk in &machine.disks {
        output.say(format!("# {} is served at {}, on {}", disk.export, folder.nbd().display(), disk.bus));
    }
    output.say(quoted(&command));
    output.json(&Printed {
        point: format!("{}@{}", point.manifest.vm, point.manifest.number),
        overlay: there.and_then(|_| arguments.overlay().map(Path::to_owned)),
        run_folder: folder.path().to_owned(),
        exports: machine.disks.iter().map(|disk| disk.export.as_str()).collect(),
        command: command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
    });
    Ok(())
}
