//! Copies restore points to another vault, sealed under its own keys.
//!
//! ```text
//! newest of the copy → which of the source is that? → those after it, oldest first → what differs from the one before → a backup of that
//! ```
//!
//! A copy has the id and the time of what it is a copy of, and a number of its own. So the newest of a VM in the other vault, be it forgotten
//! there, says how far it has come, and nothing else has to be remembered. What an interrupted copy has stored the next one finds.
//!
//! Architecture invariant: copies of a VM are made in the order of their times; what differs is told by the index of the source, which is
//! authenticated, and believed only over the copy of the very point that it is told against.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use reseal_format::geometry::{CLUSTER_U64, FANOUT, clusters_below, root_level};
use reseal_format::ids::PointId;
use reseal_format::index::BlobRef;
use reseal_format::manifest::{Disk, method};
use reseal_format::names::VmName;
use reseal_vault::disk::DiskReader;
use reseal_vault::heads::Heads;
use reseal_vault::{Packs, Point, Points, State, Tenant, Tree, VaultError, Wait};

use crate::BackupError;
use crate::backup::{Backed, Backup, CopyOf, Disks, Encoding, Input, Said, Since, Vault};
use crate::changes::Changes;
use crate::source::{PointSource, Source};
use crate::throttle::Throttle;

/// Bytes of clusters, and of tables and nodes, that are kept of the source: each cluster is read once.
const CACHE: usize = 32 << 20;
const TABLES: usize = 16 << 20;
const NODES: usize = 16 << 20;

/// What copies.
pub struct Copy<'a> {
    pub from: Arc<Tenant>,
    pub from_heads: &'a Heads,
    pub to: Arc<Tenant>,
    pub to_heads: &'a Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
    pub workers: usize,
    pub limit_rate: Option<u64>,
    /// Told of bytes read.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Told how many bytes there will be more than was known before.
    pub expect: &'a dyn Fn(u64),
    /// Told what the administrator should know meanwhile.
    pub say: &'a dyn Fn(&str),
}

/// What of a VM is to be copied.
pub struct Missing {
    vm: VmName,
    /// The point that the other vault's newest is a copy of, if both have it still: what differs can be told since then.
    base: Option<Point>,
    /// Ascending.
    numbers: Vec<u32>,
}

impl Missing {
    /// How many.
    pub fn count(&self) -> usize {
        self.numbers.len()
    }

    /// Their numbers in the source.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.numbers.iter().copied()
    }
}

/// What became of one.
pub enum Outcome {
    Copied {
        number: u32,
        made: Box<Backed>,
    },
    /// It is damaged in the source.
    LeftOut {
        number: u32,
        error: BackupError,
    },
}

