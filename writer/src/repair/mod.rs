//! Mends packs with what a second vault has, which is a copy of this one under other keys.
//!
//! ```text
//! verify → who rewrites packs? nobody else → what do points need, and which point of the copy is which? → what is wrong with a pack
//!   → where on which disk is that? → the cluster there in the copy → is it the one? → next generation, read back → the damaged one goes
//!   → verify what was mended
//! ```
//!
//! Blobs are at other places in the copy, under other ids. What both vaults have in common is which cluster of which disk of which restore
//! point something is; so both indexes are walked side by side (`search`). A blob is known by its id, if our pack still tells it; otherwise
//! by its place alone, and what stands for the content is that the copy has authenticated it there.
//!
//! Architecture invariant: a generation goes only after the one in its place was read back whole and has all of it that is needed.

mod mend;
mod pairs;
mod patient;
mod rebuild;
mod search;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use reseal_format::ids::PackId;
use reseal_format::keys::Kind;
use reseal_format::layout;
use reseal_store::Lease;
use reseal_vault::heads::Heads;
use reseal_vault::{Holder, PackFile, Packs, Tenant, Tree, VaultError};
use serde::Serialize;

use crate::BackupError;
use crate::draft::{Caches, open_known};
use crate::generations::{self, Listed, Removal, by_pack};
use crate::lookup::{Lookup, lookup_folder};
use crate::rewrite::tables_open;
use crate::spread::spread;
use crate::throttle::Throttle;
use crate::verify::{Damage, Part, Report, Verify, What};
use mend::{Mender, Nodes, Written};
use pairs::Pairs;
use patient::Patient;
use rebuild::Rebuilder;
use search::{Found, Search};

/// Bytes of tables and nodes that are kept of each vault.
const TABLES: usize = 16 << 20;
const NODES: usize = 64 << 20;
/// Bytes of these that are kept while index nodes are made again.
const KNOWN: usize = 64 << 20;
/// How often is looked whether who rewrites packs has ended.
const NAP: Duration = Duration::from_millis(500);
/// A lost index node hides what it leads to, so it may take as many rounds as a tree has levels, and one for the clusters.
const ROUNDS: usize = 5;

/// What verifies, and mends what it finds.
pub struct Repair<'a> {
    pub tenant: Arc<Tenant>,
    pub heads: &'a Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
    /// The tenant of the other vault.
    pub from: Arc<Tenant>,
    pub what: What,
    pub part: Part,
    pub threads: usize,
    /// Bytes of packs a second, of each vault.
    pub limit_rate: Option<u64>,
    /// Told how many bytes there will be more than was known before.
    pub expect: &'a (dyn Fn(u64) + Sync),
    /// Told of each that was read.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Told what the administrator should know meanwhile.
    pub say: &'a (dyn Fn(&str) + Sync),
}

/// What became of the damage.
#[derive(Debug, Default, Serialize)]
pub struct Repaired {
    pub mended: Vec<Mended>,
    /// What is still damaged, each with why.
    pub not_mended: BTreeMap<String, String>,
    /// Generations that were replaced and are gone.
    pub removed: Vec<String>,
    /// Those that the storage does not let go of, as an object lock does, each with what it said.
    pub held_back: BTreeMap<String, String>,
}

/// A pack of which a generation was written that has more than the one before.
#[derive(Debug, Serialize)]
pub struct Mended {
    /// Key of the new generation.
    pub object: String,
    /// What was wrong.
    pub what: String,
    /// Restore points that it hurt.
    pub hurt: Vec<String>,
    /// Blobs that are from the copy.
    pub blobs: u64,
    /// Restore points of the copy that they are from.
    pub from: BTreeSet<String>,
}

/// What one round has done.
#[derive(Default)]
struct Round {
    touched: BTreeSet<PackId>,
    /// Whether there are index nodes again that were lost: what they lead to was not seen before.
    has_revealed: bool,
}

