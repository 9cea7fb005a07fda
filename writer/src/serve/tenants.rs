//! Tenants that are unlocked: opened when they are needed, shared by their sessions, watched, and locked again.
//!
//! Each says in the vault that this process has its keys, so an erasure waits for it. A thread looks at its record every three
//! seconds: when the tenant was erased, its sessions end, and with the last of them go its keys. So they do when it was idle for long.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_cli::{Failure, Status};
use reseal_format::names::TenantName;
use reseal_store::Lease;
use reseal_vault::disk::DiskReader;
use reseal_vault::heads::{Heads, tenant_folder};
use reseal_vault::{Holder, Pins, Tenant, VaultError};
use tracing::{info, warn};

use super::metrics::Metrics;
use crate::draft::Caches;

/// How often a tenant's record is looked at: one small object each time.
const EVERY: Duration = Duration::from_secs(3);
/// How long a KMS that did not answer is left alone by who only asks how things are.
const PAUSE: Duration = Duration::from_secs(10);
/// Tenants that are opened at once at the start: one whose KMS does not answer takes a while.
const AT_ONCE: usize = 8;

/// A tenant that is unlocked, and what this machine keeps of it.
pub struct Access {
    pub tenant: Arc<Tenant>,
    pub heads: Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
}

/// Unlocks tenants.
pub trait Tenants: Send + Sync {
    /// Unlocks a tenant.
    fn unlock(&self, name: &TenantName) -> Result<Access, Failure>;

    /// Whether a tenant was erased: its clients are of nobody any more, and nothing is wrong with that.
    fn is_erased(&self, name: &TenantName) -> bool;

    /// Looks whether the vault is there.
    fn look(&self) -> Result<(), Failure>;
}

/// A tenant that is open, for whoever works with it.
pub struct OpenTenant {
    access: Access,
    caches: Caches,
    /// Reads disks, once somebody does.
    reader: OnceLock<Arc<DiskReader>>,
    /// Bytes that all of it may keep.
    part: AtomicUsize,
    /// Dropped last.
    _lease: Option<Box<dyn Lease>>,
}

impl Deref for OpenTenant {
    type Target = Access;

    fn deref(&self) -> &Access {
        &self.access
    }
}

impl OpenTenant {
    /// The tenant's own part of the state folder.
    pub(super) fn folder(&self) -> PathBuf {
        tenant_folder(&self.state, &self.tenant.keys().scope())
    }

    /// What its sessions keep of packs and index.
    pub(super) fn caches(&self) -> &Caches {
        &self.caches
    }

    /// What reads its disks, for all who do.
    pub(super) fn reader(&self) -> Arc<DiskReader> {
        let part = self.part.load(Ordering::Relaxed);
        let reader = self.reader.get_or_init(|| Arc::new(DiskReader::new(self.tenant.clone(), part / 2))).clone();
        self.resize(part);
        reader
    }

    /// Keeps at most so many bytes: those who read and those who add have half each, where there are both.
    fn resize(&self, part: usize) {
        self.part.store(part, Ordering::Relaxed);
        match self.reader.get() {
            None => self.caches.resize(part),
            Some(reader) => {
                self.caches.resize(part / 2);
                reader.resize(part / 2);
            }
        }
    }
}

struct Entry {
    open: Arc<OpenTenant>,
    /// When it was last asked for.
    used: Instant,
    /// Whether anybody may still come as this tenant.
    wanted: bool,
}

/// What is known of tenants.
#[derive(Default)]
struct Book {
    open: HashMap<TenantName, Entry>,
    /// Why a tenant could not be opened last time, and when that was.
    failed: HashMap<TenantName, (String, Instant)>,
    /// Bytes that all may keep of packs and index.
    cache: usize,
    idle: Duration,
}

impl Book {
    /// Gives each that is open the same part.
    fn share_cache(&self) {
        let part = self.cache / self.open.len().max(1);
        self.open.values().for_each(|entry| entry.open.resize(part));
    }
}

/// Told which tenant is no more.
pub(super) type Lost = Box<dyn Fn(&TenantName) + Send + Sync>;

/// The tenants of a server.
pub(super) struct OpenTenants {
    tenants: Arc<dyn Tenants>,
    book: Mutex<Book>,
    /// Of each tenant one thread at a time asks the KMS.
    opening: Mutex<HashMap<TenantName, Arc<Mutex<()>>>>,
    metrics: Arc<Metrics>,
    lost: Mutex<Option<Lost>>,
}

