//! Two sites: a source without keys, a target with a server, certificates for both, and a proxy on the way between them.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use reseal_proto::wire::{ALPN, FromSource, FromTarget, HEADER_LENGTH, Header, Side};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use sha2::{Digest, Sha256};

use crate::ports::free_port;
use crate::process::{Run, Running, signal};
use crate::site::Site;

/// An authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

/// A certificate with its key.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
    pub sha256: String,
}

impl Authority {
    /// A new one.
    pub fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// The one whose key and certificate are in a file.
    pub fn read(path: &Path) -> Authority {
        let text = fs::read_to_string(path).unwrap();
        let at = text.find("-----BEGIN CERTIFICATE").unwrap();
        let (key, pem) = (KeyPair::from_pem(&text[..at]).unwrap(), text[at..].to_owned());
        Authority { issuer: Issuer::from_ca_cert_pem(&pem, key).unwrap(), pem }
    }

    /// A list of certificates that it has revoked, by their serial numbers.
    pub fn revoke(&self, serials: &[&[u8]]) -> String {
        let revoked = |serial: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: date_time_ymd(2026, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 1),
            next_update: date_time_ymd(2040, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// Issues a certificate.
    pub fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let sha256 = hex::encode(Sha256::digest(certificate.der()));
        Identity { certificate: certificate.pem(), key: key.serialize_pem(), sha256 }
    }
}

impl Default for Authority {
    fn default() -> Authority {
        Authority::new()
    }
}

/// A target with a server, and a source that is enrolled there.
pub struct Sites {
    pub target: Site,
    pub source: Site,
    pub authority: Authority,
    pub client: Identity,
    pub port: u16,
    server: Option<Running>,
}

/// Writes a file that only its owner may read.
pub fn private(path: PathBuf, content: &str) -> PathBuf {
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

/// Starts the server of a site whose configuration is `serve.toml` there, and waits until it listens.
pub fn serve(target: &Site, port: u16) -> Running {
    let config = target.path("serve.toml");
    let server = target.start(["serve", "--config", config.to_str().unwrap()]);
    let began = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if server.has_ended() || began.elapsed() > Duration::from_secs(20) {
            panic!("the server does not come up: {:#?}", server.kill());
        }
        thread::sleep(Duration::from_millis(20));
    }
    server
}

impl Sites {
    /// Both, with a client that may append to any VM of the tenant `default`.
    pub fn new() -> Sites {
        let authority = Authority::new();
        let client = authority.issue(|_| {});
        let clients = [(client.clone(), "append", "[\"*\"]")];
        Sites::with(authority, &clients)
    }

    /// The same with these clients, by role and VMs; the first is the source.
    pub fn with(authority: Authority, clients: &[(Identity, &str, &str)]) -> Sites {
        let clients: Vec<_> =
            clients.iter().map(|(client, role, vms)| (client.clone(), "default", *role, *vms)).collect();
        Sites::configured(authority, &clients, "", &|_| {})
    }

    /// The same with clients by tenant, role and VMs, and what else the configuration is to say. `prepare` makes what the target has
    /// before the server starts.
    pub fn configured(
        authority: Authority,
        clients: &[(Identity, &str, &str, &str)],
        more: &str,
        prepare: &dyn Fn(&Site),
    ) -> Sites {
        let target = Site::new();
        prepare(&target);
        Sites::at(target, authority, clients, more)
    }

