//! Stores around a real one: one operation fails, stalls or lies; and all are written down.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use reseal_store::{Entry, Lease, LeaseUse, Local, Standing, Store, StoreError, Upload};

/// What a store is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Get,
    ReadAt,
    ReadTail,
    Upload,
    Append,
    Finish,
    Replace,
    List,
    Delete,
    Settle,
    Sweep,
    Lease,
    IsHeld,
}

impl Operation {
    /// Whether it reads an object.
    pub fn reads(self) -> bool {
        matches!(self, Operation::Get | Operation::ReadAt | Operation::ReadTail)
    }
}

/// What happens instead.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// It is not done, and that is said.
    Fails(io::ErrorKind),
    /// It is done, and yet said to have failed: an answer that was lost.
    Lies,
    /// It is done, later.
    Stalls(Duration),
}

/// Which operation it happens to.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Of this kind; `None` for any.
    pub operation: Option<Operation>,
    /// So many of them go well before.
    pub after: usize,
    /// Whether those that follow meet it too.
    pub lasting: bool,
    pub fault: Fault,
}

/// What somebody else does just before an operation.
type Meanwhile = Box<dyn FnMut(Operation, &str) + Send>;

#[derive(Default)]
struct Shared {
    log: Mutex<Vec<(Operation, String)>>,
    plan: Mutex<Option<Plan>>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

/// A store that is watched.
pub struct Watched {
    inner: Arc<dyn Store>,
    shared: Arc<Shared>,
}

impl Watched {
    /// Around a real one; everything goes well at first.
    pub fn new(inner: Arc<dyn Store>) -> Watched {
        Watched { inner, shared: Arc::default() }
    }

    /// From now on, this happens.
    pub fn plan(&self, plan: Option<Plan>) {
        *self.shared.plan.lock().unwrap() = plan;
    }

    /// From now on, that happens before each operation. It must not use this store.
    pub fn meanwhile(&self, what: impl FnMut(Operation, &str) + Send + 'static) {
        *self.shared.meanwhile.lock().unwrap() = Some(Box::new(what));
    }

    /// Whether what was planned has happened.
    pub fn happened(&self) -> bool {
        self.shared.plan.lock().unwrap().is_none_or(|plan| plan.after == 0 && plan.lasting)
    }

    /// What was asked for since the last call, in that order.
    pub fn take_log(&self) -> Vec<(Operation, String)> {
        std::mem::take(&mut *self.shared.log.lock().unwrap())
    }
}

impl Shared {
    fn due(&self, operation: Operation, key: &str) -> Option<Fault> {
        self.log.lock().unwrap().push((operation, key.to_owned()));
        if let Some(meanwhile) = self.meanwhile.lock().unwrap().as_mut() {
            meanwhile(operation, key);
        }
        let mut guard = self.plan.lock().unwrap();
        let plan = guard.as_mut().filter(|plan| plan.operation.is_none_or(|only| only == operation))?;
        if plan.after > 0 {
            plan.after -= 1;
            return None;
        }
        let fault = plan.fault;
        if !plan.lasting {
            *guard = None;
        }
        Some(fault)
    }

    fn apply<T>(
        &self,
        operation: Operation,
        key: &str,
        real: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let failed = |kind: io::ErrorKind| match kind {
            io::ErrorKind::StorageFull => StoreError::Full(key.to_owned()),
            kind => StoreError::Io { key: key.to_owned(), action: "do as planned with", source: kind.into() },
        };
        match self.due(operation, key) {
            None => real(),
            Some(Fault::Fails(kind)) => Err(failed(kind)),
            Some(Fault::Lies) => real().and(Err(failed(io::ErrorKind::ConnectionReset))),
            Some(Fault::Stalls(time)) => {
                thread::sleep(time);
                real()
            }
        }
    }
}

impl Store for Watched {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        self.shared.apply(Operation::Get, key, || self.inner.get(key, limit))
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.shared.apply(Operation::ReadAt, key, || self.inner.read_at(key, offset, buf))
    }

    /// Never at once: so that every read is one that is counted and may fail.
    fn try_read_at(&self, _: &str, _: u64, _: &mut [u8]) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        self.shared.apply(Operation::ReadTail, key, || self.inner.read_tail(key, want))
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        let inner = self.shared.apply(Operation::Upload, key, || self.inner.upload(key))?;
        Ok(Box::new(WatchedUpload { inner, shared: self.shared.clone(), key: key.to_owned() }))
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.shared.apply(Operation::Replace, key, || self.inner.replace(key, expected, new))
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        self.shared.apply(Operation::List, folder, || self.inner.list(folder))
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.shared.apply(Operation::Delete, key, || self.inner.delete(key))
    }

    fn remove_empty(&self, folder: &str) -> Result<(), StoreError> {
        self.shared.apply(Operation::Delete, folder, || self.inner.remove_empty(folder))
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.shared.apply(Operation::Settle, folder, || self.inner.settle(folder))
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.shared.apply(Operation::Sweep, "", || self.inner.sweep())
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        self.shared.apply(Operation::Lease, key, || self.inner.lease(key, bytes, of))
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        self.shared.apply(Operation::IsHeld, key, || self.inner.standing(key))
    }
}

/// A folder whose files are opened anew for each operation: what was removed can't be read on.
pub struct Forgetful(PathBuf);

impl Forgetful {
    pub fn new(root: impl Into<PathBuf>) -> Forgetful {
        Forgetful(root.into())
    }

    fn local(&self) -> Local {
        Local::new(&self.0)
    }
}

impl Store for Forgetful {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        self.local().get(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.local().read_at(key, offset, buf)
    }

    fn try_read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        self.local().try_read_at(key, offset, buf)
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        self.local().read_tail(key, want)
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.local().upload(key)
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.local().replace(key, expected, new)
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        self.local().list(folder)
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.local().delete(key)
    }

    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.local().settle(folder)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.local().sweep()
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        self.local().lease(key, bytes, of)
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        self.local().standing(key)
    }
}

struct WatchedUpload {
    inner: Box<dyn Upload>,
    shared: Arc<Shared>,
    key: String,
}

impl Upload for WatchedUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.shared.apply(Operation::Append, &self.key, || self.inner.append(bytes))
    }

    fn finish(self: Box<Self>) -> Result<(), StoreError> {
        let WatchedUpload { inner, shared, key } = *self;
        shared.apply(Operation::Finish, &key, || inner.finish())
    }
}
