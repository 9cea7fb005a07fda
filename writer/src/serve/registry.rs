//! Who was enrolled at this site: one small file a client.
//!
//! ```text
//! FOLDER/clients/TENANT/CLIENT.json     mode 0600, names percent-encoded, replaced whole under a lock
//! ```
//!
//! Of a client's certificates, the newest that was used counts, and what was issued since. An answer with a new certificate may
//! be lost, so the one before counts until then.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use reseal_format::names::{ClientName, TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::private_file::{LOCK_PATIENCE, Lock, make_parents, read_private, replace, write_new};
use reseal_vault::VaultError;
use serde::{Deserialize, Serialize};

use super::config::{ANY, Role};
use crate::BackupError;

/// Longest file of a client.
const MAX_FILE: u64 = 256 << 10;
/// Most clients of a site.
const MAX_CLIENTS: usize = 65_536;
/// Most VMs that a client names.
const MAX_VMS: usize = 1024;
/// Most certificates of one client that are kept.
const MAX_CERTIFICATES: usize = 16;
/// Longest life of a certificate.
pub const MAX_DAYS: u32 = 3650;
const VERSION: u32 = 1;
const SUFFIX: &str = ".json";

/// A certificate that was issued to a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// Of its DER form.
    #[serde(with = "hex")]
    pub sha256: [u8; 32],
    pub serial: String,
    #[serde(with = "rfc3339")]
    pub issued: Timestamp,
    #[serde(with = "rfc3339")]
    pub expires: Timestamp,
    /// When a later one was used for the first time.
    #[serde(default, with = "rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub superseded: Option<Timestamp>,
}

/// A client that was enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrolled {
    version: u32,
    pub name: ClientName,
    pub tenant: TenantName,
    pub role: Role,
    /// Names, or `*` for any.
    pub vms: Vec<String>,
    /// How long its certificates are valid.
    pub days: u32,
    #[serde(default, with = "rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Timestamp>,
    /// In the order in which they were issued.
    pub certificates: Vec<Certificate>,
}

mod rfc3339 {
    use reseal_format::time::Timestamp;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        time.to_rfc3339().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        let text = String::deserialize(from)?;
        Timestamp::parse(&text).ok_or_else(|| serde::de::Error::custom("a time is not as 2026-11-24T06:31:47.123Z"))
    }

    pub(super) mod option {
        use super::{Deserializer, Serializer, Timestamp};

        pub(in super::super) fn serialize<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => super::serialize(time, to),
                None => to.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
            super::deserialize(from).map(Some)
        }
    }
}

impl Enrolled {
    /// One that is enrolled now.
    pub(super) fn new(
        name: ClientName,
        tenant: TenantName,
        role: Role,
        vms: Vec<String>,
        days: u32,
        certificate: Certificate,
    ) -> Enrolled {
        Enrolled { version: VERSION, name, tenant, role, vms, days, revoked: None, certificates: vec![certificate] }
    }

    /// What makes no sense in it.
    fn fault(&self) -> Option<String> {
        let days = 1..=MAX_DAYS;
        if self.version != VERSION {
            return Some(format!("it has version {}, this program reads {VERSION}; use a newer reseal", self.version));
        }
        if !(1..=MAX_CERTIFICATES).contains(&self.certificates.len()) || self.vms.len() > MAX_VMS {
            return Some("it has no certificate, or too many of them or of VMs".into());
        }
        if !days.contains(&self.days) {
            return Some(format!("its certificates are for {} days; from 1 to {MAX_DAYS} are possible", self.days));
        }
        if self.role == Role::Append && self.vms.is_empty() {
            return Some("it may append, but to no VM".into());
        }
        self.vms.iter().filter(|vm| *vm != ANY).find_map(|vm| VmName::new(vm).err()).map(|e| e.to_string())
    }

    /// The certificate that is used, or will be next.
    pub fn newest(&self) -> Option<&Certificate> {
        self.certificates.last()
    }

    /// Takes in a new certificate. Where there are too many, the oldest goes that is neither the new one nor `current`.
    pub(super) fn issue(&mut self, current: &[u8; 32], certificate: Certificate) {
        while self.certificates.len() >= MAX_CERTIFICATES {
            let oldest = self.certificates.iter().position(|certificate| certificate.sha256 != *current);
            self.certificates.remove(oldest.unwrap_or(0));
        }
        self.certificates.push(certificate);
    }

    /// Marks what is older than a certificate that was used.
    pub(super) fn supersede(&mut self, used: &[u8; 32], now: Timestamp) {
        let older = self.certificates.iter_mut().take_while(|certificate| certificate.sha256 != *used);
        for certificate in older.filter(|certificate| certificate.superseded.is_none()) {
            certificate.superseded = Some(now);
        }
    }
}

