//! What an overlay has of its disk: where each block is, and which are zeros.

use std::collections::{BTreeMap, BTreeSet};

use reseal_format::keys::TAG;

/// Where a block is, and what opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) page: u64,
    pub(super) session: u32,
    pub(super) counter: u64,
    pub(super) tag: [u8; TAG],
}

/// Where the content of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// In a page.
    Here(Place),
    Zeros,
    /// Not in the overlay.
    Base,
}

/// Ranges of blocks, apart from one another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds the blocks from `start` to before `end`.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        while let Some((&from, &to)) = self.0.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            self.0.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        if start < end {
            self.0.insert(start, end);
        }
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        self.0.range(..=block).next_back().is_some_and(|(_, end)| block < *end)
    }

    /// The first block at or after this one where it is otherwise, or `end`.
    fn border(&self, block: u64, end: u64) -> u64 {
        let next = match self.0.range(..=block).next_back() {
            Some((_, &to)) if block < to => Some(to),
            _ => self.0.range(block..).next().map(|(&from, _)| from),
        };
        next.map_or(end, |next| next.min(end))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(&start, &end)| (start, end))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What has changed since the last flush.
#[derive(Debug, Clone, Default)]
pub(super) struct Dirty {
    /// Told before the blocks: one of these that was written afterwards is among them.
    pub(super) zeros: Ranges,
    pub(super) blocks: BTreeSet<u64>,
    /// Pages that the last flush still needs, and this one does not; those of blocks that were discarded apart.
    pub(super) freed: Vec<u64>,
    pub(super) discarded: Vec<u64>,
    /// Where the journal is told of each write.
    pub(super) untold: Option<Untold>,
}

/// What of it the journal was not told yet.
#[derive(Debug, Clone, Default)]
pub(super) struct Untold {
    pub(super) zeros: Ranges,
    pub(super) blocks: BTreeSet<u64>,
    /// Pages that what the journal was told still needs.
    pub(super) freed: Vec<u64>,
}

impl Dirty {
    /// A block has another page now; the one that it had, if nothing needs that any more.
    pub(super) fn write(&mut self, block: u64, before: Option<u64>) -> Option<u64> {
        let is_new = self.blocks.insert(block);
        let untold = self.untold.as_mut().and_then(|untold| untold.blocks.insert(block).then_some(untold));
        match (before?, untold) {
            (page, _) if is_new => self.freed.push(page),
            (page, Some(untold)) => untold.freed.push(page),
            // Neither a flush nor the journal has seen it.
            (page, None) => return Some(page),
        }
        None
    }

    /// Blocks are zeros now, of which some had pages; those of them that nothing needs any more.
    pub(super) fn clear(&mut self, start: u64, end: u64, had: &[(u64, Place)]) -> Vec<u64> {
        let mut free = Vec::new();
        for (block, place) in had {
            let is_flushed = !self.blocks.remove(block);
            let untold = self.untold.as_mut().and_then(|untold| (!untold.blocks.remove(block)).then_some(untold));
            match untold {
                _ if is_flushed => self.discarded.push(place.page),
                Some(untold) => untold.freed.push(place.page),
                None => free.push(place.page),
            }
        }
        self.zeros.add(start, end);
        if let Some(untold) = &mut self.untold {
            untold.zeros.add(start, end);
        }
        free
    }

    /// All of it; what comes from now on is apart.
    pub(super) fn take(&mut self) -> Dirty {
        let untold = self.untold.as_ref().map(|_| Untold::default());
        std::mem::replace(self, Dirty { untold, ..Dirty::default() })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.zeros.is_empty() && self.blocks.is_empty()
    }

    /// What was taken to be flushed and was not, before what came since.
    pub(super) fn put_back(&mut self, earlier: Dirty) {
        earlier.zeros.iter().for_each(|(start, end)| self.zeros.add(start, end));
        self.blocks.extend(earlier.blocks);
        self.freed.extend(earlier.freed);
        self.discarded.extend(earlier.discarded);
        if let (Some(untold), Some(earlier)) = (&mut self.untold, earlier.untold) {
            untold.put_back(earlier);
        }
    }
}

