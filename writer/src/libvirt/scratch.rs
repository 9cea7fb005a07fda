//! The scratch folder of one backup: where QEMU keeps what the guest overwrites while the disks are read.
//!
//! It is guest plaintext, so each file is LUKS under a secret that exists only until the backup ends. The folder's name
//! says whose it is: `reseal-DOMAIN-POINT`. A file in it is locked while the backup lives, so that what a killed one left
//! is told from what another one uses.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use reseal_format::ids::PointId;
use rustix::fs::{FallocateFlags, fallocate};

use super::LibvirtError;
use super::command::QEMU_IMG;
use super::domain::is_uuid;
use super::secret::Secret;

/// Where scratch folders are made: large files that may outlive a boot belong there.
pub(super) const DEFAULT: &str = "/var/tmp";
/// What the names of own folders start with.
const PREFIX: &str = "reseal-";
/// What a folder's name ends with until it is locked.
const NEW: &str = ".new";
/// The file that is locked.
const LOCK: &str = "lock";
/// Least bytes reserved for a disk, unless the disk is smaller: a busy guest overwrites this much within a backup.
const RESERVE: u64 = 1 << 30;
/// Part of a disk that is reserved if that is more.
const RESERVE_PART: u64 = 10;
/// Bytes of a scratch file besides the clusters: LUKS header, and tables of at most a 64th.
const OVERHEAD: (u64, u64) = (4 << 20, 64);
/// Bytes that must be free beyond what is reserved: what a guest can write until the watch has ended the backup.
pub(super) const MARGIN: u64 = 128 << 20;
/// How often LUKS is tried: its key derivation measures processor time, and fails where it measures none.
const TRIES: usize = 10;
/// How long making a file may take: seconds of processor time, of which a busy machine has little.
const MAKING: Duration = Duration::from_secs(180);
/// How long a folder may be without a lock before it counts as left behind.
const UNLOCKED: Duration = Duration::from_secs(60);

/// The scratch folder.
pub(super) struct Scratch {
    folder: PathBuf,
    files: Vec<ScratchFile>,
    _lock: File,
}

