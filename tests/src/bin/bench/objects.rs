//! A vault in an object store on this machine: what the store costs a backup, what is left of a mount's speed when each request takes longer, what
//! fetching beside each other brings a boot, and what the cache does.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_format::names::DiskName;
use reseal_mountfs::boot_reads::{Limits, Prefetch, Recorder, RecordingExports};
use reseal_nbd::server::{Disk, Exports, PointExports, Scope, export_name};
use reseal_store::{Bucket, Cached};
use reseal_tests::ceph::Ceph;
use reseal_tests::library::vm;
use reseal_tests::mounting::Mounted;
use reseal_tests::s3_proxy::S3Proxy;
use reseal_tests::seaweed::Seaweed;
use reseal_tests::site::Site;
use reseal_vault::disk::DiskReader;

use crate::Result;
use crate::host::{self, Disks};
use crate::live::{Figure, median};
use crate::plan::Plan;
use crate::process;
use crate::samples::Samples;
use crate::trace::Trace;

/// What is added to each request.
const DELAY: Duration = Duration::from_millis(20);
/// Of the speed of a local backup.
const BACKUP: f64 = 0.5;
/// Of the speed of a local mount.
const COLD: f64 = 0.4;
/// Times as long as from a local vault.
const WARM: f64 = 1.2;
/// Times as fast as one request at a time.
const BOOT: f64 = 5.0;
const ROUNDS: usize = 3;
/// As `boot` has it unless told otherwise, and enough for all of the disk.
const READER: usize = 512 << 20;
const DISK_CACHE: u64 = 8 << 30;
const PIECE: usize = 1 << 20;

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: an object store");
    let base = disks.path("base");
    let gateway = Ceph::start();
    let (behind_gateway, ..) = backups(&gateway, &base)?;
    drop(gateway);
    let engine = Engine { seaweed: Seaweed::start(), began: Instant::now() };
    let (backup, local, mut far) = backups(&engine.seaweed, &base)?;
    let proxy = S3Proxy::before(engine.seaweed.port());
    proxy.delay(DELAY);
    far.variables = engine.seaweed.variables_at(proxy.port());
    samples.objects = vec![backup, behind_gateway];
    samples.objects.push(copies(&local, &far)?);
    samples.objects.extend(mounts(&engine, &local, far)?);
    let far = engine.seaweed.site_at("boots", engine.seaweed.port());
    samples.objects.extend(boots(plan, disks, far, &engine.seaweed.variables_at(proxy.port()))?);
    samples.objects.push(engine.share());
    Ok(())
}

/// How many processors this machine has for the store and who uses it.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// An object store on this machine.
trait Local {
    const NAME: &str;
    /// A site with an empty vault in a bucket of that name.
    fn site(&self, bucket: &str) -> Site;
    fn processor_time(&self) -> Duration;
}

impl Local for Seaweed {
    const NAME: &str = "SeaweedFS";

    fn site(&self, bucket: &str) -> Site {
        self.site(bucket)
    }

    fn processor_time(&self) -> Duration {
        self.processor_time()
    }
}

impl Local for Ceph {
    const NAME: &str = "Ceph's gateway";

    fn site(&self, bucket: &str) -> Site {
        let site = self.site(bucket);
        site.reseal(["init", "--no-recovery"]).ok();
        site
    }

    fn processor_time(&self) -> Duration {
        self.processor_time()
    }
}

/// The store, and since when it is used.
struct Engine {
    seaweed: Seaweed,
    began: Instant,
}

impl Engine {
    fn share(&self) -> Figure {
        let cores = cores();
        let percent = self.seaweed.processor_time().as_secs_f64() * 100.0 / self.began.elapsed().as_secs_f64();
        Figure {
            what: "SeaweedFS's own part of the processors, over all that it had a part in".to_owned(),
            bound: "reported".to_owned(),
            measured: format!("{percent:.0} % of one core of {cores}"),
            met: None,
        }
    }
}

