//! What a target answers.

use std::ops::Range;

use super::fields::{Fields, Out};
use super::header::{MAGIC, kind, message};
use super::{
    Header, MAX_AREAS, MAX_DISKS, MAX_NAME, MAX_TEXT, MAX_WARNINGS, Points, Renewed, Shown, Tracking, Trouble,
    Violation, Vms,
};

/// A message of the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromTarget {
    Welcome(Welcome),
    Begun(Begun),
    DiskReady(DiskReady),
    Need(Need),
    /// All of the disk was offered, and what was needed came.
    DiskDone,
    /// What was said about the disk's changes is wrong: it has to be begun anew, and read whole.
    Distrusted(String),
    /// All packs are durable.
    Closed,
    Committed(Committed),
    /// Nothing to say, but still there.
    Alive,
    Trouble(Trouble),
    Renewed(Renewed),
    Vms(Vms),
    Points(Points),
    Shown(Shown),
}

/// The answer to the first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    pub version: u16,
    /// Name and version of the program, for logs.
    pub software: String,
    /// The target's time, in milliseconds since 1970.
    pub time: u64,
    /// Most offers that may be under way.
    pub window: u16,
}

/// A restore point is begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begun {
    /// The id that it will have. To resume, it is named.
    pub point: [u8; 16],
    /// The newest restore point of the VM.
    pub newest: Option<Newest>,
}

/// What the next backup of a VM has to know of its newest restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    pub number: u32,
    pub point: [u8; 16],
    pub disks: Vec<NewestDisk>,
}

/// A disk of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewestDisk {
    pub name: String,
    pub length: u64,
    pub tracking: Option<Tracking>,
}

/// The answer to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReady {
    pub start: Start,
}

/// What is to be sent of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// All of it. The text says why, where changes were told: it is empty if there was nothing to start from.
    Whole(String),
    /// What changed since the restore point of that number, and these areas in any case. Offers cover the disk.
    Since { number: u32, always: Vec<Range<u64>> },
}

/// Which clusters of an offer are needed, the first in the lowest bit. Each offer that tells contents gets one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub sequence: u64,
    pub clusters: u16,
}

/// The restore point exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    pub number: u32,
    pub point: [u8; 16],
    /// Milliseconds since 1970, by the target's clock.
    pub created: u64,
    pub warnings: Vec<String>,
}

impl Begun {
    fn put(&self, out: &mut Out) {
        out.bytes(&self.point).option(self.newest.as_ref(), |out, newest| {
            out.u32(newest.number).bytes(&newest.point).list(&newest.disks, |out, disk| {
                out.text(&disk.name).u64(disk.length);
                out.option(disk.tracking.as_ref(), |out, tracking| tracking.put(out));
            });
        });
    }

    fn take(fields: &mut Fields<'_>) -> Result<Begun, Violation> {
        let point = fields.array()?;
        let newest = fields.option("whether there is a restore point", |fields| {
            let (number, point) = (fields.u32()?, fields.array()?);
            let disks = fields.list("the disks", MAX_DISKS, |fields| {
                let (name, length) = (fields.text("the name of a disk", MAX_NAME)?, fields.u64()?);
                let tracking = fields.option("whether there is a record of changes", Tracking::take)?;
                Ok(NewestDisk { name, length, tracking })
            })?;
            Ok(Newest { number, point, disks })
        })?;
        Ok(Begun { point, newest })
    }
}

impl DiskReady {
    fn put(&self, out: &mut Out) {
        match &self.start {
            Start::Whole(why) => {
                out.u8(0).line(why, MAX_TEXT);
            }
            Start::Since { number, always } => {
                out.u8(1).u32(*number).list(always, |out, area| {
                    out.u64(area.start).u64(area.end);
                });
            }
        }
    }

    fn take(fields: &mut Fields<'_>) -> Result<DiskReady, Violation> {
        let start = match fields.u8()? {
            0 => Start::Whole(fields.line("a reason", MAX_TEXT)?),
            1 => {
                let number = fields.u32()?;
                let mut reached = 0;
                let always = fields.list("the areas", MAX_AREAS, |fields| {
                    let area = fields.u64()?..fields.u64()?;
                    if area.start < reached || area.end <= area.start {
                        return Err(Violation::Value { what: "the end of an area", value: area.end });
                    }
                    reached = area.end;
                    Ok(area)
                })?;
                Start::Since { number, always }
            }
            value => return Err(Violation::Value { what: "how a disk starts", value: value.into() }),
        };
        Ok(DiskReady { start })
    }
}

