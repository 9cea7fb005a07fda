//! How fast clients and tenants may send, and be sent to, whatever limits they keep by themselves. Each way has limits of its own.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use reseal_format::names::TenantName;

use super::operation::{Limits, Size};
use crate::throttle::Throttle;

/// No limit, for practical purposes: then nobody ever waits.
const NONE: u64 = u64::MAX;

fn rate(limit: Option<Size>) -> u64 {
    limit.map_or(NONE, |Size(rate)| rate)
}

/// One limit for each key, while somebody is held to it.
struct Shared<K>(HashMap<K, Weak<Throttle>>);

impl<K: Hash + Eq> Shared<K> {
    fn of(&mut self, key: K, limit: Option<Size>) -> Arc<Throttle> {
        self.0.retain(|_, throttle| throttle.strong_count() > 0);
        if let Some(throttle) = self.0.get(&key).and_then(Weak::upgrade) {
            return throttle;
        }
        let throttle = Arc::new(Throttle::new(rate(limit)));
        self.0.insert(key, Arc::downgrade(&throttle));
        throttle
    }

    fn set(&self, limit: Option<Size>) {
        self.0.values().filter_map(Weak::upgrade).for_each(|throttle| throttle.set_rate(rate(limit)));
    }
}

/// The limits of those who send now.
pub(super) struct Rates(Mutex<(Shared<[u8; 32]>, Shared<TenantName>)>);

/// What one connection is held to.
pub(super) struct Held {
    client: Arc<Throttle>,
    tenant: Arc<Throttle>,
}

impl Held {
    /// Takes bytes that passed; until when to wait before more may.
    pub(super) fn take(&self, bytes: u64) -> Option<Instant> {
        let until = self.client.reserve(bytes).max(self.tenant.reserve(bytes));
        (until > Instant::now()).then_some(until)
    }
}

impl Rates {
    pub(super) fn new() -> Rates {
        Rates(Mutex::new((Shared(HashMap::new()), Shared(HashMap::new()))))
    }

    /// The limits for a client, by its certificate, and its tenant.
    pub(super) fn of(&self, limits: &Limits, client: [u8; 32], tenant: &TenantName) -> Held {
        let mut rates = self.0.lock();
        let client = rates.0.of(client, limits.client_rate);
        let tenant = rates.1.of(tenant.clone(), limits.tenant_rate);
        Held { client, tenant }
    }

    /// Takes up other limits, for those who send now too.
    pub(super) fn set(&self, limits: &Limits) {
        let rates = self.0.lock();
        rates.0.set(limits.client_rate);
        rates.1.set(limits.tenant_rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn all_connections_of_a_tenant_have_one_limit_and_none_is_no_limit() {
        let rates = Rates::new();
        let tenant = TenantName::new("acme").unwrap();
        let mut limits = Limits::default();
        limits.tenant_rate = Some(Size(1 << 20));
        let (one, two) = (rates.of(&limits, [1; 32], &tenant), rates.of(&limits, [2; 32], &tenant));
        assert!(one.take(1 << 20).is_none());
        let until = two.take(1 << 20).unwrap();
        assert!(until > Instant::now() + Duration::from_millis(500));
        let other = rates.of(&limits, [3; 32], &TenantName::new("other").unwrap());
        rates.set(&Limits::default());
        assert!((0..1000).all(|_| other.take(1 << 30).is_none()));
    }
}
