//! Making a tenant: its KEK in the KMS that the configuration gives it, its record, and its recovery kit.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use reseal_cli::{CommonArgs, Failure, Status, of_tenant, read_new_passphrase};
use reseal_format::keys::Scope;
use reseal_format::names::TenantName;
use reseal_format::time::Timestamp;
use reseal_kms::config::KEYRING;
use reseal_kms::kit::{KitContents, write_kit};
use reseal_kms::{Keyring, Kms, Passphrase};
use reseal_store::Store;
use reseal_vault::create_tenant;

/// Whether there is to be a recovery kit.
#[derive(clap::Args)]
pub(crate) struct KitArgs {
    /// Where to write the recovery kit: an age file under a passphrase, to be kept away from this machine
    #[arg(long, value_name = "FILE", required_unless_present = "no_recovery", conflicts_with = "no_recovery")]
    pub(crate) recovery: Option<PathBuf>,
    /// Does without a recovery kit: if the KMS loses the key, so is all data
    #[arg(long)]
    pub(crate) no_recovery: bool,
    /// Reads the kit's passphrase from the first line of a file instead of asking
    #[arg(long, env = "RESEAL_RECOVERY_PASSPHRASE_FILE", value_name = "FILE")]
    pub(crate) recovery_passphrase_file: Option<PathBuf>,
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
    kit: Option<(PathBuf, Passphrase)>,
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
        let config = common.kms_config()?;
        if let Some(kms) = config.for_tenant(name.as_str())? {
            let named = config.kms_of(name.as_str()).to_owned();
            if kit.recovery.is_some() {
                return Err(no_kit(&name, &named, ", and give --no-recovery"));
            }
            return Ok(NewTenant { name, keeper: Keeper::Kms(named, kms), kit: None, quota: None });
        }
        let path = common.paths()?.keyring;
        refuse_inside(repo, &path, "the keyring", "RESEAL_KEYRING")?;
        let given = kit.recovery_passphrase_file.as_deref();
        let kit = match &kit.recovery {
            Some(path) => Some((path.clone(), kit_passphrase(repo, path, given)?)),
            None => None,
        };
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
        let (key, scope) = made.map_err(|e| of_tenant(&self.name, e))?;
        if let (Keeper::Keyring(keyring), Some((path, passphrase))) = (&self.keeper, &self.kit) {
            let kit = kit_contents(repo, self.name.as_str(), &scope, keyring, key.as_str())?;
            write_kit(path, &kit, passphrase).map_err(|e| {
                let failure = Failure::from(e);
                let hint = "vault and tenant are made; write the kit with `reseal key export`";
                Failure::new(failure.status, format!("{}; {hint}", failure.message))
            })?;
        }
        let (name, keyring) = match &self.keeper {
            Keeper::Keyring(keyring) => (KEYRING.to_owned(), Some(keyring.path().to_owned())),
            Keeper::Kms(name, _) => (name.clone(), None),
        };
        Ok(Made { key: key.to_string(), kms: name, kind: kms.kind(), keyring })
    }
}

/// A kit holds KEKs, and this one never leaves its KMS.
pub(crate) fn no_kit(tenant: &TenantName, kms: &str, remedy: &str) -> Failure {
    let message = format!(
        "the key of tenant {tenant} is in the KMS {kms} and never leaves it, so no recovery kit can hold it: keep copies of \
         that KMS as its documentation says{remedy}"
    );
    Failure::new(Status::Usage, message)
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

/// Checks where a kit is to be written, and asks for its passphrase.
pub(crate) fn kit_passphrase(repo: &str, path: &Path, file: Option<&Path>) -> Result<Passphrase, Failure> {
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
    let repo = std::path::absolute(repo).map_or_else(|_| repo.to_owned(), |path| path.display().to_string());
    Ok(KitContents {
        made: now().to_rfc3339(),
        vault_id: scope.vault.to_string(),
        repo,
        tenant: tenant.to_owned(),
        tenant_id: scope.tenant.to_string(),
        kms: KEYRING.to_owned(),
        keys: keyring.export(&[key])?,
    })
}

/// This moment.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(0))
}
