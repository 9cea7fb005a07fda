//! Bytes from and to one client, in the clear or through TLS. One thread receives while others send.
//!
//! With TLS both directions share one state, which is locked only while records are sealed or opened, never while a socket is
//! waited for. Who sends holds [`Sending`] from sealing to the last byte, so records leave in their order.

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::{ServerConfig, ServerConnection};
use zeroize::Zeroizing;

use super::ServeError;
use super::endpoint::Endpoint;

/// What is received at a time: many requests.
const RECEIVED: usize = 16 << 10;
/// What is sealed at a time.
const SEALED: usize = 128 << 10;

/// Both directions.
pub(super) struct Stream {
    endpoint: Arc<Endpoint>,
    tls: Option<Mutex<ServerConnection>>,
}

/// What was received and not used yet. In the clear, nothing is until the first request: what follows may be TLS.
pub(super) struct Receiving {
    /// Requests, and what clients write.
    plain: Zeroizing<Vec<u8>>,
    used: usize,
    filled: usize,
    records: Vec<u8>,
    records_used: usize,
}

/// Records on their way.
#[derive(Default)]
pub(super) struct Sending {
    records: Vec<u8>,
}

impl Stream {
    /// With TLS: whose handshake is done.
    pub(super) fn new(endpoint: Arc<Endpoint>, tls: Option<ServerConnection>) -> Stream {
        let tls = tls.map(|mut tls| {
            // What is given to it is taken out at once.
            tls.set_buffer_limit(None);
            Mutex::new(tls)
        });
        Stream { endpoint, tls }
    }

    pub(super) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Speaks TLS from here on.
    pub(super) fn start_tls(
        &mut self,
        config: Arc<ServerConfig>,
        receiving: &mut Receiving,
        until: Instant,
    ) -> Result<(), ServeError> {
        let mut tls = ServerConnection::new(config).map_err(ServeError::Tls)?;
        while tls.is_handshaking() {
            receiving.receive_records(&self.endpoint, Some(until))?;
            while tls.is_handshaking() && receiving.has_records() {
                let opened = receiving.open_records(&mut tls);
                // Also after an error, for an alert says why.
                let sent = self.flush(&mut tls, until);
                opened.and(sent)?;
            }
        }
        *self = Stream::new(self.endpoint.clone(), Some(tls));
        Ok(())
    }

    fn flush(&self, tls: &mut ServerConnection, until: Instant) -> Result<(), ServeError> {
        let mut records = Vec::new();
        take_records(tls, &mut records)?;
        self.endpoint.send(&records, until.saturating_duration_since(Instant::now()))
    }

    /// Sends all of `bytes`. A client that takes too little for so long is given up.
    pub(super) fn send(&self, sending: &mut Sending, bytes: &[u8], patience: Duration) -> Result<(), ServeError> {
        let Some(tls) = &self.tls else { return self.endpoint.send(bytes, patience) };
        for part in bytes.chunks(SEALED) {
            sending.records.clear();
            {
                let mut tls = tls.lock();
                tls.writer().write_all(part).map_err(ServeError::Io)?;
                take_records(&mut tls, &mut sending.records)?;
            }
            self.endpoint.send(&sending.records, patience)?;
        }
        Ok(())
    }

    /// Says that nothing follows, and ends the connection. A client that takes nothing is not waited for.
    pub(super) fn close(&self, sending: &mut Sending) {
        if let Some(tls) = &self.tls {
            let mut tls = tls.lock();
            tls.send_close_notify();
            sending.records.clear();
            let sealed = take_records(&mut tls, &mut sending.records);
            drop(tls);
            // The end follows in any case.
            let _ = sealed.and_then(|()| self.endpoint.send(&sending.records, Duration::ZERO));
        }
        self.endpoint.shut_down();
    }
}

/// Takes what is to be sent out of a TLS session.
fn take_records(tls: &mut ServerConnection, out: &mut Vec<u8>) -> Result<(), ServeError> {
    while tls.wants_write() {
        tls.write_tls(out).map_err(ServeError::Io)?;
    }
    Ok(())
}

impl Receiving {
    pub(super) fn new() -> Receiving {
        Receiving { plain: Zeroizing::new(vec![0; RECEIVED]), used: 0, filled: 0, records: Vec::new(), records_used: 0 }
    }

    /// Whether more was received than was used.
    pub(super) fn has_more(&self) -> bool {
        self.used < self.filled || self.has_records()
    }

