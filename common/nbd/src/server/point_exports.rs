//! The restore points of a tenant as exports.

use std::sync::Arc;

use reseal_format::manifest::Disk as PointedDisk;
use reseal_format::names::{DiskName, VmName};
use reseal_vault::cache::{Cache, Weigh};
use reseal_vault::disk::DiskReader;
use reseal_vault::heads::Heads;
use reseal_vault::{Chain, Point, PointSpec, Points, State, VaultError, Which, open_newest};

use super::point_name::{PointDisk, export_name};
use super::vault_disk::{VaultDisk, describe};
use super::{Disk, Exports, Listed, NotOpened};
use reseal_proto::nbd::serve::MAX_LISTED;

/// Opened manifests, with their definitions, take at most about so much.
const POINT_BYTES: usize = 4 << 20;

/// What clients may open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All that the tenant has.
    All,
    /// The restore points of these VMs.
    Vms(Vec<VmName>),
    /// One restore point, or one disk of it.
    Point { vm: VmName, number: u32, disk: Option<DiskName> },
}

impl Scope {
    fn admits(&self, wanted: &VmName) -> bool {
        match self {
            Scope::All => true,
            Scope::Vms(vms) => vms.contains(wanted),
            Scope::Point { vm, .. } => vm == wanted,
        }
    }

    fn admits_disk(&self, wanted: &DiskName) -> bool {
        !matches!(self, Scope::Point { disk: Some(disk), .. } if disk != wanted)
    }
}

/// A point that is kept.
#[derive(Clone)]
struct Kept(Arc<Point>);

impl Weigh for Kept {
    fn weight(&self) -> usize {
        let manifest = &self.0.manifest;
        let texts = manifest.warnings.iter().chain(manifest.disks.iter().map(|disk| &disk.source));
        let definition = manifest.definition.as_ref().map_or(0, |definition| definition.text.len());
        let text: usize = texts.map(String::len).sum();
        size_of::<Point>() + text + definition + manifest.disks.len() * (size_of::<PointedDisk>() + 200)
    }
}

/// Exports by the names of points.
pub struct PointExports {
    points: Arc<dyn Points>,
    heads: Option<Heads>,
    reader: Arc<DiskReader>,
    scope: Scope,
    opened: Cache<(VmName, u32), Kept>,
}

fn missing(what: impl Into<String>) -> NotOpened {
    NotOpened::Unknown(what.into())
}

fn failed(error: VaultError) -> NotOpened {
    match error {
        VaultError::NoVm { .. } | VaultError::NoPoint { .. } | VaultError::BadPoint { .. } => {
            NotOpened::Unknown(error.to_string())
        }
        VaultError::Erased { .. } => NotOpened::Ending,
        other => NotOpened::Failed(other.to_string()),
    }
}

impl PointExports {
    /// The exports of one tenant, whose disks `reader` reads. With `heads`, a VM that was rolled back is not served.
    pub fn new(points: Arc<dyn Points>, heads: Option<Heads>, reader: Arc<DiskReader>, scope: Scope) -> PointExports {
        PointExports { points, heads, reader, scope, opened: Cache::new(POINT_BYTES) }
    }

    fn chain(&self, vm: &VmName) -> Result<Chain, VaultError> {
        match &self.heads {
            Some(heads) => heads.whole_chain(&*self.points, vm),
            None => self.points.chain(vm),
        }
    }

    fn point(&self, vm: &VmName, number: u32) -> Result<Arc<Point>, VaultError> {
        let key = (vm.clone(), number);
        if let Some(Kept(point)) = self.opened.get(&key) {
            return Ok(point);
        }
        let point = Arc::new(self.points.point(vm, number)?);
        self.opened.put(key, Kept(point.clone()));
        Ok(point)
    }

