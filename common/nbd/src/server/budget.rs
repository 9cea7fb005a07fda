//! How much of what is read and written may be under way at once.

use parking_lot::{Condvar, Mutex};

/// Bytes that are left.
pub(super) struct Budget {
    left: Mutex<usize>,
    returned: Condvar,
}

/// Bytes that somebody has; dropped, they are returned.
pub(super) struct Share<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Budget {
        Budget { left: Mutex::new(bytes), returned: Condvar::new() }
    }

    /// Waits until so many are left, which must not be more than there are. One thread waits at a time.
    pub(super) fn take(&self, bytes: usize) -> Share<'_> {
        let mut left = self.left.lock();
        while *left < bytes {
            self.returned.wait(&mut left);
        }
        *left -= bytes;
        Share { budget: self, bytes }
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *self.budget.left.lock() += self.bytes;
        self.budget.returned.notify_one();
    }
}
