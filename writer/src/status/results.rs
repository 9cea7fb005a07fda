//! What became of the last attempt to back up a VM: a file a VM in the state folder.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use reseal_cli::Failure;
use reseal_format::keys::Scope;
use reseal_format::manifest::Manifest;
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_vault::heads::tenant_folder;
use serde::{Deserialize, Serialize};

use super::note;
use crate::BackupError;
use crate::remote::Sent;
use crate::serve::Access;
use reseal_site::Enrolment;
use reseal_site::certificate::now;

/// As much of a message as is kept.
const MAX_MESSAGE: usize = 1_000;

/// One attempt that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When it ended, by this machine's clock.
    pub time: Timestamp,
    pub duration_ms: u64,
    /// 0, or the exit status.
    pub status: u8,
    /// Why it made nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The point that it made, and its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// Bytes that were read, of them changed, and what was stored of that or sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent: Option<u64>,
}

/// How old a VM's newest point may be, as a file of jobs says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// Seconds; none where the job has no objective.
    pub objective: Option<u64>,
    /// That file: when it is gone, so is the promise.
    pub jobs: PathBuf,
}

/// What is kept of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmResults {
    pub vm: VmName,
    /// The last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Attempt>,
    /// The last one that made a restore point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<Attempt>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promise: Option<Promise>,
}

impl VmResults {
    /// What the job says that backs this VM up, if there still is one.
    fn promised(&self) -> Option<&Promise> {
        self.promise.as_ref().filter(|promise| promise.jobs.exists())
    }

    /// Whether there is such a job.
    pub fn has_job(&self) -> bool {
        self.promised().is_some()
    }

    /// Its objective.
    pub fn objective(&self) -> Option<u64> {
        self.promised()?.objective
    }
}

impl Attempt {
    fn new(began: Instant, status: u8) -> Attempt {
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (message, number, created, read, changed, stored, sent) = Default::default();
        Attempt { time: now(), duration_ms, status, message, number, created, read, changed, stored, sent }
    }

    /// One that made nothing.
    pub fn failed(began: Instant, failure: &Failure) -> Attempt {
        let visible = failure.message.chars().map(|c| if c.is_control() { ' ' } else { c });
        let message = Some(visible.take(MAX_MESSAGE).collect());
        Attempt { message, ..Attempt::new(began, failure.status as u8) }
    }

    /// One that made a point in a vault at hand.
    pub fn made(began: Instant, manifest: &Manifest) -> Attempt {
        let stats = &manifest.stats;
        Attempt {
            number: Some(manifest.number),
            created: Some(manifest.created),
            read: Some(stats.read),
            changed: Some(stats.changed),
            stored: Some(stats.stored),
            ..Attempt::new(began, 0)
        }
    }

    /// One that made a point at another site.
    pub fn sent(began: Instant, sent: &Sent) -> Attempt {
        Attempt {
            number: Some(sent.number),
            created: Some(sent.created),
            read: Some(sent.read),
            changed: Some(sent.changed),
            sent: Some(sent.sent),
            ..Attempt::new(began, 0)
        }
    }
}

/// The last results of a tenant's VMs, as far as this machine has to do with them.
#[derive(Debug, Clone)]
pub struct Results {
    folder: PathBuf,
}

impl Results {
    /// Of a tenant of a vault that is at hand.
    pub fn of_tenant(state: &Path, scope: &Scope) -> Results {
        Results { folder: tenant_folder(state, scope).join("results") }
    }

    /// Of a vault at another site.
    pub fn of_site(state: &Path, enrolment: &Enrolment) -> Results {
        Results { folder: enrolment.folder(state).join("results") }
    }

    /// All that there is, by name.
    pub fn all(&self) -> Vec<VmResults> {
        let mut all: Vec<VmResults> = note::read_all(&self.folder);
        all.sort_by(|a, b| a.vm.cmp(&b.vm));
        all.dedup_by(|a, b| a.vm == b.vm);
        all
    }

    fn change(&self, vm: &VmName, change: impl FnOnce(&mut VmResults)) -> io::Result<()> {
        note::change(&self.folder, &format!("{}.json", vm.to_key()), |before: Option<VmResults>| {
            let new = || VmResults { vm: vm.clone(), last: None, done: None, promise: None };
            let mut results = before.filter(|before| before.vm == *vm).unwrap_or_else(new);
            change(&mut results);
            results
        })
    }

