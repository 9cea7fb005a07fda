//! Those who are at work on a tenant, and whose end somebody waits for who removes or replaces what they may rely on.

use reseal_store::Lease;
use reseal_vault::{Held, PointName, Silenced, Tenant, VaultError};

/// Those of them who are still at work. One who was not heard of for long is ended, if he can be; `fenced` is told of the restore point that
/// he won't make then.
pub(crate) fn still(
    tenant: &Tenant,
    at_work: Vec<Held>,
    under: &dyn Lease,
    say: &(dyn Fn(&str) + Sync),
    fenced: &mut dyn FnMut(PointName),
) -> Result<Vec<Held>, VaultError> {
    let mut held = Vec::new();
    for lease in at_work {
        let Some(lease) = tenant.find_again(&lease)? else { continue };
        match lease.is_silent {
            true => match tenant.end_silent(&lease, under)? {
                Silenced::No => held.push(lease),
                Silenced::Yes(point) => {
                    say(&format!("not waited for any longer, and may make nothing any more: {lease}"));
                    point.into_iter().for_each(&mut *fenced);
                }
            },
            false => held.push(lease),
        }
    }
    Ok(held)
}
