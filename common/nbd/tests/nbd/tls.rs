//! TLS: who is believed, and that nothing is said before.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use reseal_cli::Status;
use reseal_nbd::{Export, NbdError, NbdUri, Options, TlsFiles};
use reseal_proto::nbd::{CLIENT_FLAGS_LENGTH, Greeting, OPTION_HEADER_LENGTH, OptionError, OptionKind, OptionReply};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::reading::{impatient, read_all};
use crate::server::{Place, Server};

/// An authority.
struct Authority {
    params: CertificateParams,
    key: KeyPair,
    certificate: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority { params, key, certificate }
    }

    /// A certificate for `name`, and its key.
    fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
    }
}

pub(crate) struct Fixture {
    pub(crate) place: Place,
    bytes: Vec<u8>,
}

impl Fixture {
    /// A disk, and a folder for the server with a certificate for `name`; the client's files are beside it.
    pub(crate) fn new(name: &str) -> Fixture {
        let place = Place::new();
        let authority = Authority::new();
        let server = authority.issue(name, ExtendedKeyUsagePurpose::ServerAuth);
        let client = authority.issue("client", ExtendedKeyUsagePurpose::ClientAuth);
        std::fs::create_dir(place.path("pki")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(place.path(name), text).unwrap();
        write("pki/ca-cert.pem", &authority.certificate);
        write("pki/server-cert.pem", &server.0);
        write("pki/server-key.pem", &server.1);
        write("ca.pem", &authority.certificate);
        write("cert.pem", &client.0);
        write("key.pem", &client.1);
        let bytes: Vec<u8> = (0..3u32 << 20).map(|at| (at >> 3).to_le_bytes()[at as usize % 3]).collect();
        std::fs::write(place.path("disk"), &bytes).unwrap();
        Fixture { place, bytes }
    }

    fn command(&self, verify_peer: bool) -> Command {
        let verify = if verify_peer { "on" } else { "off" };
        let folder = self.place.path("pki");
        let credentials =
            format!("tls-creds-x509,id=tls0,dir={},endpoint=server,verify-peer={verify}", folder.display());
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-f", "raw", "-e", "0", "--object", &credentials, "--tls-creds", "tls0"]);
        command
    }

    fn unix(&self, verify_peer: bool) -> Server {
        let mut command = self.command(verify_peer);
        command.arg("-k").arg(self.place.socket()).arg(self.place.path("disk"));
        Server::start(&mut command, &self.place.socket())
    }

    fn tcp(&self, verify_peer: bool) -> (Server, u16) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let pid = self.place.path("pid");
        let mut command = self.command(verify_peer);
        command.args(["-b", "127.0.0.1", "-p", &port.to_string(), "--pid-file"]);
        command.arg(&pid).arg(self.place.path("disk"));
        (Server::start(&mut command, &pid), port)
    }

    pub(crate) fn uri(&self, more: &str) -> NbdUri {
        format!("nbds+unix:///?socket={}{more}", self.place.socket().display()).parse().unwrap()
    }

    pub(crate) fn options(&self) -> Options {
        Options { tls: TlsFiles { ca: Some(self.place.path("ca.pem")), ..TlsFiles::default() }, ..Options::default() }
    }

    /// A client that speaks TLS from its first byte on.
    pub(crate) fn client(&self, stream: TcpStream) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        let ca = std::fs::read(self.place.path("ca.pem")).unwrap();
        roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        rustls::StreamOwned::new(rustls::ClientConnection::new(Arc::new(config), name).unwrap(), stream)
    }

    pub(crate) fn with_certificate(&self) -> Options {
        let mut options = self.options();
        options.tls.cert = Some(self.place.path("cert.pem"));
        options.tls.key = Some(self.place.path("key.pem"));
        options
    }
}

fn refused(uri: &NbdUri, options: &Options) -> NbdError {
    match Export::open(uri, options, None) {
        Ok(_) => panic!("{uri} was opened"),
        Err(e) => e,
    }
}

#[test]
fn a_disk_is_read_through_tls() {
    let fixture = Fixture::new("localhost");
    let _server = fixture.unix(false);
    let export = Export::open(&fixture.uri(""), &fixture.options(), None).unwrap();
    assert!(export.name().starts_with("nbds+unix://"));
    assert!(read_all(&export, 1 << 20, |_| {}).unwrap().bytes == fixture.bytes);
    let error = refused(&fixture.uri("&tls-hostname=elsewhere"), &fixture.options());
    assert!(matches!(error, NbdError::Tls { .. }), "{error}");
}

