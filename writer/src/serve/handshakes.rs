//! Handshakes have places of their own, so that whoever never ends his keeps nobody out.
//!
//! When all are taken, a newcomer gets the place of another: the oldest of the address that has most.

use std::collections::HashMap;
use std::net::IpAddr;

use parking_lot::Mutex;
use tokio::sync::oneshot;

struct Waiting {
    number: u64,
    from: IpAddr,
    leave: oneshot::Sender<()>,
}

/// The places, in the order in which they were taken.
#[derive(Default)]
pub(super) struct Handshakes(Mutex<Vec<Waiting>>);

/// A place, until it is dropped.
pub(super) struct Place<'a> {
    handshakes: &'a Handshakes,
    number: u64,
    /// Answers, or is closed, when another needs the place.
    pub leave: oneshot::Receiver<()>,
}

impl Handshakes {
    /// Takes one of so many.
    pub(super) fn take(&self, number: u64, from: IpAddr, places: u32) -> Place<'_> {
        let mut waiting = self.0.lock();
        while waiting.len() >= places as usize {
            let mut of: HashMap<IpAddr, usize> = HashMap::new();
            waiting.iter().for_each(|other| *of.entry(other.from).or_default() += 1);
            let most = of.values().max().copied();
            let Some(at) = waiting.iter().position(|other| of.get(&other.from).copied() == most) else { break };
            let _ = waiting.remove(at).leave.send(());
        }
        let (tell, leave) = oneshot::channel();
        waiting.push(Waiting { number, from, leave: tell });
        Place { handshakes: self, number, leave }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.handshakes.0.lock().retain(|other| other.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newcomer_gets_the_oldest_place_of_who_has_most() {
        let handshakes = Handshakes::default();
        let address = |n: u8| IpAddr::from([10, 0, 0, n]);
        let mut one = handshakes.take(1, address(1), 4);
        let mut greedy: Vec<_> = (2..5).map(|number| handshakes.take(number, address(2), 4)).collect();
        let mut new = handshakes.take(5, address(3), 4);
        assert!(greedy[0].leave.try_recv().is_ok(), "the oldest of three");
        assert!(greedy[1].leave.try_recv().is_err() && greedy[2].leave.try_recv().is_err());
        assert!(one.leave.try_recv().is_err() && new.leave.try_recv().is_err());
        drop(greedy);
        assert_eq!(handshakes.0.lock().len(), 2);
    }
}
