//! A KMIP server that does what a test says, or something between reseal and a real one.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use reseal_kms::{Kmip, KmipConfig};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use super::answer::Asked;
use super::pki::Pki;

/// What to do with a request.
pub(crate) enum Act {
    /// Send this.
    Answer(Vec<u8>),
    /// Send this and end the connection without a word.
    Cut(Vec<u8>),
    /// Send this one byte at a time, slowly.
    Drip(Vec<u8>),
    /// Say nothing, for longer than anybody waits.
    Hang,
    /// Ask the server behind.
    Forward,
    /// Ask it, and change its answer.
    Alter(Change),
}

/// A change of an answer.
pub(crate) type Change = Box<dyn FnOnce(&mut Vec<u8>)>;

/// How it takes clients.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Clients {
    /// With a certificate of the CA.
    Known,
    /// Nobody: its CA is another.
    Refused,
    /// Anybody, without asking.
    Unasked,
}

pub(crate) struct Peer {
    config: KmipConfig,
    address: SocketAddr,
    served: Arc<AtomicUsize>,
}

type Script = dyn Fn(&Asked<'_>) -> Act + Send + Sync;

impl Peer {
    /// Answers as `script` says.
    pub(crate) fn new(pki: &Pki, script: impl Fn(&Asked<'_>) -> Act + Send + Sync + 'static) -> Self {
        Self::start(pki, "server", Clients::Known, None, script)
    }

    /// Stands before the server at `port`.
    pub(crate) fn before(pki: &Pki, port: u16, script: impl Fn(&Asked<'_>) -> Act + Send + Sync + 'static) -> Self {
        Self::start(pki, "server", Clients::Known, Some(port), script)
    }

    pub(crate) fn start(
        pki: &Pki,
        identity: &str,
        clients: Clients,
        behind: Option<u16>,
        script: impl Fn(&Asked<'_>) -> Act + Send + Sync + 'static,
    ) -> Self {
        Self::listen(TcpListener::bind("127.0.0.1:0").unwrap(), pki, identity, clients, behind, script)
    }

    pub(crate) fn listen(
        listener: TcpListener,
        pki: &Pki,
        identity: &str,
        clients: Clients,
        behind: Option<u16>,
        script: impl Fn(&Asked<'_>) -> Act + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let tls = Arc::new(server_side(pki, identity, clients));
        let behind = behind.map(|port| (port, Arc::new(client_side(pki, "reseal"))));
        let script: Arc<Script> = Arc::new(script);
        let served = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&served);
        thread::spawn(move || {
            for socket in listener.incoming() {
                let (tls, behind, script) = (Arc::clone(&tls), behind.clone(), Arc::clone(&script));
                count.fetch_add(1, Ordering::SeqCst);
                // A connection that fails is what a test is about.
                thread::spawn(move || serve(socket.unwrap(), tls, behind, &script));
            }
        });
        Self { config: pki.config(address.port(), false), address, served }
    }

    pub(crate) fn kms(&self, allow_get: bool) -> Kmip {
        Kmip::new(&KmipConfig { allow_get, ..self.config.clone() }).unwrap()
    }

    pub(crate) fn impatient(&self, timeout: Duration) -> Kmip {
        Kmip::new(&KmipConfig { timeout, ..self.config.clone() }).unwrap()
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// How many connections there were.
    pub(crate) fn served(&self) -> usize {
        self.served.load(Ordering::SeqCst)
    }
}

fn serve(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    behind: Option<(u16, Arc<ClientConfig>)>,
    script: &Arc<Script>,
) -> Option<()> {
    socket.set_nodelay(true).ok()?;
    let mut client = StreamOwned::new(ServerConnection::new(tls).ok()?, socket);
    let mut server = None;
    loop {
        let Some(request) = message(&mut client) else {
            // An alert may be under way: a reset, which unread data would cause, could overtake it.
            client.sock.shutdown(Shutdown::Write).ok()?;
            client.sock.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            return std::io::copy(&mut client.sock, &mut std::io::sink()).ok().map(drop);
        };
        let answer = match script(&Asked::parse(&request)) {
            Act::Answer(answer) => answer,
            Act::Cut(answer) => {
                client.write_all(&answer).ok()?;
                return client.flush().ok();
            }
            Act::Drip(answer) => {
                for byte in answer {
                    client.write_all(&[byte]).and_then(|()| client.flush()).ok()?;
                    thread::sleep(Duration::from_millis(100));
                }
                continue;
            }
            Act::Hang => {
                thread::sleep(Duration::from_secs(60));
                return None;
            }
            Act::Forward => forward(&mut server, behind.as_ref(), &request)?,
            Act::Alter(change) => {
                let mut answer = forward(&mut server, behind.as_ref(), &request)?;
                change(&mut answer);
                answer
            }
        };
        client.write_all(&answer).and_then(|()| client.flush()).ok()?;
    }
}

/// Asks the server at `port` directly, as `reseal` or `somebody`.
pub(crate) fn ask(pki: &Pki, who: &str, port: u16, request: &[u8]) -> Vec<u8> {
    let behind = Some((port, Arc::new(client_side(pki, who))));
    forward(&mut None, behind.as_ref(), request).unwrap()
}

type Behind = StreamOwned<ClientConnection, TcpStream>;

fn forward(server: &mut Option<Behind>, behind: Option<&(u16, Arc<ClientConfig>)>, request: &[u8]) -> Option<Vec<u8>> {
    if server.is_none() {
        let (port, config) = behind.unwrap();
        let socket = TcpStream::connect(("127.0.0.1", *port)).ok()?;
        socket.set_nodelay(true).ok()?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        *server = Some(StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), socket));
    }
    let server = server.as_mut().unwrap();
    server.write_all(request).and_then(|()| server.flush()).ok()?;
    message(server)
}

/// One message, by the length that it says; none at the end of the connection.
fn message(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 8];
    stream.read_exact(&mut bytes).ok()?;
    let length = u32::from_be_bytes(bytes[4..8].try_into().unwrap()) as usize;
    bytes.resize(8 + length, 0);
    stream.read_exact(&mut bytes[8..]).ok()?;
    Some(bytes)
}

fn server_side(pki: &Pki, identity: &str, clients: Clients) -> ServerConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = match clients {
        Clients::Refused => roots(&Pki::new()),
        _ => roots(pki),
    };
    let verifier = match clients {
        Clients::Unasked => WebPkiClientVerifier::no_client_auth(),
        _ => WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap(),
    };
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(pki, identity), private_key(pki, identity))
        .unwrap()
}

fn client_side(pki: &Pki, who: &str) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(pki))
        .with_client_auth_cert(chain(pki, who), private_key(pki, who))
        .unwrap()
}

fn roots(pki: &Pki) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.ca()).unwrap()).unwrap();
    roots
}

fn chain(pki: &Pki, name: &str) -> Vec<CertificateDer<'static>> {
    vec![CertificateDer::from_pem_file(pki.cert(name)).unwrap()]
}

fn private_key(pki: &Pki, name: &str) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(pki.key(name)).unwrap()
}
