//! Which blobs sessions of a VM have landed since its newest restore point: what need not be sent again.
//!
//! ```text
//! "RSLLAND1" ‖ id of the point that is being made 16 ‖ (pack 16 ‖ first ordinal u32 ‖ blobs u32) × n      big-endian
//! ```
//!
//! A file a VM in the state folder, locked while a session is at work on it. It is a hint: each place is confirmed by the pack's
//! authenticated table of ids before anything is concluded from it. So it may be lost, cut off or stale.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use reseal_format::ids::{PackId, PointId};
use reseal_format::index::BlobRef;
use reseal_format::ordinals::Ordinals;
use reseal_format::pack::MAX_BLOBS;
use rustix::fs::{FlockOperation, flock};

const MAGIC: &[u8; 8] = b"RSLLAND1";
const RUN: usize = 16 + 4 + 4;

/// Places of blobs.
#[derive(Default)]
pub(super) struct Places(HashMap<PackId, Ordinals>);

impl Places {
    pub(super) fn insert(&mut self, place: BlobRef) {
        self.0.entry(place.pack).or_default().insert(place.ordinal);
    }

    pub(super) fn contains(&self, place: BlobRef) -> bool {
        self.0.get(&place.pack).is_some_and(|ordinals| ordinals.contains(place.ordinal))
    }

    pub(super) fn add_pack(&mut self, pack: PackId, ordinals: &Ordinals) {
        self.0.entry(pack).or_default().extend(ordinals);
    }
}

/// The file of one VM, locked.
pub(super) struct Landed {
    path: PathBuf,
    file: File,
    point: Option<PointId>,
}

impl Landed {
    /// Opens and locks it; `None` while another session is at work. What it says is added to `places`.
    pub(super) fn open(folder: &Path, vm: &str, places: &mut Places) -> io::Result<Option<Landed>> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let path = folder.join(vm);
        let file = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            other => other?,
        }
        let mut landed = Landed { path, file, point: None };
        landed.point = landed.read(places)?;
        Ok(Some(landed))
    }

    /// Reads as much as makes sense.
    fn read(&mut self, places: &mut Places) -> io::Result<Option<PointId>> {
        let mut from = BufReader::new(&self.file);
        let mut head = [0; 24];
        let point = match from.read_exact(&mut head) {
            Ok(()) if head.starts_with(MAGIC) => head.last_chunk::<16>().map(|id| PointId::from_bytes(*id)),
            Ok(()) => None,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(e) => return Err(e),
        };
        let mut end = 24;
        if point.is_some() {
            let mut run = [0; RUN];
            while from.read_exact(&mut run).is_ok() {
                let (pack, rest) = run.split_at(16);
                let number = |bytes: &[u8]| bytes.try_into().map(u32::from_be_bytes).unwrap_or(u32::MAX);
                let (first, count) = (number(&rest[..4]), number(&rest[4..]));
                let Some(last) = first.checked_add(count).filter(|last| *last <= MAX_BLOBS) else { break };
                let Ok(pack) = <[u8; 16]>::try_from(pack) else { break };
                let pack = PackId::from_bytes(pack);
                (first..last).for_each(|ordinal| places.insert(BlobRef { pack, generation: 0, ordinal }));
                end += RUN as u64;
            }
        }
        // What follows would be read as something else when more is written.
        self.file.set_len(if point.is_some() { end } else { 0 })?;
        Ok(point)
    }

    /// The point that was being made.
    pub(super) fn point(&self) -> Option<PointId> {
        self.point
    }

    /// Notes which point is being made.
    pub(super) fn begin(&mut self, point: PointId) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&[&MAGIC[..], point.as_bytes()].concat())?;
        self.point = Some(point);
        Ok(())
    }

    /// Notes what landed.
    pub(super) fn add(&mut self, places: &[BlobRef]) -> io::Result<()> {
        let mut runs: Vec<(PackId, u32, u32)> = Vec::new();
        for place in places {
            match runs.last_mut() {
                Some((pack, first, count)) if *pack == place.pack && *first + *count == place.ordinal => *count += 1,
                _ => runs.push((place.pack, place.ordinal, 1)),
            }
        }
        let mut bytes = Vec::with_capacity(runs.len() * RUN);
        for (pack, first, count) in runs {
            bytes.extend(pack.as_bytes());
            bytes.extend(first.to_be_bytes());
            bytes.extend(count.to_be_bytes());
        }
        self.file.seek(SeekFrom::End(0))?;
        self.file.write_all(&bytes)
    }

    /// The point exists: its index says all this from now on.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pack: u8, ordinal: u32) -> BlobRef {
        BlobRef { pack: PackId::from_bytes([pack; 16]), generation: 0, ordinal }
    }

    #[test]
    fn what_landed_is_known_to_the_next_session_and_to_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let mut places = Places::default();
        let mut landed = Landed::open(folder.path(), "vm", &mut places).unwrap().unwrap();
        assert_eq!(landed.point(), None);
        let point = PointId::from_bytes([7; 16]);
        landed.begin(point).unwrap();
        landed.add(&[place(1, 4), place(1, 5), place(2, 0)]).unwrap();
        landed.add(&[place(1, 9)]).unwrap();
        assert!(Landed::open(folder.path(), "vm", &mut places).unwrap().is_none(), "another session is at work");
        assert!(Landed::open(folder.path(), "other", &mut Places::default()).unwrap().is_some());
        drop(landed);
        let mut places = Places::default();
        let mut landed = Landed::open(folder.path(), "vm", &mut places).unwrap().unwrap();
        assert_eq!(landed.point(), Some(point));
        for known in [place(1, 4), place(1, 5), place(2, 0), place(1, 9)] {
            assert!(places.contains(known));
        }
        assert!(!places.contains(place(1, 6)) && !places.contains(place(3, 4)));
        landed.clear().unwrap();
        drop(landed);
        let mut places = Places::default();
        assert_eq!(Landed::open(folder.path(), "vm", &mut places).unwrap().unwrap().point(), None);
        assert!(!places.contains(place(1, 4)));
    }

    #[test]
    fn a_file_that_is_cut_off_or_something_else_is_a_smaller_hint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let mut landed = Landed::open(folder.path(), "vm", &mut Places::default()).unwrap().unwrap();
        landed.begin(PointId::from_bytes([7; 16])).unwrap();
        landed.add(&[place(1, 4), place(2, 0)]).unwrap();
        drop(landed);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut places = Places::default();
            let mut landed = Landed::open(folder.path(), "vm", &mut places).unwrap().unwrap();
            assert_eq!((landed.point().is_some(), places.contains(place(1, 4))), (cut >= 24, cut >= 48));
            // What is added after it is read again.
            landed.begin(PointId::from_bytes([8; 16])).unwrap();
            landed.add(&[place(3, 1)]).unwrap();
            drop(landed);
            let mut places = Places::default();
            drop(Landed::open(folder.path(), "vm", &mut places).unwrap());
            assert!(places.contains(place(3, 1)), "cut at {cut}");
        }
        let mut hostile = whole;
        hostile[24 + 16..24 + 24].fill(0xff);
        std::fs::write(&path, hostile).unwrap();
        assert!(Landed::open(folder.path(), "vm", &mut Places::default()).unwrap().is_some());
    }
}
