//! VMs, their chains, and single restore points.

use std::collections::BTreeMap;

use reseal_format::geometry::MAX_DISK;
use reseal_format::ids::Digest;
use reseal_format::keys::Kind;
use reseal_format::layout::{self, MAX_NUMBER, PointFile, parse_point_file};
use reseal_format::manifest::{Manifest, Parent, Tombstone};
use reseal_format::names::VmName;
use reseal_format::seal;
use reseal_format::time::Timestamp;
use reseal_format::vaultfile::MAX_VAULT_FILE;
use reseal_store::StoreError;
use zeroize::Zeroizing;

use crate::tenant::random;
use crate::{Tenant, VaultError};

/// Whether a number of a chain can still be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has a manifest.
    Live,
    /// It has a tombstone.
    Forgotten,
    /// It has neither, though later numbers exist: damage.
    Missing,
}

/// The numbers of a VM's restore points, from 1 on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain(BTreeMap<u32, State>);

impl Chain {
    /// The chain of what a listing of the VM's folder names.
    fn from_names<'a>(names: impl Iterator<Item = &'a str>) -> Chain {
        let mut states = BTreeMap::new();
        for name in names {
            match parse_point_file(name) {
                // A tombstone counts even where its manifest is still there: it was about to be deleted.
                Some(PointFile::Tombstone(number)) => drop(states.insert(number, State::Forgotten)),
                Some(PointFile::Manifest(number)) => drop(states.entry(number).or_insert(State::Live)),
                None => {}
            }
        }
        let last = states.keys().next_back().copied().unwrap_or(0);
        // A hostile listing may jump to the highest number: the gap is one fact, so only its ends are kept.
        let mut expected = 1;
        for number in states.keys().copied().collect::<Vec<_>>() {
            if number > expected {
                states.insert(expected, State::Missing);
                states.insert(number - 1, State::Missing);
            }
            expected = number.saturating_add(1);
        }
        debug_assert!(states.keys().next_back().copied().unwrap_or(0) == last);
        Chain(states)
    }

    /// The chain of numbers as [`Chain::numbers`] yields them; `None` if no chain does.
    pub fn of_numbers(numbers: impl IntoIterator<Item = (u32, State)>) -> Option<Chain> {
        let mut states = BTreeMap::new();
        let mut before = (0u32, State::Live);
        for (number, state) in numbers {
            let follows = before.0.checked_add(1) == Some(number);
            // Only a gap is told by its ends.
            let ends = number > before.0 && (before.1, state) == (State::Missing, State::Missing);
            if !(follows || ends) || number > MAX_NUMBER {
                return None;
            }
            states.insert(number, state);
            before = (number, state);
        }
        // A gap is there because something comes after it.
        (before.1 != State::Missing).then_some(Chain(states))
    }

    /// Every number with its state; of a gap only the first and the last number.
    pub fn numbers(&self) -> impl DoubleEndedIterator<Item = (u32, State)> + '_ {
        self.0.iter().map(|(&number, &state)| (number, state))
    }

    /// The numbers that have a manifest.
    pub fn live(&self) -> impl DoubleEndedIterator<Item = u32> + '_ {
        self.numbers().filter(|(_, state)| *state == State::Live).map(|(number, _)| number)
    }

    /// Whether a number must have existed but has neither manifest nor tombstone.
    pub fn is_gap(&self, number: u32) -> bool {
        let before = self.0.range(..=number).next_back();
        number > 0 && number < self.last() && before.is_none_or(|(&n, &state)| state == State::Missing || n == 0)
    }

    /// The highest number that was given, live or forgotten; 0 if none was.
    pub fn last(&self) -> u32 {
        self.0.keys().next_back().copied().unwrap_or(0)
    }
}

/// A restore point whose manifest was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    pub manifest: Manifest,
    /// Digest of the manifest's plaintext.
    pub digest: Digest,
}

/// Whether what stands in the place of a manifest says that there never will be one: see `fence`.
pub(crate) fn is_fence(object: &[u8]) -> bool {
    seal::kind(object) == Ok(Kind::Tombstone)
}

/// The plaintext of what was sealed about a point.
pub enum Shown {
    Manifest(Zeroizing<Vec<u8>>),
    Tombstone(Zeroizing<Vec<u8>>),
}

/// How a user names a restore point: `VM@latest`, `VM@NUMBER` or `VM@TIME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointSpec {
    pub vm: VmName,
    pub which: Which,
}

/// Which point of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Latest,
    Number(u32),
    Time(Timestamp),
}

