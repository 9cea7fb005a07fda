//! What goes wrong with one thing and does not stop the others: each is said, and the last one ends the command.

use reseal_cli::{Failure, Output};

pub(super) struct Failures {
    output: Output,
    last: Option<Failure>,
}

impl Failures {
    pub(super) fn new(output: Output) -> Failures {
        Failures { output, last: None }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// Adds one; the one before it is said.
    pub(super) fn add(&mut self, failure: Failure) {
        if let Some(before) = self.last.replace(failure) {
            self.output.warn(before.message);
        }
    }

    /// The last one, which is not said yet.
    pub(super) fn end(self) -> Result<(), Failure> {
        self.last.map_or(Ok(()), Err)
    }
}