impl Untold {
    pub(super) fn is_empty(&self) -> bool {
        self.zeros.is_empty() && self.blocks.is_empty()
    }

    /// What was taken to be told and was not, before what came since.
    pub(super) fn put_back(&mut self, earlier: Untold) {
        earlier.zeros.iter().for_each(|(start, end)| self.zeros.add(start, end));
        self.blocks.extend(earlier.blocks);
        self.freed.extend(earlier.freed);
    }
}

/// The map.
#[derive(Debug, Clone, Default)]
pub(super) struct Map {
    blocks: BTreeMap<u64, Place>,
    /// A block that is in a page is not zeros, even if it is in here.
    zeros: Ranges,
}

impl Map {
    pub(super) fn content(&self, block: u64) -> Content {
        match self.blocks.get(&block) {
            Some(place) => Content::Here(*place),
            None if self.zeros.contains(block) => Content::Zeros,
            None => Content::Base,
        }
    }

    /// Puts a block in a place; the one that it had.
    pub(super) fn put(&mut self, block: u64, place: Place) -> Option<Place> {
        self.blocks.insert(block, place)
    }

    /// Makes blocks zeros; the places that they had.
    pub(super) fn clear(&mut self, start: u64, end: u64) -> Vec<(u64, Place)> {
        self.zeros.add(start, end);
        let had: Vec<_> = self.blocks.range(start..end).map(|(&block, &place)| (block, place)).collect();
        for (block, _) in &had {
            self.blocks.remove(block);
        }
        had
    }

    pub(super) fn place(&self, block: u64) -> Option<Place> {
        self.blocks.get(&block).copied()
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        self.blocks.iter().map(|(&block, &place)| (block, place))
    }

    pub(super) fn zeros(&self) -> &Ranges {
        &self.zeros
    }

    /// Up to where, at most `end`, blocks have the same kind of content as this one.
    pub(super) fn border(&self, block: u64, end: u64) -> u64 {
        match self.content(block) {
            Content::Here(_) => {
                let run = self.blocks.range(block..end).zip(block..).take_while(|((at, _), expected)| *at == expected);
                block + run.count() as u64
            }
            Content::Zeros | Content::Base => {
                let next = self.blocks.range(block..end).next().map_or(end, |(&at, _)| at);
                self.zeros.border(block, next)
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(page: u64) -> Place {
        Place { page, session: 0, counter: page, tag: [0; TAG] }
    }

    #[test]
    fn ranges_join_where_they_touch() {
        let mut ranges = Ranges::default();
        for (start, end) in [(10, 20), (30, 40), (20, 25), (50, 50), (24, 31), (5, 6)] {
            ranges.add(start, end);
        }
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(5, 6), (10, 40)]);
        assert!(!ranges.contains(9) && ranges.contains(10) && ranges.contains(39) && !ranges.contains(40));
        assert_eq!([0, 5, 7, 10, 40].map(|block| ranges.border(block, 100)), [5, 6, 10, 40, 100]);
        ranges.add(0, 1000);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(0, 1000)]);
    }

    #[test]
    fn what_was_written_after_a_discard_counts() {
        let mut map = Map::default();
        assert_eq!(map.put(3, place(9)), None);
        assert_eq!(map.clear(0, 10), [(3, place(9))]);
        assert_eq!(map.content(3), Content::Zeros);
        map.put(4, place(10));
        map.put(5, place(11));
        assert_eq!(map.content(4), Content::Here(place(10)));
        assert_eq!([0, 4, 6, 10].map(|block| map.border(block, 20)), [4, 6, 10, 20]);
        assert_eq!(map.content(10), Content::Base);
    }
}
