//! A disk of a restore point, read over NBD inside TLS: `VM@NUMBER/DISK`, as `reseal nbd` names exports too.
//!
//! ```text
//! name → may it? → point → noted in the audit log → reads: turn → disk reader → rate → client
//! ```
//!
//! Architecture invariant: nothing of a disk is sent before the line of the audit log that tells of it is durable.

use std::io;
use std::sync::Arc;
use std::thread::available_parallelism;

use parking_lot::Mutex;
use reseal_format::names::VmName;
use reseal_nbd::server::{
    Connection, Disk, DiskError, Exports, Limits, Listed, NotOpened, Owner, PointDisk, PointExports, Scope, ServeError,
    Service, StartTls, Stretch,
};
use reseal_proto::wire::TroubleCode;
use reseal_store::Lease;
use reseal_vault::{PointName, VaultError, Which};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio_rustls::server::TlsStream;
use tracing::{Span, info, warn};

use super::audit::What;
use super::config::ANY;
use super::desk::Desk;
use super::listener::LAST_WORDS;
use super::logging::printable;
use super::metrics::Outcome;
use super::tenants::OpenTenant;
use super::windows::MESSAGE;
use crate::link::Why;

/// The exports of one client.
struct Shelf {
    desk: Arc<Desk>,
    span: Span,
    /// Its tenant, once something was asked for.
    open: Mutex<Option<(Arc<OpenTenant>, Arc<PointExports>)>>,
    /// The disk that was opened.
    opened: Mutex<Option<String>>,
}

/// Nothing, and why.
struct Nothing(String);

impl Exports for Nothing {
    fn open(&self, _name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        Err(NotOpened::Forbidden(self.0.clone()))
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        Err(NotOpened::Forbidden(self.0.clone()))
    }
}

impl Owner for Nothing {
    fn failed(&self, _what: &str) {}
}

impl Shelf {
    fn exports(&self) -> Result<Arc<PointExports>, NotOpened> {
        let mut kept = self.open.lock();
        if let Some((_, exports)) = &*kept {
            return Ok(exports.clone());
        }
        // Why is in the log; NBD has no other word for "later".
        let open = self.desk.open().map_err(|_| NotOpened::Ending)?;
        let names = self.desk.client.vms();
        let scope = match names.iter().any(|name| name == ANY) {
            true => Scope::All,
            false => Scope::Vms(names.iter().filter_map(|name| VmName::new(name).ok()).collect()),
        };
        let exports = Arc::new(PointExports::new(open.tenant.clone(), Some(open.heads.clone()), open.reader(), scope));
        *kept = Some((open, exports.clone()));
        Ok(exports)
    }

    /// Sees to it that a point which is about to be read is not pruned meanwhile.
    fn pin(&self, point: PointName) -> Result<Option<Box<dyn Lease>>, NotOpened> {
        let Some(open) = self.open.lock().as_ref().map(|(open, _)| open.clone()) else { return Ok(None) };
        let what = format!("{} reads {point}", self.desk.client.name);
        open.tenant.pin(point, what).map_err(|e| match e {
            VaultError::NoPoint { .. } => NotOpened::Unknown(e.to_string()),
            e => NotOpened::Failed(e.to_string()),
        })
    }
}

impl Exports for Shelf {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        let _inside = self.span.enter();
        let desk = &self.desk;
        let wanted = PointDisk::parse(name).map_err(NotOpened::Unknown)?;
        let vm = &wanted.point.vm;
        if !desk.may_read(vm) {
            // As if it were not there.
            return Err(NotOpened::Unknown(format!("there is no restore point of that name of {vm}")));
        }
        desk.entry.is_about(vm);
        // It may have been let in by a configuration that was replaced before anybody knew of the session.
        desk.site.running.recheck(&desk.site.config());
        desk.check().map_err(|_| NotOpened::Ending)?;
        let disk = self.exports()?.open(name)?;
        // What it is called is not always the name by which it was asked for.
        let found = PointDisk::parse(disk.name()).map_err(NotOpened::Failed)?;
        let (Which::Number(number), Some(disk_name)) = (found.point.which, &found.disk) else {
            return Err(NotOpened::Failed(format!("{name} is not one disk")));
        };
        self.span.record("vm", tracing::field::display(vm));
        desk.reads(vm, number, disk_name).map_err(|e| NotOpened::Failed(e.to_string()))?;
        let lease = self.pin(PointName { vm: vm.clone(), number })?;
        Ok(Arc::new(Served { disk, desk: desk.clone(), _lease: lease }))
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        let _inside = self.span.enter();
        self.desk.check().map_err(|_| NotOpened::Ending)?;
        let mut listed = self.exports()?.list()?;
        listed.retain(|listed| PointDisk::parse(&listed.name).is_ok_and(|disk| self.desk.may_read(&disk.point.vm)));
        Ok(listed)
    }
}

