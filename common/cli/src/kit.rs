//! Recovery kits that are given: who opens them, and what they open in the place of a KMS.

use std::io;
use std::path::Path;
use std::sync::Arc;

use reseal_format::keys::Master;
use reseal_kms::kit::{KitContents, KitKey, SealedKit, read_identities};
use reseal_kms::{Kms, KmsError, Passphrase};
use reseal_vault::{Record, Tenant, VaultError};

use crate::{CommonArgs, Failure, Status, of_tenant, read_passphrase};

impl CommonArgs {
    /// Reads a kit or a sheet with one, and opens it with the identity that is given, or else its passphrase.
    pub fn read_kit(&self, path: &Path) -> Result<KitContents, Failure> {
        let sealed = SealedKit::read(path)?;
        let key = match (&self.recovery_identity, sealed.is_under_passphrase()?) {
            (Some(identity), false) => read_identities(identity, |path| self.passphrase("the identity", path))?,
            (None, true) => {
                let failed = |e| Failure::new(Status::Usage, format!("{e} (or --recovery-passphrase-file)"));
                KitKey::Passphrase(self.passphrase("the recovery kit", path).map_err(failed)?)
            }
            (None, false) => return Err(KmsError::KitNeedsIdentity { path: path.to_owned() }.into()),
            (Some(_), true) => return Err(KmsError::KitNeedsPassphrase { path: path.to_owned() }.into()),
        };
        Ok(sealed.open(&key)?)
    }

    fn passphrase(&self, what: &str, path: &Path) -> io::Result<Passphrase> {
        read_passphrase(self.recovery_passphrase_file.as_deref(), &format!("Passphrase of {what} {}: ", path.display()))
    }

    /// Unlocks a tenant: with the recovery kit that is given, and then no KMS is asked, or through its KMS.
    pub fn unlock(&self, record: &Record) -> Result<Tenant, Failure> {
        self.through(record, |kit| record.unlock_with(kit), |kms| record.unlock(kms))
    }

    /// The tenant's master, for a new kit.
    pub fn master(&self, record: &Record) -> Result<Master, Failure> {
        self.through(record, |kit| record.master_of(&kit), |kms| record.master(&*kms))
    }

    fn through<T>(
        &self,
        record: &Record,
        with_kit: impl FnOnce(KitContents) -> Result<T, VaultError>,
        with_kms: impl FnOnce(Arc<dyn Kms>) -> Result<T, VaultError>,
    ) -> Result<T, Failure> {
        match &self.recovery_kit {
            Some(path) => {
                // Before anything is asked for.
                record.check_live()?;
                with_kit(self.read_kit(path)?).map_err(|e| of_kit(path, e))
            }
            None => with_kms(self.kms_of(record)?).map_err(|e| of_tenant(record.name(), e)),
        }
    }

    /// Refuses `--recovery-kit` where it would have no effect.
    pub fn refuse_recovery_kit(&self) -> Result<(), Failure> {
        match &self.recovery_kit {
            Some(_) => Err(Failure::new(
                Status::Usage,
                "--recovery-kit opens restore points and is of no use here: `reseal key import KIT` gives the tenant a key \
                 in a KMS again",
            )),
            None => Ok(()),
        }
    }
}

/// Says which kit an error is about.
pub fn of_kit(path: &Path, error: VaultError) -> Failure {
    let is_kit =
        matches!(error, VaultError::OtherKit { .. } | VaultError::OldKit { .. } | VaultError::KitWithoutMaster { .. });
    let failure = Failure::from(error);
    match is_kit {
        true => Failure::new(failure.status, format!("{}: {}", path.display(), failure.message)),
        false => failure,
    }
}
