//! Accepts connections, finds out whose they are, and gives each a thread.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reseal_cli::Failure;
use reseal_format::names::VmName;
use reseal_proto::wire::{ALPN, FromSource, FromTarget, NBD_ALPN, Trouble, TroubleCode};
use sd_notify::{NotifyState, notify};
use tokio::io::{AsyncWriteExt, copy, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::field::{Empty, display};
use tracing::{Span, debug, error, info, info_span, warn};

use super::ServeConfig;
use super::audit::{Event, What};
use super::config::digest;
use super::desk::{Desk, Sending};
use super::handshakes::{Handshakes, Place};
use super::health;
use super::logging::{Logging, printable};
use super::metrics::{Outcome, Refusal};
use super::nbd;
use super::running::Full;
use super::session::{Session, trouble};
use super::site::Site;
use super::tenants::Tenants;
use crate::BackupError;
use crate::link::carry;

/// How long sessions may take to end when the server is to stop: what has arrived is made durable.
const FAREWELL: Duration = Duration::from_secs(60);
/// How often it is looked whether they have.
const LOOK: Duration = Duration::from_millis(50);
/// How long one who is turned away may take to read why.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often the registry is looked at.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// How long to wait where a connection can't be accepted, such as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// Reads the configuration.
pub type Read = Box<dyn Fn() -> Result<ServeConfig, BackupError> + Send + Sync>;

/// The server.
pub struct Server {
    pub config: ServeConfig,
    /// Reads it again.
    pub read: Read,
    pub tenants: Arc<dyn Tenants>,
    pub logging: Logging,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }
}

/// Tells systemd, where that has started it.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(e) = notify(state) {
        debug!("systemd can't be told: {e}");
    }
}

impl Server {
    /// Serves until SIGTERM or SIGINT; then sessions land what has arrived, and end. SIGHUP reads the configuration again.
    pub fn run(self) -> Result<(), Failure> {
        let failed = |path: String, action, source| Failure::from(BackupError::Source { path, action, source });
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("network").enable_all().build();
        let runtime = runtime.map_err(|e| failed("the network".into(), "set up", e))?;
        let signals = {
            let _inside = runtime.enter();
            Signals::new().map_err(|e| failed("signals".into(), "wait for", e))?
        };
        let config = Arc::new(self.config);
        let audit = config.operation.audit.as_ref().map(|audit| audit.file.display().to_string());
        let site = Site::new(config.clone(), self.tenants, self.logging);
        let site = site.map_err(|e| failed(audit.unwrap_or_default(), "open the audit log", e))?;
        site.tenants.open_all(&config.tenants(), &|tenant| config.names(tenant))?;
        let listen = config.listen;
        let read = Arc::new(self.read);
        let served = runtime.block_on(serve(site, read, signals));
        // A vault that hangs must not keep this process.
        runtime.shutdown_background();
        served.map_err(|e| failed(listen.to_string(), "listen at", e))
    }
}

