//! From a file to an overlay: the head, the batches that follow it, and whether the last flush was whole.

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
    chunks: Vec<u64>,
}

fn damaged(what: impl Into<String>, why: &'static str) -> OverlayError {
    OverlayError::Damaged { what: what.into(), source: FormatError::Malformed(why) }
}

/// Writes the heads and the first batch of an overlay that is empty.
pub(super) fn create<M: Medium>(medium: &M, key: &OverlayKey, facts: &Facts) -> Result<(), OverlayError> {
    let start = HEADS;
    let journal = Journal {
        generation: 1,
        sequence: 1,
        link: [0; LINK],
        at: start,
        chunks: vec![start],
        sessions: vec![random()?],
    };
    medium.reserve(0, (start + CHUNK_PAGES) * PAGE_U64).map_err(failed("make room in"))?;
    for (page, bytes) in journal.first(key, facts) {
        medium.write_at(page * PAGE_U64, &bytes).map_err(failed("write to"))?;
    }
    // What the heads name is there before they are.
    medium.sync().map_err(failed("make durable"))?;
    for generation in 0..HEADS {
        let page = journal.head(facts, generation).seal(key, &random()?);
        medium.write_at(generation * PAGE_U64, &page).map_err(failed("write to"))?;
    }
    medium.sync().map_err(failed("make durable"))
}

fn head<M: Medium>(medium: &M, key: &OverlayKey, facts: &Facts) -> Result<Head, OverlayError> {
    let mut best: Option<Head> = None;
    let mut wrong = FormatError::Malformed("has no head");
    for copy in 0..HEADS {
        let mut page = [0; PAGE];
        medium.read_at(copy * PAGE_U64, &mut page).map_err(failed("read"))?;
        match Head::open(key, &page) {
            Ok(head) if best.is_none_or(|best| best.generation < head.generation) => best = Some(head),
            Ok(_) => {}
            Err(e) => wrong = e,
        }
    }
    let head = best.ok_or(OverlayError::Damaged { what: "the head".into(), source: wrong })?;
    match head {
        Head { overlay, .. } if overlay != facts.overlay => Err(OverlayError::Another("it has another id")),
        Head { point, .. } if point != facts.point => Err(OverlayError::Another("it is of another restore point")),
        Head { disk, .. } if disk != facts.disk => Err(OverlayError::Another("it is of another disk of its point")),
        Head { length, .. } if length != facts.length => Err(OverlayError::Another("its disk has another length")),
        head => Ok(head),
    }
}

/// The flush that begins at a position; `None` where there is none that is whole.
fn read_flush<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    position: &Position,
) -> Result<Option<Flush>, OverlayError> {
    let pages = medium.length().map_err(failed("read"))? / PAGE_U64;
    let (mut after, mut records) = (position.clone(), Vec::new());
    let mut bytes = vec![0; BATCH_PAGES * PAGE];
    loop {
        let here = pages.saturating_sub(after.at).min(BATCH_PAGES as u64);
        let read = &mut bytes[..usize::try_from(here).unwrap_or(0) * PAGE];
        medium.read_at(after.at * PAGE_U64, read).map_err(failed("read"))?;
        let Some(start) = read.first_chunk::<BATCH_HEADER>() else { return Ok(None) };
        let Some((header, length)) = BatchHeader::decode(start) else { return Ok(None) };
        if (header.sequence, header.link) != (after.sequence, after.link) {
            return Ok(None);
        }
        let Ok((more, link)) = header.open(key, &facts.overlay, read, length) else { return Ok(None) };
        records.extend(more);
        // Authenticated from here on.
        let behind = after.at + BatchHeader::span(length) as u64 / PAGE_U64;
        if header.next != behind {
            after.chunks.push(header.next);
        }
        (after.at, after.sequence, after.link) = (header.next, header.sequence + 1, link);
        if header.is_last {
            return Ok(Some(Flush { records, after }));
        }
    }
}

/// Whether all blocks of a flush are as it says.
fn is_whole<M: Medium>(
    medium: &M,
    key: &OverlayKey,
    facts: &Facts,
    sessions: &[[u8; KEY]],
    records: &[Record],
) -> Result<bool, OverlayError> {
    let mut sessions = sessions.to_vec();
    let pages = medium.length().map_err(failed("read"))? / PAGE_U64;
    let (mut sealed, mut plain) = ([0; PAGE], reseal_vault::wipe::Secret(vec![0; PAGE]));
    for record in records {
        match record {
            Record::Session { number, salt } => put_session(&mut sessions, *number, *salt)?,
            Record::Block { block, page, session, counter, tag } => {
                let salt = usize::try_from(*session).ok().and_then(|session| sessions.get(session));
                let Some(salt) = salt.filter(|_| *page < pages) else { return Ok(false) };
                medium.read_at(page * PAGE_U64, &mut sealed).map_err(failed("read"))?;
                let key = BlockKey::new(key, &facts.overlay, salt);
                if key.open(*counter, *block, tag, &sealed, &mut plain.0).is_err() {
                    return Ok(false);
                }
            }
            Record::Zeros { .. } => {}
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

/// Reads what there is.
pub(super) fn recover<M: Medium>(medium: &M, key: &OverlayKey, facts: &Facts) -> Result<Recovered, OverlayError> {
    let head = head(medium, key, facts)?;
    let blocks = facts.length.div_ceil(PAGE_U64);
    let start = Position { at: head.journal, sequence: head.sequence, link: head.link, chunks: vec![head.journal] };
    let (mut map, mut sessions) = (Map::default(), Vec::new());
    // With the first the head was written: it is durable, or nothing is.
    let Some(first) = read_flush(medium, key, facts, &start)? else {
        return Err(damaged("the journal", "does not begin as its head says"));
    };
    apply(&mut map, &mut sessions, &first.records, blocks)?;
    let mut position = first.after;
    let mut next = read_flush(medium, key, facts, &position)?;
    while let Some(flush) = next {
        next = read_flush(medium, key, facts, &flush.after)?;
        // Only the last may have been under way when the power went.
        if next.is_none() && !is_whole(medium, key, facts, &sessions, &flush.records)? {
            break;
        }
        apply(&mut map, &mut sessions, &flush.records, blocks)?;
        position = flush.after;
    }
    sessions.push(random()?);
    let Position { at, sequence, link, chunks } = position;
    let journal = Journal { generation: head.generation, sequence, link, at, chunks, sessions: sessions.clone() };
    Ok(Recovered { map, journal, sessions })
}
