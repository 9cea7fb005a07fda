//! A reader whose target lies: in lengths, order, numbers, names and contents. It gets an error, and believes nothing.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use reseal_proto::wire::{
    ALPN, FromSource, FromTarget, HEADER_LENGTH, Header, Plaintext, PointState, Points as Page, Shown, Side, Trouble,
    TroubleCode, VERSION, Vms, Welcome,
};
use reseal_site::SiteReader;
use reseal_tests::far::{open, reader};
use reseal_tests::library::vm;
use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, private};
use reseal_tests::site::Site;
use reseal_vault::{Class, Points, VaultError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A target that answers whatever it is told to; nothing ends the connection.
struct Liar {
    _folder: tempfile::TempDir,
    file: PathBuf,
}

type Answer = dyn Fn(&FromSource) -> Option<Vec<u8>> + Send + Sync;

fn welcome() -> Vec<u8> {
    FromTarget::Welcome(Welcome { version: VERSION, software: "liar".into(), time: 1_800_000_000_000, window: 1 })
        .encode()
}

fn converse(stream: &mut (impl Read + Write), answer: &Answer) -> Option<()> {
    loop {
        let mut header = [0; HEADER_LENGTH];
        stream.read_exact(&mut header).ok()?;
        let header = Header::decode(Side::Source, header).ok()?;
        let mut payload = vec![0; header.payload()];
        stream.read_exact(&mut payload).ok()?;
        let bytes = answer(&FromSource::decode(header, &payload).ok()?)?;
        stream.write_all(&bytes).and_then(|()| stream.flush()).ok()?;
    }
}

impl Liar {
    /// One that says hello as it should, and then this.
    fn saying(answer: impl Fn(&FromSource) -> Option<Vec<u8>> + Send + Sync + 'static) -> Liar {
        Liar::answering(move |message| match message {
            FromSource::Hello(_) => Some(welcome()),
            // The certificate here may be due, which is none of this.
            FromSource::Renew(_) => None,
            other => answer(other),
        })
    }

    fn answering(answer: impl Fn(&FromSource) -> Option<Vec<u8>> + Send + Sync + 'static) -> Liar {
        let authority = Authority::new();
        let (server, client) = (authority.issue(|_| {}), authority.issue(|_| {}));
        let chain = vec![CertificateDer::from_pem_slice(server.certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(server.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let (config, answer) = (Arc::new(config), Arc::new(answer));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, answer) = (config.clone(), answer.clone());
                thread::spawn(move || {
                    let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
                    converse(&mut stream, &*answer)
                });
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "version = 1\naddress = \"127.0.0.1:{port}\"\nserver_name = \"localhost\"\ntenant = \"default\"\n\
             server_ca = \"\"\"{}\"\"\"\ncertificate = \"\"\"{}\"\"\"\nkey = \"\"\"{}\"\"\"\n",
            authority.pem, client.certificate, client.key
        );
        let file = private(folder.path().join("liar.reseal"), &text);
        Liar { _folder: folder, file }
    }

    fn reader(&self) -> SiteReader {
        reader(&self.file)
    }
}

#[track_caller]
fn assert_refused<T>(result: Result<T, VaultError>, said: &str) {
    let refused = result.err().expect("a lie is believed");
    assert!(refused.class() == Class::Failed && refused.to_string().contains(said), "{refused} should say {said:?}");
}

fn raw(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind, 0, 0, 0], &length[..], payload].concat()
}

