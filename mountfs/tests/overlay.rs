//! The overlay against a model, on a medium whose power goes at every one of its writes.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests end where they meet what they did not expect

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use reseal_format::overlay::{BATCH_HEADER, BATCH_PAGES, BatchHeader, HEADS, Head, OverlayKey, PAGE, PAGE_U64};
use reseal_mountfs::overlay::{BaseError, Facts, Layer, Medium, Overlay, OverlayError};
use zeroize::Zeroizing;

/// Not a multiple of a block.
const LENGTH: u64 = 48 * PAGE_U64 - 700;
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
struct Disk {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What was written since the last sync.
    pending: Vec<(usize, Vec<u8>)>,
    /// Writes and syncs so far, and at which of them the power goes.
    done: u64,
    last: Option<u64>,
}

/// A medium that forgets what was not synced.
#[derive(Clone, Default)]
struct Power(Arc<Mutex<Disk>>);

impl Power {
    /// What is there when the power comes back: of each write since the last sync some sectors.
    fn cut(&self, random: &mut Random) -> Power {
        let disk = self.0.lock();
        let mut durable = disk.durable.clone();
        let share = random.below(4);
        for (at, bytes) in &disk.pending {
            for (nth, sector) in bytes.chunks(SECTOR).enumerate() {
                // None, some, or nearly all, so that flushes that are whole but for one sector are met, too.
                if random.below(30) < [0, 15, 29, 30][share as usize] {
                    let at = at + nth * SECTOR;
                    if durable.len() < at + sector.len() {
                        durable.resize(at + sector.len(), 0);
                    }
                    durable[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        // The length of a file is a whole number of pages here, as that of one that was reserved is.
        durable.resize(durable.len().next_multiple_of(PAGE), 0);
        Power::from(durable)
    }

    fn step(disk: &mut Disk) -> io::Result<()> {
        disk.done += 1;
        match disk.last.is_some_and(|last| disk.done > last) {
            true => Err(io::Error::other("the power is gone")),
            false => Ok(()),
        }
    }

    fn contains(&self, what: &[u8]) -> bool {
        self.0.lock().now.windows(what.len()).any(|window| window == what)
    }
}

impl From<Vec<u8>> for Power {
    fn from(bytes: Vec<u8>) -> Power {
        Power(Arc::new(Mutex::new(Disk { now: bytes.clone(), durable: bytes, ..Disk::default() })))
    }
}

impl Medium for Power {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock();
        let read = disk.now.get(at as usize..at as usize + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(read);
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock();
        let at = at as usize;
        let result = Power::step(&mut disk);
        // The write that the power goes at may be there in part.
        if result.is_ok() || disk.last.is_some_and(|last| disk.done == last + 1) {
            if disk.now.len() < at + bytes.len() {
                disk.now.resize(at + bytes.len(), 0);
            }
            disk.now[at..at + bytes.len()].copy_from_slice(bytes);
            disk.pending.push((at, bytes.to_vec()));
        }
        result
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.0.lock();
        Power::step(&mut disk)?;
        disk.durable = disk.now.clone();
        disk.pending.clear();
        Ok(())
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        let mut disk = self.0.lock();
        let end = (at + length) as usize;
        if disk.now.len() < end {
            disk.now.resize(end, 0);
        }
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

fn base_byte(at: u64) -> u8 {
    (at / 512 % 251) as u8
}

fn base(offset: u64, out: &mut [u8]) -> Result<(), BaseError> {
    out.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = base_byte(at));
    Ok(())
}

fn whole(overlay: &Overlay<Power>) -> Result<Vec<u8>, OverlayError> {
    let mut out = vec![0; LENGTH as usize];
    overlay.read(0, &mut out, &base)?;
    Ok(out)
}

/// What the disk should hold: now, when it was flushed last, and at a flush that is under way.
struct Model {
    now: Vec<u8>,
    flushed: Vec<u8>,
    flushing: Option<Vec<u8>>,
}

/// Does something at random; an error ends it.
fn step(overlay: &Overlay<Power>, model: &mut Model, random: &mut Random) -> Result<(), OverlayError> {
    let at = random.below(LENGTH);
    let longest = [600, PAGE_U64, 3 * PAGE_U64, 20 * PAGE_U64][random.below(4) as usize];
    let length = (random.below(longest) + 1).min(LENGTH - at);
    let range = at as usize..(at + length) as usize;
    match random.below(10) {
        0..5 => {
            let bytes: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
            overlay.write(at, &bytes, &base)?;
            model.now[range].copy_from_slice(&bytes);
        }
        5 => {
            overlay.zero(at, length, &base)?;
            model.now[range].fill(0);
        }
        6 => {
            overlay.discard(at, length)?;
            let end = if at + length == LENGTH { LENGTH } else { (at + length) / PAGE_U64 * PAGE_U64 };
            let start = at.div_ceil(PAGE_U64) * PAGE_U64;
            if start < end {
                model.now[start as usize..end as usize].fill(0);
            }
        }
        7 => {
            let mut out = vec![0; length as usize];
            overlay.read(at, &mut out, &base)?;
            assert_eq!(out, model.now[range]);
        }
        _ => {
            model.flushing = Some(model.now.clone());
            overlay.flush()?;
            model.flushed = model.now.clone();
            model.flushing = None;
        }
    }
    Ok(())
}

fn fresh() -> Model {
    let now: Vec<u8> = (0..LENGTH).map(base_byte).collect();
    Model { flushed: now.clone(), now, flushing: None }
}

#[test]
fn whenever_the_power_goes_what_was_flushed_is_there_and_nothing_else() {
    let (mut cuts, mut under_way) = (0, 0);
    for seed in 0..6u64 {
        for last in 0.. {
            let mut random = Random(seed << 32 | last);
            let medium = Power::default();
            let overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
            let (mut model, mut medium, mut overlay) = (fresh(), medium, Some(overlay));
            let mut went = false;
            // Several times on one medium.
            for round in 0..3 {
                {
                    let mut disk = medium.0.lock();
                    disk.last = Some(disk.done + last * (round + 1));
                }
                let failed = (0..60).find_map(|_| step(overlay.as_ref().unwrap(), &mut model, &mut random).err());
                went |= failed.is_some();
                if let Some(e) = failed {
                    assert!(matches!(e, OverlayError::Io { .. } | OverlayError::Broken), "{e}");
                }
                drop(overlay.take());
                medium = medium.cut(&mut random);
                cuts += 1;
                let again = Overlay::open(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
                let found = whole(&again).unwrap();
                let is_flushing =
                    model.flushing.take().is_some_and(|flushing| flushing == found && found != model.flushed);
                under_way += usize::from(is_flushing);
                assert!(is_flushing || found == model.flushed, "seed {seed}, power gone at {last}, round {round}");
                model = Model { now: found.clone(), flushed: found, flushing: None };
                overlay = Some(again);
            }
            if !went {
                break;
            }
        }
    }
    assert!(cuts > 500 && under_way > 10, "{cuts} cuts, {under_way} in a flush that was whole");
}

#[test]
fn a_journal_that_has_become_long_is_made_anew_and_the_power_may_go_then_too() {
    let flush = |overlay: &Overlay<Power>, model: &mut Model, nth: u64| {
        let (at, byte) = (nth * 97 % LENGTH, nth as u8);
        overlay.write(at, &[byte], &base)?;
        model.now[at as usize] = byte;
        model.flushing = Some(model.now.clone());
        overlay.flush()?;
        model.flushed = model.now.clone();
        Ok::<(), OverlayError>(())
    };
    // How many flushes that takes.
    let medium = Power::default();
    let overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
    let (mut model, mut used) = (fresh(), 0);
    let turn = (0..10_000).find(|&nth| {
        flush(&overlay, &mut model, nth).unwrap();
        let before = std::mem::replace(&mut used, overlay.used());
        used < before / 2
    });
    let turn = turn.expect("it is made anew");
    assert_eq!(whole(&overlay).unwrap(), model.now);
    // Where one head is damaged, the other one does not lead to the journal before.
    for head in 0..HEADS as usize {
        let mut damaged = medium.0.lock().now.clone();
        damaged[head * PAGE + 50] ^= 1;
        let again = Overlay::open(Power::from(damaged), key(), facts(), NO_LIMIT).unwrap();
        assert_eq!(whole(&again).unwrap(), model.now);
    }
    let mut whole_ones = 0;
    // The power goes at each step of it, and before and after.
    for cut in 0..24u64 {
        let mut random = Random(cut);
        let medium = Power::default();
        let overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
        let mut model = fresh();
        (0..turn).for_each(|nth| flush(&overlay, &mut model, nth).unwrap());
        {
            let mut disk = medium.0.lock();
            disk.last = Some(disk.done + cut / 2);
        }
        assert!((turn..turn + 20).any(|nth| flush(&overlay, &mut model, nth).is_err()));
        drop(overlay);
        let again = Overlay::open(medium.cut(&mut random), key(), facts(), NO_LIMIT).unwrap();
        let found = whole(&again).unwrap();
        whole_ones += usize::from(found != model.flushed);
        assert!(found == model.flushed || Some(found) == model.flushing, "cut at {cut}");
        assert!(flush(&again, &mut model, 1).is_ok());
    }
    assert!(whole_ones > 0);
}

#[test]
fn what_is_damaged_is_an_error_and_never_other_bytes() {
    let mut random = Random(5);
    let medium = Power::default();
    let overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
    let mut model = fresh();
    for _ in 0..60 {
        step(&overlay, &mut model, &mut random).unwrap();
    }
    overlay.close().unwrap();
    let image = medium.0.lock().now.clone();
    let (mut refused, mut unread, mut unused) = (0, 0, 0);
    for page in 0..image.len() / PAGE {
        let mut damaged = image.clone();
        damaged[page * PAGE + random.below(PAGE_U64) as usize % 100] ^= 1 << random.below(8);
        let overlay = match Overlay::open(Power::from(damaged), key(), facts(), NO_LIMIT) {
            Ok(overlay) => overlay,
            Err(OverlayError::Damaged { .. } | OverlayError::Lost { .. }) => {
                refused += 1;
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        match whole(&overlay) {
            Err(OverlayError::Damaged { .. }) => unread += 1,
            Err(e) => panic!("{e}"),
            // A page that nothing needs, one of the heads, or the flush that tells nothing and says that this was the end.
            Ok(found) => {
                assert!(found == model.now, "page {page}: bytes of an earlier flush");
                unused += 1;
            }
        }
    }
    assert!(refused > 0 && unread > 20 && unused > 0, "{refused} {unread} {unused}");
    let other = OverlayKey::from_bytes(Zeroizing::new([8; 32]));
    assert!(matches!(Overlay::open(medium.clone(), other, facts(), NO_LIMIT), Err(OverlayError::Damaged { .. })));
    for another in
        [Facts { overlay: [9; 16], ..facts() }, Facts { point: [9; 16], ..facts() }, Facts { disk: 1, ..facts() }]
    {
        assert!(matches!(Overlay::open(medium.clone(), key(), another, NO_LIMIT), Err(OverlayError::Another(_))));
    }
}

/// The batches of the journal that counts, in their order: where each is, and what its header says, with its bytes.
fn journal(image: &[u8]) -> Vec<(usize, BatchHeader, usize)> {
    let head = |nth: usize| Head::open(&key(), &image[nth * PAGE..(nth + 1) * PAGE].try_into().unwrap()).ok();
    let head = (0..HEADS as usize).filter_map(head).max_by_key(|head| head.generation).unwrap();
    let (mut at, mut sequence, mut link) = (head.journal as usize * PAGE, head.sequence, head.link);
    let mut found = Vec::new();
    while let Some((header, length)) =
        image.get(at..).and_then(|batch| BatchHeader::decode(batch.first_chunk::<BATCH_HEADER>()?))
    {
        let batch = &image[at..image.len().min(at + BATCH_PAGES * PAGE)];
        if (header.sequence, header.link) != (sequence, link) {
            break;
        }
        let Ok((_, digest)) = header.open(&key(), &facts().overlay, batch, length) else { break };
        found.push((at, header, BATCH_HEADER + length + 16));
        (at, sequence, link) = (header.next as usize * PAGE, sequence + 1, digest);
    }
    found
}

#[test]
fn damage_in_the_middle_of_the_journal_is_an_error_and_never_older_bytes() {
    let (mut before_last, mut in_last) = (0, 0);
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut medium = Power::default();
        let mut overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
        let mut model = fresh();
        // The power goes a few times, so that batches of flushes that never happened are there, too.
        for _ in 0..4 {
            {
                let mut disk = medium.0.lock();
                disk.last = Some(disk.done + random.below(80));
            }
            while step(&overlay, &mut model, &mut random).is_ok() {}
            drop(overlay);
            medium = medium.cut(&mut random);
            overlay = Overlay::open(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
            let found = whole(&overlay).unwrap();
            model = Model { now: found.clone(), flushed: found, flushing: None };
        }
        for _ in 0..random.below(60) {
            step(&overlay, &mut model, &mut random).unwrap();
        }
        overlay.flush().unwrap();
        let now = whole(&overlay).unwrap();
        drop(overlay);
        let image = medium.0.lock().now.clone();
        let batches = journal(&image);
        let last = batches.last().unwrap().1.first;
        for &(at, header, length) in &batches {
            let mut damaged = image.clone();
            damaged[at + random.below(length as u64) as usize] ^= 1 << random.below(8);
            match Overlay::open(Power::from(damaged), key(), facts(), NO_LIMIT) {
                Err(OverlayError::Lost { sequence }) if header.first < last => {
                    // Or the one before, where pages that it told of are others' by now.
                    assert!(sequence <= header.first);
                    before_last += 1;
                }
                // What the head leads to is durable before the head is.
                Err(OverlayError::Damaged { .. }) if header.first == batches[0].1.first => before_last += 1,
                Ok(_) if header.first == last => in_last += 1,
                Err(e) => panic!("seed {seed}, batch {}: {e}", header.sequence),
                Ok(_) => panic!("seed {seed}: batch {} is lost, and nobody says so", header.sequence),
            }
        }
        // Where one head is damaged, the other one leads to the same.
        for nth in 0..HEADS as usize {
            let mut damaged = image.clone();
            damaged[nth * PAGE + random.below(176) as usize] ^= 1;
            let overlay = Overlay::open(Power::from(damaged), key(), facts(), NO_LIMIT).unwrap();
            assert!(whole(&overlay).unwrap() == now);
        }
    }
    assert!(before_last > 300 && in_last >= 40, "{before_last} {in_last}");
}

#[test]
fn a_lost_flush_is_known_as_such_however_many_chunks_the_journal_has() {
    let medium = Power::default();
    let (discards, flushes) = (70_000, 3);
    let facts = Facts { length: 2 * discards * flushes * PAGE_U64, ..facts() };
    let overlay = Overlay::create(medium.clone(), key(), facts, NO_LIMIT).unwrap();
    // A record each, so that a flush has more batches than a chunk has room for.
    for nth in 0..discards * flushes {
        overlay.discard(2 * nth * PAGE_U64, PAGE_U64).unwrap();
        if nth % discards == discards - 1 {
            overlay.flush().unwrap();
        }
    }
    drop(overlay);
    let image = medium.0.lock().now.clone();
    let batches = journal(&image);
    let (first, last) = (batches[0].1.first, batches.last().unwrap().1.first);
    assert!(batches.iter().filter(|(_, header, _)| header.first == last).count() > 16);
    for nth in (0..batches.len()).step_by(3) {
        let (at, header, _) = batches[nth];
        let mut damaged = image.clone();
        damaged[at + nth % BATCH_HEADER] ^= 1;
        match Overlay::open(Power::from(damaged), key(), facts, NO_LIMIT) {
            Err(OverlayError::Lost { .. }) => assert!(header.first < last && header.first > first),
            Err(OverlayError::Damaged { .. }) => assert_eq!(header.first, first),
            Err(e) => panic!("{e}"),
            Ok(_) => assert_eq!(header.first, last, "batch {}", header.sequence),
        }
    }
}

#[test]
fn nothing_is_in_the_clear() {
    let medium = Power::default();
    let overlay = Overlay::create(medium.clone(), key(), facts(), NO_LIMIT).unwrap();
    let marker = b"a marker that nobody else writes";
    for at in [0, 5000, 12_345, LENGTH - 100] {
        overlay.write(at, marker, &base).unwrap();
    }
    overlay.flush().unwrap();
    assert!(!medium.contains(marker) && !medium.contains(&[77; 64]));
    assert!(medium.0.lock().now.len() as u64 > 4 * PAGE_U64);
}

#[test]
fn a_full_overlay_says_so_and_has_room_again_after_a_discard() {
    let medium = Power::default();
    // The heads, a chunk of the journal and the one that follows, and ten blocks.
    let overlay = Overlay::create(medium, key(), facts(), (2 + 2 * 128 + 10) * PAGE_U64).unwrap();
    let block = [5; PAGE];
    for nth in 0..10 {
        overlay.write(nth * PAGE_U64, &block, &base).unwrap();
    }
    assert!(matches!(overlay.write(20 * PAGE_U64, &block, &base), Err(OverlayError::Full)));
    overlay.flush().unwrap();
    assert!(matches!(overlay.write(0, &block, &base), Err(OverlayError::Full)), "the old block is still needed");
    overlay.discard(0, 5 * PAGE_U64).unwrap();
    assert!(matches!(overlay.write(20 * PAGE_U64, &block, &base), Err(OverlayError::Full)), "and so are these");
    overlay.flush().unwrap();
    for nth in 20..25 {
        overlay.write(nth * PAGE_U64, &block, &base).unwrap();
    }
    overlay.flush().unwrap();
    let mut out = [1; 3 * PAGE];
    overlay.read(3 * PAGE_U64, &mut out, &base).unwrap();
    assert!(out[..2 * PAGE].iter().all(|byte| *byte == 0) && out[2 * PAGE..].iter().all(|byte| *byte == 5));
    assert_eq!(overlay.layer(0, LENGTH), (Layer::Zeros, 5 * PAGE_U64));
    assert_eq!(overlay.layer(5 * PAGE_U64 + 7, LENGTH), (Layer::Data, 10 * PAGE_U64));
    assert_eq!(overlay.layer(10 * PAGE_U64, LENGTH), (Layer::Base, 20 * PAGE_U64));
}

#[test]
fn many_at_once_read_what_was_written() {
    let medium = Power::default();
    let overlay = Overlay::create(medium, key(), facts(), NO_LIMIT).unwrap();
    // Each has its own bytes of every block, so that all change parts of the same ones.
    let blocks = LENGTH / PAGE_U64;
    std::thread::scope(|scope| {
        for nth in 0..4u64 {
            let overlay = &overlay;
            scope.spawn(move || {
                for round in 0..20u8 {
                    for block in 0..blocks {
                        let at = block * PAGE_U64 + nth * 800;
                        let length = 800.min(LENGTH - at) as usize;
                        let bytes = vec![round * 10 + nth as u8; length];
                        overlay.write(at, &bytes, &base).unwrap();
                        let mut out = vec![0; length];
                        overlay.read(at, &mut out, &base).unwrap();
                        assert_eq!(out, bytes);
                    }
                    overlay.flush().unwrap();
                }
            });
        }
    });
    let used = overlay.used();
    overlay.flush().unwrap();
    assert!(used < 4 * LENGTH + 400 * PAGE_U64, "what is not needed is used again: {used}");
}

#[test]
fn it_works_on_a_file_and_gives_room_back() {
    use std::os::unix::fs::MetadataExt;
    let file = tempfile::tempfile().unwrap();
    let facts = Facts { length: 64 << 20, ..facts() };
    let overlay = Overlay::create(file.try_clone().unwrap(), key(), facts, NO_LIMIT).unwrap();
    let bytes = vec![9; 32 << 20];
    overlay.write(1 << 20, &bytes, &base).unwrap();
    overlay.flush().unwrap();
    let full = file.metadata().unwrap().blocks() * 512;
    assert!(full > 32 << 20, "{full}");
    overlay.discard(0, 64 << 20).unwrap();
    overlay.flush().unwrap();
    let empty = file.metadata().unwrap().blocks() * 512;
    assert!(empty < 2 << 20, "{empty}");
    overlay.write(5 << 20, &bytes, &base).unwrap();
    overlay.close().unwrap();
    let overlay = Overlay::open(file, key(), facts, NO_LIMIT).unwrap();
    let mut out = vec![1; 64 << 20];
    overlay.read(0, &mut out, &base).unwrap();
    assert!(out[5 << 20..37 << 20].iter().all(|byte| *byte == 9));
    assert!(out[..5 << 20].iter().chain(&out[37 << 20..]).all(|byte| *byte == 0));
}
