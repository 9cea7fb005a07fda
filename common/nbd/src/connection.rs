//! One connection, from connecting to an open export.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_proto::nbd::handshake::{ClientHandshake, HandshakeError, Opened, Refusal, Step, Wanted};
use reseal_proto::nbd::{BASE_ALLOCATION, BlockSize, CHANGED_SINCE, Command, CommandFlags, DIRTY_BITMAP, Request};

use crate::patience::Patience;
use crate::socket::Socket;
use crate::tls::{Starts, Tls};
use crate::uri::{Place, host_and_port};
use crate::wire::{Wire, WireError};
use crate::{NbdError, NbdUri, TlsFirst};

/// What each connection to an export is made from.
#[derive(Clone)]
pub(crate) struct Target {
    place: Place,
    export: String,
    /// The URI as shown to people, or what stands for it.
    pub(crate) name: Arc<str>,
    pub(crate) tls: Option<Tls>,
    /// Name of the context that tells what changed. It must be there.
    pub(crate) bitmap: Option<String>,
    /// Asks whether there is one that tells what changed since a restore point.
    pub(crate) asks_since: bool,
}

/// A connection whose export is open.
pub(crate) struct Connection {
    pub(crate) wire: Wire,
    pub(crate) facts: Facts,
    /// Numbers that this connection knows the contexts by.
    pub(crate) allocation: Option<u32>,
    pub(crate) dirty: Option<u32>,
    /// Name of the context that tells what changed since a restore point, where that was asked.
    pub(crate) since: Option<String>,
}

/// What must be the same for every connection to an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) size: u64,
    pub(crate) block_size: BlockSize,
    pub(crate) structured: bool,
    pub(crate) multi: bool,
    pub(crate) allocation: bool,
}

impl Target {
    pub(crate) fn new(uri: &NbdUri, tls: Option<Tls>, bitmap: Option<&str>) -> Target {
        let bitmap = bitmap.map(|name| format!("{DIRTY_BITMAP}{name}"));
        let (place, export) = (uri.place.clone(), uri.export.clone());
        Target { place, export, name: uri.to_string().into(), tls, bitmap, asks_since: false }
    }

    /// One where TLS comes first.
    pub(crate) fn tls_first(first: &TlsFirst) -> Result<Target, NbdError> {
        let TlsFirst { address, server, config, export } = first.clone();
        let place = host_and_port(&address).map_err(|wrong| NbdError::Usage(format!("{address}: {wrong}")))?;
        let name = format!("{export} at {address}").into();
        let tls = Tls { config, server, starts: Starts::First, has_certificate: true };
        Ok(Target { place, export, name, tls: Some(tls), bitmap: None, asks_since: false })
    }

    fn starts(&self) -> Option<Starts> {
        self.tls.as_ref().map(|tls| tls.starts)
    }

    pub(crate) fn unreachable(&self, reason: impl Into<String>) -> NbdError {
        NbdError::Unreachable { uri: self.name.to_string(), reason: reason.into() }
    }

    pub(crate) fn protocol(&self, what: impl Into<String>) -> NbdError {
        NbdError::Protocol { uri: self.name.to_string(), what: what.into() }
    }

    fn refused(&self, refusal: Refusal) -> NbdError {
        NbdError::Refused { uri: self.name.to_string(), refusal }
    }

    fn wire_error(&self, error: WireError) -> NbdError {
        match error {
            WireError::Tls(e) => NbdError::Tls { uri: self.name.to_string(), reason: e.to_string() },
            e @ WireError::Injected => self.protocol(e.to_string()),
            WireError::Closed if self.tls.as_ref().is_some_and(|tls| !tls.has_certificate) => self.unreachable(
                "the server closed the connection before the export was open; it may want a certificate (--tls-cert and \
                 --tls-key)",
            ),
            WireError::Closed => self.unreachable("the server closed the connection before the export was open"),
            e @ (WireError::Silent(_) | WireError::Io(_) | WireError::Stopped) => self.unreachable(e.to_string()),
        }
    }

