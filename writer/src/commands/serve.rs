//! `reseal serve`

use std::path::PathBuf;
use std::sync::Arc;

use reseal_cli::{CommonArgs, Failure, Found, serve_config};
use reseal_format::layout::VAULT_FILE;
use reseal_format::names::TenantName;
use reseal_format::vaultfile::{MAX_VAULT_FILE, VaultFile};
use reseal_vault::VaultError;
use reseal_writer::BackupError;
use reseal_writer::serve::{Access, Logging, Read, ServeConfig, Server, Tenants};

/// Arguments of `serve`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address, certificates, limits, and who may come as which tenant, TOML [default: /etc/reseal/serve.toml for root, otherwise
    /// in the user's configuration]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Checks the configuration, the vault and the tenants' records, and ends; no KMS is asked
    #[arg(long)]
    check: bool,
}

struct Unlocks(CommonArgs);

impl Tenants for Unlocks {
    fn unlock(&self, name: &TenantName) -> Result<Access, Failure> {
        let Found { record, heads, paths, .. } = self.0.find(name)?;
        let tenant = self.0.unlock(&record)?;
        heads.remember(tenant.record_generation(), &[])?;
        Ok(Access { tenant: Arc::new(tenant), heads, state: paths.state })
    }

    fn is_erased(&self, name: &TenantName) -> bool {
        self.0.find(name).is_ok_and(|found| found.record.erased().is_some())
    }

    fn look(&self) -> Result<(), Failure> {
        let (store, _) = self.0.vault()?;
        let file = VaultFile::decode(&store.get(VAULT_FILE, MAX_VAULT_FILE)?);
        file.map(drop).map_err(|source| VaultError::Damaged { object: VAULT_FILE.into(), source }.into())
    }
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let path = serve_config(args.config.as_deref())?;
    let config = ServeConfig::read(&path)?;
    let mut common = common.clone();
    common.repo = config.repo.clone().or(common.repo);
    let tenants = Unlocks(common);
    if args.check {
        tenants.look()?;
        for tenant in config.tenants() {
            if !config.names(&tenant) && tenants.is_erased(&tenant) {
                // Only clients that were enrolled by command name it, and they may be left.
                continue;
            }
            let found = tenants.0.find(&tenant).and_then(|found| Ok(found.record.check_live()?));
            found.map_err(|failure| Failure::new(failure.status, format!("tenant {tenant}: {}", failure.message)))?;
        }
        tenants.0.output().say(format!("{} is right", path.display()));
        return Ok(());
    }
    let logging = Logging::start(config.operation.log);
    let read: Read = Box::new(move || -> Result<ServeConfig, BackupError> { ServeConfig::read(&path) });
    Server { config, read, tenants: Arc::new(tenants), logging }.run()
}
