//! A restore point that another site makes, over as many connections as it takes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reseal_format::ids::{PointId, VmId};
use reseal_format::manifest::{Disk, Manifest, Stats, Tracking};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_proto::wire::{self, Begin, Begun, Commit, Committed, DiskEnd, FromSource, FromTarget, Hello, VERSION};
use reseal_site::{Enrolment, RemoteError, renew};
use reseal_vault::random;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::Asker;
use super::connection::Connection;
use crate::BackupError;
use crate::link::carry;
use crate::pipeline::Job;
use crate::plan::Task;
use crate::target::{Asked, DiskFacts, Ending, Start, Target};
use crate::worker::Right;

/// How long to try for a connection.
const CONNECT: Duration = Duration::from_secs(20);
/// How long a lost connection is tried to be made again, and how long an end of another session is waited for.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest pause between two tries.
const PAUSE: Duration = Duration::from_secs(30);
/// Offers under way at most, whatever the target allows: each holds a megabyte of the disk in memory.
const MAX_WINDOW: u16 = 64;

/// A restore point that another site has made.
#[derive(Debug)]
pub struct Sent {
    pub vm: VmName,
    pub number: u32,
    pub point: PointId,
    /// By the target's clock.
    pub created: Timestamp,
    pub warnings: Vec<String>,
    /// Bytes that were read.
    pub read: u64,
    /// Bytes of clusters that were needed and sent, before they were compressed.
    pub changed: u64,
    /// Bytes that these had when they were sent.
    pub sent: u64,
    pub duration: Duration,
}

/// The target of a backup at another site.
pub struct Remote<'a> {
    /// As the file was when it was read last: another process may renew it.
    enrolment: Enrolment,
    /// Whether the certificate may be renewed on the way.
    renews: bool,
    vm: VmName,
    say: &'a dyn Fn(&str),
    connection: Option<Connection>,
    window: usize,
    point: PointId,
    newest: Option<Manifest>,
    /// Bytes of the disks that were read, and what was sent on connections that are over.
    read: u64,
    clusters: u64,
    bytes: u64,
    made: Option<Committed>,
    began: Instant,
    /// Dropped last: it carries the connection.
    runtime: Runtime,
}

