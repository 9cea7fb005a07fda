//! Accepts connections, finds out whose they are, and gives each a thread.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_cli::Failure;
use reseal_format::names::TenantName;
use reseal_proto::wire::{ALPN, FromSource, FromTarget, TroubleCode};
use reseal_vault::Tenant;
use reseal_vault::heads::{Heads, tenant_folder};
use tokio::io::{AsyncWriteExt, copy, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::current::{Current, LOOK};
use super::session::{Session, refuse, trouble};
use super::{Client, ServeConfig};
use crate::BackupError;
use crate::certificate::now;
use crate::link::carry;

/// Connections at once: each may take a thread, and memory for its window.
const CONNECTIONS: u32 = 256;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long sessions may take to end when the server is to stop: what has arrived is made durable.
const FAREWELL: Duration = Duration::from_secs(60);
/// How long to wait where a connection can't be accepted, such as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// A tenant that is unlocked, and what this machine keeps of it.
#[derive(Clone)]
pub struct Access {
    pub tenant: Arc<Tenant>,
    pub heads: Heads,
    /// Folder for what this machine keeps.
    pub state: PathBuf,
}

impl Access {
    /// The tenant's own part of that folder.
    pub(super) fn folder(&self) -> PathBuf {
        tenant_folder(&self.state, &self.tenant.keys().scope())
    }
}

/// Unlocks tenants.
pub trait Tenants: Send + Sync {
    /// The tenant, unlocked before or now.
    fn open(&self, name: &TenantName) -> Result<Access, Failure>;
}

/// The server.
pub struct Server {
    pub config: ServeConfig,
    pub tenants: Arc<dyn Tenants>,
    /// Told who came, and what came of it.
    pub log: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Server {
    /// Serves until SIGTERM or SIGINT; then sessions land what has arrived, and end.
    pub fn run(self) -> Result<(), BackupError> {
        let failed = |action, source| BackupError::Source { path: "the network".into(), action, source };
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("network").enable_all().build();
        let runtime = runtime.map_err(|e| failed("set up", e))?;
        let listen = self.config.listen;
        runtime.block_on(self.serve(listen)).map_err(|source| {
            let path = listen.to_string();
            BackupError::Source { path, action: "listen at", source }
        })
    }

    async fn serve(self, listen: SocketAddr) -> io::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let listener = TcpListener::bind(listen).await?;
        (self.log)(&format!("listening at {}", listener.local_addr()?));
        let (stop, stopped) = watch::channel(false);
        let room = Arc::new(Semaphore::new(CONNECTIONS as usize));
        let Server { config, tenants, log } = self;
        config.faults.iter().for_each(|fault| log(fault));
        let server = Arc::new(Serving { current: Current::new(config), tenants, log, told: Mutex::default() });
        tokio::spawn(server.clone().look_after());
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            };
            match (accepted, room.clone().try_acquire_owned()) {
                (Ok((stream, peer)), Ok(permit)) => {
                    tokio::spawn(server.clone().greet(stream, peer, permit, stopped.clone()));
                }
                (Ok((_, peer)), Err(_)) => {
                    (server.log)(&format!("{peer}: refused: {CONNECTIONS} connections are open"))
                }
                (Err(e), _) => {
                    (server.log)(&format!("can't accept a connection: {e}"));
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        (server.log)("stopping");
        let _ = stop.send(true);
        // Each has one until its thread has ended.
        let _ = timeout(FAREWELL, room.acquire_many(CONNECTIONS)).await;
        Ok(())
    }
}

/// The server while it runs.
struct Serving {
    current: Current,
    tenants: Arc<dyn Tenants>,
    log: Arc<dyn Fn(&str) + Send + Sync>,
    /// Why the registry could not be looked at the last time.
    told: Mutex<Option<String>>,
}

impl Serving {
    /// Takes up changes of the registry, for as long as the server runs.
    async fn look_after(self: Arc<Serving>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let server = self.clone();
            let _ = tokio::task::spawn_blocking(move || server.look()).await;
        }
    }

    /// Takes up what has changed in the registry.
    fn look(&self) {
        let before = self.current.get();
        let failed = self.current.look().err();
        let failed = failed.map(|e| Failure::of(reseal_cli::Status::Failed, &e).message);
        let now = self.current.get();
        now.faults.iter().filter(|fault| !before.faults.contains(fault)).for_each(|fault| (self.log)(fault));
        let mut told = self.told.lock();
        if let Some(why) = failed.as_ref().filter(|why| told.as_ref() != Some(why)) {
            (self.log)(&format!("who may come stays as it was: {why}"));
        }
        *told = failed;
    }

    /// Who has a certificate. It may have been enrolled a moment ago.
    fn who(&self, certificate: &[u8]) -> Result<Client, BackupError> {
        if self.current.get().who(certificate).is_none() {
            self.look();
        }
        let config = self.current.get();
        let client = config.who(certificate).cloned();
        let client = client.ok_or_else(|| refuse(TroubleCode::NotAllowed, config.why_not(certificate)))?;
        if client.has_older()
            && let Some(enrolled) = &client.enrolled
        {
            // The new one has arrived: nobody needs the old one any more.
            let superseded = config.settings().registry().change(&enrolled.tenant, &enrolled.name, |enrolled| {
                enrolled.supersede(client.certificate(), now());
                Ok(())
            });
            match superseded {
                Ok(()) => self.look(),
                Err(e) => (self.log)(&format!("older certificates of {} are still taken: {e}", client.name)),
            }
        }
        Ok(client)
    }

    async fn greet(
        self: Arc<Serving>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
        stopped: watch::Receiver<bool>,
    ) {
        let _ = stream.set_nodelay(true);
        let acceptor = TlsAcceptor::from(self.current.get().tls.clone());
        let stream = match timeout(HANDSHAKE, acceptor.accept(stream).into_fallible()).await {
            Ok(Ok(stream)) => stream,
            Ok(Err((e, mut stream))) => {
                (self.log)(&format!("{peer}: refused: {e}"));
                // Were it closed with bytes unread, the peer would not read why.
                let _ = stream.shutdown().await;
                return drop(timeout(HANDSHAKE, copy(&mut stream, &mut sink())).await);
            }
            Err(_) => return (self.log)(&format!("{peer}: refused: the handshake takes too long")),
        };
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return (self.log)(&format!("{peer}: refused: it does not speak the protocol"));
        }
        let runtime = Handle::current();
        let spawned = std::thread::Builder::new().name("session".into()).spawn(move || {
            self.session(stream, peer, &runtime, stopped);
            drop(permit);
        });
        if let Err(e) = spawned {
            // What was moved into it is gone, and with it the connection.
            drop(e);
        }
    }

    fn session(
        &self,
        stream: TlsStream<TcpStream>,
        peer: SocketAddr,
        runtime: &Handle,
        stopped: watch::Receiver<bool>,
    ) {
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(<[_]>::first).map(|first| first.to_vec()).unwrap_or_default();
        let client = self.who(&certificate);
        let ended = match &client {
            Ok(client) => self.until_it_must_go(client.clone(), runtime, stopped),
            Err(_) => stopped,
        };
        let (mut inbox, outbox) = carry::<FromSource, _>(runtime, stream, Some(ended));
        let (who, result) = match client {
            Ok(client) => {
                let (client, current, log) = (&client, &self.current, &*self.log);
                let certificate = &certificate;
                let (inbox, outbox) = (&mut inbox, &outbox);
                let session = Session { inbox, outbox, client, certificate, current, log, passes_over: false };
                (format!("{} ({peer})", client.name), self.restore_point(session, client))
            }
            Err(e) => (format!("unknown ({peer})"), Err(e)),
        };
        match &result {
            Ok(point) => (self.log)(&format!("{who}: made {point}")),
            Err(e) => {
                (self.log)(&format!("{who}: made nothing: {}", Failure::of(reseal_cli::Status::Failed, e).message));
                if let Some(trouble) = trouble(e) {
                    let _ = outbox.blocking_send(FromTarget::Trouble(trouble).encode());
                }
            }
        }
        drop(outbox);
        inbox.farewell(runtime);
    }

    /// Set when the server stops, or the client must not stay.
    fn until_it_must_go(
        &self,
        client: Client,
        runtime: &Handle,
        mut stopped: watch::Receiver<bool>,
    ) -> watch::Receiver<bool> {
        let (end, ended) = watch::channel(false);
        let mut config = self.current.watch();
        runtime.spawn(async move {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => {}
                _ = config.wait_for(|config| !config.may_stay(&client)) => {}
                // The connection is over.
                () = end.closed() => return,
            }
            let _ = end.send(true);
        });
        ended
    }

    /// What was made, for the log.
    fn restore_point(&self, mut session: Session<'_>, client: &Client) -> Result<String, BackupError> {
        session.hello()?;
        let (vm, resume) = session.begin()?;
        let tenant = &client.tenant;
        let access = self.tenants.open(tenant).map_err(|failure| {
            (self.log)(&format!("tenant {tenant} can't be opened: {}", failure.message));
            let code = match failure.status {
                reseal_cli::Status::Unreachable => TroubleCode::Unavailable,
                reseal_cli::Status::Damaged => TroubleCode::Damaged,
                _ => TroubleCode::Failed,
            };
            refuse(code, "the tenant can't be opened at this site; its log says why")
        })?;
        let began = Instant::now();
        let made = session.make(&access, vm.clone(), resume);
        crate::status::session_ended(&access, &vm, began, &made);
        let number = made?;
        Ok(format!("{vm}@{number} of tenant {tenant}"))
    }
}
