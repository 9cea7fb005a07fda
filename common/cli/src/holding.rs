//! Processes that have a tenant's keys for long say so, and end when the tenant is erased.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reseal_store::Lease;
use reseal_vault::{Holder, Pins, Tenant};

use crate::Status;

/// How often the tenant's record is looked at: one small object each time.
const EVERY: Duration = Duration::from_secs(3);
/// How long a process may take to clear away what it has begun.
const GRACE: Duration = Duration::from_secs(5);

/// Says that this process has the tenant's keys, and reads these restore points, until this is dropped, and sees to its end: see
/// [`end_when_erased`].
pub fn hold_keys(tenant: &Arc<Tenant>, what: String, pins: Pins) -> Option<Box<dyn Lease>> {
    end_when_erased(tenant, || false);
    tenant.reader_lease(&Holder::this_process(what).pinning(pins))
}

/// Ends this process when the tenant is erased: with it go its keys, whatever it is doing. `stop` says whether the process is
/// about to end by itself, and gives it a moment for that. What it leaves otherwise is what a process that is killed
/// leaves, so whoever comes next clears it away.
pub fn end_when_erased(tenant: &Arc<Tenant>, stop: impl FnOnce() -> bool + Send + 'static) {
    let tenant = tenant.clone();
    let look = move || {
        let error = loop {
            thread::sleep(EVERY);
            match tenant.refresh() {
                Err(error) if tenant.is_lost(&error) => break error,
                // That a record can't be read, or its keys not be had, says nothing.
                _ => {}
            }
        };
        eprintln!("reseal: {error}; this process ends, and with it goes what it had of the keys");
        if stop() {
            thread::sleep(GRACE);
        }
        std::process::exit(Status::Damaged as i32);
    };
    // Without a thread there is nothing to be done: the process ends by itself sooner or later.
    let _ = thread::Builder::new().name("erasure".into()).spawn(look);
}
