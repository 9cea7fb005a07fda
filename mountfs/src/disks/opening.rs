//! A disk of another site with connections to it: what was asked for and has not come, and the pumps that fetch it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64};
use reseal_nbd::{Export, Extent, NbdError, Read, Request, Taker};
use reseal_vault::Class;
use zeroize::Zeroizing;

use super::block::{Block, BlockKey, Slot, bytes_of};
use super::remote::RemoteDisk;
use super::trouble::Trouble;

/// Blocks of one request: as much as the client asks for at once.
const BLOCKS: u64 = 4;
/// First wait before a site that is not there is asked again; it is doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
const NAP: Duration = Duration::from_millis(50);
const STACK: usize = 512 * 1024;

/// The blocks that a request is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    first: u64,
    count: u64,
}

struct State {
    /// Closed when it is dropped: what was asked for until then is still answered.
    requests: Option<Sender<Request<Flight>>>,
    flying: HashMap<u64, Arc<Slot>>,
    /// Why nothing more comes.
    over: Option<Trouble>,
    /// Pumps that were started; one that finds no connection is not started again.
    started: usize,
    /// Those that run.
    running: usize,
}

/// A disk that is open, or being opened.
pub(super) struct Opening {
    disk: Arc<RemoteDisk>,
    state: Mutex<State>,
    queue: Receiver<Request<Flight>>,
    export: OnceLock<Export>,
    /// Requests that are not answered, and their bytes.
    under_way: AtomicUsize,
    bytes_under_way: AtomicUsize,
}

/// Blocks that were asked for, and where they will be.
pub(super) type Asked = Vec<(u64, Arc<Slot>)>;

impl Opening {
    /// Begins to open a disk. What is asked for meanwhile waits.
    pub(super) fn begin(disk: &Arc<RemoteDisk>) -> std::io::Result<Arc<Opening>> {
        // What is in it is bounded by those who wait, and by how much may be read ahead.
        let (requests, queue) = unbounded();
        let state = State { requests: Some(requests), flying: HashMap::new(), over: None, started: 1, running: 1 };
        let opening = Arc::new(Opening {
            disk: disk.clone(),
            state: Mutex::new(state),
            queue,
            export: OnceLock::new(),
            under_way: AtomicUsize::new(0),
            bytes_under_way: AtomicUsize::new(0),
        });
        let started = opening.clone();
        spawn(move || {
            started.disk.site.pumps.fetch_add(1, Ordering::Relaxed);
            match started.open() {
                Ok(export) => {
                    let export = started.export.get_or_init(|| export);
                    started.start_more(export);
                    started.pump(export);
                }
                Err(trouble) => {
                    started.end(&trouble);
                    started.pump_ended();
                }
            }
        })?;
        Ok(opening)
    }

