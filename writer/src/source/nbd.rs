//! A disk that an NBD server has.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{Extent, Extents};
use crate::BackupError;
use reseal_nbd::{Export, NbdError, NbdUri, Options, Request};

/// Most bytes of a disk whose extents are asked for at once: how far the plan looks ahead of the reads.
const WINDOW: u64 = 1 << 30;

/// How often a wait for extents looks whether anybody is left to answer.
const NAP: Duration = Duration::from_millis(100);

type Answer = Result<Vec<reseal_nbd::Extent>, NbdError>;

/// An open NBD export.
pub struct NbdSource {
    export: Export,
    name: String,
    /// Kept until the disk was read: a server that was started for it.
    _server: Option<Box<dyn Any + Send + Sync>>,
}

impl NbdSource {
    /// Opens an export, with the dirty bitmap of that name if one is given.
    pub fn open(uri: &NbdUri, options: &Options, bitmap: Option<&str>) -> Result<NbdSource, NbdError> {
        Ok(NbdSource::of(Export::open(uri, options, bitmap)?))
    }

    /// Opens an export that may tell what changed since a restore point.
    pub fn open_asking_since(uri: &NbdUri, options: &Options) -> Result<NbdSource, NbdError> {
        Ok(NbdSource::of(Export::open_asking_since(uri, options)?))
    }

    fn of(export: Export) -> NbdSource {
        let name = export.name().to_owned();
        NbdSource { export, name, _server: None }
    }

    /// The same under a name that says more to people.
    pub fn named(self, name: String) -> NbdSource {
        NbdSource { name, ..self }
    }

    /// Keeps the server that was started for it until it was read.
    pub fn with_server(self, server: impl Any + Send + Sync) -> NbdSource {
        NbdSource { _server: Some(Box::new(server)), ..self }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Its extents, asked for through the channel that its connections serve.
    /// `serving` counts these connections.
    pub(crate) fn extents<'a, T>(&self, requests: Sender<Request<T>>, serving: &'a AtomicUsize) -> NbdExtents<'a, T> {
        let known = self.export.has_allocation() || self.export.tells_changes();
        let requests = known.then_some(requests);
        NbdExtents { length: self.export.length(), requests, serving, queue: VecDeque::new() }
    }
}

/// The extents of an export, in order.
pub(crate) struct NbdExtents<'a, T> {
    length: u64,
    /// `None` if the server tells nothing of extents.
    requests: Option<Sender<Request<T>>>,
    serving: &'a AtomicUsize,
    queue: VecDeque<reseal_nbd::Extent>,
}

impl<T> NbdExtents<'_, T> {
    /// Waits for an answer, unless those who should give it have ended: then their own errors say why.
    fn wait(&self, answers: &Receiver<Answer>) -> Result<Vec<reseal_nbd::Extent>, BackupError> {
        loop {
            match answers.recv_timeout(NAP) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Timeout) if self.serving.load(Ordering::Relaxed) > 0 => {}
                Err(_) => return Err(BackupError::Disconnected),
            }
        }
    }
}

impl<T> Extents for NbdExtents<'_, T> {
    fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
        let left = self.length - from;
        let Some(requests) = &self.requests else { return Ok(Extent { length: left, zero: false, dirty: true }) };
        if self.queue.is_empty() {
            let (answer, answers) = bounded(1);
            let request = Request::Status { offset: from, length: left.min(WINDOW), answer };
            requests.send(request).map_err(|_| BackupError::Disconnected)?;
            self.queue = self.wait(&answers)?.into();
        }
        let extent = self.queue.pop_front().ok_or(BackupError::Disconnected)?;
        Ok(Extent { length: extent.length, zero: extent.zero, dirty: extent.dirty })
    }
}
