//! One disk of another site: what of it is here, and waiting for what is not.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use parking_lot::Mutex;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64};
use reseal_format::names::{DiskName, VmName};
use reseal_nbd::{Extent, NbdError};
use reseal_vault::cache::Cache;
use reseal_vault::{Class, VaultError, Wait};

use super::block::{Block, BlockKey, DiskKey, Slot, bytes_of};
use super::extents::ExtentMap;
use super::opening::Opening;
use super::there::Opens;
use super::trouble::Trouble;

/// Connections over which what failed on the one before is tried once more.
const TRIES: u32 = 2;
/// Pumps of all disks beyond which none gets one more than its first. A server takes 64 connections of one client by default, and
/// others may read under the same certificate.
const MOST_PUMPS: usize = 32;
/// As much as one question about extents can be about.
const AREA: u64 = (1 << 32) - CLUSTER_U64;
/// Questions about extents at a time, at most: an empty disk of terabytes is crossed in seconds, however long the line.
const MOST_AREAS: u64 = 32;
/// How long a wait may go on after it has become pointless.
const NAP: Duration = Duration::from_millis(100);

/// What all disks of a site share.
pub(super) struct Site {
    pub(super) opens: Box<dyn Opens>,
    /// Its name in messages.
    pub(super) place: String,
    /// How long anybody waits.
    pub(super) limit: Duration,
    pub(super) blocks: Cache<BlockKey, Arc<Block>>,
    /// Bytes that were asked for and have not come.
    pub(super) flying: AtomicUsize,
    /// Pumps that run, for all disks.
    pub(super) pumps: AtomicUsize,
    pub(super) stopped: AtomicBool,
}

impl Site {
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    pub(super) fn has_room_for_pump(&self) -> bool {
        self.pumps.load(Ordering::Relaxed) < MOST_PUMPS
    }

    fn silent(&self) -> VaultError {
        let message = match self.is_stopped() {
            true => format!("{} is not waited for any longer", self.place),
            false => format!("{} did not answer within {} s", self.place, self.limit.as_secs_f32()),
        };
        VaultError::Elsewhere { message, class: Class::Unreachable }
    }
}

/// Connections to a disk, and when they were last wanted.
pub(super) struct Line {
    pub(super) opening: Option<Arc<Opening>>,
    pub(super) used: Instant,
}

/// A disk.
pub(super) struct RemoteDisk {
    pub(super) site: Arc<Site>,
    pub(super) key: DiskKey,
    pub(super) vm: VmName,
    pub(super) number: u32,
    pub(super) name: DiskName,
    pub(super) length: u64,
    pub(super) line: Mutex<Line>,
    map: Mutex<ExtentMap>,
}

/// Opens the line to a disk if it is not open.
pub(super) type Open<'a> = &'a dyn Fn() -> Result<Arc<Opening>, VaultError>;

impl RemoteDisk {
    pub(super) fn new(site: Arc<Site>, key: DiskKey, (vm, number): (VmName, u32), name: DiskName, length: u64) -> Self {
        let line = Mutex::new(Line { opening: None, used: Instant::now() });
        RemoteDisk { site, key, vm, number, name, length, line, map: Mutex::default() }
    }

    fn block(&self, number: u64) -> Option<Arc<Block>> {
        self.site.blocks.get(&BlockKey { disk: self.key, number })
    }

    /// Whether a block needs not be asked for.
    pub(super) fn is_known(&self, number: u64) -> bool {
        self.is_hole(number) || self.block(number).is_some()
    }

    fn is_hole(&self, number: u64) -> bool {
        let bytes = bytes_of(number, self.length);
        self.map.lock().is_hole(bytes.start, bytes.end)
    }

    /// Fills `out` from `offset` and byte `done` of it on.
    pub(super) fn read_on(
        &self,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        wait: Wait,
        open: Open<'_>,
    ) -> Result<(), VaultError> {
        assert!(offset + out.len() as u64 <= self.length, "the caller clips a range to the disk");
        let end = (offset + out.len() as u64).div_ceil(CLUSTER_U64);
        let until = Instant::now() + self.site.limit;
        let mut tries = 1;
        let mut asked: VecDeque<(u64, Arc<Slot>)> = VecDeque::new();
        while *done < out.len() {
            let at = offset + *done as u64;
            let (number, within) = (at / CLUSTER_U64, usize::try_from(at % CLUSTER_U64).unwrap_or(0));
            let length = (out.len() - *done).min(CLUSTER - within);
            let part = &mut out[*done..*done + length];
            asked.retain(|(other, _)| *other >= number);
            let coming = asked.front().filter(|(other, _)| *other == number).map(|(_, slot)| slot.clone());
            if let Some(slot) = coming {
                match slot.wait(until, &|| self.site.is_stopped()) {
                    Some(Ok(block)) => block.copy_to(within, part),
                    Some(Err(trouble)) if trouble.is_passing && tries < TRIES => {
                        tries += 1;
                        asked.clear();
                        continue;
                    }
                    Some(Err(trouble)) => return Err(trouble.into()),
                    None => return Err(self.site.silent()),
                }
            } else if self.is_hole(number) {
                part.fill(0);
            } else if let Some(block) = self.block(number) {
                block.copy_to(within, part);
            } else if wait == Wait::MustNot {
                return Err(VaultError::WouldBlock);
            } else {
                asked = self.ask(number..end, open, until)?.into();
                continue;
            }
            *done += length;
        }
        Ok(())
    }

