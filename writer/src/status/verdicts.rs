//! What the last verifications found: for the tenant as a whole, and for single VMs.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use reseal_format::keys::Scope;
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_vault::heads::tenant_folder;
use serde::{Deserialize, Serialize};

use super::note;
use crate::verify::{Part, Report, What};
use reseal_site::certificate::now;

/// Restore points that are named for one VM.
const MAX_NAMED: usize = 16;
/// VMs that are named.
const MAX_VMS: usize = 256;
const WHOLE: &str = "tenant.json";

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// When it ended.
    pub time: Timestamp,
    /// Damaged objects.
    pub damaged: u64,
    /// Restore points that these hurt, by VM; the newest few of each.
    #[serde(default)]
    pub hurts: BTreeMap<VmName, Vec<u32>>,
}

impl Verdict {
    fn of(report: &Report) -> Verdict {
        let mut hurts: BTreeMap<VmName, Vec<u32>> = BTreeMap::new();
        for point in report.damaged.iter().flat_map(|damage| &damage.hurts) {
            let Some((vm, number)) = point.rsplit_once('@') else { continue };
            let (Ok(vm), Ok(number)) = (VmName::new(vm), number.parse()) else { continue };
            if hurts.len() < MAX_VMS || hurts.contains_key(&vm) {
                hurts.entry(vm).or_default().push(number);
            }
        }
        for numbers in hurts.values_mut() {
            numbers.sort_unstable_by(|a, b| b.cmp(a));
            numbers.dedup();
            numbers.truncate(MAX_NAMED);
        }
        Verdict { time: now(), damaged: report.damaged.len() as u64, hurts }
    }
}

/// The verdicts of a tenant, as far as this machine has verified it.
pub struct Verdicts {
    folder: PathBuf,
}

impl Verdicts {
    pub fn of_tenant(state: &Path, scope: &Scope) -> Verdicts {
        Verdicts { folder: tenant_folder(state, scope).join("verified") }
    }

    /// Notes what a verification found. One point, or a part, that is whole says nothing about the others, so what was known stays.
    pub fn note(&self, what: &What, part: Part, report: &Report) -> io::Result<()> {
        let verdict = Verdict::of(report);
        let name = match what {
            _ if part != Part::All && verdict.damaged == 0 => return Ok(()),
            What::Everything => WHOLE.to_owned(),
            What::Vm(vm) => name_of(vm),
            What::Point(vm, _) if verdict.damaged > 0 => name_of(vm),
            What::Point(..) => return Ok(()),
        };
        note::change(&self.folder, &name, |_: Option<Verdict>| verdict)
    }

    /// What the last verification of everything found.
    pub fn whole(&self) -> Option<Verdict> {
        note::read(&self.folder.join(WHOLE))
    }

    /// What was found last of a VM, by itself or with all others (`whole`): the damage that concerns it.
    pub fn of_vm(&self, vm: &VmName, whole: Option<&Verdict>) -> Option<Verdict> {
        let own: Option<Verdict> = note::read(&self.folder.join(name_of(vm)));
        match (own, whole) {
            (Some(own), Some(whole)) if own.time >= whole.time => Some(own),
            (Some(own), None) => Some(own),
            (_, Some(whole)) => {
                let hurts = whole.hurts.get(vm).cloned().unwrap_or_default();
                let damaged = hurts.len() as u64;
                let hurts = (damaged > 0).then(|| (vm.clone(), hurts)).into_iter().collect();
                Some(Verdict { time: whole.time, damaged, hurts })
            }
            (None, None) => None,
        }
    }
}

/// A VM's key never begins with a dot and has no slash; the prefix keeps it from being the tenant's own.
fn name_of(vm: &VmName) -> String {
    format!("vm-{}.json", vm.to_key())
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::{TenantId, VaultId};

    use super::*;
    use crate::verify::Damage;

    #[test]
    fn damage_stays_known_until_what_it_is_in_was_verified_again() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope { vault: VaultId::from_bytes([1; 16]), tenant: TenantId::from_bytes([2; 16]) };
        let verdicts = Verdicts::of_tenant(folder.path(), &scope);
        let [web, db] = ["web", "d@b"].map(|name| VmName::new(name).unwrap());
        let damaged = |hurts: &[&str]| {
            let hurts = hurts.iter().map(|point| (*point).to_owned()).collect();
            let damage = Damage { object: "packs/x".into(), what: "gone".into(), hurts, pack: None };
            Report { damaged: vec![damage], ..Report::default() }
        };
        let state = |vm: &VmName| verdicts.of_vm(vm, verdicts.whole().as_ref()).map(|verdict| verdict.damaged > 0);
        assert_eq!(state(&web), None);
        verdicts.note(&What::Everything, Part::All, &damaged(&["web@3", "web@4", "web@3"])).unwrap();
        assert_eq!((state(&web), state(&db)), (Some(true), Some(false)));
        assert_eq!(verdicts.whole().unwrap().hurts[&web], [4, 3]);
        verdicts.note(&What::Point(web.clone(), 3), Part::All, &Report::default()).unwrap();
        assert_eq!(state(&web), Some(true), "one point says nothing about the others");
        verdicts.note(&What::Vm(web.clone()), Part::All, &Report::default()).unwrap();
        verdicts.note(&What::Point(db.clone(), 1), Part::All, &damaged(&["d@b@1"])).unwrap();
        assert_eq!((state(&web), state(&db)), (Some(false), Some(true)));
        std::thread::sleep(std::time::Duration::from_millis(2));
        verdicts.note(&What::Everything, Part::All, &Report::default()).unwrap();
        assert_eq!((state(&web), state(&db)), (Some(false), Some(false)));
    }
}
