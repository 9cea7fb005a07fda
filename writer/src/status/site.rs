//! How things stand at a source: a site that sends, and has an enrolment file in the place of a vault.

use std::path::Path;

use reseal_cli::{Failure, Status};
use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;

use super::results::{Results, VmResults};
use super::tenant::{age, failure, lateness};
use super::{Attempt, Problem};
use crate::BackupError;
use reseal_site::certificate::Validity;
use reseal_site::{Enrolment, greet};

/// A source.
#[derive(Debug)]
pub struct SiteReport {
    pub address: String,
    pub tenant: TenantName,
    /// Until when its certificate is valid, and how many seconds that are; negative when it was.
    pub certificate: Validity,
    pub seconds_left: i64,
    /// Whether the server answers, and takes the certificate; why not.
    pub server: Result<(), Failure>,
    pub vms: Vec<SiteVm>,
    pub problems: Vec<Problem>,
}

/// A VM that is backed up from here.
#[derive(Debug)]
pub struct SiteVm {
    pub vm: VmName,
    pub last: Option<Attempt>,
    /// The last that made a point.
    pub done: Option<Attempt>,
    /// Seconds since that point, by the server's clock when it was made and this one now.
    pub age: Option<u64>,
    pub objective: Option<u64>,
    pub late: bool,
    pub problems: Vec<Problem>,
}

impl SiteReport {
    /// Looks at the file, at what this machine remembers, and asks the server whether it is there.
    pub fn of(path: &Path, state: &Path, now: Timestamp) -> Result<SiteReport, BackupError> {
        let enrolment = Enrolment::read(path)?;
        let certificate = enrolment.validity();
        let server = greet(&enrolment).map_err(Failure::from);
        let mut known = Results::of_site(state, &enrolment).all();
        // One that never was backed up and has no job was tried once, perhaps under a name that was typed wrong.
        known.retain(|results| results.done.is_some() || results.has_job());
        let vms: Vec<_> = known.iter().map(|results| SiteVm::new(results, now)).collect();
        let mut problems = Vec::new();
        let end = certificate.expires.to_rfc3339();
        if certificate.is_over(now) {
            let what = format!(
                "this site's certificate has expired at {end}: ask who runs the server for a new enrolment file"
            );
            problems.push(Problem::new(Status::Failed, what));
        } else if certificate.is_ending(now) {
            let what =
                format!("this site's certificate expires at {end}, in {} days", certificate.seconds_left(now) / 86_400);
            problems.push(Problem::new(Status::Failed, what));
        }
        problems.extend(server.as_ref().err().map(Problem::of));
        let (address, tenant) = (enrolment.address().to_owned(), enrolment.tenant().clone());
        let seconds_left = certificate.seconds_left(now);
        Ok(SiteReport { address, tenant, certificate, seconds_left, server, vms, problems })
    }

    /// Only this VM.
    pub fn only(&mut self, vm: &VmName) -> Result<(), Failure> {
        self.vms.retain(|known| known.vm == *vm);
        match self.vms.is_empty() {
            true => Err(Failure::new(
                Status::Failed,
                format!("nothing is known here of {vm}: no job backs it up from here"),
            )),
            false => Ok(()),
        }
    }
}

impl SiteVm {
    fn new(results: &VmResults, now: Timestamp) -> SiteVm {
        let VmResults { vm, last, done, .. } = results.clone();
        let age = done.as_ref().and_then(|done| done.created).map(|created| age(created, now));
        let objective = results.objective();
        let late = lateness(&vm, age, objective);
        let problems = failure(&vm, last.as_ref()).into_iter().chain(late.clone()).collect();
        SiteVm { vm, last, done, age, objective, late: late.is_some(), problems }
    }
}
