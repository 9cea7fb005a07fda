//! What is open: each open file and folder has a number that the kernel passes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::disks::DiskOf;
use crate::files::{Content, OpenPoint};
use crate::readahead::Stream;
use crate::view::Child;

/// A disk that is open.
pub(crate) struct OpenDisk {
    pub(crate) point: Arc<OpenPoint>,
    /// Which of the point's disks.
    pub(crate) nth: usize,
    pub(crate) stream: Stream,
}

impl OpenDisk {
    /// Opens a point's disk of that place.
    pub(crate) fn new(point: Arc<OpenPoint>, nth: usize) -> OpenDisk {
        OpenDisk { point, nth, stream: Stream::default() }
    }

    /// The disk.
    pub(crate) fn disk(&self) -> Option<DiskOf<'_>> {
        DiskOf::new(self.point.manifest(), self.nth)
    }
}

/// Something open.
pub(crate) enum Handle {
    Disk(OpenDisk),
    Text(Arc<OpenPoint>, Content),
    /// A folder as it was when it was opened, so that a reader of it sees each name once.
    Folder(Vec<Child>),
}

/// All that is open.
#[derive(Default)]
pub(crate) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
}

impl Handles {
    /// Gives it a number.
    pub(crate) fn insert(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(number, Arc::new(handle));
        number
    }

    /// What has that number.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.read().get(&number).cloned()
    }

    /// It is closed.
    pub(crate) fn remove(&self, number: u64) {
        self.open.write().remove(&number);
    }
}
