//! A mount from its beginning to its end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender, unbounded};
use fuser::{Config, MountOption, Session, SessionACL};
use reseal_vault::Points;
use reseal_vault::heads::Heads;
use rustix::process::{getegid, geteuid};

use crate::answer::Shared;
use crate::catalog::{Catalog, Shown};
use crate::disks::Disks;
use crate::flusher::Flusher;
use crate::fuse::ResealFs;
use crate::handles::Handles;
use crate::journal::Journal;
use crate::mounts::{MountedAt, Unmount, kernel_path, mounted_at, unmount};
use crate::pool::Pool;
use crate::readahead::Readahead;
use crate::view::View;
use crate::writable::WrittenDisk;

/// Requests that may wait for the store at the same time. They sleep, so there may be more than cores; each that hangs
/// takes one away until the store is back.
const WORKERS: usize = 16;
/// How far the kernel reads ahead of a sequential reader. Twice its largest request, so that two FUSE threads decompress
/// at a time; its default of 128 KiB keeps one busy.
const KERNEL_READAHEAD_KIB: u32 = 2048;
/// How long the end of a session may take once it is unmounted.
const ENDING: Duration = Duration::from_secs(5);

/// How to mount.
#[derive(Debug, Clone)]
pub struct Options {
    pub shown: Shown,
    /// Threads that take requests from the kernel.
    pub threads: usize,
    /// How long a reader waits for the store before it gets an error.
    pub io_timeout: Duration,
    /// Whether other users than this one may read.
    pub allow_other: bool,
}

/// Why nothing was mounted, or the mount ended.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("the mountpoint {} can't be used: {source}", .path.display())]
    Mountpoint { path: PathBuf, source: io::Error },
    #[error("the mountpoint {} is not a folder", .path.display())]
    NotAFolder { path: PathBuf },
    #[error("reseal is mounted at {} already; unmount it with `reseal umount`, or choose another folder", .path.display())]
    Mounted { path: PathBuf },
    #[error("can't mount at {}: {source}", .path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("can't start what serves the mount: {0}")]
    Start(#[from] io::Error),
    #[error("the session of {} broke off: {source}", .path.display())]
    Session { path: PathBuf, source: io::Error },
}

enum Event {
    /// Somebody wants it to end.
    Stop,
    /// It has ended: it was unmounted.
    Ended(io::Result<()>),
}

/// A mount that is served.
pub struct Mounted {
    path: PathBuf,
    /// What the kernel says is mounted there: this mount.
    own: MountedAt,
    pool: Arc<Pool>,
    disks: Disks,
    sender: Sender<Event>,
    events: Receiver<Event>,
}

impl Mounted {
    /// Mounts what `points` lists and `disks` reads. When this returns, readers are served.
    pub fn new(
        points: Arc<dyn Points>,
        disks: Disks,
        heads: Option<Heads>,
        mountpoint: &Path,
        options: &Options,
        journal: Arc<Journal>,
    ) -> Result<Mounted, MountError> {
        Mounted::writable(points, disks, heads, mountpoint, options, journal, Vec::new())
    }

    /// The same, where the one restore point that is shown is written to. Its disks are by their places in its manifest; whoever gave them
    /// closes them when the mount has ended.
    pub fn writable(
        points: Arc<dyn Points>,
        disks: Disks,
        heads: Option<Heads>,
        mountpoint: &Path,
        options: &Options,
        journal: Arc<Journal>,
        written: Vec<Arc<WrittenDisk>>,
    ) -> Result<Mounted, MountError> {
        let path = prepare(mountpoint, &journal)?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let catalog = Catalog::new(points, heads, options.shown.clone(), journal.clone());
        let config = config(options, !written.is_empty());
        let shared = Shared {
            flushers: written.iter().cloned().map(Flusher::new).collect::<io::Result<_>>()?,
            is_for_others: options.allow_other,
            view: View::new(catalog.with_openers(disks.openers())).with_written(written),
            readahead: Readahead::new(&disks, cores)?,
            disks: disks.clone(),
            journal,
            handles: Handles::default(),
            owner: (geteuid().as_raw(), getegid().as_raw()),
            since: SystemTime::now(),
        };
        let pool = Arc::new(Pool::new(WORKERS, options.io_timeout)?);
        let fs = ResealFs { shared: Arc::new(shared), pool: pool.clone() };
        let failed = |source: io::Error| {
            // `fusermount3` says it in a line of its own.
            let source = io::Error::new(source.kind(), source.to_string().trim_end().to_owned());
            MountError::Mount { path: path.clone(), source }
        };
        let session = Session::new(fs, &path, &config).map_err(failed)?.spawn().map_err(failed)?;
        let (sender, events) = unbounded();
        let ended = sender.clone();
        thread::Builder::new().name("session".into()).spawn(move || {
            let _ = ended.send(Event::Ended(session.join()));
        })?;
        let own = mounted_at(&path)?;
        raise_readahead(&own);
        Ok(Mounted { path, own, pool, disks, sender, events })
    }