/// What the folder looked like: it changes whenever a file is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Look(Vec<(PathBuf, u64, i64, i64, u64)>);

impl Look {
    pub(super) fn add(&mut self, path: PathBuf, meta: &fs::Metadata) {
        self.0.push((path, meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()));
    }
}

/// All who were enrolled, and what could not be read.
#[derive(Default)]
pub(super) struct Everybody {
    pub enrolled: Vec<Enrolled>,
    pub faults: Vec<String>,
}

/// The folder of the clients.
#[derive(Debug, Clone)]
pub struct Registry {
    folder: PathBuf,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.display().to_string();
    move |source| BackupError::Source { path, action, source }
}

impl Registry {
    /// The one in the folder of an authority.
    pub fn of(authority: &Path) -> Registry {
        Registry { folder: authority.join("clients") }
    }

    fn path(&self, tenant: &TenantName, name: &ClientName) -> PathBuf {
        self.folder.join(tenant.to_key()).join(name.to_key() + SUFFIX)
    }

    /// The files of all clients. What begins with a dot is a lock, or was never finished.
    fn files(&self) -> Result<Vec<(PathBuf, fs::Metadata)>, BackupError> {
        let mut files = Vec::new();
        for folder in entries(&self.folder)? {
            // Not a folder: it is named as what can't be read.
            let inside = match folder.1.is_dir() {
                true => entries(&folder.0)?,
                false => vec![folder],
            };
            files.extend(inside);
            if files.len() > MAX_CLIENTS {
                let folder = self.folder.display();
                return Err(BackupError::Usage(format!("{folder} has more than {MAX_CLIENTS} clients: remove some")));
            }
        }
        Ok(files)
    }

    /// What the folder looks like.
    pub(super) fn look(&self) -> Result<Look, BackupError> {
        let mut look = Look::default();
        self.files()?.into_iter().for_each(|(path, meta)| look.add(path, &meta));
        Ok(look)
    }

    /// Reads all. What can't be read is nobody, and hinders nobody else.
    pub(super) fn everybody(&self) -> Result<Everybody, BackupError> {
        let mut everybody = Everybody::default();
        for (path, _) in self.files()? {
            match self.read(&path) {
                Ok(Some(enrolled)) => everybody.enrolled.push(enrolled),
                Ok(None) => {}
                Err(e) if is_want(&e) => return Err(e),
                Err(e) => everybody.faults.push(reseal_cli::Failure::of(reseal_cli::Status::Failed, &e).message),
            }
        }
        everybody.enrolled.sort_by(|a, b| (&a.tenant, &a.name).cmp(&(&b.tenant, &b.name)));
        Ok(everybody)
    }

    fn read(&self, path: &Path) -> Result<Option<Enrolled>, BackupError> {
        let wrong = |what: String| {
            let path = path.display();
            BackupError::Usage(format!("the file {path} of a client: {what}. Put it back from a copy, or remove it"))
        };
        let Some(text) = read_private(path, MAX_FILE).map_err(VaultError::from)? else { return Ok(None) };
        let enrolled: Enrolled = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        if self.path(&enrolled.tenant, &enrolled.name) != path {
            return Err(wrong(format!("it is that of {} of tenant {}", enrolled.name, enrolled.tenant)));
        }
        match enrolled.fault() {
            Some(fault) => Err(wrong(fault)),
            None => Ok(Some(enrolled)),
        }
    }

    /// A client, if it was enrolled.
    pub(super) fn find(&self, tenant: &TenantName, name: &ClientName) -> Result<Option<Enrolled>, BackupError> {
        self.read(&self.path(tenant, name))
    }