impl OpenTenants {
    pub(super) fn new(tenants: Arc<dyn Tenants>, metrics: Arc<Metrics>) -> Arc<OpenTenants> {
        Arc::new(OpenTenants {
            tenants,
            book: Mutex::default(),
            opening: Mutex::default(),
            metrics,
            lost: Mutex::new(None),
        })
    }

    /// Says whom to tell of tenants that are no more.
    pub(super) fn tell(&self, lost: Lost) {
        *self.lost.lock() = Some(lost);
    }

    /// Takes up other limits.
    pub(super) fn set(&self, cache: usize, idle: Duration) {
        let mut book = self.book.lock();
        (book.cache, book.idle) = (cache, idle);
        book.share_cache();
    }

    /// The tenant, unlocked before or now.
    pub(super) fn open(self: &Arc<Self>, name: &TenantName) -> Result<Arc<OpenTenant>, Failure> {
        if let Some(open) = self.is_open(name) {
            return Ok(open);
        }
        let turn = self.opening.lock().entry(name.clone()).or_default().clone();
        let _turn = turn.lock();
        if let Some(open) = self.is_open(name) {
            return Ok(open);
        }
        let unlocked = self.tenants.unlock(name);
        let unreachable = unlocked.as_ref().err().is_some_and(|failure| failure.status == Status::Unreachable);
        self.metrics.kms(name, !unreachable);
        let access = match unlocked {
            Ok(access) => access,
            Err(failure) => {
                self.book.lock().failed.insert(name.clone(), (failure.message.clone(), Instant::now()));
                return Err(failure);
            }
        };
        let lease = access.tenant.reader_lease(&Holder::this_process("serve".into()).pinning(Pins::Nothing));
        if lease.is_none() {
            warn!(tenant = %name, "the vault takes no lease: an erasure of this tenant will not wait for this server");
        }
        let mut book = self.book.lock();
        let part = book.cache / (book.open.len() + 1);
        let caches = Caches::new(access.tenant.clone(), part);
        let (reader, part) = (OnceLock::new(), AtomicUsize::new(part));
        let open = Arc::new(OpenTenant { access, caches, reader, part, _lease: lease });
        book.open.insert(name.clone(), Entry { open: open.clone(), used: Instant::now(), wanted: true });
        book.failed.remove(name);
        book.share_cache();
        drop(book);
        self.metrics.unlocked(name, true);
        self.watch(name.clone(), &open)?;
        Ok(open)
    }

    fn is_open(&self, name: &TenantName) -> Option<Arc<OpenTenant>> {
        let mut book = self.book.lock();
        let entry = book.open.get_mut(name)?;
        (entry.used, entry.wanted) = (Instant::now(), true);
        Some(entry.open.clone())
    }

    /// Opens those that anybody may come as; only a KMS that does not answer is waited for later.
    pub(super) fn open_all(
        self: &Arc<Self>,
        names: &[TenantName],
        must_be: &dyn Fn(&TenantName) -> bool,
    ) -> Result<(), Failure> {
        for some in names.chunks(AT_ONCE) {
            let opened: Vec<_> = std::thread::scope(|scope| {
                let opening: Vec<_> =
                    some.iter().map(|name| (name, scope.spawn(|| self.open(name).map(drop)))).collect();
                opening.into_iter().map(|(name, thread)| (name, thread.join())).collect()
            });
            for (name, opened) in opened {
                let message = |failure: &Failure| format!("tenant {name}: {}", failure.message);
                match opened {
                    Ok(Ok(())) => {}
                    Ok(Err(failure)) if failure.status == Status::Unreachable => warn!("{}", message(&failure)),
                    Ok(Err(_)) if !must_be(name) && self.tenants.is_erased(name) => {
                        info!("tenant {name} was erased; its clients can be revoked");
                    }
                    // One that was removed since a client of it was enrolled.
                    Ok(Err(failure)) if !must_be(name) => warn!("{}", message(&failure)),
                    Ok(Err(failure)) => return Err(Failure::new(failure.status, message(&failure))),
                    Err(_) => return Err(Failure::new(Status::Failed, format!("tenant {name}: opening it failed"))),
                }
            }
        }
        Ok(())
    }

    /// A tenant if it is open, without keeping it so.
    pub(super) fn peek(&self, name: &TenantName) -> Option<Arc<OpenTenant>> {
        self.book.lock().open.get(name).map(|entry| entry.open.clone())
    }

    /// Unlocks a tenant for a moment.
    pub(super) fn glance(&self, name: &TenantName) -> Result<Access, Failure> {
        self.tenants.unlock(name)
    }

    /// Whether the vault is there.
    pub(super) fn check_vault(&self) -> Result<(), String> {
        self.tenants.look().map_err(|failure| failure.message)
    }

