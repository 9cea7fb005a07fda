//! What is counted, as Prometheus reads it. Labels come from the configuration and from this program, never from a peer.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use reseal_format::names::TenantName;
use reseal_proto::wire::TroubleCode;

use super::Role;

/// From a session that has nothing to do to one that lasts for three days.
const SECONDS: [f64; 10] = [0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0, 86_400.0, 259_200.0];

type Labels = Vec<(&'static str, String)>;
type Count = Family<Labels, Counter>;
type Level = Family<Labels, Gauge>;

/// All that is counted.
pub(super) struct Metrics {
    registry: Registry,
    sessions: Count,
    seconds: Family<Labels, Histogram>,
    failures: Count,
    refused: Count,
    received: Count,
    sent: Count,
    read_failures: Count,
    stored: Count,
    needed: Count,
    found: Count,
    commits: Count,
    waits: Count,
    kms: Level,
    open: Level,
    pub connections: Gauge<i64, AtomicI64>,
    pub reloads: Counter<u64, AtomicU64>,
    pub reload_failures: Counter<u64, AtomicU64>,
    /// When the server's certificate ends, in seconds since 1970.
    pub certificate_ends: Gauge<i64, AtomicI64>,
}

/// What a session became.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outcome {
    Done,
    Failed,
    Refused,
}

/// Why somebody did not come in.
#[derive(Debug, Clone, Copy)]
pub(super) enum Refusal {
    /// TLS failed, or it was not this protocol.
    Handshake,
    /// It took too long, or others wanted the place.
    Slow,
    /// Its certificate is not named.
    Unknown,
    /// As many are there as may be.
    Full,
}

fn of(tenant: &TenantName) -> Labels {
    vec![("tenant", tenant.as_str().to_owned())]
}

/// The code of a trouble as a word.
fn word(code: TroubleCode) -> &'static str {
    match code {
        TroubleCode::Protocol => "protocol",
        TroubleCode::Version => "version",
        TroubleCode::NotAllowed => "not_allowed",
        TroubleCode::Busy => "busy",
        TroubleCode::Quota => "quota",
        TroubleCode::LostRace => "lost_race",
        TroubleCode::Unknown => "unknown",
        TroubleCode::Unavailable => "unavailable",
        TroubleCode::Damaged => "damaged",
        TroubleCode::Failed => "failed",
        TroubleCode::Other(_) => "other",
    }
}

impl Metrics {
    pub(super) fn new() -> Metrics {
        let mut registry = Registry::with_prefix("reseal");
        let seconds = Family::new_with_constructor((|| Histogram::new(SECONDS)) as fn() -> Histogram);
        let mut metrics = Metrics {
            registry: Registry::default(),
            sessions: Count::default(),
            seconds,
            failures: Count::default(),
            refused: Count::default(),
            received: Count::default(),
            sent: Count::default(),
            read_failures: Count::default(),
            stored: Count::default(),
            needed: Count::default(),
            found: Count::default(),
            commits: Count::default(),
            waits: Count::default(),
            kms: Level::default(),
            open: Level::default(),
            connections: Gauge::default(),
            reloads: Counter::default(),
            reload_failures: Counter::default(),
            certificate_ends: Gauge::default(),
        };
        let m = &metrics;
        registry.register("sessions", "Sessions that ended, by what became of them", m.sessions.clone());
        registry.register("session_seconds", "How long sessions took", m.seconds.clone());
        registry.register("failures", "Sessions that failed, by the code that was told", m.failures.clone());
        registry.register("connections_refused", "Connections that did not become sessions", m.refused.clone());
        registry.register("received_bytes", "Bytes of messages that came", m.received.clone());
        registry.register("sent_bytes", "Bytes that went to clients, inside TLS", m.sent.clone());
        let failed = "What clients asked to read and could not be given, by why";
        registry.register("read_failures", failed, m.read_failures.clone());
        registry.register("stored_bytes", "Bytes that committed points added to the vault", m.stored.clone());
        registry.register("clusters_needed", "Offered clusters whose contents were asked for", m.needed.clone());
        registry.register("clusters_found", "Offered clusters that were there already", m.found.clone());
        registry.register("commits", "Restore points that were made", m.commits.clone());
        registry.register("rate_limit_waits", "Times that a limit of the rate held back a session", m.waits.clone());
        registry.register("kms_reachable", "Whether the tenant's KMS answered when it was last asked", m.kms.clone());
        registry.register("tenant_unlocked", "Whether the tenant's keys are in this process", m.open.clone());
        registry.register("connections", "Sessions that run", m.connections.clone());
        registry.register("reloads", "Configurations that were taken up after the first", m.reloads.clone());
        registry.register("reload_failures", "Configurations that were refused", m.reload_failures.clone());
        let ends = "When the server's certificate ends, in seconds since 1970";
        registry.register("certificate_not_after_timestamp_seconds", ends, m.certificate_ends.clone());
        metrics.registry = registry;
        metrics
    }