    /// Opens the disk. A site that is not there is asked again as long as readers wait.
    fn open(&self) -> Result<Export, Trouble> {
        let (site, disk) = (&self.disk.site, &self.disk);
        let until = Instant::now() + site.limit;
        let mut wait = FIRST_WAIT;
        let export = loop {
            let trouble = match site.opens.open(&disk.vm, disk.number, &disk.name) {
                Ok(export) => break export,
                Err(error) => Trouble::opening(&error),
            };
            if !trouble.is_unreachable() || Instant::now() + wait >= until || !self.nap(wait) {
                return Err(trouble);
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        };
        match export.length() == disk.length {
            true => Ok(export),
            false => {
                let (length, has) = (disk.length, export.length());
                let message = format!("{} has {has} bytes, but {length} by its restore point", export.name());
                Err(Trouble::new(Class::Damaged, message))
            }
        }
    }

    /// Waits, unless that has become pointless.
    fn nap(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        while Instant::now() < until {
            if self.disk.site.is_stopped() || self.state.lock().requests.is_none() {
                return false;
            }
            thread::sleep(NAP);
        }
        true
    }

    /// Whether it is of no use any more.
    pub(super) fn is_over(&self) -> bool {
        let state = self.state.lock();
        state.over.is_some() || state.requests.is_none()
    }

    /// Whether something that was asked for has not come.
    pub(super) fn is_busy(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0
    }

    /// Closes its connections when what was asked for has come.
    pub(super) fn close(&self) {
        self.state.lock().requests = None;
    }

    /// Closes its connections now.
    pub(super) fn stop(&self) {
        self.close();
        if let Some(export) = self.export.get() {
            export.stop();
        }
    }

    /// Asks for those of the blocks that are neither here nor on their way; where each that is not here will be.
    pub(super) fn ask(self: &Arc<Self>, blocks: Range<u64>) -> Result<Asked, Trouble> {
        let mut asked = Vec::new();
        let mut new: Vec<Flight> = Vec::new();
        let mut state = self.state.lock();
        let requests = self.open_state(&state)?;
        for number in blocks {
            if let Some(slot) = state.flying.get(&number) {
                asked.push((number, slot.clone()));
                continue;
            }
            // What has come is kept before it stops flying, so it can't be missed between the two.
            if self.disk.is_known(number) {
                continue;
            }
            let slot = Arc::<Slot>::default();
            state.flying.insert(number, slot.clone());
            asked.push((number, slot));
            match new.last_mut() {
                Some(last) if last.first + last.count == number && last.count < BLOCKS => last.count += 1,
                _ => new.push(Flight { first: number, count: 1 }),
            }
        }
        for flight in new {
            self.send(&requests, flight);
        }
        drop(state);
        self.start_helpers();
        Ok(asked)
    }

    /// Asks what is at these bytes.
    pub(super) fn ask_extents(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
    ) -> Result<Receiver<Result<Vec<Extent>, NbdError>>, Trouble> {
        let (answer, answers) = bounded(1);
        let state = self.state.lock();
        // It can't be closed: this has the other end.
        let _ = self.open_state(&state)?.send(Request::Status { offset, length, answer });
        Ok(answers)
    }

    /// Why an answer did not come.
    pub(super) fn trouble(&self) -> Trouble {
        self.state.lock().over.clone().unwrap_or_else(|| Trouble::closed(&self.disk.site.place))
    }

    fn open_state(&self, state: &State) -> Result<Sender<Request<Flight>>, Trouble> {
        match (&state.over, &state.requests) {
            (Some(over), _) => Err(over.clone()),
            (None, None) => Err(Trouble::closed(&self.disk.site.place)),
            (None, Some(requests)) => Ok(requests.clone()),
        }
    }

    fn send(&self, requests: &Sender<Request<Flight>>, flight: Flight) {
        let bytes = self.bytes(flight);
        let length = usize::try_from(bytes.end - bytes.start).unwrap_or(0);
        self.under_way.fetch_add(1, Ordering::Relaxed);
        self.bytes_under_way.fetch_add(length, Ordering::Relaxed);
        self.disk.site.flying.fetch_add(length, Ordering::Relaxed);
        let read = Read { offset: bytes.start, buffer: Zeroizing::new(vec![0; length]), tag: flight };
        // It can't be closed: this has the other end.
        let _ = requests.send(Request::Read(read));
    }

    fn bytes(&self, flight: Flight) -> Range<u64> {
        let last = bytes_of(flight.first + flight.count - 1, self.disk.length);
        flight.first * CLUSTER_U64..last.end
    }

    /// Notes that a request is answered.
    fn landed(&self, flight: Flight) {
        let bytes = self.bytes(flight);
        let length = usize::try_from(bytes.end - bytes.start).unwrap_or(0);
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        self.bytes_under_way.fetch_sub(length, Ordering::Relaxed);
        self.disk.site.flying.fetch_sub(length, Ordering::Relaxed);
    }

    /// More connections, if there is more to do than those that there are do at once.
    fn start_helpers(self: &Arc<Self>) {
        if let Some(export) = self.export.get() {
            self.start_more(export);
        }
    }

    fn start_more(self: &Arc<Self>, export: &Export) {
        loop {
            {
                let mut state = self.state.lock();
                let is_enough = state.running >= self.under_way.load(Ordering::Relaxed)
                    || state.started >= export.connections()
                    || state.over.is_some()
                    || state.requests.is_none()
                    || !self.disk.site.has_room_for_pump();
                if is_enough {
                    return;
                }
                state.started += 1;
                state.running += 1;
            }
            self.disk.site.pumps.fetch_add(1, Ordering::Relaxed);
            let helper = self.clone();
            let started = spawn(move || {
                if let Some(export) = helper.export.get() {
                    helper.pump(export);
                }
            });
            if started.is_err() {
                // Those that there are go on.
                return self.pump_ended();
            }
        }
    }

    fn pump(&self, export: &Export) {
        export.pump(&self.queue, self);
        self.pump_ended();
    }

    fn pump_ended(&self) {
        self.disk.site.pumps.fetch_sub(1, Ordering::Relaxed);
        let is_last = {
            let mut state = self.state.lock();
            state.running -= 1;
            state.running == 0
        };
        if is_last {
            self.end(&Trouble::closed(&self.disk.site.place));
            // What pumps had taken and did not answer is lost with them.
            self.under_way.store(0, Ordering::Relaxed);
            self.disk.site.flying.fetch_sub(self.bytes_under_way.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Tells all who wait that nothing more comes.
    fn end(&self, trouble: &Trouble) {
        let waiting = {
            let mut state = self.state.lock();
            state.requests = None;
            state.over.get_or_insert_with(|| trouble.clone());
            std::mem::take(&mut state.flying)
        };
        // Nobody adds to it any more. Who asked for extents learns of it as his channel closes.
        while let Ok(request) = self.queue.try_recv() {
            if let Request::Read(read) = request {
                self.landed(read.tag);
            }
        }
        for slot in waiting.into_values() {
            slot.fill(Err(trouble.clone()));
        }
    }

    fn fill(&self, number: u64, answer: Result<Arc<Block>, Trouble>) {
        if let Ok(block) = &answer {
            self.disk.site.blocks.put(BlockKey { disk: self.disk.key, number }, block.clone());
        }
        let slot = self.state.lock().flying.remove(&number);
        if let Some(slot) = slot {
            slot.fill(answer);
        }
    }
}

impl Taker<Flight> for Opening {
    fn read(&self, mut read: Read<Flight>) -> bool {
        let flight = read.tag;
        self.landed(flight);
        match flight.count {
            1 => self.fill(flight.first, Ok(Arc::new(Block::of(std::mem::take(&mut *read.buffer))))),
            _ => {
                for (number, bytes) in (flight.first..).zip(read.buffer.chunks(CLUSTER)) {
                    self.fill(number, Ok(Arc::new(Block::of(bytes.to_vec()))));
                }
            }
        }
        !self.disk.site.is_stopped()
    }

    fn outlives_failures(&self) -> bool {
        true
    }

    fn failed(&self, flight: Flight, error: NbdError) {
        self.landed(flight);
        let trouble = Trouble::reading(&error);
        let blocks = flight.first..flight.first + flight.count;
        if flight.count > 1 {
            // One of them can't be read; the others must not be lost with it.
            let state = self.state.lock();
            if let Some(requests) = &state.requests {
                return blocks.for_each(|first| self.send(requests, Flight { first, count: 1 }));
            }
        }
        blocks.for_each(|number| self.fill(number, Err(trouble.clone())));
    }

    fn over(&self, error: NbdError) {
        self.end(&Trouble::ended(&error));
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    thread::Builder::new().name("site-disk".into()).stack_size(STACK).spawn(run).map(drop)
}
