//! Which VMs and restore points there are. What is here may wait for the store, unless it is told not to.
//!
//! A chain is listed anew when what is known of it is older than a second, so new points appear by themselves. A manifest
//! never changes, so an opened one is kept while there is room, and its time for ever: names of points are their times,
//! and one listing of a VM needs them all.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use reseal_format::manifest::Manifest;
use reseal_format::names::VmName;
use reseal_format::time::Timestamp;
use reseal_vault::cache::{Cache, Weigh};
use reseal_vault::heads::Heads;
use reseal_vault::{Chain, Point, Points, VaultError, Wait, open_newest};

use crate::files::OpenPoint;
use crate::inodes::{MAX_VMS, VmIndex};
use crate::journal::Journal;

/// How long a listing counts as recent: so long may it take until a new restore point is found by its name.
const RECENT: Duration = Duration::from_secs(1);
/// Opened manifests, with their definitions, take at most about so much.
const POINT_BYTES: usize = 16 << 20;
/// Listings take at most about so much.
const CHAIN_BYTES: usize = 8 << 20;
/// Manifests that are opened together: what a site is asked for at once, and what a thread of its own is worth.
const TOGETHER: usize = 32;

/// What a mount is limited to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    All,
    Vm(VmName),
    Point(VmName, u32),
}

impl Shown {
    fn admits(&self, vm: &VmName) -> bool {
        match self {
            Shown::All => true,
            Shown::Vm(only) | Shown::Point(only, _) => only == vm,
        }
    }
}

/// How old a listing may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// About a second.
    Recent,
    /// It is made now.
    New,
}

struct Listed {
    at: Instant,
    live: Vec<u32>,
}

impl Weigh for Listed {
    fn weight(&self) -> usize {
        size_of::<Listed>() + self.live.len() * 4
    }
}

struct KnownVm {
    name: VmName,
    /// Times of points whose manifests were opened.
    times: Mutex<BTreeMap<u32, Timestamp>>,
}

#[derive(Default)]
struct KnownVms {
    in_order: Vec<Arc<KnownVm>>,
    by_name: HashMap<VmName, VmIndex>,
}

/// VMs and their points.
pub struct Catalog {
    points: Arc<dyn Points>,
    heads: Option<Heads>,
    shown: Shown,
    journal: Arc<Journal>,
    /// Threads that open manifests of one listing.
    openers: usize,
    vms: RwLock<KnownVms>,
    chains: Cache<VmIndex, Arc<Listed>>,
    opened: Cache<(VmIndex, u32), Arc<OpenPoint>>,
}

impl Catalog {
    /// A catalogue of what is shown of a tenant. With `heads`, a vault that was rolled back is noticed.
    pub fn new(points: Arc<dyn Points>, heads: Option<Heads>, shown: Shown, journal: Arc<Journal>) -> Catalog {
        let (chains, opened) = (Cache::new(CHAIN_BYTES), Cache::new(POINT_BYTES));
        Catalog { points, heads, shown, journal, openers: 1, vms: RwLock::default(), chains, opened }
    }

    /// Opens the manifests of a listing with so many threads, where one that waits for many answers is not enough.
    pub fn with_openers(self, openers: usize) -> Catalog {
        Catalog { openers, ..self }
    }

    /// Whether single points are hidden, so that there is no latest one.
    pub fn is_one_point(&self) -> bool {
        matches!(self.shown, Shown::Point(..))
    }

    fn known(&self, vm: VmIndex) -> Result<Arc<KnownVm>, VaultError> {
        let known = self.vms.read().in_order.get(vm.0 as usize).cloned();
        // An inode number that this mount never gave out.
        known.ok_or_else(|| VaultError::BadPoint { text: format!("VM {}", vm.0) })
    }

    /// A VM's name.
    pub fn name(&self, vm: VmIndex) -> Option<VmName> {
        self.known(vm).ok().map(|known| known.name.clone())
    }