#[test]
fn a_disk_is_read_through_tls_over_tcp() {
    let fixture = Fixture::new("127.0.0.1");
    let (_server, port) = fixture.tcp(false);
    let uri: NbdUri = format!("nbds://127.0.0.1:{port}/").parse().unwrap();
    let export = Export::open(&uri, &fixture.options(), None).unwrap();
    assert!(read_all(&export, 1 << 20, |_| {}).unwrap().bytes == fixture.bytes);
    // The same server under a name that its certificate does not have.
    let uri: NbdUri = format!("nbds://localhost:{port}/").parse().unwrap();
    let error = refused(&uri, &fixture.options());
    assert!(matches!(error, NbdError::Tls { .. }) && error.status() == Status::Unreachable, "{error}");
    assert!(error.to_string().contains("localhost"), "{error}");
    // Nor is it served in the clear.
    let uri: NbdUri = format!("nbd://127.0.0.1:{port}/").parse().unwrap();
    let error = refused(&uri, &fixture.options());
    assert!(error.to_string().contains("requires TLS") && error.to_string().contains("--tls-ca"), "{error}");
    assert_eq!(error.status(), Status::Usage);
}

#[test]
fn another_authority_is_not_believed() {
    let fixture = Fixture::new("localhost");
    let _server = fixture.unix(false);
    let other = fixture.place.path("other.pem");
    std::fs::write(&other, Authority::new().certificate).unwrap();
    let mut options = fixture.options();
    options.tls.ca = Some(other);
    let error = refused(&fixture.uri(""), &options);
    assert!(matches!(error, NbdError::Tls { .. }), "{error}");
}

#[test]
fn a_server_that_wants_a_certificate_gets_ours() {
    let fixture = Fixture::new("localhost");
    let _server = fixture.unix(true);
    let export = Export::open(&fixture.uri(""), &fixture.with_certificate(), None).unwrap();
    assert!(read_all(&export, 1 << 20, |_| {}).unwrap().bytes == fixture.bytes);
    let error = refused(&fixture.uri(""), &fixture.options()).to_string();
    assert!(error.contains("--tls-cert") || error.contains("ertificate"), "{error}");
}

#[test]
fn files_that_can_not_be_used_are_named() {
    let fixture = Fixture::new("localhost");
    let usage = |options: &Options, said: &str| {
        let error = refused(&fixture.uri(""), options);
        assert!(matches!(error, NbdError::Usage(_)) && error.to_string().contains(said), "{error}");
    };
    usage(&Options::default(), "--tls-ca");
    let broken = fixture.place.path("broken.pem");
    let with = |change: &dyn Fn(&mut TlsFiles, PathBuf)| {
        let mut options = fixture.with_certificate();
        change(&mut options.tls, broken.clone());
        options
    };
    usage(&with(&|files, path| files.ca = Some(path)), "can't read");
    for text in ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&broken, text).unwrap();
        usage(&with(&|files, path| files.ca = Some(path)), "broken.pem");
        usage(&with(&|files, path| files.key = Some(path)), "broken.pem");
    }
    usage(&with(&|files, _| files.key = None), "belong together");
    let key = fixture.place.path("pki/server-key.pem");
    usage(&with(&|files, _| files.key = Some(key.clone())), "is not the private key of");
    let text = format!("{:?}", fixture.with_certificate());
    assert!(!text.contains("PRIVATE"), "{text}");
}

/// What a man in the middle, or a server, sends and receives; the client's first bytes are returned.
fn middle(talk: impl FnOnce(TcpStream) -> Vec<u8> + Send + 'static) -> (u16, std::thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, std::thread::spawn(move || talk(listener.accept().unwrap().0)))
}

const GREETING: Greeting = Greeting { fixed_newstyle: true, no_zeroes: true };
const START: usize = CLIENT_FLAGS_LENGTH + OPTION_HEADER_LENGTH;

fn refused_in_the_middle(talk: impl FnOnce(TcpStream) -> Vec<u8> + Send + 'static, ca: &Path) -> (NbdError, Vec<u8>) {
    let (port, thread) = middle(talk);
    let uri: NbdUri = format!("nbds://127.0.0.1:{port}/secret-name").parse().unwrap();
    let options = Options { tls: TlsFiles { ca: Some(ca.to_owned()), ..TlsFiles::default() }, ..impatient() };
    (refused(&uri, &options), thread.join().unwrap())
}

