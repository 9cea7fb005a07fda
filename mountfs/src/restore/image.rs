//! Images, and LUKS volumes: made by `qemu-img`, which reads the disk from this process. What it reads it is sent in
//! reply to its requests on a socket that has no name, so nobody else can ask.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use reseal_nbd::server::{Connection, Limits, Owner, Service, StartTls};
use reseal_qemu::secret;
use reseal_qemu::tool::{self, Ended};
use serde_json::json;

use super::plan::PlannedDisk;
use super::served::{OneExport, ServedDisk};
use super::{RestoreError, Watch};
use crate::disks::Disks;
use crate::target::image::{SECRET_FD, SECRET_ID, find_program};
use crate::target::{Created, Format};

/// Where `qemu-img` finds its end of the socket.
const SOCKET_FD: i32 = 3;
/// Reads that `qemu-img` may have under way: the most that it takes.
const READS: &str = "16";

/// Counts what was sent. Why something was not is remembered by the disk.
#[derive(Default)]
struct Counter(AtomicU64);

impl Owner for Counter {
    fn failed(&self, _what: &str) {}

    fn sent(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Restores a disk. What was made for it is removed if that fails.
pub(super) fn restore(disks: &Disks, planned: &PlannedDisk<'_>, watch: &Watch<'_>) -> Result<(), RestoreError> {
    watch.go_on()?;
    let length = planned.disk.disk().length;
    let created = planned.target.create_at(planned.place, length, &|| watch.go_on().is_ok());
    // Whoever interrupts from a terminal interrupts `qemu-img` too.
    let created = created.map_err(|e| watch.go_on().err().unwrap_or(e.into()))?;
    let disk = Arc::new(ServedDisk::new(disks, planned.disk));
    let name = || planned.disk.disk().name.clone();
    let ended =
        convert(disks, &disk, &created, watch).map_err(|source| RestoreError::Serve { disk: name(), source })?;
    watch.go_on()?;
    if let Some(source) = disk.take_failure() {
        return Err(RestoreError::Vault { disk: name(), source });
    }
    match ended {
        Some(ended) if ended.status.success() => Ok(created.finish()?),
        Some(ended) => {
            let said = tool::shorten(&ended.stderr, &source(), &name().to_string());
            Err(RestoreError::NotWritten { path: planned.target.path().to_owned(), said })
        }
        None => Err(RestoreError::Interrupted),
    }
}

/// The disk as `qemu-img` is told of it.
fn source() -> String {
    let server = json!({ "type": "fd", "str": SOCKET_FD.to_string() });
    format!("json:{}", json!({ "driver": "raw", "file": { "driver": "nbd", "server": server, "export": "" } }))
}

/// Serves the disk to `qemu-img`, which writes the target; how that ended, unless it was interrupted.
fn convert(
    disks: &Disks,
    disk: &Arc<ServedDisk>,
    created: &Created,
    watch: &Watch<'_>,
) -> std::io::Result<Option<Ended>> {
    let spec = created.spec();
    let (ours, theirs) = UnixStream::pair()?;
    let program = find_program(spec.path()).map_err(std::io::Error::other)?;
    let mut command = Command::new(program);
    command.args(["convert", "-n", "-m", READS]);
    // An image that was made just now is zeros; what a LUKS volume has where nothing was written is not.
    if spec.format() != Format::Raw {
        command.arg("--target-is-zero");
    }
    let mut inherited = vec![(theirs.into(), SOCKET_FD)];
    if let Some(secret) = spec.secret() {
        command.args(secret::arguments(SECRET_ID, SECRET_FD));
        inherited.push((secret.pipe()?.into(), SECRET_FD));
    }
    command.arg("--target-image-opts").arg(source()).arg(created.image_options(SECRET_ID));
    tool::bind(&mut command, inherited)?;
    let counter = Arc::new(Counter::default());
    let limits = Limits { threads: disks.readers(), ..Limits::default() };
    let exports = Arc::new(OneExport(disk.clone()));
    let service = Service { exports, owner: counter.clone(), tls: StartTls::Never, limits };
    let connection = Connection::unix(ours)?;
    let stopper = connection.stopper();
    thread::scope(|scope| {
        // How the connection ends says nothing that the program's own end does not.
        let serving =
            thread::Builder::new().name("restore".into()).spawn_scoped(scope, || connection.serve(&service))?;
        let told = AtomicU64::new(0);
        let ended = tool::run_while(command, &|| {
            let sent = counter.0.load(Ordering::Relaxed);
            (watch.progress)(sent - told.swap(sent, Ordering::Relaxed));
            watch.go_on().is_ok()
        });
        stopper.stop();
        let _ = serving.join();
        let sent = counter.0.load(Ordering::Relaxed);
        (watch.progress)(sent - told.load(Ordering::Relaxed));
        ended
    })
}