    /// The same with that target.
    pub fn at(target: Site, authority: Authority, clients: &[(Identity, &str, &str, &str)], more: &str) -> Sites {
        let source = Site::bare();
        let server = authority.issue(|_| {});
        let certificate = private(target.path("server.pem"), &server.certificate);
        let key = private(target.path("server.key"), &server.key);
        let ca = private(target.path("clients.pem"), &authority.pem);
        let port = free_port();
        let mut config = format!(
            "listen = \"127.0.0.1:{port}\"\n[tls]\ncertificate = {certificate:?}\nkey = {key:?}\nclient_ca = {ca:?}\n"
        );
        for (nth, (client, tenant, role, vms)) in clients.iter().enumerate() {
            let sha256 = &client.sha256;
            config += &format!(
                "[[client]]\nname = \"client-{nth}\"\ncertificate_sha256 = \"{sha256}\"\ntenant = \"{tenant}\"\nrole = \"{role}\"\nvms = {vms}\n"
            );
        }
        config += more;
        private(target.path("serve.toml"), &config);
        let client = clients[0].0.clone();
        let mut sites = Sites { target, source, authority, client, port, server: None };
        sites.start();
        sites
    }

    /// Starts the server.
    pub fn start(&mut self) {
        self.server = Some(serve(&self.target, self.port));
    }

    /// Has the server read its configuration again after it was changed.
    pub fn reload(&self, change: impl FnOnce(String) -> String) {
        let path = self.target.path("serve.toml");
        let text = change(fs::read_to_string(&path).unwrap());
        private(path, &text);
        signal(self.server_id(), libc::SIGHUP);
    }

    /// The server's process.
    pub fn server_id(&self) -> u32 {
        self.server.as_ref().unwrap().id()
    }

    /// Ends the server as its administrator does; what it printed.
    pub fn stop(&mut self) -> Run {
        let server = self.server.take().unwrap();
        signal(server.id(), libc::SIGTERM);
        server.wait()
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        self.server.take().unwrap().kill();
    }

    /// An enrolment file of somebody for a port.
    pub fn enrolment(&self, name: &str, identity: &Identity, authority: &Authority, port: u16) -> PathBuf {
        let Identity { certificate, key, .. } = identity;
        let text = format!(
            "version = 1\naddress = \"127.0.0.1:{port}\"\nserver_name = \"localhost\"\ntenant = \"default\"\n\
             server_ca = \"\"\"{}\"\"\"\ncertificate = \"\"\"{certificate}\"\"\"\nkey = \"\"\"{key}\"\"\"\n",
            authority.pem
        );
        private(self.source.path(name), &text)
    }

    /// The source's own enrolment file, by way of a port.
    pub fn enrolled(&self, port: u16) -> PathBuf {
        self.enrolment("site.reseal", &self.client, &self.authority, port)
    }

    /// The words of a backup from the source.
    pub fn words(&self, port: u16, vm: &str, disks: &[&str]) -> Vec<String> {
        let enrolment = self.enrolled(port);
        let words = ["--repo", enrolment.to_str().unwrap(), "--json", "backup", vm];
        words.iter().chain(disks).map(|word| (*word).to_owned()).collect()
    }

    /// A connection of somebody who writes messages by himself.
    pub fn connect(&self, identity: &Identity) -> Peer {
        Peer::connect(self.port, &self.authority.pem, Some(identity))
    }
}

impl Default for Sites {
    fn default() -> Sites {
        Sites::new()
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
    }
}

/// One who speaks the protocol, and says what he likes.
pub struct Peer(StreamOwned<ClientConnection, TcpStream>);

impl Peer {
    /// One who trusts an authority, and has a certificate or none.
    pub fn connect(port: u16, authority: &str, identity: Option<&Identity>) -> Peer {
        Peer::speaking(ALPN, port, authority, identity)
    }

