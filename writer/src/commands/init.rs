//! `reseal init`

use std::path::Path;

use reseal_cli::{CommonArgs, Failure, open_store};
use reseal_vault::{VaultError, create_vault};
use serde_json::json;

use super::new_tenant::{EscrowArgs, Made, NewTenant};

/// Arguments of `init`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    escrow: EscrowArgs,
    /// Puts a new keyring under a passphrase
    #[arg(long)]
    keyring_passphrase: bool,
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let repo = common.repo()?;
    // Everything that may be refused or asked is, before anything is made.
    let tenant = NewTenant::prepare(common, &repo, common.tenant()?, &args.escrow.kit, args.keyring_passphrase)?;
    let store = open_store(&repo)?;
    let vault_made = match create_vault(&*store, &repo) {
        Ok(_) => true,
        Err(VaultError::VaultExists { .. }) => false,
        Err(e) => return Err(e.into()),
    };
    let made = tenant.make(&*store, &repo)?;
    report(common, &repo, vault_made, &made, args.escrow.kit.recovery.as_deref());
    Ok(())
}

fn report(common: &CommonArgs, repo: &str, vault_made: bool, made: &Made, kit: Option<&Path>) {
    let output = common.output();
    output.json(&json!({
        "vault": repo, "vault_made": vault_made, "tenant": common.tenant, "keyring": made.keyring, "recovery_kit": kit,
        "kms": made.kms, "kind": made.kind, "key": made.key,
    }));
    output.say(format!("vault         {repo}{}", if vault_made { "" } else { " (it was there already)" }));
    report_tenant(common, &common.tenant, made, kit);
    output.say(format!("\nNext:\n  export RESEAL_REPO={repo}\n  reseal backup VM DISK.raw\n  reseal list"));
}

/// Says who keeps the tenant's key, and what that means.
pub(crate) fn report_tenant(common: &CommonArgs, tenant: &str, made: &Made, kit: Option<&Path>) {
    let output = common.output();
    output.say(format!("tenant        {tenant}"));
    match &made.keyring {
        Some(keyring) => output.say(format!("keys          {}", keyring.display())),
        None => output.say(format!("key           {} in the KMS {} ({})", made.key, made.kms, made.kind)),
    }
    let lost = if made.keyring.is_some() { "the keyring is lost" } else { "the KMS loses the key" };
    output.say(match kit {
        Some(kit) => format!(
            "recovery kit  {}\n\nKeep the kit, and what opens it, away from this machine and from the vault. With the vault and the \
             kit alone any\nmachine reads (--recovery-kit) and goes on (`reseal key import`), also if {lost}. `reseal key \
             print`\nmakes a sheet of paper of it.",
            kit.display()
        ),
        None => format!(
            "recovery kit  none\n\nIf {lost}, so is all data of this tenant. `reseal key export FILE` writes a recovery kit at any time."
        ),
    });
}
