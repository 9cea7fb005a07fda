//! Which bytes of a read have arrived.

use std::ops::Range;

/// Most pieces with gaps between them. Servers send chunks in order, or nearly so; each in order extends the last piece.
const MAX_PIECES: usize = 4096;

/// Disjoint ranges in order, neighbours joined.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    pieces: Vec<Range<usize>>,
}

/// Why a chunk can't be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misfit {
    Overlap,
    TooManyPieces,
}

impl Coverage {
    /// Adds a range, which must not be empty.
    pub(crate) fn add(&mut self, range: Range<usize>) -> Result<(), Misfit> {
        let at = self.pieces.partition_point(|piece| piece.end <= range.start);
        if self.pieces.get(at).is_some_and(|next| next.start < range.end) {
            return Err(Misfit::Overlap);
        }
        let joins_before = at > 0 && self.pieces[at - 1].end == range.start;
        let joins_after = self.pieces.get(at).is_some_and(|next| next.start == range.end);
        match (joins_before, joins_after) {
            (true, true) => self.pieces[at - 1].end = self.pieces.remove(at).end,
            (true, false) => self.pieces[at - 1].end = range.end,
            (false, true) => self.pieces[at].start = range.start,
            (false, false) if self.pieces.len() >= MAX_PIECES => return Err(Misfit::TooManyPieces),
            (false, false) => self.pieces.insert(at, range),
        }
        Ok(())
    }

    /// Whether all from 0 to `length` is there.
    pub(crate) fn is_whole(&self, length: usize) -> bool {
        self.pieces.first().map_or(length == 0, |piece| *piece == (0..length)) && self.pieces.len() <= 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_make_a_whole() {
        let mut coverage = Coverage::default();
        for range in [6..8, 0..2, 4..6, 2..4] {
            assert!(!coverage.is_whole(8));
            coverage.add(range).unwrap();
        }
        assert!(coverage.is_whole(8) && !coverage.is_whole(9));
        assert!(Coverage::default().is_whole(0));
    }

    #[test]
    fn no_byte_comes_twice() {
        let mut coverage = Coverage::default();
        coverage.add(10..20).unwrap();
        coverage.add(30..40).unwrap();
        for range in [10..20, 5..11, 19..21, 15..16, 0..50, 25..31, 39..45] {
            assert_eq!(coverage.add(range), Err(Misfit::Overlap));
        }
        coverage.add(20..30).unwrap();
        assert_eq!(coverage.add(0..11), Err(Misfit::Overlap));
        coverage.add(0..10).unwrap();
        assert!(coverage.is_whole(40));
    }

    #[test]
    fn pieces_are_limited() {
        let mut coverage = Coverage::default();
        for piece in 0..MAX_PIECES {
            coverage.add(piece * 2..piece * 2 + 1).unwrap();
        }
        assert_eq!(coverage.add(MAX_PIECES * 2..MAX_PIECES * 2 + 1), Err(Misfit::TooManyPieces));
    }
}
