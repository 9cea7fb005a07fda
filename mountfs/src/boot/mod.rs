//! A restore point that runs: from what was captured of the VM to a QEMU on its overlay.
//!
//! ```text
//! definition → what it says → machine → command line                (described, domain_xml, machine_json, machine, command)
//!              what this host has ┘     (host, network, console)
//!                          machine → libvirt domain                 (domain, virsh)
//! run folder: sockets, boot.json → QEMU, started or found again     (run_folder, record, qemu)
//! ```
//!
//! Architecture invariant: `machine` and `command` decide alone, from values; they look at no host and start nothing. Of a definition
//! only what they know gets through: numbers within bounds, words from lists, never a path.

mod command;
mod console;
mod described;
mod domain;
mod domain_xml;
mod error;
mod host;
mod machine;
mod machine_json;
mod network;
mod qemu;
mod record;
mod run_folder;
mod virsh;

pub use command::{Setup, command, quoted};
pub use console::{Console, Vnc};
pub use described::{Described, DescribedDisk, DescribedNic};
pub use domain::{DomainSetup, domain_xml, refuse_network};
pub use error::BootError;
pub use host::{Accel, AccelChoice, FirmwareFiles, Host, host_size};
pub use machine::{
    Arch, Bus, Chipset, Firmware, HostSize, MAX_CPUS, Machine, MachineDisk, Nic, Overrides, ScsiModel, device, node,
};
pub use network::{Forward, Network};
pub use qemu::{Happened, Qemu, RunState, Tie};
pub use record::{DiskAt, Record, RecordDisk, VERSION as RECORD_VERSION};
pub use run_folder::RunFolder;
pub use virsh::{DomainState, Virsh};
