//! The socket on which QEMU serves the disks: where both QEMU and this process may use it, and nobody else.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use reseal_format::ids::PointId;

use super::LibvirtError;
use super::domain::Domain;

/// Where the system's libvirt has a folder for each running domain.
const SYSTEM: &str = "/var/lib/libvirt/qemu";
/// The same of a user's own libvirt, below the folder for configurations.
const SESSION: &str = "libvirt/qemu/lib";
/// Longest path of a socket: `sun_path` of unix(7), without the zero at its end.
const MAX_PATH: usize = 107;
/// What an own socket's name starts and ends with.
const NAME: (&str, &str) = ("reseal-", ".sock");

/// Where a domain's socket can be.
#[derive(Debug)]
pub(super) struct Place {
    /// The folder that libvirt made for the domain's monitor: its QEMU may make sockets there, whatever confines it, and it
    /// goes when the domain stops.
    folder: Option<PathBuf>,
    /// User and group of its QEMU, if known.
    owner: Option<(u32, u32)>,
}

impl Place {
    /// Looks for it. An error if this process could not open what QEMU makes.
    pub(super) fn find(root: Option<&Path>, domain: &Domain, id: u32) -> Result<Place, LibvirtError> {
        let own = rustix::process::geteuid();
        let usual = || if own.is_root() { Some(PathBuf::from(SYSTEM)) } else { session() };
        let folder = root.map(Path::to_owned).or_else(usual).and_then(|root| of_domain(&root, id));
        let data = folder.as_ref().and_then(|folder| fs::metadata(folder).ok());
        let owner = data.map(|data| (data.uid(), data.gid())).or(domain.owner);
        match owner {
            Some((qemu, _)) if !own.is_root() && qemu != own.as_raw() => {
                Err(LibvirtError::User { domain: domain.name.clone(), qemu, own: own.as_raw() })
            }
            _ => Ok(Place { folder, owner }),
        }
    }

    /// User and group of QEMU, if known.
    pub(super) fn owner(&self) -> Option<(u32, u32)> {
        self.owner
    }

    /// The path of a backup's socket. Where libvirt has no folder that serves, one is made in the scratch folder.
    pub(super) fn path(&self, point: PointId, scratch: &Path) -> Result<PathBuf, LibvirtError> {
        let id: String = point.to_string().chars().take(16).collect();
        let name = format!("{}{id}{}", NAME.0, NAME.1);
        let fits = |path: &PathBuf| path.as_os_str().len() <= MAX_PATH && path.to_str().is_some();
        if let Some(path) = self.folder.as_ref().map(|folder| folder.join(&name)).filter(fits) {
            return Ok(path);
        }
        // The folder's name has domain and point already, and paths of sockets are short.
        let path = in_scratch(scratch);
        if !fits(&path) {
            let why = "it is too long, or not UTF-8; name another folder with --scratch";
            return Err(LibvirtError::Path { path, what: "a socket", why });
        }
        let folder = scratch.join("nbd");
        let made = DirBuilder::new().mode(0o700).create(&folder).and_then(|()| match self.owner {
            Some((user, group)) if rustix::process::geteuid().is_root() => {
                std::os::unix::fs::chown(&folder, Some(user), Some(group))
            }
            _ => Ok(()),
        });
        made.map_err(|source| LibvirtError::File { action: "make", path: folder, source })?;
        Ok(path)
    }
}

/// The socket in a backup's scratch folder.
fn in_scratch(scratch: &Path) -> PathBuf {
    scratch.join("nbd").join(format!("{}{}", NAME.0, NAME.1))
}

/// Where a user's own libvirt has a folder for each running domain.
fn session() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(folder.join(SESSION))
}

/// The folder of a running domain; `None` unless there is exactly one.
fn of_domain(root: &Path, id: u32) -> Option<PathBuf> {
    let start = format!("domain-{id}-");
    let entries = fs::read_dir(root).ok()?.filter_map(Result::ok);
    let mut found = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(&start)));
    let folder = found.next().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))?;
    found.next().is_none().then(|| folder.path())
}

/// Removes a socket. QEMU does so itself, unless it was killed.
pub(super) fn remove(path: &Path) -> Result<(), LibvirtError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(LibvirtError::File { action: "remove", path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

/// Removes what a killed backup left, if it is a socket with the name of one.
pub(super) fn remove_left(path: &Path) -> Result<(), LibvirtError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let own = name.is_some_and(|name| name.starts_with(NAME.0) && name.ends_with(NAME.1));
    match fs::symlink_metadata(path) {
        Ok(data) if own && data.file_type().is_socket() => remove(path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_domain_is_found_by_its_id() {
        let root = tempfile::tempdir().unwrap();
        for name in ["domain-1-a", "domain-11-b", "domain-2-c"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        assert_eq!(of_domain(root.path(), 1), Some(root.path().join("domain-1-a")));
        assert_eq!(of_domain(root.path(), 3), None);
        fs::create_dir(root.path().join("domain-2-d")).unwrap();
        assert_eq!(of_domain(root.path(), 2), None, "which one is not known");
    }

    #[test]
    fn without_such_a_folder_one_is_made() {
        let (root, point) = (tempfile::tempdir().unwrap(), PointId::from_bytes([7; 16]));
        let owner = Some((rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
        let long = root.path().join("x".repeat(100));
        for folder in [None, Some(long.clone())] {
            let scratch = tempfile::tempdir().unwrap();
            let path = Place { folder, owner }.path(point, scratch.path()).unwrap();
            assert!(path.starts_with(scratch.path()) && !path.exists());
            let mode = fs::metadata(path.parent().unwrap()).unwrap().mode();
            assert_eq!(mode & 0o777, 0o700);
        }
        let refused = Place { folder: None, owner }.path(point, &long);
        assert!(matches!(refused, Err(LibvirtError::Path { .. })));
    }

    #[test]
    fn the_usual_scratch_folder_has_room_for_the_path_of_a_socket() {
        let folder = format!("/var/tmp/reseal-{}-{}", "0".repeat(36), PointId::from_bytes([7; 16]));
        assert!(in_scratch(Path::new(&folder)).as_os_str().len() <= MAX_PATH);
    }

    #[test]
    fn only_own_sockets_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = root.path().join(name);
            std::os::unix::net::UnixListener::bind(&path).unwrap();
            path
        };
        let (own, other, file) = (make("reseal-1.sock"), make("monitor.sock"), root.path().join("reseal-2.sock"));
        fs::write(&file, b"").unwrap();
        for path in [&own, &other, &file] {
            remove_left(path).unwrap();
        }
        assert!(!own.exists() && other.exists() && file.exists());
        remove(&own).unwrap();
    }
}