    /// Whether each of these is open, or could be opened when it last was to be. Those that could not are tried again.
    pub(super) fn check(self: &Arc<Self>, names: &[TenantName]) -> Result<(), String> {
        let mut wrong = Vec::new();
        for name in names {
            let failed = self.book.lock().failed.get(name).cloned();
            let why = match failed {
                None => continue,
                // Who enrolled its clients may revoke them some day.
                Some(_) if self.tenants.is_erased(name) => continue,
                Some((why, when)) if when.elapsed() < PAUSE => why,
                Some(_) => match self.open(name) {
                    Ok(_) => continue,
                    Err(failure) => failure.message,
                },
            };
            wrong.push(format!("tenant {name}: {why}"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    }

    /// Forgets tenants that nobody may come as any more, once nobody works with them.
    pub(super) fn keep_only(&self, names: &[TenantName]) {
        let names: HashSet<_> = names.iter().collect();
        let mut book = self.book.lock();
        book.failed.retain(|name, _| names.contains(name));
        book.open.iter_mut().for_each(|(name, entry)| entry.wanted = names.contains(name));
    }

    fn watch(self: &Arc<Self>, name: TenantName, open: &Arc<OpenTenant>) -> Result<(), Failure> {
        let (all, open) = (Arc::downgrade(self), Arc::downgrade(open));
        let mut watch = Watch { name: name.clone(), all, open, has_complained: false };
        let look = move || {
            while watch.look() {
                std::thread::sleep(EVERY);
            }
        };
        let spawned = std::thread::Builder::new().name("record".into()).spawn(look);
        spawned.map(drop).map_err(|e| {
            // Without it nobody would notice that the tenant is erased.
            self.close(&name);
            Failure::new(Status::Failed, format!("a thread that watches tenant {name} can't be started: {e}"))
        })
    }

    fn close(&self, name: &TenantName) {
        let mut book = self.book.lock();
        let closed = book.open.remove(name);
        book.share_cache();
        drop(book);
        // Outside of the lock: it may be the last that has the keys, and the end of its lease is written.
        drop(closed);
        self.metrics.unlocked(name, false);
    }
}

/// Looks at one tenant's record.
struct Watch {
    name: TenantName,
    all: Weak<OpenTenants>,
    open: Weak<OpenTenant>,
    /// Whether what stands in the way now was said.
    has_complained: bool,
}

impl Watch {
    /// Looks once; whether to go on.
    fn look(&mut self) -> bool {
        let (Some(all), Some(open)) = (self.all.upgrade(), self.open.upgrade()) else { return false };
        let name = &self.name;
        match open.tenant.refresh() {
            Ok(is_new) => {
                self.has_complained = false;
                if is_new {
                    let generation = open.tenant.record_generation();
                    all.metrics.kms(name, true);
                    info!(tenant = %name, "it has a new record, generation {generation}: its keys are in use");
                    if let Err(error) = open.heads.remember(generation, &[]) {
                        warn!(tenant = %name, "{error}");
                    }
                }
            }
            Err(error) if open.tenant.is_lost(&error) => {
                warn!(tenant = %name, "{error}; its sessions end, and with them goes what this server had of its keys");
                all.close(name);
                if let Some(lost) = &*all.lost.lock() {
                    lost(name);
                }
                return false;
            }
            // A record that can't be read now says nothing.
            Err(VaultError::Store(_)) => {}
            Err(error) => {
                if matches!(error, VaultError::NoNewKeys { .. }) {
                    all.metrics.kms(name, false);
                }
                if !self.has_complained {
                    self.has_complained = true;
                    warn!(tenant = %name, "{error}. It goes on with the keys that it has");
                }
            }
        }
        !self.close_idle(&all, &open)
    }

    /// Locks the tenant if nobody has worked with it for long, or may any more.
    fn close_idle(&self, all: &OpenTenants, open: &Arc<OpenTenant>) -> bool {
        let mut book = all.book.lock();
        let idle = book.idle;
        let Some(entry) = book.open.get_mut(&self.name) else { return true };
        // One is the book's, one is ours; nobody gets another while the book is locked.
        if Arc::strong_count(open) > 2 {
            entry.used = Instant::now();
            return false;
        }
        if entry.wanted && entry.used.elapsed() < idle {
            return false;
        }
        let closed = book.open.remove(&self.name);
        book.share_cache();
        drop(book);
        drop(closed);
        all.metrics.unlocked(&self.name, false);
        info!(tenant = %self.name, "nobody needs it for now: its keys are dropped");
        true
    }
}
