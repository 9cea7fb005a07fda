//! The arguments that every command takes.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use reseal_format::names::{TenantName, VmName};
use reseal_kms::Keyring;
use reseal_store::{Cached, Store, is_address};
use reseal_vault::heads::Heads;
use reseal_vault::{Chain, Record, Tenant};

use crate::paths::{cache_folder, open_bucket};
use crate::{Failure, Output, Paths, Status, open_store, parse_size, read_passphrase};

/// The tenant of whoever has but one.
pub const DEFAULT_TENANT: &str = "default";

/// Common arguments.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// The vault: a folder, or s3://BUCKET/PREFIX, az://CONTAINER/PREFIX, gs://BUCKET/PREFIX; or, for commands that make or read restore points, the enrolment file of a vault at another site
    #[arg(long, env = "RESEAL_REPO", global = true, value_name = "URL")]
    pub repo: Option<String>,
    /// Whose restore points
    #[arg(long, env = "RESEAL_TENANT", global = true, default_value = DEFAULT_TENANT, value_name = "NAME")]
    pub tenant: String,
    /// The embedded KMS [default: /etc/reseal/keyring.json for root, otherwise in the user's configuration]
    #[arg(long, env = "RESEAL_KEYRING", global = true, value_name = "FILE")]
    pub keyring: Option<PathBuf>,
    /// Reads the keyring's passphrase from the first line of a file instead of asking
    #[arg(long, env = "RESEAL_KEYRING_PASSPHRASE_FILE", global = true, value_name = "FILE")]
    pub keyring_passphrase_file: Option<PathBuf>,
    /// Which KMS keeps which tenant's key [default: /etc/reseal/kms.toml for root, otherwise in the user's configuration; a
    /// tenant that it does not name uses the keyring]
    #[arg(long, env = "RESEAL_KMS_CONFIG", global = true, value_name = "FILE")]
    pub kms_config: Option<PathBuf>,
    /// Opens the tenant with its recovery kit, or a sheet with one, and asks no KMS
    #[arg(long, global = true, value_name = "FILE")]
    pub recovery_kit: Option<PathBuf>,
    /// Reads a recovery kit's passphrase from the first line of a file instead of asking
    #[arg(long, env = "RESEAL_RECOVERY_PASSPHRASE_FILE", global = true, value_name = "FILE")]
    pub recovery_passphrase_file: Option<PathBuf>,
    /// Opens a recovery kit that is sealed to age recipients with the identities in a file, which must be private
    #[arg(long, global = true, value_name = "FILE")]
    pub recovery_identity: Option<PathBuf>,
    /// What this machine remembers of vaults [default: /var/lib/reseal for root, otherwise in the user's state]
    #[arg(long, env = "RESEAL_STATE", global = true, value_name = "FOLDER")]
    pub state: Option<PathBuf>,
    /// Where mounts, boots, exports and prunes keep what they read of an object store, sealed as it is there [default: /var/cache/reseal
    /// for root, otherwise in the user's cache]
    #[arg(long, env = "RESEAL_STORE_CACHE", global = true, value_name = "FOLDER")]
    pub store_cache: Option<PathBuf>,
    /// How much of that is kept, such as 50G; 0 for nothing
    #[arg(long, env = "RESEAL_STORE_CACHE_SIZE", global = true, default_value = "10G", value_name = "SIZE", value_parser = parse_size)]
    pub store_cache_size: u64,
    /// Whether this process is one that reads, and may do so from what is kept.
    #[arg(skip)]
    pub is_reader: bool,
    /// Takes a vault that is older than what was seen before as it is, and remembers that
    #[arg(long, global = true)]
    pub accept_rollback: bool,
    /// Runs even where memory can't be locked and swap is not encrypted
    #[arg(long, global = true)]
    pub allow_swap: bool,
    /// Prints JSON: one document, or one object a line for events
    #[arg(long, global = true)]
    pub json: bool,
    /// Prints errors only
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Prints more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// A tenant whose record was read; no KMS was asked yet.
pub struct Found {
    pub record: Record,
    pub heads: Heads,
    pub paths: Paths,
    pub repo: String,
}

/// A tenant that is ready to be used.
pub struct Opened {
    pub tenant: Arc<Tenant>,
    pub heads: Heads,
    pub paths: Paths,
    pub repo: String,
}

