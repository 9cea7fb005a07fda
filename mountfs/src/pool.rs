//! Requests that may have to wait for the store: a bounded pool of threads, and a deadline for each request.
//!
//! A request is handed over with its reply. Whoever comes first takes the reply: the worker with an answer, or the reaper
//! with a refusal when the deadline has passed. A worker that hangs in the store holds up nobody but itself: what waits
//! behind it is refused in time, and when the store is back the worker goes on.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::errno::Fault;

/// Requests that wait for a worker, at most; what comes on top is refused at once. More than the kernel sends by itself
/// (its background requests are limited), so only a crowd of stuck readers gets here.
const WAITING: usize = 4096;
/// Workers need little: their buffers are on the heap.
const STACK: usize = 512 * 1024;

/// A reply that can be refused.
pub trait Refuse: Send + 'static {
    /// Answers with an error.
    fn refuse(self, fault: &Fault);
}

type Job = Box<dyn FnOnce() + Send>;

/// The pool.
pub struct Pool {
    jobs: Sender<Job>,
    deadlines: Arc<Deadlines>,
}

impl Pool {
    /// A pool of so many workers, where each request is answered within `timeout`.
    pub fn new(workers: usize, timeout: Duration) -> std::io::Result<Pool> {
        let (jobs, queue) = bounded::<Job>(WAITING);
        for nth in 0..workers {
            let queue = queue.clone();
            thread::Builder::new().name(format!("store-{nth}")).stack_size(STACK).spawn(move || work(&queue))?;
        }
        let deadlines = Arc::new(Deadlines::new(timeout));
        let watched = Arc::downgrade(&deadlines);
        thread::Builder::new().name("reaper".into()).stack_size(STACK).spawn(move || {
            while let Some(rest) = watched.upgrade().map(|deadlines| deadlines.reap()) {
                thread::sleep(rest);
            }
        })?;
        Ok(Pool { jobs, deadlines })
    }

    /// How long a request may wait.
    pub fn timeout(&self) -> Duration {
        self.deadlines.timeout
    }

    /// Runs `work` on a worker, unless the deadline comes first.
    pub fn submit<R: Refuse>(&self, reply: R, work: impl FnOnce(Ticket<R>) + Send + 'static) {
        let ticket = match self.deadlines.admit(reply) {
            Ok(ticket) => ticket,
            Err(reply) => return reply.refuse(&Fault::Ending),
        };
        let slot = ticket.reply.clone();
        // A request that nobody waits for any more is not begun.
        let job = Box::new(move || {
            if ticket.is_waited_for() {
                work(ticket);
            }
        });
        if let Err(_unsent) = self.jobs.try_send(job)
            && let Some(reply) = take(&slot)
        {
            reply.refuse(&Fault::Crowded);
        }
    }

    /// Refuses all that waits, and all that comes from now on.
    pub fn close(&self) {
        self.deadlines.close();
    }
}

/// The reply, if nobody has taken it yet. The lock is not held while it is used.
fn take<R>(slot: &Mutex<Option<R>>) -> Option<R> {
    slot.lock().take()
}

fn work(queue: &Receiver<Job>) {
    while let Ok(job) = queue.recv() {
        // A panic is a fault of this program; the request that met it is refused as its ticket is dropped, others go on.
        let _ = catch_unwind(AssertUnwindSafe(job));
    }
}

/// The right to answer a request, as long as its deadline has not passed.
pub struct Ticket<R: Refuse> {
    reply: Arc<Mutex<Option<R>>>,
    number: u64,
    deadlines: Arc<Deadlines>,
}

impl<R: Refuse> Ticket<R> {
    /// Whether it has not been refused.
    pub fn is_waited_for(&self) -> bool {
        self.reply.lock().is_some()
    }

    /// Gives the reply to `answer`, unless it was refused.
    pub fn answer(self, answer: impl FnOnce(R)) {
        if let Some(reply) = self.take() {
            answer(reply);
        }
    }

    fn take(&self) -> Option<R> {
        self.deadlines.waiting.lock().remove(&self.number);
        take(&self.reply)
    }
}

impl<R: Refuse> Drop for Ticket<R> {
    fn drop(&mut self) {
        if let Some(reply) = self.take() {
            reply.refuse(&Fault::Died);
        }
    }
}

/// Refuses a request with what is given, if it was not answered.
type Refusal = Box<dyn FnOnce(&Fault) + Send>;

struct Deadlines {
    timeout: Duration,
    /// By number: all requests have the same time, so they are also in the order of their deadlines.
    waiting: Mutex<BTreeMap<u64, (Instant, Refusal)>>,
    next: AtomicU64,
    closed: AtomicBool,
}

impl Deadlines {
    fn new(timeout: Duration) -> Deadlines {
        Deadlines { timeout, waiting: Mutex::default(), next: AtomicU64::new(0), closed: AtomicBool::new(false) }
    }

