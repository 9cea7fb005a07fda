//! The file of jobs.
//!
//! ```toml
//! repo = "/srv/vault"                       # or an enrolment file
//! tenant = "acme"
//! parallel = 2                              # VMs at once
//!
//! [defaults]                                # for each job that says nothing else
//! objective = "24h"
//! retries = 3
//! after = ["/usr/local/bin/tell", "backup"]
//!
//! [[job]]
//! vm = "web01"
//! disks = ["root=/dev/vg/web01-snap"]       # or libvirt = "web01", or qmp = "/run/web01.qmp"
//! ```

use std::collections::HashSet;
use std::path::Path;

use reseal_cli::{Failure, Status};
use reseal_format::names::{TenantName, VmName};
use reseal_kms::read_trusted;
use serde::Deserialize;

use super::job::{Job, JobText, Policy, PolicyText};

/// Longest file that is read.
const MAX_FILE: u64 = 4 << 20;
/// Most jobs of a file.
const MAX_JOBS: usize = 10_000;
/// Most VMs at once: each is a process that keeps cores busy and holds some hundred MiB.
const MAX_PARALLEL: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    repo: Option<String>,
    tenant: Option<TenantName>,
    #[serde(default = "one")]
    parallel: usize,
    #[serde(default)]
    defaults: PolicyText,
    #[serde(default)]
    job: Vec<JobText>,
    retention: Option<toml::Value>,
}

fn one() -> usize {
    1
}

/// A file of jobs that was checked.
#[derive(Debug)]
pub struct JobFile {
    /// The vault, or the enrolment file; unless it is named elsewhere.
    pub repo: Option<String>,
    pub tenant: Option<TenantName>,
    /// VMs at once.
    pub parallel: usize,
    pub jobs: Vec<Job>,
}

impl JobFile {
    /// Reads and checks the file, which nobody else may write: it says what is run, and which disks go where. `options` checks the
    /// words that each job gives to `backup`.
    pub fn read(path: &Path, options: &dyn Fn(&Job) -> Result<(), String>) -> Result<JobFile, Failure> {
        let usage = |what: String| Failure::new(Status::Usage, what);
        let text = read_trusted(path, MAX_FILE).map_err(|e| usage(e.to_string()))?;
        let wrong = |what: String| usage(format!("{}: {what}", path.display()));
        let text = text.ok_or_else(|| wrong("there is no such file".into()))?;
        let text = std::str::from_utf8(&text).map_err(|_| wrong("it is not UTF-8".into()))?;
        let file = JobFile::parse(text).map_err(wrong)?;
        for job in &file.jobs {
            options(job).map_err(|what| wrong(format!("job {}: {what}", job.name)))?;
        }
        Ok(file)
    }

    fn parse(text: &str) -> Result<JobFile, String> {
        let file: FileText = toml::from_str(text).map_err(|e| e.to_string().trim_end().replace('\n', " "))?;
        refuse_retention(file.retention.as_ref())?;
        if file.job.is_empty() {
            return Err("it has no [[job]]".into());
        }
        if file.job.len() > MAX_JOBS {
            return Err(format!("it has more than {MAX_JOBS} jobs"));
        }
        if !(1..=MAX_PARALLEL).contains(&file.parallel) {
            return Err(format!("parallel must be from 1 to {MAX_PARALLEL}"));
        }
        let defaults = Policy::default().with(file.defaults).map_err(|what| format!("[defaults]: {what}"))?;
        let (mut names, mut vms) = (HashSet::new(), HashSet::<VmName>::new());
        let mut jobs = Vec::with_capacity(file.job.len());
        for text in file.job {
            let job = Job::new(text, &defaults)?;
            if !names.insert(job.name.clone()) {
                return Err(format!("two jobs are named {}", job.name));
            }
            if !vms.insert(job.vm.clone()) {
                return Err(format!("two jobs back up {}: one point would follow the other for nothing", job.vm));
            }
            jobs.push(job);
        }
        Ok(JobFile { repo: file.repo, tenant: file.tenant, parallel: file.parallel, jobs })
    }

