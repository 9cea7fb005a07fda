//! Where things are on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_store::{Bucket, Local, Store};

use crate::{Failure, Status};

/// Where keys and state are kept unless the user says otherwise.
#[derive(Debug, Clone)]
pub struct Paths {
    pub keyring: PathBuf,
    /// The KMS configuration; none where the user has no folder for one.
    pub kms_config: Option<PathBuf>,
    pub state: PathBuf,
}

impl Paths {
    /// Given paths, or the defaults: those of the system for root, those of the XDG base directories for others.
    pub fn new(
        keyring: Option<PathBuf>,
        kms_config: Option<PathBuf>,
        state: Option<PathBuf>,
    ) -> Result<Paths, Failure> {
        let or = |given: Option<PathBuf>, system: &str, variable: &str, below_home: &str, name: &str, option: &str| {
            given.map_or_else(|| usual(system, variable, below_home, name, option), Ok)
        };
        Ok(Paths {
            keyring: or(
                keyring,
                "/etc/reseal/keyring.json",
                "XDG_CONFIG_HOME",
                ".config",
                "keyring.json",
                "RESEAL_KEYRING",
            )?,
            kms_config: or(
                kms_config,
                "/etc/reseal/kms.toml",
                "XDG_CONFIG_HOME",
                ".config",
                "kms.toml",
                "RESEAL_KMS_CONFIG",
            )
            .ok(),
            state: or(state, "/var/lib/reseal", "XDG_STATE_HOME", ".local/state", "", "RESEAL_STATE")?,
        })
    }
}

/// Where something is kept on this machine unless the user says otherwise.
fn usual(system: &str, variable: &str, below_home: &str, name: &str, option: &str) -> Result<PathBuf, Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from(system));
    }
    let base = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(below_home));
    let none = || Failure::new(Status::Usage, format!("neither {variable} nor HOME is set; set {option}"));
    Ok(base.or_else(home).ok_or_else(none)?.join("reseal").join(name))
}

/// Where what was read of object stores is kept.
pub(crate) fn cache_folder() -> Result<PathBuf, Failure> {
    usual("/var/cache/reseal", "XDG_CACHE_HOME", ".cache", "", "RESEAL_STORE_CACHE")
}

/// The server's configuration: as given, or the default.
pub fn serve_config(given: Option<&Path>) -> Result<PathBuf, Failure> {
    // Beside the KMS configuration, which has a place of its own if the environment says so.
    let beside =
        || Paths::new(None, None, None).ok().and_then(|paths| Some(paths.kms_config?.with_file_name("serve.toml")));
    let none = || Failure::new(Status::Usage, "neither XDG_CONFIG_HOME nor HOME is set; give --config");
    given.map(Path::to_owned).or_else(beside).ok_or_else(none)
}

/// The store that `--repo` names.
pub fn open_store(repo: &str) -> Result<Arc<dyn Store>, Failure> {
    if reseal_store::is_address(repo) {
        return Ok(Arc::new(open_bucket(repo)?));
    }
    if Path::new(repo).is_file() {
        let message = format!(
            "--repo {repo} is a file; a vault is a folder, or an address such as s3://BUCKET/PREFIX. An enrolment file is for `reseal backup`, `run` and `status`, and with the \
             role restore for `list`, `show`, `restore` and `mount`: the rest is done where the vault is"
        );
        return Err(Failure::new(Status::Usage, message));
    }
    Ok(Arc::new(Local::new(repo)))
}

/// The object store that `--repo` names.
pub(crate) fn open_bucket(repo: &str) -> Result<Bucket, Failure> {
    Bucket::open(repo).map_err(|e| Failure::new(Status::Usage, format!("--repo {e}")))
}
