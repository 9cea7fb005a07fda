//! Restore points that are written to: an overlay for each disk, in a folder that is kept, or gone with the process.
//!
//! ```text
//! folder: overlay.json, lock, a file a disk → the key, from a note of the vault → overlays → disks → exports
//! (folder, document)                          (key)                 (opened)     (disk)   (exports)
//!                                                                   overlays → disks of a mount (mounted)
//! moved → which disks are elsewhere by now, and so are not opened                   (moved)
//! list → what there is; drop → files and key go                                                     (list)
//! ```
//!
//! Architecture invariant: nothing of the folder is believed but what opens under the key. What `overlay.json` says is for people, and
//! to find the key; the heads of the overlays say, sealed, which disk of which point they are of.

mod disk;
mod document;
mod exports;
mod folder;
mod key;
mod list;
mod mounted;
mod moved;
mod opened;

pub use disk::OverlayDisk;
pub use document::{Document, DocumentDisk};
pub use exports::WritableExports;
pub use folder::{Folder, FolderError};
pub use key::drop_key;
pub use list::{Found, find, found_at, in_state, overlays_folder};
pub use mounted::{Edges, Under, WrittenDisk};
pub use moved::{Moved, MovedDisk, has_vm};
pub use opened::{LEAST, Opened, OverlayPlace, WritableError};