    fn index(&self, name: &VmName) -> Option<VmIndex> {
        if let Some(&index) = self.vms.read().by_name.get(name) {
            return Some(index);
        }
        let mut vms = self.vms.write();
        if let Some(&index) = vms.by_name.get(name) {
            return Some(index);
        }
        let index = VmIndex(u32::try_from(vms.in_order.len()).ok().filter(|&index| index < MAX_VMS)?);
        let known = KnownVm { name: name.clone(), times: Mutex::default() };
        vms.in_order.push(Arc::new(known));
        vms.by_name.insert(name.clone(), index);
        Some(index)
    }

    /// The VMs that are shown.
    pub fn vms(&self) -> Result<Vec<(VmIndex, VmName)>, VaultError> {
        let names = self.points.vms()?;
        for known in self.heads.as_ref().map_or(Ok(Vec::new()), Heads::known_vms)? {
            if self.shown.admits(&known) && !names.contains(&known) {
                self.journal.say(&format!(
                    "the VM {known} was in this vault before and is gone: the vault may have been rolled back"
                ));
            }
        }
        let shown = names.into_iter().filter(|name| self.shown.admits(name));
        Ok(shown.filter_map(|name| self.index(&name).map(|index| (index, name))).collect())
    }

    /// The VM of that name, if it has or had a restore point.
    pub fn find_vm(&self, name: &str, wait: Wait) -> Result<Option<VmIndex>, VaultError> {
        let Ok(name) = VmName::new(name) else { return Ok(None) };
        if !self.shown.admits(&name) {
            return Ok(None);
        }
        let known = self.vms.read().by_name.get(&name).copied();
        match known {
            Some(index) => Ok(Some(index)),
            None if wait == Wait::MustNot => Err(VaultError::WouldBlock),
            // Only a VM that is there gets an index: names that somebody makes up must not fill the memory.
            None if self.chain(&name)?.last() == 0 => Ok(None),
            None => Ok(self.index(&name)),
        }
    }

    /// The numbers of a VM's points that can be read, in their order.
    pub fn live(&self, vm: VmIndex, age: Age, wait: Wait) -> Result<Vec<u32>, VaultError> {
        if age == Age::Recent
            && let Some(listed) = self.chains.get(&vm).filter(|listed| listed.at.elapsed() < RECENT)
        {
            return Ok(listed.live.clone());
        }
        if wait == Wait::MustNot {
            return Err(VaultError::WouldBlock);
        }
        Ok(self.list(vm)?.1.live.clone())
    }

    /// Lists a VM's chain, which is then what counts as recent.
    fn list(&self, vm: VmIndex) -> Result<(Chain, Arc<Listed>), VaultError> {
        let known = self.known(vm)?;
        // Taken before the listing: what appears while it is made may not be in it.
        let at = Instant::now();
        let chain = self.chain(&known.name)?;
        let live = chain.live().filter(|&number| match &self.shown {
            Shown::Point(_, only) => number == *only,
            Shown::All | Shown::Vm(_) => true,
        });
        let listed = Arc::new(Listed { at, live: live.collect() });
        self.chains.put(vm, listed.clone());
        Ok((chain, listed))
    }

    /// The numbers of a VM, held against what this machine has seen before.
    fn chain(&self, vm: &VmName) -> Result<Chain, VaultError> {
        match &self.heads {
            Some(heads) => heads.whole_chain(&*self.points, vm),
            None => self.points.chain(vm),
        }
    }

    /// A point, opened.
    pub fn point(&self, vm: VmIndex, number: u32, wait: Wait) -> Result<Arc<OpenPoint>, VaultError> {
        if let Some(point) = self.opened.get(&(vm, number)) {
            return Ok(point);
        }
        if wait == Wait::MustNot {
            return Err(VaultError::WouldBlock);
        }
        let known = self.known(vm)?;
        Ok(self.keep(&known, vm, self.points.point(&known.name, number)?))
    }

    fn keep(&self, known: &KnownVm, vm: VmIndex, point: Point) -> Arc<OpenPoint> {
        let point = Arc::new(OpenPoint::new(point));
        let Manifest { number, created, .. } = point.manifest();
        known.times.lock().insert(*number, *created);
        self.opened.put((vm, *number), point.clone());
        point
    }

