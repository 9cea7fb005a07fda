//! `reseal init`

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use reseal_cli::{CommonArgs, Failure, Status, open_store, read_new_passphrase};
use reseal_format::keys::Scope;
use reseal_format::time::Timestamp;
use reseal_kms::kit::{KitContents, write_kit};
use reseal_kms::{Keyring, Passphrase};
use reseal_vault::{VaultError, create_tenant, create_vault};
use serde_json::json;

/// Arguments of `init`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to write the recovery kit: an age file under a passphrase, to be kept away from this machine
    #[arg(long, value_name = "FILE", required_unless_present = "no_recovery", conflicts_with = "no_recovery")]
    recovery: Option<PathBuf>,
    /// Does without a recovery kit: if the keyring is lost, so is all data
    #[arg(long)]
    no_recovery: bool,
    /// Reads the kit's passphrase from the first line of a file instead of asking
    #[arg(long, env = "RESEAL_RECOVERY_PASSPHRASE_FILE", value_name = "FILE")]
    recovery_passphrase_file: Option<PathBuf>,
    /// Puts a new keyring under a passphrase
    #[arg(long)]
    keyring_passphrase: bool,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let repo = common.repo()?;
    let tenant = common.tenant()?;
    let keyring_path = common.paths()?.keyring;
    refuse_inside(&repo, &keyring_path, "the keyring", "RESEAL_KEYRING")?;
    // Everything that may be refused or asked is, before anything is made.
    let kit = match &args.recovery {
        Some(path) => Some((path, kit_passphrase(&repo, path, args.recovery_passphrase_file.as_deref())?)),
        None => None,
    };
    let keyring = if keyring_path.exists() {
        common.open_keyring()?
    } else {
        let file = common.keyring_passphrase_file.as_deref();
        let wanted = args.keyring_passphrase || file.is_some();
        let passphrase = match wanted {
            true => Some(read_new_passphrase(file, "the keyring", "or --keyring-passphrase-file")?),
            false => None,
        };
        Keyring::create(&keyring_path, passphrase.as_ref())?
    };
    let store = open_store(&repo)?;
    let made = match create_vault(&*store, &repo) {
        Ok(_) => true,
        Err(VaultError::VaultExists { .. }) => false,
        Err(e) => return Err(e.into()),
    };
    let (key, scope) = create_tenant(&*store, &repo, &tenant, &keyring)?;
    if let Some((path, passphrase)) = &kit {
        let kit = kit_contents(&repo, tenant.as_str(), &scope, &keyring, key.as_str())?;
        write_kit(path, &kit, passphrase).map_err(|e| {
            let failure = Failure::from(e);
            let hint = "vault and tenant are made; write the kit with `reseal key export`";
            Failure::new(failure.status, format!("{}; {hint}", failure.message))
        })?;
    }
    report(common, &repo, made, &keyring_path, args.recovery.as_deref());
    Ok(())
}

fn kit_passphrase(repo: &str, path: &Path, file: Option<&Path>) -> Result<Passphrase, Failure> {
    refuse_inside(repo, path, "the recovery kit", "--recovery")?;
    if path.exists() {
        return Err(Failure::new(Status::Usage, format!("{} exists already; name a new file", path.display())));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(Failure::new(
            Status::Usage,
            format!("there is no folder {}; is the medium mounted?", folder.display()),
        ));
    }
    read_new_passphrase(file, "the recovery kit", "or --recovery-passphrase-file")
}

/// Keys in the vault would protect nothing from whoever holds the vault.
pub(crate) fn refuse_inside(repo: &str, path: &Path, what: &str, option: &str) -> Result<(), Failure> {
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let resolved = |path: &Path| {
        let path = whole(path);
        path.ancestors()
            .find_map(|above| Some(above.canonicalize().ok()?.join(path.strip_prefix(above).ok()?)))
            .unwrap_or(path)
    };
    if resolved(path).starts_with(resolved(Path::new(repo))) {
        let message = format!("{what} {} would be inside the vault; set {option} to a place outside", path.display());
        return Err(Failure::new(Status::Usage, message));
    }
    Ok(())
}

/// What a kit must hold so that a new machine that has only it and the vault can go on.
pub(crate) fn kit_contents(
    repo: &str,
    tenant: &str,
    scope: &Scope,
    keyring: &Keyring,
    key: &str,
) -> Result<KitContents, Failure> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let repo = std::path::absolute(repo).map_or_else(|_| repo.to_owned(), |path| path.display().to_string());
    Ok(KitContents {
        made: Timestamp(i64::try_from(since.as_millis()).unwrap_or(0)).to_rfc3339(),
        vault_id: scope.vault.to_string(),
        repo,
        tenant: tenant.to_owned(),
        tenant_id: scope.tenant.to_string(),
        kms: "keyring".to_owned(),
        keys: keyring.export(&[key])?,
    })
}

fn report(common: &CommonArgs, repo: &str, made: bool, keyring: &Path, kit: Option<&Path>) {
    let output = common.output();
    output.json(&json!({
        "vault": repo, "vault_made": made, "tenant": common.tenant, "keyring": keyring, "recovery_kit": kit,
    }));
    output.say(format!("vault         {repo}{}", if made { "" } else { " (it was there already)" }));
    output.say(format!("tenant        {}", common.tenant));
    output.say(format!("keys          {}", keyring.display()));
    match kit {
        Some(kit) => output.say(format!(
            "recovery kit  {}\n\nKeep the kit and its passphrase away from this machine and from the vault: with the vault and the kit \
             alone,\n`reseal key import` makes any machine able to restore. Without kit and keyring nobody can.",
            kit.display()
        )),
        None => output.say(
            "recovery kit  none\n\nIf the keyring is lost, so is all data. `reseal key export FILE` writes a recovery kit at any time.",
        ),
    }
    output.say(format!("\nNext:\n  export RESEAL_REPO={repo}\n  reseal backup VM DISK.raw\n  reseal list"));
}
