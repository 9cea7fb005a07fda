//! Blocks of disks that are elsewhere: what was read, kept while there is room, and wiped when it goes.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use reseal_format::geometry::{CLUSTER, CLUSTER_U64, is_zero};
use reseal_format::ids::PointId;
use reseal_vault::cache::Weigh;
use reseal_vault::wipe::Secret;

use super::trouble::Trouble;

/// What a block costs beside its bytes: the entries that lead to it.
const OVERHEAD: usize = 160;
/// How long a wait may go on after it has become pointless.
const NAP: Duration = Duration::from_millis(100);

/// A disk of any restore point: the point, and which of its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DiskKey {
    pub(super) point: PointId,
    pub(super) nth: usize,
}

/// Which block: a cluster of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey {
    pub(super) disk: DiskKey,
    pub(super) number: u64,
}

/// The bytes of a disk that are a block.
pub(super) fn bytes_of(number: u64, length: u64) -> Range<u64> {
    let start = number * CLUSTER_U64;
    start..(start + CLUSTER_U64).min(length)
}

/// A cluster's bytes; none where all are zero.
pub(super) struct Block(Option<Secret>);

impl Block {
    /// A block of these bytes, which are taken.
    pub(super) fn of(bytes: Vec<u8>) -> Block {
        let bytes = Secret(bytes);
        Block((!is_zero(&bytes.0)).then_some(bytes))
    }

    /// Copies its bytes from `at` on.
    pub(super) fn copy_to(&self, at: usize, out: &mut [u8]) {
        debug_assert!(at + out.len() <= CLUSTER);
        match &self.0 {
            Some(bytes) => out.copy_from_slice(&bytes.0[at..at + out.len()]),
            None => out.fill(0),
        }
    }
}

impl Weigh for Block {
    fn weight(&self) -> usize {
        self.0.as_ref().map_or(0, |bytes| bytes.0.capacity()) + OVERHEAD
    }
}

/// Where a block that was asked for will be.
#[derive(Default)]
pub(super) struct Slot {
    answer: Mutex<Option<Result<Arc<Block>, Trouble>>>,
    filled: Condvar,
}

impl Slot {
    /// It is there, or will not come.
    pub(super) fn fill(&self, answer: Result<Arc<Block>, Trouble>) {
        self.answer.lock().get_or_insert(answer);
        self.filled.notify_all();
    }

    /// Waits for it; nothing if it has not come by then, or waiting has become pointless.
    pub(super) fn wait(&self, until: Instant, stop: &dyn Fn() -> bool) -> Option<Result<Arc<Block>, Trouble>> {
        let mut answer = self.answer.lock();
        loop {
            if answer.is_some() {
                return answer.clone();
            }
            let now = Instant::now();
            if now >= until || stop() {
                return None;
            }
            self.filled.wait_until(&mut answer, until.min(now + NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_its_bytes_and_zeros_take_none() {
        let mut out = [1; 4];
        Block::of(b"0123456789".to_vec()).copy_to(3, &mut out);
        assert_eq!(&out, b"3456");
        let zeros = Block::of(vec![0; CLUSTER]);
        zeros.copy_to(100, &mut out);
        assert_eq!(out, [0; 4]);
        assert_eq!(zeros.weight(), OVERHEAD);
    }

    #[test]
    fn who_waits_is_given_what_came_first_and_waits_no_longer_than_he_may() {
        let slot = Slot::default();
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(slot.wait(soon(), &|| false).is_none());
        assert!(slot.wait(Instant::now() + Duration::from_secs(60), &|| true).is_none());
        slot.fill(Err(Trouble::new(reseal_vault::Class::Damaged, "first")));
        slot.fill(Ok(Arc::new(Block::of(vec![]))));
        assert!(matches!(slot.wait(soon(), &|| true), Some(Err(_))));
    }
}
