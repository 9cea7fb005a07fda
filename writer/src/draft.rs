//! A restore point in the making, right of ┃: from the VM's place in its chain to the manifest. A backup in this process and a
//! session of another site fill it in the same way.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::condemned::Condemned;
use reseal_format::ids::{Digest, PackId, PointId, VmId};
use reseal_format::keys::Kind;
use reseal_format::layout::MAX_NUMBER;
use reseal_format::lock::Locked;
use reseal_format::manifest::{Claim, Disk, MAX_TEXT, Manifest, Parent, Stats, Tracking, method};
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_nbd::server::SinceDisk;
use reseal_store::Lease;
use reseal_vault::heads::Heads;
use reseal_vault::{Holder, Locks, PackFile, Packs, Points, Quota, Tenant, ToLock, Tree, VaultError, random};

use crate::BackupError;
use crate::assemble::{Assembler, Counted};
use crate::backup::CopyOf;
use crate::finisher::Finisher;
use crate::index_writer::IndexWriter;
use crate::judge::Judge;
use crate::known::{Known, ParentDisk};
use crate::lookup::{Lookup, lookup_folder};
use crate::pipeline::Job;
use crate::spread::spread;
use crate::target::{Asked, DiskFacts, Ending, Start, Target};
use crate::walk::Collector;
use crate::worker::Right;

/// Bytes of pack tables and of index nodes that a backup keeps.
const CACHE: usize = 144 << 20;
/// One part of so many of these is for index nodes.
const NODES: usize = 9;
/// Packs that are locked at a time: enough to hide the delay of an object store behind one another.
const LOCKERS: usize = 16;
/// How far the newest point may be ahead of the clock before it is worth a warning.
const MAX_AHEAD_MS: i64 = 60_000;

/// What drafts of a tenant keep of its packs and index: their own, or shared between those of one process.
pub(crate) struct Caches {
    packs: Arc<Packs>,
    tree: Arc<Tree>,
}

impl Caches {
    /// Of so many bytes at most.
    pub(crate) fn new(tenant: Arc<Tenant>, bytes: usize) -> Caches {
        let packs = Arc::new(Packs::new(tenant, bytes - bytes / NODES));
        let tree = Arc::new(Tree::new(packs.clone(), bytes / NODES));
        Caches { packs, tree }
    }

    /// Changes how many bytes.
    pub(crate) fn resize(&self, bytes: usize) {
        self.packs.resize_cache(bytes - bytes / NODES);
        self.tree.resize_cache(bytes / NODES);
    }
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

/// The disk that is being read.
struct Current {
    facts: DiskFacts,
    /// The same disk in the restore point that is compared with.
    parent: Option<Disk>,
    /// What is said of its changes, if that is believed.
    claim: Option<Claim>,
    /// What had been counted before it.
    before: Counted,
}

/// A disk's changes since a restore point can be told.
struct Believed {
    base: Disk,
    always: Vec<Range<u64>>,
    claim: Claim,
}

/// A restore point that does not exist yet.
pub(crate) struct Draft {
    tenant: Arc<Tenant>,
    heads: Heads,
    vm: VmName,
    point: PointId,
    position: Position,
    known: Arc<Known>,
    finisher: Arc<Finisher>,
    assembler: Assembler,
    warnings: Vec<String>,
    current: Option<Current>,
    disks: Vec<Disk>,
    /// If what it leads to is to be locked.
    locks: Option<Locks>,
    /// Whether clusters were kept of another restore point than the newest.
    has_older_base: bool,
    /// The time of the point, where it is a copy.
    created: Option<Timestamp>,
    /// When all was durable: the time of the point, and the bytes that were stored.
    closed: Option<(Timestamp, u64)>,
    made: Option<Made>,
    /// Dropped last: nobody seals under keys that he does not say he has.
    _lease: Box<dyn Lease>,
}

/// A restore point that was made.
#[derive(Debug)]
pub(crate) struct Made {
    pub manifest: Manifest,
    /// Digest of the manifest's plaintext.
    pub digest: Digest,
    /// Why this machine could not remember it, if so.
    pub not_remembered: Option<VaultError>,
}

/// What fills the disk that was begun.
pub(crate) struct Filling<'a> {
    pub known: &'a Known,
    pub parent: Option<&'a Disk>,
    /// Bytes of the disk.
    pub length: u64,
    /// Whether clusters may be kept, so that each has to be told of.
    pub keeps: bool,
    pub assembler: &'a mut Assembler,
    pub index: IndexWriter<'a>,
}

