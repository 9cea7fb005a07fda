//! Whether a store honours conditions, and locks. Some that call themselves like S3 ignore them, or check them before they wait for one another:
//! there, two who make the same restore point would both be told that they had made it.

use std::time::Duration;

use futures_util::future::join_all;
use object_store::{Error, ObjectStoreExt, PutMode, PutPayload, UpdateVersion};
use tokio::time::{sleep, timeout};

use super::Shared;
use super::attempts::{Refusal, silent, told};
use super::lease::store_time;
use super::signed::Signed;
use super::versions::is_refusal;
use crate::{Lock, LockMode, StoreError, random_name};

/// How many make, or replace, one object at a time.
const CROWD: u8 = 8;
/// How often: whether two come together is chance.
const ROUNDS: usize = 3;
/// How often all that is done where it has shown nothing.
const TIMES: usize = 3;
/// What is waited between making and replacing then.
const PAUSE: Duration = Duration::from_millis(1500);
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a round has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// Of those who made it, and of those who replaced it, one was told so, and another one that he had not.
    Honoured,
    /// More than one was.
    Ignored,
    /// Nobody was, or nobody was refused: something else came between.
    Unclear,
}

/// Makes and replaces objects under `tmp/`; an error where not exactly one of several who do is told that he has.
pub(super) async fn conditions(shared: &Shared) -> Result<(), StoreError> {
    for time in 0..TIMES {
        // Some take no more than one write a second of an object.
        let pause = if time == 0 { Duration::ZERO } else { PAUSE };
        // Beside each other, for some engines have those who wait for one another look only once a second.
        let rounds = join_all((0..ROUNDS).map(|_| async {
            let key = new_key("probe")?;
            let shown = round(shared, &key, pause).await;
            let path = shared.path(&key)?;
            // Should it stay, it is a small object that nobody looks at.
            let _ = shared.store.delete(&path).await;
            shown
        }));
        let rounds = rounds.await.into_iter().collect::<Result<Vec<_>, _>>()?;
        if rounds.contains(&Round::Ignored) {
            return Err(StoreError::Unconditional);
        }
        if rounds.contains(&Round::Honoured) {
            return Ok(());
        }
    }
    let what = "of several conditional writes at a time none was told that it had succeeded; try again when the store is less busy, or use an engine that \
                honours conditions";
    Err(StoreError::Io { key: "tmp".into(), action: "probe", source: std::io::Error::other(what) })
}

/// Whether a store that refused a version that is there refuses, of tags without quotes, another one's: whoever ignores these would replace anything.
pub(super) async fn are_bare_tags_compared(shared: &Shared) -> Result<bool, StoreError> {
    let key = new_key("tag")?;
    let path = shared.path(&key)?;
    shared.make(&key, PutPayload::from_static(b"there"), None).await?;
    let other = UpdateVersion { e_tag: Some("0".repeat(32)), version: None };
    let put = shared.put(&key, &path, &PutPayload::from_static(b"replaced"), PutMode::Update(other), None).await;
    // Should it stay, it is a small object that nobody looks at.
    let _ = shared.store.delete(&path).await;
    match put {
        Ok(_) => Ok(false),
        Err(Refusal { error: Error::Precondition { .. }, .. }) => Ok(true),
        Err(refusal) => Err(told(&key, "replace", refusal.error)),
    }
}

/// The key of an object that shows something.
fn new_key(what: &str) -> Result<String, StoreError> {
    let name = random_name().map_err(|source| StoreError::Io { key: "tmp".into(), action: "probe", source })?;
    Ok(format!("tmp/{what}-{name}"))
}

/// How long an object is locked that shows whether it can be removed, in seconds.
const LOCKED: i64 = 60;

/// Locks an object under `tmp/`; an error where it can be removed all the same.
pub(super) async fn locks(shared: &Shared, mode: LockMode) -> Result<(), StoreError> {
    let key = new_key("lock")?;
    let path = shared.path(&key)?;
    let signed = shared.versions.signed().map_err(|error| told(&key, "lock", error))?;
    let lock = Lock { until: store_time(shared).await? + LOCKED, mode };
    let made = match shared.make(&key, PutPayload::from_static(b"locked"), Some(lock)).await {
        // What a store says that knows no locks, or has none in this bucket.
        Err(StoreError::Io { source, .. }) if ["400", "404", "501"].iter().any(|code| says(&source, code)) => {
            return Err(StoreError::NoLocks);
        }
        made => made?,
    };
    let Some(version) = made.version else { return Err(StoreError::NoLocks) };
    let outcome = keeps(shared, signed, &key, &version, lock).await;
    // It is a small object that nobody looks at.
    let _ = shared.store.delete(&path).await;
    match outcome {
        Ok(true) => Ok(()),
        Ok(false) => Err(StoreError::NoLocks),
        Err(e) => Err(e),
    }
}

