//! A mount ends when its tenant is erased: no process goes on with keys that were destroyed.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reseal_vault::Tenant;

use crate::journal::Journal;

/// How often the tenant's record is looked at: one small object each time.
const EVERY: Duration = Duration::from_secs(3);

/// Calls `stop`, once, when the tenant's record says that it was erased. A record that can't be read says nothing.
pub fn watch(tenant: Arc<Tenant>, journal: Arc<Journal>, stop: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let look = move || loop {
        thread::sleep(EVERY);
        if let Ok(Some(when)) = tenant.erased() {
            journal.say(&format!("tenant {} was erased at {when}, so the mount ends", tenant.name()));
            return stop();
        }
    };
    thread::Builder::new().name("erasure".into()).spawn(look)?;
    Ok(())
}