    /// Every VM of the file with its objective.
    pub fn objectives(&self) -> Vec<(VmName, Option<u64>)> {
        self.jobs.iter().map(|job| (job.vm.clone(), job.policy.objective)).collect()
    }

    /// Only the jobs of these names; all if there are none.
    pub fn only(mut self, names: &[String]) -> Result<JobFile, Failure> {
        if let Some(unknown) = names.iter().find(|name| !self.jobs.iter().any(|job| job.name == **name)) {
            let known: Vec<_> = self.jobs.iter().take(20).map(|job| job.name.as_str()).collect();
            let message = format!("there is no job {unknown:?}; there are {}", known.join(", "));
            return Err(Failure::new(Status::Usage, message));
        }
        self.jobs.retain(|job| names.is_empty() || names.contains(&job.name));
        Ok(self)
    }
}

/// What is not done must not look as if it were.
pub(super) fn refuse_retention(retention: Option<&toml::Value>) -> Result<(), String> {
    match retention {
        None => Ok(()),
        Some(_) => {
            Err("retention: jobs forget no restore points; remove that, and run `reseal forget` by a timer of your own"
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        JobFile::parse(text).map(drop).unwrap_err()
    }

    #[test]
    fn defaults_hold_where_a_job_says_nothing_else() {
        let file = JobFile::parse(
            "repo = '/v'\nparallel = 3\n[defaults]\nobjective = '24h'\nretries = 2\nlimit_rate = '5M'\nbefore = ['/bin/true', 'a b']\n\
             [[job]]\nvm = 'web'\ndisks = ['a.raw']\n\
             [[job]]\nname = 'night'\nvm = 'db'\nlibvirt = 'db'\nobjective = 'none'\nretries = 0\nbefore = []\n",
        )
        .unwrap();
        let [web, db] = &file.jobs[..] else { panic!("two jobs") };
        assert_eq!((web.name.as_str(), db.name.as_str(), file.parallel), ("web", "night", 3));
        assert_eq!((web.policy.objective, db.policy.objective), (Some(86_400), None));
        assert_eq!((web.policy.retries, db.policy.retries), (2, 0));
        assert_eq!(web.policy.before.as_ref().unwrap().words, ["/bin/true", "a b"]);
        assert!(db.policy.before.is_none());
        let words: Vec<_> = web.words().into_iter().map(|word| word.into_string().unwrap()).collect();
        assert_eq!(words, ["--limit-rate=5M", "--", "web", "a.raw"]);
        let words: Vec<_> = db.words().into_iter().map(|word| word.into_string().unwrap()).collect();
        assert_eq!(words, ["--limit-rate=5M", "--libvirt=db", "--", "db"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let job = |more: &str| format!("[[job]]\nvm = 'web'\ndisks = ['a.raw']\n{more}\n");
        assert!(refused("").contains("no [[job]]"));
        assert!(refused(&job("retention = { keep-last = 3 }")).contains("forget no restore points"));
        assert!(refused(&format!("retention = 3\n{}", job(""))).contains("forget no restore points"));
        assert!(refused(&format!("[defaults]\nretention = 3\n{}", job(""))).contains("forget no restore points"));
        assert!(refused(&job("retrys = 3")).contains("unknown field `retrys`"));
        assert!(refused(&format!("paralel = 3\n{}", job(""))).contains("unknown field `paralel`"));
        assert!(refused(&format!("parallel = 0\n{}", job(""))).contains("parallel must be"));
        assert!(refused(&job("objective = '24'")).contains("no unit"));
        assert!(refused(&job("retries = 1000")).contains("retries"));
        assert!(refused(&job("before = ['tell']")).contains("absolute path"));
        assert!(refused(&job("before = ['/bin/sh', \"a\\u0000b\"]")).contains("NUL"));
        assert!(refused(&(job("") + &job(""))).contains("two jobs are named web"));
        assert!(refused(&(job("") + &job("name = 'b'"))).contains("two jobs back up web"));
        assert!(refused("[[job]]\nvm = 'a/b'\n").contains("'/'"));
        assert!(refused("[[job]]\nname = \"\\u001b\"\nvm = 'a'\n").contains("name"));
    }
}
