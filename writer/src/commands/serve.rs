//! `reseal serve`

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use reseal_cli::{CommonArgs, Failure, Found, serve_config};
use reseal_format::names::TenantName;
use reseal_writer::serve::{Access, ServeConfig, Server, Tenants};

/// Arguments of `serve`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address, vault, and who may come, TOML [default: /etc/reseal/serve.toml for root, otherwise in the user's configuration]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Tenants that were unlocked, by name.
struct Unlocked {
    common: CommonArgs,
    open: Mutex<HashMap<TenantName, Access>>,
}

impl Tenants for Unlocked {
    fn open(&self, name: &TenantName) -> Result<Access, Failure> {
        let known = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(access) = known().get(name) {
            return Ok(access.clone());
        }
        // Without the lock: a KMS that hangs must not hold up other tenants.
        let Found { record, heads, paths, .. } = self.common.find(name)?;
        let tenant = self.common.unlock(&record)?;
        heads.remember(tenant.record_generation(), &[])?;
        let access = Access { tenant: Arc::new(tenant), heads, state: paths.state };
        Ok(known().entry(name.clone()).or_insert(access).clone())
    }
}

pub(crate) fn run(common: &CommonArgs, args: &Args) -> Result<(), Failure> {
    let output = common.output();
    let config = ServeConfig::read(&serve_config(args.config.as_deref())?)?;
    let mut common = common.clone();
    common.repo = config.repo.clone().or(common.repo);
    let tenants = Arc::new(Unlocked { common, open: Mutex::default() });
    for tenant in config.tenants() {
        // One whose KMS is down for now must not keep the others waiting.
        if let Err(failure) = tenants.open(&tenant) {
            match failure.status {
                reseal_cli::Status::Unreachable => output.warn(format!("tenant {tenant}: {}", failure.message)),
                // One that was erased or removed since a client of it was enrolled.
                _ if !config.names(&tenant) => output.warn(format!("tenant {tenant}: {}", failure.message)),
                _ => return Err(Failure::new(failure.status, format!("tenant {tenant}: {}", failure.message))),
            }
        }
    }
    let log = move |line: &str| output.say(line);
    Ok(Server { config, tenants, log: Arc::new(log) }.run()?)
}
