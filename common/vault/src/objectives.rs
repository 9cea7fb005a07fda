//! How old the newest restore point of a VM may be, and which of them are kept: changed as a quota is, and looked at by who asks for
//! the state, or prunes.

use reseal_format::names::VmName;
use reseal_format::objectives::{MAX_VM_OBJECTIVES, Objective};
use reseal_format::retention::{MAX_VM_POLICIES, Retention};
use reseal_kms::Kms;

use crate::VaultError;
use crate::record::Record;

impl Record {
    /// Gives the tenant, or one of its VMs, another objective. Its keys stay.
    pub fn set_objective(
        &self,
        kms: &dyn Kms,
        vm: Option<&VmName>,
        objective: Objective,
    ) -> Result<Record, VaultError> {
        let mut objectives = self.unlock_keys(kms)?.objectives().clone();
        objectives.set(vm, objective);
        if objectives.vms.len() > MAX_VM_OBJECTIVES {
            return Err(VaultError::ManyObjectives { tenant: self.name.clone(), most: MAX_VM_OBJECTIVES });
        }
        self.change(kms, |next| next.set_objectives(&objectives))
    }

    /// Has the tenant, or one of its VMs, keep other restore points. Its keys stay.
    pub fn set_retention(
        &self,
        kms: &dyn Kms,
        vm: Option<&VmName>,
        retention: Retention,
    ) -> Result<Record, VaultError> {
        let mut policies = self.unlock_keys(kms)?.policies().clone();
        policies.set(vm, retention);
        if policies.vms.len() > MAX_VM_POLICIES {
            return Err(VaultError::ManyPolicies { tenant: self.name.clone(), most: MAX_VM_POLICIES });
        }
        self.change(kms, |next| next.set_policies(&policies))
    }
}
