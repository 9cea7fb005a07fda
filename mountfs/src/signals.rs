//! Signals that ask a process to end.

use std::io;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// They are caught from when this is made.
pub struct StopSignals(Signals);

impl StopSignals {
    /// Catches them. To be made before there is anything that would have to be cleaned up.
    pub fn new() -> io::Result<StopSignals> {
        Ok(StopSignals(Signals::new([SIGINT, SIGTERM, SIGHUP])?))
    }

    /// Calls `stop` on a thread of its own whenever one has come, also for those that came before this call.
    pub fn on_signal(self, stop: impl Fn() + Send + 'static) -> io::Result<()> {
        self.on_each(move |_| stop())
    }

    /// The same where it matters whether that was the interrupt of a terminal.
    pub fn on_each(mut self, stop: impl Fn(bool) + Send + 'static) -> io::Result<()> {
        let each = move || self.0.forever().for_each(|signal| stop(signal == SIGINT));
        thread::Builder::new().name("signals".into()).spawn(each)?;
        Ok(())
    }
}
