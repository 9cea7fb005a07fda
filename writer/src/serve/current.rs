//! The configuration as it is now, while the server runs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::ServeConfig;
use crate::BackupError;
use crate::certificate::now;

/// How often the registry is looked at.
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// The configuration that counts now.
pub(super) struct Current {
    config: watch::Sender<Arc<ServeConfig>>,
    /// Held while it is looked: what was read earlier must not take the place of what was read later.
    looking: Mutex<()>,
}

impl Current {
    pub(super) fn new(config: ServeConfig) -> Current {
        Current { config: watch::Sender::new(Arc::new(config)), looking: Mutex::new(()) }
    }

    pub(super) fn get(&self) -> Arc<ServeConfig> {
        self.config.borrow().clone()
    }

    /// Told of each change.
    pub(super) fn watch(&self) -> watch::Receiver<Arc<ServeConfig>> {
        self.config.subscribe()
    }

    /// Takes up what has changed. What can't be read leaves all as it was.
    pub(super) fn look(&self) -> Result<(), BackupError> {
        let _looking = self.looking.lock();
        if let Some(successor) = self.get().successor(now())? {
            self.config.send_replace(Arc::new(successor));
        }
        Ok(())
    }
}