/// Whether an object is locked as was asked for, and longer when that is asked for, and not removed.
async fn keeps(shared: &Shared, signed: &Signed, key: &str, version: &str, lock: Lock) -> Result<bool, StoreError> {
    let longer = Lock { until: lock.until + 1, ..lock };
    shared.lock(key, longer).await?;
    if shared.lock_of(key).await? != Some(longer) {
        return Ok(false);
    }
    match signed.delete_version(&shared.path(key)?, version).await {
        Ok(()) => Ok(false),
        Err(e) if is_refusal(&e) => Ok(shared.lock_of(key).await?.is_some()),
        Err(e) => Err(told(key, "remove", e)),
    }
}

fn says(error: &std::io::Error, code: &str) -> bool {
    error.to_string().contains(&format!("status code: {code}"))
}

async fn round(shared: &Shared, key: &str, pause: Duration) -> Result<Round, StoreError> {
    let path = shared.path(key)?;
    // Not asked again: whoever is, and finds the object made, could have made it.
    let put = |nth: u8, mode: PutMode| {
        let (path, payload) = (&path, PutPayload::from(vec![nth; 64]));
        async move {
            let put = timeout(PATIENCE, shared.store.put_opts(path, payload, mode.into()));
            put.await.unwrap_or_else(|_| Err(silent(PATIENCE)))
        }
    };
    let made = join_all((0..CROWD).map(|nth| put(nth, PutMode::Create))).await;
    let (mut version, mut is_refused) = (None, false);
    for (nth, result) in made.into_iter().enumerate() {
        match result {
            Ok(_) if version.is_some() => return Ok(Round::Ignored),
            Ok(result) => version = Some((nth, UpdateVersion { e_tag: result.e_tag, version: result.version })),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => is_refused = true,
            // It may have been made or not.
            Err(Error::Generic { .. }) => {}
            Err(e @ (Error::NotImplemented { .. } | Error::NotSupported { .. })) => return Err(told(key, "make", e)),
            Err(e) => return Err(super::told_of_write(key, "make", e)),
        }
    }
    let Some((nth, version)) = version else {
        // A store that is away is to be told so.
        return match shared.about(key).await {
            Ok(_) | Err(StoreError::NotFound(_)) => Ok(Round::Unclear),
            Err(e) => Err(e),
        };
    };
    let there = shared.read(key, None, 64).await?.concat();
    if there.iter().any(|byte| usize::from(*byte) != nth) {
        return Ok(Round::Ignored);
    }
    sleep(pause).await;
    // How many have replaced it, and whether one was refused.
    let replace = async |version: UpdateVersion, is_bare: bool| {
        let mut replaced = join_all((0..CROWD).map(|nth| put(nth | 0x80, PutMode::Update(version.clone())))).await;
        // Ceph's gateway tells those who came too late by a moment of an error of its own, and of the condition only when they come again.
        if is_bare && replaced.iter().any(Result::is_ok) {
            sleep(pause).await;
            replaced.push(put(CROWD | 0x80, PutMode::Update(version)).await);
        }
        let (mut count, mut is_refused) = (0, false);
        for result in replaced {
            match result {
                Ok(_) => count += 1,
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => is_refused = true,
                Err(e @ (Error::NotImplemented { .. } | Error::NotSupported { .. })) => {
                    return Err(told(key, "replace", e));
                }
                Err(_) => {}
            }
        }
        Ok((count, is_refused))
    };
    let bare = shared.tags.without_quotes(&version);
    let mut replaced = replace(shared.tags.told(&version), bare.is_none()).await?;
    if let (0, true) = replaced
        && let Some(bare) = bare
    {
        sleep(pause).await;
        replaced = replace(bare, true).await?;
        if let (1, true) = replaced {
            shared.tags.leave_quotes_out();
        }
    }
    let (count, is_refused_then) = replaced;
    Ok(match count {
        1 if is_refused && is_refused_then => Round::Honoured,
        // Where nobody was refused for the condition, it was something else that kept the others back.
        0 | 1 => Round::Unclear,
        _ => Round::Ignored,
    })
}
