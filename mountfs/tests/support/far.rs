//! A store that takes its time for each read, and counts who waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::Duration;

use reseal_store::{Entry, Lease, LeaseUse, Standing, Store, StoreError, Upload};

pub struct Far {
    inner: Arc<dyn Store>,
    delay: Duration,
    home: ThreadId,
    here: AtomicU64,
    elsewhere: AtomicU64,
}

impl Far {
    pub fn new(inner: Arc<dyn Store>, delay: Duration) -> Arc<Far> {
        let home = thread::current().id();
        Arc::new(Far { inner, delay, home, here: AtomicU64::new(0), elsewhere: AtomicU64::new(0) })
    }

    /// Reads for which the thread has waited that made this.
    pub fn here(&self) -> u64 {
        self.here.load(Ordering::Relaxed)
    }

    /// Reads for which others have.
    pub fn elsewhere(&self) -> u64 {
        self.elsewhere.load(Ordering::Relaxed)
    }

    fn wait(&self) -> &dyn Store {
        let counter = if thread::current().id() == self.home { &self.here } else { &self.elsewhere };
        counter.fetch_add(1, Ordering::Relaxed);
        thread::sleep(self.delay);
        &*self.inner
    }
}

impl Store for Far {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        self.wait().get(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.wait().read_at(key, offset, buf)
    }

    fn try_read_at(&self, _: &str, _: u64, _: &mut [u8]) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        self.wait().read_tail(key, want)
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.inner.upload(key)
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.inner.replace(key, expected, new)
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        self.inner.list(folder)
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key)
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.inner.settle(folder)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.inner.sweep()
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        self.inner.lease(key, bytes, of)
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        self.inner.standing(key)
    }
}