impl PointSpec {
    /// Parses; the last `@` ends the VM's name.
    pub fn parse(text: &str) -> Result<PointSpec, VaultError> {
        let bad = || VaultError::BadPoint { text: text.chars().take(200).collect() };
        let (vm, which) = text.rsplit_once('@').ok_or_else(bad)?;
        let which = match which {
            "latest" => Which::Latest,
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => Which::Number(digits.parse().map_err(|_| bad())?),
            time => Which::Time(Timestamp::parse(time).ok_or_else(bad)?),
        };
        Ok(PointSpec { vm: VmName::new(vm).map_err(|_| bad())?, which })
    }
}

/// Where restore points are read from: a tenant that this process has the keys of, or another site that has them.
pub trait Points: Send + Sync {
    /// The VMs that have, or had, restore points, sorted by name.
    fn vms(&self) -> Result<Vec<VmName>, VaultError>;

    /// The numbers of a VM's restore points. A VM that has none has an empty chain.
    fn chain(&self, vm: &VmName) -> Result<Chain, VaultError>;

    /// Opens a point.
    fn point(&self, vm: &VmName, number: u32) -> Result<Point, VaultError>;

    /// Opens a tombstone.
    fn tombstone(&self, vm: &VmName, number: u32) -> Result<Tombstone, VaultError>;

    /// Opens several points of a VM, each with its own result, in their order. Where each answer takes its time, they are asked
    /// for together.
    fn points(&self, vm: &VmName, numbers: &[u32]) -> Vec<Result<Point, VaultError>> {
        numbers.iter().map(|&number| self.point(vm, number)).collect()
    }

    /// The same of tombstones.
    fn tombstones(&self, vm: &VmName, numbers: &[u32]) -> Vec<Result<Tombstone, VaultError>> {
        numbers.iter().map(|&number| self.tombstone(vm, number)).collect()
    }

    /// What the object of a point is called where it is kept.
    fn object(&self, vm: &VmName, number: u32) -> String {
        format!("{vm}@{number}")
    }

    /// Opens the point that a user named.
    fn resolve(&self, spec: &PointSpec) -> Result<Point, VaultError> {
        let chain = self.chain(&spec.vm)?;
        if chain.last() == 0 {
            return Err(VaultError::NoVm { vm: spec.vm.clone() });
        }
        let missing = |point: String| VaultError::NoPoint { vm: spec.vm.clone(), point };
        match spec.which {
            Which::Number(number) if chain.is_gap(number) => Err(VaultError::Missing {
                object: self.object(&spec.vm, number),
                why: "it was removed without `reseal forget`, for later restore points exist and no tombstone does",
            }),
            Which::Number(number) => self.point(&spec.vm, number),
            Which::Latest => self.newest_point(&spec.vm, &chain)?.ok_or_else(|| missing(format!("{}@latest", spec.vm))),
            Which::Time(time) => {
                self.point_at(&spec.vm, &chain, time)?.ok_or_else(|| missing(format!("{}@{time}", spec.vm)))
            }
        }
    }

    /// The highest number that has a manifest. Tombstones above it are opened: one that somebody made up must not hide a
    /// newer point.
    fn newest(&self, vm: &VmName, chain: &Chain) -> Result<Option<u32>, VaultError> {
        for (number, state) in chain.numbers().rev() {
            match state {
                State::Live => return Ok(Some(number)),
                State::Forgotten => drop(self.tombstone(vm, number)?),
                State::Missing => {}
            }
        }
        Ok(None)
    }

    /// Opens the newest point: see [`open_newest`].
    fn newest_point(&self, vm: &VmName, chain: &Chain) -> Result<Option<Point>, VaultError> {
        open_newest(self, vm, chain, |number| self.point(vm, number))
    }

