//! `restore`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use reseal_cli::{
    CommonArgs, Failure, Output, Progress, Status, end_when_erased, harden, human_bytes, human_duration, no_open_swap,
};
use reseal_format::geometry::CLUSTER_U64;
use reseal_format::manifest::{Disk, Manifest};
use reseal_format::names::DiskName;
use reseal_mountfs::disks::{Disks, There};
use reseal_mountfs::restore::{How, Plan, RestoreError, Watch};
use reseal_mountfs::signals::StopSignals;
use reseal_mountfs::target::{Format, TargetSpec, read_secret};
use reseal_site::Reading;
use reseal_vault::PointSpec;
use serde::Serialize;

#[derive(Args)]
pub(crate) struct RestoreArgs {
    /// VM@latest, VM@NUMBER or VM@TIME
    point: String,
    /// A file or block device for one disk; a folder for several
    out: PathBuf,
    /// Only this disk
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// How the disk is written: raw, qcow2, or vmdk (stream-optimized, which vSphere imports)
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    format: Format,
    /// Encrypts what is written, raw or qcow2, with LUKS; the first line of the file is its passphrase
    #[arg(long, value_name = "FILE")]
    luks_secret: Option<PathBuf>,
    /// Overwrites what is there
    #[arg(long)]
    force: bool,
}

/// Memory for index nodes and pack tables of a restore: what it opens it writes out and does not need again.
const RESTORE_CACHE: usize = 64 << 20;
/// How long another site may be silent, or away, before a restore ends.
const PATIENCE: Duration = Duration::from_secs(60);

/// Restores the disks of a point.
pub(crate) fn restore(common: &CommonArgs, arguments: &RestoreArgs) -> Result<(), Failure> {
    let disk = arguments.disk.as_deref().map(DiskName::new).transpose().map_err(|e| Failure::of(Status::Usage, &e))?;
    let spec = PointSpec::parse(&arguments.point)?;
    harden(common.allow_swap)?;
    let target_failure = |e| restore_failure(RestoreError::Target(e));
    let secret = arguments.luks_secret.as_deref().map(read_secret).transpose().map_err(target_failure)?;
    if secret.is_some() {
        no_open_swap(common.allow_swap, "qemu-img, which encrypts the disk")?;
    }
    let how = How { format: arguments.format, secret, force: arguments.force };
    let failed = |e: std::io::Error| Failure::new(Status::Failed, e.to_string());
    let stop = Arc::new(AtomicBool::new(false));
    let signals = StopSignals::new().map_err(failed)?;
    let reading = Reading::open(common)?;
    let points = reading.points();
    reading.heads().whole_chain(&*points, &spec.vm)?;
    let point = points.resolve(&spec)?;
    let plan = Plan::new(&point.manifest, disk.as_ref(), &arguments.out, &how).map_err(restore_failure)?;
    let disks = match &reading {
        Reading::Here(opened) => Disks::here(opened.tenant.clone(), RESTORE_CACHE),
        Reading::There(reader, _) => {
            Disks::There(There::new(reader.clone(), reader.address(), RESTORE_CACHE, PATIENCE).map_err(failed)?)
        }
    };
    let end = {
        let (stop, disks) = (stop.clone(), disks.clone());
        move || {
            stop.store(true, Ordering::Relaxed);
            disks.stop();
        }
    };
    signals.on_signal(end.clone()).map_err(failed)?;
    let _lease = match &reading {
        Reading::Here(opened) => {
            // What was written of a disk that is not whole is in the clear, and goes.
            end_when_erased(&opened.tenant, move || {
                end();
                true
            });
            let what = format!("restore of {}@{}", point.manifest.vm, point.manifest.number);
            opened.tenant.pin_point(Some(&point), what)?
        }
        Reading::There(..) => None,
    };
    let began = Instant::now();
    let bytes = plan.bytes();
    let restored: Vec<_> = plan.disks.iter().map(|planned| (planned.disk.disk(), planned.target.clone())).collect();
    let progress = Progress::bytes(common.output(), "restored", bytes);
    let watch = Watch { progress: &|bytes| progress.add(bytes), stop: &stop };
    let result = reseal_mountfs::restore::restore(&disks, plan, &watch);
    progress.finish();
    result.map_err(restore_failure)?;
    report(common.output(), &point.manifest, &restored, began.elapsed());
    Ok(())
}

#[derive(Serialize)]
struct RestoredJson<'a> {
    vm: &'a str,
    number: u32,
    created: String,
    disks: Vec<RestoredDisk<'a>>,
    seconds: f64,
}

#[derive(Serialize)]
struct RestoredDisk<'a> {
    name: &'a str,
    path: &'a Path,
    length: u64,
    used: u64,
    format: String,
    /// With LUKS. What is not is in the clear.
    encrypted: bool,
    #[serde(skip)]
    is_now: String,
}

fn report(output: Output, manifest: &Manifest, restored: &[(&Disk, TargetSpec)], took: Duration) {
    let disks = restored.iter().map(|(disk, target)| RestoredDisk {
        name: disk.name.as_str(),
        path: target.path(),
        length: disk.length,
        used: disk.used_clusters * CLUSTER_U64,
        format: target.format().to_string(),
        encrypted: !target.is_clear(),
        is_now: target.describe(),
    });
    let disks: Vec<_> = disks.collect();
    for disk in &disks {
        let (length, used) = (human_bytes(disk.length), human_bytes(disk.used));
        output.say(format!(
            "{}@{} {}: {length}, {used} of it in use, to {} in {}; what is there now is {}",
            manifest.vm,
            manifest.number,
            disk.name,
            disk.path.display(),
            human_duration(took),
            disk.is_now
        ));
    }
    let (vm, number, created) = (manifest.vm.as_str(), manifest.number, manifest.created.to_string());
    output.json(&RestoredJson { vm, number, created, disks, seconds: took.as_secs_f64() });
}

fn restore_failure(error: RestoreError) -> Failure {
    let status = match &error {
        RestoreError::Vault { source, .. } => source.class().into(),
        RestoreError::NotAFolder { .. } => Status::Usage,
        RestoreError::Target(error) if error.is_usage() => Status::Usage,
        RestoreError::NoDisk { .. }
        | RestoreError::Target(_)
        | RestoreError::Serve { .. }
        | RestoreError::NotWritten { .. }
        | RestoreError::Interrupted => Status::Failed,
    };
    Failure::of(status, &error)
}
