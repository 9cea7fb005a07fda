//! What was seen of a vault before, kept outside it.
//!
//! Everything in a vault authenticates itself, but a vault that is put back to an older state as a whole, or whose newest
//! restore point is removed, is right in itself. Only a memory of the highest numbers can tell. The file holds ids,
//! names and numbers, no keys and no content.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use reseal_format::keys::Scope;
use reseal_format::names::VmName;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{Chain, Points, VaultError};

/// Longest file that is read; a VM takes about a hundred bytes.
const MAX_FILE: u64 = 64 << 20;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    record_generation: u64,
    /// Highest number by VM.
    vms: BTreeMap<VmName, u32>,
    /// KEKs that had opened the record when their destruction began.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    erasing: Vec<String>,
}

impl Seen {
    fn number(&self, vm: &VmName) -> u32 {
        self.vms.get(vm).copied().unwrap_or(0)
    }
}

/// The memory of one tenant.
#[derive(Debug, Clone)]
pub struct Heads {
    folder: PathBuf,
    accept_rollback: bool,
}

/// The folder for what this machine keeps about a tenant.
pub fn tenant_folder(state: &Path, scope: &Scope) -> PathBuf {
    state.join(scope.vault.to_string()).join(scope.tenant.to_string())
}

impl Heads {
    /// Keeps its file in the tenant's state folder. With `accept_rollback`, lower numbers than before are taken as the
    /// new truth.
    pub fn new(state: &Path, scope: &Scope, accept_rollback: bool) -> Heads {
        Heads::at(tenant_folder(state, scope), accept_rollback)
    }

    /// The same, in a folder of another name: whoever has no keys does not know the scope.
    pub fn at(folder: PathBuf, accept_rollback: bool) -> Heads {
        Heads { folder, accept_rollback }
    }

    /// The numbers of a VM, and whether they are fewer than were seen before. What was seen is read first: what is
    /// committed while the folder is listed must not look like a rollback. Nothing is remembered here: a number in a
    /// listing proves nothing before its object was opened.
    pub fn chain(&self, points: &dyn Points, vm: &VmName) -> Result<(Chain, Option<VaultError>), VaultError> {
        let seen = self.read().map_err(|e| self.error(e))?.number(vm);
        let mut chain = points.chain(vm)?;
        if chain.last() < seen {
            // A listing that is made while a tombstone takes the place of the newest manifest may show neither.
            chain = points.chain(vm)?;
        }
        let now = chain.last();
        if now >= seen {
            return Ok((chain, None));
        }
        if self.accept_rollback {
            self.update(|seen| {
                match now {
                    0 => seen.vms.remove(vm),
                    _ => seen.vms.insert(vm.clone(), now),
                };
                Ok(())
            })?;
            return Ok((chain, None));
        }
        let what = format!("the newest restore point of {vm}");
        Ok((chain, Some(VaultError::Rollback { what, seen: seen.into(), now: now.into() })))
    }

    /// The numbers of a VM; an error if they are fewer than were seen before.
    pub fn whole_chain(&self, points: &dyn Points, vm: &VmName) -> Result<Chain, VaultError> {
        match self.chain(points, vm)? {
            (chain, None) => Ok(chain),
            (_, Some(rollback)) => Err(rollback),
        }
    }

    /// Remembers the generation of the tenant record, and the highest number of each of these VMs: all of them
    /// authenticated. A generation below the one that was seen is a rollback.
    pub fn remember(&self, record_generation: u64, vms: &[(VmName, u32)]) -> Result<(), VaultError> {
        self.update(|seen| {
            if record_generation < seen.record_generation && !self.accept_rollback {
                return Err(record_rollback(seen.record_generation, record_generation));
            }
            seen.record_generation = record_generation;
            for (vm, number) in vms.iter().filter(|(_, number)| *number > 0) {
                let highest = seen.number(vm).max(*number);
                seen.vms.insert(vm.clone(), highest);
            }
            Ok(())
        })
    }