    fn lock(&self, path: &Path) -> Result<(Lock, PathBuf), BackupError> {
        make_parents(path).map_err(VaultError::from)?;
        let lock = Lock::acquire(&self.folder.join(".lock"), LOCK_PATIENCE).map_err(VaultError::from)?;
        let staged = path.with_file_name(".new");
        match fs::remove_file(&staged) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &staged)(e)),
            _ => Ok((lock, staged)),
        }
    }

    /// Takes in a client, unless one of that name was enrolled before.
    pub(super) fn add(&self, enrolled: &Enrolled) -> Result<bool, BackupError> {
        let path = self.path(&enrolled.tenant, &enrolled.name);
        if let Some(fault) = enrolled.fault() {
            return Err(BackupError::Usage(format!("{} can't be enrolled: {fault}", enrolled.name)));
        }
        let (_lock, staged) = self.lock(&path)?;
        Ok(write_new(&path, &staged, &bytes(enrolled)).map_err(VaultError::from)?)
    }

    /// Takes out a client that was never handed its certificate.
    pub(super) fn take_back(&self, enrolled: &Enrolled) -> Result<(), BackupError> {
        let path = self.path(&enrolled.tenant, &enrolled.name);
        fs::remove_file(&path).map_err(failed("remove", &path))
    }

    /// Changes what is known of a client.
    pub(super) fn change<T>(
        &self,
        tenant: &TenantName,
        name: &ClientName,
        change: impl FnOnce(&mut Enrolled) -> Result<T, BackupError>,
    ) -> Result<T, BackupError> {
        let path = self.path(tenant, name);
        let none = || {
            BackupError::Usage(format!(
                "tenant {tenant} has no client {name}: `reseal tenant clients {tenant}` lists those that it has"
            ))
        };
        if self.read(&path)?.is_none() {
            // Before a folder is made for it.
            return Err(none());
        }
        let (_lock, staged) = self.lock(&path)?;
        let before = self.read(&path)?.ok_or_else(none)?;
        let mut after = before.clone();
        let result = change(&mut after)?;
        if after != before {
            replace(&path, &staged, &bytes(&after)).map_err(VaultError::from)?;
        }
        Ok(result)
    }
}

/// Whether it was not the file's fault, but want of descriptors or memory: then nothing is known of who it is.
fn is_want(error: &BackupError) -> bool {
    let mut error: Option<&dyn std::error::Error> = Some(error);
    while let Some(one) = error {
        let code = one.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if matches!(code, Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) {
            return true;
        }
        error = one.source();
    }
    false
}

