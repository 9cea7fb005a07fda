//! What is written to a disk of a restore point: copy on write, sealed, and durable when it was flushed.
//!
//! ```text
//! write → block → sealed into a free page ─┐
//! discard → zeros                          ├ map, and what of it has changed      (map, space)
//! read → page, zeros, or the restore point ┘
//! flush → what has changed, as batches of the journal → one fdatasync → the pages that nothing needs are free   (journal)
//! write → told to the journal at once, where a guest outlives the process (`Unflushed`), and durable no sooner   (journal)
//! open → head → batches → map; the last flush counts if all of it is there, one before it that is not is damage (recovery)
//! ```
//!
//! The format is `reseal_format::overlay`. What is told of a flush holds for each moment at which the power may go: what was flushed is
//! there; of what was not, nothing is; a block is old or new.
//!
//! Architecture invariant: a page that the last durable flush needs is not written to. After a sync that failed nobody knows what is
//! durable, so nothing more is answered.

mod journal;
mod map;
mod medium;
mod recovery;
mod space;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock};
use reseal_format::FormatError;
use reseal_format::overlay::{BlockKey, HEADS, OverlayKey, PAGE, PAGE_U64};
use reseal_vault::VaultError;
use reseal_vault::wipe::Secret;

use journal::Journal;
use map::{Content, Dirty, Map, Place};
use space::Space;

pub use medium::Medium;

/// Blocks that are read or written at a time.
const RUN: u64 = 256;
/// Locks that keep two who change parts of one block apart; each is of a stretch of [`RUN`] blocks, and others like it.
const STRIPES: usize = 64;

/// Why an overlay did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("{0}")]
    Base(BaseError),
    /// There was no randomness.
    #[error(transparent)]
    Random(#[from] VaultError),
    #[error("can't {action} the overlay: {source}")]
    Io { action: &'static str, source: io::Error },
    #[error(
        "the overlay is full: it may have no more than it has; raise --overlay-limit, or discard what is not needed"
    )]
    Full,
    #[error("{what} of the overlay {source}")]
    Damaged { what: String, source: FormatError },
    /// The first sequence of what is lost.
    #[error(
        "the journal of the overlay is damaged from batch {sequence} on, and later flushes follow, so what was flushed is not all \
         there: put its file back from a copy, or give it up with `reseal overlay drop` and begin anew from the restore point"
    )]
    Lost { sequence: u64 },
    #[error("the overlay is of another disk: {0}")]
    Another(&'static str),
    #[error(
        "the overlay could not be made durable before, or was closed, so nothing of it is answered any more; open it anew"
    )]
    Broken,
}

impl OverlayError {
    /// Whether there is only no room, which the guest can be told and may do something about.
    pub fn is_full(&self) -> bool {
        match self {
            OverlayError::Full => true,
            OverlayError::Base(_)
            | OverlayError::Random(_)
            | OverlayError::Io { .. }
            | OverlayError::Damaged { .. }
            | OverlayError::Lost { .. }
            | OverlayError::Another(_)
            | OverlayError::Broken => false,
        }
    }
}

/// Whose overlay it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    pub overlay: [u8; 16],
    /// The restore point, and which of its disks.
    pub point: [u8; 16],
    pub disk: u16,
    /// Bytes of the disk.
    pub length: u64,
}

/// Why what is under an overlay can't be read.
pub type BaseError = Box<dyn std::error::Error + Send + Sync>;

/// What is under an overlay: fills the buffer from an offset on.
pub type Base<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), BaseError> + 'a;

/// What becomes of writes that were not flushed when the process ends, and the power does not go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unflushed {
    /// They are lost, as with a power cut.
    #[default]
    Lost,
    /// The journal is told of each write before it is answered, so that whoever opens the overlay next can take them up.
    Kept,
    /// The same, and what the process before had kept is taken up: whoever was told by that one that something is written goes on.
    TakenUp,
}

/// What is at some bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// It was written.
    Data,
    /// It was discarded.
    Zeros,
    /// It is as in the restore point.
    Base,
}

struct State {
    map: Map,
    dirty: Dirty,
    space: Space,
}

/// An overlay that is open.
pub struct Overlay<M> {
    medium: M,
    facts: Facts,
    key: OverlayKey,
    /// By their number; the last one is this.
    sessions: Vec<BlockKey>,
    counter: AtomicU64,
    state: RwLock<State>,
    /// Held while something is flushed.
    journal: Mutex<Journal>,
    stripes: Vec<Mutex<()>>,
    is_broken: AtomicBool,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> OverlayError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OverlayError::Full,
        _ => OverlayError::Io { action, source },
    }
}

