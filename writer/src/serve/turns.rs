//! Work of sessions is shared between tenants, not between sessions.
//!
//! Whoever has something to decode, hash and seal takes a turn first. While there are turns to be had nobody waits. Otherwise the
//! next goes to the tenant that has had the least time, and there to whoever has waited longest. So one tenant with forty
//! sessions and one with one get the same, if both want it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use reseal_format::names::TenantName;

/// What a tenant has had, and who waits.
#[derive(Default)]
struct Account {
    /// Time, counted from what those had who were there when it came: who was away has nothing to make up for.
    used: Duration,
    /// Turns that are taken now.
    taken: usize,
    waiting: VecDeque<Sender<()>>,
}

struct State {
    free: usize,
    /// What the last who got a turn had had.
    now: Duration,
    accounts: HashMap<TenantName, Account>,
}

impl State {
    /// Gives a turn that has become free to whoever is next.
    fn pass_on(&mut self) {
        self.free += 1;
        while self.free > 0 {
            let waiting = self.accounts.values_mut().filter(|account| !account.waiting.is_empty());
            let Some(next) = waiting.min_by_key(|account| account.used) else { break };
            self.now = self.now.max(next.used);
            if next.waiting.pop_front().is_some_and(|waiter| waiter.send(()).is_ok()) {
                next.taken += 1;
                self.free -= 1;
            }
        }
    }
}

/// The turns of a server.
pub(super) struct Turns(Mutex<State>);

/// Ends when it is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    tenant: &'a TenantName,
    began: Instant,
}

impl Turns {
    /// So many at once.
    pub(super) fn new(count: usize) -> Turns {
        Turns(Mutex::new(State { free: count.max(1), now: Duration::ZERO, accounts: HashMap::new() }))
    }

    /// Takes a turn; waits for it.
    pub(super) fn take<'a>(&'a self, tenant: &'a TenantName) -> Turn<'a> {
        if let Some(turn) = self.ask(tenant) {
            // The other end is kept until it has answered.
            let _ = turn.recv();
        }
        Turn { turns: self, tenant, began: Instant::now() }
    }

    /// What to wait for, unless there is a turn to be had.
    fn ask(&self, tenant: &TenantName) -> Option<Receiver<()>> {
        let mut state = self.0.lock();
        let State { free, now, accounts } = &mut *state;
        let account = accounts.entry(tenant.clone()).or_default();
        if account.taken == 0 && account.waiting.is_empty() {
            account.used = account.used.max(*now);
        }
        // Whoever waits keeps no turn free.
        if *free > 0 {
            *free -= 1;
            account.taken += 1;
            *now = (*now).max(account.used);
            return None;
        }
        let (give, turn) = bounded(1);
        account.waiting.push_back(give);
        Some(turn)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.0.lock();
        if let Some(account) = state.accounts.get_mut(self.tenant) {
            account.used += self.began.elapsed();
            account.taken -= 1;
        }
        state.pass_on();
        // Who wants nothing and is owed nothing need not be known.
        let now = state.now;
        let owes = |account: &Account| account.taken > 0 || !account.waiting.is_empty() || account.used > now;
        if state.accounts.get(self.tenant).is_some_and(|account| !owes(account)) {
            state.accounts.remove(self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::thread;

    #[test]
    fn a_tenant_with_many_sessions_gets_no_more_than_one_with_one() {
        let turns = Arc::new(Turns::new(1));
        let stop = Arc::new(AtomicBool::new(false));
        let names = ["many", "one"].map(|name| TenantName::new(name).unwrap());
        let counts = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
        let sessions = |which: usize, count: usize| {
            let (turns, stop, name, done) = (turns.clone(), stop.clone(), names[which].clone(), counts[which].clone());
            let work = move || {
                while !stop.load(Ordering::Relaxed) {
                    let _turn = turns.take(&name);
                    thread::sleep(Duration::from_millis(2));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            };
            (0..count).map(|_| thread::spawn(work.clone())).collect::<Vec<_>>()
        };
        let mut threads = sessions(0, 40);
        threads.extend(sessions(1, 1));
        thread::sleep(Duration::from_secs(1));
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let [many, one] = counts.map(|count| count.load(Ordering::Relaxed));
        assert!(one * 3 > many, "{one} turns beside {many} of the other");
        // One session alone can't be ready again at once each time; more than its part it must not get.
        assert!(one <= many + 20, "{one} turns beside {many} of the other");
        assert_eq!(turns.0.lock().free, 1);
    }

    #[test]
    fn who_was_away_makes_up_for_nothing() {
        let turns = Turns::new(1);
        let (a, b) = (TenantName::new("a").unwrap(), TenantName::new("b").unwrap());
        for _ in 0..20 {
            let _turn = turns.take(&a);
            thread::sleep(Duration::from_millis(1));
        }
        drop(turns.take(&b));
        let state = turns.0.lock();
        let used = |name: &TenantName| state.accounts.get(name).map_or(state.now, |account| account.used);
        assert!(used(&b) + Duration::from_millis(10) > used(&a), "b would have {:?} for itself", used(&a) - used(&b));
    }
}