    /// Connects and opens the export. All of it must be done within `timeout`, for a handshake is short.
    pub(crate) fn connect(&self, timeout: Duration, stop: &dyn Fn() -> bool) -> Result<Connection, NbdError> {
        let began = Instant::now();
        let socket = Socket::connect(&self.place, timeout).map_err(|e| self.unreachable(e.to_string()))?;
        let left = timeout.saturating_sub(began.elapsed());
        let mut patience = Patience::new(left, stop);
        let mut wire = Wire::new(socket);
        if let Some(tls) = self.tls.as_ref().filter(|tls| tls.starts == Starts::First) {
            wire = wire.start_tls(tls, &mut patience).map_err(|e| self.wire_error(e))?;
            if !tls.config.alpn_protocols.is_empty() && !wire.has_agreed() {
                return Err(self.protocol("it did not say that it speaks this protocol inside TLS"));
            }
        }
        let mut handshake = ClientHandshake::new(self.wanted());
        let mut input = Vec::new();
        loop {
            let step = handshake.advance(&input).map_err(|e| match e {
                HandshakeError::Violation(violation) => self.protocol(violation.to_string()),
                HandshakeError::Refused(refusal) => self.refused(refusal),
            })?;
            input.clear();
            match step {
                Step::Read(length) => {
                    input.resize(length, 0);
                    wire.read_exact(&mut input, &mut patience).map_err(|e| self.wire_error(e))?;
                }
                Step::Send(bytes) => wire.send(&bytes, &mut patience).map_err(|e| self.wire_error(e))?,
                Step::StartTls => {
                    let tls = self.tls.as_ref().ok_or_else(|| self.protocol("TLS that nobody asked for"))?;
                    wire = wire.start_tls(tls, &mut patience).map_err(|e| self.wire_error(e))?;
                }
                Step::Done(opened) => return self.opened(wire, &opened),
            }
        }
    }

    fn wanted(&self) -> Wanted {
        let mut contexts = vec![(BASE_ALLOCATION.to_owned(), false)];
        contexts.extend(self.bitmap.iter().map(|name| (name.clone(), true)));
        contexts.extend(self.asks_since.then(|| (CHANGED_SINCE.to_owned(), false)));
        Wanted { export: self.export.clone(), tls: self.starts() == Some(Starts::Asked), contexts }
    }

    fn opened(&self, wire: Wire, opened: &Opened) -> Result<Connection, NbdError> {
        let minimum = opened.block_size.minimum;
        if opened.size > i64::MAX as u64 {
            return Err(self.protocol(format!("an export of {} bytes", opened.size)));
        }
        if !opened.size.is_multiple_of(minimum.into()) {
            let size = opened.size;
            return Err(self.protocol(format!("{size} bytes are no multiple of its minimum block size of {minimum}")));
        }
        let id = |name: &str| opened.contexts.iter().find(|(_, known)| known == name).map(|(id, _)| *id);
        let allocation = id(BASE_ALLOCATION);
        let facts = Facts {
            size: opened.size,
            block_size: opened.block_size,
            structured: opened.structured,
            multi: opened.flags.contains(reseal_proto::nbd::ExportFlags::CAN_MULTI_CONN),
            allocation: allocation.is_some(),
        };
        let since = opened.contexts.iter().find(|(_, name)| self.asks_since && name.starts_with(CHANGED_SINCE));
        let dirty = self.bitmap.as_deref().and_then(id).or(since.map(|(id, _)| *id));
        Ok(Connection { wire, facts, allocation, dirty, since: since.map(|(_, name)| name.clone()) })
    }
}

impl Facts {
    /// An error if another connection sees another export.
    pub(crate) fn same(&self, now: &Facts, target: &Target) -> Result<(), NbdError> {
        let what = if now.size != self.size {
            format!("it had {} bytes and now has {}", self.size, now.size)
        } else if now.block_size != self.block_size {
            "its block sizes differ".to_owned()
        } else if (now.structured, now.allocation) != (self.structured, self.allocation) {
            "it no longer offers the same about holes".to_owned()
        } else {
            return Ok(());
        };
        Err(NbdError::Changed { uri: target.name.to_string(), what })
    }
}

impl Connection {
    /// Ends it with a word, so that the server needs not guess.
    pub(crate) fn close(self) {
        let (command, flags) = (Command::Disconnect, CommandFlags::NONE);
        self.wire.close(&Request { command, flags, cookie: 0, offset: 0, length: 0 }.encode());
    }
}