impl Draft {
    /// Begins the next restore point of a VM. `what` says who is at work.
    pub(crate) fn new(
        tenant: Arc<Tenant>,
        heads: Heads,
        state: &Path,
        vm: VmName,
        what: String,
    ) -> Result<Draft, BackupError> {
        let caches = Caches::new(tenant.clone(), CACHE);
        Draft::with_caches(tenant, &caches, heads, state, vm, what)
    }

    /// The same with caches that others use too.
    pub(crate) fn with_caches(
        tenant: Arc<Tenant>,
        caches: &Caches,
        heads: Heads,
        state: &Path,
        vm: VmName,
        what: String,
    ) -> Result<Draft, BackupError> {
        let (lease, position) = begin(&tenant, &heads, &vm, &what)?;
        tenant.store().sweep().map_err(VaultError::from)?;
        let locks = tenant.locks()?;
        let point = PointId::from_bytes(random()?);
        let (known, no_lookup) = open_known(&tenant, caches, state)?;
        let known = Arc::new(known);
        let quota = quota(&tenant, &known)?;
        if let Some(quota) = &quota {
            quota.check(0, 0)?;
        }
        let finisher = Arc::new(Finisher::new(known.clone(), quota));
        let assembler = Assembler::new(tenant.clone(), finisher.clone());
        Ok(Draft {
            tenant,
            heads,
            vm,
            point,
            _lease: lease,
            position,
            known,
            finisher,
            assembler,
            warnings: Vec::from_iter(no_lookup),
            current: None,
            disks: Vec::new(),
            locks,
            has_older_base: false,
            created: None,
            closed: None,
            made: None,
        })
    }

    /// Becomes a copy of that restore point: with its id and its time, which has to be later than that of the newest.
    pub(crate) fn copy(&mut self, of: CopyOf) -> Result<(), BackupError> {
        if let Some(newest) = self.position.newest.as_ref().filter(|newest| newest.created >= of.created) {
            let newest = format!("{}@{} of {}", self.vm, newest.number, newest.created);
            return Err(BackupError::Usage(format!("what is to be copied is of {}, not after {newest}", of.created)));
        }
        self.point = of.point;
        self.created = Some(of.created);
        self.warnings.extend(of.warnings);
        Ok(())
    }

    /// Takes the place of a draft of that id, which another connection began.
    pub(crate) fn go_on_with(&mut self, point: PointId) {
        self.point = point;
    }

    /// What was made of it.
    pub(crate) fn made(&self) -> Option<&Made> {
        self.made.as_ref()
    }

    /// Nothing comes of it, but its packs are made durable all the same, for the next draft to use. What can't be is lost.
    pub(crate) fn give_up(&mut self) {
        let _ = self.finisher.wait();
    }

    /// What seals its clusters.
    pub(crate) fn assembler(&mut self) -> &mut Assembler {
        &mut self.assembler
    }

    /// The same, given away.
    pub(crate) fn into_made(self) -> Option<Made> {
        self.made
    }

