//! Making a tenant: its KEK in the KMS that the configuration gives it, its record, and its recovery kit.

use std::path::{Path, PathBuf};

use reseal_cli::{CommonArgs, Failure, Status, of_tenant, read_new_passphrase};
use reseal_format::names::TenantName;
use reseal_kms::config::KEYRING;
use reseal_kms::{Keyring, Kms};
use reseal_store::Store;
use reseal_vault::create_tenant;

use super::kit::{KitArgs, NewKit};

/// Whether there is to be a recovery kit.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("escrow").required(true).args(["recovery", "no_recovery"]))]
pub(crate) struct EscrowArgs {
    #[command(flatten)]
    pub(crate) kit: KitArgs,
    /// Does without a recovery kit: if the KMS loses the key, so is all data
    #[arg(long)]
    no_recovery: bool,
}

/// Who will keep the tenant's KEK.
enum Keeper {
    Keyring(Keyring),
    /// Another KMS, and its name in the configuration.
    Kms(String, Box<dyn Kms>),
}

/// All that is needed to make a tenant: what may be refused was, and what is asked for was asked.
pub(crate) struct NewTenant {
    name: TenantName,
    keeper: Keeper,
    kit: Option<NewKit>,
    pub(crate) quota: Option<u64>,
}

/// The tenant's key, and who keeps it.
pub(crate) struct Made {
    pub(crate) key: String,
    pub(crate) kms: String,
    pub(crate) kind: &'static str,
    /// The keyring, if it is that.
    pub(crate) keyring: Option<PathBuf>,
}

impl NewTenant {
    /// Refuses what can't be, asks for passphrases, and makes a keyring where one is needed and there is none.
    pub(crate) fn prepare(
        common: &CommonArgs,
        repo: &str,
        name: TenantName,
        kit: &KitArgs,
        seal_keyring: bool,
    ) -> Result<NewTenant, Failure> {
        common.refuse_recovery_kit()?;
        let config = common.kms_config()?;
        if let Some(kms) = config.for_tenant(name.as_str())? {
            let keeper = Keeper::Kms(config.kms_of(name.as_str()).to_owned(), kms);
            return Ok(NewTenant { name, keeper, kit: NewKit::wanted(common, repo, kit)?, quota: None });
        }
        let path = common.paths()?.keyring;
        refuse_inside(repo, &path, "the keyring", "RESEAL_KEYRING")?;
        let kit = NewKit::wanted(common, repo, kit)?;
        let keyring = open_or_make_keyring(common, &path, seal_keyring)?;
        Ok(NewTenant { name, keeper: Keeper::Keyring(keyring), kit, quota: None })
    }

    /// Makes it in the vault, and writes the kit.
    pub(crate) fn make(&self, store: &dyn Store, repo: &str) -> Result<Made, Failure> {
        let kms: &dyn Kms = match &self.keeper {
            Keeper::Keyring(keyring) => keyring,
            Keeper::Kms(_, kms) => &**kms,
        };
        let made = create_tenant(store, repo, &self.name, kms, self.quota);
        let made = made.map_err(|e| of_tenant(&self.name, e))?;
        if let Some(kit) = &self.kit {
            let keys = match &self.keeper {
                Keeper::Keyring(keyring) => keyring.export(&[made.key.as_str()])?,
                Keeper::Kms(..) => Vec::new(),
            };
            kit.write(repo, &self.name, &made.scope, kms.kind(), &made.master, keys).map_err(|failure| {
                let hint = "vault and tenant are made; write the kit with `reseal key export`";
                Failure::new(failure.status, format!("{}; {hint}", failure.message))
            })?;
        }
        let (name, keyring) = match &self.keeper {
            Keeper::Keyring(keyring) => (KEYRING.to_owned(), Some(keyring.path().to_owned())),
            Keeper::Kms(name, _) => (name.clone(), None),
        };
        Ok(Made { key: made.key.to_string(), kms: name, kind: kms.kind(), keyring })
    }
}

/// Opens the keyring, or makes it: under a passphrase if one is wanted or given in a file.
pub(crate) fn open_or_make_keyring(common: &CommonArgs, path: &Path, seal: bool) -> Result<Keyring, Failure> {
    if path.exists() {
        return common.open_keyring();
    }
    let file = common.keyring_passphrase_file.as_deref();
    let passphrase = match seal || file.is_some() {
        true => Some(read_new_passphrase(file, "the keyring", "or --keyring-passphrase-file")?),
        false => None,
    };
    Ok(Keyring::create(path, passphrase.as_ref())?)
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
