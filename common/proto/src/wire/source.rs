//! What a source sends.

use super::fields::{Fields, Out, length32};
use super::header::{HEADER_LENGTH, MAGIC, finish, kind, message};
use super::{
    HASH, Header, ListPoints, ListVms, MAX_CLUSTERS, MAX_DEFINITION, MAX_FRAMES, MAX_NAME, MAX_TEXT, MAX_WARNINGS,
    Renew, Show, Trouble, Violation,
};

/// A message of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromSource {
    Hello(Hello),
    Begin(Begin),
    Disk(Disk),
    Offer(Offer),
    Data(Data),
    DiskEnd(DiskEnd),
    /// All disks were sent: what there is of packs is to be made durable.
    Close,
    Commit(Commit),
    /// Nothing to say, but still there.
    Alive,
    Trouble(Trouble),
    Renew(Renew),
    ListVms(ListVms),
    ListPoints(ListPoints),
    Show(Show),
}

/// The first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub version: u16,
    /// Name and version of the program, for logs.
    pub software: String,
}

/// Begins a restore point of a VM, or goes on with one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begin {
    pub vm: String,
    /// The restore point that an earlier connection began.
    pub resume: Option<[u8; 16]>,
}

/// Begins a disk. Sent again for the same name, it begins that disk anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// Bytes.
    pub length: u64,
    /// Where it is read from, for people.
    pub source: String,
    /// What records, from this moment on, what the next restore point has to read.
    pub tracking: Option<Tracking>,
    /// What is said of its changes.
    pub said: Option<Said>,
}

/// A record of changed areas that somebody else keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracking {
    pub method: String,
    pub id: String,
    pub scope: String,
}

/// Somebody's word on what changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub method: String,
    pub id: String,
    /// Since the restore point of that number; `None` if since the newest, whose disk has to name this very record.
    pub since: Option<u32>,
}

/// What is to become of the clusters of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// They have these contents.
    Read,
    /// They are said to be as they were, and were read to see whether that is true.
    Check,
    /// They are as they were.
    Keep,
    /// They are all zeros now.
    Clear,
}

impl Task {
    fn number(self) -> u8 {
        match self {
            Task::Read => 0,
            Task::Check => 1,
            Task::Keep => 2,
            Task::Clear => 3,
        }
    }

    fn of(number: u8) -> Option<Task> {
        [Task::Read, Task::Check, Task::Keep, Task::Clear].into_iter().find(|task| task.number() == number)
    }

    /// Whether the clusters' contents are told.
    pub fn has_contents(self) -> bool {
        matches!(self, Task::Read | Task::Check)
    }
}

/// A run of clusters of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Counts the offers of a disk in the order of the disk, from 0. They may come in another order.
    pub sequence: u64,
    pub first: u64,
    pub count: u64,
    pub task: Task,
    /// BLAKE3 of each cluster, `None` for one that is all zeros. Empty where contents are not told.
    pub clusters: Vec<Option<[u8; HASH]>>,
}

/// The contents that were needed of an offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    pub sequence: u64,
    /// Of each cluster that was needed, in order: its frames, as `docs/FORMAT.md` has them.
    pub frames: Vec<Vec<u8>>,
}

/// Ends a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskEnd {
    /// How many offers there were.
    pub offers: u64,
}

/// Makes the restore point exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// How long the source was at it.
    pub duration_ms: u64,
    pub definition: Option<Definition>,
    pub warnings: Vec<String>,
}

/// The VM's definition as the hypervisor has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    pub file_name: String,
    pub text: String,
}

impl Tracking {
    pub(super) fn put(&self, out: &mut Out) {
        out.text(&self.method).text(&self.id).text(&self.scope);
    }

    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Tracking, Violation> {
        let mut text = || fields.text("the name of a record of changes", MAX_TEXT);
        Ok(Tracking { method: text()?, id: text()?, scope: text()? })
    }
}

impl Said {
    fn put(&self, out: &mut Out) {
        out.text(&self.method).text(&self.id).u32(self.since.unwrap_or(0));
    }

    fn take(fields: &mut Fields<'_>) -> Result<Said, Violation> {
        let mut text = || fields.text("the name of a record of changes", MAX_TEXT);
        let (method, id) = (text()?, text()?);
        Ok(Said { method, id, since: Some(fields.u32()?).filter(|number| *number > 0) })
    }
}

