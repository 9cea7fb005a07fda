//! A backup from its sources to its manifest: what is left of ┃, whoever is on the other side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_format::ids::{Digest, PointId};
use reseal_format::manifest::{Definition, Disk, MAX_TEXT, Manifest, Tracking};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_vault::heads::Heads;
use reseal_vault::{Tenant, VaultError, random};

use crate::BackupError;
use crate::changes::Changes;
use crate::draft::{Draft, Made};
use crate::live::Hypervisor;
use crate::pipeline::{Job, Told};
use crate::plan::Sample;
use crate::remote::{Remote, Sent};
use crate::source::{NbdSource, Source};
use crate::target::{Asked, DiskFacts, Ending, Start, Target};
use crate::throttle::Throttle;
pub use crate::worker::Encoding;
use reseal_nbd::{NbdUri, Options};
use reseal_site::Enrolment;

/// A disk to back up, and what is said of its changes.
pub struct Input {
    pub name: DiskName,
    pub source: Source,
    /// Who says what changed, so that the rest needs no reading.
    pub said: Option<Said>,
    /// What records, from this moment on, what the next restore point has to read.
    pub tracking: Option<Tracking>,
}

/// Somebody's word on what changed.
#[derive(Debug, Clone)]
pub struct Said {
    /// One of [`reseal_format::manifest::method`].
    pub method: String,
    /// Its name: of the bitmap or checkpoint, or the change id.
    pub id: String,
    pub since: Since,
    /// A list of areas; `None` if the source tells with its extents.
    pub changes: Option<Changes>,
    /// What is read of the rest, in percent, to see whether it is true.
    pub check_percent: f64,
}

/// Since when somebody tells the changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// Since the newest restore point, whose disk recorded this name for them.
    Tracked,
    /// Since the restore point of that number: the user says so.
    Number(u32),
}

/// The disks of a restore point.
pub enum Disks {
    /// Each is read from where it is.
    Given(Vec<Input>),
    /// The hypervisor of a running VM shows them as they were at one moment.
    Live(Live),
}

/// A running VM.
pub struct Live {
    pub hypervisor: Box<dyn Hypervisor>,
    /// How its exports are read.
    pub options: Options,
    /// What is read of what it calls unchanged, in percent.
    pub check_percent: f64,
}

/// How long a connection to a running VM's export is tried to be made again.
const LOST: Duration = Duration::from_secs(2);

/// What to back up, and how.
pub struct Backup<'a> {
    pub vm: VmName,
    pub disks: Disks,
    pub definition: Option<Definition>,
    /// The restore point that it is to be a copy of.
    pub copy_of: Option<CopyOf>,
    pub encoding: Encoding,
    pub workers: usize,
    pub throttle: Option<Throttle>,
    /// Told of bytes read.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Told how many bytes there will be more than was known before.
    pub expect: &'a dyn Fn(u64),
    /// Told what the administrator should know, but which is no part of the restore point.
    pub say: &'a dyn Fn(&str),
}

/// What a copy has of the restore point that it is of.
#[derive(Debug, Clone)]
pub struct CopyOf {
    pub point: PointId,
    pub created: Timestamp,
    pub warnings: Vec<String>,
}

/// The vault that a backup goes to, where its keys are in this process.
pub struct Vault<'a> {
    pub tenant: Arc<Tenant>,
    pub heads: &'a Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
}

/// A restore point that was made.
#[derive(Debug)]
pub struct Backed {
    pub manifest: Manifest,
    /// Digest of the manifest's plaintext.
    pub digest: Digest,
    /// Why this machine could not remember it, if so.
    pub not_remembered: Option<VaultError>,
}