impl<'a> Remote<'a> {
    /// Begins the next restore point of a VM there. `say` is told where patience is needed.
    pub(crate) fn connect(
        enrolment: &Enrolment,
        vm: &VmName,
        say: &'a dyn Fn(&str),
    ) -> Result<Remote<'a>, BackupError> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("network").enable_all().build();
        let failed = |source| BackupError::Source { path: "the network".into(), action: "set up", source };
        let mut remote = Remote {
            enrolment: enrolment.clone(),
            renews: true,
            vm: vm.clone(),
            say,
            connection: None,
            window: 1,
            point: PointId::from_bytes([0; 16]),
            newest: None,
            read: 0,
            clusters: 0,
            bytes: 0,
            made: None,
            began: Instant::now(),
            runtime: runtime.map_err(failed)?,
        };
        let opened = match remote.open(None) {
            // Whatever came of the renewal, the backup goes on without.
            Err(_) if !remote.renews => remote.open(None),
            Err(BackupError::Remote(e)) if e.is_of_certificate() && remote.reread() => remote.open(None),
            other => other,
        };
        match opened {
            // A session that was cut off a moment ago may still be there.
            Err(BackupError::Remote(e @ RemoteError::Trouble { .. })) if e.may_pass() => remote.persist(e, None)?,
            other => other?,
        }
        Ok(remote)
    }

    /// What was made.
    pub(crate) fn into_sent(mut self) -> Result<Sent, BackupError> {
        self.count();
        let Some(made) = self.made else { return Err(BackupError::Thread) };
        Ok(Sent {
            vm: self.vm,
            number: made.number,
            point: PointId::from_bytes(made.point),
            created: Timestamp(i64::try_from(made.created).unwrap_or(i64::MAX)),
            warnings: made.warnings,
            read: self.read,
            changed: self.clusters * reseal_format::geometry::CLUSTER_U64,
            sent: self.bytes,
            duration: self.began.elapsed(),
        })
    }

    fn count(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.clusters += connection.clusters.load(Ordering::Relaxed);
            self.bytes += connection.bytes.load(Ordering::Relaxed);
        }
    }

    fn lost(&self, why: String) -> BackupError {
        RemoteError::Lost { peer: self.enrolment.address().to_owned(), why }.into()
    }

    fn unexpected(&self, what: &str) -> BackupError {
        RemoteError::Unexpected { peer: self.enrolment.address().to_owned(), what: what.into() }.into()
    }

    fn connection(&self) -> Result<&Connection, BackupError> {
        self.connection.as_ref().ok_or_else(|| self.lost("it is not open".into()))
    }

    /// Takes the certificate with which another process has renewed the file, if one has.
    fn reread(&mut self) -> bool {
        let Ok(now) = Enrolment::read(self.enrolment.path()) else { return false };
        let is_renewed = now.tenant() == self.enrolment.tenant() && !now.is_same(&self.enrolment);
        if is_renewed {
            self.enrolment = now;
        }
        is_renewed
    }

    /// Makes a connection, and begins or goes on with the point.
    fn open(&mut self, resume: Option<PointId>) -> Result<(), BackupError> {
        self.count();
        let peer = self.enrolment.address().to_owned();
        let connect = async {
            let stream = TcpStream::connect(&peer).await?;
            stream.set_nodelay(true)?;
            TlsConnector::from(self.enrolment.tls()).connect(self.enrolment.server(), stream).await
        };
        let stream = self.runtime.block_on(async { timeout(CONNECT, connect).await });
        let stream = match stream {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) if e.get_ref().is_some_and(|e| e.is::<rustls::Error>()) => {
                return Err(RemoteError::Usage(format!(
                    "{peer} can't be trusted, or does not trust this site: {e}. Compare the enrolment file {} with what runs there",
                    self.enrolment.path().display()
                ))
                .into());
            }
            Ok(Err(e)) => return Err(self.lost(e.to_string())),
            Err(_) => return Err(self.lost("nobody answers".into())),
        };
        let (inbox, outbox) = carry(self.runtime.handle(), stream, None);
        let connection = Connection::new(peer.clone(), inbox, outbox);
        let software = concat!("reseal ", env!("CARGO_PKG_VERSION")).to_owned();
        connection.send(&FromSource::Hello(Hello { version: VERSION, software }))?;
        match connection.answer()? {
            FromTarget::Welcome(welcome) if welcome.version == VERSION => {
                self.window = usize::from(welcome.window.min(MAX_WINDOW));
                let time = Timestamp(i64::try_from(welcome.time).unwrap_or(i64::MAX));
                if self.renews {
                    let ask = |message: &FromSource| {
                        connection.send(message)?;
                        connection.answer()
                    };
                    renew(&self.enrolment, time, self.say, ask).inspect_err(|_: &BackupError| self.renews = false)?;
                }
            }
            FromTarget::Welcome(other) => {
                return Err(self.unexpected(&format!("it speaks version {}, this program {VERSION}", other.version)));
            }
            _ => return Err(self.unexpected("it does not say its version first")),
        }
        let resume = resume.map(|point| *point.as_bytes());
        connection.send(&FromSource::Begin(Begin { vm: self.vm.as_str().to_owned(), resume }))?;
        match connection.answer()? {
            FromTarget::Begun(begun) if resume.is_none_or(|point| point == begun.point) => self.begun(begun)?,
            FromTarget::Committed(made) if resume == Some(made.point) => self.made = Some(made),
            _ => return Err(self.unexpected("it does not say which restore point is begun")),
        }
        self.connection = Some(connection);
        Ok(())
    }

    fn begun(&mut self, begun: Begun) -> Result<(), BackupError> {
        self.point = PointId::from_bytes(begun.point);
        let Some(newest) = begun.newest else {
            self.newest = None;
            return Ok(());
        };
        let mut disks = Vec::with_capacity(newest.disks.len());
        for disk in newest.disks {
            let name = DiskName::new(&disk.name).map_err(|_| self.unexpected("a disk has a name that can't be"))?;
            let tracking = disk.tracking.map(|wire::Tracking { method, id, scope }| Tracking { method, id, scope });
            let length = disk.length;
            disks.push(Disk {
                name,
                length,
                root: None,
                used_clusters: 0,
                source: String::new(),
                tracking,
                claim: None,
            });
        }
        // As much of a manifest as a hypervisor has to know; the rest is not for this site.
        self.newest = Some(Manifest {
            vm: self.vm.clone(),
            vm_id: VmId::from_bytes([0; 16]),
            number: newest.number,
            point_id: PointId::from_bytes(newest.point),
            created: Timestamp(0),
            parent: None,
            disks,
            definition: None,
            stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
            warnings: Vec::new(),
            locked: None,
        });
        Ok(())
    }

    /// Tries again until it goes on, or patience is over.
    fn persist(&mut self, mut why: RemoteError, resume: Option<PointId>) -> Result<(), BackupError> {
        let until = Instant::now() + PATIENCE;
        let mut pause = Duration::from_secs(1);
        (self.say)(&format!("{why}; trying again"));
        loop {
            if Instant::now() + pause > until {
                return Err(why.into());
            }
            // Many sources that were cut off at once must not come back at once.
            let part = u32::from(random::<1>()?[0]);
            std::thread::sleep(pause / 2 + pause / 2 * part / 255);
            pause = (pause * 2).min(PAUSE);
            self.reread();
            match self.open(resume) {
                Err(BackupError::Remote(e)) if e.may_pass() => why = e,
                other => return other,
            }
        }
    }
}

