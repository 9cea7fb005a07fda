//! Sequential readers of a slow store are recognised, and what they will want next is prepared before they ask.
//!
//! A store that answers at once needs none of this: the kernel reads ahead itself, with requests that several FUSE threads
//! decompress at a time, straight into the reply. Where the store makes a reader wait, the kernel's readahead is too short
//! to hide it.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use reseal_format::geometry::CLUSTER_U64;

use crate::disks::{DiskOf, Disks, Reach};
use crate::files::OpenPoint;
use reseal_vault::disk::with_scratch;

/// A reader counts as sequential once it has read this much in order: more than a file system reads in one go for its own
/// tables.
const PROOF: u64 = 512 * 1024;
/// Requests of one reader overtake one another by no more than this, with several threads serving it.
const SLACK: u64 = 4 << 20;
/// For how much reading a store counts as slow after it made a reader wait.
const PATIENCE: u64 = 32 << 20;
/// Orders that wait, at most.
const QUEUE: usize = 64;
const STACK: usize = 512 * 1024;

#[derive(Default)]
struct State {
    /// Where the reader goes on, if it is sequential.
    expected: u64,
    /// Bytes read in order so far.
    run: u64,
    /// Up to where clusters were ordered.
    ordered: u64,
    /// Bytes for which the store still counts as slow.
    slow: u64,
    /// How far ahead is read; 0 before anything was.
    window: u64,
    /// Where the reader was when that grew last.
    grown: u64,
}

/// What one open file is read for.
#[derive(Default)]
pub(crate) struct Stream(Mutex<State>);

impl Stream {
    /// The store made this reader wait.
    pub(crate) fn waited(&self) {
        let mut state = self.0.lock();
        state.slow = PATIENCE;
        // One who waits for what was ordered needs it ordered earlier. Once for what is under way, not for each request.
        if state.window > 0 && state.expected >= state.grown + state.window {
            (state.window, state.grown) = (state.window * 2, state.expected);
        }
    }

    /// Notes a read; the clusters to open ahead, if it is one of a sequence.
    pub(crate) fn advance(&self, offset: u64, length: u64, disk_length: u64, reach: Reach) -> Range<u64> {
        let mut state = self.0.lock();
        let end = offset + length;
        if offset.abs_diff(state.expected) > SLACK {
            *state = State { expected: end, run: length, slow: state.slow, ..State::default() };
            return 0..0;
        }
        state.run = state.run.saturating_add(length);
        state.expected = state.expected.max(end);
        state.slow = state.slow.saturating_sub(length);
        if state.run < PROOF || (state.slow == 0 && !reach.is_always) {
            return 0..0;
        }
        let from = state.ordered.max(state.expected).div_ceil(CLUSTER_U64);
        state.window = state.window.clamp(reach.window, reach.most.max(reach.window));
        let to = (state.expected + state.window).min(disk_length).div_ceil(CLUSTER_U64);
        state.ordered = to * CLUSTER_U64;
        from..to.max(from)
    }
}

struct Order {
    point: Arc<OpenPoint>,
    disk: usize,
    clusters: Range<u64>,
}

/// Prepares clusters ahead of readers.
pub(crate) struct Readahead(Sender<Order>);

impl Readahead {
    /// With so many workers.
    pub(crate) fn new(disks: &Disks, workers: usize) -> std::io::Result<Readahead> {
        let (orders, queue) = bounded::<Order>(QUEUE);
        for nth in 0..workers {
            let (disks, queue) = (disks.clone(), queue.clone());
            thread::Builder::new()
                .name(format!("ahead-{nth}"))
                .stack_size(STACK)
                .spawn(move || work(&disks, &queue))?;
        }
        Ok(Readahead(orders))
    }

    /// Orders clusters of a disk; what finds no room is left to the reader.
    pub(crate) fn order(&self, point: &Arc<OpenPoint>, disk: usize, clusters: Range<u64>) {
        if !clusters.is_empty() {
            let _ = self.0.try_send(Order { point: point.clone(), disk, clusters });
        }
    }
}

fn work(disks: &Disks, queue: &Receiver<Order>) {
    while let Ok(order) = queue.recv() {
        let Some(disk) = DiskOf::new(order.point.manifest(), order.disk) else { continue };
        // What fails here fails again when the reader gets there, and is said then.
        let _ = with_scratch(0, |tools, _| disks.prepare(disk, order.clusters, tools));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 1 << 30;
    const SLOW: Reach = Reach { window: 4 << 20, most: 16 << 20, is_always: false };

    #[test]
    fn a_sequence_is_read_ahead_of_each_cluster_once() {
        let stream = Stream::default();
        stream.waited();
        let mut ordered = Vec::new();
        for request in 0..100 {
            ordered.extend(stream.advance(request * 131_072, 131_072, DISK, SLOW));
        }
        let first = ordered[0];
        assert!(first * CLUSTER_U64 >= PROOF);
        assert_eq!(ordered, (first..first + ordered.len() as u64).collect::<Vec<_>>());
        assert_eq!(*ordered.last().unwrap(), (100 * 131_072 + SLOW.window) / CLUSTER_U64 - 1);
    }

    #[test]
    fn requests_out_of_order_still_make_a_sequence() {
        let stream = Stream::default();
        stream.waited();
        let mut ordered = 0;
        for pair in 0..50u64 {
            for request in [2 * pair + 1, 2 * pair] {
                ordered += stream.advance(request * 131_072, 131_072, DISK, SLOW).count();
            }
        }
        assert!(ordered > 150, "{ordered}");
    }

    #[test]
    fn random_reads_and_the_end_order_nothing() {
        let stream = Stream::default();
        let mut at = 12_345u64;
        for _ in 0..1000 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            stream.waited();
            assert!(stream.advance((at % DISK) & !4095, 4096, DISK, SLOW).is_empty());
        }
        let stream = Stream::default();
        stream.waited();
        for request in 0..8 {
            let clusters = stream.advance(request * 131_072, 131_072, 1 << 20, SLOW);
            assert!(clusters.end <= 16, "nothing past the end");
        }
    }

    #[test]
    fn a_store_that_keeps_up_is_left_alone() {
        let stream = Stream::default();
        let read = |from: u64, to: u64| -> usize {
            (from..to).map(|request| stream.advance(request * 131_072, 131_072, DISK, SLOW).count()).sum()
        };
        assert_eq!(read(0, 100), 0);
        stream.waited();
        assert!(read(100, 200) > 0);
        read(200, 500);
        assert_eq!(read(500, 600), 0, "and again once it does");
    }

    #[test]
    fn a_reader_who_waits_all_the_same_is_read_further_ahead_of() {
        let stream = Stream::default();
        let mut ahead = Vec::new();
        for request in 0..1000u64 {
            stream.waited();
            let clusters = stream.advance(request * 131_072, 131_072, DISK, SLOW);
            ahead.push((clusters.end * CLUSTER_U64).saturating_sub((request + 1) * 131_072));
        }
        assert_eq!(ahead.iter().copied().max(), Some(SLOW.most), "it grows, and not beyond that");
        assert!(ahead[60] <= SLOW.window * 2 + CLUSTER_U64, "step by step");
    }

    #[test]
    fn a_line_is_read_ahead_of_without_waiting_first() {
        let reach = Reach { window: 16 << 20, most: 16 << 20, is_always: true };
        let stream = Stream::default();
        let ordered = (0..100u64).flat_map(|request| stream.advance(request * 131_072, 131_072, DISK, reach)).count();
        assert_eq!(ordered as u64, (100 * 131_072 + reach.window - PROOF) / CLUSTER_U64);
    }
}