fn bytes(enrolled: &Enrolled) -> Vec<u8> {
    // All of it is text and numbers, which always have a JSON form.
    let mut bytes = serde_json::to_vec_pretty(enrolled).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// What is in a folder, in the order of names; nothing if it does not exist.
fn entries(folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, BackupError> {
    let listed = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.map_err(failed("list", folder))?,
    };
    let mut entries = Vec::new();
    for entry in listed {
        let entry = entry.map_err(failed("list", folder))?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match entry.metadata() {
            Ok(meta) => entries.push((entry.path(), meta)),
            // Removed meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("look at", &entry.path())(e)),
        }
        if entries.len() > MAX_CLIENTS {
            break;
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn certificate(nth: u8) -> Certificate {
        let (issued, expires) = (Timestamp(1_795_501_907_000), Timestamp(1_795_601_907_000));
        Certificate { sha256: [nth; 32], serial: "4a".into(), issued, expires, superseded: None }
    }

    fn enrolled(name: &str) -> Enrolled {
        let (name, tenant) = (ClientName::new(name).unwrap(), TenantName::new("acme").unwrap());
        Enrolled::new(name, tenant, Role::Append, vec!["web01".into()], 365, certificate(1))
    }

    fn registry() -> (tempfile::TempDir, Registry) {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::of(folder.path());
        (folder, registry)
    }

    #[test]
    fn who_is_enrolled_is_found_and_a_name_is_given_once() {
        let (_folder, registry) = registry();
        let before = registry.look().unwrap();
        assert!(registry.everybody().unwrap().enrolled.is_empty());
        let odd = enrolled("..ä site %/".trim_end_matches('/'));
        for one in [&enrolled("b"), &enrolled("a"), &odd] {
            assert!(registry.add(one).unwrap() && !registry.add(one).unwrap());
            assert_eq!(registry.find(&one.tenant, &one.name).unwrap().as_ref(), Some(one));
        }
        assert_ne!(registry.look().unwrap(), before);
        let all = registry.everybody().unwrap();
        assert_eq!((all.enrolled.len(), all.faults.len()), (3, 0));
        let mode = fs::metadata(registry.path(&odd.tenant, &odd.name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_changes_is_seen_and_what_does_not_is_not_written() {
        let (_folder, registry) = registry();
        let one = enrolled("a");
        registry.add(&one).unwrap();
        let look = registry.look().unwrap();
        registry.change(&one.tenant, &one.name, |_| Ok(())).unwrap();
        assert_eq!(registry.look().unwrap(), look);
        registry
            .change(&one.tenant, &one.name, |one| {
                one.revoked = Some(Timestamp(5));
                Ok(())
            })
            .unwrap();
        assert_ne!(registry.look().unwrap(), look);
        assert_eq!(registry.everybody().unwrap().enrolled[0].revoked, Some(Timestamp(5)));
        let nobody = ClientName::new("b").unwrap();
        assert!(registry.change(&one.tenant, &nobody, |_| Ok(())).is_err_and(|e| e.to_string().contains("no client")));
        // One that died while it wrote is no hindrance.
        fs::write(registry.path(&one.tenant, &one.name).with_file_name(".new"), b"half").unwrap();
        registry
            .change(&one.tenant, &one.name, |one| {
                one.days = 7;
                Ok(())
            })
            .unwrap();
        assert_eq!(registry.find(&one.tenant, &one.name).unwrap().unwrap().days, 7);
    }

    #[test]
    fn of_many_certificates_the_one_in_use_and_the_newest_are_kept() {
        let mut one = enrolled("a");
        for nth in 2..60 {
            one.issue(&[1; 32], certificate(nth));
        }
        let kept: Vec<u8> = one.certificates.iter().map(|certificate| certificate.sha256[0]).collect();
        assert_eq!(kept.len(), MAX_CERTIFICATES);
        assert_eq!((kept[0], kept[1], kept[15]), (1, 45, 59));
        one.supersede(&[46; 32], Timestamp(9));
        let over = one.certificates.iter().filter(|certificate| certificate.superseded.is_some());
        assert_eq!(over.map(|certificate| certificate.sha256[0]).collect::<Vec<_>>(), [1, 45]);
    }

    #[test]
    fn that_descriptors_are_used_up_makes_nobody_unknown() {
        let used_up = |code| {
            let (path, source) = (PathBuf::from("x"), io::Error::from_raw_os_error(code));
            BackupError::from(VaultError::from(reseal_kms::KmsError::Io { action: "open", path, source }))
        };
        assert!(is_want(&used_up(libc::EMFILE)) && is_want(&used_up(libc::ENFILE)));
        assert!(!is_want(&used_up(libc::EACCES)) && !is_want(&BackupError::Usage("x".into())));
    }

    #[test]
    fn hostile_files_are_nobody_and_are_named() {
        let (_folder, registry) = registry();
        let one = enrolled("good");
        registry.add(&one).unwrap();
        let folder = registry.folder.join("acme");
        let text = String::from_utf8(bytes(&enrolled("bad"))).unwrap();
        let write = |name: &str, content: &[u8]| {
            fs::write(folder.join(name), content).unwrap();
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        };
        let big = vec![b' '; usize::try_from(MAX_FILE).unwrap() + 1];
        let many = serde_json::to_string(&vec![certificate(1); 17]).unwrap();
        let changed = |from: &str, to: &str| text.replace(from, to).into_bytes();
        let hostile: Vec<Vec<u8>> = vec![
            b"".to_vec(),
            b"{".to_vec(),
            vec![0xff; 300],
            vec![b'['; 100_000],
            big,
            changed("\"bad\"", "\"../../good\""),
            changed("\"bad\"", "\"a\\nb\""),
            changed("\"bad\"", "\"good\""),
            changed("\"acme\"", "\"other\""),
            changed("\"append\"", "\"root\""),
            changed("\"version\": 1", "\"version\": 2"),
            changed("\"days\": 365", "\"days\": 0"),
            changed("\"days\": 365", "\"days\": 4000000000"),
            changed("\"web01\"", "\"a/b\""),
            changed("\"web01\"", ""),
            changed("\"days\": 365", "\"days\": 365, \"extra\": 1"),
            changed("2026", "26"),
            changed("01010101", "0101"),
            serde_json::to_string(&serde_json::json!({
                "version": 1, "name": "bad", "tenant": "acme", "role": "append", "vms": ["*"], "days": 1,
                "certificates": serde_json::from_str::<serde_json::Value>(&many).unwrap(),
            }))
            .unwrap()
            .into_bytes(),
        ];
        for content in &hostile {
            write("bad.json", content);
            let all = registry.everybody().unwrap();
            let shown = String::from_utf8_lossy(&content[..content.len().min(400)]);
            assert_eq!(all.enrolled, std::slice::from_ref(&one), "{shown}");
            assert!(all.faults.len() == 1 && all.faults[0].contains("bad.json"), "{shown}: {:?}", all.faults);
        }
        // The same file under another name, for anybody to read, and something that is no file.
        write("bad.json", text.as_bytes());
        assert_eq!(registry.everybody().unwrap().enrolled.len(), 2);
        fs::rename(folder.join("bad.json"), folder.join("b%61d.json")).unwrap();
        assert_eq!(registry.everybody().unwrap().faults.len(), 1);
        fs::rename(folder.join("b%61d.json"), folder.join("bad.json")).unwrap();
        fs::set_permissions(folder.join("bad.json"), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(registry.everybody().unwrap().faults[0].contains("chmod"));
        fs::remove_file(folder.join("bad.json")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, folder.join("pipe.json"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        fs::create_dir(folder.join("folder.json")).unwrap();
        fs::write(registry.folder.join("stray"), b"").unwrap();
        let all = registry.everybody().unwrap();
        assert_eq!((all.enrolled.len(), all.faults.len()), (1, 3), "{:?}", all.faults);
    }
}
