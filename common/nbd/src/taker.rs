//! Who takes what was read.

use crossbeam_channel::Sender;

use crate::{NbdError, Read};

/// Takes what pumps have read, on their threads: it must not wait long.
pub trait Taker<T>: Sync {
    /// A read is answered; whether more is wanted.
    fn read(&self, read: Read<T>) -> bool;

    /// Whether the pumps go on where the server can't do one of the things that it was asked. It then learns of a read from
    /// [`Taker::failed`], and an asker from its own channel.
    fn outlives_failures(&self) -> bool {
        false
    }

    /// The server can't do that read.
    fn failed(&self, _tag: T, _error: NbdError) {}

    /// The export is of no use any more: nothing that it was asked and has not answered will be answered.
    fn over(&self, error: NbdError);
}

/// A channel: the first failure is the last answer.
impl<T: Send> Taker<T> for Sender<Result<Read<T>, NbdError>> {
    fn read(&self, read: Read<T>) -> bool {
        self.send(Ok(read)).is_ok()
    }

    fn over(&self, error: NbdError) {
        // Who does not wait any more needs not know.
        let _ = self.send(Err(error));
    }
}
