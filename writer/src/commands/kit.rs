//! A recovery kit that is to be written: what may be refused is, and what is asked for is asked, before anything is made.

use std::path::{Path, PathBuf};

use reseal_cli::{CommonArgs, Failure, Status, read_new_passphrase};
use reseal_format::keys::{Master, Scope};
use reseal_format::names::TenantName;
use reseal_format::tenant::KmsRef;
use reseal_kms::config::KEYRING;
use reseal_kms::kit::{KitContents, KitLock, Recipient, read_recipients, write_kit};
use reseal_kms::{KeyBytes, NamedKey};
use reseal_site::certificate::now;

use super::new_tenant::refuse_inside;

/// Where to write a recovery kit, and what opens it.
#[derive(clap::Args)]
pub(crate) struct KitArgs {
    /// Where to write the recovery kit: an age file, to be kept away from this machine
    #[arg(long, value_name = "FILE")]
    pub(crate) recovery: Option<PathBuf>,
    #[command(flatten)]
    lock: LockArgs,
}

/// What opens a recovery kit: a passphrase, unless recipients are named.
#[derive(clap::Args)]
pub(crate) struct LockArgs {
    /// Seals the recovery kit to this age recipient instead of a passphrase; may be given several times, each opens it
    #[arg(long = "recovery-recipient", value_name = "AGE1...")]
    recipients: Vec<String>,
    /// Seals the recovery kit to the age recipients in a file, one a line; lines that begin with # are left out
    #[arg(long = "recovery-recipients-file", value_name = "FILE")]
    recipients_file: Option<PathBuf>,
}

impl LockArgs {
    fn is_empty(&self) -> bool {
        self.recipients.is_empty() && self.recipients_file.is_none()
    }

    /// The recipients that are named, or else the passphrase, which is asked for here.
    fn lock(&self, common: &CommonArgs) -> Result<KitLock, Failure> {
        if self.is_empty() {
            let file = common.recovery_passphrase_file.as_deref();
            let option = "or --recovery-passphrase-file";
            return Ok(KitLock::Passphrase(read_new_passphrase(file, "the recovery kit", option)?));
        }
        let mut recipients = self.recipients.iter().map(|text| text.parse()).collect::<Result<Vec<Recipient>, _>>()?;
        if let Some(file) = &self.recipients_file {
            recipients.extend(read_recipients(file)?);
        }
        Ok(KitLock::recipients(recipients)?)
    }
}

/// A kit that only needs its content.
pub(crate) struct NewKit {
    path: PathBuf,
    lock: KitLock,
}

impl NewKit {
    /// Refuses what can't be, and asks for the passphrase if one is needed; none if no kit is asked for.
    pub(crate) fn wanted(common: &CommonArgs, repo: &str, args: &KitArgs) -> Result<Option<NewKit>, Failure> {
        match &args.recovery {
            Some(path) => Ok(Some(NewKit::prepare(common, repo, path, "--recovery", &args.lock)?)),
            None if args.lock.is_empty() => Ok(None),
            None => Err(Failure::new(Status::Usage, "recipients of a recovery kit, but no kit: give --recovery FILE")),
        }
    }

    /// The same for a kit at this path, which the argument `option` gave.
    pub(crate) fn prepare(
        common: &CommonArgs,
        repo: &str,
        path: &Path,
        option: &str,
        lock: &LockArgs,
    ) -> Result<NewKit, Failure> {
        refuse_inside(repo, path, "the recovery kit", option)?;
        if path.symlink_metadata().is_ok() {
            return Err(Failure::new(Status::Usage, format!("{} exists already; name a new file", path.display())));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            let message = format!("there is no folder {}; is the medium mounted?", folder.display());
            return Err(Failure::new(Status::Usage, message));
        }
        Ok(NewKit { path: path.to_owned(), lock: lock.lock(common)? })
    }

    /// Writes it: all that a new machine which has only it and the vault needs to go on. `kms` is the kind of KMS that wraps
    /// the master, and `keys` what a keyring has of it, see [`keyring_keys`].
    pub(crate) fn write(
        &self,
        repo: &str,
        tenant: &TenantName,
        scope: &Scope,
        kms: &str,
        master: &Master,
        keys: Vec<NamedKey>,
    ) -> Result<(), Failure> {
        let repo = std::path::absolute(repo).map_or_else(|_| repo.to_owned(), |path| path.display().to_string());
        let kit = KitContents {
            made: now().to_rfc3339(),
            vault_id: scope.vault.to_string(),
            repo,
            tenant: tenant.to_string(),
            tenant_id: scope.tenant.to_string(),
            kms: kms.to_owned(),
            master: Some(KeyBytes::copy_from(&master.for_escrow())),
            keys,
        };
        Ok(write_kit(&self.path, &kit, &self.lock)?)
    }
}

/// The KEK that a kit holds beside the master, so that a keyring has it again without a change of the vault: only a keyring
/// hands one out.
pub(crate) fn keyring_keys(common: &CommonArgs, kms: &KmsRef) -> Result<Vec<NamedKey>, Failure> {
    match kms.kind == KEYRING {
        true => Ok(common.open_keyring()?.export(&[&kms.key])?),
        false => Ok(Vec::new()),
    }
}
