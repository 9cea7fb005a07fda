//! A store that answers, hangs or fails, as it is told.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use reseal_store::{Entry, Lease, LeaseUse, Standing, Store, StoreError, Upload};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Answers,
    /// Every call hangs until the mood changes.
    Hangs,
    /// Every call fails.
    Fails,
}

pub struct Faulty {
    inner: Arc<dyn Store>,
    mood: Mutex<Mood>,
    changed: Condvar,
    /// Whether reads without waiting find anything.
    pub is_cold: AtomicBool,
    pub reads: AtomicU64,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Store>) -> Arc<Faulty> {
        Arc::new(Faulty {
            inner,
            mood: Mutex::new(Mood::Answers),
            changed: Condvar::new(),
            is_cold: AtomicBool::new(true),
            reads: AtomicU64::new(0),
        })
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
        self.changed.notify_all();
    }

    fn pass(&self, key: &str) -> Result<&dyn Store, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut mood = self.mood.lock();
        while *mood == Mood::Hangs {
            self.changed.wait(&mut mood);
        }
        match *mood {
            Mood::Fails => {
                let source = io::Error::from_raw_os_error(libc::ESTALE);
                Err(StoreError::Io { key: key.into(), action: "read", source })
            }
            Mood::Answers | Mood::Hangs => Ok(&*self.inner),
        }
    }
}

impl Store for Faulty {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        self.pass(key)?.get(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.pass(key)?.read_at(key, offset, buf)
    }

    fn try_read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        if self.is_cold.load(Ordering::Relaxed) || *self.mood.lock() != Mood::Answers {
            return Ok(false);
        }
        self.inner.try_read_at(key, offset, buf)
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        self.pass(key)?.read_tail(key, want)
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.pass(key)?.upload(key)
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.pass(key)?.replace(key, expected, new)
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        self.pass(folder)?.list(folder)
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.pass(folder)?.settle(folder)
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.pass(key)?.delete(key)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.pass("tmp")?.sweep()
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        self.pass(key)?.lease(key, bytes, of)
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        self.pass(key)?.standing(key)
    }
}
