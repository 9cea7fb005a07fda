//! From a file to an overlay: the head, the batches that follow it, and whether the last flush was whole.
//!
//! A flush that is not whole was under way when the power went, if it was the last: nobody was told that it is durable. Where a batch of a
//! later flush is there, it was not the last, and what it told is lost: that is damage. Flushes that never happened have left
//! batches, too, but never of a later flush, for sequences never go back: the flush that is made next begins with the sequence of the one
//! that was lost.

use std::collections::BTreeMap;

use reseal_format::FormatError;
use reseal_format::keys::KEY;
use reseal_format::overlay::{
    BATCH_HEADER, BATCH_PAGES, BatchHeader, BlockKey, CHUNK_PAGES, HEADS, Head, LINK, OverlayKey, PAGE, PAGE_U64,
    Record,
};
use reseal_vault::random;

use super::journal::Journal;
use super::map::{Map, Place};
use super::{Facts, Medium, OverlayError, failed};

/// What was found.
pub(super) struct Recovered {
    pub(super) map: Map,
    /// With the salt of a session that begins.
    pub(super) journal: Journal,
    pub(super) sessions: Vec<[u8; KEY]>,
    /// One copy of the head is damaged, or of a journal before.
    pub(super) lacks_head: bool,
}

/// What a flush has told.
struct Flush {
    records: Vec<Record>,
    /// The journal after it.
    after: Position,
}

#[derive(Clone)]
struct Position {
    at: u64,
    sequence: u64,
    link: [u8; LINK],
    /// The last is the one that `at` is in.
    chunks: Vec<u64>,
    ahead: Option<u64>,
}

fn damaged(what: impl Into<String>, why: &'static str) -> OverlayError {
    OverlayError::Damaged { what: what.into(), source: FormatError::Malformed(why) }
}

/// Writes the heads and the first batch of an overlay that is empty.
pub(super) fn create<M: Medium>(medium: &M, key: &OverlayKey, facts: &Facts) -> Result<(), OverlayError> {
    let (start, ahead) = (HEADS, HEADS + CHUNK_PAGES);
    let Facts { overlay, point, disk, length } = *facts;
    let (sequence, link) = (1, [0; LINK]);
    let head = Head { overlay, generation: 0, point, disk, length, journal: start, sequence, link };
    let journal = Journal {
        head,
        sequence,
        first: sequence,
        link,
        at: start,
        chunks: vec![start],
        ahead: Some(ahead),
        sessions: vec![random()?],
    };
    medium.reserve(0, (ahead + CHUNK_PAGES) * PAGE_U64).map_err(failed("make room in"))?;
    for (page, bytes) in journal.first(key, facts) {
        medium.write_at(page * PAGE_U64, &bytes).map_err(failed("write to"))?;
    }
    // What the heads name is there before they are.
    medium.sync().map_err(failed("make durable"))?;
    for generation in 0..HEADS {
        let page = Head { generation, ..head }.seal(key, &random()?);
        medium.write_at(generation * PAGE_U64, &page).map_err(failed("write to"))?;
    }
    medium.sync().map_err(failed("make durable"))
}

/// The head that counts, and whether the other copy leads elsewhere, or nowhere.
fn head<M: Medium>(medium: &M, key: &OverlayKey, facts: &Facts) -> Result<(Head, bool), OverlayError> {
    let mut found = Vec::new();
    let mut wrong = FormatError::Malformed("has no head");
    for copy in 0..HEADS {
        let mut page = [0; PAGE];
        medium.read_at(copy * PAGE_U64, &mut page).map_err(failed("read"))?;
        match Head::open(key, &page) {
            Ok(head) => found.push(head),
            Err(e) => wrong = e,
        }
    }
    let best = found.iter().max_by_key(|head| head.generation);
    let head = *best.ok_or(OverlayError::Damaged { what: "the head".into(), source: wrong })?;
    let is_same = |other: &Head| Head { generation: head.generation, ..*other } == head;
    let lacks_head = found.len() < 2 || !found.iter().all(is_same);
    match head {
        Head { overlay, .. } if overlay != facts.overlay => Err(OverlayError::Another("it has another id")),
        Head { point, .. } if point != facts.point => Err(OverlayError::Another("it is of another restore point")),
        Head { disk, .. } if disk != facts.disk => Err(OverlayError::Another("it is of another disk of its point")),
        Head { length, .. } if length != facts.length => Err(OverlayError::Another("its disk has another length")),
        head => Ok((head, lacks_head)),
    }
}