async fn serve(site: Arc<Site>, read: Arc<Read>, mut signals: Signals) -> io::Result<()> {
    let config = site.config();
    if let Some(metrics) = &config.operation.metrics {
        let listener = health::listen(metrics.listen).await?;
        info!("metrics at {}", listener.local_addr()?);
        tokio::spawn(health::serve(listener, site.clone()));
    }
    let listener = TcpListener::bind(config.listen).await?;
    info!("listening at {}", listener.local_addr()?);
    site.note(&Event::new(What::Started));
    config.faults.iter().for_each(|fault| warn!("{fault}"));
    tokio::spawn(look_after(site.clone()));
    tell(&[NotifyState::Ready]);
    let handshakes = Arc::new(Handshakes::default());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hang_up.recv() => {
                reload(&site, &read).await;
                continue;
            }
        };
        match accepted {
            Ok((stream, peer)) => {
                tokio::spawn(greet(site.clone(), handshakes.clone(), stream, peer));
            }
            Err(e) => {
                error!("can't accept a connection: {e}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    info!("stopping: sessions keep what has landed");
    tell(&[NotifyState::Stopping]);
    drop(listener);
    site.running.stop();
    let ended = async {
        while !site.running.is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    if timeout(FAREWELL, ended).await.is_err() {
        warn!("some sessions have not ended, and are left");
    }
    site.note(&Event::new(What::Stopped));
    Ok(())
}

/// Takes up changes of the registry, for as long as the server runs.
async fn look_after(site: Arc<Site>) {
    loop {
        tokio::time::sleep(LOOK_AFTER).await;
        let site = site.clone();
        let _ = tokio::task::spawn_blocking(move || site.look()).await;
    }
}

async fn reload(site: &Arc<Site>, read: &Arc<Read>) {
    let now = NotifyState::monotonic_usec_now().into_iter();
    tell(&[NotifyState::Reloading].into_iter().chain(now).collect::<Vec<_>>());
    let (site, read) = (site.clone(), read.clone());
    // It reads files.
    let _ = tokio::task::spawn_blocking(move || site.reload(&**read)).await;
    tell(&[NotifyState::Ready]);
}

/// What is spoken inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    /// Messages of `docs/PROTOCOL.md`.
    Wire,
    Nbd,
}

/// Says why, and waits until that was read: were it closed with bytes unread, the peer would not read it.
async fn turn_away(mut stream: TlsStream<TcpStream>, speech: Speech, code: TroubleCode, message: String) {
    if speech == Speech::Nbd {
        let _ = tokio::task::spawn_blocking(move || nbd::turn_away(stream, message)).await;
        return;
    }
    let words = FromTarget::Trouble(Trouble { code, message }).encode();
    let _ = timeout(LAST_WORDS, async {
        let _ = stream.write_all(&words).await;
        let _ = stream.shutdown().await;
        copy(&mut stream, &mut sink()).await
    })
    .await;
}

async fn greet(site: Arc<Site>, handshakes: Arc<Handshakes>, stream: TcpStream, peer: SocketAddr) {
    let connection = site.number();
    let limits = site.config().operation.limits.clone();
    let refused = |refusal, why: &str| {
        warn!(connection, %peer, "refused: {}", printable(why));
        site.metrics.refused(refusal);
        if matches!(refusal, Refusal::Handshake | Refusal::Slow) {
            // Whoever shows no certificate of the authority could fill the disk.
            return;
        }
        let event = Event { connection: Some(connection), peer: Some(peer), ..Event::new(What::Refused) };
        site.note(&event.because(why));
    };
    let time = limits.handshake();
    let Some(mut place) = handshakes.take(connection, peer.ip(), limits.handshakes, time).await else {
        return refused(Refusal::Slow, "so many handshakes are under way that there is no place for it");
    };
    let shaken = shake_hands(&site, stream, time, &mut place);
    let (stream, speech) = match shaken.await {
        Ok(shaken) => shaken,
        Err((refusal, why)) => return refused(refusal, &why),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| Some(chain.first()?.to_vec()));
    let Some(certificate) = certificate else { return refused(Refusal::Handshake, "it has no certificate") };
    let digest = digest(&certificate);
    let who = {
        let site = site.clone();
        // It may read the registry.
        tokio::task::spawn_blocking(move || site.who(&digest)).await
    };
    let client = match who {
        Ok(Ok(client)) => client,
        Ok(Err(why)) => {
            refused(Refusal::Unknown, &format!("certificate {}: {why}", hex::encode(digest)));
            return turn_away(stream, speech, TroubleCode::NotAllowed, why.into()).await;
        }
        Err(_) => return,
    };
    let most = (limits.connections, limits.connections_per_client);
    let entry = match site.running.enter(connection, digest, client.clone(), most) {
        Ok(entry) => entry,
        Err(full) => {
            let why = match full {
                Full::All(most) => format!("{most} sessions run, as many as may"),
                Full::OfClient(most) => format!("{} has {most} sessions, as many as it may", client.name),
            };
            refused(Refusal::Full, &why);
            let message = "this site has as many sessions as it can take; try again later";
            return turn_away(stream, speech, TroubleCode::Unavailable, message.into()).await;
        }
    };
    drop(place);
    let old = tokio::spawn({
        let (running, longest) = (site.running.clone(), limits.session());
        async move {
            tokio::time::sleep(longest).await;
            running.end_old(connection);
        }
    });
    let (runtime, site) = (Handle::current(), site.clone());
    let spawned = std::thread::Builder::new().name("session".into()).spawn(move || {
        let window = site.windows.take(limits.memory(), limits.connections);
        let sending = Sending::new(&site, digest, &client.tenant);
        let received = Arc::default();
        let desk = Desk { site, connection, peer, client, certificate, digest, entry, window, received, sending };
        session(desk, stream, speech, &runtime);
        old.abort();
    });
    if let Err(e) = spawned {
        // What was moved into it is gone, and with it the connection.
        error!(connection, "a session can't be started: {e}");
    }
}

/// TLS, within its time and for as long as nobody else needs the place.
async fn shake_hands(
    site: &Site,
    stream: TcpStream,
    time: Duration,
    place: &mut Place,
) -> Result<(TlsStream<TcpStream>, Speech), (Refusal, String)> {
    let _ = stream.set_nodelay(true);
    let acceptor = TlsAcceptor::from(site.config().tls.clone());
    let shaken = tokio::select! {
        shaken = timeout(time, acceptor.accept(stream).into_fallible()) => shaken,
        _ = &mut place.leave => return Err((Refusal::Slow, "its handshake took long, and another needed the place".into())),
    };
    match shaken {
        Ok(Ok(stream)) => match stream.get_ref().1.alpn_protocol() {
            Some(ALPN) => Ok((stream, Speech::Wire)),
            Some(NBD_ALPN) => Ok((stream, Speech::Nbd)),
            _ => Err((Refusal::Handshake, "it does not speak the protocol".into())),
        },
        Ok(Err((e, mut stream))) => {
            // As when one is turned away; the place is another's if he needs it.
            let read = async {
                let _ = stream.shutdown().await;
                copy(&mut stream, &mut sink()).await
            };
            tokio::select! {
                _ = timeout(LAST_WORDS, read) => {}
                _ = &mut place.leave => {}
            }
            Err((Refusal::Handshake, e.to_string()))
        }
        Err(_) => Err((Refusal::Slow, "the handshake takes too long".into())),
    }
}

/// One connection of one who was let in, up to its end.
fn session(desk: Desk, stream: TlsStream<TcpStream>, speech: Speech, runtime: &Handle) {
    let desk = Arc::new(desk);
    let Desk { site, connection, peer, client, .. } = &*desk;
    let span = info_span!("session", connection, %peer, client = %printable(&client.name), tenant = %client.tenant, vm = Empty);
    let _inside = span.enter();
    let began = Instant::now();
    site.metrics.connections.inc();
    debug!(window = desk.window.offers, "connected");
    let outcome = match speech {
        Speech::Wire => speak(&desk, stream, &span, runtime),
        Speech::Nbd => nbd::serve(&desk, stream, &span, runtime),
    };
    site.metrics.ended(&client.tenant, client.role, outcome, began.elapsed());
    site.metrics.connections.dec();
}

/// A session of messages.
fn speak(desk: &Desk, stream: TlsStream<TcpStream>, span: &Span, runtime: &Handle) -> Outcome {
    let Desk { site, client, .. } = desk;
    let (mut inbox, outbox) = carry::<FromSource, _>(runtime, stream, Some(desk.reins()));
    let mut vm = None;
    let session = Session { inbox: &mut inbox, outbox: &outbox, client, desk, passes_over: false };
    let made = converse(session, desk, span, &mut vm);
    let outcome = match &made {
        Ok(done) => {
            info!("{done}");
            Outcome::Done
        }
        Err(e) => {
            let why = printable(&Failure::of(reseal_cli::Status::Failed, e).message);
            let trouble = trouble(e);
            let code = trouble.as_ref().map(|trouble| trouble.code);
            let is_refused = code == Some(TroubleCode::NotAllowed);
            match client.reads() {
                true => warn!("ended: {why}"),
                false => warn!("made nothing: {why}"),
            }
            site.metrics.failed(code);
            desk.failed(if is_refused { What::Refused } else { What::Failed }, vm.as_ref(), &why);
            if let Some(trouble) = trouble {
                let _ = outbox.blocking_send(FromTarget::Trouble(trouble).encode());
            }
            if is_refused { Outcome::Refused } else { Outcome::Failed }
        }
    };
    drop(outbox);
    inbox.farewell(runtime);
    outcome
}

/// A session, up to its end; what came of it, for the log.
fn converse(
    mut session: Session<'_>,
    desk: &Desk,
    span: &Span,
    about: &mut Option<VmName>,
) -> Result<String, BackupError> {
    desk.connected()?;
    session.hello()?;
    if desk.client.reads() {
        let answered = session.answer_questions()?;
        return Ok(format!("answered {answered} questions"));
    }
    let (vm, resume) = session.begin()?;
    span.record("vm", display(&vm));
    *about = Some(vm.clone());
    desk.begins(&vm)?;
    let tenant = &desk.client.tenant;
    let open = desk.open()?;
    let began = Instant::now();
    let made = session.make(&open, vm.clone(), resume);
    crate::status::session_ended(&open, &vm, began, &made);
    desk.site.standing.has_changed(tenant);
    let number = made?;
    Ok(format!("made {vm}@{number} of tenant {tenant}"))
}