    /// Whether what is said of a disk's changes can be used; otherwise why not.
    fn believe(&self, facts: &DiskFacts, asked: &Asked) -> Result<Result<Believed, String>, BackupError> {
        let Asked { method, id, since } = asked;
        let newest = self.position.newest.as_ref();
        let older = match (since, newest) {
            (Some(number), Some(newest)) if *number != newest.number => match self.tenant.point(&self.vm, *number) {
                Ok(point) => Some(point.manifest),
                // It may lie over a point of another VM, which nobody claimed to be of this one.
                Err(VaultError::NoPoint { .. }) if *method == method::OVERLAY => {
                    return Ok(Err(format!("it lies over a restore point {number} that {} does not have", self.vm)));
                }
                Err(e) => return Err(e.into()),
            },
            _ => None,
        };
        let Some(point) = older.as_ref().or(newest) else { return Ok(Err("there is no restore point yet".into())) };
        let known = format!("{}@{}", self.vm, point.number);
        let Some(base) = point.disks.iter().find(|disk| disk.name == facts.name) else {
            return Ok(Err(format!("{known} has no such disk")));
        };
        let is_over = |over: SinceDisk| (over.point, &over.disk) == (point.point_id, &base.name);
        if *method == method::OVERLAY && !SinceDisk::parse(id).is_some_and(is_over) {
            return Ok(Err(format!("it lies over another disk than {} of {known}", base.name)));
        }
        let tracked = |tracking: &Tracking| tracking.method == *method && tracking.id == *id;
        if since.is_none() && !base.tracking.as_ref().is_some_and(tracked) {
            let recorded = match &base.tracking {
                Some(tracking) => format!("recorded {} {}", tracking.method, tracking.id),
                None => "recorded nothing to tell changes since".to_owned(),
            };
            return Ok(Err(format!("{method} {id} tells changes since another moment: {known} {recorded}")));
        }
        if base.length != facts.length {
            return Ok(Err(format!("the disk had {} bytes in {known} and has {}", base.length, facts.length)));
        }
        let always = self.known.not_to_be_kept(base)?;
        let claim = Claim { method: method.clone(), id: id.clone(), since: point.number, changed: 0, checked: 0 };
        Ok(Ok(Believed { base: base.clone(), always, claim }))
    }

    /// Locks what its disks lead to; how all is locked then.
    fn lock(&self, locks: Locks) -> Result<Locked, BackupError> {
        let before = self.position.newest.as_ref().filter(|_| !self.has_older_base).and_then(|newest| newest.locked);
        let ToLock { is_all, own_too, locked } = self.tenant.to_lock(locks, before)?;
        self.tenant.lock_records(locks)?;
        let mut packs = match is_all {
            true => packs_of(&self.known, &self.disks)?,
            false => self.assembler.shared.clone(),
        };
        if !own_too {
            let own = self.finisher.made();
            packs.retain(|id, _| !own.contains(id));
        }
        let packs: Vec<_> = packs.into_iter().collect();
        let (tenant, of_tenant) = (&self.tenant, &self.known.packs);
        let done = spread(&packs, LOCKERS, &AtomicBool::new(false), |(id, generation)| {
            Ok(of_tenant.lock(locks, *id, *generation)?)
        });
        match done {
            // What is missing went because nobody waited for this any more.
            Err(_) if tenant.chain(&self.vm)?.last() >= self.position.number => {
                Err(VaultError::Fenced { vm: self.vm.clone(), number: self.position.number }.into())
            }
            other => other.map(|()| locked),
        }
    }

    /// Fills the disk that was begun.
    pub(crate) fn fill(
        &mut self,
        fill: impl FnOnce(&mut Filling<'_>) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        let current = self.current.as_ref().ok_or(BackupError::Thread)?;
        let (parent, length, keeps) = (current.parent.as_ref(), current.facts.length, current.claim.is_some());
        let index = IndexWriter::new(&self.known, parent, length, keeps);
        let mut filling = Filling { known: &self.known, parent, length, keeps, assembler: &mut self.assembler, index };
        fill(&mut filling)?;
        let (root, used_clusters) = filling.index.finish(&mut filling.assembler.sink())?;
        let Some(Current { facts, claim, before, .. }) = self.current.take() else { return Ok(()) };
        let counted = self.assembler.counted;
        let (changed, checked) = (counted.told - before.told, counted.checked - before.checked);
        self.disks.push(Disk {
            name: facts.name,
            length,
            root,
            used_clusters,
            source: facts.source.chars().take(MAX_TEXT / 4).collect(),
            tracking: facts.tracking,
            claim: claim.map(|claim| Claim { changed: changed.min(length), checked, ..claim }),
        });
        Ok(())
    }
}

impl Target for Draft {
    fn point(&self) -> PointId {
        self.point
    }

    fn newest(&self) -> Option<&Manifest> {
        self.position.newest.as_ref()
    }

