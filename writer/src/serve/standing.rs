//! How restore points stand, as `reseal status` says it, for the metrics: also of tenants that are locked, whose restore points grow old
//! all the same.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_format::names::TenantName;

use super::tenants::{Access, OpenTenants};
use crate::status::metrics;
use crate::status::{Report, TenantReport};
use reseal_site::certificate::now;

/// How long a report is good of a tenant that is open, and of one that is locked, for which its KMS is asked.
const OPEN: Duration = Duration::from_secs(15);
const LOCKED: Duration = Duration::from_secs(900);
/// How long one who asks waits at most for new ones: a KMS may hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was found out of each tenant, and when.
#[derive(Default)]
pub(super) struct Standing {
    known: Mutex<HashMap<TenantName, (Instant, Option<TenantReport>)>>,
    /// Of whom that is not true any more. Apart, for who says so must not wait for a KMS.
    changed: Mutex<HashSet<TenantName>>,
}

impl Standing {
    /// The metrics of these tenants. One that can't be opened has those that were known last.
    pub(super) fn text(&self, tenants: &OpenTenants, names: &[TenantName]) -> String {
        let began = Instant::now();
        let mut known = self.known.lock();
        known.retain(|name, _| names.contains(name));
        let mut changed = std::mem::take(&mut *self.changed.lock());
        let mut report = Report::of_vault();
        for name in names {
            let open = tenants.peek(name);
            let good = if open.is_some() { OPEN } else { LOCKED };
            let is_old = known.get(name).is_none_or(|(when, _)| when.elapsed() >= good) || changed.contains(name);
            if is_old && began.elapsed() < PATIENCE {
                changed.remove(name);
                let found = match &open {
                    Some(open) => look(open),
                    None => tenants.glance(name).ok().and_then(|access| look(&access)),
                };
                let before = known.remove(name).and_then(|(when, before)| before.map(|report| later(report, when)));
                known.insert(name.clone(), (Instant::now(), found.or(before)));
            }
            if let Some((when, Some(found))) = known.get(name) {
                report.tenants.push(later(found.clone(), *when));
            }
        }
        // There was no time for these.
        self.changed.lock().extend(changed.into_iter().filter(|name| names.contains(name)));
        metrics::text(&report)
    }

    /// A session of a tenant has ended, whatever came of it.
    pub(super) fn has_changed(&self, tenant: &TenantName) {
        self.changed.lock().insert(tenant.clone());
    }
}

fn look(access: &Access) -> Option<TenantReport> {
    TenantReport::of(&access.tenant, &access.heads, &access.state, now()).ok()
}

/// A report as it is now, if nothing has happened since then but time.
fn later(mut report: TenantReport, when: Instant) -> TenantReport {
    report.grow_older(when.elapsed().as_secs());
    report
}
