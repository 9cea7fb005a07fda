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
    pub fn on_signal(mut self, stop: impl Fn() + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name("signals".into()).spawn(move || self.0.forever().for_each(|_| stop()))?;
        Ok(())
    }
}
