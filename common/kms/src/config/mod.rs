//! The operator's KMS configuration: which KMS keeps which tenant's key, where it is, and where its credentials are
//! read from.
//!
//! ```toml
//! [kms.site-bao]                      # a name of your own
//! kind = "vault"                      # HashiCorp Vault or OpenBao, transit engine
//! address = "https://bao.example:8200"
//! ca = "/etc/reseal/bao-ca.pem"       # the CAs to trust; no other is
//! auth = { approle = { role_id_file = "/etc/reseal/role-id", secret_id_file = "/etc/reseal/secret-id" } }
//! # auth = { token_file = "/etc/reseal/bao.token" }
//! # mount = "transit"                 # approle = { …, mount = "approle" }
//! # namespace = "team"
//! # timeout = 10                      # seconds for one request
//!
//! [kms.hsm]
//! kind = "kmip"
//! address = "hsm.example:5696"
//! ca = "/etc/reseal/hsm-ca.pem"
//! cert = "/etc/reseal/hsm-client.pem"
//! key = "/etc/reseal/hsm-client.key"
//! # allow_get = false
//!
//! [tenants]
//! acme = "site-bao"
//! globex = { kms = "hsm", key = "globex-kek" }    # this key and no other
//! # tenants that are not named use the keyring, as does: initech = "keyring"
//! ```
//!
//! A tenant record holds the kind of its KMS and the key's name, no address: it has to match what stands here, and
//! can't lead a request anywhere else. Unknown fields are refused, so that a misspelt one is not silently without
//! effect.
//!
//! Modules in reading order: here what a configuration says, `parse` (how it is read from TOML).

mod parse;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::kmip::{Kmip, KmipConfig};
use crate::pinned::Pinned;
use crate::transit::{Address, ApiPath, Transit};
use crate::{KeyName, Kms, KmsError, private_file};

/// Longest file: room for thousands of tenants.
const MAX_FILE: u64 = 1 << 20;

/// What a tenant without an entry uses; no entry of `[kms]` can have this name.
pub const KEYRING: &str = "keyring";

/// How to reach a transit engine.
#[derive(Clone, Debug)]
pub struct VaultConfig {
    /// Where the server is.
    pub address: Address,
    /// Where the transit engine is mounted.
    pub mount: ApiPath,
    /// File with the CA certificates that are trusted; none for `http` to this machine.
    pub ca: Option<PathBuf>,
    /// Who we are.
    pub auth: VaultAuth,
    /// The namespace, where the server has some.
    pub namespace: Option<ApiPath>,
    /// For one request and its answer.
    pub timeout: Duration,
}

/// Where the credentials for a transit engine are read from. They are read when they are needed, and again when they
/// are refused.
#[derive(Clone, Debug)]
pub enum VaultAuth {
    /// A file with a token.
    TokenFile(PathBuf),
    /// An AppRole, which logs in for a token.
    AppRole {
        /// File with the role id.
        role_id_file: PathBuf,
        /// File with the secret id.
        secret_id_file: PathBuf,
        /// Where the AppRole method is mounted, below `auth/`.
        mount: ApiPath,
    },
}

/// One KMS of the configuration.
#[derive(Clone, Debug)]
pub enum KmsSettings {
    /// `kind = "vault"`.
    Vault(VaultConfig),
    /// `kind = "kmip"`.
    Kmip(KmipConfig),
}

/// What a tenant uses.
#[derive(Clone, Debug)]
struct Choice {
    kms: String,
    /// The only key, if the configuration names one.
    key: Option<KeyName>,
}

/// The configuration, see the module. An empty one leaves all tenants to the keyring.
#[derive(Clone, Debug, Default)]
pub struct KmsConfig {
    path: PathBuf,
    kms: BTreeMap<String, KmsSettings>,
    tenants: BTreeMap<String, Choice>,
}

impl KmsConfig {
    /// Reads the file. One that is missing is an error; see [`KmsConfig::load_if_there`].
    pub fn load(path: &Path) -> Result<Self, KmsError> {
        let missing = || KmsError::Config { path: path.to_owned(), what: "there is no such file".into() };
        Self::read(path)?.ok_or_else(missing)
    }

    /// The same for the default path: without the file, every tenant uses the keyring.
    pub fn load_if_there(path: &Path) -> Result<Self, KmsError> {
        Ok(Self::read(path)?.unwrap_or_else(|| Self { path: path.to_owned(), ..Self::default() }))
    }

    fn read(path: &Path) -> Result<Option<Self>, KmsError> {
        let wrong = |what: String| KmsError::Config { path: path.to_owned(), what };
        let bytes = match private_file::read_trusted(path, MAX_FILE) {
            Err(KmsError::TooLarge { limit, .. }) => return Err(wrong(format!("it is larger than {limit} bytes"))),
            read => read?,
        };
        let Some(bytes) = bytes else {
            return Ok(None);
        };
        let text = std::str::from_utf8(&bytes).map_err(|_| wrong("it is not UTF-8".into()))?;
        let (kms, tenants) = parse::parse(text).map_err(wrong)?;
        Ok(Some(Self { path: path.to_owned(), kms, tenants }))
    }

    /// The name here of the KMS that the tenant uses: [`KEYRING`] if nothing else is said.
    pub fn kms_of(&self, tenant: &str) -> &str {
        self.tenants.get(tenant).map_or(KEYRING, |choice| &choice.kms)
    }

    /// Where it is, or would be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The KMS that the tenant uses; none for the keyring, which the caller opens. Nothing is sent yet.
    pub fn for_tenant(&self, tenant: &str) -> Result<Option<Box<dyn Kms>>, KmsError> {
        let Some(Choice { kms, key }) = self.tenants.get(tenant).filter(|choice| choice.kms != KEYRING) else {
            return Ok(None);
        };
        let opened = self.open(kms)?;
        Ok(Some(match key {
            Some(key) => {
                let (key, path) = (key.clone(), self.path.clone());
                Box::new(Pinned { kms: opened, key, tenant: tenant.to_owned(), path })
            }
            None => opened,
        }))
    }

    /// A KMS by its name here, whoever uses it: for moving a tenant to it.
    pub fn open(&self, name: &str) -> Result<Box<dyn Kms>, KmsError> {
        match self.kms.get(name) {
            Some(KmsSettings::Vault(config)) => Ok(Box::new(Transit::new(config)?)),
            Some(KmsSettings::Kmip(config)) => Ok(Box::new(Kmip::new(config)?)),
            None => Err(KmsError::Config { path: self.path.clone(), what: format!("there is no [kms.{name}] in it") }),
        }
    }
}
