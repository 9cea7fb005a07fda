//! A bucket as it was at a moment: of each object the version that was the newest then. Nothing is changed there.
//!
//! After somebody with the bucket's keys has hidden objects, or put others in their place, all that was not removed is read so. Of what
//! the store lists of versions nothing has to be believed: what is read is authenticated as ever.

use std::collections::HashMap;

use object_store::path::Path;
use parking_lot::Mutex;

use super::Shared;
use super::attempts::told;
use super::signed::{Listed, Version};
use crate::{Entry, StoreError};

/// Versions and folders in one listing that are kept in mind: more than a folder of a vault has. A key has at most 1,024 bytes.
const MAX_LISTED: usize = 1 << 20;

/// A moment, and which versions are known to be those of then.
pub(super) struct Past {
    /// Seconds since 1970, by the store's clock.
    at: i64,
    /// By path; `None` where there was no object.
    known: Mutex<HashMap<String, Option<Version>>>,
}

impl Past {
    pub(super) fn new(at: i64) -> Past {
        Past { at, known: Mutex::default() }
    }
}

/// Of versions of one path, in the order in which the store lists them (the newest first), the one of that moment.
fn of_then(versions: Vec<Version>, at: i64) -> Option<Version> {
    versions.into_iter().find(|version| version.modified <= at).filter(|version| !version.is_marker)
}

impl Shared {
    /// The version of an object that counts; `None` where the newest does.
    pub(super) async fn version_then(&self, key: &str) -> Result<Option<String>, StoreError> {
        let Some(past) = &self.past else { return Ok(None) };
        let path = self.path(key)?.to_string();
        let known = past.known.lock().get(&path).cloned();
        let found = match known {
            Some(found) => found,
            None => {
                self.list_then(past, key, &path, None).await?;
                past.known.lock().entry(path).or_default().clone()
            }
        };
        found.map(|version| Some(version.id)).ok_or_else(|| StoreError::NotFound(key.into()))
    }

    /// Lists what was below a path then, and remembers which versions that were; the names of folders.
    async fn list_then(
        &self,
        past: &Past,
        key: &str,
        prefix: &str,
        delimiter: Option<&str>,
    ) -> Result<(Vec<(String, Version)>, Vec<String>), StoreError> {
        let signed = self.versions.signed().map_err(|error| told(key, "list", error))?;
        let (mut versions, mut folders): (HashMap<String, Vec<Version>>, Vec<String>) = Default::default();
        let mut from = None;
        let mut count = 0;
        while count <= MAX_LISTED {
            let asked = self.attempts.ask(0, || signed.versions(prefix, delimiter, from.as_ref())).await;
            let Listed { versions: listed, folders: more, next } =
                asked.map_err(|refusal| told(key, "list", refusal.error))?;
            // A page without anything is none: nobody could tell when it ends.
            count += (listed.len() + more.len()).max(1);
            for (path, version) in listed {
                versions.entry(path).or_default().push(version);
            }
            folders.extend(more);
            match next {
                Some(next) => from = Some(next),
                None => {
                    let mut known = past.known.lock();
                    let mut there = Vec::new();
                    for (path, versions) in versions {
                        let found = of_then(versions, past.at);
                        there.extend(found.clone().map(|version| (path.clone(), version)));
                        known.insert(path, found);
                    }
                    return Ok((there, folders));
                }
            }
        }
        let source = std::io::Error::other(format!(
            "its list of versions has more than {MAX_LISTED} lines, which no vault makes"
        ));
        Err(StoreError::Io { key: key.into(), action: "list", source })
    }

    /// What was directly below a folder then. Folders in which there was nothing are among it.
    pub(super) async fn folder_then(&self, past: &Past, folder: &str, path: &Path) -> Result<Vec<Entry>, StoreError> {
        let prefix = if path.as_ref().is_empty() { String::new() } else { format!("{path}/") };
        let (objects, folders) = self.list_then(past, folder, &prefix, Some("/")).await?;
        let name = |path: &str| path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        let folders = folders.iter().map(|path| Entry { name: name(path), length: 0, is_folder: true });
        let objects = objects.iter().filter(|(path, _)| !path.ends_with('/'));
        let objects =
            objects.map(|(path, version)| Entry { name: name(path), length: version.length, is_folder: false });
        Ok(folders.chain(objects).collect())
    }

    /// Refuses to change what is past.
    pub(super) fn check_present(&self, key: &str) -> Result<(), StoreError> {
        match self.past {
            None => Ok(()),
            Some(_) => Err(StoreError::Past(key.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_versions_the_newest_of_then_counts() {
        let version = |id: &str, modified, is_marker| Version { id: id.into(), modified, length: 1, is_marker };
        let versions =
            vec![version("d", 9, false), version("c", 7, true), version("b", 4, false), version("a", 4, false)];
        let at = |at| of_then(versions.clone(), at).map(|version| version.id);
        assert_eq!([at(10), at(9), at(8), at(7)], [Some("d".into()), Some("d".into()), None, None]);
        assert_eq!([at(6), at(4), at(3)], [Some("b".into()), Some("b".into()), None]);
    }
}