impl Copy<'_> {
    /// What the other vault lacks of a VM.
    pub fn missing(&self, vm: &VmName) -> Result<Missing, BackupError> {
        let theirs = self.to_heads.whole_chain(&*self.to, vm)?;
        // The newest that is a copy, forgotten or not; what was given up never was one.
        let mut newest = None;
        for (number, _) in theirs.numbers().rev().filter(|(_, state)| *state != State::Missing) {
            if let Some(id) = self.id_of(&self.to, vm, number)? {
                newest = Some((number, id));
                break;
            }
        }
        let ours = self.from_heads.whole_chain(&*self.from, vm)?;
        if ours.last() == 0 {
            return Err(VaultError::NoVm { vm: vm.clone() }.into());
        }
        let mut numbers: Vec<u32> = ours.live().collect();
        let Some((theirs, id)) = newest else { return Ok(Missing { vm: vm.clone(), base: None, numbers }) };
        let mut damaged = None;
        for (number, _) in ours.numbers().rev().filter(|(_, state)| *state != State::Missing) {
            let found = match self.id_of(&self.from, vm, number) {
                // One that is damaged may be it, or not.
                Err(BackupError::Vault(e)) if e.damaged_object().is_some() => {
                    damaged.get_or_insert(e);
                    None
                }
                other => other?,
            };
            if found == Some(id) {
                numbers.retain(|other| *other > number);
                let base = self.from.point(vm, number).ok().filter(|_| self.to.point(vm, theirs).is_ok());
                return Ok(Missing { vm: vm.clone(), base, numbers });
            }
        }
        Err(match damaged {
            Some(source) => BackupError::Copied { source },
            None => BackupError::NoCopy { vm: vm.clone(), number: theirs },
        })
    }

    /// The id of a point, live or forgotten; `None` of one that never was.
    fn id_of(&self, tenant: &Tenant, vm: &VmName, number: u32) -> Result<Option<PointId>, BackupError> {
        match tenant.point(vm, number) {
            Ok(point) => return Ok(Some(point.manifest.point_id)),
            Err(VaultError::NoPoint { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        let tombstone = tenant.forgotten(vm, number)?;
        Ok((!tombstone.fenced).then_some(tombstone.point_id))
    }

    /// Copies it, oldest first, and tells of each. What is damaged in the source is left out.
    pub fn run(&self, missing: Missing, told: &mut dyn FnMut(Outcome)) -> Result<(), BackupError> {
        let Missing { vm, mut base, numbers } = missing;
        let packs = Arc::new(Packs::new(self.from.clone(), TABLES));
        let (tree, reader) = (Tree::new(packs, NODES), Arc::new(DiskReader::new(self.from.clone(), CACHE)));
        for number in numbers {
            let point = match self.from.point(&vm, number) {
                // Forgotten meanwhile.
                Err(VaultError::NoPoint { .. }) => continue,
                Err(e) if e.damaged_object().is_some() => {
                    told(Outcome::LeftOut { number, error: e.into() });
                    continue;
                }
                point => point?,
            };
            let what = format!("copy of {vm}@{number}");
            let _leases = match self.from.pin_point(Some(&point), what.clone()) {
                Err(VaultError::NoPoint { .. }) => continue,
                lease => (lease?, base.as_ref().map(|base| self.from.pin_point(Some(base), what))),
            };
            match self.point(&tree, &reader, &point, base.as_ref()) {
                Ok(made) => {
                    told(Outcome::Copied { number, made: Box::new(made) });
                    base = Some(point);
                }
                Err(error @ BackupError::Copied { .. }) if error.status() == reseal_cli::Status::Damaged => {
                    told(Outcome::LeftOut { number, error });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn point(
        &self,
        tree: &Tree,
        reader: &Arc<DiskReader>,
        point: &Point,
        base: Option<&Point>,
    ) -> Result<Backed, BackupError> {
        let manifest = &point.manifest;
        let vm = &manifest.vm;
        // The copy of the base: what differs is told since then.
        let newest = base.map(|base| -> Result<_, VaultError> {
            let chain = self.to.chain(vm)?;
            let newest = self.to.newest_point(vm, &chain)?;
            Ok(newest.filter(|newest| newest.manifest.point_id == base.manifest.point_id).map(|newest| (base, newest)))
        });
        let newest = newest.transpose()?.flatten();
        let mut inputs = Vec::with_capacity(manifest.disks.len());
        for disk in &manifest.disks {
            let name = if disk.source.is_empty() { disk.name.to_string() } else { disk.source.clone() };
            let source = Source::Point(Box::new(PointSource::new(reader.clone(), disk.clone(), name)));
            let before = newest.as_ref().and_then(|(base, newest)| {
                let same = |other: &&Disk| other.name == disk.name && other.length == disk.length;
                Some((base.manifest.disks.iter().find(same)?, newest.manifest.number))
            });
            let said = match before {
                None => None,
                Some((before, since)) => match differences(tree, before, disk) {
                    Ok(areas) => Some(Said {
                        method: method::COPY.to_owned(),
                        id: manifest.point_id.to_string(),
                        since: Since::Number(since),
                        changes: Some(Changes::of_areas(disk.length, areas)),
                        check_percent: 0.0,
                    }),
                    // What can't be compared is read.
                    Err(e) if e.damaged_object().is_some() => None,
                    Err(e) => return Err(e.into()),
                },
            };
            (self.expect)(match &said {
                Some(Said { changes: Some(changes), .. }) => changes.bytes(),
                _ => source.expected(),
            });
            inputs.push(Input { name: disk.name.clone(), source, said, tracking: None });
        }
        let backup = Backup {
            vm: vm.clone(),
            disks: Disks::Given(inputs),
            definition: manifest.definition.clone(),
            copy_of: Some(CopyOf {
                point: manifest.point_id,
                created: manifest.created,
                warnings: manifest.warnings.clone(),
            }),
            encoding: Encoding::DEFAULT,
            workers: self.workers,
            throttle: self.limit_rate.map(Throttle::new),
            progress: self.progress,
            expect: &|_| {},
            say: self.say,
        };
        let to = Vault { tenant: self.to.clone(), heads: self.to_heads, state: self.state.clone() };
        backup.run(to)
    }
}

/// Areas of a disk that another index maps to other blobs, or to none; ascending. Subtrees that are shared are not read.
fn differences(tree: &Tree, before: &Disk, after: &Disk) -> Result<Vec<Range<u64>>, VaultError> {
    let mut areas = Vec::new();
    let roots = [before.root.map(BlobRef::from), after.root.map(BlobRef::from)];
    compare(tree, roots, root_level(after.length), 0, &mut areas)?;
    let end = after.length;
    Ok(areas.into_iter().map(|area| area.start..area.end.min(end)).filter(|area| !area.is_empty()).collect())
}

fn compare(
    tree: &Tree,
    [before, after]: [Option<BlobRef>; 2],
    level: u8,
    first: u64,
    areas: &mut Vec<Range<u64>>,
) -> Result<(), VaultError> {
    let place = |blob: Option<BlobRef>| blob.map(|blob| (blob.pack, blob.ordinal));
    if place(before) == place(after) {
        return Ok(());
    }
    let nodes = [before, after].map(|blob| blob.map(|blob| tree.node(blob, level, Wait::May)).transpose());
    let [before, after] = nodes;
    let (before, after) = (before?, after?);
    for (slot, nth) in (0..FANOUT).zip(0..) {
        let children = [&before, &after].map(|node| node.as_ref().and_then(|node| node.get(slot)));
        if level > 0 {
            compare(tree, children, level - 1, first + nth * clusters_below(level - 1), areas)?;
        } else if place(children[0]) != place(children[1]) {
            let start = (first + nth) * CLUSTER_U64;
            match areas.last_mut() {
                Some(last) if last.end == start => last.end += CLUSTER_U64,
                _ => areas.push(start..start + CLUSTER_U64),
            }
        }
    }
    Ok(())
}
