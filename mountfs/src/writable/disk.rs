//! A disk that is written to: its overlay, and what is under it.

use std::fs::File;
use std::sync::Arc;

use reseal_format::ids::PointId;
use reseal_format::names::DiskName;
use reseal_nbd::server::{Change, Disk, DiskError, Errno, Stretch};

use crate::overlay::{Layer, Overlay, OverlayError};

/// A disk of a restore point with an overlay.
pub struct OverlayDisk {
    disk: DiskName,
    base: Arc<dyn Disk>,
    overlay: Overlay<File>,
}

fn failed(error: OverlayError) -> DiskError {
    let errno = if error.is_full() { Errno::NOSPC } else { Errno::IO };
    DiskError { errno, reason: error.to_string() }
}

impl OverlayDisk {
    /// What was written lies over `base`, which has the length that the overlay is for.
    pub fn new(disk: DiskName, base: Arc<dyn Disk>, overlay: Overlay<File>) -> Result<OverlayDisk, OverlayError> {
        match base.length() == overlay.facts().length {
            true => Ok(OverlayDisk { disk, base, overlay }),
            false => Err(OverlayError::Another("its disk has another length")),
        }
    }

    /// Its name in the restore point.
    pub fn disk_name(&self) -> &DiskName {
        &self.disk
    }

    /// Makes all durable, and ends it.
    pub fn close(&self) -> Result<(), OverlayError> {
        self.overlay.close()
    }

    fn under(&self) -> impl Fn(u64, &mut [u8]) -> Result<(), crate::overlay::BaseError> + '_ {
        |offset, out| Ok(self.base.read(offset, out)?)
    }
}

impl Disk for OverlayDisk {
    fn name(&self) -> &str {
        self.base.name()
    }

    fn description(&self) -> Option<String> {
        self.base.description()
    }

    fn length(&self) -> u64 {
        self.base.length()
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        self.overlay.check().map_err(failed)?;
        let end = offset + out.len() as u64;
        match self.overlay.layer(offset, end) {
            // As if there were no overlay, and in one piece.
            (Layer::Base, border) if border == end => self.base.read(offset, out),
            _ => self.overlay.read(offset, out, &self.under()).map_err(failed),
        }
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Option<Result<(), DiskError>> {
        self.overlay.check().err().map(|e| Err(failed(e))).or_else(|| {
            let end = offset + out.len() as u64;
            match self.overlay.layer(offset, end) {
                (Layer::Base, border) if border == end => self.base.try_read(offset, out),
                // A file of this machine.
                (Layer::Data | Layer::Zeros, border) if border == end => {
                    Some(self.overlay.read(offset, out, &self.under()).map_err(failed))
                }
                _ => None,
            }
        })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.overlay.write(offset, bytes, &self.under()).map_err(failed)
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.overlay.zero(offset, length, &self.under()).map_err(failed)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.overlay.discard(offset, length).map_err(failed)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.overlay.flush().map_err(failed)
    }

    fn stretches(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Stretch>, DiskError> {
        let (mut at, end) = (offset, offset + length);
        let mut found = Vec::new();
        while at < end && found.len() < most {
            match self.overlay.layer(at, end) {
                (Layer::Base, border) => {
                    let under = self.base.stretches(at, border - at, most - found.len())?;
                    if under.is_empty() {
                        break;
                    }
                    at += under.iter().map(|stretch| stretch.length).sum::<u64>();
                    found.extend(under);
                }
                (layer, border) => {
                    found.push(Stretch { length: border - at, hole: layer == Layer::Zeros });
                    at = border;
                }
            }
        }
        Ok(found)
    }

    fn changed_since(&self) -> Option<String> {
        let point = PointId::from_bytes(self.overlay.facts().point);
        Some(format!("{point}/{}", self.base.name()))
    }

    /// All that was written, whether or not it is still as it was.
    fn changes(&self, offset: u64, length: u64, most: usize) -> Result<Vec<Change>, DiskError> {
        self.overlay.check().map_err(failed)?;
        let (mut at, end) = (offset, offset + length);
        let mut found = Vec::new();
        while at < end && found.len() < most {
            let (layer, border) = self.overlay.layer(at, end);
            found.push(Change { length: border - at, changed: layer != Layer::Base });
            at = border;
        }
        Ok(found)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.base.cache(offset, length)
    }
}
