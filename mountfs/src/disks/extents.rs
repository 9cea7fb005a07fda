//! What is known of where a disk has holes. A restore point never changes, so nothing of it gets old.

use std::collections::BTreeMap;

use reseal_nbd::Extent;

/// Runs that are remembered of a disk, at most: those of the most fragmented disk that is worth it take a megabyte.
const MAX_RUNS: usize = 16 << 10;

/// Runs of data and of holes; what is between them is not known.
#[derive(Default)]
pub(super) struct ExtentMap {
    /// By their starts: where each ends, and whether it is a hole.
    runs: BTreeMap<u64, (u64, bool)>,
}

impl ExtentMap {
    /// Where the run that holds this byte ends, and whether it is a hole.
    pub(super) fn at(&self, byte: u64) -> Option<(u64, bool)> {
        let (_, &(end, is_hole)) = self.runs.range(..=byte).next_back()?;
        (byte < end).then_some((end, is_hole))
    }

    /// Whether all of these bytes are known to be in a hole.
    pub(super) fn is_hole(&self, start: u64, end: u64) -> bool {
        self.at(start).is_some_and(|(known, is_hole)| is_hole && known >= end)
    }

    /// Takes what a server says of the bytes from `start` on.
    pub(super) fn add(&mut self, mut start: u64, extents: &[Extent]) {
        if self.runs.len() + extents.len() > MAX_RUNS {
            self.runs.clear();
        }
        for extent in extents.iter().take(MAX_RUNS) {
            let end = start.saturating_add(extent.length);
            self.add_run(start, end, extent.zero);
            start = end;
        }
    }

    fn add_run(&mut self, mut start: u64, mut end: u64, is_hole: bool) {
        if let Some((&before, &(known, kind))) = self.runs.range(..start).next_back()
            && known >= start
        {
            if kind == is_hole {
                start = before;
            } else {
                self.runs.insert(before, (start, kind));
            }
            self.keep_rest(known, kind, end);
        }
        // Who asks again is told the same, but maybe in other pieces: the newer ones count.
        let covered: Vec<u64> = self.runs.range(start..end).map(|(&start, _)| start).collect();
        for covered in covered {
            if let Some((known, kind)) = self.runs.remove(&covered) {
                self.keep_rest(known, kind, end);
            }
        }
        if let Some(&(next, kind)) = self.runs.get(&end)
            && kind == is_hole
        {
            self.runs.remove(&end);
            end = next;
        }
        self.runs.insert(start, (end, is_hole));
    }

    /// Keeps what a run that ends at `known` has behind `end`.
    fn keep_rest(&mut self, known: u64, kind: bool, end: u64) {
        if known > end {
            self.runs.insert(end, (known, kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(length: u64, zero: bool) -> Extent {
        Extent { length, zero, dirty: true }
    }

    #[test]
    fn answers_in_any_order_and_overlapping_make_one_map() {
        let is_hole = |byte: u64| byte % 100 >= 60;
        let mut map = ExtentMap::default();
        assert_eq!(map.at(0), None);
        let mut seed = 7u64;
        let mut known = [false; 1000];
        for _ in 0..200 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (start, length) = ((seed >> 33) % 1000, (seed >> 50) % 150 + 1);
            let end = (start + length).min(1000);
            let pieces: Vec<_> = (start..end).map(|byte| extent(1, is_hole(byte))).collect();
            map.add(start, &pieces);
            known[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(true);
            for (byte, &known) in (0u64..).zip(&known) {
                match map.at(byte) {
                    None => assert!(!known, "byte {byte} was told"),
                    Some((end, kind)) => {
                        assert!(known && kind == is_hole(byte));
                        assert!((byte..end).all(|other| is_hole(other) == kind));
                    }
                }
            }
        }
        assert!(map.runs.len() <= 20 + 1, "neighbours are joined: {:?}", map.runs);
        assert!(map.is_hole(60, 100) && !map.is_hole(60, 101) && !map.is_hole(59, 100));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut map = ExtentMap::default();
        for run in 0..3 * MAX_RUNS as u64 {
            map.add(run * 10, &[extent(10, run.is_multiple_of(2))]);
            assert!(map.runs.len() <= MAX_RUNS);
        }
        assert!(map.at(30 * MAX_RUNS as u64 - 1).is_some());
    }
}
