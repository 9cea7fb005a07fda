//! A session of one who reads: questions, answered in their order until the client ends it.
//!
//! Of VMs that the client may not read it learns nothing, not even that they are there: they are answered as such that are not.

use std::sync::Arc;

use reseal_format::layout::MAX_NUMBER;
use reseal_format::names::VmName;
use reseal_proto::wire::{
    FromSource, FromTarget, ListPoints, ListVms, MAX_LISTED_POINTS, MAX_LISTED_VMS, Plaintext, PointState, Points,
    Show, Shown, Trouble, TroubleCode, Vms,
};
use reseal_site::RemoteError;
use reseal_vault::{self as vault, Class, State, VaultError};
use tracing::warn;

use super::desk::Desk;
use super::receive::broken;
use super::session::{Session, refuse};
use super::tenants::OpenTenant;
use crate::BackupError;

/// What a client that reads is told of an error, which goes to the log as it is.
pub(super) fn told(error: &VaultError, what: &str) -> Trouble {
    let (code, message) = match (error, error.class()) {
        (VaultError::NoPoint { .. }, _) => (TroubleCode::Unknown, format!("{what} does not exist")),
        (_, Class::Damaged) => {
            (TroubleCode::Damaged, format!("{what} is damaged or missing at this site; its log says more"))
        }
        (_, Class::Unreachable) => (
            TroubleCode::Unavailable,
            format!("{what} can't be read now: the vault of this site or its KMS does not answer; its log says which"),
        ),
        (_, Class::Failed | Class::Usage) => {
            (TroubleCode::Failed, format!("{what} can't be read at this site; its log says why"))
        }
    };
    Trouble { code, message }
}

impl Desk {
    /// Logs and counts what could not be read; what the client is told.
    pub(super) fn not_read(&self, error: &VaultError, what: &str) -> Trouble {
        let trouble = told(error, what);
        if trouble.code != TroubleCode::Unknown {
            warn!("{what}: {error}");
            self.site.metrics.not_read(&self.client.tenant, trouble.code);
        }
        trouble
    }

    fn vms(&self, open: &OpenTenant, after: Option<&str>) -> Result<Vms, VaultError> {
        let mut names = vault::Points::vms(&*open.tenant)?;
        names.retain(|name| after.is_none_or(|after| name.as_str() > after) && self.may_read(name));
        let more = names.len() > MAX_LISTED_VMS;
        names.truncate(MAX_LISTED_VMS);
        Ok(Vms { names: names.iter().map(|name| name.as_str().to_owned()).collect(), more })
    }

    fn points(&self, open: &OpenTenant, vm: &VmName, after: u32) -> Result<Points, VaultError> {
        if !self.may_read(vm) {
            return Ok(Points { numbers: Vec::new(), more: false });
        }
        let (chain, rollback) = open.heads.chain(&*open.tenant, vm)?;
        if let Some(rollback) = rollback {
            // Who asks has a memory of his own; this one is for whoever runs this site.
            self.not_read(&rollback, &format!("the list of restore points of {vm}"));
        }
        let later = chain.numbers().filter(|(number, _)| *number > after).map(|(number, state)| match state {
            State::Live => (number, PointState::Live),
            State::Forgotten => (number, PointState::Forgotten),
            State::Missing => (number, PointState::Missing),
        });
        let mut numbers: Vec<_> = later.take(MAX_LISTED_POINTS + 1).collect();
        let more = numbers.len() > MAX_LISTED_POINTS;
        numbers.truncate(MAX_LISTED_POINTS);
        Ok(Points { numbers, more })
    }

    fn shown(&self, open: &OpenTenant, vm: &VmName, number: u32) -> Shown {
        let none = || VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") };
        let found = match self.may_read(vm) && (1..=MAX_NUMBER).contains(&number) {
            true => open.tenant.shown(vm, number),
            false => Err(none()),
        };
        match found {
            Ok(vault::Shown::Manifest(mut plain)) => Shown::Manifest(Plaintext(std::mem::take(&mut plain))),
            Ok(vault::Shown::Tombstone(mut plain)) => Shown::Tombstone(Plaintext(std::mem::take(&mut plain))),
            Err(e) => Shown::Refused(self.not_read(&e, &format!("the restore point {vm}@{number}"))),
        }
    }
}

fn vm_name(name: &str) -> Result<VmName, BackupError> {
    VmName::new(name).map_err(|e| broken(e.to_string()))
}

impl Session<'_> {
    /// Answers questions until the client has no more; how many they were.
    pub(super) fn answer_questions(&mut self) -> Result<u64, BackupError> {
        let mut open: Option<Arc<OpenTenant>> = None;
        let mut answered = 0;
        loop {
            let question = match self.next() {
                // Whoever has heard what he wanted to know just goes.
                Err(BackupError::Remote(RemoteError::Lost { .. })) => return Ok(answered),
                other => other?,
            };
            let answer = match question {
                FromSource::Renew(asked) if answered == 0 => FromTarget::Renewed(self.renew(&asked.request)),
                FromSource::Begin(begin) => {
                    let (name, vm) = (&self.client.name, vm_name(&begin.vm)?);
                    let message = format!(
                        "{name} may not add restore points of {vm}, only read them; whoever runs this site can enrol a client that may"
                    );
                    return Err(refuse(TroubleCode::NotAllowed, message));
                }
                FromSource::ListVms(_) | FromSource::ListPoints(_) | FromSource::Show(_) => {
                    let open = match &mut open {
                        Some(open) => open,
                        none => none.insert(self.desk.open()?),
                    };
                    self.answer(open, question)?
                }
                _ => return Err(broken("it asks nothing that can be answered here")),
            };
            self.send(&answer)?;
            answered += 1;
        }
    }

    fn answer(&self, open: &OpenTenant, question: FromSource) -> Result<FromTarget, BackupError> {
        let desk = self.desk;
        let ended = |what: &str, e: VaultError| {
            let Trouble { code, message } = desk.not_read(&e, what);
            refuse(code, message)
        };
        let _turn = desk.turn();
        match question {
            FromSource::ListVms(ListVms { after }) => {
                let vms = desk.vms(open, after.as_deref());
                vms.map(FromTarget::Vms).map_err(|e| ended("the list of VMs", e))
            }
            FromSource::ListPoints(ListPoints { vm, after }) => {
                let vm = vm_name(&vm)?;
                let points = desk.points(open, &vm, after);
                points.map(FromTarget::Points).map_err(|e| ended(&format!("the list of restore points of {vm}"), e))
            }
            FromSource::Show(Show { vm, number }) => Ok(FromTarget::Shown(desk.shown(open, &vm_name(&vm)?, number))),
            _ => Err(broken("it asks nothing that can be answered here")),
        }
    }
}
