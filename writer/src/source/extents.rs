//! What is where on a disk, and what of it changed, as bytes and as runs of clusters.

use std::ops::Range;

use reseal_format::geometry::{CLUSTER_U64, cluster_count};

use crate::BackupError;

/// So many bytes that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub length: u64,
    /// Reads as zeros.
    pub zero: bool,
    /// May have changed since the restore point that the backup starts from.
    pub dirty: bool,
}

/// The extents of a disk.
pub(crate) trait Extents {
    /// The extent at `from`, which is below the disk's length and where the one before ended. It is not empty, and may
    /// reach past the disk's end.
    fn next(&mut self, from: u64) -> Result<Extent, BackupError>;
}

impl<E: Extents + ?Sized> Extents for Box<E> {
    fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
        (**self).next(from)
    }
}

/// Extents whose dirtiness is told by a list of areas.
pub(crate) struct Marked<'a, E> {
    inner: E,
    /// Ascending and disjoint.
    areas: &'a [Range<u64>],
    /// Areas add to what is dirty already; otherwise they are all that is.
    add: bool,
    rest: Option<Extent>,
}

impl<'a, E: Extents> Marked<'a, E> {
    /// Only what is in `areas` is dirty.
    pub(crate) fn only(inner: E, areas: &'a [Range<u64>]) -> Marked<'a, E> {
        Marked { inner, areas, add: false, rest: None }
    }

    /// What is in `areas` is dirty, too.
    pub(crate) fn also(inner: E, areas: &'a [Range<u64>]) -> Marked<'a, E> {
        Marked { inner, areas, add: true, rest: None }
    }
}

impl<E: Extents> Extents for Marked<'_, E> {
    fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
        let whole = match self.rest.take() {
            Some(rest) => rest,
            None => self.inner.next(from)?,
        };
        while self.areas.first().is_some_and(|area| area.end <= from) {
            self.areas = &self.areas[1..];
        }
        let (inside, until) = match self.areas.first() {
            Some(area) if area.start <= from => (true, area.end),
            Some(area) => (false, area.start),
            None => (false, u64::MAX),
        };
        let length = whole.length.min(until - from);
        if length < whole.length {
            self.rest = Some(Extent { length: whole.length - length, ..whole });
        }
        Ok(Extent { length, dirty: inside || (self.add && whole.dirty), ..whole })
    }
}

/// What to do with a run of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Changed, or not known: read.
    Data,
    /// Changed, and all zeros now.
    Zero,
    /// The same as in the restore point that the backup starts from.
    Same,
}

/// Clusters that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: u64,
    pub end: u64,
    pub class: Class,
}

/// From extents of bytes to runs of clusters that cover the disk. A cluster of which one byte changed has changed; one
/// that is not all zeros is data.
pub(crate) struct Runs<E> {
    extents: E,
    length: u64,
    at: u64,
    /// The extent that the next run begins in, and where that ends.
    current: Option<(Extent, u64)>,
}

impl<E: Extents> Runs<E> {
    pub(crate) fn new(extents: E, length: u64) -> Runs<E> {
        Runs { extents, length, at: 0, current: None }
    }

    /// The extent that `at` is in, and where it ends.
    fn extent(&mut self, at: u64) -> Result<(Extent, u64), BackupError> {
        if let Some(current) = self.current.filter(|(_, end)| at < *end) {
            return Ok(current);
        }
        let extent = self.extents.next(at)?;
        let current = (extent, at.saturating_add(extent.length.max(1)).min(self.length));
        self.current = Some(current);
        Ok(current)
    }

