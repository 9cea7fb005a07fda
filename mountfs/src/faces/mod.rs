//! Faces of a disk: the same bytes as its raw file, in the clothes that other hypervisors want.
//!
//! ```text
//! NAME.vmdk   a text that names NAME.raw as its only extent    (vmdk)
//! NAME.vhd    the disk's bytes, then a footer                   (vhd)
//! ```
//!
//! Both formats count in sectors, so a disk whose length is no multiple of 512 has neither: what they would show is another disk.

pub mod vhd;
pub mod vmdk;

/// Bytes of a sector, in both formats.
const SECTOR: u64 = 512;

/// Whole sectors of a disk; `None` if it ends within one, or has none.
fn sectors(length: u64) -> Option<u64> {
    (length > 0 && length.is_multiple_of(SECTOR)).then_some(length / SECTOR)
}