impl Repair<'_> {
    /// Verifies, mends, and verifies what was mended.
    pub fn run(&self) -> Result<(Report, Repaired), BackupError> {
        let mut repaired = Repaired::default();
        let mut report = self.verify(None)?;
        if report.damaged.is_empty() {
            self.finish_others(&mut repaired)?;
            return Ok((report, repaired));
        }
        let (_alone, has_waited) = self.alone()?;
        self.tenant.refresh()?;
        self.tenant.settle_new_epoch()?;
        if has_waited {
            // Others have removed and rewritten packs since.
            report = self.verify(None)?;
        }
        let mut kinds = BTreeMap::new();
        for _ in 0..ROUNDS {
            let round = self.round(&report, &mut kinds, &mut repaired)?;
            if round.touched.is_empty() {
                break;
            }
            let again = self.verify((!round.has_revealed).then(|| round.touched.clone()))?;
            report = if round.has_revealed { again } else { merged(report, again, &round.touched) };
            if report.damaged.is_empty() || !round.has_revealed {
                break;
            }
        }
        repaired.not_mended =
            report.damaged.iter().map(|damage| (damage.object.clone(), why(damage, &kinds).to_owned())).collect();
        match report.damaged.is_empty() {
            true => self.remove_superseded(&mut repaired)?,
            // A store that went away while it was read does not lack anything.
            false => _ = self.from.store().read_tail(layout::VAULT_FILE, 1).map_err(VaultError::from)?,
        }
        Ok((report, repaired))
    }

    fn throttle(&self) -> Option<Throttle> {
        self.limit_rate.map(Throttle::new)
    }

    fn verify(&self, only: Option<BTreeSet<PackId>>) -> Result<Report, BackupError> {
        let verify = Verify::new(self.tenant.clone(), self.heads, &self.state);
        let verify = verify.of_part(self.part, self.throttle()).only(only);
        verify.run(&self.what, self.threads, self.expect, self.progress)
    }

    /// Takes the one lease of who rewrites packs, and waits for it: a verification has taken its time already. Whether it had to.
    ///
    /// Nobody begins or ends a change of the data keys meanwhile, so no other lease is needed for what is sealed under them.
    fn alone(&self) -> Result<(Box<dyn Lease>, bool), BackupError> {
        let mut said = false;
        loop {
            match self.tenant.rekey_lease(&self.holder()) {
                Err(e @ VaultError::Busy { .. }) => {
                    if !std::mem::replace(&mut said, true) {
                        (self.say)(&format!("waiting for the end of who rewrites packs: {e}"));
                    }
                }
                lease => return Ok((lease?, said)),
            }
            thread::sleep(NAP);
        }
    }

    fn holder(&self) -> Holder {
        Holder::this_process("verify --repair-from".to_owned())
    }

    /// Mends what can be with what is known now.
    fn round(
        &self,
        report: &Report,
        kinds: &mut BTreeMap<PackId, Kind>,
        repaired: &mut Repaired,
    ) -> Result<Round, BackupError> {
        // All of it is made anew: what was read before may be of generations that are gone.
        let (packs, theirs) = [&self.tenant, &self.from].map(|of| Arc::new(Packs::new(of.clone(), TABLES))).into();
        let (tree, their_tree) = (Tree::new(packs.clone(), NODES), Tree::new(theirs.clone(), NODES));
        let pairs = Pairs::of(&self.tenant, self.heads, &self.from, &tree)?;
        *kinds = pairs.needed.iter().map(|(id, need)| (*id, need.kind)).collect();
        let throttle = self.throttle();
        let bad: BTreeSet<PackId> = report.damaged.iter().filter_map(|damage| damage.pack).collect();
        let bad: Vec<_> = bad.iter().filter_map(|id| pairs.needed.get_key_value(id)).collect();
        let patients = Mutex::new(Vec::new());
        spread(&bad, self.threads, &AtomicBool::new(false), |(id, need)| {
            patients.lock().push(Patient::examine(&packs, throttle.as_ref(), **id, need)?);
            Ok(())
        })?;
        let patients = patients.into_inner();
        let mut search = Search::new(&tree, &their_tree, &patients);
        for (ours, their) in &pairs.points {
            search.point(ours, their)?;
        }
        let found = search.found;
        let mender = Mender { packs: &packs, theirs: &theirs, found: &found, throttle: throttle.as_ref() };
        let shared = Mutex::new((Round::default(), repaired));
        let mend = |patient: &Patient<'_>, rebuilt: &Nodes| -> Result<(), BackupError> {
            let Some(written) = mender.mend(patient, rebuilt)? else { return Ok(()) };
            let mut shared = shared.lock();
            let (round, repaired) = &mut *shared;
            round.touched.insert(patient.id);
            round.has_revealed |= patient.need.kind != Kind::DataPack && patient.lacking().next().is_some();
            self.end(patient, written, pairs.is_whole, report, repaired)
        };
        let (clusters, nodes): (Vec<_>, Vec<_>) =
            patients.iter().filter(|patient| patient.is_bad()).partition(|patient| patient.need.kind == Kind::DataPack);
        spread(&clusters, self.threads, &AtomicBool::new(false), |patient| mend(patient, &Nodes::new()))?;
        let mended = shared.lock().0.touched.clone();
        self.forget_damage(&mended);
        if !nodes.is_empty() {
            self.nodes(&nodes, &found, &their_tree, &mend)?;
        }
        // What was found right, for somebody else was faster, is looked at again, too.
        let mut round = shared.into_inner().0;
        round.touched.extend(patients.iter().filter(|patient| !patient.is_bad()).map(|patient| patient.id));
        Ok(round)
    }

    /// Makes index nodes again, after the clusters that they lead to.
    fn nodes(
        &self,
        patients: &[&Patient<'_>],
        found: &Found,
        theirs: &Tree,
        mend: &dyn Fn(&Patient<'_>, &Nodes) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        let (known, no_lookup) = open_known(&self.tenant, &Caches::new(self.tenant.clone(), KNOWN), &self.state)?;
        if let Some(warning) = no_lookup {
            (self.say)(&warning);
        }
        let throttle = self.throttle();
        let mut rebuilder = Rebuilder::new(&self.tenant, &known, theirs, throttle.as_ref())?;
        for patient in patients {
            let mut rebuilt = Nodes::new();
            for ordinal in patient.lacking() {
                if let Some(node) = found.nodes.get(&(patient.id, ordinal)) {
                    rebuilt.extend(rebuilder.node(node)?.map(|content| (ordinal, content)));
                }
            }
            mend(patient, &rebuilt)?;
        }
        Ok(())
    }

    /// Says what was written, and removes what it has replaced.
    fn end(
        &self,
        patient: &Patient<'_>,
        written: Written,
        is_whole: bool,
        report: &Report,
        repaired: &mut Repaired,
    ) -> Result<(), BackupError> {
        let of_pack = || report.damaged.iter().filter(|damage| damage.pack == Some(patient.id));
        repaired.mended.push(Mended {
            object: generations::key(&self.tenant, &written.file),
            what: of_pack().map(|damage| damage.what.as_str()).collect::<Vec<_>>().join("; "),
            hurt: of_pack().flat_map(|damage| damage.hurts.clone()).collect(),
            blobs: written.from.values().sum(),
            from: written.from.into_keys().map(|point| point.to_string()).collect(),
        });
        // Where not all is known that is needed, what was left out may be.
        if written.has_all && (is_whole || !written.has_left_out) {
            self.remove(&patient.generations, &written.file, repaired)?;
        }
        Ok(())
    }

    /// Removes generations in whose place that one is.
    fn remove(&self, files: &[PackFile], by: &PackFile, repaired: &mut Repaired) -> Result<(), BackupError> {
        for file in files {
            match generations::remove(&self.tenant, file, Some(by))? {
                Removal::Done => repaired.removed.push(generations::key(&self.tenant, file)),
                Removal::WasGone => {}
                Removal::HeldBack(why) => {
                    _ = repaired.held_back.insert(generations::key(&self.tenant, file), why);
                }
            }
        }
        Ok(())
    }

    /// Backups may rely again on what was mended.
    fn forget_damage(&self, mended: &BTreeSet<PackId>) {
        let folder = lookup_folder(&self.state, &self.tenant.keys().scope());
        // Where there is no lookup, no damage is known.
        let _ = Lookup::open(&folder).and_then(|lookup| lookup.mended(mended));
    }

    /// Who died after the next generation was written has left the one before. Where somebody is rewriting packs, it is his.
    fn finish_others(&self, repaired: &mut Repaired) -> Result<(), BackupError> {
        if self.superseded()?.is_empty() {
            return Ok(());
        }
        match self.tenant.rekey_lease(&self.holder()) {
            Ok(_alone) => self.remove_superseded(repaired),
            Err(VaultError::Busy { .. }) => Ok(()),
            // A vault that takes nothing is verified all the same.
            Err(VaultError::Store(e)) if e.is_refused() => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Packs of which there are several generations; none if not all was verified.
    fn superseded(&self) -> Result<Vec<Listed>, BackupError> {
        if self.what != What::Everything || self.part != Part::All {
            return Ok(Vec::new());
        }
        let mut listed = by_pack(Packs::new(self.tenant.clone(), 0).list()?);
        listed.retain(|pack| !pack.older.is_empty());
        Ok(listed)
    }

    /// Removes all but the newest generation of each pack, where everything was found whole a moment ago.
    fn remove_superseded(&self, repaired: &mut Repaired) -> Result<(), BackupError> {
        let packs = Packs::new(self.tenant.clone(), 0);
        for Listed { newest, older } in self.superseded()? {
            tables_open(&packs, newest)?;
            self.remove(&older, &newest, repaired)?;
        }
        Ok(())
    }
}

/// What was found of the packs that were mended takes the place of what was known of them.
fn merged(before: Report, again: Report, touched: &BTreeSet<PackId>) -> Report {
    let is_touched = |damage: &Damage| damage.pack.is_none_or(|id| touched.contains(&id));
    let mut damaged: Vec<Damage> = again.damaged.into_iter().filter(|damage| is_touched(damage)).collect();
    damaged.extend(before.damaged.into_iter().filter(|damage| !is_touched(damage)));
    Report { damaged, ..before }
}

/// Why something is damaged still, and what to do about it.
fn why(damage: &Damage, kinds: &BTreeMap<PackId, Kind>) -> &'static str {
    match damage.pack.map(|id| kinds.get(&id)) {
        None => {
            "only packs are mended: put it back from a copy of this vault's files; a restore point of that time is in the other vault"
        }
        Some(None) => "no restore point needs it: `reseal prune` removes it",
        Some(Some(Kind::DataPack)) => {
            "no restore point of the other vault has all of what is missing: put it back from a copy of this vault's files"
        }
        Some(Some(_)) => {
            "no restore point of the other vault tells what the index led to there: put it back from a copy of this vault's files"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_verified_again_takes_the_place_of_what_was_known_of_it() {
        let pack = |n: u8| PackId::from_bytes([n; 16]);
        let damage = |name: &str, pack| Damage { object: name.into(), what: "x".into(), hurts: Vec::new(), pack };
        let report = |damaged: Vec<Damage>| Report { damaged, ..Report::default() };
        let before = report(vec![damage("1.0", Some(pack(1))), damage("2.0", Some(pack(2))), damage("note", None)]);
        let again = report(vec![damage("1.1", Some(pack(1))), damage("2.0", Some(pack(2))), damage("note", None)]);
        let left = merged(before, again, &[pack(1), pack(3)].into()).damaged;
        let left: Vec<_> = left.iter().map(|damage| damage.object.as_str()).collect();
        assert_eq!(left, ["1.1", "note", "2.0"]);
    }

    #[test]
    fn what_is_not_mended_says_what_to_do() {
        let [data, index, garbage] = [1, 2, 3].map(|n| PackId::from_bytes([n; 16]));
        let kinds = [(data, Kind::DataPack), (index, Kind::IndexPack)].into();
        let said = |pack| why(&Damage { object: "x".into(), what: "y".into(), hurts: Vec::new(), pack }, &kinds);
        assert!(said(None).contains("only packs"));
        assert!(said(Some(garbage)).contains("reseal prune"));
        assert!(said(Some(data)).contains("has all of what is missing"));
        assert!(said(Some(index)).contains("what the index led to"));
    }
}
