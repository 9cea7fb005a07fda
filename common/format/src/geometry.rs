//! All arithmetic between bytes, clusters and the index tree.

/// Bytes of a cluster: the unit of change, deduplication and sealing.
pub const CLUSTER: usize = 64 * 1024;
/// `CLUSTER` as a file offset.
pub const CLUSTER_U64: u64 = CLUSTER as u64;
/// Children of an index node; a leaf maps as many clusters.
pub const FANOUT: usize = 1024;
/// `FANOUT` as a count of clusters.
pub const FANOUT_U64: u64 = FANOUT as u64;
/// Highest level of a root: a leaf is level 0, so four levels address 64 PiB.
pub const MAX_LEVEL: u8 = 3;
/// Longest disk, in bytes.
pub const MAX_DISK: u64 = CLUSTER_U64 * FANOUT_U64 * FANOUT_U64 * FANOUT_U64 * FANOUT_U64;

/// Which cluster of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterIndex(pub u64);

impl ClusterIndex {
    /// The cluster that holds the byte at `offset`.
    pub fn of_byte(offset: u64) -> ClusterIndex {
        ClusterIndex(offset / CLUSTER_U64)
    }

    /// Offset of its first byte on the disk.
    pub fn first_byte(self) -> u64 {
        self.0 * CLUSTER_U64
    }

    /// The leaf that maps it, counted from the start of the disk.
    pub fn leaf(self) -> u64 {
        self.0 / FANOUT_U64
    }

    /// Which child leads to it in a node of that level.
    pub fn slot(self, level: u8) -> usize {
        let below = FANOUT_U64.pow(u32::from(level));
        usize::try_from((self.0 / below) % FANOUT_U64).unwrap_or(0)
    }
}

/// Clusters of a disk of `length` bytes; the last one may be partly past the end, where it counts as zeros.
pub fn cluster_count(length: u64) -> u64 {
    length.div_ceil(CLUSTER_U64)
}

/// Clusters below one node of that level.
pub fn clusters_below(level: u8) -> u64 {
    FANOUT_U64.pow(u32::from(level) + 1)
}

/// Level of the root of a disk of `length` bytes: the lowest that covers it.
pub fn root_level(length: u64) -> u8 {
    let clusters = cluster_count(length);
    (0..MAX_LEVEL).find(|&level| clusters <= clusters_below(level)).unwrap_or(MAX_LEVEL)
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any 16 bytes are a valid u128.
    let (head, wide, tail) = unsafe { bytes.align_to::<u128>() };
    head.iter().all(|&b| b == 0)
        && tail.iter().all(|&b| b == 0)
        // Folding eight words at a time lets the compiler use wide registers; most non-zero data ends in the first.
        && wide.chunks(8).all(|words| words.iter().fold(0, |sum, &word| sum | word) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_levels_follow_the_length() {
        let leaf = CLUSTER_U64 * FANOUT_U64;
        assert_eq!(root_level(0), 0);
        assert_eq!(root_level(leaf), 0);
        assert_eq!(root_level(leaf + 1), 1);
        assert_eq!(root_level(leaf * FANOUT_U64), 1);
        assert_eq!(root_level(leaf * FANOUT_U64 + 1), 2);
        assert_eq!(root_level(MAX_DISK), 3);
    }

    #[test]
    fn slots_spell_the_index_in_base_1024() {
        let cluster = ClusterIndex(5 + 7 * 1024 + 9 * 1024 * 1024);
        assert_eq!((cluster.slot(0), cluster.slot(1), cluster.slot(2), cluster.slot(3)), (5, 7, 9, 0));
        assert_eq!(cluster.leaf(), 7 + 9 * 1024);
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0u8; 4096 + 7];
        assert!(is_zero(&bytes[1..]));
        for at in [1usize, 2, 100, 4000, 4102] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes[1..]));
            bytes[at] = 0;
        }
    }
}
