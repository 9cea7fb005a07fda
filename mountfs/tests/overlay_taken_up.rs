//! An overlay whose process dies while the guest lives: whoever takes it up has all that the guest was told is written, and a power cut
//! still leaves what was flushed and nothing else.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests end where they meet what they did not expect

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::overlay::{OverlayKey, PAGE, PAGE_U64};
use reseal_mountfs::overlay::{BaseError, Facts, Medium, Overlay, OverlayError, Unflushed};
use zeroize::Zeroizing;

/// Not a multiple of a block.
const LENGTH: u64 = 40 * PAGE_U64 - 700;
const SECTOR: usize = 512;
const NO_LIMIT: u64 = 1 << 40;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[derive(Default)]
struct Kept {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What was written since the last sync.
    pending: Vec<(usize, Vec<u8>)>,
    /// Writes and syncs that are left before the process dies; the last write is there in part.
    left: Option<u64>,
    done: u64,
}

/// What the system keeps of a file when a process dies, and what a disk does when the power goes.
#[derive(Clone, Default)]
struct File(Arc<Mutex<Kept>>);

impl File {
    /// Nobody is killed any more.
    fn revive(&self, left: Option<u64>) {
        let mut kept = self.0.lock();
        (kept.left, kept.done) = (left, 0);
    }

    /// Writes and syncs since then.
    fn done(&self) -> u64 {
        self.0.lock().done
    }

    /// What the disk has when the power comes back: of each write since the last sync some sectors.
    fn cut(&self, random: &mut Random) -> File {
        let kept = self.0.lock();
        let mut durable = kept.durable.clone();
        let share = [0, 15, 29, 30][random.below(4) as usize];
        for (at, bytes) in &kept.pending {
            for (nth, sector) in bytes.chunks(SECTOR).enumerate().filter(|_| random.below(30) < share) {
                let at = at + nth * SECTOR;
                durable.resize(durable.len().max(at + sector.len()), 0);
                durable[at..at + sector.len()].copy_from_slice(sector);
            }
        }
        durable.resize(durable.len().next_multiple_of(PAGE), 0);
        File(Arc::new(Mutex::new(Kept { now: durable.clone(), durable, ..Kept::default() })))
    }

    fn step(kept: &mut Kept) -> Result<(), bool> {
        kept.done += 1;
        match &mut kept.left {
            None => Ok(()),
            Some(0) => Err(false),
            Some(left) => {
                *left -= 1;
                if *left == 0 { Err(true) } else { Ok(()) }
            }
        }
    }
}

impl Medium for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let kept = self.0.lock();
        let read = kept.now.get(at as usize..at as usize + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(read);
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut kept = self.0.lock();
        let stepped = File::step(&mut kept);
        let there = match stepped {
            Ok(()) => bytes,
            // Pages are copied one after the other.
            Err(true) => &bytes[..bytes.len() / PAGE / 2 * PAGE],
            Err(false) => return Err(io::Error::other("killed")),
        };
        let at = at as usize;
        let end = kept.now.len().max(at + there.len());
        kept.now.resize(end, 0);
        kept.now[at..at + there.len()].copy_from_slice(there);
        kept.pending.push((at, there.to_vec()));
        stepped.map_err(|_| io::Error::other("killed"))
    }

    fn sync(&self) -> io::Result<()> {
        let mut kept = self.0.lock();
        File::step(&mut kept).map_err(|_| io::Error::other("killed"))?;
        kept.durable = kept.now.clone();
        kept.pending.clear();
        Ok(())
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        let mut kept = self.0.lock();
        let end = kept.now.len().max((at + length) as usize);
        kept.now.resize(end, 0);
        Ok(())
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        self.write_at(at, &vec![0; length as usize])
    }
}

fn key() -> OverlayKey {
    OverlayKey::from_bytes(Zeroizing::new([7; 32]))
}

fn facts() -> Facts {
    Facts { overlay: [1; 16], point: [2; 16], disk: 0, length: LENGTH }
}

