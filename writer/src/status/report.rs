//! All of it together: what is wrong, the exit status that follows, and the JSON of `reseal status`.

use std::path::Path;

use reseal_cli::{Failure, Status};
use reseal_format::time::Timestamp;
use serde_json::{Value, json};

use super::boot;
use super::results::Attempt;
use super::site::{SiteReport, SiteVm};
use super::tenant::{RekeyState, TenantReport, VmReport, age};
use super::verdicts::Verdict;
use reseal_site::certificate::now;

/// Something that should be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub status: Status,
    pub what: String,
}

impl Problem {
    pub(super) fn new(status: Status, what: impl Into<String>) -> Problem {
        Problem { status, what: what.into() }
    }

    pub(super) fn of(failure: &Failure) -> Problem {
        // Whoever asks how things stand has used nothing wrong: it is the configuration that makes no sense.
        let status = if failure.status == Status::Usage { Status::Failed } else { failure.status };
        Problem::new(status, failure.message.clone())
    }
}

/// How things stand.
#[derive(Debug)]
pub struct Report {
    pub time: Timestamp,
    pub tenants: Vec<TenantReport>,
    pub site: Option<SiteReport>,
}

impl Report {
    /// Of tenants of a vault, as they are added.
    pub fn of_vault() -> Report {
        Report { time: now(), tenants: Vec::new(), site: None }
    }

    /// Of a source.
    pub fn of_site(enrolment: &Path, state: &Path) -> Result<Report, Failure> {
        let time = now();
        Ok(Report { time, tenants: Vec::new(), site: Some(SiteReport::of(enrolment, state, time)?) })
    }

    /// All that is wrong, each with whom it concerns.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all = Vec::new();
        for report in &self.tenants {
            let of =
                |problem: &Problem| Problem::new(problem.status, format!("tenant {}: {}", report.tenant, problem.what));
            all.extend(report.problems.iter().map(of));
            all.extend(report.vms.iter().flat_map(|vm| &vm.problems).map(of));
        }
        if let Some(site) = &self.site {
            all.extend(site.problems.iter().cloned());
            all.extend(site.vms.iter().flat_map(|vm| &vm.problems).cloned());
        }
        all
    }

    /// What the command ends with: damage is the worst, and that something can't be asked now the least.
    pub fn status(&self) -> Option<Status> {
        self.problems().iter().map(|problem| problem.status).max_by_key(|status| severity(*status))
    }

    /// The document of `reseal status --json`. Stable: fields are only ever added.
    pub fn json(&self) -> Value {
        let problem = |problem: &Problem| json!({ "status": problem.status as u8, "what": problem.what });
        json!({
            "time": self.time.to_rfc3339(),
            "status": self.status().map_or(0, |status| status as u8),
            "problems": self.problems().iter().map(problem).collect::<Vec<_>>(),
            "tenants": self.tenants.iter().map(|report| tenant(report, self.time)).collect::<Vec<_>>(),
            "site": self.site.as_ref().map(site),
        })
    }
}

/// Which of two statuses counts.
pub(crate) fn severity(status: Status) -> u8 {
    match status {
        Status::Damaged => 3,
        Status::Failed => 2,
        Status::Usage => 1,
        Status::Unreachable => 0,
    }
}

fn tenant(report: &TenantReport, now: Timestamp) -> Value {
    json!({
        "tenant": report.tenant,
        "opened": report.closed.is_none() && report.erased.is_none(),
        "why_not": report.closed.as_ref().map(|failure| &failure.message),
        "erased": report.erased.map(Timestamp::to_rfc3339),
        "kind": report.kms.as_ref().map(|kms| &kms.kind),
        "key": report.kms.as_ref().map(|kms| &kms.key),
        "kms_answers": kms_answers(report),
        "generation": report.generation,
        "epoch": report.epoch,
        "rekey": report.rekey.map(|state| match state {
            RekeyState::Running => "running",
            RekeyState::Interrupted => "interrupted",
        }),
        "quota": report.quota,
        "used": report.used,
        "bytes": report.bytes,
        "packs": report.packs,
        "points": report.points,
        "at_work": report.at_work,
        "verified": report.verified.as_ref().map(verdict),
        "vms": report.vms.iter().map(|report| vm(report, now)).collect::<Vec<_>>(),
    })
}

/// Whether the KMS gave the keys; nothing where it was not asked.
pub(super) fn kms_answers(report: &TenantReport) -> Option<bool> {
    match (&report.closed, report.erased) {
        (_, Some(_)) => None,
        (None, None) => Some(true),
        (Some(failure), None) => (failure.status == Status::Unreachable).then_some(false),
    }
}

fn vm(report: &VmReport, now: Timestamp) -> Value {
    json!({
        "vm": report.vm,
        "points": report.points,
        "newest": report.newest.map(|newest| json!({
            "number": newest.number,
            // As `list` prints it.
            "time": newest.created.to_string(),
            "age": newest.age,
            "read": newest.read,
            "stored": newest.stored,
        })),
        "objective": report.objective,
        "late": report.late,
        "last": report.last.as_ref().map(attempt),
        "verified": report.verified.as_ref().map(verdict),
        "boot": report.boot.as_ref().map(|booted| {
            let mut boot = boot::json(booted);
            boot["age"] = json!(age(booted.time, now));
            boot
        }),
    })
}

fn attempt(attempt: &Attempt) -> Value {
    json!({
        "time": attempt.time.to_rfc3339(),
        "duration_ms": attempt.duration_ms,
        "status": attempt.status,
        "message": attempt.message,
        "number": attempt.number,
        "read": attempt.read,
        "changed": attempt.changed,
        "stored": attempt.stored,
        "sent": attempt.sent,
    })
}

fn verdict(verdict: &Verdict) -> Value {
    json!({ "time": verdict.time.to_rfc3339(), "damaged": verdict.damaged, "hurts": verdict.hurts })
}

fn site(report: &SiteReport) -> Value {
    let vm = |vm: &SiteVm| {
        json!({
            "vm": vm.vm,
            "age": vm.age,
            "objective": vm.objective,
            "late": vm.late,
            "last": vm.last.as_ref().map(attempt),
            "done": vm.done.as_ref().map(attempt),
        })
    };
    json!({
        "address": report.address,
        "tenant": report.tenant,
        "certificate": {
            "not_after": report.certificate.expires.to_rfc3339(),
            "seconds_left": report.seconds_left,
        },
        "server_answers": report.server.is_ok(),
        "why_not": report.server.as_ref().err().map(|failure| &failure.message),
        "vms": report.vms.iter().map(vm).collect::<Vec<_>>(),
    })
}
