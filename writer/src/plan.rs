//! From extents of data to units of work: runs of whole clusters, in the order of the disk.

use reseal_format::geometry::{CLUSTER_U64, cluster_count};

use crate::BackupError;
use crate::source::Source;

/// Clusters of a unit: 1 MiB, so that a read is large and a thread has something to do, yet many units fit in memory.
pub(crate) const UNIT: u64 = 16;

/// A run of clusters that may hold data. Those between units are holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unit {
    /// Counts units from 0, so that results can be put back in order.
    pub sequence: u64,
    pub first: u64,
    pub count: u64,
}

/// The units of a disk, one at a time: a plan of a sparse disk of any size takes no memory.
pub(crate) struct Plan<'a> {
    source: &'a Source,
    /// What is left of the current extent, in clusters.
    extent: Option<(u64, u64)>,
    /// First cluster that is not planned yet.
    next: u64,
    sequence: u64,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(source: &'a Source) -> Plan<'a> {
        Plan { source, extent: None, next: 0, sequence: 0 }
    }

    fn next_extent(&mut self) -> Result<Option<(u64, u64)>, BackupError> {
        match self.source.next_data(self.next * CLUSTER_U64)? {
            None => Ok(None),
            Some((start, end)) => {
                let first = (start / CLUSTER_U64).max(self.next);
                let end = end.div_ceil(CLUSTER_U64).min(cluster_count(self.source.length())).max(first + 1);
                Ok(Some((first, end)))
            }
        }
    }

    /// The next unit, aligned so that a file that is written in other places is still cut the same way.
    pub(crate) fn next_unit(&mut self) -> Result<Option<Unit>, BackupError> {
        let extent = match self.extent.take() {
            Some(extent) => Some(extent),
            None => self.next_extent()?,
        };
        let Some((first, end)) = extent else { return Ok(None) };
        let stop = (first - first % UNIT + UNIT).min(end);
        self.extent = (stop < end).then_some((stop, end));
        self.next = stop;
        self.sequence += 1;
        Ok(Some(Unit { sequence: self.sequence - 1, first, count: stop - first }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

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
        let source = Source::open(&path, false).unwrap();
        let mut plan = Plan::new(&source);
        let mut units = Vec::new();
        while let Some(unit) = plan.next_unit().unwrap() {
            assert!(unit.count >= 1 && unit.first / UNIT == (unit.first + unit.count - 1) / UNIT);
            assert_eq!(unit.sequence, units.len() as u64);
            units.push(unit);
        }
        assert!(units.windows(2).all(|pair| pair[0].first + pair[0].count <= pair[1].first));
        for at in written {
            let cluster = at / CLUSTER_U64;
            assert!(units.iter().any(|unit| (unit.first..unit.first + unit.count).contains(&cluster)), "{at}");
        }
        assert!(units.len() < 20);
    }
}
