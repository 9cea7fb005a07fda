//! The journal: what has changed, flush by flush, and all of it anew when it has become long.

use std::collections::BTreeSet;

use reseal_format::keys::KEY;
use reseal_format::overlay::{
    BATCH_HEADER, BATCH_PAGES, BatchHeader, CHUNK_PAGES, HEADS, Head, LINK, MAX_RECORDS, OverlayKey, PAGE_U64, Record,
};
use reseal_vault::random;

use super::map::{Dirty, Map, Ranges};
use super::{Facts, Medium, Overlay, OverlayError, State, failed};

/// A journal is made anew when it is longer than this, and than it would be then by as many times.
const LONG: u64 = 1024;
const TIMES: u64 = 3;
/// Batches that a flush has at most before it is made: a guest that never flushes has its journal made anew all the same.
const MOST_TOLD: u64 = 16 << 10;

/// Where the next batch goes.
#[derive(Debug, Clone)]
pub(super) struct Journal {
    /// Says where it begins; both copies do.
    pub(super) head: Head,
    pub(super) sequence: u64,
    /// That of the batch which the flush begins with that the next one belongs to.
    pub(super) first: u64,
    pub(super) link: [u8; LINK],
    pub(super) at: u64,
    /// First pages of its chunks; the last is the one that `at` is in.
    pub(super) chunks: Vec<u64>,
    /// The chunk that follows, once a batch has told of it.
    pub(super) ahead: Option<u64>,
    /// Salts of the sessions by their number; the last is this one.
    pub(super) sessions: Vec<[u8; KEY]>,
}

/// Batches that are sealed, and where they go.
struct Sealed {
    batches: Vec<(u64, Vec<u8>)>,
    /// The journal after them.
    after: Journal,
    /// First pages of chunks that were taken for it.
    taken: Vec<u64>,
}

/// Whether a flush ends with what is told now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Ended,
    /// More is to come before it is durable.
    Begun,
}

fn block_records(map: &Map, zeros: &Ranges, blocks: &BTreeSet<u64>) -> Vec<u8> {
    let mut records = Vec::new();
    zeros.iter().for_each(|(block, end)| Record::Zeros { block, count: end - block }.encode(&mut records));
    for &block in blocks {
        // One that was discarded since is among the zeros.
        if let Some(place) = map.place(block) {
            let (page, session, counter, tag) = (place.page, place.session, place.counter, place.tag);
            Record::Block { block, page, session, counter, tag }.encode(&mut records);
        }
    }
    records
}

/// Cuts records into batches: none is cut in two.
fn cut(records: &[u8]) -> Vec<&[u8]> {
    let (mut batches, mut rest) = (Vec::new(), records);
    loop {
        let mut end = 0;
        while let Some(&kind) = rest.get(end) {
            let length = Record::length(kind);
            if end + length > MAX_RECORDS {
                break;
            }
            end += length;
        }
        let (batch, more) = rest.split_at(end.min(rest.len()));
        batches.push(batch);
        rest = more;
        if rest.is_empty() {
            return batches;
        }
    }
}

