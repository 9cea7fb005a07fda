//! Restore points that another site has, and opens.

use reseal_format::manifest::Tombstone;
use reseal_format::names::{DiskName, VmName};
use reseal_nbd::Export;
use reseal_vault::{Chain, Class, Point, Points, VaultError};

use crate::Enrolment;

/// Reads what another site has, under an enrolment that may.
pub struct SiteReader {
    enrolment: Enrolment,
}

impl SiteReader {
    /// Connects when it is asked for something first.
    pub fn new(enrolment: Enrolment) -> SiteReader {
        SiteReader { enrolment }
    }

    fn not_yet<T>(&self) -> Result<T, VaultError> {
        let message = format!("{} can't be read from", self.enrolment.address());
        Err(VaultError::Elsewhere { message, class: Class::Failed })
    }

    /// Opens a disk of a restore point.
    pub fn disk(&self, _vm: &VmName, _number: u32, _disk: &DiskName) -> Result<Export, VaultError> {
        self.not_yet()
    }
}

impl Points for SiteReader {
    fn vms(&self) -> Result<Vec<VmName>, VaultError> {
        self.not_yet()
    }

    fn chain(&self, _vm: &VmName) -> Result<Chain, VaultError> {
        self.not_yet()
    }

    fn point(&self, _vm: &VmName, _number: u32) -> Result<Point, VaultError> {
        self.not_yet()
    }

    fn tombstone(&self, _vm: &VmName, _number: u32) -> Result<Tombstone, VaultError> {
        self.not_yet()
    }
}
