//! What is being fetched: whoever wants the same waits for it, and not too many requests are under way.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::chunks::Name;

/// Requests that are under way at most.
const MOST: usize = 48;

/// What is being fetched of each object.
#[derive(Default)]
pub(super) struct Flights {
    under_way: Mutex<UnderWay>,
    landed: Condvar,
}

#[derive(Default)]
struct UnderWay {
    chunks: HashMap<Name, Vec<Range<u64>>>,
    count: usize,
}

/// Chunks that are being fetched, until this is dropped.
pub(super) struct Flight {
    flights: Arc<Flights>,
    name: Name,
    chunks: Range<u64>,
}

impl UnderWay {
    fn has(&self, name: &Name, wanted: &Range<u64>) -> bool {
        let of_object = self.chunks.get(name).into_iter().flatten();
        of_object.into_iter().any(|chunks| chunks.start < wanted.end && wanted.start < chunks.end)
    }
}

impl Flights {
    /// Begins to fetch chunks; `None` where some of them are being fetched already, or there is no room until `patience` is over.
    pub(super) fn begin(self: &Arc<Self>, name: &Name, chunks: Range<u64>, patience: Duration) -> Option<Flight> {
        let end = Instant::now() + patience;
        let mut under_way = self.under_way.lock();
        loop {
            if under_way.has(name, &chunks) {
                return None;
            }
            if under_way.count < MOST {
                break;
            }
            if self.landed.wait_until(&mut under_way, end).timed_out() {
                return None;
            }
        }
        under_way.count += 1;
        under_way.chunks.entry(*name).or_default().push(chunks.clone());
        Some(Flight { flights: self.clone(), name: *name, chunks })
    }

    /// Waits until none of these chunks is being fetched, or `patience` is over; whether it had to wait for one.
    pub(super) fn wait(&self, name: &Name, chunks: &Range<u64>, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut under_way = self.under_way.lock();
        let mut waited = false;
        while under_way.has(name, chunks) {
            waited = true;
            if self.landed.wait_until(&mut under_way, end).timed_out() {
                break;
            }
        }
        waited
    }

    /// Whether all these chunks are being fetched, or some are.
    pub(super) fn has(&self, name: &Name, chunks: &Range<u64>) -> bool {
        self.under_way.lock().has(name, chunks)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut under_way = self.flights.under_way.lock();
        under_way.count -= 1;
        if let Some(of_object) = under_way.chunks.get_mut(&self.name) {
            if let Some(nth) = of_object.iter().position(|chunks| *chunks == self.chunks) {
                of_object.swap_remove(nth);
            }
            if of_object.is_empty() {
                under_way.chunks.remove(&self.name);
            }
        }
        drop(under_way);
        self.flights.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_not_begun_again_and_can_be_waited_for() {
        let flights = Arc::new(Flights::default());
        let flight = flights.begin(&[1; 32], 3..9, Duration::ZERO).unwrap();
        assert!(flights.begin(&[1; 32], 8..10, Duration::ZERO).is_none());
        assert!(
            flights.begin(&[1; 32], 9..10, Duration::ZERO).is_some()
                && flights.begin(&[2; 32], 3..9, Duration::ZERO).is_some()
        );
        assert!(flights.has(&[1; 32], &(0..4)) && !flights.has(&[1; 32], &(0..3)));
        assert!(!flights.wait(&[2; 32], &(0..9), Duration::from_secs(9)), "it has landed");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| flights.wait(&[1; 32], &(0..9), Duration::from_secs(60)));
            std::thread::sleep(Duration::from_millis(20));
            drop(flight);
            assert!(waits.join().unwrap());
        });
        let many: Vec<_> =
            (0..MOST as u64).map(|n| flights.begin(&[3; 32], n..n + 1, Duration::ZERO).unwrap()).collect();
        assert!(flights.begin(&[4; 32], 0..1, Duration::from_millis(5)).is_none());
        drop(many);
        assert!(flights.under_way.lock().chunks.is_empty());
    }
}
