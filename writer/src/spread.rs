//! Work that several threads do, one piece after the other.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::BackupError;

/// Does each piece on one of at most so many threads. The first that fails sets `stop`, and no other piece is begun; so does whoever
/// else sets it.
pub(crate) fn spread<'p, P: Sync>(
    pieces: &'p [P],
    threads: usize,
    stop: &AtomicBool,
    work: impl Fn(&'p P) -> Result<(), BackupError> + Sync,
) -> Result<(), BackupError> {
    let next = AtomicUsize::new(0);
    let one = || {
        while !stop.load(Ordering::Relaxed) {
            let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            if let Err(e) = work(piece) {
                stop.store(true, Ordering::Relaxed);
                return Err(e);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.clamp(1, pieces.len().max(1))).map(|_| scope.spawn(one)).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        results.into_iter().try_for_each(|result| result.unwrap_or(Err(BackupError::Thread)))
    })
}