    /// All of it as text, with more of it that is known elsewhere.
    pub(super) fn text(&self, more: &str) -> String {
        const END: &str = "# EOF\n";
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text.truncate(text.strip_suffix(END).map_or(text.len(), str::len));
        text.push_str(more);
        text.push_str(END);
        text
    }

    pub(super) fn ended(&self, tenant: &TenantName, role: Role, outcome: Outcome, took: Duration) {
        let result = match outcome {
            Outcome::Done => "done",
            Outcome::Failed => "failed",
            Outcome::Refused => "refused",
        };
        let mut labels = of(tenant);
        labels.push(("role", role.as_str().to_owned()));
        self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
        labels.push(("result", result.to_owned()));
        self.sessions.get_or_create(&labels).inc();
    }

    /// A session failed; `None` where there was nobody left to be told.
    pub(super) fn failed(&self, code: Option<TroubleCode>) {
        let code = code.map_or("lost", word).to_owned();
        self.failures.get_or_create(&vec![("code", code)]).inc();
    }

    pub(super) fn refused(&self, why: Refusal) {
        let why = match why {
            Refusal::Handshake => "handshake",
            Refusal::Slow => "slow",
            Refusal::Unknown => "unknown",
            Refusal::Full => "full",
        };
        self.refused.get_or_create(&vec![("reason", why.to_owned())]).inc();
    }

    /// What counts the bytes that come for a tenant.
    pub(super) fn received(&self, tenant: &TenantName) -> Counter {
        self.received.get_or_create_owned(&of(tenant))
    }

    /// What counts the bytes that go to a tenant's clients.
    pub(super) fn sent(&self, tenant: &TenantName) -> Counter {
        self.sent.get_or_create_owned(&of(tenant))
    }

    /// Something of a tenant could not be read.
    pub(super) fn not_read(&self, tenant: &TenantName, code: TroubleCode) {
        let mut labels = of(tenant);
        labels.push(("code", word(code).to_owned()));
        self.read_failures.get_or_create(&labels).inc();
    }

    /// What counts how often a limit holds a session back.
    pub(super) fn waits(&self, tenant: &TenantName) -> Counter {
        self.waits.get_or_create_owned(&of(tenant))
    }

    pub(super) fn answered(&self, tenant: &TenantName, needed: u64, found: u64) {
        self.needed.get_or_create(&of(tenant)).inc_by(needed);
        self.found.get_or_create(&of(tenant)).inc_by(found);
    }

    pub(super) fn committed(&self, tenant: &TenantName, stored: u64) {
        self.commits.get_or_create(&of(tenant)).inc();
        self.stored.get_or_create(&of(tenant)).inc_by(stored);
    }

    pub(super) fn kms(&self, tenant: &TenantName, answers: bool) {
        self.kms.get_or_create(&of(tenant)).set(answers.into());
    }

    pub(super) fn unlocked(&self, tenant: &TenantName, is_open: bool) {
        self.open.get_or_create(&of(tenant)).set(is_open.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_stands_before_the_end() {
        let metrics = Metrics::new();
        let tenant = TenantName::new("acme").unwrap();
        metrics.committed(&tenant, 7);
        metrics.ended(&tenant, Role::Append, Outcome::Done, Duration::from_secs(2));
        let text = metrics.text("reseal_more 1\n");
        for line in [
            "reseal_commits_total{tenant=\"acme\"} 1",
            "reseal_stored_bytes_total{tenant=\"acme\"} 7",
            "reseal_sessions_total{tenant=\"acme\",role=\"append\",result=\"done\"} 1",
            "reseal_session_seconds_bucket{le=\"10.0\",tenant=\"acme\",role=\"append\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        assert!(text.ends_with("reseal_more 1\n# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }
}
