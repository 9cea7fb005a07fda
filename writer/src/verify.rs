//! Reads restore points, or everything of a tenant, back, and names what is damaged and which points that hurts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use reseal_format::ids::{Digest, PackId, VmId};
use reseal_format::layout;
use reseal_format::manifest::Manifest;
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_vault::heads::Heads;
use reseal_vault::{PackFile, Packs, Point, State, Tenant, Tree, VaultError};
use serde::Serialize;

use crate::BackupError;
use crate::lookup::{Lookup, lookup_folder};
use crate::throttle::Throttle;
use crate::verify_pack::{Findings, PackVerifier, damage};
use crate::walk::{Collector, Need, Needed, Tracer};

/// Bytes of tables and nodes that a verification keeps.
const TABLES: usize = 16 << 20;
const NODES: usize = 64 << 20;
/// Ordinals that are spelt out for one pack.
const MAX_SPELT: usize = 16;

/// What to verify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Every object of the tenant, unreferenced ones too.
    Everything,
    /// All points of a VM.
    Vm(VmName),
    /// One point.
    Point(VmName, u32),
}

/// How much of it is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Part {
    All,
    /// All but packs, and of these so many percent, rounded up: which ones follows from the seed.
    Sample {
        percent: f64,
        seed: u64,
    },
    /// Of packs what the restore points from then on need and none from before does.
    Since(Timestamp),
}

impl Part {
    /// Leaves out what is not read.
    pub(crate) fn choose<T>(self, packs: &mut Vec<T>, id: impl Fn(&T) -> PackId) {
        let Part::Sample { percent, seed } = self else { return };
        let lot = |pack: &T| {
            let hash = blake3::Hasher::new().update(&seed.to_le_bytes()).update(id(pack).as_bytes()).finalize();
            hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let mut lots: Vec<_> = packs.iter().map(&lot).collect();
        lots.sort_unstable();
        // A float is exact enough to count packs with.
        let share = percent * lots.len() as f64 / 100.0;
        let last = lots.iter().enumerate().take_while(|(nth, _)| (*nth as f64) < share).last().map(|(_, lot)| *lot);
        packs.retain(|pack| Some(lot(pack)) <= last);
    }
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub points: u64,
    pub packs: u64,
    pub blobs: u64,
    /// Bytes of packs that were read.
    pub bytes: u64,
    pub damaged: Vec<Damage>,
}

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Key of the object.
    pub object: String,
    pub what: String,
    /// Restore points that can't be read whole because of it, as `VM@NUMBER`.
    pub hurts: Vec<String>,
    /// The pack that it is, if it is one.
    #[serde(skip)]
    pub pack: Option<PackId>,
}

/// A verification in progress.
pub struct Verify<'a> {
    tenant: Arc<Tenant>,
    heads: &'a Heads,
    /// Folder for what this machine keeps.
    state: PathBuf,
    packs: Arc<Packs>,
    tree: Tree,
    report: Report,
    points: Vec<Point>,
    part: Part,
    /// Of packs only these, if they are named.
    only: Option<BTreeSet<PackId>>,
    throttle: Option<Throttle>,
}

impl<'a> Verify<'a> {
    /// Prepares to verify all of what will be said.
    pub fn new(tenant: Arc<Tenant>, heads: &'a Heads, state: &Path) -> Verify<'a> {
        let packs = Arc::new(Packs::new(tenant.clone(), TABLES));
        let tree = Tree::new(packs.clone(), NODES);
        let (report, points, part, only, throttle) = (Report::default(), Vec::new(), Part::All, None, None);
        Verify { tenant, heads, state: state.to_owned(), packs, tree, report, points, part, only, throttle }
    }

    /// Of that only a part, and what is read of packs is held to `throttle`.
    pub fn of_part(self, part: Part, throttle: Option<Throttle>) -> Verify<'a> {
        Verify { part, throttle, ..self }
    }