/// A first backup into a folder and into the store, in turns; and the sites of the last round.
fn backups<L: Local>(store: &L, disk: &Path) -> Result<(Figure, Site, Site)> {
    let (mut local, mut far, mut sites) = (Vec::new(), Vec::new(), None);
    let mut peaks = [0.0f64; 2];
    let (mut share, mut own) = (Duration::ZERO, Duration::ZERO);
    for round in 0..ROUNDS {
        let pair = (Site::new(), store.site(&format!("backup-{round}")));
        host::warm(disk)?;
        let mut seconds = |site: &Site, which: usize| {
            let began = Instant::now();
            let running = site.start([OsStr::new("backup"), "vm".as_ref(), disk.as_os_str()]);
            peaks[which] = process::peak_until_end(&running).max(peaks[which]);
            let seconds = began.elapsed().as_secs_f64();
            running.wait().ok();
            seconds
        };
        let before = process::time_of_children();
        local.push(seconds(&pair.0, 0));
        own += process::time_of_children() - before;
        let before = store.processor_time();
        far.push(seconds(&pair.1, 1));
        share += store.processor_time() - before;
        sites = Some(pair);
    }
    let of_local = median(local.clone()) / median(far.clone());
    // With all of the processors at work all of the time, and nothing for what goes over the line.
    let cores = cores();
    let at_most = median(local.clone()) * (ROUNDS * cores) as f64 / (own + share).as_secs_f64();
    let (local_site, far_site) = sites.ok_or("no round was made")?;
    let figure = Figure {
        what: format!("first backup into {}, beside one into a folder", L::NAME),
        bound: format!("at least {BACKUP} × its speed"),
        measured: format!(
            "{of_local:.2} × ({:.1} and {:.1} s; peak memory {:.0} and {:.0} MiB; the store took {:.1} s of the processors, the one into a folder \
             {:.1} s: at most {at_most:.2} × on these {cores})",
            median(far.clone()),
            median(local),
            peaks[1],
            peaks[0],
            share.as_secs_f64() / ROUNDS as f64,
            own.as_secs_f64() / ROUNDS as f64
        ),
        met: Some(of_local >= BACKUP),
    };
    Ok((figure, local_site, far_site))
}

/// Copies a vault in a folder, and the same in the store with what is added to each request, to new vaults in folders.
fn copies(local: &Site, far: &Site) -> Result<Figure> {
    let copied = |site: &Site| {
        let to = Site::new();
        let (vault, keyring) = (to.vault.clone().into_os_string(), to.keyring.clone().into_os_string());
        let words = ["copy", "--no-verify", "--to"].map(OsString::from).into_iter();
        let began = Instant::now();
        site.reseal(words.chain([vault, "--to-keyring".into(), keyring])).ok();
        began.elapsed().as_secs_f64()
    };
    let (mut near, mut slow) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        near.push(copied(local));
        slow.push(copied(far));
    }
    let [near, slow] = [near, slow].map(median);
    Ok(Figure {
        what: format!(
            "`copy` from the store to a folder, {} ms added to each request, beside from a folder",
            DELAY.as_millis()
        ),
        bound: "reported".to_owned(),
        measured: format!("{:.2} × its speed ({slow:.1} and {near:.1} s)", near / slow),
        met: None,
    })
}

/// Reads all data of a file in order; bytes and seconds.
fn stream(path: &Path) -> Result<(u64, f64)> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut buffer = vec![0; PIECE];
    let (began, mut at, mut bytes) = (Instant::now(), 0, 0);
    while at < length {
        let data = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => break,
            other => other?,
        };
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let piece = usize::try_from(hole - at).map_or(PIECE, |rest| rest.min(PIECE));
            file.read_exact_at(&mut buffer[..piece], at)?;
            at += piece as u64;
            bytes += piece as u64;
        }
    }
    Ok((bytes, began.elapsed().as_secs_f64()))
}

/// Mounts a vault anew and reads its disk; seconds.
fn mounted(site: &Site, name: &str) -> Result<f64> {
    let mounted = Mounted::new(site, name, &[]);
    let path = mounted.point(site, "vm", 1).join("disk-0.raw");
    let (_, seconds) = stream(&path)?;
    mounted.umount(site).ok();
    Ok(seconds)
}

