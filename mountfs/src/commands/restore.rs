//! `restore`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use reseal_cli::{CommonArgs, Failure, Output, Progress, Status, end_when_erased, harden, human_bytes, human_duration};
use reseal_format::geometry::CLUSTER_U64;
use reseal_format::manifest::{Disk, Manifest};
use reseal_format::names::DiskName;
use reseal_mountfs::disks::{Disks, There};
use reseal_mountfs::restore::{Plan, RestoreError, Watch};
use reseal_mountfs::signals::StopSignals;
use reseal_site::Reading;
use reseal_vault::{Holder, PointSpec};
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
    /// How the disk is written
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    format: String,
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
    if arguments.format != "raw" {
        let message = format!("--format {}: not yet in this version, which writes raw disks", arguments.format);
        return Err(Failure::new(Status::Usage, message));
    }
    let disk = arguments.disk.as_deref().map(DiskName::new).transpose().map_err(|e| Failure::of(Status::Usage, &e))?;
    let spec = PointSpec::parse(&arguments.point)?;
    harden(common.allow_swap)?;
    let failed = |e: std::io::Error| Failure::new(Status::Failed, e.to_string());
    let stop = Arc::new(AtomicBool::new(false));
    let signals = StopSignals::new().map_err(failed)?;
    let reading = Reading::open(common)?;
    let points = reading.points();
    reading.heads().whole_chain(&*points, &spec.vm)?;
    let point = points.resolve(&spec)?;
    let plan = Plan::new(&point.manifest, disk.as_ref(), &arguments.out, arguments.force).map_err(restore_failure)?;
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
            opened.tenant.reader_lease(&Holder::this_process(what))
        }
        Reading::There(..) => None,
    };
    let began = Instant::now();
    let bytes = plan.bytes();
    let restored: Vec<_> = plan.disks.iter().map(|planned| (planned.disk.disk(), planned.path.clone())).collect();
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
}

fn report(output: Output, manifest: &Manifest, restored: &[(&Disk, PathBuf)], took: Duration) {
    let disks = restored.iter().map(|(disk, path)| RestoredDisk {
        name: disk.name.as_str(),
        path,
        length: disk.length,
        used: disk.used_clusters * CLUSTER_U64,
    });
    let disks: Vec<_> = disks.collect();
    for disk in &disks {
        let (length, used) = (human_bytes(disk.length), human_bytes(disk.used));
        output.say(format!(
            "{}@{} {}: {length}, {used} of it in use, to {} in {}; what is there now is in the clear",
            manifest.vm,
            manifest.number,
            disk.name,
            disk.path.display(),
            human_duration(took)
        ));
    }
    let (vm, number, created) = (manifest.vm.as_str(), manifest.number, manifest.created.to_string());
    output.json(&RestoredJson { vm, number, created, disks, seconds: took.as_secs_f64() });
}

fn restore_failure(error: RestoreError) -> Failure {
    let status = match &error {
        RestoreError::Vault { source, .. } => source.class().into(),
        RestoreError::NotAFolder { .. } => Status::Usage,
        RestoreError::NoDisk { .. }
        | RestoreError::Exists { .. }
        | RestoreError::DeviceNeedsForce { .. }
        | RestoreError::DeviceBusy { .. }
        | RestoreError::TooSmall { .. }
        | RestoreError::NotAFile { .. }
        | RestoreError::Target { .. }
        | RestoreError::Interrupted => Status::Failed,
    };
    Failure::of(status, &error)
}
