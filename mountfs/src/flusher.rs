//! Flushes of a disk, on a thread of their own: they are slow, and no read may wait behind one.
//!
//! All who wait when a flush begins are answered by that one. There is no deadline: who was told that a flush has failed would have to
//! take for lost what is durable a moment later.

use std::io;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::errno::Fault;
use crate::writable::WrittenDisk;

/// Requests that wait, at most: more than the kernel sends.
const WAITING: usize = 4096;
const STACK: usize = 512 * 1024;

/// What is done when a flush has ended.
type Done = Box<dyn FnOnce(Result<(), &Fault>) + Send>;

/// Flushes one disk.
pub(crate) struct Flusher(Sender<Done>);

impl Flusher {
    pub(crate) fn new(disk: Arc<WrittenDisk>) -> io::Result<Flusher> {
        let (sender, queue) = bounded(WAITING);
        thread::Builder::new().name("flusher".into()).stack_size(STACK).spawn(move || work(&disk, &queue))?;
        Ok(Flusher(sender))
    }

    /// Flushes what was written before this call.
    pub(crate) fn flush(&self, done: impl FnOnce(Result<(), &Fault>) + Send + 'static) {
        if let Err(unsent) = self.0.try_send(Box::new(done)) {
            unsent.into_inner()(Err(&Fault::Crowded));
        }
    }
}

fn work(disk: &WrittenDisk, queue: &Receiver<Done>) {
    while let Ok(first) = queue.recv() {
        let others: Vec<Done> = queue.try_iter().collect();
        let result = disk.flush();
        for done in std::iter::once(first).chain(others) {
            done(result.as_ref().map(|&()| ()));
        }
    }
}
