//! What all connections share: the configuration as it is now, who is there, and what is kept of it all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;

use parking_lot::Mutex;
use reseal_cli::{Failure, Status};
use reseal_format::names::TenantName;
use tracing::{error, info, warn};

use super::audit::{Audit, Event, What};
use super::logging::Logging;
use super::metrics::Metrics;
use super::rates::Rates;
use super::running::Running;
use super::standing::Standing;
use super::tenants::{OpenTenants, Tenants};
use super::turns::Turns;
use super::windows::Windows;
use super::{Client, ServeConfig};
use reseal_site::certificate::now;

/// The server, as its connections see it.
pub(super) struct Site {
    config: Mutex<Arc<ServeConfig>>,
    /// Held while another is made: what was read earlier must not take the place of what was read later.
    looking: Mutex<()>,
    /// Why the registry could not be looked at the last time.
    told: Mutex<Option<String>>,
    logging: Logging,
    connections: AtomicU64,
    pub tenants: Arc<OpenTenants>,
    pub metrics: Arc<Metrics>,
    pub audit: Audit,
    pub running: Arc<Running>,
    pub turns: Turns,
    pub windows: Arc<Windows>,
    pub rates: Rates,
    /// The same for what goes to clients.
    pub sending: Rates,
    pub standing: Standing,
}

impl Site {
    pub(super) fn new(
        config: Arc<ServeConfig>,
        tenants: Arc<dyn Tenants>,
        logging: Logging,
    ) -> std::io::Result<Arc<Site>> {
        let metrics = Arc::new(Metrics::new());
        // Some wait for the disk, so a few more than there are cores.
        let turns = 2 * available_parallelism().map_or(1, usize::from);
        let site = Arc::new(Site {
            config: Mutex::new(config.clone()),
            looking: Mutex::default(),
            told: Mutex::default(),
            logging,
            connections: AtomicU64::new(0),
            tenants: OpenTenants::new(tenants, metrics.clone()),
            metrics,
            audit: Audit::default(),
            running: Arc::default(),
            turns: Turns::new(turns),
            windows: Arc::default(),
            rates: Rates::new(),
            sending: Rates::new(),
            standing: Standing::default(),
        });
        let weak = Arc::downgrade(&site);
        site.tenants.tell(Box::new(move |tenant: &TenantName| {
            if let Some(site) = weak.upgrade() {
                site.running.end_tenant(tenant);
                site.note(&Event { tenant: Some(tenant), ..Event::new(What::Lost) });
            }
        }));
        site.audit.reopen(config.operation.audit.as_ref().map(|audit| &*audit.file))?;
        site.apply(&config);
        Ok(site)
    }

    /// The configuration as it is now.
    pub(super) fn config(&self) -> Arc<ServeConfig> {
        self.config.lock().clone()
    }

    /// Takes up who may come, and all else that can change while the server runs. Sessions of those who may not do any more what they
    /// do end.
    pub(super) fn take_up(&self, config: Arc<ServeConfig>) {
        let before = std::mem::replace(&mut *self.config.lock(), config.clone());
        config.faults.iter().filter(|fault| !before.faults.contains(fault)).for_each(|fault| warn!("{fault}"));
        for (what, same) in [
            ("listen", before.listen == config.listen),
            ("repo", before.repo == config.repo),
            ("metrics.listen", before.operation.metrics == config.operation.metrics),
            ("log.format", before.operation.log.format == config.operation.log.format),
        ] {
            if !same {
                warn!("{what} has changed: that needs a restart, and stays as it was until then");
            }
        }
        self.apply(&config);
        self.tenants.keep_only(&config.tenants());
        self.running.recheck(&config);
    }

    fn apply(&self, config: &ServeConfig) {
        let operation = &config.operation;
        self.logging.set_level(operation.log.level);
        self.rates.set(&operation.limits);
        self.sending.set(&operation.limits);
        self.tenants.set(operation.limits.cache(), operation.limits.idle());
        self.metrics.certificate_ends.set(config.certificate_ends.0 / 1000);
    }

    /// Reads the configuration again. A wrong one changes nothing.
    pub(super) fn reload(&self, read: &dyn Fn() -> Result<ServeConfig, crate::BackupError>) {
        let _looking = self.looking.lock();
        let taken = read().map_err(|e| e.to_string()).and_then(|config| {
            // First, for it is what may fail.
            let file = config.operation.audit.as_ref().map(|audit| &*audit.file);
            self.audit.reopen(file).map_err(|e| format!("the audit log can't be opened: {e}"))?;
            self.take_up(Arc::new(config));
            Ok(())
        });
        match taken {
            Ok(()) => {
                self.metrics.reloads.inc();
                info!("the configuration was read again and is in force");
                self.note(&Event::new(What::Reloaded));
            }
            Err(why) => {
                self.metrics.reload_failures.inc();
                error!("the configuration was read again and is wrong, so the old one stays in force: {why}");
                self.note(&Event::new(What::Reloaded).because(&format!("refused: {why}")));
            }
        }
    }

    /// Takes up changes of the registry, and another certificate when the server's is old.
    pub(super) fn look(&self) {
        let _looking = self.looking.lock();
        let failed = match self.config().successor(now()) {
            Ok(successor) => {
                if let Some(successor) = successor {
                    self.take_up(Arc::new(successor));
                }
                None
            }
            Err(e) => Some(Failure::of(Status::Failed, &e).message),
        };
        let mut told = self.told.lock();
        if let Some(why) = failed.as_ref().filter(|why| told.as_ref() != Some(why)) {
            error!("who may come stays as it was: {why}");
        }
        *told = failed;
    }

    /// Who may come with the certificate of that digest; otherwise why not. It may have been enrolled a moment ago.
    pub(super) fn who(&self, digest: &[u8; 32]) -> Result<Client, &'static str> {
        if self.config().who(digest).is_none() {
            self.look();
        }
        let config = self.config();
        let client = config.who(digest).cloned().ok_or_else(|| config.why_not(digest))?;
        if client.has_older()
            && let Some(enrolled) = &client.enrolled
        {
            // The new one has arrived: nobody needs the old one any more.
            let superseded = config.settings().registry().change(&enrolled.tenant, &enrolled.name, |enrolled| {
                enrolled.supersede(digest, now());
                Ok(())
            });
            match superseded {
                Ok(()) => self.look(),
                Err(e) => warn!("older certificates of {} are still taken: {e}", client.name),
            }
        }
        Ok(client)
    }

    /// All metrics as text.
    pub(super) fn metrics_text(&self) -> String {
        self.metrics.text(&self.standing.text(&self.tenants, &self.config().tenants()))
    }

    /// Notes what nothing depends on.
    pub(super) fn note(&self, event: &Event<'_>) {
        if let Err(e) = self.audit.record(event) {
            error!("{e}");
        }
    }

    /// The number of a new connection.
    pub(super) fn number(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed) + 1
    }
}
