//! Holds reading to a rate.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a wait goes on before it looks whether it is still wanted.
const NAP: Duration = Duration::from_millis(50);
/// Most time of silence that may be made up for by reading faster.
const BURST: Duration = Duration::from_millis(100);

/// A limit in bytes per second, shared by all disks of a backup, or all sessions of a client.
pub struct Throttle {
    rate: AtomicU64,
    /// When the bytes that were taken so far have passed.
    passed: Mutex<Instant>,
}

impl Throttle {
    /// A limit of so many bytes per second.
    pub fn new(rate: u64) -> Throttle {
        Throttle { rate: AtomicU64::new(rate.max(1)), passed: Mutex::new(Instant::now()) }
    }

    /// Changes the limit, for what comes from now on.
    pub(crate) fn set_rate(&self, rate: u64) {
        self.rate.store(rate.max(1), Ordering::Relaxed);
    }

    /// Takes so many bytes; when they may pass.
    pub(crate) fn reserve(&self, bytes: u64) -> Instant {
        let mut passed = self.passed.lock();
        let now = Instant::now();
        let begin = (*passed).max(now.checked_sub(BURST).unwrap_or(now));
        // Seconds as a float: a byte count over a rate needs no more than its 53 bits.
        *passed = begin + Duration::from_secs_f64(bytes as f64 / self.rate.load(Ordering::Relaxed) as f64);
        begin
    }

    /// Waits until so many bytes more may pass, or until `stop` is set.
    pub(crate) fn take(&self, bytes: u64, stop: &AtomicBool) {
        let until = self.reserve(bytes);
        while !stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_at_the_rate_and_a_stop_ends_the_wait() {
        let throttle = Throttle::new(10 << 20);
        let go = AtomicBool::new(false);
        let began = Instant::now();
        for _ in 0..5 {
            throttle.take(1 << 20, &go);
        }
        // The first passes at once and 100 ms were free: 4 of 100 ms are left, less that.
        assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
        throttle.take(1 << 40, &go);
        let stop = AtomicBool::new(true);
        throttle.take(1, &stop);
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