/// A scratch file.
#[derive(Clone)]
pub(super) struct ScratchFile {
    pub path: String,
    /// Bytes that the file can have at most.
    pub most: u64,
    /// Bytes that the file system has set aside for it.
    pub reserved: u64,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LibvirtError {
    let path = path.to_owned();
    move |source| LibvirtError::File { action, path, source }
}

/// Bytes that are free for this process below a folder.
pub(super) fn free(folder: &Path) -> Result<u64, LibvirtError> {
    let stat = rustix::fs::statvfs(folder).map_err(|e| failed("look at", folder)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

impl Scratch {
    /// Makes it. Nobody but its owner may list it; QEMU may enter it.
    pub(super) fn create(base: &Path, domain: &str, point: PointId) -> Result<Scratch, LibvirtError> {
        let base = base.canonicalize().map_err(failed("find the scratch folder", base))?;
        let folder = base.join(format!("{PREFIX}{domain}-{point}"));
        let new = base.join(format!("{PREFIX}{domain}-{point}{NEW}"));
        text(&folder)?;
        std::fs::DirBuilder::new().mode(0o700).create(&new).map_err(failed("make", &new))?;
        let made = (|| {
            let path = new.join(LOCK);
            let lock = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let lock = lock.map_err(failed("make", &path))?;
            lock.try_lock().map_err(|e| failed("lock", &path)(e.into()))?;
            let permissions = std::fs::Permissions::from_mode(0o711);
            std::fs::set_permissions(&new, permissions).map_err(failed("open to QEMU", &new))?;
            std::fs::rename(&new, &folder).map_err(failed("rename", &new))?;
            Ok(lock)
        })();
        if made.is_err() {
            let _ = std::fs::remove_dir_all(&new);
        }
        Ok(Scratch { folder, files: Vec::new(), _lock: made? })
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its files, one a disk, in the order of their making.
    pub(super) fn files(&self) -> &[ScratchFile] {
        &self.files
    }

    /// A path within it, for QEMU and libvirt.
    pub(super) fn path(&self, name: &str) -> Result<String, LibvirtError> {
        text(&self.folder.join(name)).map(str::to_owned)
    }

    /// Makes a file for each disk of these lengths, which belong to QEMU. LUKS takes seconds of processor time for each, to
    /// measure how fast it is, so they are made at the same time.
    pub(super) fn add(
        &mut self,
        lengths: &[u64],
        secret: &Secret,
        owner: Option<(u32, u32)>,
    ) -> Result<(), LibvirtError> {
        let mut disks = Vec::with_capacity(lengths.len());
        for (nth, length) in lengths.iter().enumerate() {
            disks.push((self.path(&format!("disk-{nth}.qcow2"))?, *length));
        }
        let at_once = thread::available_parallelism().map_or(1, usize::from);
        for some in disks.chunks(at_once) {
            thread::scope(|scope| {
                let make = |(path, length)| move || make_file(path, length, secret, owner);
                let threads: Vec<_> = some.iter().map(|(path, length)| scope.spawn(make((path, *length)))).collect();
                threads.into_iter().try_for_each(|made| made.join().unwrap_or(Err(LibvirtError::Thread)))
            })?;
        }
        let most = |length: u64| length.saturating_add(OVERHEAD.0).saturating_add(length / OVERHEAD.1);
        let file = |(path, length)| ScratchFile { path, most: most(length), reserved: 0 };
        self.files = disks.into_iter().map(file).collect();
        Ok(())
    }

    /// Reserves room in the file system, as far as it has it. An error if the guest would soon meet its end.
    pub(super) fn reserve(&mut self) -> Result<(), LibvirtError> {
        let mut open = self.files.len() as u64;
        for file in &mut self.files {
            let share = free(&self.folder)?.saturating_sub(2 * MARGIN) / open.max(1);
            let wanted = file.most.min(RESERVE.max(file.most / RESERVE_PART)).min(share);
            let path = Path::new(&file.path);
            let opened = OpenOptions::new().write(true).open(path).map_err(failed("open", path))?;
            // Where the file system can't, the watch has to do.
            if fallocate(&opened, FallocateFlags::KEEP_SIZE, 0, wanted).is_ok() {
                file.reserved = wanted;
            }
            open -= 1;
        }
        let free = free(&self.folder)?;
        let reserved = self.files.iter().all(|file| file.reserved >= file.most);
        let needed = self.files.iter().map(|file| file.most).fold(0, u64::saturating_add).min(2 * MARGIN);
        match reserved || free >= needed {
            true => Ok(()),
            false => Err(LibvirtError::NoRoom { folder: self.folder.clone(), free, needed }),
        }
    }

    /// Removes it.
    pub(super) fn remove(&self) -> Result<(), LibvirtError> {
        remove(&self.folder)
    }
}

fn make_file(path: &str, length: u64, secret: &Secret, owner: Option<(u32, u32)>) -> Result<(), LibvirtError> {
    // The secret has as much entropy as the key, so that slowing a guesser down gains nothing.
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,encrypt.hash-alg=sha512";
    let (object, bytes) = ("secret,id=s0,file=/dev/stdin", length.to_string());
    let words = ["create", "-q", "-f", "qcow2", "--object", object, "-o", options, path, &bytes];
    let mut tries = TRIES;
    while let Err(e) = QEMU_IMG.run(&words, Some(secret.passphrase().as_bytes()), MAKING) {
        tries -= 1;
        if tries == 0 || !e.said().is_some_and(|said| said.contains("CPU usage")) {
            return Err(e);
        }
    }
    let permissions = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, permissions).map_err(failed("close to others", Path::new(path)))?;
    if let Some((user, group)) = owner.filter(|_| rustix::process::geteuid().is_root()) {
        std::os::unix::fs::chown(path, Some(user), Some(group)).map_err(failed("give QEMU", Path::new(path)))?;
    }
    Ok(())
}

/// A path as text, which libvirt's XML needs.
fn text(path: &Path) -> Result<&str, LibvirtError> {
    let refused = |why| LibvirtError::Path { path: path.to_owned(), what: "scratch", why };
    let text = path.to_str().ok_or_else(|| refused("it is not UTF-8"))?;
    match text.chars().any(char::is_control) {
        true => Err(refused("it contains a control character")),
        false => Ok(text),
    }
}

/// Removes a scratch folder, if it is there.
pub(super) fn remove(folder: &Path) -> Result<(), LibvirtError> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", folder)(e)),
        _ => Ok(()),
    }
}

/// Whether a path is that of a scratch folder of this domain.
pub(super) fn is_own(folder: &Path, domain: &str) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str());
    let rest = name.and_then(|name| name.strip_prefix(PREFIX)).filter(|_| folder.is_absolute() && is_uuid(domain));
    let point = rest.and_then(|rest| rest.strip_prefix(domain)).and_then(|rest| rest.strip_prefix('-'));
    point.is_some_and(|point| PointId::from_hex(point.strip_suffix(NEW).unwrap_or(point)).is_some())
}

