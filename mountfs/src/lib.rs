//! Any restore point as files, and disks back as files.
//!
//! The data's path, which is also the reading order of the modules:
//!
//! ```text
//! request → disk, here or at another site → bytes → reply           (disks)
//!         → view: VM → restore point → file, in all its faces       (inodes, files, faces, catalog, view)
//!         → at once, or by the pool under a deadline                (answer, pool, readahead, handles, transfer, flusher, fuse)
//! mount → session → unmount                                         (mount, mounts, signals, record_watch, umount)
//! restore: disk → stretches, several at a time → file or device     (restore, target)
//! nbd: socket → a thread a client → the server of `reseal-nbd`      (nbd)
//! boot: definition → machine → QEMU on exports of overlays          (boot)
//! writes: disk → overlay → file in a folder; its key → the vault    (writable, overlay)
//! boots: reads are recorded → note → fetched ahead at the next          (boot_reads)
//! ```
//!
//! [`errno`] has every way to fail and what the kernel is told; [`journal`] what the administrator is told.
//!
//! Architecture invariant: `fuse`, `transfer` and `answer` are the only modules that know FUSE's requests; all that decides
//! anything is tested without `/dev/fuse`. No FUSE thread waits for a store.

pub mod disks;

pub mod catalog;
pub mod faces;
pub mod files;
pub mod inodes;
pub mod view;

mod answer;
mod flusher;
mod fuse;
mod handles;
pub mod pool;
mod readahead;
mod transfer;

pub mod mount;
mod mounts;
pub mod record_watch;
pub mod signals;
pub mod umount;

pub mod boot_check;
pub mod boot_reads;
pub mod overlay;
pub mod writable;

pub mod restore;
pub mod target;

pub mod nbd;

pub mod boot;
pub mod promote;

pub mod errno;
pub mod journal;
