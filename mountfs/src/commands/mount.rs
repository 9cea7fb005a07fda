//! `mount` and `umount`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use reseal_cli::{CommonArgs, Detach, Failure, Status, finish, harden};
use reseal_format::names::VmName;
use reseal_mountfs::catalog::Shown;
use reseal_mountfs::disks::{Disks, There};
use reseal_mountfs::journal::Journal;
use reseal_mountfs::mount::{self, MountError, Mounted, Options};
use reseal_mountfs::record_watch;
use reseal_mountfs::signals::StopSignals;
use reseal_mountfs::umount;
use reseal_site::Reading;
use reseal_vault::{Point, PointSpec, Points, VaultError};

use super::background::detached;
use super::cache_size;
use super::writable::{WritableArgs, WrittenFiles};
use crate::PROGRAM;

#[derive(Args)]
pub(crate) struct MountArgs {
    /// A folder
    mountpoint: PathBuf,
    /// Shows only this VM, or only this restore point
    #[arg(value_name = "VM|POINT")]
    only: Option<String>,
    /// Returns when the mount is ready, and serves on in the background
    #[arg(long)]
    background: bool,
    /// Where a mount in the background says what went wrong
    #[arg(long, value_name = "FILE", requires = "background")]
    log: Option<PathBuf>,
    /// Lets other users read too; only this one writes
    #[arg(long)]
    allow_other: bool,
    /// Memory for opened data, such as 256M or 1G
    #[arg(long, value_name = "SIZE", default_value = cache_size::MOUNT, value_parser = cache_size::parse)]
    cache_size: usize,
    /// Threads that serve requests
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// How long a reader waits for the vault, or the other site, before it gets an error
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    io_timeout: u32,
    #[command(flatten)]
    written: WritableArgs,
}

/// Mounts and serves until it is unmounted.
pub(crate) fn mount(common: &CommonArgs, arguments: &MountArgs) -> ExitCode {
    // A worker that hangs in a dead store does not hold up the end: with this thread the process ends.
    // SAFETY: nothing has started a thread yet.
    match unsafe { detached(arguments.background, arguments.log.as_deref()) } {
        Ok(detach) => finish(PROGRAM, serve(common, arguments, detach)),
        Err(code) => code,
    }
}

fn serve(common: &CommonArgs, arguments: &MountArgs, detach: Option<Detach>) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let failed = |e: std::io::Error| Failure::new(Status::Failed, e.to_string());
    let signals = StopSignals::new().map_err(failed)?;
    let reading = Reading::open(common)?;
    let points = reading.points();
    let (shown, point) = shown(&*points, arguments.only.as_deref())?;
    let options = Options {
        shown,
        threads: usize::from(arguments.threads),
        io_timeout: Duration::from_secs(arguments.io_timeout.into()),
        allow_other: arguments.allow_other,
    };
    let (heads, journal) = (reading.heads().clone(), Arc::new(Journal::new()));
    let (disks, _lease) = match &reading {
        Reading::Here(opened) => {
            let at = format!("mount at {}", arguments.mountpoint.display());
            let lease = opened.tenant.pin_point(point.as_ref(), at)?;
            (Disks::here(opened.tenant.clone(), arguments.cache_size), lease)
        }
        Reading::There(reader, _) => {
            // A site that can't be read is known now and not by the first reader.
            points.vms()?;
            let there = There::new(reader.clone(), reader.address(), arguments.cache_size, options.io_timeout);
            (Disks::There(there.map_err(failed)?), None)
        }
    };
    let at = &arguments.mountpoint;
    let written = match (arguments.written.writable, &point) {
        (false, _) => None,
        (true, None) => {
            return Err(Failure::new(Status::Usage, "--writable needs one restore point, such as VM@latest"));
        }
        (true, Some(point)) => {
            // An overlay is made only where it is of use.
            mount::check(at, &journal).map_err(mount_failure)?;
            let tenant = match &reading {
                Reading::Here(opened) => Some(&*opened.tenant),
                Reading::There(..) => None,
            };
            Some(arguments.written.open_files(tenant, &common.paths()?.state, &point.manifest)?)
        }
    };
    let files = written.as_ref().map(|written| written.disks.clone()).unwrap_or_default();
    let mounted = Mounted::writable(points, disks, Some(heads.clone()), at, &options, journal.clone(), files);
    let mounted = mounted.map_err(|error| {
        // It is not what could not be mounted that failed.
        let _ = written.as_ref().map(WrittenFiles::close);
        mount_failure(error)
    })?;
    signals.on_signal(mounted.stopper()).map_err(failed)?;
    // What another site does with its keys is seen there: it ends the reading.
    if let Reading::Here(opened) = &reading {
        record_watch::watch("mount", opened.tenant.clone(), heads, journal, mounted.stopper()).map_err(failed)?;
    }
    let end = if detach.is_some() { "`reseal umount` ends it" } else { "Ctrl-C ends it" };
    let how = match &written {
        None => String::new(),
        Some(written) => format!(", writable; {}", written.where_to()),
    };
    common.output().say(format!("mounted at {}, decrypted as it is read{how}; {end}", mounted.path().display()));
    if let Some(detach) = detach {
        detach.detach().map_err(failed)?;
    }
    let ended = mounted.wait().map_err(mount_failure);
    let closed = written.map_or(Ok(()), |written| written.close());
    ended.and(closed)
}

/// What the second argument of `mount` names, and the point if it is one. A VM's name may hold an `@`, so a VM of that name goes first.
fn shown(points: &dyn Points, only: Option<&str>) -> Result<(Shown, Option<Point>), Failure> {
    let Some(text) = only else { return Ok((Shown::All, None)) };
    if let Ok(vm) = VmName::new(text)
        && points.chain(&vm)?.last() > 0
    {
        return Ok((Shown::Vm(vm), None));
    }
    if !text.contains('@') {
        let vm = VmName::new(text).map_err(|e| Failure::of(Status::Usage, &e))?;
        return Err(VaultError::NoVm { vm }.into());
    }
    let point = points.resolve(&PointSpec::parse(text)?)?;
    Ok((Shown::Point(point.manifest.vm.clone(), point.manifest.number), Some(point)))
}

fn mount_failure(error: MountError) -> Failure {
    let status = match &error {
        MountError::NotAFolder { .. } => Status::Usage,
        MountError::Mountpoint { .. }
        | MountError::Mounted { .. }
        | MountError::Mount { .. }
        | MountError::Start(_)
        | MountError::Session { .. } => Status::Failed,
    };
    Failure::of(status, &error)
}

/// Ends a mount.
pub(crate) fn unmount(mountpoint: &Path) -> Result<(), Failure> {
    umount::umount(mountpoint).map_err(|error| Failure::of(Status::Failed, &error))
}
