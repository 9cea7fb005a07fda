//! `reseal verify --repair-from`: the other vault, and what became of the damage.

use std::path::PathBuf;

use reseal_cli::{CommonArgs, Failure, Opened, Output, Progress, Status, counted, hold_keys};
use reseal_vault::Pins;
use reseal_writer::repair::{Repair, Repaired};
use reseal_writer::verify::{Part, Report, What};

use super::cores;
use super::other_vault::OtherVault;

/// Arguments that say where what is damaged is whole.
#[derive(clap::Args)]
pub(crate) struct RepairArgs {
    /// Mends damaged and missing packs with what a second vault has, which `reseal copy` has made
    #[arg(long, value_name = "URL")]
    repair_from: Option<String>,
    /// The tenant there [default: --tenant]
    #[arg(long, value_name = "NAME", requires = "repair_from")]
    repair_tenant: Option<String>,
    /// The embedded KMS of the second vault [default: --keyring]
    #[arg(long, value_name = "FILE", requires = "repair_from")]
    repair_keyring: Option<PathBuf>,
    /// Reads its passphrase from the first line of a file
    #[arg(long, value_name = "FILE", requires = "repair_from")]
    repair_keyring_passphrase_file: Option<PathBuf>,
    /// Which KMS keeps which tenant's key of the second vault [default: --kms-config]
    #[arg(long, value_name = "FILE", requires = "repair_from")]
    repair_kms_config: Option<PathBuf>,
}

impl RepairArgs {
    /// Opens the second vault, if there is one.
    pub(super) fn open(&self, common: &CommonArgs, of: &Opened) -> Result<Option<Opened>, Failure> {
        let Some(repo) = &self.repair_from else { return Ok(None) };
        let other = OtherVault {
            repo,
            tenant: &self.repair_tenant,
            keyring: &self.repair_keyring,
            keyring_passphrase_file: &self.repair_keyring_passphrase_file,
            kms_config: &self.repair_kms_config,
        };
        let from = other.open(common)?;
        if from.tenant.keys().scope() == of.tenant.keys().scope() {
            let message = "--repair-from is the tenant that is verified, or a copy of its files: what is damaged may be put back from \
                           those as it is";
            return Err(Failure::new(Status::Usage, message));
        }
        Ok(Some(from))
    }
}

/// Verifies, and mends what is damaged.
pub(super) fn run(
    opened: &Opened,
    from: &Opened,
    (what, part): (&What, Part),
    limit_rate: Option<u64>,
    output: Output,
    progress: &Progress,
) -> Result<(Report, Repaired), Failure> {
    let _lease = hold_keys(&from.tenant, format!("repair of {}", opened.repo), Pins::All);
    let repair = Repair {
        tenant: opened.tenant.clone(),
        heads: &opened.heads,
        state: opened.paths.state.clone(),
        from: from.tenant.clone(),
        what: what.clone(),
        part,
        threads: cores(),
        limit_rate,
        expect: &|bytes| progress.expect(bytes),
        progress: &|bytes| progress.add(bytes),
        say: &|text| output.warn(text),
    };
    Ok(repair.run()?)
}

/// Says what was mended.
pub(super) fn told(output: Output, repaired: &Repaired) {
    for mended in &repaired.mended {
        let from = match mended.from.is_empty() {
            true => "with what other generations have".to_owned(),
            false => {
                let points = mended.from.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let blobs = counted(mended.blobs, "blob");
                format!("{blobs} from {points} of the other vault")
            }
        };
        output.say(format!("MENDED   {}\n         was: {}\n         {from}", mended.object, mended.what));
    }
    for (object, why) in &repaired.held_back {
        output.warn(format!("{object} is replaced, but the storage does not let go of it: {why}"));
    }
}