fn base(offset: u64, out: &mut [u8]) -> Result<(), BaseError> {
    out.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = (at / 512 % 251) as u8);
    Ok(())
}

fn fresh() -> Vec<u8> {
    let mut bytes = vec![0; LENGTH as usize];
    base(0, &mut bytes).unwrap();
    bytes
}

fn open(file: &File, unflushed: Unflushed) -> Result<Overlay<File>, OverlayError> {
    Overlay::open_keeping(file.clone(), key(), facts(), NO_LIMIT, unflushed)
}

fn all(overlay: &Overlay<File>) -> Vec<u8> {
    let mut bytes = vec![0; LENGTH as usize];
    overlay.read(0, &mut bytes, &base).unwrap();
    bytes
}

/// What the guest knows: what it was told is written, what is flushed, and what is under way.
struct Guest {
    written: Vec<u8>,
    flushed: Vec<u8>,
    /// As the disk would be if what is under way were done.
    under_way: Vec<u8>,
    random: Random,
}

impl Guest {
    fn new(seed: u64) -> Guest {
        Guest { written: fresh(), flushed: fresh(), under_way: fresh(), random: Random(seed) }
    }

    /// Does something; whether it was answered.
    fn acts(&mut self, overlay: &Overlay<File>) -> Result<(), OverlayError> {
        let offset = self.random.below(LENGTH);
        let length = (self.random.below(5 * PAGE_U64) + 1).min(LENGTH - offset);
        let range = offset as usize..(offset + length) as usize;
        self.under_way = self.written.clone();
        match self.random.below(10) {
            0..=5 => {
                let byte = self.random.below(256) as u8;
                self.under_way[range.clone()].fill(byte);
                overlay.write(offset, &self.under_way[range], &base)?;
            }
            6 => {
                self.under_way[range].fill(0);
                overlay.zero(offset, length, &base)?;
            }
            7 => {
                let end = if offset + length == LENGTH { LENGTH } else { (offset + length) / PAGE_U64 * PAGE_U64 };
                let start = offset.next_multiple_of(PAGE_U64).min(end);
                self.under_way[start as usize..end as usize].fill(0);
                overlay.discard(offset, length)?;
            }
            _ => {
                overlay.flush()?;
                self.flushed = self.written.clone();
            }
        }
        self.written = self.under_way.clone();
        Ok(())
    }

    /// Checks what is there after a kill: all that was answered; of what was under way each block old or new.
    fn expects(&mut self, now: &[u8], context: &str) {
        let blocks = now.chunks(PAGE).zip(self.written.chunks(PAGE)).zip(self.under_way.chunks(PAGE));
        for (nth, ((now, old), new)) in blocks.enumerate() {
            assert!(now == old || now == new, "{context}: block {nth} is neither as it was nor as it was to be");
        }
        self.written = now.to_vec();
    }
}

#[test]
fn whenever_the_process_is_killed_what_was_answered_is_there() {
    for seed in 0..3 {
        // How many writes it takes if nobody is killed.
        let total = {
            let file = File::default();
            let overlay = Overlay::create_keeping(file.clone(), key(), facts(), NO_LIMIT, Unflushed::Kept).unwrap();
            file.revive(None);
            let mut guest = Guest::new(seed);
            (0..40).for_each(|_| guest.acts(&overlay).unwrap());
            assert!(all(&overlay) == guest.written);
            file.done()
        };
        for left in 1..=total {
            let file = File::default();
            let overlay = Overlay::create_keeping(file.clone(), key(), facts(), NO_LIMIT, Unflushed::Kept).unwrap();
            file.revive(Some(left));
            let mut guest = Guest::new(seed);
            while guest.acts(&overlay).is_ok() && file.0.lock().left != Some(0) {}
            drop(overlay);
            let context = format!("seed {seed}, killed at {left}");
            file.revive(None);
            let overlay = open(&file, Unflushed::TakenUp).unwrap_or_else(|e| panic!("{context}: {e}"));
            guest.expects(&all(&overlay), &context);
            // It goes on, and is killed again before anything is flushed.
            for _ in 0..5 {
                guest.acts(&overlay).unwrap();
            }
            drop(overlay);
            let overlay = open(&file, Unflushed::TakenUp).unwrap();
            assert!(all(&overlay) == guest.written, "{context}, and again");
            overlay.flush().unwrap();
            guest.flushed = guest.written.clone();
            guest.acts(&overlay).unwrap();
            // The power goes: what was flushed is there, and nothing else.
            let disk = file.cut(&mut guest.random);
            let overlay = open(&disk, Unflushed::Kept).unwrap_or_else(|e| panic!("{context}, power: {e}"));
            assert!(all(&overlay) == guest.flushed, "{context}, power");
        }
    }
}