#[test]
fn lists_that_can_not_be_are_refused() {
    let names = |names: &[&str], more| {
        FromTarget::Vms(Vms { names: names.iter().map(|name| (*name).to_owned()).collect(), more }).encode()
    };
    for (answer, said) in [
        (names(&["b", "a"], false), "not in order"),
        (names(&["a", "a"], false), "not in order"),
        // Page after page.
        (names(&["a", "b"], true), "names VMs twice"),
        (names(&["a/b"], false), "'/'"),
        (names(&["a\u{1b}[2J"], false), "control character"),
        (names(&[""], false), "does not keep to the protocol"),
        (FromTarget::Closed.encode(), "does not say which VMs"),
        (raw(0xb0, &[0xff; 4]), "at most 1024"),
        (raw(0xb0, &[0, 0, 0, 1, 0, 0, 0, 1]), "does not fit"),
        (vec![0xb0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "at most"),
        (vec![0x42, 0, 0, 0, 0, 0, 0, 0], "kind"),
    ] {
        let liar = Liar::saying(move |_| Some(answer.clone()));
        assert_refused(liar.reader().vms(), said);
    }
    let numbers = |numbers: &[u32], more| {
        let numbers = numbers.iter().map(|number| (*number, PointState::Live)).collect();
        FromTarget::Points(Page { numbers, more }).encode()
    };
    for (answer, said) in [
        (numbers(&[2], false), "are no chain"),
        (numbers(&[1, 3], false), "are no chain"),
        (numbers(&[1, 2], true), "are no chain"),
        (numbers(&[2, 1], false), "does not allow"),
        (numbers(&[0], false), "does not allow"),
        (FromTarget::Points(Page { numbers: vec![(1, PointState::Missing)], more: false }).encode(), "are no chain"),
        (names(&["a"], false), "does not say which restore points"),
        (raw(0xb1, &[0, 0, 0x40, 0x01]), "at most 16384"),
        (raw(0xb1, &[0, 0, 0, 1, 0, 0, 0, 1, 9, 0]), "does not allow"),
    ] {
        let liar = Liar::saying(move |_| Some(answer.clone()));
        assert_refused(liar.reader().chain(&vm("a")), said);
    }
}

#[test]
fn what_is_shown_is_what_was_asked_for_or_an_error() {
    let site = Site::new();
    let disk = site.disk("disk");
    fs::write(&disk, Random::new(1).bytes(70_000)).unwrap();
    site.backup("web01", &disk);
    let right = site.tenant().point(&vm("web01"), 1).unwrap();
    let plain = serde_json::to_vec(&right.manifest).unwrap();
    let manifest = |bytes: &[u8]| FromTarget::Shown(Shown::Manifest(Plaintext(bytes.to_vec()))).encode();
    let honest = {
        let answer = manifest(&plain);
        Liar::saying(move |_| Some(answer.clone()))
    };
    assert_eq!(honest.reader().point(&vm("web01"), 1).unwrap(), right);
    // The same answer to another question.
    for (name, number) in [("web01", 2), ("web02", 1)] {
        assert_refused(honest.reader().point(&vm(name), number), "another restore point's manifest");
    }
    assert_refused(honest.reader().tombstone(&vm("web01"), 1), "was said to be forgotten");
    assert_refused(honest.reader().vms(), "does not say which VMs");
    let mut value = serde_json::to_value(&right.manifest).unwrap();
    value["disks"] = vec![value["disks"][0].clone(); 2].into();
    let twice = serde_json::to_vec(&value).unwrap();
    value["required_features"] = serde_json::json!(["tomorrow"]);
    let tomorrow = serde_json::to_vec(&value).unwrap();
    let refused = |code| FromTarget::Shown(Shown::Refused(Trouble { code, message: "a word".into() })).encode();
    for (answer, said) in [
        (manifest(b""), "malformed"),
        (manifest(b"{}"), "malformed"),
        (manifest(&vec![b'['; 100_000]), "malformed"),
        (manifest(&plain[..plain.len() - 1]), "malformed"),
        (manifest(&twice), "two disks have one name"),
        (manifest(&tomorrow), "needs the feature"),
        (refused(TroubleCode::NotAllowed), "a word"),
        (refused(TroubleCode::Other(999)), "a word"),
        (FromTarget::Closed.encode(), "does not show what it was asked for"),
        (raw(0xb2, &[1, 0xff, 0xff, 0xff, 0xff]), "at most 8388608"),
        (raw(0xb2, &[3]), "does not allow"),
        (raw(0xb2, &[]), "does not fit"),
    ] {
        let liar = Liar::saying(move |_| Some(answer.clone()));
        assert_refused(liar.reader().point(&vm("web01"), 1), said);
        // Where many are asked for, each has an error.
        let results = liar.reader().points(&vm("web01"), &[1, 2, 3]);
        assert!(results.len() == 3 && results.iter().all(Result::is_err));
    }
    for (code, class) in [(TroubleCode::Damaged, Class::Damaged), (TroubleCode::Unavailable, Class::Unreachable)] {
        let answer = refused(code);
        let liar = Liar::saying(move |_| Some(answer.clone()));
        assert_eq!(liar.reader().point(&vm("web01"), 1).err().unwrap().class(), class);
    }
    let none = FromTarget::Shown(Shown::Tombstone(Plaintext(b"{}".to_vec()))).encode();
    let liar = Liar::saying(move |_| Some(none.clone()));
    assert!(matches!(liar.reader().point(&vm("web01"), 1), Err(VaultError::NoPoint { .. })));
    assert_refused(liar.reader().tombstone(&vm("web01"), 1), "malformed");
}

#[test]
fn a_target_of_another_version_or_none_is_told_apart() {
    let other = FromTarget::Welcome(Welcome { version: 2, software: String::new(), time: 0, window: 1 }).encode();
    for (answer, said) in
        [(other, "it speaks version 2"), (FromTarget::Closed.encode(), "does not say its version first")]
    {
        let liar = Liar::answering(move |_| Some(answer.clone()));
        assert_refused(liar.reader().vms(), said);
    }
    // One that hangs up is away; one that does not agree on NBD reads no disk.
    let liar = Liar::saying(|_| None);
    assert_eq!(liar.reader().vms().err().unwrap().class(), Class::Unreachable);
    assert_refused(open(&liar.reader(), "web01", 1), "TLS");
}
