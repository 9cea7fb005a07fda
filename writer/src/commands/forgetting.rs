//! Forgetting restore points, by name or by policy, and telling of each what became of it and why.

use std::collections::BTreeSet;

use reseal_cli::{Failure, Opened, Output};
use reseal_format::names::VmName;
use reseal_format::retention::Policy;
use reseal_vault::{Forgetting, Left, Point, PointName, VaultError};
use reseal_writer::retention::{Candidate, judge};
use serde_json::json;

use super::failures::Failures;
use super::point_name;

/// What is said of each restore point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Telling {
    /// All of it, also of those that stay; an object a line with `--json`.
    All,
    /// What goes, to people.
    Gone,
}

/// How it goes.
pub(super) struct Run<'a> {
    output: Output,
    telling: Telling,
    opened: &'a Opened,
    /// None where nothing is to be forgotten.
    forgetting: Option<Forgetting<'a>>,
    reason: &'a str,
    failed: Failures,
    /// What was forgotten, or would be.
    pub forgotten: BTreeSet<PointName>,
    pub kept: usize,
}

impl<'a> Run<'a> {
    /// Begins, in earnest or only to say what would become of them.
    pub(super) fn new(
        output: Output,
        telling: Telling,
        opened: &'a Opened,
        is_dry: bool,
        reason: &'a str,
    ) -> Result<Run<'a>, Failure> {
        let forgetting = if is_dry { None } else { Some(opened.tenant.forgetting()?) };
        Ok(Run {
            output,
            telling,
            opened,
            forgetting,
            reason,
            failed: Failures::new(output),
            forgotten: BTreeSet::new(),
            kept: 0,
        })
    }

    /// Notes what is wrong, and goes on.
    pub(super) fn wrong(&mut self, failure: Failure) {
        self.failed.add(failure);
    }

    /// What is wrong with one point does not stop the others; a vault that does not answer does.
    fn or_wrong<T>(&mut self, result: Result<T, VaultError>) -> Result<Option<T>, Failure> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.damaged_object().is_some() || matches!(e, VaultError::Held { .. }) => {
                self.wrong(e.into());
                Ok(None)
            }
            // Somebody else was faster.
            Err(VaultError::NoPoint { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn told(&self, point: &Point, action: &str, reasons: &[String]) {
        let (name, time) = (point_name(point), point.manifest.created);
        let why = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
        if self.telling == Telling::All || action != "kept" {
            self.output.say(format!("{name:<24} {time}  {}{why}", action.replace('_', " ")));
        }
        if self.telling == Telling::All {
            let time = time.to_string();
            self.output.json(&json!({ "event": action, "point": name, "time": time, "reasons": reasons }));
        }
    }

    /// Forgets a point.
    pub(super) fn forget(&mut self, point: &Point) -> Result<(), Failure> {
        let tenant = &self.opened.tenant;
        let done = match &self.forgetting {
            Some(forgetting) => forgetting.forget(point, self.reason).map(|left| ("forgotten", left)),
            None => tenant.check_not_held(&point.manifest).map(|()| ("would_be_forgotten", Left::Tombstone)),
        };
        if let Some((action, left)) = self.or_wrong(done)? {
            let (vm, number) = (point.manifest.vm.clone(), point.manifest.number);
            self.forgotten.insert(PointName { vm, number });
            let reading = match left {
                Left::Tombstone => Vec::new(),
                Left::Read(by) => by.iter().map(|held| format!("its space stays while it is read: {held}")).collect(),
                Left::Kept(why) => vec![format!("its space stays: {why}")],
            };
            self.told(point, action, &reading);
        }
        Ok(())
    }

    /// Forgets what a policy does not keep of a VM.
    pub(super) fn apply(&mut self, vm: &VmName, policy: &Policy) -> Result<(), Failure> {
        let (tenant, heads) = (&self.opened.tenant, &self.opened.heads);
        let chain = heads.whole_chain(&**tenant, vm)?;
        if chain.last() == 0 {
            return Err(VaultError::NoVm { vm: vm.clone() }.into());
        }
        let names = tenant.note_names(vm)?;
        let (mut points, mut candidates) = (Vec::new(), Vec::new());
        for number in chain.live() {
            let looked_at = tenant.point(vm, number).and_then(|point| {
                let held = tenant.hold_of(&point.manifest, &names)?.is_some();
                Ok((point, held))
            });
            // Nothing is known of one that can't be opened, so it stays.
            let Some((point, held)) = self.or_wrong(looked_at)? else { continue };
            candidates.push(Candidate { number, created: point.manifest.created, held });
            points.push(point);
        }
        for (point, (_, why)) in points.iter().zip(judge(policy, &candidates)) {
            if why.is_empty() {
                self.forget(point)?;
            } else {
                self.kept += 1;
                self.told(point, "kept", &why.iter().map(ToString::to_string).collect::<Vec<_>>());
            }
        }
        Ok(())
    }

    /// Ends it; what went wrong.
    pub(super) fn end(self) -> Ended {
        Ended { forgotten: self.forgotten, kept: self.kept, failed: self.failed }
    }
}

/// What became of it.
pub(super) struct Ended {
    pub forgotten: BTreeSet<PointName>,
    pub kept: usize,
    pub failed: Failures,
}