    /// The point of exactly that time. Times grow along a chain, so it is searched by halves.
    fn point_at(&self, vm: &VmName, chain: &Chain, time: Timestamp) -> Result<Option<Point>, VaultError> {
        let numbers: Vec<u32> = chain.live().collect();
        let (mut low, mut high) = (0, numbers.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let point = match self.point(vm, numbers[middle]) {
                // One that is damaged says nothing about the others: then each is looked at.
                Err(e) if e.damaged_object().is_some() => return whole_point_at(self, vm, &numbers, time),
                other => other?,
            };
            match point.manifest.created.cmp(&time) {
                std::cmp::Ordering::Equal => return Ok(Some(point)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

/// Opens the highest number of a chain that is a restore point: not one that was forgotten since it was listed, or that will never be
/// one.
pub fn open_newest<P: Points + ?Sized, T>(
    points: &P,
    vm: &VmName,
    chain: &Chain,
    open: impl Fn(u32) -> Result<T, VaultError>,
) -> Result<Option<T>, VaultError> {
    let mut chain = chain.clone();
    while let Some(number) = points.newest(vm, &chain)? {
        match open(number) {
            Err(VaultError::NoPoint { .. }) => chain.0.retain(|&other, _| other < number),
            other => return other.map(Some),
        }
    }
    Ok(None)
}

/// Finds the point of a time among numbers of which some are damaged.
fn whole_point_at<P: Points + ?Sized>(
    points: &P,
    vm: &VmName,
    numbers: &[u32],
    time: Timestamp,
) -> Result<Option<Point>, VaultError> {
    for &number in numbers {
        match points.point(vm, number) {
            Ok(point) if point.manifest.created == time => return Ok(Some(point)),
            Ok(_) | Err(VaultError::NoPoint { .. }) => {}
            Err(e) if e.damaged_object().is_some() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

impl Points for Tenant {
    fn vms(&self) -> Result<Vec<VmName>, VaultError> {
        let names = Tenant::vms(self)?;
        if names.is_empty() {
            // A place that is gone, such as a file system that was unmounted, lists nothing either.
            self.store.get(layout::VAULT_FILE, MAX_VAULT_FILE)?;
        }
        Ok(names)
    }

    fn chain(&self, vm: &VmName) -> Result<Chain, VaultError> {
        Tenant::chain(self, vm)
    }

    fn point(&self, vm: &VmName, number: u32) -> Result<Point, VaultError> {
        Tenant::point(self, vm, number)
    }

    fn tombstone(&self, vm: &VmName, number: u32) -> Result<Tombstone, VaultError> {
        Tenant::tombstone(self, vm, number)
    }

    fn object(&self, vm: &VmName, number: u32) -> String {
        layout::manifest(&self.name, vm, number)
    }
}

impl Tenant {
    /// The VMs that have a folder, sorted by name.
    pub fn vms(&self) -> Result<Vec<VmName>, VaultError> {
        let entries = self.store.list(&layout::vms(&self.name))?;
        let folders = entries.iter().filter(|entry| entry.is_folder);
        let mut names: Vec<_> = folders.filter_map(|entry| VmName::from_key(&entry.name)).collect();
        names.sort();
        Ok(names)
    }

    /// The numbers of a VM's restore points. A VM that has none has an empty chain.
    pub fn chain(&self, vm: &VmName) -> Result<Chain, VaultError> {
        let list = || -> Result<Chain, VaultError> {
            let entries = self.store.list(&layout::vm(&self.name, vm))?;
            Ok(Chain::from_names(entries.iter().map(|entry| entry.name.as_str())))
        };
        let chain = list()?;
        // A listing that is made while a tombstone takes the place of a manifest may show neither.
        if chain.numbers().any(|(_, state)| state == State::Missing) { list() } else { Ok(chain) }
    }

    /// Opens a manifest.
    pub fn point(&self, vm: &VmName, number: u32) -> Result<Point, VaultError> {
        let key = layout::manifest(&self.name, vm, number);
        let none = || VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") };
        let opened = self.open_sealed(&key, |keys, object| match is_fence(object) {
            true => Tombstone::open(keys, vm, number, object).map(|_| None),
            false => Manifest::open(keys, vm, number, object).map(Some),
        });
        match opened {
            Ok(Some((manifest, digest))) => Ok(Point { manifest, digest }),
            Ok(None) | Err(VaultError::Store(StoreError::NotFound(_))) => Err(none()),
            Err(e) => Err(e),
        }
    }

    /// Opens a tombstone.
    pub fn tombstone(&self, vm: &VmName, number: u32) -> Result<Tombstone, VaultError> {
        let key = layout::tombstone(&self.name, vm, number);
        self.open_sealed(&key, |keys, object| Tombstone::open(keys, vm, number, object))
    }

    /// Whether a number has a tombstone, be it whole or not.
    pub(crate) fn is_forgotten(&self, vm: &VmName, number: u32) -> Result<bool, VaultError> {
        match self.store.read_tail(&layout::tombstone(&self.name, vm, number), 0) {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound(_)) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// What was sealed about a point, opened and checked, for another site that has no keys. A tombstone counts even where the
    /// manifest is still there.
    pub fn shown(&self, vm: &VmName, number: u32) -> Result<Shown, VaultError> {
        let not_found = |e: &VaultError| matches!(e, VaultError::Store(StoreError::NotFound(_)));
        let tombstone = || {
            let key = layout::tombstone(&self.name, vm, number);
            let plain = |keys: &_, object: &_| Ok(Tombstone::open_plain(keys, vm, number, object)?.0);
            self.open_sealed(&key, plain).map(Shown::Tombstone)
        };
        match tombstone() {
            Err(e) if not_found(&e) => {}
            shown => return shown,
        }
        let key = layout::manifest(&self.name, vm, number);
        let plain = |keys: &_, object: &[u8]| match is_fence(object) {
            true => Ok(Shown::Tombstone(Tombstone::open_plain(keys, vm, number, object)?.0)),
            false => Ok(Shown::Manifest(Manifest::open_plain(keys, vm, number, object)?.0)),
        };
        match self.open_sealed(&key, plain) {
            // It may have been forgotten meanwhile.
            Err(e) if not_found(&e) => tombstone().map_err(|e| match not_found(&e) {
                true => VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") },
                false => e,
            }),
            shown => shown,
        }
    }

    /// Makes a restore point exist. All that it leads to must be durable already.
    pub fn commit(&self, manifest: &Manifest) -> Result<Digest, VaultError> {
        debug_assert!(manifest.disks.iter().all(|disk| disk.length <= MAX_DISK));
        let key = layout::manifest(&self.name, &manifest.vm, manifest.number);
        let (object, digest) = manifest.seal(&self.keys(), random()?).map_err(VaultError::damaged(&key))?;
        let (vm, number) = (manifest.vm.clone(), manifest.number);
        let made = self.upload(&key).and_then(|mut upload| {
            upload.append(&object)?;
            Ok(upload.finish()?)
        });
        match made {
            // Where a prune gave up waiting, its tombstone was there before the number became free again.
            Ok(()) if self.is_forgotten(&vm, number)? => {
                // Nobody has seen it. Where this fails, the next prune does it.
                let _ = self.store.hide(&key);
                Err(VaultError::Fenced { vm, number })
            }
            Ok(()) => Ok(digest),
            Err(VaultError::Store(StoreError::Exists(_))) => match self.point(&vm, number) {
                Err(VaultError::NoPoint { .. }) => Err(VaultError::Fenced { vm, number }),
                _ => Err(VaultError::LostRace { vm, number }),
            },
            Err(e) => Err(e),
        }
    }

    /// What the next point of a chain names as its parent.
    pub fn parent_of_next(&self, vm: &VmName, chain: &Chain) -> Result<Option<(Parent, Option<Point>)>, VaultError> {
        match chain.numbers().next_back() {
            None => Ok(None),
            Some((number, State::Live)) => {
                let point = self.point(vm, number)?;
                Ok(Some((Parent { number, digest: point.digest }, Some(point))))
            }
            Some((number, _)) => {
                let digest = self.tombstone(vm, number)?.digest;
                Ok(Some((Parent { number, digest }, None)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_without_tombstone_is_missing() {
        let names = ["00000001.manifest", "00000002.forgotten", "00000002.manifest", "00000005.manifest", "notes", "x"];
        let chain = Chain::from_names(names.into_iter());
        let states: Vec<_> = chain.numbers().collect();
        assert_eq!(
            states,
            [(1, State::Live), (2, State::Forgotten), (3, State::Missing), (4, State::Missing), (5, State::Live)]
        );
        assert_eq!(chain.last(), 5);
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(|n| chain.is_gap(n)), [false, false, false, true, true, false, false]);
        let hostile = Chain::from_names(["99999999.manifest"].into_iter());
        assert_eq!(hostile.numbers().count(), 3, "a huge gap takes no memory");
    }

    #[test]
    fn a_chain_is_made_again_of_its_numbers_and_of_no_others() {
        for names in
            [&[][..], &["00000001.manifest"], &["00000002.forgotten", "00000007.manifest", "00000008.manifest"]]
        {
            let chain = Chain::from_names(names.iter().copied());
            assert_eq!(Chain::of_numbers(chain.numbers()), Some(chain));
        }
        let (live, missing) = (State::Live, State::Missing);
        for wrong in [
            vec![(0, live)],
            vec![(2, live)],
            vec![(1, live), (1, live)],
            vec![(1, live), (3, live)],
            vec![(1, live), (2, missing)],
            vec![(1, live), (2, missing), (4, live)],
            vec![(1, missing), (5, live)],
            vec![(1, missing), (MAX_NUMBER, missing), (MAX_NUMBER + 1, live)],
            vec![(3, live), (2, live), (1, live)],
        ] {
            assert_eq!(Chain::of_numbers(wrong.clone()), None, "{wrong:?}");
        }
        let gap = Chain::of_numbers([(1, missing), (9, missing), (10, live)]).unwrap();
        assert!(gap.is_gap(5) && gap.last() == 10);
    }

    #[test]
    fn points_parse_at_the_last_at_sign() {
        let spec = PointSpec::parse("a@b@7").unwrap();
        assert_eq!((spec.vm.as_str(), spec.which), ("a@b", Which::Number(7)));
        assert_eq!(PointSpec::parse("web01@latest").unwrap().which, Which::Latest);
        assert!(matches!(PointSpec::parse("web01@2026-11-24T06-31-47.123Z").unwrap().which, Which::Time(_)));
        for bad in ["web01", "web01@", "@1", "web01@x", "web01@99999999999", "a/b@1"] {
            assert!(PointSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