    /// Refuses a record that says it is older than what was seen, before a KMS is asked to open it: that key may be gone.
    pub fn check_generation(&self, record_generation: u64) -> Result<(), VaultError> {
        let seen = self.read().map_err(|e| self.error(e))?.record_generation;
        match record_generation < seen && !self.accept_rollback {
            true => Err(record_rollback(seen, record_generation)),
            false => Ok(()),
        }
    }

    /// Remembers which keys an erasure is about to destroy; none when it is done.
    pub fn begin_erasure(&self, keys: &[String]) -> Result<(), VaultError> {
        self.update(|seen| {
            seen.erasing = keys.to_vec();
            Ok(())
        })
    }

    /// The keys whose destruction was begun.
    pub fn erasure(&self) -> Result<Vec<String>, VaultError> {
        Ok(self.read().map_err(|e| self.error(e))?.erasing)
    }

    /// The VMs that were seen with restore points, so that one that vanished whole is asked for too.
    pub fn known_vms(&self) -> Result<Vec<VmName>, VaultError> {
        let seen = self.read().map_err(|e| self.error(e))?;
        Ok(seen.vms.into_keys().collect())
    }

    fn path(&self) -> PathBuf {
        self.folder.join("seen.json")
    }

    fn error(&self, source: std::io::Error) -> VaultError {
        VaultError::State { path: self.path().display().to_string(), source }
    }

    fn read(&self) -> std::io::Result<Seen> {
        match std::fs::metadata(self.path()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Seen::default()),
            Ok(data) if data.len() > MAX_FILE => return Err(std::io::ErrorKind::FileTooLarge.into()),
            other => other?,
        };
        let bytes = std::fs::read(self.path())?;
        serde_json::from_slice(&bytes).map_err(|_| std::io::Error::other("it is damaged; remove it to start anew"))
    }

    /// Changes the file under a lock; nothing is written where nothing changed or the change was refused.
    fn update(&self, change: impl FnOnce(&mut Seen) -> Result<(), VaultError>) -> Result<(), VaultError> {
        let lock = || -> std::io::Result<File> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            let path = self.folder.join("seen.lock");
            let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        };
        let _lock = lock().map_err(|e| self.error(e))?;
        let before = self.read().map_err(|e| self.error(e))?;
        let mut after = before.clone();
        change(&mut after)?;
        if after == before {
            return Ok(());
        }
        let replace = || -> std::io::Result<()> {
            let new = self.folder.join("seen.new");
            let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(&after)?)?;
            file.sync_all()?;
            std::fs::rename(&new, self.path())?;
            File::open(&self.folder)?.sync_all()
        };
        replace().map_err(|e| self.error(e))
    }
}

pub(crate) fn record_rollback(seen: u64, now: u64) -> VaultError {
    VaultError::Rollback { what: "the generation of the tenant record".to_owned(), seen, now }
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::{TenantId, VaultId};

    use super::*;

    #[test]
    fn the_highest_numbers_are_remembered_and_lower_generations_refused() {
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope { vault: VaultId::from_bytes([1; 16]), tenant: TenantId::from_bytes([2; 16]) };
        let heads = Heads::new(folder.path(), &scope, false);
        let vm = VmName::new("web01").unwrap();
        heads.remember(3, &[(vm.clone(), 8)]).unwrap();
        heads.remember(3, &[(vm.clone(), 7)]).unwrap();
        assert_eq!(heads.read().unwrap().number(&vm), 8);
        assert!(matches!(heads.remember(2, &[]), Err(VaultError::Rollback { seen: 3, now: 2, .. })));
        assert_eq!(heads.known_vms().unwrap(), std::slice::from_ref(&vm));
        assert!(matches!(heads.check_generation(2), Err(VaultError::Rollback { seen: 3, now: 2, .. })));
        heads.check_generation(3).unwrap();
        heads.begin_erasure(&["k".to_owned()]).unwrap();
        heads.remember(4, &[]).unwrap();
        assert_eq!(heads.erasure().unwrap(), ["k"]);
        Heads::new(folder.path(), &scope, true).remember(2, &[]).unwrap();
        heads.remember(2, &[]).unwrap();
    }
}
