//! What one session has of the server that it is a part of.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use reseal_cli::Status;
use reseal_format::manifest::Manifest;
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_proto::wire::TroubleCode;
use tracing::error;

use super::Client;
use super::audit::{Event, What};
use super::rates::Held;
use super::running::Entry;
use super::session::refuse;
use super::site::Site;
use super::tenants::OpenTenant;
use super::turns::Turn;
use super::windows::Window;
use crate::BackupError;
use crate::link::{Pace, Reins, WAITING, Why};

/// How long one who waits to send does so without looking whether the session is to end.
const SLICE: Duration = Duration::from_millis(100);

/// One session's place.
pub(super) struct Desk {
    pub site: Arc<Site>,
    pub connection: u64,
    pub peer: SocketAddr,
    pub client: Client,
    pub certificate: Vec<u8>,
    pub digest: [u8; 32],
    pub entry: Entry,
    pub window: Window,
    /// Bytes that came.
    pub received: Arc<AtomicU64>,
    pub sending: Sending,
}

/// What counts and limits the bytes that go to a client.
pub(super) struct Sending {
    rates: Held,
    counted: Counter,
    waits: Counter,
    sent: AtomicU64,
}

impl Sending {
    pub(super) fn new(site: &Site, digest: [u8; 32], tenant: &TenantName) -> Sending {
        Sending {
            rates: site.sending.of(&site.config().operation.limits, digest, tenant),
            counted: site.metrics.sent(tenant),
            waits: site.metrics.waits(tenant),
            sent: AtomicU64::new(0),
        }
    }

    /// Counts bytes that are about to go.
    pub(super) fn count(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.counted.inc_by(bytes);
    }

    /// The same, and waits while others were sent too fast, unless the session is to end.
    pub(super) fn pace(&self, bytes: u64, is_over: impl Fn() -> bool) {
        self.count(bytes);
        let Some(until) = self.rates.take(bytes) else { return };
        self.waits.inc();
        while !is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(SLICE));
        }
    }

    /// Bytes that went.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Desk {
    /// What its connection is held by.
    pub(super) fn reins(&self) -> Reins {
        let site = &self.site;
        let tenant = &self.client.tenant;
        let rates = site.rates.of(&site.config().operation.limits, self.digest, tenant);
        let (counted, waits) = (site.metrics.received(tenant), site.metrics.waits(tenant));
        let received = self.received.clone();
        let pace: Pace = Arc::new(move |bytes| {
            let bytes = bytes as u64;
            received.fetch_add(bytes, Ordering::Relaxed);
            counted.inc_by(bytes);
            let until = rates.take(bytes);
            if until.is_some() {
                waits.inc();
            }
            until
        });
        // A manifest can be as long as eight messages of data: one is sent while another is made.
        let outgoing = if self.client.reads() { 1 } else { WAITING };
        Reins { ending: self.entry.ending.clone(), pace, waiting: self.window.waiting(), outgoing }
    }

    /// The client's tenant, unlocked.
    pub(super) fn open(&self) -> Result<Arc<OpenTenant>, BackupError> {
        self.site.tenants.open(&self.client.tenant).map_err(|failure| {
            error!("the tenant can't be opened: {}", failure.message);
            let code = match failure.status {
                Status::Unreachable => TroubleCode::Unavailable,
                Status::Damaged => TroubleCode::Damaged,
                _ => TroubleCode::Failed,
            };
            refuse(code, "the tenant can't be opened at this site; its log says why")
        })
    }

    /// Waits for a turn to work.
    pub(super) fn turn(&self) -> Turn<'_> {
        self.site.turns.take(&self.client.tenant)
    }

    /// An error if the session is to end.
    pub(super) fn check(&self) -> Result<(), BackupError> {
        self.entry.why().map_or(Ok(()), |why| Err(self.ended(why)))
    }

    /// What the other side is told when this side ends the session.
    pub(super) fn ended(&self, why: Why) -> BackupError {
        match why {
            Why::Stopping => {
                refuse(TroubleCode::Unavailable, "this site's server is about to stop; what has landed is kept")
            }
            Why::NotAllowed if self.site.config().is_revoked(&self.digest) => refuse(
                TroubleCode::NotAllowed,
                format!("{} was revoked at this site; whoever runs it can enrol a new client", self.client.name),
            ),
            Why::NotAllowed => refuse(
                TroubleCode::NotAllowed,
                format!("{} may not do this any more; whoever runs this site can allow it again", self.client.name),
            ),
            Why::Lost => refuse(TroubleCode::Failed, "the tenant is not at this site any more; nothing was committed"),
            Why::TooLong => refuse(
                TroubleCode::Unavailable,
                "the session has lasted as long as one may at this site; another goes on with what has landed",
            ),
        }
    }

    /// Whether the client may read restore points of a VM, also by what is in force now.
    pub(super) fn may_read(&self, vm: &VmName) -> bool {
        self.client.may_read(vm) && self.site.config().may_stay(&self.digest, &self.client, Some(vm))
    }

    /// Whether what came of a session that ends may still be made durable.
    pub(super) fn may_land(&self) -> bool {
        !matches!(self.entry.why(), Some(Why::NotAllowed | Why::Lost))
    }

    fn event(&self, what: What) -> Event<'_> {
        Event {
            connection: Some(self.connection),
            peer: Some(self.peer),
            client: Some(&self.client.name),
            certificate_sha256: Some(self.digest),
            tenant: Some(&self.client.tenant),
            ..Event::new(what)
        }
    }

    /// The client came in.
    pub(super) fn connected(&self) -> Result<(), BackupError> {
        self.record(&self.event(What::Connected))
    }

    /// It begins a restore point, and may.
    pub(super) fn begins(&self, vm: &VmName) -> Result<(), BackupError> {
        self.entry.is_about(vm);
        // It may have been let in by a configuration that was replaced before anybody knew of the session.
        self.site.running.recheck(&self.site.config());
        self.check()?;
        self.record(&Event { vm: Some(vm), ..self.event(What::Began) })
    }

    /// The point exists, and the client is told so only if this is noted.
    pub(super) fn committed(&self, made: &Manifest) -> Result<(), BackupError> {
        self.record(&Event {
            vm: Some(&made.vm),
            number: Some(made.number),
            point: Some(made.point_id.to_string()),
            received_bytes: Some(self.received.load(Ordering::Relaxed)),
            ..self.event(What::Committed)
        })
    }

    /// It has another certificate.
    pub(super) fn renewed(&self) -> Result<(), BackupError> {
        self.record(&self.event(What::Renewed))
    }

    /// It came to nothing.
    pub(super) fn failed(&self, what: What, vm: Option<&VmName>, why: &str) {
        let received_bytes = Some(self.received.load(Ordering::Relaxed));
        self.site.note(&Event { vm, received_bytes, ..self.event(what) }.because(why));
    }

    /// A disk is about to be read, which it is only if this is noted.
    pub(super) fn reads(&self, vm: &VmName, number: u32, disk: &DiskName) -> Result<(), BackupError> {
        self.record(&Event { vm: Some(vm), number: Some(number), disk: Some(disk), ..self.event(What::Read) })
    }

    /// It has read what it wanted.
    pub(super) fn has_read(&self) {
        self.site.note(&Event { sent_bytes: Some(self.sending.sent()), ..self.event(What::Ended) });
    }

    fn record(&self, event: &Event<'_>) -> Result<(), BackupError> {
        self.site.audit.record(event).map_err(|e| {
            error!("{e}");
            refuse(TroubleCode::Unavailable, "this site can't note what is done; its log says why")
        })
    }
}
