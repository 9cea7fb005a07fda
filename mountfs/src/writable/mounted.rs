//! A disk of a mount that is written to: its overlay, over what the mount reads.
//!
//! What is under a block that is written in part is read before the overlay is asked for anything ([`WrittenDisk::edges`]). So whoever must
//! not wait for a store can stop there, and what follows is about local files only.

use std::cell::RefCell;
use std::fs::File;
use std::sync::atomic::{AtomicI64, Ordering};

use reseal_format::names::DiskName;
use reseal_format::overlay::PAGE_U64;
use reseal_format::time::Timestamp;
use reseal_site::certificate::now;
use reseal_vault::disk::Tools;
use reseal_vault::wipe::Secret;
use reseal_vault::{VaultError, Wait};

use crate::disks::{DiskOf, Disks};
use crate::errno::Fault;
use crate::overlay::{BaseError, Layer, Overlay, OverlayError};

/// How far the overlay's map is walked at a time: whoever writes waits meanwhile.
const STRIDE: u64 = 1 << 30;

/// What is under an overlay.
#[derive(Clone, Copy)]
pub struct Under<'a> {
    pub disks: &'a Disks,
    pub of: DiskOf<'a>,
}

impl Under<'_> {
    fn read(&self, offset: u64, out: &mut [u8], wait: Wait, tools: &mut Tools) -> Result<(), VaultError> {
        let mut done = 0;
        match wait {
            Wait::May => self.disks.read_waiting(self.of, offset, out, &mut done, tools),
            Wait::MustNot => self.disks.read_on(self.of, offset, out, &mut done, wait, tools),
        }
    }
}

/// What the restore point has in blocks that are written in part, by their offsets.
pub struct Edges(Vec<(u64, Secret)>);

impl Edges {
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BaseError> {
        match self.0.iter().find(|(at, bytes)| *at == offset && bytes.0.len() == out.len()) {
            Some((_, bytes)) => {
                out.copy_from_slice(&bytes.0);
                Ok(())
            }
            // A block that the overlay had does not become the restore point's again.
            None => Err("a block that is written in part is not at hand".into()),
        }
    }
}

/// A disk with an overlay.
pub struct WrittenDisk {
    name: DiskName,
    overlay: Overlay<File>,
    /// Milliseconds since 1970 when it was opened, or written to since.
    changed: AtomicI64,
}

fn fault(error: OverlayError) -> Fault {
    match error {
        OverlayError::Base(under) => match under.downcast::<VaultError>() {
            Ok(error) => Fault::Vault(*error),
            Err(other) => Fault::Overlay(OverlayError::Base(other)),
        },
        other => Fault::Overlay(other),
    }
}

impl WrittenDisk {
    /// What is written to the disk of that name goes to its overlay.
    pub fn new(name: DiskName, overlay: Overlay<File>) -> WrittenDisk {
        WrittenDisk { name, overlay, changed: AtomicI64::new(now().0) }
    }

    /// Its name in the restore point.
    pub fn name(&self) -> &DiskName {
        &self.name
    }

    /// When it was written to last, or else opened.
    pub fn changed(&self) -> Timestamp {
        Timestamp(self.changed.load(Ordering::Relaxed))
    }

    /// Bytes that are not holes, at most: those of the restore point, and those written. What was written over is counted twice, and what
    /// was discarded of the restore point is not taken off, for to know either needs all of its index.
    pub fn used(&self, of_point: u64) -> u64 {
        of_point.saturating_add(self.overlay.written()).min(self.overlay.facts().length)
    }

    /// Whether a range is all as in the restore point.
    pub fn is_base(&self, offset: u64, length: usize) -> bool {
        let end = offset + length as u64;
        self.overlay.check().is_ok() && self.overlay.layer(offset, end) == (Layer::Base, end)
    }

    /// Fills `out` from `offset` on. With [`Wait::MustNot`] it waits for no store.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn read(
        &self,
        under: Under<'_>,
        offset: u64,
        out: &mut [u8],
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<(), Fault> {
        let tools = RefCell::new(tools);
        let base = |at: u64, out: &mut [u8]| -> Result<(), BaseError> {
            Ok(under.read(at, out, wait, &mut tools.borrow_mut())?)
        };
        self.overlay.read(offset, out, &base).map_err(fault)
    }

