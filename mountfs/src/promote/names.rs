//! What things of a move are called in QEMU. By these names they are also found again.

const JOB: &str = "reseal-move-";
const TARGET: &str = "reseal-target-";
const SECRET: &str = "reseal-secret-";
const FILTER: &str = "reseal-mirror-";

/// Whether a job, a node or an object is of a move.
pub(super) fn is_ours(name: &str) -> bool {
    [JOB, TARGET, SECRET, FILTER].iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a node is the target of a move.
pub(super) fn is_target(node: &str) -> bool {
    node.starts_with(TARGET)
}

/// The job that moves the disk with that place.
pub(super) fn job(nth: usize) -> String {
    format!("{JOB}{nth}")
}

/// The node of its target.
pub(super) fn target(nth: usize) -> String {
    format!("{TARGET}{nth}")
}

/// The object with the secret that opens the target.
pub(super) fn secret(nth: usize) -> String {
    format!("{SECRET}{nth}")
}

/// The node that copies what the guest writes.
pub(super) fn filter(nth: usize) -> String {
    format!("{FILTER}{nth}")
}
