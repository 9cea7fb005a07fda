//! Questions of those who read: which VMs there are, which restore points these have, and what was sealed about one.

use std::fmt;

use super::fields::{Fields, Out, length32};
use super::{MAX_LISTED_POINTS, MAX_LISTED_VMS, MAX_NAME, MAX_SHOWN, Trouble, Violation};

/// Asks for VMs, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListVms {
    /// Only those whose names come after this one.
    pub after: Option<String>,
}

/// Asks for the numbers of a VM's restore points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPoints {
    pub vm: String,
    /// Only those after this one.
    pub after: u32,
}

/// Asks for what was sealed about a restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Show {
    pub vm: String,
    pub number: u32,
}

/// VMs that have, or had, restore points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vms {
    /// Ascending.
    pub names: Vec<String>,
    /// Whether others come after these.
    pub more: bool,
}

/// How a number of a chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointState {
    /// It has a manifest.
    Live,
    /// It has a tombstone.
    Forgotten,
    /// It has neither, though later numbers exist.
    Missing,
}

impl PointState {
    fn number(self) -> u8 {
        match self {
            PointState::Live => 0,
            PointState::Forgotten => 1,
            PointState::Missing => 2,
        }
    }

    fn of(number: u8) -> Option<PointState> {
        let all = [PointState::Live, PointState::Forgotten, PointState::Missing];
        all.into_iter().find(|state| state.number() == number)
    }
}

/// Numbers of a chain. Of a gap only the first and the last number are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Points {
    /// Ascending.
    pub numbers: Vec<(u32, PointState)>,
    /// Whether others come after these.
    pub more: bool,
}

/// What was sealed, opened: a manifest may hold what a VM's definition says, and is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Plaintext(pub Vec<u8>);

impl fmt::Debug for Plaintext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plaintext({} bytes)", self.0.len())
    }
}

/// The answer to [`Show`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// It is not there, or can't be opened; the session goes on.
    Refused(Trouble),
    /// The restore point's manifest.
    Manifest(Plaintext),
    /// The restore point was forgotten: its tombstone.
    Tombstone(Plaintext),
}

/// A flag.
fn flag(fields: &mut Fields<'_>, what: &'static str) -> Result<bool, Violation> {
    match fields.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(Violation::Value { what, value: value.into() }),
    }
}

impl ListVms {
    pub(super) fn put(&self, out: &mut Out) {
        out.option(self.after.as_ref(), |out, after| {
            out.text(after);
        });
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<ListVms, Violation> {
        let name = |fields: &mut Fields<'_>| fields.text("the name of a VM", MAX_NAME);
        Ok(ListVms { after: fields.option("whether only some VMs are asked for", name)? })
    }
}

impl ListPoints {
    pub(super) fn put(&self, out: &mut Out) {
        out.text(&self.vm).u32(self.after);
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<ListPoints, Violation> {
        Ok(ListPoints { vm: fields.text("the name of a VM", MAX_NAME)?, after: fields.u32()? })
    }
}

impl Show {
    pub(super) fn put(&self, out: &mut Out) {
        out.text(&self.vm).u32(self.number);
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Show, Violation> {
        Ok(Show { vm: fields.text("the name of a VM", MAX_NAME)?, number: fields.u32()? })
    }
}

impl Vms {
    pub(super) fn put(&self, out: &mut Out) {
        out.list(&self.names, |out, name| {
            out.text(name);
        });
        out.u8(self.more.into());
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Vms, Violation> {
        let names = fields.list("the VMs", MAX_LISTED_VMS, |fields| fields.text("the name of a VM", MAX_NAME))?;
        if let Some(at) = names.windows(2).position(|pair| pair[0] >= pair[1]) {
            return Err(Violation::Value { what: "the place of a VM that is not in order", value: at as u64 });
        }
        let more = flag(fields, "whether there are more VMs")?;
        if more && names.is_empty() {
            // Nobody could ask for what comes after.
            return Err(Violation::Value { what: "the number of VMs before more", value: 0 });
        }
        Ok(Vms { names, more })
    }
}

impl Points {
    pub(super) fn put(&self, out: &mut Out) {
        out.list(&self.numbers, |out, (number, state)| {
            out.u32(*number).u8(state.number());
        });
        out.u8(self.more.into());
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Points, Violation> {
        let mut reached = 0;
        let numbers = fields.list("the restore points", MAX_LISTED_POINTS, |fields| {
            let (number, state) = (fields.u32()?, fields.u8()?);
            if number <= reached {
                return Err(Violation::Value { what: "the number of a restore point", value: number.into() });
            }
            reached = number;
            let state = PointState::of(state)
                .ok_or(Violation::Value { what: "the state of a restore point", value: state.into() })?;
            Ok((number, state))
        })?;
        let more = flag(fields, "whether there are more restore points")?;
        if more && numbers.is_empty() {
            return Err(Violation::Value { what: "the number of restore points before more", value: 0 });
        }
        Ok(Points { numbers, more })
    }
}

impl Plaintext {
    fn put(&self, out: &mut Out) {
        out.0.reserve(4 + self.0.len());
        out.u32(length32(self.0.len())).bytes(&self.0);
    }

    fn take(fields: &mut Fields<'_>, what: &'static str) -> Result<Plaintext, Violation> {
        let length = fields.count(what, MAX_SHOWN)?;
        Ok(Plaintext(fields.bytes(length)?.to_vec()))
    }
}

impl Shown {
    pub(super) fn put(&self, out: &mut Out) {
        match self {
            Shown::Refused(trouble) => trouble.put(out.u8(0)),
            Shown::Manifest(plaintext) => plaintext.put(out.u8(1)),
            Shown::Tombstone(plaintext) => plaintext.put(out.u8(2)),
        }
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Shown, Violation> {
        match fields.u8()? {
            0 => Ok(Shown::Refused(Trouble::take(fields)?)),
            1 => Ok(Shown::Manifest(Plaintext::take(fields, "a manifest")?)),
            2 => Ok(Shown::Tombstone(Plaintext::take(fields, "a tombstone")?)),
            value => Err(Violation::Value { what: "what is shown", value: value.into() }),
        }
    }
}