    /// Notes an attempt that has ended.
    pub fn note(&self, vm: &VmName, attempt: Attempt) -> io::Result<()> {
        self.change(vm, |results| {
            if attempt.number.is_some() {
                results.done = Some(attempt.clone());
            }
            results.last = Some(attempt);
        })
    }

    /// Notes which VMs a file of jobs has, and how old their points may be. What it had before and has no more goes.
    pub fn promise(&self, jobs: &Path, vms: &[(VmName, Option<u64>)]) -> io::Result<()> {
        for known in self.all().into_iter().filter(|known| known.promise.as_ref().is_some_and(|p| p.jobs == jobs)) {
            if !vms.iter().any(|(vm, _)| *vm == known.vm) {
                self.change(&known.vm, |results| results.promise = None)?;
            }
        }
        for (vm, objective) in vms {
            self.change(vm, |results| {
                results.promise = Some(Promise { objective: *objective, jobs: jobs.to_owned() });
            })?;
        }
        Ok(())
    }
}

/// Notes what came of a session of the server. What can't be noted is only not shown.
pub(crate) fn session_ended(access: &Access, vm: &VmName, began: Instant, made: &Result<u32, BackupError>) {
    let attempt = match made {
        Ok(number) => match access.tenant.point(vm, *number) {
            Ok(point) => Attempt::made(began, &point.manifest),
            // Made and gone, or not to be read: the number is known all the same.
            Err(_) => Attempt { number: Some(*number), created: Some(now()), ..Attempt::new(began, 0) },
        },
        Err(e) => Attempt::failed(began, &Failure::of(e.status(), e)),
    };
    let _ = Results::of_tenant(&access.state, &access.tenant.keys().scope()).note(vm, attempt);
}

#[cfg(test)]
mod tests {
    use reseal_cli::Status;
    use reseal_format::ids::{TenantId, VaultId};

    use super::*;

    fn results(folder: &Path) -> Results {
        Results::of_tenant(
            folder,
            &Scope { vault: VaultId::from_bytes([1; 16]), tenant: TenantId::from_bytes([2; 16]) },
        )
    }

    fn vm(name: &str) -> VmName {
        VmName::new(name).unwrap()
    }

    #[test]
    fn a_failure_leaves_the_last_success() {
        let folder = tempfile::tempdir().unwrap();
        let results = results(folder.path());
        assert!(results.all().is_empty());
        let began = Instant::now();
        let made = Attempt { number: Some(7), created: Some(Timestamp(5)), ..Attempt::new(began, 0) };
        results.note(&vm("web"), made.clone()).unwrap();
        let failure = Failure::new(Status::Unreachable, "no\nroute\u{1b}[2J".repeat(500));
        results.note(&vm("web"), Attempt::failed(began, &failure)).unwrap();
        results.note(&vm("a/b".replace('/', "%").as_str()), Attempt::failed(began, &failure)).unwrap();
        let all = results.all();
        assert_eq!(all.len(), 2);
        let web = &all[1];
        assert_eq!((web.done.as_ref(), web.last.as_ref().unwrap().status), (Some(&made), 4));
        let message = web.last.as_ref().unwrap().message.as_ref().unwrap();
        assert!(message.len() <= MAX_MESSAGE && !message.contains(char::is_control));
    }

    #[test]
    fn what_makes_no_sense_is_no_result_and_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let results = results(folder.path());
        results.note(&vm("web"), Attempt::new(Instant::now(), 0)).unwrap();
        let path = results.folder.join("web.json");
        for garbage in [&b""[..], b"{", b"[1]", &vec![b' '; 100_000]] {
            std::fs::write(&path, garbage).unwrap();
            assert!(results.all().is_empty());
        }
        results.note(&vm("web"), Attempt::new(Instant::now(), 0)).unwrap();
        assert_eq!(results.all().len(), 1);
    }

    #[test]
    fn a_promise_goes_with_its_job_and_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let results = results(folder.path());
        let jobs = folder.path().join("night.toml");
        std::fs::write(&jobs, "").unwrap();
        results.promise(&jobs, &[(vm("web"), Some(60)), (vm("db"), None)]).unwrap();
        let objectives = || results.all().iter().map(VmResults::objective).collect::<Vec<_>>();
        assert_eq!(objectives(), [None, Some(60)]);
        results.promise(&jobs, &[(vm("db"), Some(5))]).unwrap();
        assert_eq!(objectives(), [Some(5), None]);
        std::fs::remove_file(&jobs).unwrap();
        assert_eq!(objectives(), [None, None]);
    }
}
