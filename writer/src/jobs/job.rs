//! One job: a VM, where its disks are, and what goes around its backup.

use std::ffi::OsString;
use std::time::Duration;

use reseal_format::names::{MAX_NAME, VmName};
use serde::Deserialize;

use super::command::Command;
use super::file::refuse_retention;
use crate::span;

/// Most further attempts.
const MAX_RETRIES: u32 = 100;

/// What `[defaults]` and a job may both say.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyText {
    objective: Option<String>,
    retries: Option<u32>,
    retry_pause: Option<String>,
    timeout: Option<String>,
    before: Option<Vec<String>>,
    after: Option<Vec<String>>,
    command_timeout: Option<String>,
    limit_rate: Option<String>,
    check_unchanged: Option<f64>,
    scratch: Option<String>,
    retention: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JobText {
    name: Option<String>,
    vm: VmName,
    #[serde(default)]
    disks: Vec<String>,
    #[serde(default)]
    raw: bool,
    format: Option<String>,
    image_secret: Option<String>,
    libvirt: Option<String>,
    qmp: Option<String>,
    qga: Option<String>,
    scratch_reserve: Option<String>,
    tls_ca: Option<String>,
    tls_cert: Option<String>,
    tls_key: Option<String>,
    connections: Option<u16>,
    source_timeout: Option<u64>,
    #[serde(default)]
    changes: Vec<String>,
    #[serde(default)]
    bitmap: Vec<String>,
    since: Option<String>,
    definition: Option<String>,
    // Those of `PolicyText`: a flattened field would let unknown ones pass.
    objective: Option<String>,
    retries: Option<u32>,
    retry_pause: Option<String>,
    timeout: Option<String>,
    before: Option<Vec<String>>,
    after: Option<Vec<String>>,
    command_timeout: Option<String>,
    limit_rate: Option<String>,
    check_unchanged: Option<f64>,
    scratch: Option<String>,
    retention: Option<toml::Value>,
}

/// What goes around a backup.
#[derive(Debug, Clone)]
pub struct Policy {
    /// How old the newest restore point may be, in seconds.
    pub objective: Option<u64>,
    /// Further attempts where something was unreachable.
    pub retries: u32,
    /// Pause before the first of them; each further one is twice as long.
    pub retry_pause: Duration,
    /// How long one attempt may take.
    pub timeout: Option<Duration>,
    pub before: Option<Command>,
    pub after: Option<Command>,
    /// How long either may take.
    pub command_timeout: Duration,
    limit_rate: Option<String>,
    check_unchanged: Option<f64>,
    scratch: Option<String>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            objective: None,
            retries: 2,
            retry_pause: Duration::from_secs(30),
            timeout: None,
            before: None,
            after: None,
            command_timeout: Duration::from_secs(600),
            limit_rate: None,
            check_unchanged: None,
            scratch: None,
        }
    }
}

/// A span, or `none`.
fn span_or_none(key: &str, text: &str) -> Result<Option<Duration>, String> {
    match text {
        "none" => Ok(None),
        text => span::parse(text).map(Some).map_err(|e| format!("{key}: {e}")),
    }
}

impl Policy {
    /// The same where nothing else is said.
    pub(super) fn with(&self, text: PolicyText) -> Result<Policy, String> {
        refuse_retention(text.retention.as_ref())?;
        let mut policy = self.clone();
        if let Some(objective) = text.objective {
            policy.objective = span_or_none("objective", &objective)?.map(|span| span.as_secs());
        }
        if let Some(retries) = text.retries {
            if retries > MAX_RETRIES {
                return Err(format!("retries: at most {MAX_RETRIES}"));
            }
            policy.retries = retries;
        }
        let span = |key: &str, text: &str| span::parse(text).map_err(|e| format!("{key}: {e}"));
        if let Some(pause) = text.retry_pause {
            policy.retry_pause = span("retry_pause", &pause)?;
        }
        if let Some(timeout) = text.timeout {
            policy.timeout = span_or_none("timeout", &timeout)?;
        }
        if let Some(timeout) = text.command_timeout {
            policy.command_timeout = span("command_timeout", &timeout)?;
        }
        if let Some(words) = text.before {
            policy.before = Command::new("before", words)?;
        }
        if let Some(words) = text.after {
            policy.after = Command::new("after", words)?;
        }
        policy.limit_rate = text.limit_rate.or(policy.limit_rate);
        policy.check_unchanged = text.check_unchanged.or(policy.check_unchanged);
        policy.scratch = text.scratch.or(policy.scratch);
        Ok(policy)
    }
}

/// A job.
#[derive(Debug, Clone)]
pub struct Job {
    pub name: String,
    pub vm: VmName,
    pub policy: Policy,
    /// What `backup` is told of the source.
    options: Vec<String>,
    disks: Vec<String>,
}

impl Job {
    pub(super) fn new(text: JobText, defaults: &Policy) -> Result<Job, String> {
        let name = text.name.unwrap_or_else(|| text.vm.as_str().to_owned());
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(format!("the name {name:?} of a job is empty, too long or can't be printed"));
        }
        let policy = PolicyText {
            objective: text.objective,
            retries: text.retries,
            retry_pause: text.retry_pause,
            timeout: text.timeout,
            before: text.before,
            after: text.after,
            command_timeout: text.command_timeout,
            limit_rate: text.limit_rate,
            check_unchanged: text.check_unchanged,
            scratch: text.scratch,
            retention: text.retention,
        };
        let policy = defaults.with(policy).map_err(|what| format!("job {name}: {what}"))?;
        let mut options = Vec::new();
        let mut say = |option: &str, value: Option<String>| options.extend(value.map(|v| format!("--{option}={v}")));
        say("format", text.format);
        say("image-secret", text.image_secret);
        say("libvirt", text.libvirt);
        say("qmp", text.qmp);
        say("qga", text.qga);
        say("scratch-reserve", text.scratch_reserve);
        say("tls-ca", text.tls_ca);
        say("tls-cert", text.tls_cert);
        say("tls-key", text.tls_key);
        say("connections", text.connections.map(|number| number.to_string()));
        say("source-timeout", text.source_timeout.map(|number| number.to_string()));
        text.changes.into_iter().for_each(|value| say("changes", Some(value)));
        text.bitmap.into_iter().for_each(|value| say("bitmap", Some(value)));
        say("since", text.since);
        say("definition", text.definition);
        if text.raw {
            options.push("--raw".to_owned());
        }
        if options.iter().chain(&text.disks).any(|word| word.contains('\0')) {
            return Err(format!("job {name}: a word with a NUL byte can't be given to a program"));
        }
        Ok(Job { name, vm: text.vm, policy, options, disks: text.disks })
    }

    /// The words after `reseal backup`.
    pub fn words(&self) -> Vec<OsString> {
        let Policy { limit_rate, check_unchanged, scratch, .. } = &self.policy;
        let mut words = Vec::new();
        words.extend(limit_rate.as_ref().map(|rate| format!("--limit-rate={rate}")));
        words.extend(check_unchanged.map(|percent| format!("--check-unchanged={percent}")));
        words.extend(scratch.as_ref().map(|folder| format!("--scratch={folder}")));
        words.extend(self.options.iter().cloned());
        // A name or a path may begin with a dash.
        words.extend(["--".to_owned(), self.vm.as_str().to_owned()]);
        words.extend(self.disks.iter().cloned());
        words.into_iter().map(OsString::from).collect()
    }
}
