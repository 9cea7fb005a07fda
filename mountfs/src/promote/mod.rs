//! Moving the disks of a running VM from its overlay to where they stay, while it runs.
//!
//! ```text
//! target, empty → a node of QEMU's → mirror: all that is there, and what the guest writes meanwhile   (names, vm, run)
//!   all disks alike → their jobs end, and QEMU holds the guest's requests back
//!                   → targets durable → recorded → each job is finalized: the device stands on its target
//! otherwise         → jobs cancelled, nodes and targets removed; the VM goes on from the overlay      (sweep)
//! ```
//!
//! A guest's writes go to both until the end. So what was acknowledged is on the overlay for as long as the record says
//! overlay, and on the target, durably, before it says otherwise: whoever dies at whatever moment, the record names a place
//! that has all ([`settle`] finishes for who died).
//!
//! Architecture invariant: nothing is recorded as moved that is not durable at its target; and a guest's requests are held
//! back only between the end of the last job and that of the last `job-finalize`.

mod error;
mod keeper;
mod names;
mod run;
mod settle;
mod sweep;
mod vm;

use reseal_format::names::DiskName;

use crate::target::TargetSpec;

pub use error::PromoteError;
pub use keeper::Keeper;
pub use run::{Options, Watch, lengths, promote};
pub use settle::{Recorded, Stands, settle};

/// A disk to be moved.
#[derive(Clone)]
pub struct Move {
    pub disk: DiskName,
    /// Its place among the VM's disks, which tells QEMU's names of this move from those of others.
    pub nth: usize,
    /// The guest's device, and the node on which it stands, in QEMU.
    pub device: String,
    pub node: String,
    pub target: TargetSpec,
}

/// Who keeps where disks are.
pub trait Ledger {
    /// Keeps, durably, that these disks are at their targets from now on.
    fn moved(&mut self, moves: &[&Move]) -> Result<(), PromoteError>;

    /// Takes that back for those that could not be moved after all.
    fn stayed(&mut self, moves: &[&Move]) -> Result<(), PromoteError>;
}
