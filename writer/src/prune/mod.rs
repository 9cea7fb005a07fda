//! Gives back the space of what no restore point needs, while backups and mounts go on.
//!
//! ```text
//! list packs → mark from manifests → plan → condemn → wait for who is at work, or fence him → mark what is new
//!   → unneeded packs go → packs that are mostly unused are rewritten → nothing is condemned any more
//! ```
//!
//! Why nothing goes that somebody relies on is told in `vault/gc.rs`. Whoever dies in the midst leaves nothing that would have to be
//! finished: the next prune begins anew, and what was condemned stays so until it has ended. What the one before was about to rewrite it
//! rewrites in any case.
//!
//! Architecture invariant: nothing goes before everything that is there was marked, and that only if all of it could be read.

mod marks;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_format::condemned::Condemned;
use reseal_format::dated_note::DatedKind;
use reseal_format::ids::CondemnedId;
use reseal_format::layout;
use reseal_format::time::Timestamp;
use reseal_store::Lease;
use reseal_vault::{Held, PackFile, Packs, PointName, Tenant, Tree, VaultError};
use serde::Serialize;

use crate::BackupError;
use crate::at_work::still;
use crate::generations::{self, Listed, Removal};
use crate::rewrite::{Rewriting, tables_open};
use crate::spread::spread;
use crate::throttle::Throttle;
use marks::Marks;
use plan::{Plan, Worth};

/// Bytes of tables that are kept. Each node is read once, so none is.
const TABLES: usize = 16 << 20;
const NODES: usize = 1 << 20;
/// Tables that are opened at a time where the store is far.
const FAR: usize = 16;
/// How often is looked whether who is at work has ended.
const NAP: Duration = Duration::from_millis(250);

/// What gives back space.
pub struct Prune<'a> {
    pub tenant: Arc<Tenant>,
    /// How long it waits for backups that run, before it sees to it that they can't end.
    pub grace: Duration,
    /// A pack of which at least so many percent are unused is rewritten.
    pub percent: u8,
    /// As long as no more bytes are read of such packs than this; `None`: a 32nd part of what is stored, or 64 MiB. The rest is for the next
    /// time.
    pub most_read: Option<u64>,
    pub workers: usize,
    /// For what is read of packs that are rewritten.
    pub throttle: Option<Throttle>,
    /// Goes on where a manifest or an index node is missing or can't be opened: what only that needs goes, too.
    pub despite_damage: bool,
    /// Told what the administrator should know meanwhile.
    pub say: &'a (dyn Fn(&str) + Sync),
}

/// What became of it.
#[derive(Debug, Default, Serialize)]
pub struct Pruned {
    /// Whether it was only looked at.
    pub dry_run: bool,
    /// Restore points that are there.
    pub points: u64,
    /// Bytes of packs before.
    pub before: u64,
    /// Bytes that were freed, or would be.
    pub freed: u64,
    /// Packs that went, or would.
    pub removed: u64,
    /// Packs that were rewritten, or would be.
    pub rewritten: u64,
    /// Bytes that nothing needs, in packs that are mostly used.
    pub unused: u64,
    /// Bytes that nothing needs, in packs that are mostly unused and are rewritten the next time.
    pub postponed: u64,
    /// Bytes that nothing needs, in packs that are locked in the object store.
    pub locked: u64,
    /// When the last of these locks ends; `null` where none does by itself.
    pub locked_until: Option<String>,
    /// Restore points that were forgotten and stay, for their manifests are locked.
    pub locked_points: u64,
    /// Restore points that were forgotten and stay while they are read, each with who reads it.
    pub read: BTreeMap<String, String>,
    /// Restore points that won't be made, for the prune did not wait any longer.
    pub fenced: Vec<String>,
    /// Packs that the storage does not let go of, as an object lock does, each with what it said.
    pub held_back: BTreeMap<String, String>,
    /// Manifests, tombstones and index nodes that are missing or can't be opened: nothing was removed, unless that was asked for.
    pub damaged: BTreeMap<String, String>,
    /// Restore points that are held and hurt by that, each with what is damaged: nothing was removed, even where that was asked for.
    pub held: BTreeMap<String, String>,
    /// Packs that are needed and missing or can't be opened: they stay as they are.
    pub bad_packs: BTreeMap<String, String>,
    /// Who is still at work, and can't be fenced: nothing was removed.
    pub at_work: Vec<String>,
}