impl CommonArgs {
    /// How to print.
    pub fn output(&self) -> Output {
        Output { json: self.json, quiet: self.quiet, verbose: self.verbose > 0 }
    }

    /// Where keys and state are.
    pub fn paths(&self) -> Result<Paths, Failure> {
        Paths::new(self.keyring.clone(), self.kms_config.clone(), self.state.clone())
    }

    /// The vault's name as given.
    pub fn repo(&self) -> Result<String, Failure> {
        let missing = || {
            Failure::new(
                Status::Usage,
                "which vault? give --repo FOLDER or --repo s3://BUCKET/PREFIX, or set RESEAL_REPO",
            )
        };
        self.repo.clone().filter(|repo| !repo.is_empty()).ok_or_else(missing)
    }

    /// The tenant's name, checked.
    pub fn tenant(&self) -> Result<TenantName, Failure> {
        TenantName::new(&self.tenant).map_err(|e| Failure::of(Status::Usage, &e))
    }

    /// Opens the keyring, with its passphrase if it has one.
    pub fn open_keyring(&self) -> Result<Keyring, Failure> {
        let file = self.keyring_passphrase_file.clone();
        Ok(Keyring::open(&self.paths()?.keyring, |path| {
            read_passphrase(file.as_deref(), &format!("Passphrase of the keyring {}: ", path.display()))
        })?)
    }

    /// The vault as a store, and its name.
    pub fn vault(&self) -> Result<(Arc<dyn Store>, String), Failure> {
        let repo = self.repo()?;
        let store = match is_address(&repo) && self.is_reader && self.store_cache_size > 0 {
            true => self.cached(&repo)?,
            false => open_store(&repo)?,
        };
        Ok((store, repo))
    }

    /// The vault in an object store, and what is kept of it here.
    fn cached(&self, repo: &str) -> Result<Arc<dyn Store>, Failure> {
        let bucket = open_bucket(repo)?;
        let folder = self.store_cache.clone().map_or_else(|| cache_folder().map_err(|e| e.to_string()), Ok);
        let made = folder.and_then(|folder| {
            Cached::new(bucket, repo, &folder, self.store_cache_size).map_err(|e| format!("{}: {e}", folder.display()))
        });
        match made {
            Ok(cached) => Ok(Arc::new(cached)),
            Err(e) => {
                eprintln!("reseal: nothing can be kept, so all that is read is asked for anew: {e}; see --store-cache");
                open_store(repo)
            }
        }
    }

    /// Reads the record of a tenant, and refuses one that is older than what was seen.
    pub fn find(&self, name: &TenantName) -> Result<Found, Failure> {
        let (store, repo) = self.vault()?;
        let paths = self.paths()?;
        // That a vault is older which is shown as it was is no rollback.
        let is_past = store.is_past();
        let state = if is_past { &paths.state.join("past") } else { &paths.state };
        let mut record = Record::read(store.clone(), &repo, name)?;
        let heads = Heads::new(state, &record.scope(), self.accept_rollback || is_past);
        if heads.check_generation(record.generation()).is_err() {
            // Another process may have replaced it since it was read, and remembered that.
            record = Record::read(store, &repo, name)?;
            heads.check_generation(record.generation())?;
        }
        Ok(Found { record, heads, paths, repo })
    }

    /// Opens the vault, unlocks the tenant, and checks that neither was rolled back.
    pub fn open(&self) -> Result<Opened, Failure> {
        let name = self.tenant()?;
        let found = self.find(&name)?;
        let generation = found.record.generation();
        self.open_found(found).or_else(|failure| match self.find(&name) {
            // Replaced by another process while it was opened: its key may be gone, and what was seen is newer.
            Ok(again) if again.record.generation() > generation => self.open_found(again),
            _ => Err(failure),
        })
    }

    /// The same where the record was read.
    pub fn open_found(&self, found: Found) -> Result<Opened, Failure> {
        let Found { record, heads, paths, repo } = found;
        let tenant = self.unlock(&record)?;
        heads.remember(tenant.record_generation(), &[])?;
        Ok(Opened { tenant: Arc::new(tenant), heads, paths, repo })
    }
}

impl Opened {
    /// The numbers of a VM; an error if they are fewer than were seen before.
    pub fn chain(&self, vm: &VmName) -> Result<Chain, Failure> {
        Ok(self.heads.whole_chain(&*self.tenant, vm)?)
    }
}
