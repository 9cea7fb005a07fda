//! Which pages of the file are in use.

/// Words of a bitmap: a bit a page.
#[derive(Debug, Default)]
pub(super) struct Space {
    bits: Vec<u64>,
    used: u64,
    /// Pages that may be in use.
    most: u64,
    /// Where a search begins: what is below is in use.
    from: u64,
}

impl Space {
    /// All free, of which so many may be used.
    pub(super) fn new(most: u64) -> Space {
        Space { bits: Vec::new(), used: 0, most, from: 0 }
    }

    fn word(page: u64) -> usize {
        usize::try_from(page / 64).unwrap_or(usize::MAX)
    }

    fn is_used(&self, page: u64) -> bool {
        self.bits.get(Space::word(page)).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Marks pages as used, whatever may be; false if one was already.
    pub(super) fn take(&mut self, first: u64, count: u64) -> bool {
        let end = Space::word(first + count) + 1;
        if self.bits.len() < end {
            self.bits.resize(end, 0);
        }
        let mut all_free = true;
        for page in first..first + count {
            let bit = 1 << (page % 64);
            let word = &mut self.bits[Space::word(page)];
            all_free &= *word & bit == 0;
            *word |= bit;
        }
        self.used += count;
        all_free
    }

    /// Finds free pages that follow one another, at most `count` of them and at least one; `None` where none may be used.
    pub(super) fn allocate(&mut self, count: u64) -> Option<(u64, u64)> {
        let count = count.min(self.most.saturating_sub(self.used));
        if count == 0 {
            return None;
        }
        let end = self.bits.len() as u64 * 64;
        let mut first = self.from;
        while first < end {
            let rest = !(self.bits[Space::word(first)] >> (first % 64));
            match rest.trailing_zeros() {
                // Of the word's rest all are used; shifting has brought in zeros, which are no free pages.
                free if u64::from(free) + first % 64 >= 64 => first += 64 - first % 64,
                free => {
                    first += u64::from(free);
                    break;
                }
            }
        }
        self.from = first;
        let length = (first..first + count).take_while(|&page| !self.is_used(page)).count() as u64;
        self.take(first, length);
        self.from = first + length;
        Some((first, length))
    }

    /// Takes pages that follow one another, beyond all that are used, even where no more may be.
    pub(super) fn extend(&mut self, count: u64) -> u64 {
        let last = self.bits.iter().rposition(|word| *word != 0);
        let first = last.map_or(0, |at| at as u64 * 64 + 64 - u64::from(self.bits[at].leading_zeros()));
        self.take(first, count);
        first
    }

    /// They are free.
    pub(super) fn release(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            debug_assert!(self.is_used(page), "only what was taken is given back");
            self.bits[Space::word(page)] &= !(1 << (page % 64));
        }
        self.used -= count;
        self.from = self.from.min(first);
    }

    /// Pages that are in use.
    pub(super) fn used(&self) -> u64 {
        self.used
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // a few thousand pages
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_where_they_are_free_and_no_more_than_may_be() {
        let mut space = Space::new(200);
        assert!(space.take(0, 2));
        assert_eq!(space.allocate(100), Some((2, 100)));
        assert_eq!(space.allocate(100), Some((102, 98)));
        assert_eq!(space.allocate(1), None);
        space.release(63, 2);
        space.release(130, 1);
        assert_eq!(space.allocate(5), Some((63, 2)));
        assert_eq!(space.allocate(5), Some((130, 1)));
        assert_eq!((space.allocate(1), space.used()), (None, 200));
        assert_eq!(space.extend(64), 200);
        assert_eq!(space.extend(1), 264);
        space.release(2, 128);
        assert_eq!(space.allocate(63), Some((2, 63)), "what the journal took counts");
        assert!(!space.take(2, 1));
    }

    #[test]
    fn it_agrees_with_a_list_of_flags() {
        let (mut space, mut flags) = (Space::new(1000), vec![false; 2000]);
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let wanted = (random >> 33) % 20 + 1;
            if random >> 63 == 0 {
                if let Some((first, count)) = space.allocate(wanted) {
                    for page in first..first + count {
                        assert!(!std::mem::replace(&mut flags[page as usize], true));
                    }
                }
            } else {
                let used: Vec<_> = flags.iter().enumerate().filter(|(_, used)| **used).map(|(page, _)| page).collect();
                if let Some(&page) = used.get((random >> 20) as usize % used.len().max(1)) {
                    flags[page] = false;
                    space.release(page as u64, 1);
                }
            }
            assert_eq!(space.used(), flags.iter().filter(|used| **used).count() as u64);
        }
    }
}