    fn admit<R: Refuse>(self: &Arc<Self>, reply: R) -> Result<Ticket<R>, R> {
        let slot = Arc::new(Mutex::new(Some(reply)));
        let refusal: Refusal = Box::new({
            let slot = slot.clone();
            move |fault| {
                if let Some(reply) = take(&slot) {
                    reply.refuse(fault);
                }
            }
        });
        let mut waiting = self.waiting.lock();
        if self.closed.load(Ordering::Acquire) {
            return Err(take(&slot).expect("nobody else has this slot yet"));
        }
        // Numbered under the lock, so that the order of the numbers is that of the deadlines.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        waiting.insert(number, (Instant::now() + self.timeout, refusal));
        Ok(Ticket { reply: slot, number, deadlines: self.clone() })
    }

    /// Refuses what is overdue; how long it is until something else may be.
    fn reap(&self) -> Duration {
        let now = Instant::now();
        let mut overdue = Vec::new();
        let rest = {
            let mut waiting = self.waiting.lock();
            while let Some(first) = waiting.first_entry().filter(|first| first.get().0 <= now) {
                overdue.push(first.remove().1);
            }
            // No request that comes meanwhile is overdue before one timeout has passed, so none needs to wake the reaper,
            // which would cost each a task switch. It also looks now and then whether the pool is still there.
            let idle = self.timeout.min(Duration::from_secs(1));
            waiting.first_key_value().map_or(idle, |(_, (deadline, _))| idle.min(*deadline - now))
        };
        for refuse in overdue {
            refuse(&Fault::Deadline(self.timeout));
        }
        rest
    }

    fn close(&self) {
        let all = {
            let mut waiting = self.waiting.lock();
            self.closed.store(true, Ordering::Release);
            std::mem::take(&mut *waiting)
        };
        for (_, (_, refuse)) in all {
            refuse(&Fault::Ending);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reply that sends what became of it.
    struct Reply(mpsc::Sender<String>);

    impl Refuse for Reply {
        fn refuse(self, fault: &Fault) {
            self.0.send(fault.to_string()).unwrap();
        }
    }

    fn pool(timeout: u64) -> Pool {
        Pool::new(2, Duration::from_millis(timeout)).unwrap()
    }

    #[test]
    fn hanging_workers_cost_each_request_its_deadline_and_no_more() {
        let pool = pool(100);
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (sender, answers) = mpsc::channel();
        let began = Instant::now();
        for _ in 0..20 {
            let gate = gate.clone();
            pool.submit(Reply(sender.clone()), move |ticket| {
                let _ = gate.lock().recv();
                ticket.answer(|reply| reply.0.send("answered".into()).unwrap());
            });
        }
        for _ in 0..20 {
            assert_eq!(answers.recv().unwrap(), "the store did not answer within 0.1 s");
        }
        assert!(began.elapsed() < Duration::from_secs(2));
        assert!(answers.try_recv().is_err(), "each is refused once");
        drop(open);
        pool.submit(Reply(sender), |ticket| ticket.answer(|reply| reply.0.send("works again".into()).unwrap()));
        assert_eq!(answers.recv().unwrap(), "works again");
        assert!(answers.recv_timeout(Duration::from_millis(50)).is_err(), "late answers go nowhere");
    }

    #[test]
    fn a_panic_refuses_its_own_request_only() {
        let pool = pool(10_000);
        let (sender, answers) = mpsc::channel();
        for _ in 0..4 {
            pool.submit(Reply(sender.clone()), |_ticket| panic!("a fault of this program"));
            assert_eq!(answers.recv().unwrap(), "a worker died");
        }
        pool.submit(Reply(sender), |ticket| ticket.answer(|reply| reply.0.send("fine".into()).unwrap()));
        assert_eq!(answers.recv().unwrap(), "fine");
    }

    #[test]
    fn closing_refuses_what_waits_and_what_comes() {
        let pool = pool(60_000);
        let (_open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (sender, answers) = mpsc::channel();
        for _ in 0..5 {
            let gate = gate.clone();
            pool.submit(Reply(sender.clone()), move |_ticket| {
                let _ = gate.lock().recv();
            });
        }
        pool.close();
        pool.submit(Reply(sender), |_ticket| ());
        for _ in 0..6 {
            assert_eq!(answers.recv().unwrap(), "the mount is ending");
        }
    }

    #[test]
    fn a_crowd_is_refused_at_once() {
        let pool = pool(60_000);
        let (_open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (sender, answers) = mpsc::channel();
        for _ in 0..WAITING + 10 {
            let gate = gate.clone();
            pool.submit(Reply(sender.clone()), move |_ticket| {
                let _ = gate.lock().recv();
            });
        }
        assert_eq!(answers.recv().unwrap(), "too many requests wait for the store already");
        pool.close();
    }
}
