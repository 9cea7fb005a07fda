//! Making restore points, and looking after them.
//!
//! ```text
//! backup: source → extents → clusters → hash → have it? → frames ┃ seal → pack → index → manifest
//!         (source)  (plan)   (worker)   (known, lookup)          (assemble, index_writer)  (backup)
//! ```
//!
//! [`pipeline`] joins the stages; [`verify`] reads everything back, [`repair`] mends from a copy what is damaged, [`scrub`] looks for rot without keys, [`prune`] gives back space; [`rekey`] seals everything again under another key. [`jobs`] runs
//! backups as a file says, [`status`] tells how things stand, and [`retention`] which restore points a policy keeps.
//!
//! Architecture invariant: what is right of ┃ happens where the keys are, on the target's side; a remote backup cuts the
//! pipeline there. The lookup is a hint: nothing is deduplicated against before the pack's own id table confirms it.

mod assemble;
mod at_work;
pub mod backup;
pub mod changes;
mod content;
pub mod copy;
mod draft;
mod error;
mod finisher;
mod generations;
pub mod guardian;
pub mod image;
mod index_writer;
pub mod jobs;
mod judge;
mod known;
pub mod libvirt;
mod link;
pub mod live;
mod lookup;
mod pipeline;
mod plan;
pub mod prune;
pub mod qemu;
pub mod rekey;
pub mod remote;
pub mod repair;
pub mod retention;
mod rewrite;
pub mod scrub;
pub mod serve;
pub mod source;
pub mod span;
mod spread;
pub mod status;
mod target;
pub mod throttle;
pub mod verify;
mod verify_pack;
mod walk;
mod worker;

pub use error::BackupError;
