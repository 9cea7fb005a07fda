//! What reseal's things are called inside QEMU. By the prefix they are found again after a crash.

use reseal_format::ids::PointId;

/// What all names of ours begin with.
const PREFIX: &str = "reseal-";

/// Whether it is a name of ours.
pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// The object that says which run is at work.
pub(super) const MARKER: &str = "reseal-run";
/// The listening socket while it is handed over.
pub(super) const LISTENER: &str = "reseal-nbd";

/// The bitmap that records from this point on.
pub(crate) fn bitmap(point: PointId) -> String {
    format!("{PREFIX}{point}")
}

/// The bitmap that holds what changed until this point, while it is read.
pub(super) fn changes(point: PointId) -> String {
    format!("{PREFIX}changes-{point}")
}

/// What the scratch of a disk consists of. Node names have at most 31 characters.
#[derive(Debug, Clone)]
pub(super) struct DiskParts {
    pub(super) job: String,
    pub(super) export: String,
    pub(super) scratch: String,
    pub(super) file: String,
    pub(super) secret: String,
}

impl DiskParts {
    /// Those of the `nth` disk.
    pub(super) fn of(nth: usize) -> DiskParts {
        DiskParts {
            job: format!("{PREFIX}backup-{nth}"),
            export: format!("{PREFIX}export-{nth}"),
            scratch: format!("{PREFIX}scratch-{nth}"),
            file: format!("{PREFIX}file-{nth}"),
            secret: format!("{PREFIX}secret-{nth}"),
        }
    }
}
