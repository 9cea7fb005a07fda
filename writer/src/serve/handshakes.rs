//! Handshakes have places of their own, so that whoever never ends his keeps nobody out.
//!
//! When all are taken, newcomers wait. A place that becomes free goes to the address that has fewest. While somebody waits, a handshake
//! that takes longer than one takes has to leave: of the address that has most, the oldest. So many who come at once all come in, and
//! one who floods displaces himself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longer than a handshake takes over a slow line, on a busy machine.
const GRACE: Duration = Duration::from_secs(3);
/// How often one who waits looks for such handshakes.
const LOOK: Duration = Duration::from_millis(100);
/// So many wait for each place; more would only fill the memory.
const QUEUE: usize = 16;

struct Taken {
    number: u64,
    from: IpAddr,
    since: Instant,
    /// None where it was told.
    leave: Option<oneshot::Sender<()>>,
}

struct Waiting {
    from: IpAddr,
    number: u64,
    enter: oneshot::Sender<oneshot::Receiver<()>>,
}

#[derive(Default)]
struct State {
    places: usize,
    /// Both in the order in which they came.
    taken: Vec<Taken>,
    waiting: Vec<Waiting>,
}

fn count(addresses: impl Iterator<Item = IpAddr>) -> HashMap<IpAddr, usize> {
    addresses.fold(HashMap::new(), |mut counts, address| {
        *counts.entry(address).or_default() += 1;
        counts
    })
}

impl State {
    fn admit(&mut self, number: u64, from: IpAddr) -> oneshot::Receiver<()> {
        let (leave, told) = oneshot::channel();
        self.taken.push(Taken { number, from, since: Instant::now(), leave: Some(leave) });
        told
    }

    /// Lets in who waits, as far as there are places.
    fn admit_waiting(&mut self) {
        while self.taken.len() < self.places {
            let has = count(self.taken.iter().map(|taken| taken.from));
            let fewest = |(_, waiting): &(usize, &Waiting)| has.get(&waiting.from).copied();
            let Some((next, _)) = self.waiting.iter().enumerate().min_by_key(fewest) else { return };
            let Waiting { from, number, enter } = self.waiting.remove(next);
            let told = self.admit(number, from);
            if enter.send(told).is_err() {
                self.taken.retain(|taken| taken.number != number);
            }
        }
    }

    /// Lets one wait; where too many do, the oldest of the address that has most does not any more.
    fn queue(&mut self, number: u64, from: IpAddr) -> oneshot::Receiver<oneshot::Receiver<()>> {
        let (enter, entered) = oneshot::channel();
        self.waiting.push(Waiting { from, number, enter });
        if self.waiting.len() > self.places * QUEUE {
            let has = count(self.waiting.iter().map(|waiting| waiting.from));
            let most = has.values().max();
            if let Some(at) = self.waiting.iter().position(|waiting| has.get(&waiting.from) == most) {
                self.waiting.remove(at);
            }
        }
        entered
    }

    /// Tells one whose handshake takes too long to leave, if nobody leaves for everybody who waits already.
    fn make_room(&mut self) {
        let leaving = self.taken.iter().filter(|taken| taken.leave.is_none()).count();
        if leaving >= self.waiting.len() {
            return;
        }
        let is_slow = |taken: &&mut Taken| taken.leave.is_some() && taken.since.elapsed() > GRACE;
        let has = count(self.taken.iter().map(|taken| taken.from));
        let slow = self.taken.iter_mut().filter(is_slow);
        // Of several with most, the last is given: the order is turned around for the oldest.
        let Some(slow) = slow.rev().max_by_key(|taken| has.get(&taken.from).copied()) else { return };
        if let Some(leave) = slow.leave.take() {
            let _ = leave.send(());
        }
    }
}

/// The places.
#[derive(Default)]
pub(super) struct Handshakes(Mutex<State>);

/// A place, until it is dropped.
pub(super) struct Place {
    handshakes: Arc<Handshakes>,
    number: u64,
    /// Answers, or is closed, when another needs the place.
    pub leave: oneshot::Receiver<()>,
}

impl Handshakes {
    /// Takes one of so many places, or waits for one; `None` where none becomes free for so long.
    pub(super) async fn take(
        self: &Arc<Self>,
        number: u64,
        from: IpAddr,
        places: u32,
        patience: Duration,
    ) -> Option<Place> {
        let place = |leave| Place { handshakes: self.clone(), number, leave };
        let mut entered = {
            let mut state = self.0.lock();
            state.places = places as usize;
            if state.taken.len() < state.places {
                let leave = state.admit(number, from);
                return Some(place(leave));
            }
            state.queue(number, from)
        };
        let until = Instant::now() + patience;
        while Instant::now() < until {
            self.0.lock().make_room();
            if let Ok(entered) = timeout(LOOK, &mut entered).await {
                return entered.ok().map(place);
            }
        }
        let mut state = self.0.lock();
        state.waiting.retain(|waiting| waiting.number != number);
        drop(state);
        // It may have been let in just now.
        entered.try_recv().ok().map(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.handshakes.0.lock();
        state.taken.retain(|taken| taken.number != self.number);
        state.admit_waiting();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    fn run<T>(what: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(what)
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn who_comes_when_all_places_are_taken_waits_and_displaces_nobody_quick() {
        let handshakes = Arc::new(Handshakes::default());
        run(async {
            let mut first = handshakes.take(1, address(1), 1, PATIENCE).await.unwrap();
            assert!(handshakes.take(2, address(2), 1, Duration::from_millis(300)).await.is_none());
            assert!(first.leave.try_recv().is_err(), "it was displaced");
            let next = tokio::spawn({
                let handshakes = handshakes.clone();
                async move { handshakes.take(3, address(2), 1, PATIENCE).await.is_some() }
            });
            tokio::task::yield_now().await;
            drop(first);
            assert!(next.await.unwrap());
        });
        let state = handshakes.0.lock();
        assert_eq!((state.taken.len(), state.waiting.len()), (0, 0));
    }

    #[test]
    fn a_newcomer_gets_the_oldest_place_of_who_has_most() {
        let mut state = State { places: 4, ..State::default() };
        let mut told: Vec<_> =
            [1, 2, 2, 2].iter().zip(1..).map(|(from, number)| state.admit(number, address(*from))).collect();
        let Some(before) = Instant::now().checked_sub(2 * GRACE) else { return };
        let _flood: Vec<_> = (10..14).map(|number| state.queue(number, address(2))).collect();
        let mut honest = state.queue(20, address(3));
        state.make_room();
        assert!(told.iter_mut().all(|told| told.try_recv().is_err()), "none took long");
        state.taken.iter_mut().for_each(|taken| taken.since = before);
        state.make_room();
        let told: Vec<_> = told.iter_mut().map(|told| told.try_recv().is_ok()).collect();
        assert_eq!(told, [false, true, false, false]);
        state.taken.retain(|taken| taken.number != 2);
        state.admit_waiting();
        assert!(honest.try_recv().is_ok(), "the address that has none comes first");
    }

    #[test]
    fn of_too_many_who_wait_the_flood_goes() {
        let mut state = State { places: 1, ..State::default() };
        let _taken = state.admit(1, address(1));
        let mut honest = state.queue(2, address(3));
        let mut flood: Vec<_> = (3..100).map(|number| state.queue(number, address(2))).collect();
        assert_eq!(state.waiting.len(), QUEUE);
        assert!(matches!(honest.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        assert!(matches!(flood[0].try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }
}
