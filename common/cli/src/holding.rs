//! Processes that have a tenant's keys for long say so, and end when the tenant is erased.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use reseal_store::Lease;
use reseal_vault::{Holder, Tenant, VaultError};

use crate::Status;

/// How often the tenant's record is looked at: one small object each time.
const EVERY: Duration = Duration::from_secs(3);

/// Says that this process reads the tenant's objects, until this is dropped, and sees to its end.
pub fn hold_keys(tenant: &Arc<Tenant>, what: String) -> Option<Box<dyn Lease>> {
    end_when_erased(tenant);
    tenant.reader_lease(&Holder::this_process(what))
}

/// Ends this process when the tenant is erased: with it go its keys, whatever it is doing. What it leaves is what a process
/// that is killed leaves, so whoever comes next clears it away.
pub fn end_when_erased(tenant: &Arc<Tenant>) {
    let tenant = tenant.clone();
    let look = move || loop {
        thread::sleep(EVERY);
        // That a record can't be read, or its keys not be had, says nothing.
        if let Err(error @ VaultError::Erased { .. }) = tenant.refresh() {
            eprintln!("reseal: {error}; this process ends, and with it goes what it had of the keys");
            std::process::exit(Status::Damaged as i32);
        }
    };
    // Without a thread there is nothing to be done: the process ends by itself sooner or later.
    let _ = thread::Builder::new().name("erasure".into()).spawn(look);
}
