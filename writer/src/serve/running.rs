//! The sessions that run: who they are, and the way to end them.
//!
//! Whatever changes who may come (a configuration, a revocation) ends in [`Running::recheck`]: it asks of each session whether its
//! certificate would still be let in for what it does, and ends it otherwise.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::names::{TenantName, VmName};
use tokio::sync::watch;

use super::{Client, ServeConfig};
use crate::link::Why;

struct Session {
    digest: [u8; 32],
    client: Client,
    vm: Option<VmName>,
    ending: watch::Sender<Option<Why>>,
}

impl Session {
    fn end(&self, why: Why) {
        // The first reason stays.
        self.ending.send_if_modified(|ending| ending.is_none() && ending.replace(why).is_none());
    }

    fn is_allowed(&self, config: &ServeConfig) -> bool {
        config.may_stay(&self.digest, &self.client, self.vm.as_ref())
    }
}

/// All of them, by the number of their connection.
#[derive(Default)]
pub(super) struct Running(Mutex<HashMap<u64, Session>>);

/// One of them, until it is dropped.
pub(super) struct Entry {
    running: Arc<Running>,
    connection: u64,
    pub ending: watch::Receiver<Option<Why>>,
}

/// Why no more may run.
pub(super) enum Full {
    All(u32),
    OfClient(u32),
}

impl Running {
    /// Lets a client in, if there is room.
    pub(super) fn enter(
        self: &Arc<Self>,
        connection: u64,
        digest: [u8; 32],
        client: Client,
        (most, most_of_client): (u32, u32),
    ) -> Result<Entry, Full> {
        let mut sessions = self.0.lock();
        if sessions.len() >= most as usize {
            return Err(Full::All(most));
        }
        if sessions.values().filter(|session| session.digest == digest).count() >= most_of_client as usize {
            return Err(Full::OfClient(most_of_client));
        }
        let (end, ending) = watch::channel(None);
        sessions.insert(connection, Session { digest, client, vm: None, ending: end });
        Ok(Entry { running: self.clone(), connection, ending })
    }

    /// Ends those that may not do any more what they do.
    pub(super) fn recheck(&self, config: &ServeConfig) {
        let sessions = self.0.lock();
        sessions
            .values()
            .filter(|session| !session.is_allowed(config))
            .for_each(|session| session.end(Why::NotAllowed));
    }

    /// Ends those of a tenant.
    pub(super) fn end_tenant(&self, tenant: &TenantName) {
        let sessions = self.0.lock();
        sessions.values().filter(|session| session.client.tenant == *tenant).for_each(|session| session.end(Why::Lost));
    }

    /// Ends all.
    pub(super) fn stop(&self) {
        self.0.lock().values().for_each(|session| session.end(Why::Stopping));
    }

    /// Ends one that has lasted too long.
    pub(super) fn end_old(&self, connection: u64) {
        if let Some(session) = self.0.lock().get(&connection) {
            session.end(Why::TooLong);
        }
    }

    /// Whether none runs.
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

impl Entry {
    /// Says which VM the session is about.
    pub(super) fn is_about(&self, vm: &VmName) {
        if let Some(session) = self.running.0.lock().get_mut(&self.connection) {
            session.vm = Some(vm.clone());
        }
    }

    /// Why it is to end, if it is.
    pub(super) fn why(&self) -> Option<Why> {
        *self.ending.borrow()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.running.0.lock().remove(&self.connection);
    }
}
