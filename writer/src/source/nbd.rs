//! A disk that an NBD server has.

use std::any::Any;
use std::collections::VecDeque;

use crossbeam_channel::{Sender, bounded};

use super::{Extent, Extents};
use crate::BackupError;
use crate::nbd::{Export, NbdError, NbdUri, Options, Request};

/// Most bytes of a disk whose extents are asked for at once: how far the plan looks ahead of the reads.
const WINDOW: u64 = 1 << 30;

/// An open NBD export.
pub struct NbdSource {
    export: Export,
    name: String,
    has_bitmap: bool,
    /// Kept until the disk was read: a server that was started for it.
    _server: Option<Box<dyn Any + Send + Sync>>,
}

impl NbdSource {
    /// Opens an export, with the dirty bitmap of that name if one is given.
    pub fn open(uri: &NbdUri, options: &Options, bitmap: Option<&str>) -> Result<NbdSource, NbdError> {
        let export = Export::open(uri, options, bitmap)?;
        let name = export.name().to_owned();
        Ok(NbdSource { export, name, has_bitmap: bitmap.is_some(), _server: None })
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
    pub(crate) fn extents<T>(&self, requests: Sender<Request<T>>) -> NbdExtents<T> {
        let known = self.export.has_allocation() || self.has_bitmap;
        NbdExtents { length: self.export.length(), requests: known.then_some(requests), queue: VecDeque::new() }
    }
}

/// The extents of an export, in order.
pub(crate) struct NbdExtents<T> {
    length: u64,
    /// `None` if the server tells nothing of extents.
    requests: Option<Sender<Request<T>>>,
    queue: VecDeque<crate::nbd::Extent>,
}

impl<T> Extents for NbdExtents<T> {
    fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
        let left = self.length - from;
        let Some(requests) = &self.requests else { return Ok(Extent { length: left, zero: false, dirty: true }) };
        if self.queue.is_empty() {
            let (answer, answers) = bounded(1);
            let request = Request::Status { offset: from, length: left.min(WINDOW), answer };
            // When those who should answer have ended, their own errors say why.
            requests.send(request).map_err(|_| BackupError::Disconnected)?;
            self.queue.extend(answers.recv().map_err(|_| BackupError::Disconnected)??);
        }
        let extent = self.queue.pop_front().ok_or(BackupError::Disconnected)?;
        Ok(Extent { length: extent.length, zero: extent.zero, dirty: extent.dirty })
    }
}
