//! How much a tenant may store: the bytes of its packs, as the vault lists them. Generations that a higher one has replaced
//! don't count: a change of the data keys makes nobody use more.
//!
//! The rule is looked at from both sides. Before a pack is made durable: what the backup found at its start, and what it has
//! stored since. Before the commit: what the vault has then, with what others have stored meanwhile. Packs are durable before
//! they are counted, so of backups that run at once not all can commit what together is more than the quota.

use std::collections::BTreeMap;

use reseal_format::names::TenantName;
use reseal_kms::Kms;

use crate::record::Record;
use crate::{PackFile, Tenant, VaultError};

/// A tenant's quota, and what was used of it at one moment.
#[derive(Debug, Clone)]
pub struct Quota {
    tenant: TenantName,
    limit: u64,
    used: u64,
}

impl Quota {
    /// The tenant's quota, if it has one, beside the packs that it has.
    pub fn of(tenant: &Tenant, packs: &[PackFile]) -> Option<Quota> {
        Some(Quota { tenant: tenant.name.clone(), limit: tenant.keys().quota()?, used: used(packs) })
    }

    /// Refuses so many bytes more than were used at that moment, of which `stored` are in the vault by now.
    pub fn check(&self, stored: u64, more: u64) -> Result<(), VaultError> {
        let used = self.used.saturating_add(stored);
        if used.saturating_add(more) <= self.limit {
            return Ok(());
        }
        Err(VaultError::OverQuota { tenant: self.tenant.clone(), quota: self.limit, used, more })
    }
}

/// Bytes of packs, each with its highest generation.
pub(crate) fn used(packs: &[PackFile]) -> u64 {
    let highest: BTreeMap<_, _> = {
        let mut sorted = packs.to_vec();
        sorted.sort_unstable();
        sorted.into_iter().map(|pack| (pack.id, pack.length)).collect()
    };
    highest.into_values().fold(0, u64::saturating_add)
}

impl Record {
    /// Gives the tenant another quota, or none. Its keys stay.
    pub fn set_quota(&self, kms: &dyn Kms, quota: Option<u64>) -> Result<Record, VaultError> {
        self.change(kms, |next| next.set_quota(quota))
    }
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::PackId;

    use super::*;

    #[test]
    fn of_each_pack_the_highest_generation_counts() {
        let pack = |id: u8, generation, length| PackFile { id: PackId::from_bytes([id; 16]), generation, length };
        assert_eq!(used(&[pack(1, 10, 7), pack(2, 0, 100), pack(1, 9, 50)]), 107);
    }

    #[test]
    fn all_of_a_quota_may_be_used_and_not_a_byte_more() {
        let quota = Quota { tenant: TenantName::new("acme").unwrap(), limit: 100, used: 60 };
        assert!(quota.check(0, 40).is_ok() && quota.check(40, 0).is_ok());
        let said = quota.check(30, 11).unwrap_err().to_string();
        assert!(said.contains("acme") && said.contains("100 bytes") && said.contains("have 90"), "{said}");
        assert!(said.contains("11 more") && said.contains("reseal tenant set acme --quota"), "{said}");
        assert!(quota.check(u64::MAX, u64::MAX).is_err());
        assert!(!quota.check(41, 0).unwrap_err().to_string().contains("more:"));
    }
}