/// Reads until the client hangs up.
fn rest(mut stream: TcpStream, mut heard: Vec<u8>) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = stream.read_to_end(&mut heard);
    heard
}

#[test]
fn a_man_in_the_middle_who_strips_tls_hears_nothing() {
    let fixture = Fixture::new("127.0.0.1");
    let ca = fixture.place.path("ca.pem");
    let (_server, port) = fixture.tcp(false);
    // Between the client and a real server: says that there is no TLS, and passes on everything else.
    let strip = move |mut client: TcpStream| {
        let mut server = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut greeting = [0; 18];
        server.read_exact(&mut greeting).unwrap();
        client.write_all(&greeting).unwrap();
        let mut heard = vec![0; START];
        client.read_exact(&mut heard).unwrap();
        let refusal = OptionReply::Error { error: OptionError::Unsupported, text: String::new() };
        client.write_all(&refusal.encode(OptionKind::StartTls)).unwrap();
        rest(client, heard)
    };
    let (error, heard) = refused_in_the_middle(strip, &ca);
    assert!(error.to_string().contains("does not offer TLS"), "{error}");
    assert_eq!(heard.len(), START, "nothing but the handshake was sent");
    assert!(!heard.windows(6).any(|part| part == b"secret"));
    // One who says that the server is too old for options.
    let old = |mut client: TcpStream| {
        client.write_all(&Greeting { fixed_newstyle: false, no_zeroes: true }.encode()).unwrap();
        rest(client, Vec::new())
    };
    let (error, heard) = refused_in_the_middle(old, &ca);
    assert!(error.to_string().contains("fixed newstyle"), "{error}");
    assert!(heard.is_empty());
    // One who answers another option.
    let other = |mut client: TcpStream| {
        client.write_all(&GREETING.encode()).unwrap();
        client.write_all(&OptionReply::Ack.encode(OptionKind::Go)).unwrap();
        rest(client, Vec::new())
    };
    let (error, heard) = refused_in_the_middle(other, &ca);
    assert!(matches!(error, NbdError::Protocol { .. }), "{error}");
    assert_eq!(heard.len(), START);
}

#[test]
fn what_is_injected_before_tls_is_refused() {
    let fixture = Fixture::new("127.0.0.1");
    let inject = |mut client: TcpStream| {
        client.write_all(&GREETING.encode()).unwrap();
        let mut heard = vec![0; START];
        client.read_exact(&mut heard).unwrap();
        // Answers to options that will be asked through TLS.
        let mut answer = OptionReply::Ack.encode(OptionKind::StartTls);
        answer.extend(OptionReply::Ack.encode(OptionKind::StructuredReply));
        client.write_all(&answer).unwrap();
        rest(client, heard)
    };
    let (error, heard) = refused_in_the_middle(inject, &fixture.place.path("ca.pem"));
    assert!(error.to_string().contains("in the clear"), "{error}");
    assert_eq!(heard.len(), START);
}

#[test]
fn a_server_that_agrees_to_tls_and_is_silent_is_given_up() {
    let fixture = Fixture::new("127.0.0.1");
    let silent = |mut client: TcpStream| {
        client.write_all(&GREETING.encode()).unwrap();
        client.write_all(&OptionReply::Ack.encode(OptionKind::StartTls)).unwrap();
        rest(client, Vec::new())
    };
    let (error, heard) = refused_in_the_middle(silent, &fixture.place.path("ca.pem"));
    // What came together with the greeting may count as sent in the clear; what matters is that it ends.
    assert!(matches!(error, NbdError::Unreachable { .. } | NbdError::Protocol { .. }), "{error}");
    assert!(!heard.windows(6).any(|part| part == b"secret"));
}

#[test]
fn a_plain_server_is_refused() {
    let fixture = Fixture::new("localhost");
    let _server = fixture.place.qemu_nbd("raw", &fixture.place.path("disk"), &["-e", "0"]);
    let error = refused(&fixture.uri(""), &fixture.options());
    assert!(matches!(error, NbdError::Refused { .. }) && error.status() == Status::Unreachable, "{error}");
    assert!(error.to_string().contains("does not offer TLS"), "{error}");
}
