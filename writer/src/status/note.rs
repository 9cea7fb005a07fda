//! Small JSON files in the state folder, replaced whole: whoever reads finds the old or the new. They are hints, so one that is
//! lost, cut off or something else is none.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest file that is read.
const MAX_FILE: u64 = 64 << 10;
/// Most files of a folder: there is one a VM, and a name that somebody made up makes one too.
const MAX_FILES: usize = 10_000;

/// What stands in a file, if it is there and makes sense.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_FILE + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= MAX_FILE).then(|| serde_json::from_slice(&text).ok())?
}

/// All that stand in files of a folder.
pub(super) fn read_all<T: DeserializeOwned>(folder: &Path) -> Vec<T> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .take(MAX_FILES)
        .filter_map(|p| read(&p))
        .collect()
}

/// Changes what stands in a file of the folder, one process after the other.
pub(super) fn change<T: Serialize + DeserializeOwned>(
    folder: &Path,
    name: &str,
    change: impl FnOnce(Option<T>) -> T,
) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let private = |path: &Path| File::options().create(true).truncate(false).write(true).mode(0o600).open(path);
    let lock = private(&folder.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let path = folder.join(name);
    if !path.exists() && std::fs::read_dir(folder)?.count() > MAX_FILES {
        return Err(io::Error::other(format!("{} has {MAX_FILES} files already", folder.display())));
    }
    let text = serde_json::to_vec_pretty(&change(read(&path)))?;
    let new = folder.join("new");
    let mut file = private(&new)?;
    file.set_len(0)?;
    file.write_all(&text)?;
    std::fs::rename(&new, &path)
}
