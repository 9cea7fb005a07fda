//! The protocol between a site that sends and the site that keeps: `docs/PROTOCOL.md` has the byte tables.
//!
//! ```text
//! source: Hello    Begin  Disk       Offer … Data …  DiskEnd   Close   Commit
//! target: Welcome  Begun  DiskReady  Need …          DiskDone  Closed  Committed
//! ```
//!
//! Between Welcome and Begin a source may ask for a new certificate: Renew, Renewed. Who may read asks, in the place of Begin, any
//! number of questions: ListVms, Vms; ListPoints, Points; Show, Shown.
//!
//! A message is a [`Header`] and a payload; the header's length is checked against the limit of its kind before anything is
//! read. Encoding and decoding stand side by side. All numbers are big-endian.

mod fields;
mod header;
mod reading;
mod renewal;
mod source;
mod target;
mod trouble;
mod violation;

pub use header::{HEADER_LENGTH, Header, Side};
pub use reading::{ListPoints, ListVms, Plaintext, PointState, Points, Show, Shown, Vms};
pub use renewal::{Renew, Renewed};
pub use source::{
    Begin, Commit, Data, DataMessage, Definition, Disk, DiskEnd, FromSource, Hello, Offer, Said, Task, Tracking,
};
pub use target::{Begun, Committed, DiskReady, FromTarget, Need, Newest, NewestDisk, Start, Welcome};
pub use trouble::{Trouble, TroubleCode};
pub use violation::Violation;

/// Version of all that is described here. Both sides name theirs in their first message, whose layout stays for ever.
pub const VERSION: u16 = 1;
/// What TLS is asked to agree on (ALPN), so that nothing else is taken for it.
pub const ALPN: &[u8] = b"reseal/1";
/// The same where a disk of a restore point is read: inside is NBD, and none of these messages.
pub const NBD_ALPN: &[u8] = b"reseal-nbd/1";
/// Clusters of one offer.
pub const MAX_CLUSTERS: usize = 16;
/// Bytes of a cluster's hash.
pub const HASH: usize = 32;
/// Longest cluster as frames: the table, and every frame stored as it is.
pub const MAX_FRAMES: usize = 1 + 2 * 4 + 65_536;
/// Longest name of a VM or disk.
pub const MAX_NAME: usize = 80;
/// Longest text for people, and longest name of a record of changes.
pub const MAX_TEXT: usize = 4096;
/// Longest definition of a VM.
pub const MAX_DEFINITION: usize = 4 << 20;
/// Most disks of a VM.
pub const MAX_DISKS: usize = 256;
/// Most warnings of a restore point.
pub const MAX_WARNINGS: usize = 1024;
/// Most areas that are read whatever is said; where there are more, the disk is read whole.
pub const MAX_AREAS: usize = 65_536;
/// Longest request for a certificate.
pub const MAX_REQUEST: usize = 2048;
/// Longest certificate that answers it.
pub const MAX_CERTIFICATE: usize = 8192;
/// Most VMs of one answer.
pub const MAX_LISTED_VMS: usize = 1024;
/// Most restore points of one answer.
pub const MAX_LISTED_POINTS: usize = 16_384;
/// Longest manifest or tombstone: as long as one may be in a vault.
pub const MAX_SHOWN: usize = 8 << 20;
