//! How much sessions may have under way, all together.
//!
//! A session may hold what its window allows, out of order, and the messages that wait to be taken: a megabyte each. The window is
//! announced when it begins and stays. Each connection that is allowed has the least of it set aside, so nobody is kept waiting; what
//! the memory has beyond that goes to those who come first, and less of it the more are there.

use std::sync::Arc;

use parking_lot::Mutex;

use super::receive::WINDOW;
use crate::link::WAITING;

/// Most of one message, in which memory is counted.
pub(super) const MESSAGE: u64 = 1 << 20;
/// Least that is under way: the connection then waits for each answer.
const LEAST: u16 = 1;

#[derive(Default)]
struct State {
    /// Messages that are spoken for beyond what is set aside.
    taken: u64,
    sessions: u64,
}

/// What is spoken for.
#[derive(Default)]
pub(super) struct Windows(Mutex<State>);

/// What a session may have under way, until it is dropped.
pub(super) struct Window {
    windows: Arc<Windows>,
    /// Offers.
    pub offers: u16,
}

/// Messages that may wait where so many offers may be under way.
fn waiting(offers: u16) -> usize {
    usize::from(offers / 4).clamp(1, WAITING)
}

/// Messages that a session may hold: what is under way, what waits, and the one that is being read.
const fn cost(offers: u16, waiting: usize) -> u64 {
    offers as u64 + waiting as u64 + 1
}

/// What is set aside for each connection, in bytes.
pub(super) const SET_ASIDE: u64 = cost(LEAST, 1) * MESSAGE;

fn beyond(offers: u16) -> u64 {
    cost(offers, waiting(offers)) - cost(LEAST, 1)
}

impl Windows {
    /// A window out of so many bytes, of which the least is set aside for so many connections. Whoever comes when n are there gets at
    /// most the (n + 1)th part of a quarter of the rest: so early ones have what makes them fast, and something is left for late ones.
    pub(super) fn take(self: &Arc<Self>, memory: u64, connections: u32) -> Window {
        let rest = memory.saturating_sub(SET_ASIDE * u64::from(connections)) / MESSAGE;
        let mut state = self.0.lock();
        let fair = rest / 4 / (state.sessions + 1);
        let mut offers = u16::try_from(fair).unwrap_or(WINDOW).clamp(LEAST, WINDOW);
        let left = rest.saturating_sub(state.taken);
        while offers > LEAST && beyond(offers) > left {
            offers -= 1;
        }
        state.taken += beyond(offers);
        state.sessions += 1;
        drop(state);
        Window { windows: self.clone(), offers }
    }
}

impl Window {
    /// Messages that may wait to be taken.
    pub(super) fn waiting(&self) -> usize {
        waiting(self.offers)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut state = self.windows.0.lock();
        state.taken -= beyond(self.offers);
        state.sessions -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_get_smaller_and_all_that_are_allowed_fit_in_the_memory() {
        let windows = Arc::<Windows>::default();
        let (memory, connections) = (1 << 30, 128);
        let taken: Vec<_> = (0..connections).map(|_| windows.take(memory, connections)).collect();
        assert!(taken.windows(2).all(|pair| pair[0].offers >= pair[1].offers));
        assert_eq!((taken[0].offers, taken[127].offers), (WINDOW, LEAST));
        assert!(taken[10].offers >= 8, "the 11th has {}", taken[10].offers);
        let held: u64 = taken.iter().map(|window| cost(window.offers, window.waiting())).sum();
        assert!(held * MESSAGE <= memory, "{held} messages");
        drop(taken);
        assert_eq!(windows.take(memory, connections).offers, WINDOW);
    }

    #[test]
    fn where_memory_is_scarce_the_least_is_given() {
        let windows = Arc::<Windows>::default();
        let taken = [(); 3].map(|()| windows.take(3 * SET_ASIDE, 3));
        assert!(taken.iter().all(|window| window.offers == LEAST));
    }
}
