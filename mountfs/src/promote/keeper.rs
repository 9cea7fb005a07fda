//! Where a VM's disks are, as it is kept: in the run folder for whoever comes back to the VM, and in the overlay's folder, which
//! outlives this machine's memory, for whoever opens the overlay.

use reseal_qmp::Client;

use super::settle::{Recorded, Stands, settle};
use super::{Ledger, Move, PromoteError};
use crate::boot::{DiskAt, Record, RunFolder};
use crate::writable::Moved;

/// Both places of one VM.
pub struct Keeper<'a> {
    folder: &'a RunFolder,
}

fn failed(error: impl std::fmt::Display) -> PromoteError {
    PromoteError::Record(error.to_string())
}

impl Keeper<'_> {
    /// That of the VM with this run folder.
    pub fn new(folder: &RunFolder) -> Keeper<'_> {
        Keeper { folder }
    }

    fn record(&self) -> Result<Record, PromoteError> {
        let record = self.folder.record().map_err(failed)?;
        record.ok_or_else(|| failed(format!("{} says nothing of a VM", self.folder.path().display())))
    }

    /// Keeps a record: first what must be durable.
    fn put(&self, record: &Record) -> Result<(), PromoteError> {
        if let Some(folder) = &record.overlay_folder {
            let mut moved = Moved::read(folder).map_err(failed)?;
            for disk in &record.disks {
                moved.set(
                    &disk.name,
                    match &disk.at {
                        DiskAt::Overlay => None,
                        DiskAt::Moved { target } => Some(target.clone()),
                    },
                );
            }
            moved.put(folder).map_err(failed)?;
        }
        self.folder.put(record).map_err(failed)
    }

    fn set(&self, moves: &[&Move], at: impl Fn(&Move) -> DiskAt) -> Result<(), PromoteError> {
        let mut record = self.record()?;
        for wish in moves {
            if let Some(disk) = record.disks.iter_mut().find(|disk| disk.name == wish.disk) {
                disk.at = at(wish);
            }
        }
        self.put(&record)
    }

    /// Brings to its end what a move that died has left in QEMU, and the record to what is so. The record.
    pub fn settle(&self, client: &mut Client) -> Result<Record, PromoteError> {
        let mut record = self.record()?;
        let disks = record.disks.iter().enumerate().map(|(nth, disk)| Recorded {
            nth,
            device: &disk.device,
            node: &disk.node,
            is_moved: disk.at != DiskAt::Overlay,
        });
        let stand = settle(client, &disks.collect::<Vec<_>>())?;
        let before = record.clone();
        for (disk, stands) in record.disks.iter_mut().zip(stand) {
            if stands == Stands::Overlay {
                disk.at = DiskAt::Overlay;
            }
        }
        if record != before {
            self.put(&record)?;
        }
        Ok(record)
    }
}

impl Ledger for Keeper<'_> {
    fn moved(&mut self, moves: &[&Move]) -> Result<(), PromoteError> {
        self.set(moves, |wish| DiskAt::Moved { target: wish.target.path().display().to_string() })
    }

    fn stayed(&mut self, moves: &[&Move]) -> Result<(), PromoteError> {
        self.set(moves, |_| DiskAt::Overlay)
    }
}