    /// Asks for blocks; over a new line, if the one that there was has just ended.
    fn ask(&self, blocks: Range<u64>, open: Open<'_>, until: Instant) -> Result<super::opening::Asked, VaultError> {
        loop {
            match open()?.ask(blocks.clone()) {
                Err(trouble) if trouble.is_passing && Instant::now() < until && !self.site.is_stopped() => {}
                asked => return Ok(asked?),
            }
        }
    }

    /// Asks for blocks that will be wanted soon, and learns where holes are behind them.
    pub(super) fn prepare(&self, blocks: Range<u64>, open: Open<'_>) -> Result<(), VaultError> {
        let until = Instant::now() + self.site.limit;
        if blocks.clone().any(|number| !self.is_known(number)) {
            self.ask(blocks.clone(), open, until)?;
        }
        let behind = blocks.end * CLUSTER_U64;
        if behind < self.length && self.map.lock().at(behind).is_none() {
            self.learn(behind, 1, open, until)?;
        }
        Ok(())
    }

    /// Where data, or a hole, begins at or after `offset`.
    pub(super) fn next(&self, offset: u64, hole: bool, open: Open<'_>) -> Result<Option<u64>, VaultError> {
        let until = Instant::now() + self.site.limit;
        let mut at = offset;
        let mut areas = 1;
        while at < self.length {
            let known = self.map.lock().at(at);
            match known {
                Some((_, kind)) if kind == hole => return Ok(Some(at)),
                Some((end, _)) => at = end,
                None => {
                    self.learn(at, areas, open, until)?;
                    areas = (areas * 2).min(MOST_AREAS);
                }
            }
        }
        Ok(None)
    }

    /// Learns what is at `from` and behind it, with so many questions at a time.
    fn learn(&self, from: u64, areas: u64, open: Open<'_>, until: Instant) -> Result<(), VaultError> {
        let mut tries = 1;
        loop {
            match self.try_to_learn(from, areas, &open()?, until) {
                Err(Some(trouble)) if trouble.is_passing && tries < TRIES => tries += 1,
                Err(Some(trouble)) => return Err(trouble.into()),
                Err(None) => return Err(self.site.silent()),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// The same; nothing is what came of it if nobody answered.
    fn try_to_learn(
        &self,
        from: u64,
        areas: u64,
        opening: &Arc<Opening>,
        until: Instant,
    ) -> Result<(), Option<Trouble>> {
        let starts = (0..areas).map(|nth| from + nth * AREA).take_while(|start| *start < self.length);
        let asked = starts.map(|start| Ok((start, opening.ask_extents(start, AREA.min(self.length - start))?)));
        for (start, answers) in asked.collect::<Result<Vec<_>, Trouble>>().map_err(Some)? {
            let extents = self.extents(&answers, until).ok_or(None)?;
            match extents {
                Ok(Ok(extents)) => self.map.lock().add(start, &extents),
                // Those behind are asked for again when somebody gets there.
                Ok(Err(_)) | Err(_) if start > from => return Ok(()),
                Ok(Err(error)) => return Err(Some(Trouble::reading(&error))),
                Err(Closed) => return Err(Some(opening.trouble())),
            }
        }
        Ok(())
    }

    /// An answer about extents; nothing if none came.
    fn extents(
        &self,
        answers: &Receiver<Result<Vec<Extent>, NbdError>>,
        until: Instant,
    ) -> Option<Result<Result<Vec<Extent>, NbdError>, Closed>> {
        loop {
            let now = Instant::now();
            if now >= until || self.site.is_stopped() {
                return None;
            }
            match answers.recv_deadline(until.min(now + NAP)) {
                Ok(answer) => return Some(Ok(answer)),
                Err(RecvTimeoutError::Disconnected) => return Some(Err(Closed)),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Nobody will answer.
struct Closed;
