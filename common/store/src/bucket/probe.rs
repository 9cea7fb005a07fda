//! Whether a store honours conditions. Some that call themselves like S3 ignore them, or check them before they wait for one another:
//! there, two who make the same restore point would both be told that they had made it.

use futures_util::future::join_all;
use object_store::{Error, ObjectStoreExt, PutMode, PutPayload, UpdateVersion};

use super::Shared;
use super::attempts::told;
use crate::{StoreError, random_name};

/// How many make, or replace, one object at a time.
const CROWD: u8 = 12;
/// How often: whether two come together is chance.
const ROUNDS: usize = 3;

/// Makes and replaces objects under `tmp/`; an error where more than one of several who do is told that he has.
pub(super) async fn conditions(shared: &Shared) -> Result<(), StoreError> {
    for _ in 0..ROUNDS {
        let name = random_name().map_err(|source| StoreError::Io { key: "tmp".into(), action: "probe", source })?;
        let key = format!("tmp/probe-{name}");
        let honoured = round(shared, &key).await;
        let path = shared.path(&key)?;
        // Should it stay, it is a small object that nobody looks at.
        let _ = shared.store.delete(&path).await;
        if !honoured? {
            return Err(StoreError::Unconditional);
        }
    }
    Ok(())
}

async fn round(shared: &Shared, key: &str) -> Result<bool, StoreError> {
    let path = shared.path(key)?;
    // Not asked again: whoever is, and finds the object made, could have made it.
    let put = |nth: u8, mode: PutMode| {
        let (path, payload) = (&path, PutPayload::from(vec![nth; 64]));
        async move { shared.store.put_opts(path, payload, mode.into()).await }
    };
    let made = join_all((0..CROWD).map(|nth| put(nth, PutMode::Create))).await;
    let mut version = None;
    for (nth, result) in made.into_iter().enumerate() {
        match result {
            Ok(_) if version.is_some() => return Ok(false),
            Ok(result) => version = Some((nth, UpdateVersion { e_tag: result.e_tag, version: result.version })),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {}
            Err(e @ (Error::NotImplemented { .. } | Error::NotSupported { .. })) => return Err(told(key, "make", e)),
            // It may have been made or not.
            Err(Error::Generic { .. }) => {}
            Err(e) => return Err(super::told_of_write(key, "make", e)),
        }
    }
    let Some((nth, version)) = version else {
        // None was told so; what is there tells more.
        shared.about(key).await?;
        return Ok(true);
    };
    let there = shared.read(key, None, 64).await?.concat();
    if there.iter().any(|byte| usize::from(*byte) != nth) {
        return Ok(false);
    }
    let replaced = join_all((0..CROWD).map(|nth| put(nth | 0x80, PutMode::Update(version.clone())))).await;
    Ok(replaced.iter().filter(|result| result.is_ok()).count() <= 1)
}
