//! Clients, each on a thread of its own, until somebody wants the end.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use reseal_nbd::server::{Connection, Owner, Service, Stopper};

use super::listen::Listener;
use crate::journal::Journal;

/// Clients at once. `nbdcopy` and `qemu-img` take up to eight connections each; more than these wait to be accepted.
const CLIENTS: usize = 128;
/// How long the end may take: a client's thread may hang in a store that does not answer.
const ENDING: Duration = Duration::from_secs(5);
/// A pause after a client could not be accepted, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Tells the journal what goes wrong.
pub struct JournalOwner(pub Arc<Journal>);

impl Owner for JournalOwner {
    fn failed(&self, what: &str) {
        self.0.say(what);
    }
}

#[derive(Default)]
struct Clients {
    stoppers: HashMap<u64, Stopper>,
    next: u64,
    ending: bool,
}

/// What the threads share.
struct Shared {
    service: Service,
    journal: Arc<Journal>,
    clients: Mutex<Clients>,
    changed: Condvar,
}

/// A server that takes clients.
pub struct NbdServer {
    shared: Arc<Shared>,
}

impl NbdServer {
    pub fn new(service: Service, journal: Arc<Journal>) -> NbdServer {
        let (clients, changed) = (Mutex::default(), Condvar::new());
        NbdServer { shared: Arc::new(Shared { service, journal, clients, changed }) }
    }

    /// Something that ends it when it is called, from any thread.
    pub fn stopper(&self) -> impl Fn() + Send + 'static + use<> {
        let shared = self.shared.clone();
        move || {
            shared.clients.lock().ending = true;
            shared.changed.notify_all();
        }
    }

    /// Serves until it is stopped. Then no client is served any more, whatever it waits for.
    pub fn run(self, listener: &Arc<Listener>) -> io::Result<()> {
        let (shared, accepting) = (self.shared.clone(), listener.clone());
        thread::Builder::new().name("accept".into()).spawn(move || accept(&shared, &accepting))?;
        let Shared { clients, changed, .. } = &*self.shared;
        let mut clients = clients.lock();
        while !clients.ending {
            changed.wait(&mut clients);
        }
        clients.stoppers.values().for_each(Stopper::stop);
        let until = Instant::now() + ENDING;
        while !clients.stoppers.is_empty() && !changed.wait_until(&mut clients, until).timed_out() {}
        Ok(())
    }
}

fn accept(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        {
            let mut clients = shared.clients.lock();
            while clients.stoppers.len() >= CLIENTS && !clients.ending {
                shared.changed.wait(&mut clients);
            }
            if clients.ending {
                return;
            }
        }
        match listener.accept() {
            Ok((connection, peer)) => begin(shared, connection, peer),
            Err(error) => {
                shared.journal.say(&format!("can't accept a client: {error}"));
                thread::sleep(PAUSE);
            }
        }
    }
}

/// Counts a client for as long as it lives.
struct Client {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.clients.lock().stoppers.remove(&self.number);
        self.shared.changed.notify_all();
    }
}

fn begin(shared: &Arc<Shared>, connection: Connection, peer: Option<IpAddr>) {
    let client = {
        let mut clients = shared.clients.lock();
        if clients.ending {
            return;
        }
        let number = clients.next;
        clients.next += 1;
        clients.stoppers.insert(number, connection.stopper());
        Client { shared: shared.clone(), number }
    };
    let serve = move || {
        let shared = &client.shared;
        if let Err(error) = connection.serve(&shared.service) {
            let from = peer.map_or_else(String::new, |peer| format!(" at {peer}"));
            shared.journal.say(&format!("a client{from}: {error}"));
        }
    };
    if let Err(error) = thread::Builder::new().name("client".into()).spawn(serve) {
        shared.journal.say(&format!("can't start a thread for a client: {error}"));
    }
}