    fn begin(&mut self, facts: DiskFacts, asked: Option<Asked>) -> Result<Start, BackupError> {
        if let Some(unfinished) = self.current.take() {
            // What the first try took for changed is counted anew.
            self.assembler.counted.changed = unfinished.before.changed;
        }
        let newest = self.position.newest.iter().flat_map(|newest| &newest.disks);
        let before = self.assembler.counted;
        let same = newest.into_iter().find(|disk| disk.name == facts.name).cloned();
        let (parent, claim, start) = match asked.map(|asked| self.believe(&facts, &asked)).transpose()? {
            Some(Ok(Believed { base, always, claim })) => {
                let newest = self.position.newest.as_ref().map(|newest| newest.number);
                self.has_older_base |= newest != Some(claim.since);
                (Some(base), Some(claim), Start::Since { always })
            }
            Some(Err(why)) => {
                // That the first restore point reads everything needs no reason.
                let why = self.position.newest.is_some().then_some(why);
                (same, None, Start::Whole(why))
            }
            None => (same, None, Start::Whole(None)),
        };
        self.current = Some(Current { facts, parent, claim, before });
        Ok(start)
    }

    fn read(&mut self, job: &Job<'_>) -> Result<(), BackupError> {
        self.fill(|Filling { known, parent, assembler, index, .. }| {
            let right = |_| Right::Here(Judge::new(known, ParentDisk::new(known, *parent)));
            let rights = (0..job.workers).map(right).collect();
            job.run(rights, job.in_flight(), &mut |done| assembler.add(done, index))?;
            Ok(())
        })
    }

    fn close(&mut self) -> Result<(), BackupError> {
        self.assembler.close()?;
        if let Some(created) = self.created {
            self.closed = Some((created, self.finisher.wait()?));
            return Ok(());
        }
        let clock = now()?;
        let created = clock.max(Timestamp(self.position.not_before.0 + 1));
        if created.0 - clock.0 > MAX_AHEAD_MS {
            let ahead = "but the restore point before this one is later";
            self.warnings.push(format!("this machine's clock says {clock}, {ahead}"));
        }
        self.closed = Some((created, self.finisher.wait()?));
        Ok(())
    }

    fn commit(&mut self, ending: Ending) -> Result<(), BackupError> {
        let (created, stored) = self.closed.ok_or(BackupError::Thread)?;
        if stored > 0
            && let Some(quota) = quota(&self.tenant, &self.known)?
        {
            // What others have stored meanwhile counts too.
            quota.check(0, 0)?;
        }
        let counted = self.assembler.counted;
        let stats = Stats {
            read: counted.read,
            changed: counted.changed,
            new: counted.new,
            stored,
            duration_ms: ending.duration_ms,
        };
        let locked = self.locks.map(|locks| self.lock(locks)).transpose()?;
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(ending.warnings);
        let manifest = Manifest {
            vm: self.vm.clone(),
            vm_id: self.position.vm_id,
            number: self.position.number,
            point_id: self.point,
            created,
            parent: self.position.parent,
            disks: std::mem::take(&mut self.disks),
            definition: ending.definition,
            stats,
            warnings,
            locked,
        };
        let digest = self.tenant.commit(&manifest)?;
        // The point exists, whatever becomes of the memory of it.
        let seen = [(self.vm.clone(), manifest.number)];
        let not_remembered = self.heads.remember(self.tenant.record_generation(), &seen).err();
        self.made = Some(Made { manifest, digest, not_remembered });
        Ok(())
    }

    fn recover(&mut self, _: &BackupError) -> Result<bool, BackupError> {
        Ok(false)
    }

