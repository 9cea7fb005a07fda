//! `reseal key`: the recovery kit

use std::path::{Path, PathBuf};

use reseal_cli::{CommonArgs, Failure, Status};
use reseal_kms::kit::{SealedKit, write_sheet};
use reseal_site::certificate::now;
use serde_json::json;

use super::key_import;
use super::kit::{LockArgs, NewKit, keyring_keys};
use super::new_tenant::refuse_inside;

/// Arguments of `key`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Writes a recovery kit of the tenant: an age file under a passphrase, or sealed to age recipients
    Export {
        /// The recovery kit
        file: PathBuf,
        #[command(flatten)]
        lock: LockArgs,
    },
    /// Gives the tenant of a recovery kit a key again: brings the one of a keyring back, or wraps its master under a new one
    Import(key_import::Args),
    /// Makes a sheet of paper of a recovery kit, which stays sealed: numbered lines to be typed or scanned in again
    Print {
        /// The recovery kit
        file: PathBuf,
        /// Writes the sheet to a file that only this user may read, instead of printing it
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    match args.action {
        Action::Export { file, lock } => export(common, &file, &lock),
        Action::Import(args) => key_import::run(common, &args),
        Action::Print { file, output } => print(common, &file, output.as_deref()),
    }
}

fn export(common: &CommonArgs, file: &Path, lock: &LockArgs) -> Result<(), Failure> {
    let found = common.find(&common.tenant()?)?;
    let record = &found.record;
    record.check_live()?;
    let kit = NewKit::prepare(common, &found.repo, file, "FILE", lock)?;
    let master = common.master(record)?;
    // Where a kit opens the tenant, its keyring may well be gone; the master is enough.
    let keys = match common.recovery_kit {
        Some(_) => Vec::new(),
        None => keyring_keys(common, record.kms())?,
    };
    found.heads.remember(record.generation(), &[])?;
    kit.write(&found.repo, record.name(), &record.scope(), &record.kms().kind, &master, keys)?;
    // A passphrase takes people a while.
    if !record.is_current() {
        let message = format!(
            "the keys of tenant {} were changed meanwhile: remove {}, which may open nothing, and export another",
            record.name(),
            file.display()
        );
        return Err(Failure::new(Status::Failed, message));
    }
    let output = common.output();
    output.json(&json!({ "recovery_kit": file, "tenant": record.name() }));
    output.say(format!("recovery kit of tenant {}: {}", record.name(), file.display()));
    Ok(())
}

fn print(common: &CommonArgs, file: &Path, to: Option<&Path>) -> Result<(), Failure> {
    let sheet = SealedKit::read(file)?.sheet(&now().to_rfc3339())?;
    let output = common.output();
    match to {
        Some(path) => {
            if let Some(repo) = &common.repo {
                refuse_inside(repo, path, "the sheet", "--output")?;
            }
            write_sheet(path, &sheet)?;
            output.json(&json!({ "recovery_kit": file, "sheet": path }));
            output.say(format!("sheet of the recovery kit {}: {}", file.display(), path.display()));
        }
        None => {
            output.json(&json!({ "recovery_kit": file, "text": sheet }));
            output.say(sheet.trim_end());
        }
    }
    Ok(())
}
