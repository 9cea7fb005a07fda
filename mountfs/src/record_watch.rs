//! A mount, or whatever else serves for long, keeps up with its tenant's record: it learns new keys before it needs them, and it ends when the tenant is
//! erased, for no process goes on with keys that were destroyed.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reseal_vault::heads::Heads;
use reseal_vault::{Tenant, VaultError};

use crate::journal::Journal;

/// How often the tenant's record is looked at: one small object each time.
const EVERY: Duration = Duration::from_secs(3);

/// Looks at the record until the tenant is erased; then it calls `stop`, once. `what` is what serves, as the journal calls it.
pub fn watch(
    what: &'static str,
    tenant: Arc<Tenant>,
    heads: Heads,
    journal: Arc<Journal>,
    stop: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let mut watch = RecordWatch { what, tenant, heads, journal, has_complained: false };
    let look = move || {
        while watch.look() {
            thread::sleep(EVERY);
        }
        stop();
    };
    thread::Builder::new().name("record".into()).spawn(look)?;
    Ok(())
}

struct RecordWatch {
    what: &'static str,
    tenant: Arc<Tenant>,
    heads: Heads,
    journal: Arc<Journal>,
    /// Whether what stands in the way now was said.
    has_complained: bool,
}

impl RecordWatch {
    /// Looks once; whether the tenant is still there.
    fn look(&mut self) -> bool {
        let (name, what) = (self.tenant.name(), self.what);
        match self.tenant.refresh() {
            Ok(is_new) => {
                self.has_complained = false;
                if is_new {
                    let generation = self.tenant.record_generation();
                    self.journal
                        .say(&format!("tenant {name} has a new record, generation {generation}: its keys are in use"));
                    if let Err(error) = self.heads.remember(generation, &[]) {
                        self.journal.say(&error.to_string());
                    }
                }
            }
            Err(VaultError::Erased { when, .. }) => {
                self.journal.say(&format!("tenant {name} was erased at {when}, so the {what} ends"));
                return false;
            }
            Err(error) if self.tenant.is_lost(&error) => {
                self.journal.say(&format!("{error}; so the {what} ends"));
                return false;
            }
            // A record that can't be read now says nothing.
            Err(VaultError::Store(_)) => {}
            // What its keys open is read on, so this is said once and not each time.
            Err(error) if !self.has_complained => {
                self.has_complained = true;
                self.journal.say(&format!("{error}. The {what} goes on with the keys that it has"));
            }
            Err(_) => {}
        }
        true
    }
}
