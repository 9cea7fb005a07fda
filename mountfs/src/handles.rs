//! What is open: each open file and folder has a number that the kernel passes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use reseal_vault::Wait;
use reseal_vault::disk::Tools;

use crate::disks::{DiskOf, Disks};
use crate::errno::Fault;
use crate::files::{Content, OpenPoint};
use crate::readahead::Stream;
use crate::view::{Child, Face};
use crate::writable::{Under, WrittenDisk};

/// A disk that is open.
pub(crate) struct OpenDisk {
    pub(crate) point: Arc<OpenPoint>,
    /// Which of the point's disks.
    pub(crate) nth: usize,
    face: Face,
    /// What it is written to by, where it is.
    pub(crate) written: Option<Arc<WrittenDisk>>,
    /// Whether whoever opened it may write.
    pub(crate) is_for_writing: bool,
    pub(crate) stream: Stream,
}

impl OpenDisk {
    /// Opens a point's disk of that place.
    pub(crate) fn new(
        point: Arc<OpenPoint>,
        nth: usize,
        face: Face,
        written: Option<Arc<WrittenDisk>>,
        is_for_writing: bool,
    ) -> OpenDisk {
        OpenDisk { point, nth, face, written, is_for_writing, stream: Stream::default() }
    }

    /// The disk.
    pub(crate) fn disk(&self) -> Option<DiskOf<'_>> {
        DiskOf::new(self.point.manifest(), self.nth)
    }

    /// What is under its overlay, if it has one.
    pub(crate) fn under<'a>(&'a self, disks: &'a Disks) -> Option<Under<'a>> {
        Some(Under { disks, of: self.disk()? })
    }

    /// What of a range is behind the bytes of the disk: of a footer, if it is shown with one.
    pub(crate) fn footer(&self, offset: u64, size: usize) -> &[u8] {
        let (Face::Vhd, Some(of)) = (self.face, self.disk()) else { return &[] };
        let (footer, length) = (self.point.footer(self.nth), of.disk().length);
        let at = |byte: u64| usize::try_from(byte.saturating_sub(length)).unwrap_or(usize::MAX).min(footer.len());
        &footer[at(offset)..at(offset.saturating_add(size as u64))]
    }

    /// Bytes of the file that shows it.
    pub(crate) fn length(&self) -> u64 {
        let length = self.disk().map_or(0, |of| of.disk().length);
        match self.face {
            Face::Raw => length,
            Face::Vhd => length + self.point.footer(self.nth).len() as u64,
        }
    }

    /// Fills `out` with bytes of the disk from `offset` and byte `done` on. With [`Wait::MustNot`] it answers that it would have to wait
    /// for the store where it might.
    pub(crate) fn read_on(
        &self,
        disks: &Disks,
        offset: u64,
        out: &mut [u8],
        done: &mut usize,
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), Fault> {
        let Some(of) = self.disk() else { return Err(Fault::NoEntry) };
        if out.is_empty() {
            // Of a range that is all in the footer.
            return Ok(());
        }
        if let Some(written) = &self.written
            && !written.is_base(offset, out.len())
        {
            return written.read(Under { disks, of }, offset, out, wait, tools);
        }
        match wait {
            Wait::MustNot => disks.read_on(of, offset, out, done, wait, tools)?,
            Wait::May => disks.read_waiting(of, offset, out, done, tools)?,
        }
        Ok(())
    }

    /// Where data begins at or after `offset`; `None` if only holes follow.
    pub(crate) fn next_data(&self, disks: &Disks, offset: u64) -> Result<Option<u64>, Fault> {
        let Some(of) = self.disk() else { return Err(Fault::NoEntry) };
        let length = of.disk().length;
        if offset >= length {
            return Ok((offset < self.length()).then_some(offset));
        }
        let found = match &self.written {
            Some(written) => written.next_data(Under { disks, of }, offset)?,
            None => disks.next_data(of, offset)?,
        };
        // A footer is data.
        Ok(found.or((self.length() > length).then_some(length)))
    }

    /// Where a hole begins at or after `offset`, which must be in the file; its end counts as one.
    pub(crate) fn next_hole(&self, disks: &Disks, offset: u64) -> Result<u64, Fault> {
        let Some(of) = self.disk() else { return Err(Fault::NoEntry) };
        let length = of.disk().length;
        if offset >= length {
            return Ok(self.length());
        }
        let found = match &self.written {
            Some(written) => written.next_hole(Under { disks, of }, offset)?,
            None => disks.next_hole(of, offset)?,
        };
        Ok(if found >= length { self.length() } else { found })
    }
}

/// Something open.
pub(crate) enum Handle {
    Disk(OpenDisk),
    Text(Arc<OpenPoint>, Content),
    /// A folder as it was when it was opened, so that a reader of it sees each name once.
    Folder(Vec<Child>),
}

/// All that is open.
#[derive(Default)]
pub(crate) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
}

impl Handles {
    /// Gives it a number.
    pub(crate) fn insert(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(number, Arc::new(handle));
        number
    }

    /// What has that number.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.read().get(&number).cloned()
    }

    /// It is closed.
    pub(crate) fn remove(&self, number: u64) {
        self.open.write().remove(&number);
    }
}