    /// Reads what of the restore point a change of that range will need.
    pub fn edges(
        &self,
        under: Under<'_>,
        offset: u64,
        length: u64,
        wait: Wait,
        tools: &mut Tools,
    ) -> Result<Edges, Fault> {
        let (end, whole) = (offset + length, self.overlay.facts().length);
        let mut edges = Edges(Vec::new());
        let mut edge = |block: u64| -> Result<(), Fault> {
            let (at, to) = (block * PAGE_U64, ((block + 1) * PAGE_U64).min(whole));
            if edges.0.last().is_none_or(|(before, _)| *before != at)
                && matches!(self.overlay.layer(at, to), (Layer::Base, _))
            {
                let mut bytes = Secret(vec![0; usize::try_from(to - at).unwrap_or(0)]);
                under.read(at, &mut bytes.0, wait, tools)?;
                edges.0.push((at, bytes));
            }
            Ok(())
        };
        if !offset.is_multiple_of(PAGE_U64) {
            edge(offset / PAGE_U64)?;
        }
        if !end.is_multiple_of(PAGE_U64) && end != whole {
            edge(end / PAGE_U64)?;
        }
        Ok(edges)
    }

    /// Writes at `offset`, with the edges of that range. It is durable with the next flush.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn write(&self, offset: u64, bytes: &[u8], edges: &Edges) -> Result<(), Fault> {
        self.overlay.write(offset, bytes, &|at, out| edges.read(at, out)).map_err(fault)?;
        self.changed.store(now().0, Ordering::Relaxed);
        Ok(())
    }

    /// Makes bytes zeros, with the edges of that range, and gives back their room.
    ///
    /// # Panics
    /// If the range reaches past the end of the disk.
    pub fn zero(&self, offset: u64, length: u64, edges: &Edges) -> Result<(), Fault> {
        self.overlay.zero(offset, length, &|at, out| edges.read(at, out)).map_err(fault)?;
        self.changed.store(now().0, Ordering::Relaxed);
        Ok(())
    }

    /// Makes durable what was written before.
    pub fn flush(&self) -> Result<(), Fault> {
        self.overlay.flush().map_err(fault)
    }

    /// Makes all durable, and ends it: what comes afterwards gets errors.
    pub fn close(&self) -> Result<(), OverlayError> {
        self.overlay.close()
    }

    /// Where data begins at or after `offset`; `None` if only holes follow.
    pub fn next_data(&self, under: Under<'_>, offset: u64) -> Result<Option<u64>, Fault> {
        self.next(offset, |layer, at, border| match layer {
            Layer::Data => Ok(Some(at)),
            Layer::Zeros => Ok(None),
            Layer::Base => Ok(under.disks.next_data(under.of, at)?.filter(|found| *found < border)),
        })
    }

    /// Where a hole begins at or after `offset`, which must be on the disk; its end counts as one.
    pub fn next_hole(&self, under: Under<'_>, offset: u64) -> Result<u64, Fault> {
        let found = self.next(offset, |layer, at, border| match layer {
            Layer::Data => Ok(None),
            Layer::Zeros => Ok(Some(at)),
            Layer::Base => Ok(Some(under.disks.next_hole(under.of, at)?).filter(|found| *found < border)),
        })?;
        Ok(found.unwrap_or(self.overlay.facts().length))
    }

    /// Looks layer by layer for what `find` finds from a byte on and before the border of its layer.
    fn next(
        &self,
        offset: u64,
        find: impl Fn(Layer, u64, u64) -> Result<Option<u64>, Fault>,
    ) -> Result<Option<u64>, Fault> {
        let (mut at, length) = (offset, self.overlay.facts().length);
        while at < length {
            let (layer, border) = self.overlay.layer(at, length.min(at.saturating_add(STRIDE)));
            if let Some(found) = find(layer, at, border)? {
                return Ok(Some(found));
            }
            at = border;
        }
        Ok(None)
    }
}