impl Prune<'_> {
    fn worth(&self) -> Worth {
        Worth { percent: self.percent, most: self.most_read }
    }

    /// How many open tables of packs at a time: those of an object store wait for it, and not for a core.
    fn openers(&self) -> usize {
        if self.tenant.store().is_far() { self.workers.max(FAR) } else { self.workers }
    }

    /// Says what would be freed if these points were forgotten as well.
    pub fn look(&self, without: &BTreeSet<PointName>) -> Result<Pruned, BackupError> {
        let packs = Arc::new(Packs::new(self.tenant.clone(), TABLES));
        let tree = Tree::new(packs.clone(), NODES);
        let listed = packs.list()?;
        let mut marks = Marks::new(&self.tenant, &tree, true);
        marks.mark(without)?;
        let begun = self.begun(&self.tenant.condemned_lists()?)?;
        let plan = Plan::new(&packs, listed, marks.needed(), &begun, self.worth(), self.openers())?;
        let mut pruned = Pruned { dry_run: true, ..Pruned::default() };
        pruned.tell(&marks, &plan);
        if self.may_go_on(&marks, &mut pruned)? {
            (pruned.freed, pruned.removed) = (plan.sizes.to_free, plan.unneeded.len() as u64);
            pruned.rewritten = plan.mostly_unused.len() as u64;
        }
        Ok(pruned)
    }

    /// Gives back what nothing needs, under the one lease of who rewrites packs.
    pub fn run(&self, under: &dyn Lease) -> Result<Pruned, BackupError> {
        let tenant = &self.tenant;
        let packs = Arc::new(Packs::new(tenant.clone(), TABLES));
        let tree = Tree::new(packs.clone(), NODES);
        let before = tenant.condemned_lists()?;
        let begun = self.begun(&before)?;
        let listed = packs.list()?;
        let mut marks = Marks::new(tenant, &tree, false);
        marks.finish_forgotten()?;
        marks.mark(&BTreeSet::new())?;
        let plan = Plan::new(&packs, listed, marks.needed(), &begun, self.worth(), self.openers())?;
        let mut pruned = Pruned::default();
        pruned.tell(&marks, &plan);
        if !self.may_go_on(&marks, &mut pruned)? {
            return Ok(pruned);
        }
        let lists = tenant.condemn(&plan.condemned)?;
        if !plan.condemned.is_empty() {
            self.wait(under, &mut pruned)?;
            if !pruned.at_work.is_empty() {
                return Ok(pruned);
            }
            marks.mark_new()?;
            pruned.tell(&marks, &plan);
            if !self.may_go_on(&marks, &mut pruned)? {
                return Ok(pruned);
            }
        }
        let is_left = self.remove(&packs, &plan, &marks, &mut pruned)?;
        self.notes(&marks)?;
        // What is condemned and still there must not be relied on.
        if !is_left && pruned.bad_packs.len() == plan.damaged.len() {
            tenant.drop_condemned(&lists)?;
            if !plan.leaves_begun {
                tenant.drop_condemned(&before)?;
            }
        }
        Ok(pruned)
    }

    /// What these lists of other prunes condemn. One that is damaged says nothing.
    fn begun(&self, lists: &[CondemnedId]) -> Result<Condemned, VaultError> {
        let mut begun = Condemned::default();
        for id in lists {
            match self.tenant.add_condemned(*id, &mut begun) {
                Err(e) if e.damaged_object().is_some() => {}
                other => other?,
            }
        }
        Ok(begun)
    }

    /// Whether all that is needed is known, or what is not was given up, which no restore point is that is held.
    fn may_go_on(&self, marks: &Marks<'_>, pruned: &mut Pruned) -> Result<bool, BackupError> {
        if marks.damaged.is_empty() || !self.despite_damage {
            return Ok(marks.damaged.is_empty());
        }
        pruned.held = marks.held()?;
        Ok(pruned.held.is_empty())
    }

    /// Removes what was noted about restore points that were forgotten, but for what serves the VM's others, and keys of overlays: they are
    /// removed with these.
    fn notes(&self, marks: &Marks<'_>) -> Result<(), VaultError> {
        for (vm, forgotten) in marks.forgotten() {
            for entry in self.tenant.store().list(&layout::notes(self.tenant.name(), vm))? {
                let Some((number, id)) = layout::parse_note_file(&entry.name) else { continue };
                let kind = DatedKind::of(id).map(|(kind, _)| kind);
                if forgotten.contains(&number) && matches!(kind, Some(DatedKind::BootVerdict | DatedKind::Hold)) {
                    self.tenant.drop_note(vm, number, id)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until all who were at work have ended. Those who have not in time are fenced.
    fn wait(&self, under: &dyn Lease, pruned: &mut Pruned) -> Result<(), BackupError> {
        let began = Instant::now();
        let mut at_work = self.tenant.leases()?;
        let mut said = false;
        loop {
            let held =
                still(&self.tenant, at_work, under, self.say, &mut |point| pruned.fenced.push(point.to_string()))?;
            if held.is_empty() {
                return Ok(());
            }
            if began.elapsed() >= self.grace {
                return self.fence(&held, under, pruned);
            }
            if !std::mem::replace(&mut said, true) {
                for lease in &held {
                    (self.say)(&format!("waiting for the end of what may rely on what is to be removed: {lease}"));
                }
            }
            at_work = held;
            thread::sleep(NAP.min(self.grace));
        }
    }

    fn fence(&self, held: &[Held], under: &dyn Lease, pruned: &mut Pruned) -> Result<(), BackupError> {
        for lease in held {
            // One that ended since has nothing to be fenced.
            if self.tenant.find_again(lease)?.is_none() {
                continue;
            }
            let Some(PointName { vm, number }) = lease.makes() else {
                pruned.at_work.push(lease.to_string());
                continue;
            };
            if self.tenant.fence(vm, *number, under)? {
                (self.say)(&format!("{vm}@{number} will not be made: not waited any longer for {lease}"));
                pruned.fenced.push(format!("{vm}@{number}"));
            } else if self.tenant.chain(vm)?.last() < *number {
                pruned.at_work.push(lease.to_string());
            }
        }
        Ok(())
    }

    /// Removes and rewrites; whether a pack is left that was to go. Of one that was rewritten an older generation may be left: nobody
    /// believes it.
    fn remove(&self, packs: &Packs, plan: &Plan, marks: &Marks<'_>, pruned: &mut Pruned) -> Result<bool, BackupError> {
        // Somebody who was at work when a pack was condemned may need it after all: then it stays as it is.
        let unneeded = plan.unneeded.iter().filter(|pack| !marks.needed().contains_key(&pack.newest.id));
        let pieces: Vec<Piece<'_>> = unneeded
            .map(Piece::Remove)
            .chain(plan.superseded.iter().map(Piece::Supersede))
            .chain(plan.mostly_unused.iter().map(Piece::Rewrite))
            .collect();
        let stop = AtomicBool::new(false);
        let rewriting = Rewriting { packs, throttle: self.throttle.as_ref(), stop: &stop, progress: &|_| {} };
        let pruned = Mutex::new(pruned);
        let is_left = AtomicBool::new(false);
        spread(&pieces, self.workers, &stop, |piece| {
            let (pack, next) = match piece {
                Piece::Remove(pack) => {
                    let gone = self.delete(pack.older.iter().chain([&pack.newest]), None, &pruned)?;
                    pruned.lock().removed += u64::from(gone);
                    is_left.fetch_or(!gone, Ordering::Relaxed);
                    return Ok(());
                }
                Piece::Supersede(pack) => (pack, pack.newest),
                Piece::Rewrite(pack) => {
                    let need = marks.needed().get(&pack.newest.id);
                    let keeps = |ordinal| need.is_some_and(|need| need.ordinals.contains(ordinal));
                    match rewriting.next_generation(pack.newest, &keeps) {
                        Ok(Some(next)) => (pack, next),
                        Ok(None) => return Ok(()),
                        Err(e) => return note_damage(e, &pruned),
                    }
                }
            };
            // Whoever reads the pack finds its newest generation before the others are gone.
            if let Err(e) = tables_open(packs, next) {
                return note_damage(e, &pruned);
            }
            let gone = pack.older.iter().chain([&pack.newest]).filter(|file| file.generation != next.generation);
            self.delete(gone, Some(&next), &pruned)?;
            if next.generation != pack.newest.generation {
                let mut pruned = pruned.lock();
                pruned.rewritten += 1;
                pruned.freed = pruned.freed.saturating_sub(next.length);
            }
            Ok(())
        })?;
        Ok(is_left.into_inner())
    }

    /// Removes generations of a pack, in whose place that one is, if any; whether all are gone.
    fn delete<'f>(
        &self,
        files: impl Iterator<Item = &'f PackFile>,
        successor: Option<&PackFile>,
        pruned: &Mutex<&mut Pruned>,
    ) -> Result<bool, BackupError> {
        let mut all = true;
        for file in files {
            match generations::remove(&self.tenant, file, successor)? {
                Removal::Done => pruned.lock().freed += file.length,
                Removal::WasGone => {}
                Removal::HeldBack(why) => {
                    all = false;
                    pruned.lock().held_back.insert(generations::key(&self.tenant, file), why);
                }
            }
        }
        Ok(all)
    }
}

/// What is done to one pack.
enum Piece<'p> {
    Remove(&'p Listed),
    Supersede(&'p Listed),
    Rewrite(&'p Listed),
}

impl Pruned {
    fn tell(&mut self, marks: &Marks<'_>, plan: &Plan) {
        (self.points, self.before) = (marks.points, plan.sizes.all);
        (self.unused, self.postponed) = (plan.sizes.unused, plan.sizes.postponed);
        (self.locked, self.locked_points) = (plan.sizes.locked, marks.locked_points);
        let until = plan.sizes.locked_until.max(marks.locked_until).filter(|until| *until < i64::MAX);
        self.locked_until = until.map(|until| Timestamp(until.saturating_mul(1000)).to_rfc3339());
        self.read.clone_from(&marks.read);
        self.damaged.clone_from(&marks.damaged);
        self.bad_packs.clone_from(&plan.damaged);
    }
}

/// Damage is reported, and does not stop the rest; what else went wrong does.
fn note_damage(error: VaultError, pruned: &Mutex<&mut Pruned>) -> Result<(), BackupError> {
    match error.damaged_object() {
        Some(object) => {
            pruned.lock().bad_packs.insert(object.to_owned(), error.to_string());
            Ok(())
        }
        None => Err(error.into()),
    }
}