fn mounts(engine: &Engine, local: &Site, mut far: Site) -> Result<Vec<Figure>> {
    let (mut near, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    let mut share = Duration::ZERO;
    for round in 0..ROUNDS {
        let cache = far.path(format!("cache-{round}"));
        far.variables.insert("RESEAL_STORE_CACHE".into(), cache.to_str().ok_or("a folder of another name")?.into());
        near.push(mounted(local, &format!("near-{round}"))?);
        let before = engine.seaweed.processor_time();
        cold.push(mounted(&far, &format!("cold-{round}"))?);
        share += engine.seaweed.processor_time() - before;
        warm.push(mounted(&far, &format!("warm-{round}"))?);
        fs::remove_dir_all(cache)?;
    }
    let [near, cold, warm] = [near, cold, warm].map(median);
    let ms = DELAY.as_millis();
    Ok(vec![
        Figure {
            what: format!(
                "sequential read through a mount, {ms} ms added to each request, nothing cached, beside a local vault"
            ),
            bound: format!("at least {COLD} × its speed"),
            measured: format!(
                "{:.2} × ({cold:.1} and {near:.1} s; the store took {:.1} s of the processors)",
                near / cold,
                share.as_secs_f64() / ROUNDS as f64
            ),
            met: Some(near / cold >= COLD),
        },
        Figure {
            what: "… the second mount, with what the first one left in the cache".to_owned(),
            bound: format!("at most {WARM} × as long as from a local vault"),
            measured: format!("{:.2} × ({warm:.1} s)", warm / near),
            met: Some(warm / near <= WARM),
        },
    ])
}

/// One read after the other.
fn replay(disk: &dyn Disk, reads: &[(u64, usize)]) -> Result<f64> {
    let mut buffer = vec![0; reads.iter().map(|(_, length)| *length).max().unwrap_or(0)];
    let began = Instant::now();
    for (offset, length) in reads {
        disk.read(*offset, &mut buffer[..*length]).map_err(|e| e.to_string())?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// The reads of a boot: one request at a time, and as `boot` makes them the second time.
fn boots(plan: &Plan, disks: &Disks, site: Site, slow: &reseal_store::Variables) -> Result<Vec<Figure>> {
    site.reseal(["init", "--no-recovery"]).ok();
    site.backup("vm", &disks.newest());
    let trace = Trace::recorded(plan, disks)?;
    let address = site.vault.to_str().ok_or("a vault of another name")?;
    let bucket = || Bucket::open_with(address, slow).map_err(|e| e.to_string());
    let plain = site.tenant_in(Arc::new(bucket()?)).map_err(|e| e.to_string())?;
    let point = Arc::new(plain.point(&vm("vm"), 1).map_err(|e| e.to_string())?);
    let name = export_name(&vm("vm"), 1, &DiskName::new("disk-0").map_err(|e| e.to_string())?);
    let exports = |tenant: &Arc<reseal_vault::Tenant>, reader: &Arc<DiskReader>| -> Arc<dyn Exports> {
        let scope = Scope::Point { vm: vm("vm"), number: 1, disk: None };
        Arc::new(PointExports::new(tenant.clone(), None, reader.clone(), scope))
    };
    let open = |exports: &dyn Exports| exports.open(&name).map_err(|_| "the disk is not exported");
    // Each read asks for what it needs and no more.
    let reader = Arc::new(DiskReader::new(plain.clone(), READER));
    let recorder = Recorder::new(&point.manifest);
    let recording = RecordingExports::new(exports(&plain, &reader), recorder.clone());
    let alone = replay(&*open(&recording)?, trace.reads())?;
    let recorded = recorder.finish();
    let cached = |name: &str| -> Result<_> {
        let cached = Cached::new(bucket()?, address, &site.path(name), DISK_CACHE)?;
        let tenant = site.tenant_in(Arc::new(cached)).map_err(|e| e.to_string())?;
        let reader = Arc::new(DiskReader::new(tenant.clone(), READER));
        point.manifest.disks.iter().for_each(|disk| reader.warm_later(disk));
        Ok((tenant, reader))
    };
    // The first boot has nothing to go by but what it asks for.
    let (tenant, reader) = cached("first-cache")?;
    let first = replay(&*open(&*exports(&tenant, &reader))?, trace.reads())?;
    let (tenant, reader) = cached("boot-cache")?;
    let ahead = Prefetch::start(&reader, &point, &recorded, Limits::of(&reader))?;
    let beside = replay(&*open(&*exports(&tenant, &reader))?, trace.reads())?;
    drop(ahead);
    let second = Figure {
        what: format!(
            "the reads of a boot ({}), {} ms added to each request: the second boot, beside one request at a time",
            trace.summary(),
            DELAY.as_millis()
        ),
        bound: format!("at least {BOOT:.0} × as fast"),
        measured: format!("{:.1} × ({beside:.1} and {alone:.1} s)", alone / beside),
        met: Some(alone / beside >= BOOT),
    };
    let first = Figure {
        what: "… the first boot, of which no reads are recorded".to_owned(),
        bound: "reported".to_owned(),
        measured: format!("{:.1} × ({first:.1} s)", alone / first),
        met: None,
    };
    Ok(vec![second, first])
}
