//! What became of boots that were tried, for people and for programs.

use std::time::Duration;

use reseal_cli::{Status, human_duration};
use reseal_format::names::VmName;
use reseal_vault::Booted;
use serde_json::{Value, json};

use super::Problem;

/// In a word, and when.
pub fn brief(booted: &Booted) -> String {
    format!("{} {}", if booted.verdict.passed { "passed" } else { "FAILED" }, booted.time)
}

/// All that is known, for people.
pub fn whole(booted: &Booted) -> String {
    let verdict = &booted.verdict;
    let took = human_duration(Duration::from_millis(verdict.took_ms));
    let why = verdict.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{}, waited for {}, {took}{why}", brief(booted), verdict.expected)
}

/// The same for programs. Stable: fields are only ever added.
pub fn json(booted: &Booted) -> Value {
    let verdict = &booted.verdict;
    json!({
        "number": booted.number,
        "time": booted.time.to_rfc3339(),
        "passed": verdict.passed,
        "expected": verdict.expected.to_string(),
        "took_ms": verdict.took_ms,
        "reason": verdict.reason,
        "program": verdict.program,
    })
}

/// What is wrong if the last one failed.
pub(super) fn problem(vm: &VmName, booted: &Booted) -> Option<Problem> {
    if booted.verdict.passed {
        return None;
    }
    let (number, time) = (booted.number, booted.time.to_rfc3339());
    let why = booted.verdict.reason.as_deref().unwrap_or("it is not known why");
    Some(Problem::new(Status::Failed, format!("{vm}@{number} did not boot when that was checked at {time}: {why}")))
}