impl<M: Medium> Overlay<M> {
    /// Makes an overlay on an empty medium, which may have at most about `limit` bytes.
    pub fn create(medium: M, key: OverlayKey, facts: Facts, limit: u64) -> Result<Overlay<M>, OverlayError> {
        Overlay::create_keeping(medium, key, facts, limit, Unflushed::Lost)
    }

    /// The same, where it matters what becomes of writes that are not flushed.
    pub fn create_keeping(
        medium: M,
        key: OverlayKey,
        facts: Facts,
        limit: u64,
        unflushed: Unflushed,
    ) -> Result<Overlay<M>, OverlayError> {
        recovery::create(&medium, &key, &facts)?;
        Overlay::open_keeping(medium, key, facts, limit, unflushed)
    }

    /// Opens an overlay, with all that was flushed.
    pub fn open(medium: M, key: OverlayKey, facts: Facts, limit: u64) -> Result<Overlay<M>, OverlayError> {
        Overlay::open_keeping(medium, key, facts, limit, Unflushed::Lost)
    }

    /// The same, where it matters what becomes of writes that are not flushed.
    pub fn open_keeping(
        medium: M,
        key: OverlayKey,
        facts: Facts,
        limit: u64,
        unflushed: Unflushed,
    ) -> Result<Overlay<M>, OverlayError> {
        let recovered = recovery::recover(&medium, &key, &facts, unflushed == Unflushed::TakenUp)?;
        let untold = (unflushed != Unflushed::Lost).then(map::Untold::default);
        let mut space = Space::new(limit / PAGE_U64);
        space.take(0, HEADS);
        let pages = recovered.journal.chunks().chain(recovered.map.blocks().map(|(_, place)| (place.page, 1)));
        for (first, count) in pages {
            if !space.take(first, count) {
                let source = FormatError::Malformed("a page is used twice");
                return Err(OverlayError::Damaged { what: format!("page {first}"), source });
            }
        }
        let sessions = recovered.sessions.iter().map(|salt| BlockKey::new(&key, &facts.overlay, salt)).collect();
        let overlay = Overlay {
            medium,
            facts,
            key,
            sessions,
            counter: AtomicU64::new(0),
            state: RwLock::new(State { map: recovered.map, dirty: Dirty { untold, ..Dirty::default() }, space }),
            journal: Mutex::new(recovered.journal),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            is_broken: AtomicBool::new(false),
        };
        if recovered.lacks_head {
            overlay.journal.lock().put_head(&overlay)?;
        }
        // The session is known before anything is sealed in it, and what a flush that did not happen left there is overwritten.
        overlay.journal.lock().begin_session(&overlay)?;
        Ok(overlay)
    }

    /// Whose it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Bytes that it takes.
    pub fn used(&self) -> u64 {
        self.state.read().space.used() * PAGE_U64
    }

    /// Bytes of the disk that are in it.
    pub fn written(&self) -> u64 {
        self.state.read().map.len() as u64 * PAGE_U64
    }

    /// Whether it still answers.
    pub fn check(&self) -> Result<(), OverlayError> {
        match self.is_broken.load(Ordering::Acquire) {
            true => Err(OverlayError::Broken),
            false => Ok(()),
        }
    }

    fn breaks(&self) {
        self.is_broken.store(true, Ordering::Release);
    }

    /// How many bytes of a block are on the disk: the last may be partly past its end.
    fn part(&self, block: u64) -> usize {
        usize::try_from(self.facts.length.saturating_sub(block * PAGE_U64)).map_or(PAGE, |rest| rest.min(PAGE))
    }

