//! Buckets that keep versions, as those do in which objects can be locked.
//!
//! There, replacing and removing an object by its key only hides it, and what is locked, too. So an object is removed by its version: the
//! store refuses that while it is locked, and its space is free then. Where that brings back an older version, for the object was replaced
//! once, that is hidden: it goes by the rules of the bucket.

use std::sync::OnceLock;
use std::time::Duration;

use object_store::{Error, UpdateVersion};

use super::attempts::{status, told};
use super::lease::store_time;
use super::signed::{About, Signed};
use super::{Guard, Refusal, Shared, not_any_more};
use crate::{Lock, LockMode, StoreError};

/// What is known of a bucket's versions.
pub(super) struct Versions {
    signed: Option<Signed>,
    /// Whether it keeps any, once that was seen.
    are_kept: OnceLock<bool>,
}

/// What a version is called that was made while the bucket kept none: the next one of these takes its place.
const NAMELESS: &str = "null";

impl Versions {
    pub(super) fn new(signed: Option<Signed>) -> Versions {
        Versions { signed, are_kept: OnceLock::new() }
    }

    /// Makes requests about versions, where the store is one of S3.
    pub(super) fn signed(&self) -> Result<&Signed, Error> {
        self.signed.as_ref().ok_or_else(|| not_any_more(StoreError::NoLocks))
    }

    /// The same, unless there is nothing to be asked.
    fn in_use(&self) -> Option<&Signed> {
        self.signed.as_ref().filter(|_| self.are_kept.get() != Some(&false))
    }
}

impl Shared {
    /// What is known of an object's version and lock; `None` where there are none.
    async fn version_of(&self, key: &str) -> Result<Option<(&Signed, About)>, StoreError> {
        let Some(signed) = self.versions.in_use() else { return Ok(None) };
        // First as all else is asked: a bucket that keeps none may refuse what is signed otherwise.
        if self.versions.are_kept.get().is_none() {
            let are_kept = self.about(key).await?.version.is_some();
            if !*self.versions.are_kept.get_or_init(|| are_kept) {
                return Ok(None);
            }
        }
        let path = self.path(key)?;
        let asked = self.attempts.ask(0, || signed.about(&path)).await;
        let about = asked.map_err(|refusal| told(key, "look at", refusal.error))?;
        // One that keeps versions says which this is.
        Ok(about.version.is_some().then_some((signed, about)))
    }

    /// Removes an object for good.
    pub(super) async fn delete(&self, key: &str, guard: Guard) -> Result<(), StoreError> {
        self.check_present(key)?;
        let Some((signed, about)) = self.version_of(key).await? else { return self.hide(key, guard).await };
        if let Some(lock) = self.stands(about.lock).await? {
            return Err(StoreError::Locked { key: key.into(), until: shown(lock) });
        }
        let (path, version) = (self.path(key)?, about.version.unwrap_or_default());
        let request = || async {
            self.check_guard(key, guard)?;
            signed.delete_version(&path, &version).await
        };
        match self.attempts.ask(0, request).await {
            Ok(()) | Err(Refusal { error: Error::NotFound { .. }, was_repeated: true }) => {}
            Err(refusal) if is_refusal(&refusal.error) => return Err(self.kept(key, refusal.error).await?),
            Err(refusal) => return Err(told(key, "delete", refusal.error)),
        }
        match self.version_of(key).await {
            Err(StoreError::NotFound(_)) | Ok(None) => Ok(()),
            // Not one that another process has just made.
            Ok(Some((_, older))) if older.modified < about.modified => self.hide(key, guard).await,
            other => other.map(drop),
        }
    }

    /// The same; what is locked is hidden.
    pub(super) async fn delete_or_hide(&self, key: &str, guard: Guard) -> Result<(), StoreError> {
        match self.delete(key, guard).await {
            Err(e) if e.is_refused() => self.hide(key, guard).await,
            other => other,
        }
    }

    /// Removes a version that was replaced, if it is easily done.
    pub(super) async fn forget_version(&self, key: &str, version: UpdateVersion, patience: Duration) {
        let version = version.version.filter(|version| version != NAMELESS);
        if let (Some(version), Some(signed), Ok(path)) = (version, self.versions.in_use(), self.path(key)) {
            let _ = tokio::time::timeout(patience, signed.delete_version(&path, &version)).await;
        }
    }

    /// A lock, if it is not over.
    async fn stands(&self, lock: Option<Lock>) -> Result<Option<Lock>, StoreError> {
        match lock {
            Some(lock) if lock.until > store_time(self).await? => Ok(Some(lock)),
            _ => Ok(None),
        }
    }

    /// The lock of an object that is there, if it is locked now.
    pub(super) async fn lock_of(&self, key: &str) -> Result<Option<Lock>, StoreError> {
        match self.version_of(key).await {
            Ok(None) | Err(StoreError::NotFound(_)) => Ok(None),
            Ok(Some((_, about))) => self.stands(about.lock).await,
            Err(e) => Err(e),
        }
    }

    /// Locks an object until then at least.
    pub(super) async fn lock(&self, key: &str, lock: Lock) -> Result<(), StoreError> {
        self.check_present(key)?;
        let path = self.path(key)?;
        let signed = self.versions.signed().map_err(|error| told(key, "lock", error))?;
        let mut lock = lock;
        loop {
            let error = match self.attempts.ask(0, || signed.lock(&path, lock)).await {
                Ok(()) => return Ok(()),
                Err(refusal) => refusal.error,
            };
            let now = if is_refusal(&error) { self.lock_of(key).await? } else { None };
            let Some(now) = now else { return Err(told(key, "lock", error)) };
            let is_firmer = (now.mode, lock.mode) == (LockMode::Compliance, LockMode::Governance);
            // None is shortened or made less firm: it may be locked for longer, or has to be as firm as it is.
            if now.until >= lock.until && (is_firmer || now.mode == lock.mode) {
                return Ok(());
            }
            if !is_firmer {
                return Err(told(key, "lock", error));
            }
            lock.mode = now.mode;
        }
    }

    /// What is told where the store does not remove a version.
    async fn kept(&self, key: &str, error: Error) -> Result<StoreError, StoreError> {
        Ok(match self.lock_of(key).await? {
            Some(lock) => StoreError::Locked { key: key.into(), until: shown(lock) },
            None => told(key, "delete", error),
        })
    }
}

/// Whether a store does not want to. Some say so as if something was wrong with the request.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::PermissionDenied { .. })
        || matches!(error, Error::Generic { .. }) && status(error).is_some_and(|status| status.starts_with('4'))
}

fn shown(lock: Lock) -> String {
    match jiff::Timestamp::from_second(lock.until) {
        Ok(until) => until.to_string(),
        Err(_) => "its legal hold is released".to_owned(),
    }
}
