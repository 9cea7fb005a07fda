//! A pack that restore points need and that is damaged or missing.

use reseal_format::ids::PackId;
use reseal_format::ordinals::Ordinals;
use reseal_vault::{PackFile, Packs};

use crate::BackupError;
use crate::throttle::Throttle;
use crate::verify_pack::{Findings, PackVerifier};
use crate::walk::Need;

/// What was found of it when all others who rewrite packs had ended.
pub(super) struct Patient<'a> {
    pub id: PackId,
    pub need: &'a Need,
    /// Those that are there; the newest, of which the findings are, comes first.
    pub generations: Vec<PackFile>,
    /// Whether something is wrong with it as a whole.
    pub is_hurt: bool,
    /// Whether no blob of it can be read because of that, or it is missing.
    pub is_unreadable: bool,
    /// Blobs of the newest that are damaged, or needed and not there.
    pub bad: Ordinals,
}

impl Patient<'_> {
    pub(super) fn examine<'a>(
        packs: &Packs,
        throttle: Option<&Throttle>,
        id: PackId,
        need: &'a Need,
    ) -> Result<Patient<'a>, BackupError> {
        let mut generations = packs.generations(id)?;
        generations.sort_by(|one, other| other.cmp(one));
        let findings = match generations.first() {
            Some(newest) => {
                let mut verifier = PackVerifier::new(packs, throttle).map_err(|_| BackupError::Thread)?;
                verifier.verify(*newest, Some(need), true)?
            }
            None => Findings { whole: Some("is missing".into()), unreadable: true, ..Findings::default() },
        };
        Ok(Patient {
            id,
            need,
            generations,
            is_hurt: findings.whole.is_some(),
            is_unreadable: findings.unreadable,
            bad: findings.blobs.iter().map(|(ordinal, _)| *ordinal).collect(),
        })
    }

    pub(super) fn is_bad(&self) -> bool {
        self.is_hurt || !self.bad.is_empty()
    }

    /// Whether a blob is needed that the newest generation does not have.
    pub(super) fn lacks(&self, ordinal: u32) -> bool {
        self.need.ordinals.contains(ordinal) && (self.is_unreadable || self.bad.contains(ordinal))
    }

    /// The blobs that it lacks.
    pub(super) fn lacking(&self) -> impl Iterator<Item = u32> + '_ {
        self.need.ordinals.iter().filter(|ordinal| self.lacks(*ordinal))
    }
}
