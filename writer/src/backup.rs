//! A backup from its sources to its manifest.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reseal_format::ids::{Digest, PointId, VmId};
use reseal_format::keys::Kind;
use reseal_format::layout::MAX_NUMBER;
use reseal_format::manifest::{Claim, Definition, Disk, MAX_TEXT, Manifest, Parent, Stats, Tracking};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_vault::heads::Heads;
use reseal_vault::{Holder, PackFile, Packs, Quota, Tenant, Tree, VaultError, random};

use crate::BackupError;
use crate::assemble::Assembler;
use crate::changes::Changes;
use crate::finisher::Finisher;
use crate::known::Known;
use crate::live::Hypervisor;
use crate::lookup::{Lookup, lookup_folder};
use crate::nbd::{NbdUri, Options};
use crate::pipeline::{Job, Told};
use crate::plan::Sample;
use crate::source::{NbdSource, Source};
use crate::throttle::Throttle;
pub use crate::worker::Encoding;

/// Bytes of pack tables and of index nodes that a backup keeps.
const TABLES: usize = 128 << 20;
const NODES: usize = 16 << 20;
/// How far the newest point may be ahead of the clock before it is worth a warning.
const MAX_AHEAD_MS: i64 = 60_000;

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
    pub tenant: Arc<Tenant>,
    pub heads: &'a Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
    pub vm: VmName,
    pub disks: Disks,
    pub definition: Option<Definition>,
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

/// A restore point that was made.
#[derive(Debug)]
pub struct Backed {
    pub manifest: Manifest,
    /// Digest of the manifest's plaintext.
    pub digest: Digest,
    /// Why this machine could not remember it, if so.
    pub not_remembered: Option<VaultError>,
}

/// What the chain says about the next point.
struct Position {
    number: u32,
    vm_id: VmId,
    parent: Option<Parent>,
    /// The newest live point, against which changes are found.
    newest: Option<Manifest>,
    not_before: Timestamp,
}

impl Position {
    fn disk(&self, name: &DiskName) -> Option<&Disk> {
        self.newest.iter().flat_map(|newest| &newest.disks).find(|disk| disk.name == *name)
    }
}

/// What a backup works with once it has begun.
struct Run<'a> {
    position: Position,
    known: Arc<Known>,
    finisher: &'a Finisher,
    assembler: Assembler<'a>,
    warnings: Vec<String>,
}

/// What is said of a disk, and is believed.
struct Believed {
    told: Told,
    /// The disk of the restore point since which it is said.
    base: Disk,
    claim: Claim,
}