impl Target for Remote<'_> {
    fn point(&self) -> PointId {
        self.point
    }

    fn newest(&self) -> Option<&Manifest> {
        self.newest.as_ref()
    }

    fn begin(&mut self, facts: DiskFacts, asked: Option<Asked>) -> Result<Start, BackupError> {
        let connection = self.connection()?;
        connection.forget_distrust();
        let tracking = facts.tracking.map(|Tracking { method, id, scope }| wire::Tracking { method, id, scope });
        let said = asked.map(|Asked { method, id, since }| wire::Said { method, id, since });
        let name = facts.name.as_str().to_owned();
        let disk = wire::Disk { name, length: facts.length, source: facts.source, tracking, said };
        connection.send(&FromSource::Disk(disk))?;
        match connection.answer()? {
            FromTarget::DiskReady(ready) => Ok(match ready.start {
                wire::Start::Whole(why) => Start::Whole(Some(why).filter(|why| !why.is_empty())),
                wire::Start::Since { always, .. } => Start::Since { always },
            }),
            other => Err(connection.unexpected(&other)),
        }
    }

    fn read(&mut self, job: &Job<'_>) -> Result<(), BackupError> {
        let connection = self.connection()?;
        let mut read = 0;
        let rights = Asker::of(connection, job.workers).into_iter().map(Right::There).collect();
        let offers = job.run(rights, self.window, &mut |done| {
            read += done.read;
            match done.unit.task {
                Task::Read | Task::Check => Ok(()),
                Task::Keep | Task::Clear => connection.tell(done.unit),
            }
        })?;
        connection.send(&FromSource::DiskEnd(DiskEnd { offers }))?;
        match connection.answer()? {
            FromTarget::DiskDone => {
                self.read += read;
                Ok(())
            }
            other => Err(connection.unexpected(&other)),
        }
    }

    fn close(&mut self) -> Result<(), BackupError> {
        let connection = self.connection()?;
        connection.send(&FromSource::Close)?;
        match connection.answer()? {
            FromTarget::Closed => Ok(()),
            other => Err(connection.unexpected(&other)),
        }
    }

    fn commit(&mut self, ending: Ending) -> Result<(), BackupError> {
        let connection = self.connection()?;
        let definition = ending
            .definition
            .map(|definition| wire::Definition { file_name: definition.file_name, text: definition.text });
        let Ending { warnings, duration_ms, .. } = ending;
        connection.send(&FromSource::Commit(Commit { duration_ms, definition, warnings }))?;
        match connection.answer()? {
            FromTarget::Committed(made) => {
                self.made = Some(made);
                Ok(())
            }
            other => Err(connection.unexpected(&other)),
        }
    }

    fn recover(&mut self, error: &BackupError) -> Result<bool, BackupError> {
        match error {
            BackupError::Remote(why) if why.may_pass() => {
                self.read = 0;
                self.persist(why.clone(), Some(self.point))?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn is_made(&self) -> bool {
        self.made.is_some()
    }
}
