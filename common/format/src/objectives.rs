//! Objectives: how old the newest restore point of a VM may be. They stand in the sealed part of the tenant record.

use std::collections::BTreeMap;

use crate::names::VmName;

/// Most VMs with an objective of their own: with names as long as may be, they fit a record beside all else.
pub const MAX_VM_OBJECTIVES: usize = 1024;

/// The objectives of a tenant, in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objectives {
    /// Of each VM for which nothing else is said.
    pub tenant: Option<u64>,
    /// Of single VMs. `None`: it may be as old as it likes, whatever the tenant's is.
    pub vms: BTreeMap<VmName, Option<u64>>,
}

/// What is said of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Its newest restore point may be so many seconds old.
    Within(u64),
    /// It may be as old as it likes.
    Exempt,
    /// Nothing.
    Unsaid,
}

impl Objectives {
    /// What is said of a VM.
    pub fn of(&self, vm: &VmName) -> Objective {
        match (self.vms.get(vm).copied(), self.tenant) {
            (Some(Some(seconds)), _) | (None, Some(seconds)) => Objective::Within(seconds),
            (Some(None), _) => Objective::Exempt,
            (None, None) => Objective::Unsaid,
        }
    }

    /// Says something else of a VM, or of all others.
    pub fn set(&mut self, vm: Option<&VmName>, objective: Objective) {
        match (vm, objective) {
            (None, Objective::Within(seconds)) => self.tenant = Some(seconds),
            (None, Objective::Exempt | Objective::Unsaid) => self.tenant = None,
            (Some(vm), Objective::Within(seconds)) => drop(self.vms.insert(vm.clone(), Some(seconds))),
            (Some(vm), Objective::Exempt) => drop(self.vms.insert(vm.clone(), None)),
            (Some(vm), Objective::Unsaid) => drop(self.vms.remove(vm)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_own_objective_counts_before_its_tenants() {
        let [web, db, old] = ["web", "db", "old"].map(|name| VmName::new(name).unwrap());
        let mut objectives = Objectives::default();
        assert_eq!(objectives.of(&web), Objective::Unsaid);
        objectives.set(None, Objective::Within(86_400));
        objectives.set(Some(&db), Objective::Within(3_600));
        objectives.set(Some(&old), Objective::Exempt);
        let of = |objectives: &Objectives| [&web, &db, &old].map(|vm| objectives.of(vm));
        assert_eq!(of(&objectives), [Objective::Within(86_400), Objective::Within(3_600), Objective::Exempt]);
        objectives.set(Some(&old), Objective::Unsaid);
        objectives.set(None, Objective::Exempt);
        assert_eq!(of(&objectives), [Objective::Unsaid, Objective::Within(3_600), Objective::Unsaid]);
    }
}
