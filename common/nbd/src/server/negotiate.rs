//! From the greeting to an open export.

use std::sync::Arc;
use std::time::Instant;

use reseal_proto::nbd::serve::{Agreed, Facts, Refused, ServerHandshake, Step, TlsTerms};
use reseal_proto::nbd::{BlockSize, ExportFlags, OptionError};

use super::stream::{Receiving, Sending, Stream};
use super::{Disk, MAX_READ, NotOpened, ServeError, Service, StartTls};

/// What most clients' caches like, and the cluster of a disk.
const PREFERRED: u32 = 64 << 10;

/// An export that a client has opened.
pub(super) struct Opened {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) agreed: Agreed,
}

/// Answers a client's options. `None` if it leaves without opening anything.
pub(super) fn negotiate(
    service: &Service,
    stream: &mut Stream,
    receiving: &mut Receiving,
    sending: &mut Sending,
) -> Result<Option<Opened>, ServeError> {
    let terms = match (&service.tls, stream.is_tls()) {
        (_, true) => TlsTerms::Established,
        (StartTls::Never, false) => TlsTerms::Absent,
        (StartTls::Offered(_), false) => TlsTerms::Offered,
        (StartTls::Demanded(_), false) => TlsTerms::Demanded,
    };
    let mut until = Instant::now() + service.limits.handshake;
    let mut handshake = ServerHandshake::new(terms);
    let mut input = Vec::new();
    let mut found: Option<(String, Arc<dyn Disk>)> = None;
    let mut step = handshake.advance(&[])?;
    loop {
        input.clear();
        match step {
            Step::Read(length) => {
                input.resize(length, 0);
                match receiving.exact(stream, &mut input, until) {
                    // Many leave so when they know what they wanted to know.
                    Err(ServeError::Gone) => return Ok(None),
                    other => other?,
                }
            }
            Step::Send(bytes) => match stream.send(sending, &bytes, service.limits.patience) {
                Err(ServeError::Gone) => return Ok(None),
                other => other?,
            },
            Step::StartTls => match &service.tls {
                StartTls::Offered(config) | StartTls::Demanded(config) => {
                    found = None;
                    stream.start_tls(config.clone(), receiving, until)?;
                }
                StartTls::Never => return Ok(None),
            },
            Step::Open(name) => {
                let began = Instant::now();
                let disk = match found.take() {
                    // One client that asks about an export and then opens it means the same one.
                    Some((known, disk)) if known == name => Ok(disk),
                    _ => service.exports.open(&name),
                };
                // The time that it takes is not the client's.
                until += began.elapsed();
                let facts = disk
                    .as_ref()
                    .map(|disk| facts(&**disk, service.limits.max_read.min(MAX_READ)))
                    .map_err(|e| refused(service, &name, e));
                found = disk.ok().map(|disk| (name, disk));
                step = handshake.opened(facts)?;
                continue;
            }
            Step::List => {
                let began = Instant::now();
                let exports = service.exports.list().map_err(|e| refused(service, "the list of exports", &e));
                until += began.elapsed();
                step = handshake.listed(exports)?;
                continue;
            }
            Step::Done(agreed) => return Ok(found.map(|(_, disk)| Opened { disk, agreed })),
            Step::End => return Ok(None),
        }
        step = handshake.advance(&input)?;
    }
}

fn facts(disk: &dyn Disk, max_read: u32) -> Facts {
    let flags =
        ExportFlags::HAS_FLAGS.with(ExportFlags::SEND_FLUSH).with(ExportFlags::SEND_DF).with(ExportFlags::SEND_CACHE);
    let mut flags = match disk.is_writable() {
        false => flags.with(ExportFlags::READ_ONLY),
        true => flags
            .with(ExportFlags::SEND_FUA)
            .with(ExportFlags::SEND_TRIM)
            .with(ExportFlags::SEND_WRITE_ZEROES)
            .with(ExportFlags::SEND_FAST_ZERO),
    };
    if disk.is_fixed() {
        flags = flags.with(ExportFlags::CAN_MULTI_CONN);
    }
    Facts {
        name: disk.name().to_owned(),
        description: disk.description(),
        size: disk.length(),
        flags,
        block_size: BlockSize { minimum: 1, preferred: PREFERRED, maximum: max_read },
        changed_since: disk.changed_since(),
    }
}

fn refused(service: &Service, what: &str, why: &NotOpened) -> Refused {
    let (error, text) = match why {
        NotOpened::Unknown(text) => (OptionError::Unknown, text.clone()),
        NotOpened::Forbidden(text) => (OptionError::Policy, text.clone()),
        NotOpened::Ending => (OptionError::Shutdown, String::new()),
        NotOpened::Failed(reason) => {
            service.owner.failed(&format!("can't open {what}: {reason}"));
            (OptionError::Policy, "it is there, but can't be opened; the server's log says why".to_owned())
        }
    };
    Refused { error, text }
}