    /// Where it is mounted, as the kernel knows it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Something that ends the mount when it is called, from any thread.
    pub fn stopper(&self) -> impl Fn() + Send + 'static + use<> {
        let sender = self.sender.clone();
        move || drop(sender.send(Event::Stop))
    }

    /// Serves until it is unmounted or told to stop. Readers that wait for the store are then refused, so that neither
    /// they nor a store that hangs hold it up; a mount that is still in use is detached.
    pub fn wait(self) -> Result<(), MountError> {
        let broke = |source| MountError::Session { path: self.path.clone(), source };
        match self.events.recv() {
            Ok(Event::Ended(result)) => return result.map_err(broke),
            Ok(Event::Stop) | Err(_) => {}
        }
        self.pool.close();
        self.disks.stop();
        if mounted_at(&self.path).map_err(broke)? != self.own {
            // Unmounted already, though something still holds it: another mount namespace, or an open file.
            return Ok(());
        }
        match unmount(&self.path, Unmount::IfUnused) {
            Ok(()) => {
                // More requests to stop, or the end; a session that does not end now ends with the process.
                while let Ok(Event::Stop) = self.events.recv_timeout(ENDING) {}
                Ok(())
            }
            Err(_) => unmount(&self.path, Unmount::Detach).map_err(broke),
        }
    }
}

/// Whether something can be mounted there.
pub fn check(mountpoint: &Path, journal: &Journal) -> Result<(), MountError> {
    prepare(mountpoint, journal).map(drop)
}

/// Checks the mountpoint. What a process that died has left there is taken away.
fn prepare(mountpoint: &Path, journal: &Journal) -> Result<PathBuf, MountError> {
    let unusable = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
    let path = kernel_path(mountpoint).map_err(unusable)?;
    let is_reseal = matches!(mounted_at(&path).map_err(unusable)?, MountedAt::Reseal(_));
    match std::fs::metadata(&path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) && is_reseal => {
            journal.say(&format!("the process of an earlier mount at {} died; taking the mount away", path.display()));
            unmount(&path, Unmount::Detach).map_err(unusable)?;
        }
        Err(error) => return Err(unusable(error)),
        Ok(_) if is_reseal => return Err(MountError::Mounted { path }),
        Ok(_) => {}
    }
    let path = path.canonicalize().map_err(unusable)?;
    match path.is_dir() {
        true => Ok(path),
        false => Err(MountError::NotAFolder { path }),
    }
}

fn config(options: &Options, is_writable: bool) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("reseal".into()),
        // As an option of the kernel, so that a mount without `fusermount3` has it too.
        MountOption::CUSTOM("subtype=reseal".into()),
        MountOption::NoAtime,
        MountOption::NoDev,
        MountOption::NoSuid,
    ];
    config.mount_options.extend(match is_writable {
        false => vec![MountOption::RO],
        // Others who may read may not write: the kernel looks at the modes.
        true => vec![MountOption::RW, MountOption::DefaultPermissions],
    });
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = options.threads > 1;
    config
}

/// FUSE may not ask for more readahead than the kernel's default; root may set it for a mount. Without it, streams are
/// served a little slower.
fn raise_readahead(own: &MountedAt) {
    if let MountedAt::Reseal(device) = own {
        let knob = format!("/sys/class/bdi/{device}/read_ahead_kb");
        let _ = std::fs::write(knob, KERNEL_READAHEAD_KIB.to_string());
    }
}
