//! Who did what: a file of JSON lines that is only ever appended to.
//!
//! A line of a commit is durable before the client is told of the commit, and a session whose beginning can't be noted does not
//! begin. So where the file can't be written, nothing is done that it would not tell of.

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_format::time::Timestamp;
use serde::{Serialize, Serializer};

/// Longest reason that is noted: a part of it may be a peer's.
const MAX_WHY: usize = 1024;

/// What happened. The words are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// The server began to listen, took up a configuration, or ended.
    Started,
    Reloaded,
    Stopped,
    /// A client with a certificate that is named came in.
    Connected,
    /// Somebody did not, or may not do what he wants.
    Refused,
    /// A restore point was begun, made, or not made.
    Began,
    Committed,
    Failed,
    /// A disk is opened to be read, and was read.
    Read,
    Ended,
    /// A certificate was given, replaced, or taken back.
    Enrolled,
    Renewed,
    Revoked,
    /// A tenant was erased or is gone; its keys were dropped.
    Lost,
}

impl What {
    /// Whether the line has to be durable before anything follows from it.
    fn must_last(self) -> bool {
        matches!(self, What::Committed | What::Read | What::Enrolled | What::Renewed | What::Revoked)
    }
}

/// One line. The names of its fields are stable, and what is not known is left out.
#[derive(Debug, Clone, Serialize)]
pub struct Event<'a> {
    pub event: What,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_hex")]
    pub certificate_sha256: Option<[u8; 32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<&'a TenantName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<&'a VmName>,
    /// Number of the restore point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// Name of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<&'a DiskName>,
    /// Bytes of messages that came on the connection so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
    /// Bytes that went to the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

// Serde hands on a reference to what the field is.
#[allow(clippy::ref_option)]
fn as_hex<S: Serializer>(digest: &Option<[u8; 32]>, to: S) -> Result<S::Ok, S::Error> {
    digest.map(hex::encode).serialize(to)
}

impl Event<'_> {
    /// One of which nothing else is known.
    pub fn new(event: What) -> Self {
        Event {
            event,
            connection: None,
            peer: None,
            client: None,
            certificate_sha256: None,
            tenant: None,
            vm: None,
            number: None,
            point: None,
            disk: None,
            received_bytes: None,
            sent_bytes: None,
            why: None,
        }
    }

    /// The same with a reason.
    #[must_use]
    pub fn because(self, why: &str) -> Self {
        Event { why: Some(why.chars().take(MAX_WHY).collect()), ..self }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// The file, if there is to be one.
#[derive(Default)]
pub struct Audit(Mutex<Option<(PathBuf, File)>>);

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}

impl Audit {
    /// Opens the file, or opens it again, such as after it was renamed; no file where there is to be none.
    pub(super) fn reopen(&self, path: Option<&Path>) -> io::Result<()> {
        let opened = path.map(|path| Ok::<_, io::Error>((path.to_owned(), open(path)?))).transpose()?;
        *self.0.lock() = opened;
        Ok(())
    }

    /// Notes what happened; what has to last is durable when this returns.
    pub fn record(&self, event: &Event<'_>) -> io::Result<()> {
        let mut file = self.0.lock();
        let Some((path, file)) = file.as_mut() else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Timestamp(i64::try_from(now.as_millis()).unwrap_or(0)).to_string();
        let mut line = serde_json::to_vec(&Line { time, event })?;
        line.push(b'\n');
        // In one piece, so that lines are whole whoever else appends.
        let written =
            file.write_all(&line).and_then(|()| if event.event.must_last() { file.sync_data() } else { Ok(()) });
        written.map_err(|e| io::Error::new(e.kind(), format!("the audit log {} can't be written: {e}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lines_are_appended_by_whoever_opens_it_and_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let tenant = TenantName::new("acme").unwrap();
        for why in ["a\nb\u{1b}[2J", "again"] {
            let audit = Audit::default();
            audit.record(&Event::new(What::Stopped)).unwrap();
            audit.reopen(Some(&path)).unwrap();
            let event = Event { tenant: Some(&tenant), certificate_sha256: Some([7; 32]), ..Event::new(What::Refused) };
            audit.record(&event.because(why)).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert!(!text.contains('\u{1b}'));
        assert_eq!((&lines[0]["event"], &lines[0]["tenant"]), (&"refused".into(), &"acme".into()));
        assert_eq!(lines[0]["why"], "a\nb\u{1b}[2J");
        assert_eq!(lines[0]["certificate_sha256"], "07".repeat(32));
        assert!(lines[0].get("vm").is_none());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_was_renamed_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("audit"), folder.path().join("audit.1"));
        let audit = Audit::default();
        audit.reopen(Some(&path)).unwrap();
        audit.record(&Event::new(What::Started)).unwrap();
        std::fs::rename(&path, &old).unwrap();
        audit.record(&Event::new(What::Committed)).unwrap();
        audit.reopen(Some(&path)).unwrap();
        audit.record(&Event::new(What::Stopped)).unwrap();
        let lines = |path| std::fs::read_to_string(path).unwrap().lines().count();
        assert_eq!((lines(&old), lines(&path)), (2, 1));
    }
}