    /// When a point was made.
    pub fn time(&self, vm: VmIndex, number: u32, wait: Wait) -> Result<Timestamp, VaultError> {
        let time = self.known(vm)?.times.lock().get(&number).copied();
        match time {
            Some(time) => Ok(time),
            None => Ok(self.point(vm, number, wait)?.manifest().created),
        }
    }

    /// The time of the newest point; `None` if the VM has none.
    pub fn latest(&self, vm: VmIndex) -> Result<Option<Timestamp>, VaultError> {
        let known = self.known(vm)?;
        // Through `list`, for what this names is then looked up.
        let chain = &self.list(vm)?.0;
        // If it is damaged that is an error: an older one under this name would be taken for it.
        open_newest(&*self.points, &known.name, chain, |number| self.time(vm, number, Wait::May))
    }

    /// All points of a VM that open, with their times. One that is damaged is left out, and said; a store that does not
    /// answer is an error, for a shorter list would look whole.
    pub fn listing(&self, vm: VmIndex) -> Result<Vec<(u32, Timestamp)>, VaultError> {
        let live = self.live(vm, Age::New, Wait::May)?;
        let known = self.known(vm)?;
        let unknown: Vec<u32> = {
            let times = known.times.lock();
            live.iter().copied().filter(|number| !times.contains_key(number)).collect()
        };
        self.learn_times(vm, &unknown)?;
        let times = known.times.lock();
        let mut listed: Vec<(u32, Timestamp)> = Vec::with_capacity(live.len());
        for number in live {
            let Some(&time) = times.get(&number) else { continue };
            if listed.iter().rev().take(1).any(|(_, before)| *before >= time) {
                self.journal
                    .say(&format!("{}@{number} is not later than the point before it and is left out", known.name));
                continue;
            }
            listed.push((number, time));
        }
        Ok(listed)
    }

    fn learn_times(&self, vm: VmIndex, numbers: &[u32]) -> Result<(), VaultError> {
        let known = self.known(vm)?;
        let learn = |numbers: &[u32]| -> Result<(), VaultError> {
            for (&number, opened) in numbers.iter().zip(self.points.points(&known.name, numbers)) {
                match opened {
                    Ok(point) => drop(self.keep(&known, vm, point)),
                    Err(error) if error.damaged_object().is_some() => {
                        self.journal.say(&format!("{}@{number} is left out: {error}", known.name));
                    }
                    // Forgotten since it was listed.
                    Err(VaultError::NoPoint { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        let together: Vec<&[u32]> = numbers.chunks(TOGETHER).collect();
        if self.openers.min(together.len()) < 2 {
            return together.into_iter().try_for_each(learn);
        }
        let next = AtomicUsize::new(0);
        let run = || {
            while let Some(numbers) = together.get(next.fetch_add(1, Ordering::Relaxed)) {
                learn(numbers)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let runs: Vec<_> = (0..self.openers.min(together.len())).map(|_| scope.spawn(run)).collect();
            runs.into_iter().try_for_each(|run| run.join().expect("it opens manifests and does not panic"))
        })
    }

    /// The point of exactly that time.
    pub fn number_at(&self, vm: VmIndex, time: Timestamp, wait: Wait) -> Result<Option<u32>, VaultError> {
        let live = self.live(vm, Age::Recent, wait)?;
        let known = self.known(vm)?.times.lock().iter().find(|(_, known)| **known == time).map(|(&number, _)| number);
        if let Some(number) = known {
            return Ok(live.binary_search(&number).is_ok().then_some(number));
        }
        match self.search(vm, &live, time, wait) {
            Err(error) if error.damaged_object().is_some() && wait == Wait::May => {
                // Whether it is the damaged one that was asked for can't be known: not found would be a guess.
                let found = self.listing(vm)?.into_iter().find(|(_, other)| *other == time);
                found.map(|(number, _)| Some(number)).ok_or(error)
            }
            other => other,
        }
    }

    /// Times grow along a chain, so it is searched by halves.
    fn search(&self, vm: VmIndex, live: &[u32], time: Timestamp, wait: Wait) -> Result<Option<u32>, VaultError> {
        let (mut low, mut high) = (0, live.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.time(vm, live[middle], wait)?.cmp(&time) {
                std::cmp::Ordering::Equal => return Ok(Some(live[middle])),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}
