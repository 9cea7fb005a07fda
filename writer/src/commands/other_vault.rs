//! A second vault beside the one that a command is about: its tenant, and who has the keys of that.

use std::path::PathBuf;

use reseal_cli::{CommonArgs, Failure, Opened};

/// What was said of the other vault; the rest is as for the first.
pub(super) struct OtherVault<'a> {
    pub repo: &'a str,
    pub tenant: &'a Option<String>,
    pub keyring: &'a Option<PathBuf>,
    pub keyring_passphrase_file: &'a Option<PathBuf>,
    pub kms_config: &'a Option<PathBuf>,
}

impl OtherVault<'_> {
    /// Its tenant. What goes wrong names the vault.
    pub(super) fn open(&self, common: &CommonArgs) -> Result<Opened, Failure> {
        self.args(common).open().map_err(|failure| match failure.message.starts_with(&format!("{} ", self.repo)) {
            true => failure,
            false => Failure::new(failure.status, format!("{}: {}", self.repo, failure.message)),
        })
    }

    /// The arguments with which it is opened. A recovery kit is of the first vault.
    fn args(&self, common: &CommonArgs) -> CommonArgs {
        let given = |own: &Option<PathBuf>, other: &Option<PathBuf>| own.clone().or_else(|| other.clone());
        let passphrase = match self.keyring {
            Some(_) => self.keyring_passphrase_file.clone(),
            None => given(self.keyring_passphrase_file, &common.keyring_passphrase_file),
        };
        CommonArgs {
            repo: Some(self.repo.to_owned()),
            tenant: self.tenant.clone().unwrap_or_else(|| common.tenant.clone()),
            keyring: given(self.keyring, &common.keyring),
            keyring_passphrase_file: passphrase,
            kms_config: given(self.kms_config, &common.kms_config),
            recovery_kit: None,
            recovery_passphrase_file: None,
            recovery_identity: None,
            ..common.clone()
        }
    }
}