    fn is_made(&self) -> bool {
        self.made.is_some()
    }
}

/// The packs that disks lead to, with their newest generations.
fn packs_of(known: &Known, disks: &[Disk]) -> Result<BTreeMap<PackId, u32>, BackupError> {
    let mut collector = Collector::default();
    collector.disks(&known.tree, disks)?;
    if let Some((_, error)) = collector.broken.pop_first() {
        return Err(error.into());
    }
    let mut packs: BTreeMap<_, _> = collector.needed.iter().map(|(id, need)| (*id, need.generation)).collect();
    for file in known.packs.list()? {
        packs.entry(file.id).and_modify(|newest| *newest = file.generation.max(*newest));
    }
    Ok(packs)
}

/// Takes a lease that says which restore point will be made, and finds its place.
fn begin(tenant: &Tenant, heads: &Heads, vm: &VmName, what: &str) -> Result<(Box<dyn Lease>, Position), BackupError> {
    loop {
        let last = tenant.chain(vm)?.last();
        let holder = Holder::this_process(what.to_owned()).making(vm.clone(), last.saturating_add(1));
        // Before the record is read on which all that follows relies.
        let lease = tenant.lease(&holder)?;
        tenant.refresh()?;
        tenant.settle_new_epoch()?;
        let position = match position(tenant, heads, vm) {
            // Where the newest would be stands a fence whose maker died.
            Err(BackupError::Vault(VaultError::NoPoint { .. })) if tenant.settle_fence(vm, last)? => continue,
            Err(BackupError::Vault(source)) if source.damaged_object().is_some() => {
                return Err(BackupError::Newest { source });
            }
            position => position?,
        };
        // Otherwise somebody else was faster: a prune has to know the number.
        if holder.makes.is_some_and(|point| point.number == position.number) {
            return Ok((lease, position));
        }
    }
}

fn position(tenant: &Tenant, heads: &Heads, vm: &VmName) -> Result<Position, BackupError> {
    let chain = heads.whole_chain(tenant, vm)?;
    let newest = tenant.newest_point(vm, &chain)?;
    let number = chain.last().checked_add(1).filter(|number| *number <= MAX_NUMBER);
    let number = number.ok_or_else(|| BackupError::Usage(format!("{} has no more numbers to give", vm)))?;
    let Some((parent, point)) = tenant.parent_of_next(vm, &chain)? else {
        let vm_id = VmId::from_bytes(random().map_err(BackupError::from)?);
        return Ok(Position { number, vm_id, parent: None, newest: None, not_before: Timestamp(0) });
    };
    let (vm_id, not_before) = match (&point, &newest) {
        (Some(point), _) => (point.manifest.vm_id, point.manifest.created),
        (None, newest) => {
            let tombstone = tenant.tombstone(vm, parent.number)?;
            let live = newest.as_ref().map_or(Timestamp(0), |point| point.manifest.created);
            (tombstone.vm_id, tombstone.created.max(live))
        }
    };
    Ok(Position { number, vm_id, parent: Some(parent), newest: newest.map(|point| point.manifest), not_before })
}

/// The tenant's quota, if it has one, beside what the vault has now.
fn quota(tenant: &Tenant, known: &Known) -> Result<Option<Quota>, VaultError> {
    match tenant.keys().quota() {
        Some(_) => Ok(Quota::of(tenant, &known.packs.list()?)),
        None => Ok(None),
    }
}

/// Opens what is known. A backup without a lookup is right, only larger, which is said.
pub(crate) fn open_known(
    tenant: &Arc<Tenant>,
    caches: &Caches,
    state: &Path,
) -> Result<(Known, Option<String>), BackupError> {
    let Caches { packs, tree } = caches;
    let (packs, tree) = (packs.clone(), tree.clone());
    // Before packs are listed: see `Tenant::condemned`.
    let condemned = match tenant.condemned() {
        Err(e) if e.damaged_object().is_some() => {
            let warning =
                format!("{e}: clusters that only other VMs have were stored again; `reseal prune` removes that list");
            return Ok((
                Known { packs, tree, lookup: None, damaged: HashSet::new(), condemned: Condemned::default() },
                Some(warning),
            ));
        }
        condemned => condemned?,
    };
    let folder = lookup_folder(state, &tenant.keys().scope());
    let opened = Lookup::open(&folder).and_then(|lookup| Ok((lookup, lookup.damaged()?, lookup.packs()?)));
    let (lookup, damaged, held) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            let folder = folder.display();
            let warning = format!(
                "the lookup in {folder} can't be used ({e}): clusters that only other VMs have were stored again"
            );
            // Nothing tells which packs are gone, so what others keep of them can't be relied on.
            let Caches { packs, tree } = Caches::new(tenant.clone(), CACHE);
            return Ok((Known { packs, tree, lookup: None, damaged: HashSet::new(), condemned }, Some(warning)));
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
    // Other processes may have told the lookup before: it alone does not say what is kept here of packs that are gone.
    packs.retain(&names);
    if !gone.is_empty() {
        let _ = lookup.forget(gone.into_iter());
    }
    packs.settle(&unknown)?;
    for pack in unknown {
        learn(&packs, &lookup, pack)?;
    }
    Ok((Known { packs, tree, lookup: Some(lookup), damaged, condemned }, None))
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
