//! How long a silent or trickling server is waited for.

use std::time::{Duration, Instant};

use crate::wire::WireError;

/// Bytes of content that count as progress. A server must send so much within the time limit, or finish a request: one
/// byte at a time is as good as silence.
const PROGRESS: usize = 64 << 10;

/// A time limit that progress renews.
pub(crate) struct Patience<'a> {
    timeout: Duration,
    until: Instant,
    arrived: usize,
    /// Whether waiting has become pointless.
    stop: &'a dyn Fn() -> bool,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(timeout: Duration, stop: &'a dyn Fn() -> bool) -> Patience<'a> {
        Patience { timeout, until: Instant::now() + timeout, arrived: 0, stop }
    }

    /// The server owes nothing from before now.
    pub(crate) fn renew(&mut self) {
        self.until = Instant::now() + self.timeout;
        self.arrived = 0;
    }

    /// That much content came.
    pub(crate) fn content(&mut self, bytes: usize) {
        self.arrived += bytes;
        if self.arrived >= PROGRESS {
            self.renew();
        }
    }

    /// An error once the time is up.
    pub(crate) fn check(&self) -> Result<(), WireError> {
        if (self.stop)() {
            return Err(WireError::Stopped);
        }
        match Instant::now() >= self.until {
            true => Err(WireError::Silent(self.timeout)),
            false => Ok(()),
        }
    }
}