    /// The point that a name means now.
    fn resolve(&self, spec: &PointSpec) -> Result<Arc<Point>, NotOpened> {
        let nothing = || missing(format!("there is no restore point of that name of {}", spec.vm));
        if !self.scope.admits(&spec.vm) {
            // As if it were not there: what else the tenant has is no business of this client.
            return Err(nothing());
        }
        let chain = self.chain(&spec.vm).map_err(failed)?;
        let is_live = |number: u32| chain.numbers().any(|known| known == (number, State::Live));
        let point = match spec.which {
            // One that was forgotten is not opened any more, though it may be kept here.
            Which::Number(number) if is_live(number) => self.point(&spec.vm, number).map_err(failed)?,
            Which::Latest => {
                let newest = open_newest(&*self.points, &spec.vm, &chain, |number| self.point(&spec.vm, number));
                newest.map_err(failed)?.ok_or_else(nothing)?
            }
            _ => Arc::new(self.points.resolve(spec).map_err(failed)?),
        };
        match &self.scope {
            Scope::Point { number, .. } if *number != point.manifest.number => Err(nothing()),
            _ => Ok(point),
        }
    }

    /// The disk of a point that a name means; without a name the only one.
    fn disk(&self, point: Arc<Point>, name: Option<&DiskName>, is_fixed: bool) -> Result<Arc<dyn Disk>, NotOpened> {
        let manifest = &point.manifest;
        let mut shown = manifest
            .disks
            .iter()
            .enumerate()
            .filter(|(_, disk)| self.scope.admits_disk(&disk.name) && name.is_none_or(|name| *name == disk.name));
        let what = format!("{}@{}", manifest.vm, manifest.number);
        let nth = match (shown.next(), shown.next()) {
            (Some((nth, _)), None) => nth,
            (None, _) => return Err(missing(format!("{what} has no such disk"))),
            (Some((_, first)), Some(_)) => {
                let first = export_name(&manifest.vm, manifest.number, &first.name);
                return Err(missing(format!("{what} has several disks; name one, such as {first}")));
            }
        };
        drop(shown);
        let disk = VaultDisk::new(self.reader.clone(), point, nth, is_fixed);
        disk.map(|disk| Arc::new(disk) as Arc<dyn Disk>).ok_or_else(|| missing(format!("{what} has no such disk")))
    }

    /// What a point has, as it is listed.
    fn listed(&self, point: &Point, all: &mut Vec<Listed>) {
        let manifest = &point.manifest;
        for disk in manifest.disks.iter().filter(|disk| self.scope.admits_disk(&disk.name)) {
            let name = export_name(&manifest.vm, manifest.number, &disk.name);
            all.push(Listed { name, description: describe(point, disk) });
        }
    }

    fn newest(&self, vm: &VmName) -> Result<Option<Arc<Point>>, VaultError> {
        let chain = self.chain(vm)?;
        open_newest(&*self.points, vm, &chain, |number| self.point(vm, number))
    }
}

impl Exports for PointExports {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        match (&self.scope, name) {
            (Scope::Point { vm, number, .. }, "") => {
                let spec = PointSpec { vm: vm.clone(), which: Which::Number(*number) };
                self.disk(self.resolve(&spec)?, None, true)
            }
            (_, "") => Err(missing("name an export, such as VM@latest/DISK; a list shows which there are")),
            _ => {
                let wanted = PointDisk::parse(name).map_err(NotOpened::Unknown)?;
                let is_fixed = wanted.point.which != Which::Latest || matches!(self.scope, Scope::Point { .. });
                self.disk(self.resolve(&wanted.point)?, wanted.disk.as_ref(), is_fixed)
            }
        }
    }

    /// The newest point of each VM, as many as fit: all points of a large tenant would take long to list and nobody to read.
    /// Older ones are opened by their names. A VM whose newest point can't be read is left out.
    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        let mut all = Vec::new();
        let vms = match &self.scope {
            Scope::Point { vm, number, .. } => {
                let spec = PointSpec { vm: vm.clone(), which: Which::Number(*number) };
                self.listed(&*self.resolve(&spec)?, &mut all);
                return Ok(all);
            }
            Scope::Vms(vms) => vms.clone(),
            Scope::All => self.points.vms().map_err(failed)?,
        };
        for vm in vms {
            match self.newest(&vm) {
                Ok(Some(point)) => self.listed(&point, &mut all),
                Ok(None) => {}
                Err(error) if error.damaged_object().is_some() => {}
                Err(error) => return Err(failed(error)),
            }
            if all.len() >= MAX_LISTED {
                break;
            }
        }
        Ok(all)
    }
}