/// The flush that begins at a position; `None` where there is none that is whole. One that never ended, but of which something was told,
/// counts only where `is_any` says so.
fn read_flush<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    position: &Position,
    is_any: bool,
) -> Result<Option<Flush>, OverlayError> {
    let pages = medium.length().map_err(failed("read"))? / PAGE_U64;
    let (mut after, mut records) = (position.clone(), Vec::new());
    let mut bytes = vec![0; BATCH_PAGES * PAGE];
    loop {
        let here = pages.saturating_sub(after.at).min(BATCH_PAGES as u64);
        let read = &mut bytes[..usize::try_from(here).unwrap_or(0) * PAGE];
        medium.read_at(after.at * PAGE_U64, read).map_err(failed("read"))?;
        let decoded = read.first_chunk::<BATCH_HEADER>().and_then(BatchHeader::decode);
        let next = decoded.filter(|(header, _)| (header.sequence, header.link) == (after.sequence, after.link));
        let opened =
            next.and_then(|(header, length)| Some((header, header.open(key, &facts.overlay, read, length).ok()?)));
        let Some((header, (more, link))) = opened else {
            return Ok((is_any && after.sequence != position.sequence).then_some(Flush { records, after }));
        };
        records.extend(more);
        // Authenticated from here on.
        after.ahead = Some(header.ahead);
        if header.next == header.ahead {
            after.chunks.extend(after.ahead.take());
        }
        (after.at, after.sequence, after.link) = (header.next, header.sequence + 1, link);
        if header.is_last {
            return Ok(Some(Flush { records, after }));
        }
    }
}

/// Whether there is a batch of a flush that is later than the one which begins, or should begin, here.
fn is_followed<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    position: &Position,
) -> Result<bool, OverlayError> {
    let pages = medium.length().map_err(failed("read"))? / PAGE_U64;
    let mut chunks: Vec<u64> = position.chunks.last().copied().into_iter().chain(position.ahead).collect();
    let mut bytes = vec![0; usize::try_from(CHUNK_PAGES).unwrap_or(0) * PAGE];
    let mut nth = 0;
    while let Some(&chunk) = chunks.get(nth) {
        nth += 1;
        let here = pages.saturating_sub(chunk).min(CHUNK_PAGES);
        let read = &mut bytes[..usize::try_from(here).unwrap_or(0) * PAGE];
        medium.read_at(chunk.saturating_mul(PAGE_U64), read).map_err(failed("read"))?;
        for at in (0..read.len()).step_by(PAGE) {
            let batch = &read[at..read.len().min(at + BATCH_PAGES * PAGE)];
            let decoded = batch.first_chunk::<BATCH_HEADER>().and_then(BatchHeader::decode);
            let Some((header, length)) = decoded.filter(|(header, _)| header.sequence >= position.sequence) else {
                continue;
            };
            if header.open(key, &facts.overlay, batch, length).is_err() {
                continue;
            }
            if header.first > position.sequence {
                return Ok(true);
            }
            // Of the flush that is not whole: what follows it may be further on.
            if !chunks.contains(&header.ahead) {
                chunks.push(header.ahead);
            }
        }
    }
    Ok(false)
}