impl FromTarget {
    /// The whole message.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            FromTarget::Welcome(welcome) => message(kind::WELCOME, |out| {
                out.bytes(MAGIC).u16(welcome.version).line(&welcome.software, MAX_NAME);
                out.u64(welcome.time).u16(welcome.window);
            }),
            FromTarget::Begun(begun) => message(kind::BEGUN, |out| begun.put(out)),
            FromTarget::DiskReady(ready) => message(kind::DISK_READY, |out| ready.put(out)),
            FromTarget::Need(need) => message(kind::NEED, |out| {
                out.u64(need.sequence).u16(need.clusters);
            }),
            FromTarget::DiskDone => message(kind::DISK_DONE, |_| {}),
            FromTarget::Distrusted(why) => message(kind::DISTRUSTED, |out| {
                out.line(why, MAX_TEXT);
            }),
            FromTarget::Closed => message(kind::CLOSED, |_| {}),
            FromTarget::Committed(committed) => message(kind::COMMITTED, |out| {
                out.u32(committed.number).bytes(&committed.point).u64(committed.created);
                let warnings = &committed.warnings[..committed.warnings.len().min(MAX_WARNINGS)];
                out.list(warnings, |out, warning| {
                    out.line(warning, MAX_TEXT);
                });
            }),
            FromTarget::Alive => message(kind::TARGET_ALIVE, |_| {}),
            FromTarget::Trouble(trouble) => message(kind::TARGET_TROUBLE, |out| trouble.put(out)),
            FromTarget::Renewed(renewed) => message(kind::RENEWED, |out| renewed.put(out)),
            FromTarget::Vms(vms) => message(kind::VMS, |out| vms.put(out)),
            FromTarget::Points(points) => message(kind::POINTS, |out| points.put(out)),
            FromTarget::Shown(shown) => message(kind::SHOWN, |out| shown.put(out)),
        }
    }

    /// The message that a payload of exactly the header's length is.
    pub fn decode(header: Header, payload: &[u8]) -> Result<FromTarget, Violation> {
        let mut fields = Fields::of("a message of the target", payload);
        let decoded = match header.kind {
            kind::WELCOME => {
                if fields.array::<8>()? != *MAGIC {
                    return Err(Violation::Magic);
                }
                let version = fields.u16()?;
                if version != super::VERSION {
                    // What else is in it is of that version.
                    let software = String::new();
                    return Ok(FromTarget::Welcome(Welcome { version, software, time: 0, window: 0 }));
                }
                let software = fields.line("the name of a program", MAX_NAME)?;
                let (time, window) = (fields.u64()?, fields.u16()?);
                if window == 0 {
                    return Err(Violation::Value { what: "the window", value: 0 });
                }
                FromTarget::Welcome(Welcome { version, software, time, window })
            }
            kind::BEGUN => FromTarget::Begun(Begun::take(&mut fields)?),
            kind::DISK_READY => FromTarget::DiskReady(DiskReady::take(&mut fields)?),
            kind::NEED => FromTarget::Need(Need { sequence: fields.u64()?, clusters: fields.u16()? }),
            kind::DISK_DONE => FromTarget::DiskDone,
            kind::DISTRUSTED => FromTarget::Distrusted(fields.line("a reason", MAX_TEXT)?),
            kind::CLOSED => FromTarget::Closed,
            kind::COMMITTED => FromTarget::Committed(Committed {
                number: fields.u32()?,
                point: fields.array()?,
                created: fields.u64()?,
                warnings: fields.list("the warnings", MAX_WARNINGS, |fields| fields.line("a warning", MAX_TEXT))?,
            }),
            kind::TARGET_ALIVE => FromTarget::Alive,
            kind::TARGET_TROUBLE => FromTarget::Trouble(Trouble::take(&mut fields)?),
            kind::RENEWED => FromTarget::Renewed(Renewed::take(&mut fields)?),
            kind::VMS => FromTarget::Vms(Vms::take(&mut fields)?),
            kind::POINTS => FromTarget::Points(Points::take(&mut fields)?),
            kind::SHOWN => FromTarget::Shown(Shown::take(&mut fields)?),
            kind => return Err(Violation::Kind { kind }),
        };
        fields.end()?;
        Ok(decoded)
    }
}
