//! What the configuration says of the server itself: limits, log, audit, metrics. All of it may be left out.
//!
//! ```toml
//! [limits]
//! connections = 128              # sessions at once
//! connections_per_client = 64
//! handshakes = 64                # TLS handshakes at once, beside those
//! handshake_seconds = 10
//! client_rate = "50M"            # bytes per second; none by default
//! tenant_rate = "100M"
//! session_seconds = 604800       # longest session
//! idle_seconds = 900             # after which a tenant without sessions is locked again
//! memory = "1G"                  # for what all sessions have under way
//! cache = "512M"                 # for what all tenants keep of their packs' tables and index
//!
//! [log]
//! format = "text"                # or "json"
//! level = "info"
//!
//! [audit]
//! file = "/var/log/reseal/audit.jsonl"
//!
//! [metrics]
//! listen = "127.0.0.1:9464"      # a loopback address
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reseal_cli::parse_size;
use serde::{Deserialize, Deserializer};

use super::windows::SET_ASIDE;

/// Slower rates would keep a message of a megabyte on its way for so long that a peer may think nobody is there.
const MIN_RATE: u64 = 1 << 20;
/// Less would have each tenant's tables read again and again.
const MIN_CACHE: u64 = 16 << 20;
/// What no machine has is a mistake.
const MAX_MEMORY: u64 = 1 << 40;

/// A number of bytes, with K, M, G or T for powers of 1,024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_size(&text).map(Size).map_err(serde::de::Error::custom)
    }
}

/// How much of it all.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub connections: u32,
    pub connections_per_client: u32,
    pub handshakes: u32,
    handshake_seconds: u32,
    pub client_rate: Option<Size>,
    pub tenant_rate: Option<Size>,
    session_seconds: u32,
    idle_seconds: u32,
    memory: Size,
    cache: Size,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 128,
            connections_per_client: 64,
            handshakes: 64,
            handshake_seconds: 10,
            client_rate: None,
            tenant_rate: None,
            session_seconds: 7 * 24 * 3600,
            idle_seconds: 900,
            memory: Size(1 << 30),
            cache: Size(512 << 20),
        }
    }
}

impl Limits {
    /// How long a handshake may take.
    pub fn handshake(&self) -> Duration {
        Duration::from_secs(self.handshake_seconds.into())
    }

    /// How long a session may take.
    pub fn session(&self) -> Duration {
        Duration::from_secs(self.session_seconds.into())
    }

    /// How long a tenant without sessions stays unlocked.
    pub fn idle(&self) -> Duration {
        Duration::from_secs(self.idle_seconds.into())
    }

    /// Bytes for what sessions have under way.
    pub fn memory(&self) -> u64 {
        self.memory.0
    }

    /// Bytes for what is kept of tables and index.
    pub fn cache(&self) -> usize {
        usize::try_from(self.cache.0).unwrap_or(usize::MAX)
    }

    fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(format!("limits.{name} is {value}, and must be from {least} to {most}")),
        };
        within("connections", self.connections.into(), 1, 10_000)?;
        within("connections_per_client", self.connections_per_client.into(), 1, 10_000)?;
        within("handshakes", self.handshakes.into(), 1, 1024)?;
        within("handshake_seconds", self.handshake_seconds.into(), 1, 300)?;
        within("session_seconds", self.session_seconds.into(), 1, 31 * 24 * 3600)?;
        within("idle_seconds", self.idle_seconds.into(), 1, 24 * 3600)?;
        within("memory", self.memory.0, SET_ASIDE * u64::from(self.connections), MAX_MEMORY)?;
        within("cache", self.cache.0, MIN_CACHE, MAX_MEMORY)?;
        for (name, rate) in [("client_rate", self.client_rate), ("tenant_rate", self.tenant_rate)] {
            rate.map_or(Ok(()), |Size(rate)| within(name, rate, MIN_RATE, u64::MAX))?;
        }
        Ok(())
    }
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Text,
    /// A document a line.
    Json,
}

/// What of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

/// The log, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub format: Format,
    pub level: Level,
}

/// Who did what, for ever.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditFile {
    pub file: PathBuf,
}

/// Metrics and health.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsAt {
    pub listen: SocketAddr,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Operation {
    pub limits: Limits,
    pub log: Log,
    pub audit: Option<AuditFile>,
    pub metrics: Option<MetricsAt>,
}

impl Operation {
    /// Refuses what makes no sense.
    pub(super) fn checked(self) -> Result<Operation, String> {
        self.limits.check()?;
        if let Some(audit) = &self.audit
            && !audit.file.is_absolute()
        {
            return Err(format!("audit.file is {}, and must be an absolute path", audit.file.display()));
        }
        match &self.metrics {
            // Whoever may read them needs no certificate.
            Some(MetricsAt { listen }) if !listen.ip().is_loopback() => Err(format!(
                "metrics.listen is {listen}, and must be a loopback address, such as 127.0.0.1:9464: a scraper elsewhere needs a proxy \
                 that asks who it is"
            )),
            _ => Ok(self),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(default)]
        limits: Limits,
        #[serde(default)]
        log: Log,
        audit: Option<AuditFile>,
        metrics: Option<MetricsAt>,
    }

    fn settings(text: &str) -> Result<Operation, String> {
        let File { limits, log, audit, metrics } = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        Operation { limits, log, audit, metrics }.checked()
    }

    #[test]
    fn what_is_left_out_has_its_default_and_what_is_said_counts() {
        assert_eq!(settings("").unwrap(), Operation::default());
        let text = "[limits]\nclient_rate = \"50M\"\nhandshake_seconds = 3\n[log]\nformat = \"json\"\n[metrics]\nlisten = \"[::1]:1\"";
        let settings = settings(text).unwrap();
        assert_eq!(settings.limits.client_rate, Some(Size(50 << 20)));
        assert_eq!(settings.limits.handshake(), Duration::from_secs(3));
        assert_eq!((settings.log.format, settings.log.level), (Format::Json, Level::Info));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (text, named) in [
            ("[limits]\nconnections = 0", "limits.connections"),
            ("[limits]\ntenant_rate = \"1K\"", "limits.tenant_rate"),
            ("[limits]\nmemory = \"1M\"", "limits.memory"),
            ("[limits]\ncolour = 1", "colour"),
            ("[log]\nlevel = \"loud\"", "loud"),
            ("[audit]\nfile = \"audit\"", "absolute"),
            ("[metrics]\nlisten = \"0.0.0.0:9464\"", "loopback"),
            ("[metrics]\nlisten = \"127.0.0.1:1\"\npath = \"/\"", "path"),
        ] {
            let refused = settings(text).unwrap_err();
            assert!(refused.contains(named), "{text}: {refused}");
        }
    }
}
