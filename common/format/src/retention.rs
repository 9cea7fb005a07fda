//! Which restore points of a VM are kept. Policies stand in the sealed part of the tenant record.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::names::VmName;

/// Most VMs with a policy of their own: with names as long as may be, they fit a record beside all else.
pub const MAX_VM_POLICIES: usize = 256;

/// How many are kept. A rule of 0 keeps nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// The newest, whatever their times.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub last: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hourly: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub daily: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weekly: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub monthly: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub yearly: u32,
    /// All that are no older than so many seconds when the newest is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<u64>,
    /// Rules of a later version.
    #[serde(flatten, skip_serializing)]
    pub unknown_rules: BTreeMap<String, IgnoredAny>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde wants a reference
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Policy {
    /// Whether it keeps nothing at all: then it was not meant.
    pub fn is_empty(&self) -> bool {
        *self == Policy::default()
    }

    /// A rule that this version does not know, if there is one: then it can't be told what is to go.
    pub fn unknown(&self) -> Option<&str> {
        self.unknown_rules.keys().next().map(String::as_str)
    }
}

/// The policies of a tenant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policies {
    /// Of each VM for which nothing else is said; `None`: nothing goes by itself.
    pub tenant: Option<Policy>,
    /// Of single VMs. `None`: nothing of it goes by itself, whatever the tenant's policy is.
    pub vms: BTreeMap<VmName, Option<Policy>>,
}

/// What is said of a VM.
#[derive(Debug, Clone, PartialEq)]
pub enum Retention {
    /// What this does not keep goes.
    By(Policy),
    /// Nothing goes by itself.
    All,
    /// As the tenant's.
    Unsaid,
}

impl Policies {
    /// What counts for a VM; `None` if nothing of it goes by itself.
    pub fn of(&self, vm: &VmName) -> Option<&Policy> {
        self.vms.get(vm).unwrap_or(&self.tenant).as_ref()
    }

    /// Says something else of a VM, or of all others.
    pub fn set(&mut self, vm: Option<&VmName>, retention: Retention) {
        let policy = match retention {
            Retention::By(policy) => Some(Some(policy)),
            Retention::All => Some(None),
            Retention::Unsaid => None,
        };
        match (vm, policy) {
            (None, policy) => self.tenant = policy.flatten(),
            (Some(vm), Some(policy)) => _ = self.vms.insert(vm.clone(), policy),
            (Some(vm), None) => _ = self.vms.remove(vm),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_own_policy_counts_before_its_tenants() {
        let [web, db, old] = ["web", "db", "old"].map(|name| VmName::new(name).unwrap());
        let daily = Policy { daily: 14, ..Policy::default() };
        let yearly = Policy { yearly: 2, ..Policy::default() };
        let mut policies = Policies::default();
        assert_eq!(policies.of(&web), None);
        policies.set(None, Retention::By(daily.clone()));
        policies.set(Some(&db), Retention::By(yearly.clone()));
        policies.set(Some(&old), Retention::All);
        let of = |policies: &Policies| [&web, &db, &old].map(|vm| policies.of(vm).cloned());
        assert_eq!(of(&policies), [Some(daily), Some(yearly.clone()), None]);
        policies.set(Some(&old), Retention::Unsaid);
        policies.set(None, Retention::All);
        assert_eq!(of(&policies), [None, Some(yearly), None]);
    }

    #[test]
    fn a_rule_of_a_later_version_is_noticed() {
        let policy: Policy = serde_json::from_str(r#"{"daily":3,"within":60}"#).unwrap();
        assert_eq!((policy.unknown(), policy.daily, policy.within), (None, 3, Some(60)));
        assert_eq!(serde_json::to_string(&policy).unwrap(), r#"{"daily":3,"within":60}"#);
        let policy: Policy = serde_json::from_str(r#"{"daily":3,"lunar":{"phases":[1]}}"#).unwrap();
        assert_eq!(policy.unknown(), Some("lunar"));
        assert!(Policy::default().is_empty() && !policy.is_empty());
    }
}
