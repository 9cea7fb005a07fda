//! A backup site in a folder of its own: vault, keyring, state, and the real programs.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use reseal_store::Variables;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Run, Running, program, run, start};
use crate::random::Random;

/// Everything that the programs know of the world lies in this folder, and goes with it.
pub struct Site {
    folder: TempDir,
    /// The vault, which may be elsewhere, also in an object store.
    pub vault: PathBuf,
    /// What the programs find in their environment beside what this site says.
    pub variables: Variables,
    pub keyring: PathBuf,
    pub state: PathBuf,
    /// The KMS configuration, where the site has one.
    pub kms_config: Option<PathBuf>,
}

impl Site {
    /// A site with an empty vault and no recovery kit.
    pub fn new() -> Site {
        let site = Site::bare();
        site.reseal(["init", "--no-recovery"]).ok();
        site
    }

    /// A site with one restore point, `vm@1`, of these disks, each of the same bytes, which are given; 8 MiB of them are zeros.
    pub fn with_point(disks: &[&str], length: usize) -> (Site, Vec<u8>) {
        let site = Site::new();
        let mut content = Random::new(5).bytes(length);
        content[4 << 20..12 << 20].fill(0);
        let named: Vec<(String, PathBuf)> = disks.iter().map(|name| ((*name).to_owned(), site.disk(name))).collect();
        for (_, path) in &named {
            fs::write(path, &content).unwrap();
        }
        site.backup_disks("vm", &named);
        (site, content)
    }

    /// A site where nothing was made yet.
    pub fn bare() -> Site {
        let folder = tempfile::Builder::new().prefix("reseal-test-").tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let site = Site {
            vault: at("vault"),
            variables: Variables::new(),
            keyring: at("keys/keyring.json"),
            state: at("state"),
            kms_config: None,
            folder,
        };
        for folder in ["home", "tmp", "disks"] {
            fs::create_dir(site.path(folder)).unwrap();
        }
        site
    }

    /// Another machine, which sees the same vault and has nothing else.
    pub fn elsewhere(&self) -> Site {
        Site { vault: self.vault.clone(), variables: self.variables.clone(), ..Site::bare() }
    }

    /// A path in the site's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A place for a disk of that name.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.path("disks").join(name)
    }

    /// The folder of the tenant in the vault.
    pub fn tenant_folder(&self) -> PathBuf {
        self.vault.join("tenants/default")
    }

    /// The folder of a tenant with a name that needs no encoding.
    pub fn folder_of(&self, tenant: &str) -> PathBuf {
        self.vault.join("tenants").join(tenant)
    }

    /// The bytes of every object.
    pub fn contents(&self) -> std::collections::BTreeMap<String, Vec<u8>> {
        self.objects().into_iter().map(|key| (key.clone(), fs::read(self.vault.join(key)).unwrap())).collect()
    }

    /// One of the programs with those arguments, in the environment of this site and no other.
    pub fn command<A: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(program(name));
        command.args(arguments).env_clear().current_dir(self.folder.path());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.path("home")).env("TMPDIR", self.path("tmp"));
        command.envs(&self.variables);
        command.env("RESEAL_REPO", &self.vault).env("RESEAL_KEYRING", &self.keyring).env("RESEAL_STATE", &self.state);
        if let Some(config) = &self.kms_config {
            command.env("RESEAL_KMS_CONFIG", config);
        }
        command
    }

    /// Runs `reseal`.
    pub fn reseal<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Run {
        run(&mut self.command("reseal", arguments))
    }

    /// Runs `reseal` for a tenant.
    pub fn reseal_of<A: AsRef<OsStr>>(&self, tenant: &str, arguments: impl IntoIterator<Item = A>) -> Run {
        let words = arguments.into_iter().map(|word| word.as_ref().to_owned());
        self.reseal([OsString::from("--tenant"), tenant.into()].into_iter().chain(words))
    }

    /// Starts `reseal`.
    pub fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Running {
        start(&mut self.command("reseal", arguments))
    }

    /// Backs up one disk; what `--json` says of the point.
    #[track_caller]
    pub fn backup(&self, vm: &str, disk: &Path) -> Value {
        self.reseal([OsStr::new("backup"), "--json".as_ref(), vm.as_ref(), disk.as_ref()]).ok().json()
    }

    /// Backs up named disks.
    #[track_caller]
    pub fn backup_disks(&self, vm: &str, disks: &[(String, PathBuf)]) -> Value {
        let named = disks.iter().map(|(name, path)| format!("{name}={}", path.display()));
        let arguments = ["backup", "--json", vm].map(String::from).into_iter().chain(named);
        self.reseal(arguments).ok().json()
    }

    /// Verifies everything, which must be right; what `--json` says.
    #[track_caller]
    pub fn verify(&self) -> Value {
        let report = self.reseal(["verify", "--json"]).ok().json();
        assert_eq!(report["damaged"], serde_json::json!([]));
        report
    }

    /// Restores a disk of a point to a new file.
    pub fn restore(&self, point: &str, disk: &str, to: &Path) -> Run {
        let words = ["restore", "--disk", disk, point].map(OsStr::new);
        self.reseal(words.into_iter().chain([to.as_os_str()]))
    }

    /// All files below the vault, as keys.
    pub fn objects(&self) -> Vec<String> {
        let mut found = files_below(&self.vault);
        found.sort();
        let key = |path: &PathBuf| path.strip_prefix(&self.vault).unwrap().to_str().unwrap().to_owned();
        found.iter().map(key).collect()
    }

    /// The packs of one kind: 1 is data, 2 is index.
    pub fn packs(&self, kind: u8) -> Vec<String> {
        let is_kind = |key: &String| {
            let bytes = fs::read(self.vault.join(key)).unwrap();
            key.contains("/packs/") && bytes.len() > 128 && bytes[bytes.len() - 128 + 10] == kind
        };
        self.objects().into_iter().filter(is_kind).collect()
    }

    /// What writers have left unfinished.
    pub fn unfinished(&self) -> Vec<PathBuf> {
        files_below(&self.vault.join("tmp"))
    }
}

impl Default for Site {
    fn default() -> Site {
        Site::new()
    }
}

/// All files below a folder; none if it does not exist.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let below = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() { files_below(&path) } else { vec![path] }
    };
    entries.flat_map(below).collect()
}

/// Copies a folder with all in it.
pub fn copy_folder(from: &Path, to: &Path) {
    crate::process::system("cp", &["-a", "--", from.to_str().unwrap(), to.to_str().unwrap()]);
}