/// Scratch folders of a domain.
pub(super) fn find(base: &Path, domain: &str) -> Result<Vec<PathBuf>, LibvirtError> {
    let base = base.canonicalize().map_err(failed("find the scratch folder", base))?;
    let entries = std::fs::read_dir(&base).map_err(failed("list", &base))?;
    Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).filter(|path| is_own(path, domain)).collect())
}

/// What became of a scratch folder that was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A running process uses it.
    InUse,
    /// It is left behind, or was removed meanwhile.
    Left,
    /// It is not this user's, who did not make it.
    Foreign,
}

/// Whether a scratch folder is in use.
pub(super) fn look(folder: &Path) -> Found {
    let Ok(data) = std::fs::symlink_metadata(folder) else { return Found::Left };
    if !data.is_dir() || data.uid() != rustix::process::geteuid().as_raw() {
        return Found::Foreign;
    }
    let fresh = || {
        let age = data.modified().ok().and_then(|then| SystemTime::now().duration_since(then).ok());
        age.is_none_or(|age| age < UNLOCKED)
    };
    match File::open(folder.join(LOCK)) {
        Ok(lock) => match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Found::InUse,
            _ => Found::Left,
        },
        Err(_) if fresh() => Found::InUse,
        Err(_) => Found::Left,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "2b9fa4c4-5a09-4f0c-9bd5-6b6ac2d3c4a1";
    const POINT: PointId = PointId::from_bytes([7; 16]);

    #[test]
    fn a_folder_is_in_use_until_its_process_lets_go() {
        let base = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(base.path(), DOMAIN, POINT).unwrap();
        assert!(Scratch::create(base.path(), DOMAIN, POINT).is_err());
        let found = find(base.path(), DOMAIN).unwrap();
        assert_eq!(found, [scratch.folder().to_owned()]);
        assert_eq!(look(&found[0]), Found::InUse);
        let mode = std::fs::metadata(&found[0]).unwrap().mode();
        assert_eq!(mode & 0o777, 0o711);
        drop(scratch);
        assert_eq!(look(&found[0]), Found::Left);
        remove(&found[0]).unwrap();
        assert_eq!(find(base.path(), DOMAIN).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(look(&found[0]), Found::Left, "gone meanwhile");
        remove(&found[0]).unwrap();
    }

    #[test]
    fn only_own_folders_are_own() {
        let own = format!("/s/reseal-{DOMAIN}-{POINT}");
        assert!(is_own(Path::new(&own), DOMAIN) && is_own(Path::new(&format!("{own}.new")), DOMAIN));
        let other = DOMAIN.replace('2', "3");
        for (path, domain) in [(&own[1..], DOMAIN), (&own, &other), (&own[..own.len() - 1], DOMAIN), (&own, "")] {
            assert!(!is_own(Path::new(path), domain), "{path} {domain}");
        }
        let base = tempfile::tempdir().unwrap();
        let link = base.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert_eq!(look(&link), Found::Foreign);
        let new = base.path().join("new");
        std::fs::create_dir(&new).unwrap();
        assert_eq!(look(&new), Found::InUse, "it may be about to be locked");
    }

    #[test]
    fn files_are_encrypted_and_reserved() {
        let base = tempfile::tempdir().unwrap();
        let mut scratch = Scratch::create(base.path(), DOMAIN, POINT).unwrap();
        let secret = Secret::new(DOMAIN.into()).unwrap();
        scratch.add(&[16 << 20, 70_656], &secret, None).unwrap();
        scratch.reserve().unwrap();
        let file = &scratch.files()[0];
        let data = std::fs::metadata(&file.path).unwrap();
        assert_eq!(data.mode() & 0o777, 0o600);
        assert!(data.blocks() * 512 >= file.reserved && data.len() < file.reserved);
        let info = QEMU_IMG.run(&["info", "-U", "--output=json", &file.path], None, Duration::from_secs(60)).unwrap();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!((&info["virtual-size"], &info["encrypted"]), (&(16 << 20).into(), &true.into()));
        scratch.remove().unwrap();
        assert!(!scratch.folder().exists());
    }
}