    /// The next run; `None` at the disk's end.
    pub(crate) fn next_run(&mut self) -> Result<Option<Run>, BackupError> {
        let first = self.at / CLUSTER_U64;
        if self.at >= self.length {
            return Ok(None);
        }
        let (extent, end) = self.extent(self.at)?;
        let whole = if end == self.length { cluster_count(end) } else { end / CLUSTER_U64 };
        if whole > first {
            self.at = (whole * CLUSTER_U64).min(self.length);
            return Ok(Some(Run { first, end: whole, class: class(extent.zero, extent.dirty) }));
        }
        // A cluster of several extents.
        let stop = ((first + 1) * CLUSTER_U64).min(self.length);
        let (mut zero, mut dirty) = (extent.zero, extent.dirty);
        let mut at = end;
        while at < stop {
            let (extent, end) = self.extent(at)?;
            zero &= extent.zero;
            dirty |= extent.dirty;
            at = end;
        }
        self.at = stop;
        Ok(Some(Run { first, end: first + 1, class: class(zero, dirty) }))
    }
}

fn class(zero: bool, dirty: bool) -> Class {
    match (zero, dirty) {
        (_, false) => Class::Same,
        (true, true) => Class::Zero,
        (false, true) => Class::Data,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A disk's extents from a list.
    struct Listed(Vec<Extent>);

    impl Extents for Listed {
        fn next(&mut self, _: u64) -> Result<Extent, BackupError> {
            Ok(self.0.remove(0))
        }
    }

    fn runs(extents: impl Extents, length: u64) -> Vec<Run> {
        let mut runs = Runs::new(extents, length);
        std::iter::from_fn(|| runs.next_run().unwrap()).collect()
    }

    #[test]
    fn a_cluster_of_several_extents_is_the_worst_of_them() {
        let of = |length, zero, dirty| Extent { length, zero, dirty };
        let extents =
            vec![of(CLUSTER_U64 * 3 + 512, false, false), of(512, true, true), of(CLUSTER_U64 * 5, true, false)];
        let length = extents.iter().map(|extent| extent.length).sum();
        let found: Vec<_> = runs(Listed(extents), length).iter().map(|run| (run.first, run.end, run.class)).collect();
        assert_eq!(found, [(0, 3, Class::Same), (3, 4, Class::Data), (4, 9, Class::Same)]);
        assert_eq!(length, CLUSTER_U64 * 8 + 1024, "the last cluster is cut off");
    }

    proptest! {
        #[test]
        fn runs_say_of_every_cluster_what_its_bytes_say(
            lengths in prop::collection::vec((1u64..200_000, any::<bool>(), any::<bool>()), 1..40),
            areas in prop::collection::vec((0u64..3_000_000, 1u64..150_000), 0..8),
            add in any::<bool>(),
        ) {
            let extents: Vec<_> =
                lengths.iter().map(|&(length, zero, dirty)| Extent { length, zero, dirty }).collect();
            let length: u64 = extents.iter().map(|extent| extent.length).sum();
            let areas = crate::changes::merged(areas.iter().map(|&(start, length)| start..start + length).collect());
            let marked = match add {
                true => Marked::also(Listed(extents.clone()), &areas),
                false => Marked::only(Listed(extents.clone()), &areas),
            };
            let found = runs(marked, length);
            // A model with one entry a 512 bytes would miss boundaries: this one asks byte ranges.
            let mut expected = Vec::new();
            for cluster in 0..cluster_count(length) {
                let (start, stop) = (cluster * CLUSTER_U64, ((cluster + 1) * CLUSTER_U64).min(length));
                let mut at = 0;
                let (mut zero, mut dirty) = (true, false);
                for extent in &extents {
                    if at < stop && at + extent.length > start {
                        zero &= extent.zero;
                        dirty |= extent.dirty && add;
                    }
                    at += extent.length;
                }
                dirty |= areas.iter().any(|area| area.start < stop && area.end > start);
                expected.push(class(zero, dirty));
            }
            let mut next = 0;
            for run in found {
                prop_assert_eq!(run.first, next);
                for cluster in run.first..run.end {
                    prop_assert_eq!(run.class, expected[usize::try_from(cluster).unwrap()]);
                }
                next = run.end;
            }
            prop_assert_eq!(next, cluster_count(length));
        }
    }
}