/// Whether all blocks of a flush are as it says. It may tell of one several times; then the last counts, and the pages of the others may
/// have been used again.
fn is_whole<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    sessions: &[[u8; KEY]],
    records: &[Record],
) -> Result<bool, OverlayError> {
    let mut sessions = sessions.to_vec();
    let pages = medium.length().map_err(failed("read"))? / PAGE_U64;
    let mut last = BTreeMap::new();
    for record in records {
        match *record {
            Record::Block { block, .. } => drop(last.insert(block, record)),
            Record::Zeros { block, count } => {
                let mut rest = last.split_off(&block);
                last.append(&mut rest.split_off(&block.saturating_add(count)));
            }
            Record::Session { number, salt } => put_session(&mut sessions, number, salt)?,
        }
    }
    let (mut sealed, mut plain) = ([0; PAGE], reseal_vault::wipe::Secret(vec![0; PAGE]));
    for record in last.into_values() {
        let Record::Block { block, page, session, counter, tag } = *record else { continue };
        let salt = usize::try_from(session).ok().and_then(|session| sessions.get(session));
        let Some(salt) = salt.filter(|_| page < pages) else { return Ok(false) };
        medium.read_at(page * PAGE_U64, &mut sealed).map_err(failed("read"))?;
        let key = BlockKey::new(key, &facts.overlay, salt);
        if key.open(counter, block, &tag, &sealed, &mut plain.0).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn put_session(sessions: &mut Vec<[u8; KEY]>, number: u32, salt: [u8; KEY]) -> Result<(), OverlayError> {
    match usize::try_from(number) {
        Ok(number) if number < sessions.len() => sessions[number] = salt,
        Ok(number) if number == sessions.len() => sessions.push(salt),
        _ => return Err(damaged("the journal", "names a session out of turn")),
    }
    Ok(())
}

fn apply(map: &mut Map, sessions: &mut Vec<[u8; KEY]>, records: &[Record], blocks: u64) -> Result<(), OverlayError> {
    for record in records {
        match *record {
            Record::Session { number, salt } => put_session(sessions, number, salt)?,
            Record::Zeros { block, count } => {
                let end = block.checked_add(count).filter(|&end| end <= blocks);
                map.clear(block, end.ok_or_else(|| damaged("the journal", "names blocks past the disk's end"))?);
            }
            Record::Block { block, page, session, counter, tag } => {
                if block >= blocks || page < HEADS || session as usize >= sessions.len() {
                    return Err(damaged("the journal", "names a block that can't be"));
                }
                map.put(block, Place { page, session, counter, tag });
            }
        }
    }
    Ok(())
}

/// Reads what there is; and what a process that was killed had told of and not flushed, if that is to be taken up.
pub(super) fn recover<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    takes_up: bool,
) -> Result<Recovered, OverlayError> {
    let (head, lacks_head) = head(medium, key, facts)?;
    let blocks = facts.length.div_ceil(PAGE_U64);
    let start = Position {
        at: head.journal,
        sequence: head.sequence,
        link: head.link,
        chunks: vec![head.journal],
        ahead: None,
    };
    let (mut map, mut sessions) = (Map::default(), Vec::new());
    // With the first the head was written: it is durable, or nothing is.
    let Some(first) = read_flush(medium, key, facts, &start, false)? else {
        return Err(damaged("the journal", "does not begin as its head says"));
    };
    apply(&mut map, &mut sessions, &first.records, blocks)?;
    let mut position = first.after;
    let mut next = read_flush(medium, key, facts, &position, false)?;
    while let Some(flush) = next {
        next = read_flush(medium, key, facts, &flush.after, false)?;
        // Only the last may have been under way when the power went.
        if next.is_none() && !is_whole(medium, key, facts, &sessions, &flush.records)? {
            break;
        }
        apply(&mut map, &mut sessions, &flush.records, blocks)?;
        position = flush.after;
    }
    let first = position.sequence;
    if takes_up && let Some(told) = read_flush(medium, key, facts, &position, true)? {
        if !is_whole(medium, key, facts, &sessions, &told.records)? {
            return Err(damaged("what was written and not flushed", "is not as the journal says"));
        }
        apply(&mut map, &mut sessions, &told.records, blocks)?;
        position = told.after;
    }
    if is_followed(medium, key, facts, &position)? {
        return Err(OverlayError::Lost { sequence: position.sequence });
    }
    // A process that was killed may have left what the system holds, but no disk yet. What is written next builds on it.
    medium.sync().map_err(failed("make durable"))?;
    sessions.push(random()?);
    let Position { at, sequence, link, chunks, ahead } = position;
    let journal = Journal { head, sequence, first, link, at, chunks, ahead, sessions: sessions.clone() };
    Ok(Recovered { map, journal, sessions, lacks_head })
}