#[test]
fn a_power_cut_between_flushes_leaves_what_was_flushed_however_much_the_journal_was_told() {
    for seed in 0..100 {
        let mut file = File::default();
        let mut overlay = Overlay::create_keeping(file.clone(), key(), facts(), NO_LIMIT, Unflushed::Kept).unwrap();
        let mut guest = Guest::new(seed);
        for round in 0..6 {
            for _ in 0..guest.random.below(30) {
                guest.acts(&overlay).unwrap();
            }
            drop(overlay);
            if guest.random.below(2) == 0 {
                file = file.cut(&mut guest.random);
                overlay = open(&file, Unflushed::Kept).unwrap_or_else(|e| panic!("seed {seed}, round {round}: {e}"));
                assert!(all(&overlay) == guest.flushed, "seed {seed}, round {round}");
                guest.written = guest.flushed.clone();
            } else {
                overlay = open(&file, Unflushed::TakenUp).unwrap();
                assert!(all(&overlay) == guest.written, "seed {seed}, round {round}");
                // To go on with it, it was made durable.
                guest.flushed = guest.written.clone();
            }
        }
    }
}

#[test]
fn what_was_not_flushed_is_lost_where_nobody_keeps_it_and_changed_bytes_of_it_are_an_error() {
    let file = File::default();
    let overlay = Overlay::create_keeping(file.clone(), key(), facts(), NO_LIMIT, Unflushed::Kept).unwrap();
    overlay.write(0, &[5; 3 * PAGE], &base).unwrap();
    drop(overlay);
    let before = file.0.lock().now.clone();
    let copy =
        |bytes: Vec<u8>| File(Arc::new(Mutex::new(Kept { now: bytes.clone(), durable: bytes, ..Kept::default() })));
    assert!(all(&open(&copy(before.clone()), Unflushed::Kept).unwrap()) == fresh());
    assert!(all(&open(&copy(before.clone()), Unflushed::TakenUp).unwrap())[..3 * PAGE].iter().all(|byte| *byte == 5));
    // The blocks lie where the file ends last.
    let block = before.chunks(PAGE).rposition(|page| page.iter().any(|byte| *byte != 0)).unwrap();
    let mut changed = before;
    changed[block * PAGE + 9] ^= 1;
    assert!(matches!(open(&copy(changed), Unflushed::TakenUp), Err(OverlayError::Damaged { .. })));
}

#[test]
fn a_long_life_without_a_flush_takes_no_more_room_than_its_blocks_and_its_journal() {
    let file = File::default();
    let overlay = Overlay::create_keeping(file.clone(), key(), facts(), NO_LIMIT, Unflushed::Kept).unwrap();
    for nth in 0..2000u64 {
        overlay.write(nth % 10 * PAGE_U64, &[nth as u8; PAGE], &base).unwrap();
    }
    // A page a write in the journal, and the pages of ten blocks.
    let used = overlay.used() / PAGE_U64;
    assert!(used < 2000 + 1024, "{used}");
    drop(overlay);
    let overlay = open(&file, Unflushed::TakenUp).unwrap();
    let now = all(&overlay);
    for block in 0..10usize {
        assert_eq!(now[block * PAGE], (1990 + block) as u8);
    }
    overlay.flush().unwrap();
}