    /// The same, who says that inside TLS he speaks something else.
    pub fn speaking(alpn: &[u8], port: u16, authority: &str, identity: Option<&Identity>) -> Peer {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            None => config.with_no_client_auth(),
            Some(identity) => {
                let chain = vec![CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Peer(StreamOwned::new(connection, stream))
    }

    /// Sends a message.
    pub fn say(&mut self, message: &FromSource) {
        self.write(&message.encode());
    }

    /// Sends any bytes. That they are not taken any more shows when the answer is read.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes).and_then(|()| self.0.flush());
    }

    /// Says that nothing more comes.
    pub fn end(&mut self) {
        self.0.conn.send_close_notify();
        let _ = self.0.flush();
    }

    /// Exactly so many bytes; `None` where the connection ended before.
    pub fn read(&mut self, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// The next message; `None` where the connection ended.
    pub fn hear(&mut self) -> Option<FromTarget> {
        let mut header = [0; HEADER_LENGTH];
        match self.0.read_exact(&mut header) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => panic!("the server says nothing"),
            Err(_) => return None,
            Ok(()) => {}
        }
        let header = Header::decode(Side::Target, header).unwrap();
        let mut payload = vec![0; header.payload()];
        self.0.read_exact(&mut payload).unwrap();
        Some(FromTarget::decode(header, &payload).unwrap())
    }
}

/// What lies between the sites. It counts what the source sends, and can cut the line.
pub struct Proxy {
    pub port: u16,
    sent: Arc<AtomicU64>,
    cut_at: Arc<AtomicU64>,
}

impl Proxy {
    /// In front of a port.
    pub fn new(to: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sent, cut_at) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(u64::MAX)));
        let proxy = Proxy { port, sent: sent.clone(), cut_at: cut_at.clone() };
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(target) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let (mut from, mut back) = (source.try_clone().unwrap(), target.try_clone().unwrap());
                let (mut source, mut target) = (source, target);
                thread::spawn(move || {
                    let _ = std::io::copy(&mut back, &mut source);
                    let _ = source.shutdown(Shutdown::Both);
                });
                let (sent, cut_at) = (sent.clone(), cut_at.clone());
                thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        let so_far = sent.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
                        let cut = so_far > cut_at.load(Ordering::Relaxed);
                        if cut {
                            cut_at.store(u64::MAX, Ordering::Relaxed);
                        }
                        if cut || target.write_all(&bytes[..count]).is_err() {
                            break;
                        }
                    }
                    let _ = (target.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
                });
            }
        });
        proxy
    }

    /// Bytes that the source has sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Cuts the connection once when so many more bytes have passed.
    pub fn cut_after(&self, bytes: u64) {
        self.cut_at.store(self.sent() + bytes, Ordering::Relaxed);
    }
}

/// A line that somebody listens to: it keeps all that passes, either way.
pub struct Tapped {
    pub port: u16,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Tapped {
    /// In front of a port.
    pub fn new(to: u16) -> Tapped {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, heard) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<u8>>>::default());
        let ear = heard.clone();
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(target) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let ends = || (source.try_clone().unwrap(), target.try_clone().unwrap());
                let ((from_source, to_target), (to_source, from_target)) = (ends(), ends());
                for (mut from, mut to) in [(from_source, to_target), (from_target, to_source)] {
                    let ear = ear.clone();
                    thread::spawn(move || {
                        let mut bytes = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from.read(&mut bytes) {
                            ear.lock().unwrap().extend_from_slice(&bytes[..count]);
                            if to.write_all(&bytes[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
                    });
                }
            }
        });
        Tapped { port, heard }
    }

    /// What was heard so far.
    pub fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap().clone()
    }
}

/// A line that is long and narrow: so long one way, and so many bytes a second from the source.
pub fn long_line(to: u16, delay: Duration, rate: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for source in listener.incoming().flatten() {
            let Ok(target) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let ends = || (source.try_clone().unwrap(), target.try_clone().unwrap());
            let ((from, back), (to, from_target)) = (ends(), ends());
            one_way(from, back, delay, rate);
            one_way(from_target, to, delay, u64::MAX);
        }
    });
    port
}

/// What a line holds is what is on its way, and some more: as a router's buffer.
fn one_way(mut from: TcpStream, mut to: TcpStream, delay: Duration, rate: u64) {
    let (pieces, arriving) = crossbeam_channel::bounded::<(Instant, Vec<u8>)>(64);
    thread::spawn(move || {
        let mut free = Instant::now();
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            free = free.max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate as f64);
            thread::sleep(free.saturating_duration_since(Instant::now()));
            if pieces.send((free + delay, bytes[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (at, bytes) in arriving {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