impl Journal {
    /// Pages that it has, in stretches.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().chain(&self.ahead).map(|&first| (first, CHUNK_PAGES))
    }

    fn salt(&self) -> [u8; KEY] {
        self.sessions.last().copied().unwrap_or_default()
    }

    /// Seals records as batches of one flush, and finds room for what follows them: each tells of the next chunk, so that a batch
    /// which is damaged hides none behind it.
    fn seal(
        &self,
        key: &OverlayKey,
        facts: &Facts,
        records: &[u8],
        told: Told,
        more: &mut dyn FnMut() -> u64,
    ) -> Sealed {
        let mut after = self.clone();
        let (mut batches, mut taken) = (Vec::new(), Vec::new());
        let parts = cut(records);
        for (nth, part) in parts.iter().enumerate() {
            let pages = (BatchHeader::span(part.len()) as u64) / PAGE_U64;
            let end = after.chunks.last().map_or(0, |first| first + CHUNK_PAGES);
            let ahead = *after.ahead.get_or_insert_with(|| {
                let ahead = more();
                taken.push(ahead);
                ahead
            });
            let behind = after.at + pages;
            let next = if behind + BATCH_PAGES as u64 > end { ahead } else { behind };
            let header = BatchHeader {
                sequence: after.sequence,
                first: self.first,
                salt: self.salt(),
                link: after.link,
                next,
                ahead,
                is_last: told == Told::Ended && nth + 1 == parts.len(),
            };
            let (bytes, link) = header.seal(key, &facts.overlay, part);
            debug_assert!(bytes.len() >= BATCH_HEADER);
            batches.push((after.at, bytes));
            if next == ahead {
                after.chunks.extend(after.ahead.take());
            }
            (after.at, after.link, after.sequence) = (next, link, after.sequence + 1);
        }
        if told == Told::Ended {
            after.first = after.sequence;
        }
        Sealed { batches, after, taken }
    }

    /// Takes room for a chunk, and makes sure that it is there.
    fn reserve<M: Medium>(overlay: &Overlay<M>, taken: &[u64]) -> Result<(), OverlayError> {
        let reserved =
            taken.iter().try_for_each(|first| overlay.medium.reserve(first * PAGE_U64, CHUNK_PAGES * PAGE_U64));
        reserved.map_err(|e| {
            let mut state = overlay.state.write();
            taken.iter().for_each(|&first| state.space.release(first, CHUNK_PAGES));
            failed("make room in")(e)
        })
    }

    /// Writes batches, and at the end of a flush makes them, and all that was written before, durable.
    fn write<M: Medium>(overlay: &Overlay<M>, batches: &[(u64, Vec<u8>)], told: Told) -> Result<(), OverlayError> {
        let written = batches.iter().try_for_each(|(page, bytes)| overlay.medium.write_at(page * PAGE_U64, bytes));
        let ended = |()| if told == Told::Ended { overlay.medium.sync() } else { Ok(()) };
        written.and_then(ended).map_err(|source| {
            // What of it is there nobody knows.
            overlay.breaks();
            OverlayError::Io { action: "make durable", source }
        })
    }

    /// Says which salt this session has, before anything is sealed in it.
    pub(super) fn begin_session<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        let number = u32::try_from(self.sessions.len() - 1).unwrap_or(u32::MAX);
        let mut records = Vec::new();
        Record::Session { number, salt: self.salt() }.encode(&mut records);
        self.append(overlay, &records, Told::Ended)
    }

    /// Adds a flush that tells nothing.
    pub(super) fn end_session<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        self.append(overlay, &[], Told::Ended)
    }

    fn append<M: Medium>(&mut self, overlay: &Overlay<M>, records: &[u8], told: Told) -> Result<(), OverlayError> {
        let mut more = || overlay.state.write().space.extend(CHUNK_PAGES);
        let Sealed { batches, after, taken } = self.seal(&overlay.key, &overlay.facts, records, told, &mut more);
        Journal::reserve(overlay, &taken)?;
        Journal::write(overlay, &batches, told)?;
        *self = after;
        Ok(())
    }

    /// Tells of what has changed since it was told last, without making it durable: that is there after the end of the process,
    /// unless the power goes. The flush that makes it durable goes on from there.
    pub(super) fn tell<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        overlay.check()?;
        // One who waited may find that another has told of all.
        let taken = {
            let mut state = overlay.state.write();
            let State { map, dirty, .. } = &mut *state;
            let untold = dirty.untold.as_mut().filter(|untold| !untold.is_empty()).map(std::mem::take);
            untold.map(|untold| (block_records(map, &untold.zeros, &untold.blocks), untold))
        };
        let Some((records, untold)) = taken else { return Ok(()) };
        let told = self.append(overlay, &records, Told::Begun);
        let mut state = overlay.state.write();
        match (told, &mut state.dirty.untold) {
            (Ok(()), _) => untold.freed.iter().for_each(|&page| state.space.release(page, 1)),
            (Err(e), now) => {
                if let Some(now) = now {
                    now.put_back(untold);
                }
                return Err(e);
            }
        }
        drop(state);
        if self.sequence - self.first > MOST_TOLD { self.flush(overlay) } else { Ok(()) }
    }

    /// Makes durable what has changed.
    pub(super) fn flush<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        let (dirty, records) = {
            let mut state = overlay.state.write();
            if state.dirty.is_empty() {
                return Ok(());
            }
            let dirty = state.dirty.take();
            let records = match &dirty.untold {
                // Of the rest the journal knows.
                Some(untold) => block_records(&state.map, &untold.zeros, &untold.blocks),
                None => block_records(&state.map, &dirty.zeros, &dirty.blocks),
            };
            (dirty, records)
        };
        match self.append(overlay, &records, Told::Ended) {
            Ok(()) => {}
            Err(e) => {
                overlay.state.write().dirty.put_back(dirty);
                return Err(e);
            }
        }
        Journal::release(overlay, dirty);
        if self.is_long(overlay) { self.renew(overlay) } else { Ok(()) }
    }

    fn is_long<M: Medium>(&self, overlay: &Overlay<M>) -> bool {
        let now = self.chunks.len() as u64 * CHUNK_PAGES;
        let state = overlay.state.read();
        let records = (state.map.len() + state.map.zeros().iter().count()) * reseal_format::overlay::MAX_RECORD;
        now > LONG && now > TIMES * (records as u64 / PAGE_U64 + CHUNK_PAGES)
    }

    /// Gives back the pages that nothing durable needs any more.
    fn release<M: Medium>(overlay: &Overlay<M>, mut dirty: Dirty) {
        dirty.discarded.sort_unstable();
        let mut rest = &dirty.discarded[..];
        while let Some(&first) = rest.first() {
            let run = rest.iter().zip(first..).take_while(|(page, expected)| *page == expected).count();
            // Before they can be anybody's. A file system that can't has them used again.
            let _ = overlay.medium.punch(first * PAGE_U64, run as u64 * PAGE_U64);
            rest = &rest[run..];
        }
        let mut state = overlay.state.write();
        let superseded = dirty.untold.iter().flat_map(|untold| &untold.freed);
        dirty.discarded.iter().chain(&dirty.freed).chain(superseded).for_each(|&page| state.space.release(page, 1));
    }

    /// Makes the journal anew from the map; that is a flush, too.
    fn renew<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        let (dirty, records, start) = {
            let mut state = overlay.state.write();
            let State { map, dirty, space } = &mut *state;
            let mut records = Vec::new();
            for (number, salt) in (0..).zip(&self.sessions) {
                Record::Session { number, salt: *salt }.encode(&mut records);
            }
            let zeros = map.zeros().iter();
            zeros.for_each(|(block, end)| Record::Zeros { block, count: end - block }.encode(&mut records));
            for (block, place) in map.blocks() {
                let (page, session, counter, tag) = (place.page, place.session, place.counter, place.tag);
                Record::Block { block, page, session, counter, tag }.encode(&mut records);
            }
            (dirty.take(), records, space.extend(CHUNK_PAGES))
        };
        let begun = Journal { at: start, chunks: vec![start], ahead: None, ..self.clone() };
        let mut more = || overlay.state.write().space.extend(CHUNK_PAGES);
        let Sealed { batches, after, mut taken } =
            begun.seal(&overlay.key, &overlay.facts, &records, Told::Ended, &mut more);
        taken.push(start);
        if let Err(e) = Journal::reserve(overlay, &taken) {
            // There is no room for it now; what there is of a journal goes on.
            overlay.state.write().dirty.put_back(dirty);
            return if matches!(e, OverlayError::Full) { Ok(()) } else { Err(e) };
        }
        Journal::write(overlay, &batches, Told::Ended)?;
        let head = Head { journal: start, sequence: begun.sequence, link: begun.link, ..self.head };
        let old = std::mem::replace(self, Journal { head, ..after });
        // Both copies: where one is damaged, the other must not lead to the journal before.
        (0..HEADS).try_for_each(|_| self.put_head(overlay))?;
        {
            let mut state = overlay.state.write();
            old.chunks().for_each(|(first, count)| state.space.release(first, count));
        }
        Journal::release(overlay, dirty);
        Ok(())
    }

    /// Writes its head in the place of the copy that is older, and makes that durable.
    pub(super) fn put_head<M: Medium>(&mut self, overlay: &Overlay<M>) -> Result<(), OverlayError> {
        self.head.generation += 1;
        let page = self.head.seal(&overlay.key, &random()?);
        let written = overlay.medium.write_at(self.head.generation % HEADS * PAGE_U64, &page);
        written.and_then(|()| overlay.medium.sync()).map_err(|source| {
            overlay.breaks();
            OverlayError::Io { action: "make durable", source }
        })
    }

    /// The batches with which it begins; for an overlay that is made.
    pub(super) fn first(&self, key: &OverlayKey, facts: &Facts) -> Vec<(u64, Vec<u8>)> {
        let mut records = Vec::new();
        Record::Session { number: 0, salt: self.salt() }.encode(&mut records);
        self.seal(key, facts, &records, Told::Ended, &mut || 0).batches
    }
}
