//! Where sockets of running programs are.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A folder in memory that is gone after a boot, with a short path, because that of a socket has at most 107 bytes.
pub fn runtime_folder() -> PathBuf {
    let user = rustix::process::geteuid();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    match runtime {
        _ if user.is_root() => PathBuf::from("/run/reseal"),
        Some(runtime) => runtime.join("reseal"),
        None => std::env::temp_dir().join(format!("reseal-{}", user.as_raw())),
    }
}

/// Makes a folder unless it is there, ours, and closed to others who would write.
pub fn private_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other,
    }
    let data = path.symlink_metadata()?;
    let safe = data.is_dir() && data.uid() == rustix::process::geteuid().as_raw() && data.mode() & 0o022 == 0;
    if safe { Ok(()) } else { Err(io::Error::other("it is not a folder that only this user can write to")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let base = std::env::temp_dir().join(format!("reseal-runtime-{}", std::process::id()));
        private_folder(&base).unwrap();
        private_folder(&base).unwrap();
        assert_eq!(base.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o770)).unwrap();
        assert!(private_folder(&base).is_err());
        std::fs::remove_dir(&base).unwrap();
    }
}
