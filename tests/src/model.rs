//! A disk as it should be: pages in memory, and what reads a disk held against them.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

/// Bytes of a page of the model.
const PAGE: u64 = 4096;
/// Most bytes that are compared at once.
const STEP: u64 = 1 << 20;

/// Pages that are not all zeros, by number. A copy shares them, so that every restore point can keep one.
#[derive(Debug, Clone, Default)]
pub struct ModelDisk {
    pub length: u64,
    pages: BTreeMap<u64, Arc<Vec<u8>>>,
    /// Where it was changed, ever, in that order.
    pub touched: Vec<Range<u64>>,
}

impl ModelDisk {
    /// An empty disk.
    pub fn new(length: u64) -> ModelDisk {
        ModelDisk { length, ..ModelDisk::default() }
    }

    /// Writes; what would be past the end is left out.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = (offset + bytes.len() as u64).min(self.length);
        self.touched.push(offset..end.max(offset));
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let stop = ((page + 1) * PAGE).min(end);
            let content = self.pages.entry(page).or_insert_with(|| Arc::new(vec![0; size(PAGE)]));
            let content = Arc::make_mut(content);
            content[size(at % PAGE)..][..size(stop - at)]
                .copy_from_slice(&bytes[size(at - offset)..size(stop - offset)]);
            if content.iter().all(|&byte| byte == 0) {
                self.pages.remove(&page);
            }
            at = stop;
        }
    }

    /// Zeros a range.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.length);
        if offset >= end {
            return;
        }
        self.touched.push(offset..end);
        let (first_whole, last_whole) = (offset.div_ceil(PAGE), end / PAGE);
        if first_whole < last_whole {
            let gone: Vec<u64> = self.pages.range(first_whole..last_whole).map(|(&page, _)| page).collect();
            gone.iter().for_each(|page| drop(self.pages.remove(page)));
            self.write(offset, &vec![0; size(first_whole * PAGE - offset)]);
            self.write(last_whole * PAGE, &vec![0; size(end - last_whole * PAGE)]);
        } else {
            self.write(offset, &vec![0; size(end - offset)]);
        }
    }

    /// Grows or shrinks.
    pub fn resize(&mut self, length: u64) {
        if length < self.length {
            // What is cut off must not come back when the disk grows again.
            self.zero(length, self.length - length);
        }
        self.length = length;
    }

    /// The bytes of a range.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let end = offset + bytes.len() as u64;
        for (&page, content) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            bytes[size(from - offset)..size(to - offset)]
                .copy_from_slice(&content[size(from - page * PAGE)..size(to - page * PAGE)]);
        }
    }

    /// Clusters of 64 KiB that are not all zeros.
    pub fn used_clusters(&self) -> u64 {
        let mut clusters: Vec<u64> = self.pages.keys().map(|page| page / 16).collect();
        clusters.dedup();
        clusters.len() as u64
    }

    /// Asserts that a disk has this content and no other.
    #[track_caller]
    pub fn assert_same(&self, disk: &dyn ReadDisk, what: &str) {
        assert_eq!(disk.length(), self.length, "{what}: the length differs");
        // What is no hole must be right, and what is not zero must be no hole.
        let mut extents = disk.extents();
        extents.extend(self.pages.keys().map(|page| (page * PAGE, ((page + 1) * PAGE).min(self.length))));
        for (start, end) in extents {
            let mut at = start;
            while at < end {
                let length = size(STEP.min(end - at));
                let (mut found, mut wanted) = (vec![0xEE; length], vec![0; length]);
                disk.read(at, &mut found);
                self.read(at, &mut wanted);
                if let Some(differs) = (0..length).find(|&n| found[n] != wanted[n]) {
                    let (found, wanted) = (found[differs], wanted[differs]);
                    panic!("{what}: byte {} is {found:#04x}, not {wanted:#04x}", at + differs as u64);
                }
                at += length as u64;
            }
        }
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// Something that shows a disk.
pub trait ReadDisk {
    /// Its length in bytes.
    fn length(&self) -> u64;
    /// Its extents that are not holes: start and end.
    fn extents(&self) -> Vec<(u64, u64)>;
    /// Fills the buffer.
    fn read(&self, offset: u64, bytes: &mut [u8]);
}

/// A disk in a file.
pub struct DiskFile(pub File);

impl DiskFile {
    /// Opens it to read.
    #[track_caller]
    pub fn open(path: &Path) -> DiskFile {
        DiskFile(File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    /// Makes a sparse one.
    pub fn create(path: &Path, length: u64) -> DiskFile {
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(path).unwrap();
        file.set_len(length).unwrap();
        DiskFile(file)
    }

    /// Writes, as [`ModelDisk::write`] does.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let room = size(self.length().saturating_sub(offset)).min(bytes.len());
        self.0.write_all_at(&bytes[..room], offset).unwrap();
    }

    /// Makes a hole.
    pub fn punch(&self, offset: u64, length: u64) {
        if length > 0 {
            fallocate(&self.0, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length).unwrap();
        }
    }
}

impl ReadDisk for DiskFile {
    fn length(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn extents(&self) -> Vec<(u64, u64)> {
        let mut extents = Vec::new();
        let mut at = 0;
        while let Ok(start) = seek(&self.0, SeekFrom::Data(at)) {
            let end = seek(&self.0, SeekFrom::Hole(start)).unwrap();
            assert!(end > start, "a hole at byte {start}, where data should begin");
            extents.push((start, end));
            at = end;
        }
        extents
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.0.read_exact_at(bytes, offset).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_does_what_a_file_does() {
        let mut random = crate::random::Random::new(7);
        let folder = tempfile::tempdir().unwrap();
        let file = DiskFile::create(&folder.path().join("disk"), 300_000);
        let mut model = ModelDisk::new(300_000);
        for _ in 0..300 {
            let at = random.below(model.length.max(1));
            let length = random.index(20_000);
            match random.below(4) {
                0 | 1 => {
                    let bytes = random.bytes(length);
                    model.write(at, &bytes);
                    file.write(at, &bytes);
                }
                2 => {
                    model.zero(at, length as u64);
                    file.punch(at, length as u64);
                }
                _ => {
                    let length = random.below(400_000);
                    model.resize(length);
                    file.0.set_len(length).unwrap();
                }
            }
            model.assert_same(&file, "after a step");
        }
    }
}