impl Offer {
    fn put(&self, out: &mut Out) {
        out.u64(self.sequence).u64(self.first).u64(self.count).u8(self.task.number());
        if self.task.has_contents() {
            let hole = |(at, cluster): (usize, &Option<_>)| if cluster.is_none() { 1 << at } else { 0 };
            out.u16(self.clusters.iter().enumerate().map(hole).fold(0, |bits, bit| bits | bit));
            for hash in self.clusters.iter().flatten() {
                out.bytes(hash);
            }
        }
    }

    fn take(fields: &mut Fields<'_>) -> Result<Offer, Violation> {
        let (sequence, first, count) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let number = fields.u8()?;
        let task = Task::of(number).ok_or(Violation::Value { what: "a task", value: number.into() })?;
        if count == 0 || first.checked_add(count).is_none() {
            return Err(Violation::Value { what: "the number of clusters of an offer", value: count });
        }
        let mut clusters = Vec::new();
        if task.has_contents() {
            let count = usize::try_from(count).ok().filter(|count| *count <= MAX_CLUSTERS);
            let count = count.ok_or(Violation::Value { what: "the number of clusters of an offer", value: first })?;
            let holes = fields.u16()?;
            if u32::from(holes) >> count != 0 {
                return Err(Violation::Value { what: "the holes of an offer", value: holes.into() });
            }
            for at in 0..count {
                clusters.push(if holes >> at & 1 == 1 { None } else { Some(fields.array()?) });
            }
        }
        Ok(Offer { sequence, first, count, task, clusters })
    }
}

impl Data {
    fn put(&self, out: &mut Out) {
        out.0.reserve(self.frames.iter().map(|frames| frames.len() + 4).sum::<usize>() + 12);
        out.u64(self.sequence).list(&self.frames, |out, frames| {
            out.u32(length32(frames.len())).bytes(frames);
        });
    }

    fn take(fields: &mut Fields<'_>) -> Result<Data, Violation> {
        let sequence = fields.u64()?;
        let frames = fields.list("the clusters of data", MAX_CLUSTERS, |fields| {
            let length = fields.count("the frames of a cluster", MAX_FRAMES)?;
            // Sealed in place later, which takes the tag's bytes more.
            let mut frames = Vec::with_capacity(length + 16);
            frames.extend_from_slice(fields.bytes(length)?);
            Ok(frames)
        })?;
        Ok(Data { sequence, frames })
    }
}

/// The message [`Data`] in the making: frames are written to where they are sent from.
pub struct DataMessage {
    message: Vec<u8>,
    clusters: u32,
}

impl DataMessage {
    /// Where the number of clusters stands.
    const COUNT: usize = HEADER_LENGTH + 8;

    /// One without clusters yet, in a buffer that may have been used before.
    pub fn new(sequence: u64, mut buffer: Vec<u8>) -> DataMessage {
        buffer.clear();
        let mut out = Out(buffer);
        out.bytes(&[kind::DATA, 0, 0, 0, 0, 0, 0, 0]).u64(sequence).u32(0);
        DataMessage { message: out.0, clusters: 0 }
    }

    /// The next cluster: what `put` appends is its frames. How many bytes these have.
    pub fn cluster(&mut self, put: impl FnOnce(&mut Vec<u8>)) -> usize {
        let at = self.message.len();
        self.message.extend_from_slice(&[0; 4]);
        put(&mut self.message);
        let length = self.message.len() - at - 4;
        self.message[at..at + 4].copy_from_slice(&length32(length).to_be_bytes());
        self.clusters += 1;
        length
    }

    /// The whole message.
    pub fn finish(mut self) -> Vec<u8> {
        self.message[Self::COUNT..Self::COUNT + 4].copy_from_slice(&self.clusters.to_be_bytes());
        finish(&mut self.message);
        self.message
    }
}

impl Commit {
    fn put(&self, out: &mut Out) {
        out.u64(self.duration_ms);
        out.option(self.definition.as_ref(), |out, definition| {
            out.line(&definition.file_name, MAX_TEXT).text(&definition.text);
        });
        let warnings = &self.warnings[..self.warnings.len().min(MAX_WARNINGS)];
        out.list(warnings, |out, warning| {
            out.line(warning, MAX_TEXT);
        });
    }

