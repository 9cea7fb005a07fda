//! A set of blobs of one pack.

use crate::pack::MAX_BLOBS;

const WORD: u32 = u64::BITS;

/// Most words of a set.
pub const MAX_WORDS: usize = (MAX_BLOBS / WORD) as usize;

/// Ordinals of one pack, one bit each, as long as the highest needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ordinals(Vec<u64>);

impl Ordinals {
    /// The set of these bits, the lowest of the first word first; `None` if they are more than a pack can have.
    pub fn from_words(mut words: Vec<u64>) -> Option<Ordinals> {
        while words.last() == Some(&0) {
            words.pop();
        }
        (words.len() <= MAX_WORDS).then_some(Ordinals(words))
    }

    /// Its bits; the last word has one.
    pub fn words(&self) -> &[u64] {
        &self.0
    }

    /// Adds one; whether it is new.
    pub fn insert(&mut self, ordinal: u32) -> bool {
        let word = (ordinal / WORD) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let bit = 1 << (ordinal % WORD);
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }

    pub fn contains(&self, ordinal: u32) -> bool {
        self.0.get((ordinal / WORD) as usize).is_some_and(|bits| bits >> (ordinal % WORD) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the members of another.
    pub fn extend(&mut self, other: &Ordinals) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(bits, more)| *bits |= more);
    }

    /// Removes the members of another.
    pub fn remove(&mut self, other: &Ordinals) {
        self.0.iter_mut().zip(&other.0).for_each(|(bits, gone)| *bits &= !gone);
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
    }

    /// Its members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let bits = |(word, bits): (u32, u64)| {
            (0..WORD).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * WORD + bit)
        };
        (0..).zip(self.0.iter().copied()).flat_map(bits)
    }
}

impl FromIterator<u32> for Ordinals {
    fn from_iter<I: IntoIterator<Item = u32>>(ordinals: I) -> Ordinals {
        let mut set = Ordinals::default();
        ordinals.into_iter().for_each(|ordinal| _ = set.insert(ordinal));
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(a in prop::collection::vec(0..MAX_BLOBS, 0..50), b in prop::collection::vec(0..MAX_BLOBS, 0..50)) {
            let mut set = Ordinals::default();
            let mut model = BTreeSet::new();
            for &ordinal in &a {
                prop_assert_eq!(set.insert(ordinal), model.insert(ordinal));
            }
            prop_assert_eq!(set.is_empty(), model.is_empty());
            set.extend(&b.iter().copied().collect());
            model.extend(&b);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert!((0..MAX_BLOBS).step_by(97).all(|ordinal| set.contains(ordinal) == model.contains(&ordinal)));
            let mut rest = set.clone();
            rest.remove(&b.iter().copied().collect());
            let left: Vec<_> = model.iter().copied().filter(|ordinal| !b.contains(ordinal)).collect();
            prop_assert_eq!(rest.is_empty(), left.is_empty());
            prop_assert_eq!(rest.iter().collect::<Vec<_>>(), left);
            prop_assert_eq!(Ordinals::from_words([set.words(), &[0, 0]].concat()), Some(set));
        }
    }

    #[test]
    fn no_set_has_more_than_a_pack() {
        assert!(Ordinals::from_words(vec![1; MAX_WORDS]).is_some());
        assert_eq!(Ordinals::from_words(vec![1; MAX_WORDS + 1]), None);
    }
}