impl Backup<'_> {
    /// Makes one restore point in a vault.
    pub fn run(mut self, to: Vault<'_>) -> Result<Backed, BackupError> {
        let what = format!("backup of {}", self.vm);
        let began = Instant::now();
        let mut draft = Draft::new(to.tenant, to.heads.clone(), &to.state, self.vm.clone(), what)?;
        if let Some(of) = self.copy_of.take() {
            draft.copy(of)?;
        }
        self.make(&mut draft, began)?;
        let Some(Made { manifest, digest, not_remembered }) = draft.into_made() else {
            return Err(BackupError::Thread);
        };
        Ok(Backed { manifest, digest, not_remembered })
    }

    /// Makes one restore point at another site.
    pub fn send(mut self, to: &Enrolment) -> Result<Sent, BackupError> {
        let began = Instant::now();
        let mut remote = Remote::connect(to, &self.vm, self.say)?;
        self.make(&mut remote, began)?;
        remote.into_sent()
    }

    fn make(&mut self, target: &mut dyn Target, began: Instant) -> Result<(), BackupError> {
        match std::mem::replace(&mut self.disks, Disks::Given(Vec::new())) {
            Disks::Given(inputs) => self.commit(target, began, &inputs, Vec::new(), &mut || Ok(())),
            Disks::Live(Live { mut hypervisor, options, check_percent }) => {
                let made = self.live(target, began, &mut *hypervisor, &options, check_percent);
                let left = hypervisor.end(made.is_ok());
                made?;
                // The point is made; what the hypervisor still holds is for the administrator to know.
                left.iter().for_each(|warning| (self.say)(warning));
                Ok(())
            }
        }
    }

    /// Makes a restore point of a running VM.
    fn live(
        &mut self,
        target: &mut dyn Target,
        began: Instant,
        hypervisor: &mut dyn Hypervisor,
        options: &Options,
        check_percent: f64,
    ) -> Result<(), BackupError> {
        let snapshot = hypervisor.begin(target.point(), target.newest())?;
        // An export on this machine that is gone will not be back: its moment is over.
        let options = &Options { give_up: LOST, ..options.clone() };
        let mut warnings = snapshot.warnings;
        if self.definition.is_none() {
            self.definition = snapshot.definition;
        }
        let mut inputs = Vec::with_capacity(snapshot.disks.len());
        for disk in snapshot.disks {
            let newest = target.newest().into_iter().flat_map(|newest| &newest.disks);
            let before = newest.into_iter().find(|before| before.name == disk.name);
            let uri = NbdUri::unix(&disk.socket, &disk.export);
            let export = NbdSource::open(&uri, options, disk.changes.as_deref().ok())?.named(disk.source);
            let said = match (disk.changes, before) {
                (Ok(_), Some(Disk { tracking: Some(tracking), .. })) => {
                    let (method, id) = (tracking.method.clone(), tracking.id.clone());
                    Some(Said { method, id, since: Since::Tracked, changes: None, check_percent })
                }
                (Ok(_), _) => None,
                (Err(why), Some(_)) => {
                    warnings.push(format!("{}: everything was read: {why}", disk.name));
                    None
                }
                // Nothing was there before, so that everything is read needs no reason.
                (Err(_), None) => None,
            };
            inputs.push(Input {
                name: disk.name,
                source: Source::Nbd(Box::new(export)),
                said,
                tracking: disk.tracking,
            });
        }
        (self.expect)(inputs.iter().map(|input| input.source.expected()).sum());
        match self.commit(target, began, &inputs, warnings, &mut || hypervisor.check()) {
            // What became of the VM says more than that its connection ended.
            Err(e @ (BackupError::Nbd(_) | BackupError::Disconnected)) => Err(hypervisor.check().err().unwrap_or(e)),
            other => other,
        }
    }

    /// Reads the disks and commits the point, unless `check` finds that they were not those of one moment. Where the other
    /// side was lost and found again, that is done once more.
    fn commit(
        &self,
        target: &mut dyn Target,
        began: Instant,
        inputs: &[Input],
        warnings: Vec<String>,
        check: &mut dyn FnMut() -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        while !target.is_made() {
            match self.try_commit(target, began, inputs, warnings.clone(), check) {
                Err(e) if target.recover(&e)? => {}
                other => return other,
            }
        }
        Ok(())
    }

    fn try_commit(
        &self,
        target: &mut dyn Target,
        began: Instant,
        inputs: &[Input],
        mut warnings: Vec<String>,
        check: &mut dyn FnMut() -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        for input in inputs {
            self.disk(target, input, &mut warnings)?;
        }
        check()?;
        for input in inputs {
            warnings.extend(input.source.warnings()?.into_iter().map(|text| format!("{}: {text}", input.name)));
        }
        target.close()?;
        // Packs take a while to become durable: only now is it known that the moment held until the end.
        check()?;
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        target.commit(Ending { definition: self.definition.clone(), warnings, duration_ms })
    }

    /// Reads one disk.
    fn disk(&self, target: &mut dyn Target, input: &Input, warnings: &mut Vec<String>) -> Result<(), BackupError> {
        let Input { name, source, said, tracking } = input;
        let facts = DiskFacts {
            name: name.clone(),
            length: source.length(),
            source: source.name().chars().take(MAX_TEXT / 4).collect(),
            tracking: tracking.clone(),
        };
        let job = Job {
            source,
            told: None,
            encoding: self.encoding,
            workers: self.workers,
            throttle: self.throttle.as_ref(),
            progress: self.progress,
        };
        let (start, asked) = match said.as_ref().map(|said| said.ask(source.length())) {
            None => (target.begin(facts.clone(), None)?, None),
            Some(Ok(asked)) => (target.begin(facts.clone(), Some(asked.clone()))?, Some(asked)),
            Some(Err(why)) => {
                let why = target.newest().is_some().then_some(why);
                target.begin(facts.clone(), None)?;
                (Start::Whole(why), None)
            }
        };
        let always = match start {
            Start::Since { always } => always,
            Start::Whole(why) => {
                warnings.extend(why.map(|why| format!("{name}: everything was read: {why}")));
                return target.read(&job);
            }
        };
        let told = said.as_ref().map(|said| said.told(source.length(), always)).transpose()?;
        match target.read(&Job { told: told.as_ref(), ..job }) {
            Err(BackupError::Distrusted { why }) => {
                let asked = asked.map(|asked| format!("{} {}", asked.method, asked.id)).unwrap_or_default();
                warnings.push(format!("{name}: {asked} was wrong: {why}; everything was read"));
                target.begin(facts, None)?;
                target.read(&job)
            }
            other => other,
        }
    }
}

impl Said {
    /// What the target is asked about a disk of that length; or why there is nothing to ask.
    fn ask(&self, length: u64) -> Result<Asked, String> {
        self.changes.as_ref().map(|changes| changes.of_disk(length)).transpose()?;
        let since = match self.since {
            Since::Tracked => None,
            Since::Number(number) => Some(number),
        };
        Ok(Asked { method: self.method.clone(), id: self.id.clone(), since })
    }

    /// What is to be read because of it.
    fn told(&self, length: u64, always: Vec<std::ops::Range<u64>>) -> Result<Told, BackupError> {
        let areas = self.changes.as_ref().map(|changes| changes.of_disk(length)).transpose();
        let areas = areas.map_err(|why| BackupError::Distrusted { why })?;
        let sample = Sample::percent(self.check_percent, u64::from_le_bytes(random()?));
        Ok(Told { areas, always, sample })
    }
}