    fn take(fields: &mut Fields<'_>) -> Result<Commit, Violation> {
        let duration_ms = fields.u64()?;
        let definition = fields.option("whether there is a definition", |fields| {
            let file_name = fields.line("the file name of a definition", MAX_TEXT)?;
            Ok(Definition { file_name, text: fields.text("a definition", MAX_DEFINITION)? })
        })?;
        let warnings = fields.list("the warnings", MAX_WARNINGS, |fields| fields.line("a warning", MAX_TEXT))?;
        Ok(Commit { duration_ms, definition, warnings })
    }
}

impl FromSource {
    /// The whole message.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            FromSource::Hello(hello) => message(kind::HELLO, |out| {
                out.bytes(MAGIC).u16(hello.version).line(&hello.software, MAX_NAME);
            }),
            FromSource::Begin(begin) => message(kind::BEGIN, |out| {
                out.text(&begin.vm).option(begin.resume.as_ref(), |out, point| {
                    out.bytes(point);
                });
            }),
            FromSource::Disk(disk) => message(kind::DISK, |out| {
                out.text(&disk.name).u64(disk.length).line(&disk.source, MAX_TEXT);
                out.option(disk.tracking.as_ref(), |out, tracking| tracking.put(out));
                out.option(disk.said.as_ref(), |out, said| said.put(out));
            }),
            FromSource::Offer(offer) => message(kind::OFFER, |out| offer.put(out)),
            FromSource::Data(data) => message(kind::DATA, |out| data.put(out)),
            FromSource::DiskEnd(end) => message(kind::DISK_END, |out| {
                out.u64(end.offers);
            }),
            FromSource::Close => message(kind::CLOSE, |_| {}),
            FromSource::Commit(commit) => message(kind::COMMIT, |out| commit.put(out)),
            FromSource::Alive => message(kind::ALIVE, |_| {}),
            FromSource::Trouble(trouble) => message(kind::TROUBLE, |out| trouble.put(out)),
            FromSource::Renew(renew) => message(kind::RENEW, |out| renew.put(out)),
            FromSource::ListVms(list) => message(kind::LIST_VMS, |out| list.put(out)),
            FromSource::ListPoints(list) => message(kind::LIST_POINTS, |out| list.put(out)),
            FromSource::Show(show) => message(kind::SHOW, |out| show.put(out)),
        }
    }

    /// The message that a payload of exactly the header's length is.
    pub fn decode(header: Header, payload: &[u8]) -> Result<FromSource, Violation> {
        let mut fields = Fields::of("a message of the source", payload);
        let decoded = match header.kind {
            kind::HELLO => {
                if fields.array::<8>()? != *MAGIC {
                    return Err(Violation::Magic);
                }
                let version = fields.u16()?;
                if version != super::VERSION {
                    // What else is in it is of that version.
                    return Ok(FromSource::Hello(Hello { version, software: String::new() }));
                }
                FromSource::Hello(Hello { version, software: fields.line("the name of a program", MAX_NAME)? })
            }
            kind::BEGIN => FromSource::Begin(Begin {
                vm: fields.text("the name of a VM", MAX_NAME)?,
                resume: fields.option("whether to resume", Fields::array)?,
            }),
            kind::DISK => FromSource::Disk(Disk {
                name: fields.text("the name of a disk", MAX_NAME)?,
                length: fields.u64()?,
                source: fields.line("the source of a disk", MAX_TEXT)?,
                tracking: fields.option("whether there is a record of changes", Tracking::take)?,
                said: fields.option("whether changes are told", Said::take)?,
            }),
            kind::OFFER => FromSource::Offer(Offer::take(&mut fields)?),
            kind::DATA => FromSource::Data(Data::take(&mut fields)?),
            kind::DISK_END => FromSource::DiskEnd(DiskEnd { offers: fields.u64()? }),
            kind::CLOSE => FromSource::Close,
            kind::COMMIT => FromSource::Commit(Commit::take(&mut fields)?),
            kind::ALIVE => FromSource::Alive,
            kind::TROUBLE => FromSource::Trouble(Trouble::take(&mut fields)?),
            kind::RENEW => FromSource::Renew(Renew::take(&mut fields)?),
            kind::LIST_VMS => FromSource::ListVms(ListVms::take(&mut fields)?),
            kind::LIST_POINTS => FromSource::ListPoints(ListPoints::take(&mut fields)?),
            kind::SHOW => FromSource::Show(Show::take(&mut fields)?),
            kind => return Err(Violation::Kind { kind }),
        };
        fields.end()?;
        Ok(decoded)
    }
}
