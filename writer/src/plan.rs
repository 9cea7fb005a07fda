//! From runs of clusters to units of work, in the order of the disk.

use reseal_format::geometry::CLUSTER_U64;

use crate::BackupError;
use crate::source::{Class, Extents, Run, Runs};

/// Clusters of a unit that is read: 1 MiB, so that a read is large and a thread has something to do, yet many units fit
/// in memory.
pub(crate) const UNIT: u64 = 16;

/// What is to be done with the clusters of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// Read, and what is new of them stored.
    Read,
    /// They are said to be as they were: read, to see whether that is true.
    Check,
    /// They are as they were: mapped as the restore point before maps them.
    Keep,
    /// They are all zeros now.
    Clear,
}

/// A run of clusters. Those between units are holes, unless the backup starts from what is said to have changed: then
/// units cover the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unit {
    /// Counts units from 0, so that results can be put back in order.
    pub sequence: u64,
    pub first: u64,
    pub count: u64,
    pub task: Task,
}

impl Unit {
    /// Bytes of it on a disk of `length` bytes.
    pub(crate) fn length(&self, length: u64) -> usize {
        let start = self.first * CLUSTER_U64;
        let bytes = (self.count.min(UNIT) * CLUSTER_U64).min(length.saturating_sub(start));
        usize::try_from(bytes).unwrap_or(0)
    }
}

/// Which clusters are read although they are said to be unchanged: one of each stretch, chosen at random, so that none is
/// safe and a short lie is found as likely at one place as at another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Clusters of a stretch.
    pub stretch: u64,
    /// Chooses within them.
    pub seed: u64,
}

impl Sample {
    /// At least so many percent of the clusters; `None` if that is none.
    pub(crate) fn percent(percent: f64, seed: u64) -> Option<Sample> {
        #[allow(clippy::cast_possible_truncation)] // it is within the range of any integer
        let stretch = (100.0 / percent).clamp(1.0, 1e9) as u64;
        (percent > 0.0).then_some(Sample { stretch, seed })
    }

    /// The first chosen cluster from `from` on.
    fn next(self, from: u64) -> u64 {
        let of = |stretch: u64| stretch * self.stretch + mix(self.seed ^ stretch) % self.stretch;
        let this = of(from / self.stretch);
        if this >= from { this } else { of(from / self.stretch + 1) }
    }
}

/// SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The units of a disk, one at a time: a plan of a sparse disk of any size takes no memory.
pub(crate) struct Plan<E> {
    runs: Runs<E>,
    /// What is left of the current run.
    run: Option<Run>,
    sample: Option<Sample>,
    /// Whether holes need units: where the clusters of the restore point before would show otherwise.
    clears: bool,
    sequence: u64,
}

impl<E: Extents> Plan<E> {
    /// A plan for a disk of that length. `sample` is what to read of what is said to be unchanged.
    pub(crate) fn new(extents: E, length: u64, clears: bool, sample: Option<Sample>) -> Plan<E> {
        Plan { runs: Runs::new(extents, length), run: None, sample, clears, sequence: 0 }
    }

    fn next_run(&mut self) -> Result<Option<Run>, BackupError> {
        if let Some(run) = self.run.take() {
            return Ok(Some(run));
        }
        loop {
            match self.runs.next_run()? {
                Some(run) if run.class == Class::Zero && !self.clears => {}
                other => return Ok(other),
            }
        }
    }

    /// What to do with the start of a run, and where that ends.
    fn cut(&self, run: Run) -> (Task, u64) {
        // Aligned, so that a file that is written in other places is still cut the same way.
        let unit_end = run.first - run.first % UNIT + UNIT;
        match (run.class, self.sample) {
            (Class::Data, _) => (Task::Read, unit_end),
            (Class::Zero, _) => (Task::Clear, run.end),
            (Class::Same, None) => (Task::Keep, run.end),
            (Class::Same, Some(sample)) => {
                let chosen = sample.next(run.first);
                if chosen > run.first {
                    return (Task::Keep, chosen);
                }
                // Neighbours that are chosen, too, are read with it.
                let end = (run.first + 1..unit_end).find(|&next| sample.next(next) != next);
                (Task::Check, end.unwrap_or(unit_end))
            }
        }
    }

    /// The next unit.
    pub(crate) fn next_unit(&mut self) -> Result<Option<Unit>, BackupError> {
        let Some(run) = self.next_run()? else { return Ok(None) };
        let (task, end) = self.cut(run);
        let end = end.min(run.end);
        self.run = (end < run.end).then_some(Run { first: end, ..run });
        self.sequence += 1;
        Ok(Some(Unit { sequence: self.sequence - 1, first: run.first, count: end - run.first, task }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::source::{Extent, FileSource, Marked, Still, StillExtents};

    fn units<E: Extents>(mut plan: Plan<E>) -> Vec<Unit> {
        std::iter::from_fn(|| plan.next_unit().unwrap()).collect()
    }

    #[test]
    fn units_cover_the_data_once_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len((5 << 30) + 5000).unwrap();
        let written = [0u64, 70_000, 1 << 20, (1 << 30) - 4096, 1 << 30, (3 << 30) + 4096, 5 << 30];
        for at in written {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        let source = FileSource::open(&path).unwrap();
        let units = units(Plan::new(StillExtents(&source), source.length(), false, None));
        for (nth, unit) in units.iter().enumerate() {
            assert!(unit.count >= 1 && unit.first / UNIT == (unit.first + unit.count - 1) / UNIT);
            assert_eq!((unit.sequence, unit.task), (nth as u64, Task::Read));
        }
        assert!(units.windows(2).all(|pair| pair[0].first + pair[0].count <= pair[1].first));
        for at in written {
            let cluster = at / CLUSTER_U64;
            assert!(units.iter().any(|unit| (unit.first..unit.first + unit.count).contains(&cluster)), "{at}");
        }
        assert!(units.len() < 20);
    }

    /// A disk of data.
    struct Full(u64);

    impl Extents for Full {
        fn next(&mut self, from: u64) -> Result<Extent, BackupError> {
            Ok(Extent { length: self.0 - from, zero: false, dirty: false })
        }
    }

    #[test]
    fn a_sample_of_what_is_unchanged_is_read_and_the_rest_kept() {
        let length = CLUSTER_U64 * 100_000;
        let changed = vec![CLUSTER_U64 * 5000..CLUSTER_U64 * 5100, CLUSTER_U64 * 99_999..CLUSTER_U64 * 99_999 + 1];
        for (percent, least, most) in [(0.0, 0, 0), (1.0, 990, 1001), (30.0, 33_000, 33_400), (100.0, 99_899, 99_899)] {
            let plan = Plan::new(Marked::only(Full(length), &changed), length, true, Sample::percent(percent, 77));
            let units = units(plan);
            let mut next = 0;
            let (mut read, mut checked) = (0, 0);
            for unit in units {
                assert_eq!(unit.first, next, "units cover the disk");
                next += unit.count;
                match unit.task {
                    Task::Read => read += unit.count,
                    Task::Check => checked += unit.count,
                    Task::Keep => {}
                    Task::Clear => panic!("nothing is zero"),
                }
            }
            assert_eq!((next, read), (100_000, 101));
            assert!((least..=most).contains(&checked), "{percent} %: {checked}");
        }
    }
}