    /// Of packs only these, if they are named; all else is read.
    pub(crate) fn only(self, packs: Option<BTreeSet<PackId>>) -> Verify<'a> {
        Verify { only: packs, ..self }
    }

    /// Verifies on so many threads. `progress` is told how many bytes there are, and then of each that was read.
    pub fn run(
        mut self,
        what: &What,
        threads: usize,
        start: impl FnOnce(u64),
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Report, BackupError> {
        self.chains(what)?;
        let mut collector = Collector::default();
        let read = self.collect(&mut collector)?;
        collector.check()?;
        let mut files = self.files(what, &collector)?;
        let present: BTreeSet<PackId> = files.iter().map(|(file, _)| file.id).collect();
        let everything = *what == What::Everything && !matches!(self.part, Part::Since(_));
        if let Some(read) = &read {
            files.retain_mut(|(file, need)| {
                *need = need.and_then(|_| read.get(&file.id));
                need.is_some()
            });
        }
        self.part.choose(&mut files, |(file, _)| file.id);
        if let Some(only) = &self.only {
            files.retain(|(file, _)| only.contains(&file.id));
        }
        start(files.iter().map(|(file, _)| file.length).sum());
        let findings = self.verify_packs(&files, everything, threads, progress)?;
        let all = *what == What::Everything && self.part == Part::All && self.only.is_none();
        self.remember(&files, &findings, all);
        self.judge(&files, findings, &collector, &present);
        if !self.report.damaged.is_empty() {
            // A store that went away while it was read is not damaged.
            self.tenant.store().read_tail(layout::VAULT_FILE, 1).map_err(VaultError::from)?;
        }
        Ok(self.report)
    }

    /// Collects what points need. Of packs only what is given is read, if something is.
    fn collect(&self, collector: &mut Collector) -> Result<Option<Needed>, BackupError> {
        let Part::Since(since) = self.part else {
            collector.disks(&self.tree, self.points.iter().flat_map(|point| &point.manifest.disks))?;
            return Ok(None);
        };
        let (new, old): (Vec<_>, Vec<_>) = self.points.iter().partition(|point| point.manifest.created >= since);
        collector.disks(&self.tree, old.iter().flat_map(|point| &point.manifest.disks))?;
        let before = collector.needed.clone();
        collector.disks(&self.tree, new.iter().flat_map(|point| &point.manifest.disks))?;
        let mut read = collector.needed.clone();
        for (id, need) in &before {
            if let Some(more) = read.get_mut(id) {
                more.ordinals.remove(&need.ordinals);
            }
        }
        read.retain(|_, need| !need.ordinals.is_empty());
        Ok(Some(read))
    }

    fn damage(&mut self, object: String, what: impl Into<String>, hurts: Vec<String>) {
        self.report.damaged.push(Damage { object, what: what.into(), hurts, pack: None });
    }

    /// Opens manifests, tombstones and notes, and checks that chains are whole.
    fn chains(&mut self, what: &What) -> Result<(), BackupError> {
        let vms = match what {
            What::Everything => {
                let mut vms = BTreeSet::from_iter(self.tenant.vms()?);
                vms.extend(self.heads.known_vms()?);
                vms.into_iter().collect()
            }
            What::Vm(vm) | What::Point(vm, _) => vec![vm.clone()],
        };
        for vm in vms {
            let (chain, rollback) = self.heads.chain(&*self.tenant, &vm)?;
            if let Some(e) = rollback {
                self.damage(layout::vm(self.tenant.name(), &vm), e.to_string(), Vec::new());
            }
            if chain.last() == 0 && *what != What::Everything {
                return Err(VaultError::NoVm { vm }.into());
            }
            let mut previous: Option<(u32, Digest, VmId)> = None;
            for (number, state) in chain.numbers() {
                if matches!(what, What::Point(_, wanted) if *wanted != number) {
                    continue;
                }
                previous = self.number(&vm, number, state, previous)?;
            }
            if *what == What::Everything {
                self.notes(&vm)?;
            }
            if let Some((number, ..)) = previous {
                self.heads.remember(self.tenant.record_generation(), &[(vm, number)])?;
            }
        }
        if let What::Point(vm, number) = what
            && self.points.is_empty()
            && self.report.damaged.is_empty()
        {
            return Err(VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") }.into());
        }
        Ok(())
    }

    /// Checks one number of a chain against the one before it.
    fn number(
        &mut self,
        vm: &VmName,
        number: u32,
        state: State,
        previous: Option<(u32, Digest, VmId)>,
    ) -> Result<Option<(u32, Digest, VmId)>, BackupError> {
        let name = format!("{vm}@{number}");
        let key = layout::manifest(self.tenant.name(), vm, number);
        let (digest, vm_id, parent) = match state {
            State::Missing => {
                let what = "is missing, and no tombstone says that it was forgotten";
                self.damage(key, what, vec![name]);
                return Ok(None);
            }
            State::Forgotten => match self.tenant.forgotten(vm, number) {
                Ok(tombstone) => (tombstone.digest, tombstone.vm_id, tombstone.parent),
                Err(e) => {
                    let e = damage(e)?;
                    // Where it is made up, the manifest that it hides is still there.
                    let hidden = self.tenant.point(vm, number).ok();
                    let hurts = hidden.iter().map(|_| name.clone()).collect();
                    self.damage(layout::tombstone(self.tenant.name(), vm, number), e.to_string(), hurts);
                    self.points.extend(hidden);
                    return Ok(None);
                }
            },
            State::Live => match self.tenant.point(vm, number) {
                Ok(point) => {
                    let facts = (point.digest, point.manifest.vm_id, point.manifest.parent);
                    self.report.points += 1;
                    // Definitions may be megabytes, and all points are kept.
                    self.points.push(Point { manifest: Manifest { definition: None, ..point.manifest }, ..point });
                    facts
                }
                // It was forgotten since it was listed.
                Err(VaultError::NoPoint { .. }) if self.tenant.forgotten(vm, number).is_ok() => {
                    return self.number(vm, number, State::Forgotten, previous);
                }
                Err(e) => {
                    self.damage(key, damage(e)?.to_string(), vec![name]);
                    return Ok(None);
                }
            },
        };
        let follows = previous.is_none_or(|(before, digest, id)| {
            vm_id == id && parent.is_some_and(|parent| (parent.number, parent.digest) == (before, digest))
        });
        if !follows {
            self.damage(key, "does not follow the restore point before it: one of the two was replaced", vec![name]);
        }
        Ok(Some((number, digest, vm_id)))
    }

    fn notes(&mut self, vm: &VmName) -> Result<(), BackupError> {
        let folder = layout::notes(self.tenant.name(), vm);
        for entry in self.tenant.store().list(&folder).map_err(VaultError::from)? {
            let key = format!("{folder}{}", entry.name);
            let Some((number, id)) = layout::parse_note_file(&entry.name) else { continue };
            if let Err(e) = self.tenant.note(vm, number, id) {
                self.damage(key, damage(e)?.to_string(), Vec::new());
            }
        }
        Ok(())
    }

    /// The packs to verify, all there are or those that the points need, each with what is needed of it.
    fn files<'c>(
        &self,
        what: &What,
        collector: &'c Collector,
    ) -> Result<Vec<(PackFile, Option<&'c Need>)>, BackupError> {
        let mut present = self.packs.list()?;
        // One that was rewritten while all were listed may have been missed.
        let listed: BTreeSet<PackId> = present.iter().map(|file| file.id).collect();
        for id in collector.needed.keys().filter(|id| !listed.contains(*id)) {
            present.extend(self.packs.newest(*id)?);
        }
        present.sort();
        // Of each pack the newest generation is what a reader would end at.
        let newest: BTreeMap<PackId, u32> = present.iter().map(|file| (file.id, file.generation)).collect();
        let with_need = present.into_iter().map(|file| {
            let need = collector.needed.get(&file.id).filter(|_| newest.get(&file.id) == Some(&file.generation));
            (file, need)
        });
        Ok(with_need.filter(|(_, need)| need.is_some() || *what == What::Everything).collect())
    }

    fn verify_packs(
        &mut self,
        files: &[(PackFile, Option<&Need>)],
        everything: bool,
        threads: usize,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<BTreeMap<usize, Findings>, BackupError> {
        let listed: BTreeSet<_> = files.iter().map(|(file, _)| (file.id, file.generation)).collect();
        let next = AtomicUsize::new(0);
        let blobs = AtomicU64::new(0);
        let bytes = AtomicU64::new(0);
        let bad = Mutex::new(BTreeMap::new());
        let (packs, throttle) = (&*self.packs, self.throttle.as_ref());
        let thread = || -> Result<(), BackupError> {
            let mut verifier = PackVerifier::new(packs, throttle).map_err(|_| BackupError::Thread)?;
            loop {
                let nth = next.fetch_add(1, Ordering::Relaxed);
                let Some((file, need)) = files.get(nth) else { return Ok(()) };
                let findings = verifier.verify(*file, *need, everything)?;
                progress(file.length);
                let verified = (file.id, findings.generation);
                if findings.generation != file.generation && listed.contains(&verified) {
                    continue; // it is verified for itself
                }
                blobs.fetch_add(findings.good, Ordering::Relaxed);
                bytes.fetch_add(findings.bytes, Ordering::Relaxed);
                if findings.is_bad() {
                    bad.lock().insert(nth, findings);
                }
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(thread)).collect();
            let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            results.into_iter().try_for_each(|result| result.unwrap_or(Err(BackupError::Thread)))
        })?;
        self.report.packs = files.len() as u64;
        self.report.blobs = blobs.into_inner();
        self.report.bytes = bytes.into_inner();
        Ok(bad.into_inner())
    }

    /// Remembers which blobs are damaged, so that the next backups store them again instead of relying on them.
    fn remember(&self, files: &[(PackFile, Option<&Need>)], findings: &BTreeMap<usize, Findings>, everything: bool) {
        let damaged: Vec<_> = findings
            .iter()
            .flat_map(|(nth, found)| found.blobs.iter().map(|(ordinal, _)| (files[*nth].0.id, *ordinal)))
            .collect();
        let folder = lookup_folder(&self.state, &self.tenant.keys().scope());
        // Where there is no lookup, nothing is deduplicated against what it would name.
        let _ = Lookup::open(&folder).and_then(|lookup| lookup.set_damaged(&damaged, everything));
    }

    /// Turns findings into damages, and finds out which points each of them hurts.
    fn judge(
        &mut self,
        files: &[(PackFile, Option<&Need>)],
        findings: BTreeMap<usize, Findings>,
        collector: &Collector,
        present: &BTreeSet<PackId>,
    ) {
        let mut damages = Vec::new();
        let mut whole: HashMap<PackId, usize> = HashMap::new();
        let mut single: HashMap<(PackId, u32), usize> = HashMap::new();
        for (nth, finding) in findings {
            let file = files[nth].0;
            let object = layout::pack(self.tenant.name(), file.id, finding.generation);
            single.extend(finding.blobs.iter().map(|(ordinal, _)| ((file.id, *ordinal), damages.len())));
            if finding.unreadable {
                whole.insert(file.id, damages.len());
            }
            damages.push(of_pack(file.id, object, spell(&finding)));
        }
        for (id, need) in &collector.needed {
            if !present.contains(id) {
                whole.insert(*id, damages.len());
                let object = layout::pack(self.tenant.name(), *id, need.generation);
                damages.push(of_pack(*id, object, "is missing".into()));
            }
        }
        for (place, error) in &collector.broken {
            // Mostly the pack itself is known to be damaged there; what is left is a node that contradicts its place.
            if !whole.contains_key(&place.0) && !single.contains_key(place) {
                single.insert(*place, damages.len());
                let generation = collector.needed.get(&place.0).map_or(0, |need| need.generation);
                let object = layout::pack(self.tenant.name(), place.0, generation);
                damages.push(of_pack(place.0, object, format!("blob {}: {error}", place.1)));
            }
        }
        if damages.is_empty() {
            return;
        }
        let damage_of = |(pack, ordinal)| single.get(&(pack, ordinal)).or_else(|| whole.get(&pack)).copied();
        let mut tracer = Tracer::new(&self.tree, &damage_of);
        for point in &self.points {
            let mut hurt: Vec<usize> =
                point.manifest.disks.iter().flat_map(|disk| tracer.disk(disk).to_vec()).collect();
            hurt.sort_unstable();
            hurt.dedup();
            for nth in hurt {
                damages[nth].hurts.push(format!("{}@{}", point.manifest.vm, point.manifest.number));
            }
        }
        self.report.damaged.extend(damages);
    }
}

/// Damage of a pack; which restore points it hurts is not known yet.
fn of_pack(id: PackId, object: String, what: String) -> Damage {
    Damage { object, what, hurts: Vec::new(), pack: Some(id) }
}

/// What is wrong with a pack, in one line.
fn spell(finding: &Findings) -> String {
    let mut parts: Vec<String> = finding.whole.iter().cloned().collect();
    if let Some((_, what)) = finding.blobs.first() {
        let ordinals: Vec<_> = finding.blobs.iter().take(MAX_SPELT).map(|(ordinal, _)| ordinal.to_string()).collect();
        let more = finding.blobs.len().saturating_sub(MAX_SPELT);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        parts.push(format!("blob {}{more}: {what}", ordinals.join(", ")));
    }
    parts.join("; ")
}