    /// Exactly so many bytes, before a moment. Nothing is received beyond them, except within TLS.
    pub(super) fn exact(&mut self, stream: &Stream, out: &mut [u8], until: Instant) -> Result<(), ServeError> {
        let mut done = 0;
        while done < out.len() {
            match self.receive(stream, &mut out[done..], Some(until))? {
                0 => return Err(ServeError::Gone),
                got => done += got,
            }
        }
        Ok(())
    }

    /// The next bytes, which are at most 4 KiB; `None` if the client ended before them.
    pub(super) fn take<const N: usize>(&mut self, stream: &Stream) -> Result<Option<[u8; N]>, ServeError> {
        const { assert!(N <= RECEIVED, "the buffer has room for it") };
        loop {
            if let Some(taken) = self.plain[self.used..self.filled].first_chunk::<N>() {
                let taken = *taken;
                self.used += N;
                return Ok(Some(taken));
            }
            self.plain.copy_within(self.used..self.filled, 0);
            (self.used, self.filled) = (0, self.filled - self.used);
            match self.fill(stream)? {
                0 if self.filled == 0 => return Ok(None),
                0 => return Err(ServeError::Gone),
                _ => {}
            }
        }
    }

    /// Fills `out` with the next bytes, most of them straight from the socket.
    pub(super) fn fill_with(&mut self, stream: &Stream, out: &mut [u8]) -> Result<(), ServeError> {
        let mut done = out.len().min(self.filled - self.used);
        out[..done].copy_from_slice(&self.plain[self.used..self.used + done]);
        self.used += done;
        while done < out.len() {
            match self.receive(stream, &mut out[done..], None)? {
                0 => return Err(ServeError::Gone),
                got => done += got,
            }
        }
        Ok(())
    }

    /// Drops the next bytes.
    pub(super) fn skip(&mut self, stream: &Stream, mut length: usize) -> Result<(), ServeError> {
        loop {
            let now = length.min(self.filled - self.used);
            self.used += now;
            length -= now;
            if length == 0 {
                return Ok(());
            }
            (self.used, self.filled) = (0, 0);
            if self.fill(stream)? == 0 {
                return Err(ServeError::Gone);
            }
        }
    }

    /// Receives behind what is there.
    fn fill(&mut self, stream: &Stream) -> Result<usize, ServeError> {
        let mut plain = std::mem::take(&mut self.plain);
        let got = self.receive(stream, &mut plain[self.filled..], None);
        self.plain = plain;
        let got = got?;
        self.filled += got;
        Ok(got)
    }

    fn receive(&mut self, stream: &Stream, out: &mut [u8], until: Option<Instant>) -> Result<usize, ServeError> {
        let Some(tls) = &stream.tls else {
            return match until {
                Some(until) => stream.endpoint.receive_until(out, until),
                None => stream.endpoint.receive(out),
            };
        };
        loop {
            {
                let mut tls = tls.lock();
                loop {
                    match tls.reader().read(out) {
                        Ok(got) => return Ok(got),
                        Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                        Err(e) => return Err(ServeError::Io(e)),
                    }
                    if !self.has_records() {
                        break;
                    }
                    self.open_records(&mut tls)?;
                }
            }
            match self.receive_records(&stream.endpoint, until) {
                // A client that says nothing of its end loses nothing by it.
                Err(ServeError::Gone) => return Ok(0),
                other => other?,
            }
        }
    }

    fn has_records(&self) -> bool {
        self.records_used < self.records.len()
    }

    fn receive_records(&mut self, endpoint: &Endpoint, until: Option<Instant>) -> Result<(), ServeError> {
        self.records.resize(RECEIVED, 0);
        self.records_used = 0;
        let got = match until {
            Some(until) => endpoint.receive_until(&mut self.records, until),
            None => endpoint.receive(&mut self.records),
        };
        self.records.truncate(*got.as_ref().unwrap_or(&0));
        match got? {
            0 => Err(ServeError::Gone),
            _ => Ok(()),
        }
    }

    /// Gives TLS some of what was received.
    fn open_records(&mut self, tls: &mut ServerConnection) -> Result<(), ServeError> {
        let mut rest = &self.records[self.records_used..];
        tls.read_tls(&mut rest).map_err(ServeError::Io)?;
        self.records_used = self.records.len() - rest.len();
        tls.process_new_packets().map(drop).map_err(ServeError::Tls)
    }
}
