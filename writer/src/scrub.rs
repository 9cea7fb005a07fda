//! Looks for rot without any key: packs have a digest of their ciphertext in clear, and sealed objects their length.
//!
//! It finds what storage does to bytes. What somebody does to them on purpose, only a verification with keys finds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use reseal_format::ids::Digest;
use reseal_format::layout::{self, parse_note_file, parse_point_file};
use reseal_format::names::TenantName;
use reseal_format::pack::TRAILER;
use reseal_format::seal::{MAX_OBJECT, check_clear};
use reseal_format::tenant::{MAX_RECORD, TenantRecord};
use reseal_store::{Store, StoreError};
use reseal_vault::{PackFile, VaultError, list_packs};

use crate::BackupError;
use crate::spread::spread;
use crate::throttle::Throttle;
use crate::verify::{Damage, Part, Report};
use crate::verify_pack::{DIGEST, damage, reason};

/// Bytes of a pack that are read at once.
const WINDOW: usize = 4 << 20;
/// Bytes of a trailer behind its digest's start: digest and end.
const BEHIND: u64 = 40;

/// What reads a vault's objects without keys.
pub struct Scrub<'a> {
    pub store: Arc<dyn Store>,
    /// Of packs; all else is read whole.
    pub part: Part,
    pub threads: usize,
    pub throttle: Option<Throttle>,
    /// Told how many bytes there will be more than was known before.
    pub expect: &'a (dyn Fn(u64) + Sync),
    /// Told of each that was read.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Scrub<'_> {
    /// Reads what these tenants have.
    pub fn run(&self, tenants: &[TenantName]) -> Result<Report, BackupError> {
        let mut report = Report::default();
        for tenant in tenants {
            let key = layout::tenant_record(tenant);
            let what = match self.store.get(&key, MAX_RECORD) {
                Ok(record) => TenantRecord::decode(&record).err().map(|e| e.to_string()),
                Err(e) => Some(reason(damage(e.into())?)),
            };
            report.damaged.extend(what.map(|what| Damage { object: key, what, hurts: Vec::new(), pack: None }));
            self.objects(tenant, &mut report)?;
            self.packs(tenant, &mut report)?;
        }
        Ok(report)
    }

    fn objects(&self, tenant: &TenantName, report: &mut Report) -> Result<(), BackupError> {
        let list = |folder: &str| self.store.list(folder).map_err(VaultError::from);
        let vms = layout::vms(tenant);
        for vm in list(&vms)?.into_iter().filter(|entry| entry.is_folder) {
            let folder = format!("{vms}{}/", vm.name);
            let notes = format!("{folder}notes/");
            let points = list(&folder)?.into_iter().filter(|entry| parse_point_file(&entry.name).is_some());
            let points = points.map(|entry| format!("{folder}{}", entry.name));
            let noted = list(&notes)?.into_iter().filter(|entry| parse_note_file(&entry.name).is_some());
            for key in points.chain(noted.map(|entry| format!("{notes}{}", entry.name))) {
                report.points += u64::from(key.ends_with(".manifest"));
                let what = match self.store.get(&key, MAX_OBJECT) {
                    // Forgotten, or pruned, since it was listed.
                    Err(StoreError::NotFound(_)) => continue,
                    Ok(object) => check_clear(&object).err().map(|e| e.to_string()),
                    Err(e) => Some(reason(damage(e.into())?)),
                };
                report.damaged.extend(what.map(|what| Damage { object: key, what, hurts: Vec::new(), pack: None }));
            }
        }
        Ok(())
    }

    fn packs(&self, tenant: &TenantName, report: &mut Report) -> Result<(), BackupError> {
        let mut packs = list_packs(&*self.store, tenant)?;
        self.part.choose(&mut packs, |pack| pack.id);
        (self.expect)(packs.iter().map(|pack| pack.length).sum());
        let (blobs, bytes, damaged) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(Vec::new()));
        spread(&packs, self.threads, &AtomicBool::new(false), |pack| {
            let object = layout::pack(tenant, pack.id, pack.generation);
            let what = match self.pack(&object, *pack, &bytes) {
                Ok(Some(count)) => {
                    blobs.fetch_add(u64::from(count), Ordering::Relaxed);
                    None
                }
                Ok(None) => Some(DIGEST.to_owned()),
                // Pruned, or rewritten, since it was listed.
                Err(VaultError::Store(StoreError::NotFound(_))) => None,
                Err(e) => Some(reason(damage(e)?)),
            };
            damaged.lock().extend(what.map(|what| Damage { object, what, hurts: Vec::new(), pack: None }));
            (self.progress)(pack.length);
            Ok(())
        })?;
        report.packs += packs.len() as u64;
        report.blobs += blobs.into_inner();
        report.bytes += bytes.into_inner();
        let mut damaged = damaged.into_inner();
        damaged.sort_by(|a, b| a.object.cmp(&b.object));
        report.damaged.append(&mut damaged);
        Ok(())
    }

    /// Reads a pack and compares its digest; how many blobs it has, if that is right.
    fn pack(&self, key: &str, pack: PackFile, bytes: &AtomicU64) -> Result<Option<u32>, VaultError> {
        let (tail, length) = self.store.read_tail(key, TRAILER)?;
        let trailer = pack.trailer(key, &tail, length)?;
        let mut hasher = blake3::Hasher::new();
        let mut window = vec![0; WINDOW];
        let (mut at, end) = (0, length - BEHIND);
        while at < end {
            let part = usize::try_from(end - at).map_or(WINDOW, |left| left.min(WINDOW));
            if let Some(throttle) = &self.throttle {
                throttle.take(part as u64, &AtomicBool::new(false));
            }
            self.store.read_at(key, at, &mut window[..part])?;
            hasher.update(&window[..part]);
            at += part as u64;
        }
        bytes.fetch_add(length, Ordering::Relaxed);
        Ok((Digest::from_bytes(*hasher.finalize().as_bytes()) == trailer.digest).then_some(trailer.count))
    }
}