impl Owner for Shelf {
    fn failed(&self, what: &str) {
        let _inside = self.span.enter();
        warn!("{}", printable(what));
        self.desk.site.metrics.not_read(&self.desk.client.tenant, TroubleCode::Failed);
    }

    fn opened(&self, export: &str) {
        let _inside = self.span.enter();
        info!("reads {export}");
        *self.opened.lock() = Some(export.to_owned());
    }

    fn sent(&self, bytes: u64) {
        self.desk.sending.pace(bytes, || self.desk.entry.why().is_some());
    }
}

/// A disk, whose reads are work like that of others.
struct Served {
    disk: Arc<dyn Disk>,
    desk: Arc<Desk>,
    _lease: Option<Box<dyn Lease>>,
}

impl Disk for Served {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn description(&self) -> Option<String> {
        self.disk.description()
    }

    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn is_fixed(&self) -> bool {
        self.disk.is_fixed()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let _turn = self.desk.turn();
        self.disk.read(offset, out)
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        let _turn = self.desk.turn();
        self.disk.stretches(offset, length, most)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let _turn = self.desk.turn();
        self.disk.cache(offset, length)
    }
}

/// What such a client may have under way: as much memory as its window stands for.
fn limits(desk: &Desk) -> Limits {
    let offers = usize::from(desk.window.offers);
    let message = u32::try_from(MESSAGE).unwrap_or(u32::MAX);
    let cores = available_parallelism().map_or(2, usize::from).max(2);
    let in_flight = offers * message as usize;
    Limits { threads: cores.min(offers + 1), max_read: message, in_flight, ..Limits::default() }
}

/// The connection without the network's runtime: a thread waits for it.
fn blocking(stream: TlsStream<TcpStream>) -> io::Result<Connection> {
    let (stream, tls) = stream.into_inner();
    Connection::tls(stream.into_std()?, tls)
}

/// Serves one client until it has gone, or is to go.
pub(super) fn serve(desk: &Arc<Desk>, stream: TlsStream<TcpStream>, span: &Span, runtime: &Handle) -> Outcome {
    let client = &desk.client;
    if !client.reads() {
        let why = format!(
            "{} may add restore points and not read them; whoever runs this site can enrol a client for that",
            client.name
        );
        warn!("ended: {}", printable(&why));
        desk.site.metrics.failed(Some(TroubleCode::NotAllowed));
        desk.failed(What::Refused, None, &why);
        turn_away(stream, why);
        return Outcome::Refused;
    }
    let shelf =
        Arc::new(Shelf { desk: desk.clone(), span: span.clone(), open: Mutex::default(), opened: Mutex::default() });
    let served = desk.connected().map_err(|e| e.to_string()).and_then(|()| {
        let inside = runtime.enter();
        let connection = blocking(stream).map_err(|e| e.to_string())?;
        drop(inside);
        let (stopper, mut ending) = (connection.stopper(), desk.entry.ending.clone());
        let watch = runtime.spawn(async move {
            if ending.wait_for(Option::is_some).await.is_ok() {
                stopper.stop();
            }
        });
        let service =
            Service { exports: shelf.clone(), owner: shelf.clone(), tls: StartTls::Never, limits: limits(desk) };
        let served = connection.serve(&service);
        watch.abort();
        match served {
            // Who breaks off in the middle of a read just goes.
            Ok(()) | Err(ServeError::Gone) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    });
    let opened = shelf.opened.lock().take();
    let told = match desk.entry.why() {
        Some(why) => {
            let what = if why == Why::NotAllowed { What::Refused } else { What::Failed };
            Some((what, desk.ended(why).to_string()))
        }
        None => served.err().map(|why| (What::Failed, why)),
    };
    if let Some(opened) = opened {
        info!("sent {} bytes of {opened}", desk.sending.sent());
        desk.has_read();
    }
    match told {
        None => Outcome::Done,
        Some((what, why)) => {
            warn!("ended: {}", printable(&why));
            let code = if what == What::Refused { Some(TroubleCode::NotAllowed) } else { None };
            desk.site.metrics.failed(code);
            desk.failed(what, None, &why);
            if what == What::Refused { Outcome::Refused } else { Outcome::Failed }
        }
    }
}

/// Tells one who may not come why, in the words of NBD: whatever he wants to open is forbidden.
pub(super) fn turn_away(stream: TlsStream<TcpStream>, why: String) {
    let nothing = Arc::new(Nothing(why));
    let limits = Limits { threads: 1, handshake: LAST_WORDS, patience: LAST_WORDS, ..Limits::default() };
    let service = Service { exports: nothing.clone(), owner: nothing, tls: StartTls::Never, limits };
    if let Ok(connection) = blocking(stream) {
        // Whether he listens is his own business.
        let _ = connection.serve(&service);
    }
}