impl Backup<'_> {
    /// Makes one restore point.
    pub fn run(mut self) -> Result<Backed, BackupError> {
        let began = Instant::now();
        // Before the record is read on which all that follows relies.
        let _lease = self.tenant.lease(&Holder::this_process(format!("backup of {}", self.vm)))?;
        self.tenant.refresh()?;
        self.tenant.settle_new_epoch()?;
        self.tenant.store().sweep().map_err(VaultError::from)?;
        let position = self.position().map_err(|e| match e {
            BackupError::Vault(source) if source.damaged_object().is_some() => BackupError::Newest { source },
            other => other,
        })?;
        let point_id = PointId::from_bytes(random()?);
        let (known, no_lookup) = self.known()?;
        let known = Arc::new(known);
        let quota = self.quota(&known)?;
        if let Some(quota) = &quota {
            quota.check(0, 0)?;
        }
        let finisher = Finisher::new(known.clone(), quota);
        let assembler = Assembler::new(self.tenant.clone(), &finisher);
        let mut run = Run { position, known, finisher: &finisher, assembler, warnings: Vec::from_iter(no_lookup) };
        let disks = std::mem::replace(&mut self.disks, Disks::Given(Vec::new()));
        let (manifest, digest) = match disks {
            Disks::Given(inputs) => self.commit(&mut run, point_id, began, inputs, &mut || Ok(()))?,
            Disks::Live(Live { mut hypervisor, options, check_percent }) => {
                let made = self.live(&mut run, point_id, began, &mut *hypervisor, &options, check_percent);
                let left = hypervisor.end(made.is_ok());
                let made = made?;
                // The point is made; what the hypervisor still holds is for the administrator to know.
                left.iter().for_each(|warning| (self.say)(warning));
                made
            }
        };
        // The point exists, whatever becomes of the memory of it.
        let remembered = self.heads.remember(self.tenant.record_generation(), &[(self.vm, manifest.number)]);
        Ok(Backed { manifest, digest, not_remembered: remembered.err() })
    }

    /// Makes a restore point of a running VM.
    fn live(
        &mut self,
        run: &mut Run<'_>,
        point: PointId,
        began: Instant,
        hypervisor: &mut dyn Hypervisor,
        options: &Options,
        check_percent: f64,
    ) -> Result<(Manifest, Digest), BackupError> {
        let snapshot = hypervisor.begin(point, run.position.newest.as_ref())?;
        // An export on this machine that is gone will not be back: its moment is over.
        let options = &Options { give_up: LOST, ..options.clone() };
        run.warnings.extend(snapshot.warnings);
        if self.definition.is_none() {
            self.definition = snapshot.definition;
        }
        let mut inputs = Vec::with_capacity(snapshot.disks.len());
        for disk in snapshot.disks {
            let before = run.position.disk(&disk.name);
            let uri = NbdUri::unix(&disk.socket, &disk.export);
            let export = NbdSource::open(&uri, options, disk.changes.as_deref().ok())?.named(disk.source);
            let said = match (disk.changes, before) {
                (Ok(_), Some(Disk { tracking: Some(tracking), .. })) => {
                    let (method, id) = (tracking.method.clone(), tracking.id.clone());
                    Some(Said { method, id, since: Since::Tracked, changes: None, check_percent })
                }
                (Ok(_), _) => None,
                (Err(why), Some(_)) => {
                    run.warnings.push(format!("{}: everything was read: {why}", disk.name));
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
        let made = self.commit(run, point, began, inputs, &mut || hypervisor.check());
        match made {
            // What became of the VM says more than that its connection ended.
            Err(e @ (BackupError::Nbd(_) | BackupError::Disconnected)) => Err(hypervisor.check().err().unwrap_or(e)),
            other => other,
        }
    }

    /// Reads the disks and commits the point, unless `check` finds that they were not those of one moment.
    fn commit(
        &mut self,
        run: &mut Run<'_>,
        point_id: PointId,
        began: Instant,
        inputs: Vec<Input>,
        check: &mut dyn FnMut() -> Result<(), BackupError>,
    ) -> Result<(Manifest, Digest), BackupError> {
        let mut disks = Vec::with_capacity(inputs.len());
        for input in &inputs {
            disks.push(self.disk(run, input)?);
        }
        check()?;
        run.assembler.close()?;
        for input in &inputs {
            run.warnings.extend(input.source.warnings()?.into_iter().map(|text| format!("{}: {text}", input.name)));
        }
        let clock = now()?;
        let created = clock.max(Timestamp(run.position.not_before.0 + 1));
        if created.0 - clock.0 > MAX_AHEAD_MS {
            let ahead = "but the restore point before this one is later";
            run.warnings.push(format!("this machine's clock says {clock}, {ahead}"));
        }
        let stored = run.finisher.wait()?;
        if stored > 0
            && let Some(quota) = self.quota(&run.known)?
        {
            // What others have stored meanwhile counts too.
            quota.check(0, 0)?;
        }
        let counted = run.assembler.counted;
        let stats = Stats {
            read: counted.read,
            changed: counted.changed,
            new: counted.new,
            stored,
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let manifest = Manifest {
            vm: self.vm.clone(),
            vm_id: run.position.vm_id,
            number: run.position.number,
            point_id,
            created,
            parent: run.position.parent,
            disks,
            definition: self.definition.take(),
            stats,
            warnings: std::mem::take(&mut run.warnings),
        };
        // Packs take a while to become durable: only now is it known that the moment held until the end.
        check()?;
        let digest = self.tenant.commit(&manifest)?;
        Ok((manifest, digest))
    }

    /// Reads one disk.
    fn disk(&self, run: &mut Run<'_>, input: &Input) -> Result<Disk, BackupError> {
        let Input { name, source, said, tracking } = input;
        let believed = match said {
            None => None,
            Some(said) => match self.believe(run, name, source, said)? {
                Ok(believed) => Some(believed),
                // That the first restore point reads everything needs no reason.
                Err(_) if run.position.newest.is_none() => None,
                Err(why) => {
                    run.warnings.push(format!("{name}: everything was read: {why}"));
                    None
                }
            },
        };
        let before = run.assembler.counted;
        let (known, parent) = (run.known.clone(), run.position.disk(name).cloned());
        let job = Job {
            source,
            known: &known,
            parent: parent.as_ref(),
            told: None,
            encoding: self.encoding,
            workers: self.workers,
            throttle: self.throttle.as_ref(),
            progress: self.progress,
        };
        let mut claim = None;
        let made = match believed {
            None => job.run(&mut run.assembler)?,
            Some(Believed { told, base, claim: said }) => {
                let quick = Job { parent: Some(&base), told: Some(&told), ..job };
                match quick.run(&mut run.assembler) {
                    Ok(made) => {
                        let counted = run.assembler.counted;
                        let (changed, checked) = (counted.told - before.told, counted.checked - before.checked);
                        claim = Some(Claim { changed: changed.min(source.length()), checked, ..said });
                        made
                    }
                    Err(BackupError::Distrusted { why }) => {
                        run.warnings
                            .push(format!("{name}: {} {} was wrong: {why}; everything was read", said.method, said.id));
                        // What the first try took for changed is counted anew.
                        run.assembler.counted.changed = before.changed;
                        job.run(&mut run.assembler)?
                    }
                    Err(e) => return Err(e),
                }
            }
        };
        let (root, used_clusters) = made;
        Ok(Disk {
            name: name.clone(),
            length: source.length(),
            root,
            used_clusters,
            source: source.name().chars().take(MAX_TEXT / 4).collect(),
            tracking: tracking.clone(),
            claim,
        })
    }

    /// Whether what is said of a disk's changes can be used; otherwise why not.
    fn believe(
        &self,
        run: &Run<'_>,
        name: &DiskName,
        source: &Source,
        said: &Said,
    ) -> Result<Result<Believed, String>, BackupError> {
        let Said { method, id, since, changes, check_percent } = said;
        let newest = run.position.newest.as_ref();
        let older = match (since, newest) {
            (Since::Number(number), Some(newest)) if *number != newest.number => {
                Some(self.tenant.point(&self.vm, *number)?.manifest)
            }
            _ => None,
        };
        let Some(point) = older.as_ref().or(newest) else { return Ok(Err("there is no restore point yet".into())) };
        let known = format!("{}@{}", self.vm, point.number);
        let Some(base) = point.disks.iter().find(|disk| disk.name == *name) else {
            return Ok(Err(format!("{known} has no such disk")));
        };
        let tracked = |tracking: &Tracking| tracking.method == *method && tracking.id == *id;
        if *since == Since::Tracked && !base.tracking.as_ref().is_some_and(tracked) {
            let recorded = match &base.tracking {
                Some(tracking) => format!("recorded {} {}", tracking.method, tracking.id),
                None => "recorded nothing to tell changes since".to_owned(),
            };
            return Ok(Err(format!("{method} {id} tells changes since another moment: {known} {recorded}")));
        }
        if base.length != source.length() {
            return Ok(Err(format!("the disk had {} bytes in {known} and has {}", base.length, source.length())));
        }
        let areas = match changes.as_ref().map(|changes| changes.of_disk(source.length())).transpose() {
            Ok(areas) => areas,
            Err(why) => return Ok(Err(why)),
        };
        let always = run.known.not_to_be_kept(base)?;
        let sample = Sample::percent(*check_percent, u64::from_le_bytes(random()?));
        let claim = Claim { method: method.clone(), id: id.clone(), since: point.number, changed: 0, checked: 0 };
        Ok(Ok(Believed { told: Told { areas, always, sample }, base: base.clone(), claim }))
    }

    fn position(&self) -> Result<Position, BackupError> {
        let chain = self.heads.whole_chain(&self.tenant, &self.vm)?;
        let newest = match self.tenant.newest(&self.vm, &chain)? {
            Some(number) => Some(self.tenant.point(&self.vm, number)?),
            None => None,
        };
        let number = chain.last().checked_add(1).filter(|number| *number <= MAX_NUMBER);
        let number = number.ok_or_else(|| BackupError::Usage(format!("{} has no more numbers to give", self.vm)))?;
        let Some((parent, point)) = self.tenant.parent_of_next(&self.vm, &chain)? else {
            let vm_id = VmId::from_bytes(random().map_err(BackupError::from)?);
            return Ok(Position { number, vm_id, parent: None, newest: None, not_before: Timestamp(0) });
        };
        let (vm_id, not_before) = match (&point, &newest) {
            (Some(point), _) => (point.manifest.vm_id, point.manifest.created),
            (None, newest) => {
                let tombstone = self.tenant.tombstone(&self.vm, parent.number)?;
                let live = newest.as_ref().map_or(Timestamp(0), |point| point.manifest.created);
                (tombstone.vm_id, tombstone.created.max(live))
            }
        };
        Ok(Position { number, vm_id, parent: Some(parent), newest: newest.map(|point| point.manifest), not_before })
    }

    /// The tenant's quota, if it has one, beside what the vault has now.
    fn quota(&self, known: &Known) -> Result<Option<Quota>, VaultError> {
        match self.tenant.keys().quota() {
            Some(_) => Ok(Quota::of(&self.tenant, &known.packs.list()?)),
            None => Ok(None),
        }
    }

    /// Opens what is known. A backup without a lookup is right, only larger, which is said.
    fn known(&self) -> Result<(Known, Option<String>), BackupError> {
        let packs = Arc::new(Packs::new(self.tenant.clone(), TABLES));
        let tree = Tree::new(packs.clone(), NODES);
        let folder = lookup_folder(&self.state, &self.tenant.keys().scope());
        let opened = Lookup::open(&folder).and_then(|lookup| Ok((lookup, lookup.damaged()?, lookup.packs()?)));
        let (lookup, damaged, held) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                let folder = folder.display();
                let warning = format!(
                    "the lookup in {folder} can't be used ({e}): clusters that only other VMs have were stored again"
                );
                return Ok((Known { packs, tree, lookup: None, damaged: HashSet::new() }, Some(warning)));
            }
        };
        // What it held before the listing and is not in it is gone; what others learnt meanwhile is not. Of a pack that is
        // being rewritten only the newest generation counts, for the other is about to go.
        let mut present = packs.list()?;
        present.sort_by_key(|pack| (pack.id, Reverse(pack.generation)));
        present.dedup_by_key(|pack| pack.id);
        let names: BTreeSet<_> = present.iter().map(|pack| (pack.id, pack.generation)).collect();
        let gone: Vec<_> = held.difference(&names).map(|(id, _)| *id).collect();
        let unknown: Vec<_> = present.into_iter().filter(|pack| !held.contains(&(pack.id, pack.generation))).collect();
        if !gone.is_empty() {
            let _ = lookup.forget(gone.into_iter());
        }
        packs.settle(&unknown)?;
        for pack in unknown {
            learn(&packs, &lookup, pack)?;
        }
        Ok((Known { packs, tree, lookup: Some(lookup), damaged }, None))
    }
}

/// Lets the lookup learn a pack that it does not know: one of another machine, or one that an aborted backup left.
fn learn(packs: &Packs, lookup: &Lookup, pack: PackFile) -> Result<(), VaultError> {
    let handle = match packs.open_generation(pack.id, pack.generation) {
        Ok(handle) => handle,
        // A backup without the tenant's new keys would go on sealing under the old.
        Err(e @ VaultError::NoNewKeys { .. }) => return Err(e),
        // A damaged pack is nothing to deduplicate against; `verify` reports it.
        Err(_) => return Ok(()),
    };
    let ids = match handle.trailer().kind {
        Kind::DataPack => packs.read_ids(&handle),
        _ => Ok(Vec::new()),
    };
    if let Ok(ids) = ids {
        // What it does not learn now, the next backup will.
        let _ = lookup.learn(pack.id, pack.generation, &ids);
    }
    Ok(())
}

/// The time, in milliseconds since 1970.
fn now() -> Result<Timestamp, BackupError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = since.ok().and_then(|since| i64::try_from(since.as_millis()).ok()).map(Timestamp);
    millis
        .filter(|time| time.is_sane())
        .ok_or_else(|| BackupError::Usage("this machine's clock is outside the years 1970 to 9999; set it".into()))
}