    fn lock(&self, first: u64, end: u64) -> Vec<MutexGuard<'_, ()>> {
        let mut stripes: Vec<usize> = (first / RUN..end.div_ceil(RUN))
            .take(STRIPES)
            .map(|stretch| usize::try_from(stretch % STRIPES as u64).unwrap_or(0))
            .collect();
        // All take them in one order.
        stripes.sort_unstable();
        stripes.dedup();
        stripes.into_iter().map(|stripe| self.stripes[stripe].lock()).collect()
    }

    /// Fills `out` from `offset` on.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn read(&self, offset: u64, out: &mut [u8], base: &Base<'_>) -> Result<(), OverlayError> {
        assert!(offset + out.len() as u64 <= self.facts.length, "the caller clips a range to the disk");
        self.check()?;
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let block = at / PAGE_U64;
            let end = (offset + out.len() as u64).div_ceil(PAGE_U64).min(block + RUN);
            let (content, border, places) = {
                let state = self.state.read();
                let (content, border) = (state.map.content(block), state.map.border(block, end));
                let places: Vec<Place> = match content {
                    Content::Here(_) => (block..border).filter_map(|block| state.map.place(block)).collect(),
                    Content::Zeros | Content::Base => Vec::new(),
                };
                (content, border, places)
            };
            let length = usize::try_from(border * PAGE_U64 - at).unwrap_or(usize::MAX).min(out.len() - done);
            let part = &mut out[done..done + length];
            match content {
                Content::Base => base(at, part).map_err(OverlayError::Base)?,
                Content::Zeros => part.fill(0),
                Content::Here(_) => {
                    // What was moved while it was read is looked up again.
                    let read = self.read_places(block, &places, at, part)?;
                    done += read;
                    continue;
                }
            }
            done += length;
        }
        Ok(())
    }

    /// Reads blocks from their places into `out`, which begins at byte `at`; how many bytes, fewer where a block has another place by
    /// now.
    fn read_places(&self, first: u64, places: &[Place], at: u64, out: &mut [u8]) -> Result<usize, OverlayError> {
        let mut sealed = Vec::new();
        let mut plain = Secret(vec![0; PAGE]);
        let (mut nth, mut done) = (0, 0);
        while nth < places.len() && done < out.len() {
            let run =
                places[nth..].iter().zip(places[nth].page..).take_while(|(place, page)| place.page == *page).count();
            sealed.resize(run * PAGE, 0);
            self.medium.read_at(places[nth].page * PAGE_U64, &mut sealed).map_err(failed("read"))?;
            for (place, sealed) in places[nth..nth + run].iter().zip(sealed.chunks_exact(PAGE)) {
                let block = first + nth as u64;
                nth += 1;
                let within = usize::try_from((at + done as u64) % PAGE_U64).unwrap_or(0);
                let length = (PAGE - within).min(out.len() - done);
                let target = &mut out[done..done + length];
                let opened = match length == PAGE {
                    true => self.open_block(block, place, sealed, target),
                    false => self.open_block(block, place, sealed, &mut plain.0),
                };
                match opened {
                    Ok(()) if length < PAGE => target.copy_from_slice(&plain.0[within..within + length]),
                    Ok(()) => {}
                    Err(_) if self.state.read().map.place(block) != Some(*place) => return Ok(done),
                    Err(source) => {
                        return Err(OverlayError::Damaged { what: format!("block {block}"), source });
                    }
                }
                done += length;
            }
        }
        Ok(done)
    }

    fn open_block(&self, block: u64, place: &Place, sealed: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
        let session = usize::try_from(place.session).ok().and_then(|session| self.sessions.get(session));
        let session = session.ok_or(FormatError::Malformed("is sealed in a session that is not known"))?;
        session.open(place.counter, block, &place.tag, sealed, out)
    }

    /// Writes at `offset`. It is durable with the next flush.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn write(&self, offset: u64, bytes: &[u8], base: &Base<'_>) -> Result<(), OverlayError> {
        assert!(offset + bytes.len() as u64 <= self.facts.length, "the caller clips a range to the disk");
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let end = (at / RUN / PAGE_U64 + 1) * RUN * PAGE_U64;
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(bytes.len() - done);
            self.write_run(at, &bytes[done..done + length], base)?;
            done += length;
        }
        self.tell()
    }

    /// Tells the journal of what was written, if it is to know that before the next flush.
    fn tell(&self) -> Result<(), OverlayError> {
        let is_untold = self.state.read().dirty.untold.as_ref().is_some_and(|untold| !untold.is_empty());
        if is_untold { self.journal.lock().tell(self) } else { Ok(()) }
    }

    /// Writes what is within one stretch.
    fn write_run(&self, offset: u64, bytes: &[u8], base: &Base<'_>) -> Result<(), OverlayError> {
        self.check()?;
        let (first, end) = (offset / PAGE_U64, (offset + bytes.len() as u64).div_ceil(PAGE_U64));
        let _stripes = self.lock(first, end);
        let within = usize::try_from(offset - first * PAGE_U64).unwrap_or(0);
        let count = usize::try_from(end - first).unwrap_or(0);
        let mut blocks = Secret(vec![0; count * PAGE]);
        // What of the first and the last block is not written stays.
        let last = end - 1;
        if within > 0 {
            self.read(first * PAGE_U64, &mut blocks.0[..self.part(first)], base)?;
        }
        let rest = (count - 1) * PAGE + self.part(last) - (within + bytes.len());
        if rest > 0 && (last > first || within == 0) {
            let from = (count - 1) * PAGE;
            self.read(last * PAGE_U64, &mut blocks.0[from..from + self.part(last)], base)?;
        }
        blocks.0[within..within + bytes.len()].copy_from_slice(bytes);
        self.put_blocks(first, &mut blocks.0)
    }

    /// Seals blocks into pages, and maps them.
    fn put_blocks(&self, mut block: u64, mut blocks: &mut [u8]) -> Result<(), OverlayError> {
        let number = u32::try_from(self.sessions.len() - 1).unwrap_or(u32::MAX);
        let session = &self.sessions[self.sessions.len() - 1];
        while !blocks.is_empty() {
            let wanted = (blocks.len() / PAGE) as u64;
            let (page, count) = self.state.write().space.allocate(wanted).ok_or(OverlayError::Full)?;
            let (run, rest) = blocks.split_at_mut(usize::try_from(count).unwrap_or(0) * PAGE);
            blocks = rest;
            let counter = self.counter.fetch_add(count, Ordering::Relaxed);
            let tags: Vec<_> = run
                .chunks_exact_mut(PAGE)
                .zip(counter..)
                .zip(block..)
                .map(|((bytes, counter), block)| session.seal(counter, block, bytes))
                .collect();
            if let Err(e) = self.medium.write_at(page * PAGE_U64, run) {
                self.state.write().space.release(page, count);
                return Err(failed("write to")(e));
            }
            let mut state = self.state.write();
            let State { map, dirty, space } = &mut *state;
            for (nth, tag) in (0..).zip(tags) {
                let place = Place { page: page + nth, session: number, counter: counter + nth, tag };
                let before = map.put(block + nth, place);
                if let Some(page) = dirty.write(block + nth, before.map(|before| before.page)) {
                    space.release(page, 1);
                }
            }
            block += count;
        }
        Ok(())
    }

    /// Makes bytes zeros, and gives back the room of whole blocks with the next flush.
    pub fn zero(&self, offset: u64, length: u64, base: &Base<'_>) -> Result<(), OverlayError> {
        let end = offset + length;
        assert!(end <= self.facts.length, "the caller clips a range to the disk");
        let (first, last) = (offset.div_ceil(PAGE_U64), self.whole_end(end));
        if first >= last {
            let zeros = vec![0; usize::try_from(length).unwrap_or(0)];
            return self.write(offset, &zeros, base);
        }
        let zeros = [0; PAGE];
        let before = usize::try_from(first * PAGE_U64 - offset).unwrap_or(0);
        self.write(offset, &zeros[..before], base)?;
        let after = end.saturating_sub(last * PAGE_U64);
        self.write(end - after, &zeros[..usize::try_from(after).unwrap_or(0)], base)?;
        self.clear(first, last)
    }

    /// Gives back the room of the whole blocks of a range, which then read as zeros.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), OverlayError> {
        let end = offset + length;
        assert!(end <= self.facts.length, "the caller clips a range to the disk");
        self.clear(offset.div_ceil(PAGE_U64), self.whole_end(end))
    }

    /// The end of the whole blocks before a byte; at the disk's end the last counts as whole.
    fn whole_end(&self, end: u64) -> u64 {
        if end == self.facts.length { end.div_ceil(PAGE_U64) } else { end / PAGE_U64 }
    }

    fn clear(&self, first: u64, end: u64) -> Result<(), OverlayError> {
        self.check()?;
        if first >= end {
            return Ok(());
        }
        {
            let _stripes = self.lock(first, end);
            let mut state = self.state.write();
            let State { map, dirty, space } = &mut *state;
            let had = map.clear(first, end);
            dirty.clear(first, end, &had).into_iter().for_each(|page| space.release(page, 1));
        }
        self.tell()
    }

    /// Makes all durable that was written before.
    pub fn flush(&self) -> Result<(), OverlayError> {
        let mut journal = self.journal.lock();
        self.check()?;
        journal.flush(self)
    }

    /// Makes all durable, and says that this was the end: what is damaged from here on is known as damage, and not taken for a flush that
    /// did not happen. Whoever still uses it gets errors.
    pub fn close(&self) -> Result<(), OverlayError> {
        self.flush()?;
        let mut journal = self.journal.lock();
        self.check()?;
        let ended = journal.end_session(self);
        self.breaks();
        ended
    }

    /// What is at `offset`, and up to which byte, at most `end`, it is the same.
    pub fn layer(&self, offset: u64, end: u64) -> (Layer, u64) {
        let (block, last) = (offset / PAGE_U64, end.min(self.facts.length).div_ceil(PAGE_U64));
        let state = self.state.read();
        let layer = match state.map.content(block) {
            Content::Here(_) => Layer::Data,
            Content::Zeros => Layer::Zeros,
            Content::Base => Layer::Base,
        };
        (layer, (state.map.border(block, last) * PAGE_U64).min(end))
    }
}
