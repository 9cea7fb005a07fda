//! `reseal key`: the recovery kit

use std::path::PathBuf;

use reseal_cli::Status;
use reseal_cli::{CommonArgs, Failure, read_new_passphrase, read_passphrase};
use reseal_kms::Keyring;
use reseal_kms::config::KEYRING;
use reseal_kms::kit::{read_kit, write_kit};
use serde_json::json;

use super::new_tenant::{kit_contents, no_kit, refuse_inside};

/// Arguments of `key`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Writes a recovery kit of the tenant: an age file under a passphrase
    Export(File),
    /// Brings the keys of a recovery kit into the keyring, which is made if there is none
    Import(File),
}

#[derive(clap::Args)]
struct File {
    /// The recovery kit
    file: PathBuf,
    /// Reads the kit's passphrase from the first line of a file instead of asking
    #[arg(long, env = "RESEAL_RECOVERY_PASSPHRASE_FILE", value_name = "FILE")]
    recovery_passphrase_file: Option<PathBuf>,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    match args.action {
        Action::Export(file) => export(common, &file),
        Action::Import(file) => import(common, &file),
    }
}

fn export(common: &CommonArgs, file: &File) -> Result<(), Failure> {
    let opened = common.open()?;
    if opened.tenant.kms().kind != KEYRING {
        let config = common.kms_config()?;
        return Err(no_kit(opened.tenant.name(), config.kms_of(opened.tenant.name().as_str()), ""));
    }
    let keyring = common.open_keyring()?;
    let tenant = &opened.tenant;
    let scope = tenant.keys().scope();
    let kit = kit_contents(&opened.repo, tenant.name().as_str(), &scope, &keyring, &tenant.kms().key)?;
    let given = file.recovery_passphrase_file.as_deref();
    refuse_inside(&opened.repo, &file.file, "the recovery kit", "FILE")?;
    let passphrase = read_new_passphrase(given, "the recovery kit", "or --recovery-passphrase-file")?;
    write_kit(&file.file, &kit, &passphrase)?;
    let output = common.output();
    output.json(&json!({ "recovery_kit": file.file, "tenant": tenant.name() }));
    output.say(format!("recovery kit of tenant {}: {}", tenant.name(), file.file.display()));
    Ok(())
}

fn import(common: &CommonArgs, file: &File) -> Result<(), Failure> {
    let prompt = format!("Passphrase of the recovery kit {}: ", file.file.display());
    let passphrase = read_passphrase(file.recovery_passphrase_file.as_deref(), &prompt)
        .map_err(|e| Failure::new(Status::Usage, format!("{e} (or --recovery-passphrase-file)")))?;
    let kit = read_kit(&file.file, &passphrase)?;
    let path = common.paths()?.keyring;
    if let Some(repo) = &common.repo {
        refuse_inside(repo, &path, "the keyring", "RESEAL_KEYRING")?;
    }
    let keyring = match path.exists() {
        true => common.open_keyring()?,
        false => {
            let file = common.keyring_passphrase_file.as_deref();
            let passphrase =
                file.map(|_| read_new_passphrase(file, "the keyring", "or --keyring-passphrase-file")).transpose()?;
            Keyring::create(&path, passphrase.as_ref())?
        }
    };
    let imported = keyring.import(&kit.keys)?;
    let output = common.output();
    output.json(&json!({
        "keyring": path, "added": imported.added, "already": imported.already, "tenant": kit.tenant, "repo": kit.repo,
    }));
    output.say(format!(
        "keyring {}: {} keys added, {} were there",
        path.display(),
        imported.added.len(),
        imported.already.len()
    ));
    output.say(format!("\nNext (the vault was at {} when the kit was made):", kit.repo));
    output.say(format!("  export RESEAL_REPO=VAULT RESEAL_TENANT={}\n  reseal list", kit.tenant));
    Ok(())
}
