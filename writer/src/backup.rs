//! A backup from its sources to its manifest.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use reseal_format::ids::{Digest, PointId, VmId};
use reseal_format::keys::Kind;
use reseal_format::layout::MAX_NUMBER;
use reseal_format::manifest::{Definition, Disk, MAX_TEXT, Manifest, Parent, Stats};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_vault::heads::Heads;
use reseal_vault::{PackFile, Packs, Tenant, Tree, VaultError, random};

use crate::BackupError;
use crate::assemble::Assembler;
use crate::finisher::Finisher;
use crate::known::Known;
use crate::lookup::{Lookup, lookup_folder};
use crate::pipeline::Job;
use crate::source::Source;
pub use crate::worker::Encoding;

/// Bytes of pack tables and of index nodes that a backup keeps.
const TABLES: usize = 128 << 20;
const NODES: usize = 16 << 20;
/// How far the newest point may be ahead of the clock before it is worth a warning.
const MAX_AHEAD_MS: i64 = 60_000;

/// What to back up, and how.
pub struct Backup<'a> {
    pub tenant: Arc<Tenant>,
    pub heads: &'a Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
    pub vm: VmName,
    pub disks: Vec<(DiskName, Source)>,
    pub definition: Option<Definition>,
    pub encoding: Encoding,
    pub workers: usize,
    /// Told of bytes read.
    pub progress: &'a (dyn Fn(u64) + Sync),
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
    /// Disks of the newest live point, against which changes are found.
    disks: Vec<Disk>,
    not_before: Timestamp,
}

impl Backup<'_> {
    /// Makes one restore point.
    pub fn run(self) -> Result<Backed, BackupError> {
        let began = Instant::now();
        self.tenant.store().sweep().map_err(VaultError::from)?;
        let position = self.position().map_err(|e| match e {
            BackupError::Vault(source) if source.damaged_object().is_some() => BackupError::Newest { source },
            other => other,
        })?;
        let (known, no_lookup) = self.known()?;
        let known = Arc::new(known);
        let finisher = Finisher::new(known.clone());
        let mut assembler = Assembler::new(self.tenant.clone(), &finisher);
        let mut disks = Vec::with_capacity(self.disks.len());
        for (name, source) in &self.disks {
            let parent = position.disks.iter().find(|disk| disk.name == *name);
            let (known, encoding, progress) = (&*known, self.encoding, self.progress);
            let job = Job { source, known, parent, encoding, workers: self.workers, progress };
            let (root, used_clusters) = job.run(&mut assembler)?;
            let source_text = source.path().chars().take(MAX_TEXT / 4).collect();
            disks.push(Disk {
                name: name.clone(),
                length: source.length(),
                root,
                used_clusters,
                source: source_text,
                tracking: None,
                claim: None,
            });
        }
        assembler.close()?;
        let counted = assembler.counted;
        let mut warnings = self.warnings()?;
        warnings.extend(no_lookup);
        let clock = now()?;
        let created = clock.max(Timestamp(position.not_before.0 + 1));
        if created.0 - clock.0 > MAX_AHEAD_MS {
            warnings.push(format!("this machine's clock says {clock}, but the restore point before this one is later"));
        }
        let stored = finisher.wait()?;
        let stats = Stats {
            read: counted.read,
            changed: counted.changed,
            new: counted.new,
            stored,
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let manifest = Manifest {
            vm: self.vm.clone(),
            vm_id: position.vm_id,
            number: position.number,
            point_id: PointId::from_bytes(random()?),
            created,
            parent: position.parent,
            disks,
            definition: self.definition,
            stats,
            warnings,
        };
        let digest = self.tenant.commit(&manifest)?;
        // The point exists, whatever becomes of the memory of it.
        let remembered = self.heads.remember(self.tenant.keys().record_generation(), &[(self.vm, manifest.number)]);
        Ok(Backed { manifest, digest, not_remembered: remembered.err() })
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
            return Ok(Position { number, vm_id, parent: None, disks: Vec::new(), not_before: Timestamp(0) });
        };
        let (vm_id, not_before) = match (&point, &newest) {
            (Some(point), _) => (point.manifest.vm_id, point.manifest.created),
            (None, newest) => {
                let tombstone = self.tenant.tombstone(&self.vm, parent.number)?;
                let live = newest.as_ref().map_or(Timestamp(0), |point| point.manifest.created);
                (tombstone.vm_id, tombstone.created.max(live))
            }
        };
        let disks = newest.map_or_else(Vec::new, |point| point.manifest.disks);
        Ok(Position { number, vm_id, parent: Some(parent), disks, not_before })
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
        // What it held before the listing and is not in it is gone; what others learnt meanwhile is not.
        let present = packs.list()?;
        let names: BTreeSet<_> = present.iter().map(|pack| (pack.id, pack.generation)).collect();
        let gone: Vec<_> = held.difference(&names).map(|(id, _)| *id).collect();
        let unknown: Vec<_> = present.into_iter().filter(|pack| !held.contains(&(pack.id, pack.generation))).collect();
        if !gone.is_empty() {
            let _ = lookup.forget(gone.into_iter());
        }
        packs.settle(&unknown)?;
        for pack in unknown {
            learn(&packs, &lookup, pack);
        }
        Ok((Known { packs, tree, lookup: Some(lookup), damaged }, None))
    }

    fn warnings(&self) -> Result<Vec<String>, BackupError> {
        let mut warnings = Vec::new();
        for (name, source) in &self.disks {
            if source.changed()? {
                warnings.push(format!(
                    "{name}: {} was written to while it was read, so the disk may hold parts of different moments",
                    source.path()
                ));
            }
        }
        Ok(warnings)
    }
}

/// Lets the lookup learn a pack that it does not know: one of another machine, or one that an aborted backup left.
fn learn(packs: &Packs, lookup: &Lookup, pack: PackFile) {
    // A damaged pack is nothing to deduplicate against; `verify` reports it.
    let Ok(handle) = packs.open_generation(pack.id, pack.generation) else { return };
    let ids = match handle.trailer().kind {
        Kind::DataPack => packs.read_ids(&handle),
        _ => Ok(Vec::new()),
    };
    if let Ok(ids) = ids {
        // What it does not learn now, the next backup will.
        let _ = lookup.learn(pack.id, pack.generation, &ids);
    }
}

/// The time, in milliseconds since 1970.
fn now() -> Result<Timestamp, BackupError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = since.ok().and_then(|since| i64::try_from(since.as_millis()).ok()).map(Timestamp);
    millis
        .filter(|time| time.is_sane())
        .ok_or_else(|| BackupError::Usage("this machine's clock is outside the years 1970 to 9999; set it".into()))
}
