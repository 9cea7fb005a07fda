//! The KMIP adapter against the real PyKMIP, and against servers that fail in every way.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod kmip_peer;
#[path = "support/ports.rs"]
mod ports;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kmip_peer::answer::{
    self, Asked, CREATE, DECRYPT, DESTROY, DISCOVER_VERSIONS, ENCRYPT, GET, GET_ATTRIBUTES, Key, LOCATE,
};
use kmip_peer::peer::{Act, Clients, Peer, ask};
use kmip_peer::pki::Pki;
use kmip_peer::pykmip::PyKmip;
use ports::free_port;
use reseal_kms::kms::MAX_WRAPPED;
use reseal_kms::{Class, Kmip, KmipConfig, Kms, KmsError};
use reseal_proto::kmip::ttlv::Writer;
use reseal_proto::kmip::{MAX_MESSAGE, Request, Response, Version, response, tags};

const CONTEXT: &[u8] = b"vault v, tenant t";
const PAYLOAD: &[u8] = b"magic, ids, generation and master of a tenant";

/// Wrapped bytes that the server or reseal has to open.
const BY_SERVER: u8 = 1;
const BY_CLIENT: u8 = 2;

fn wrap(kms: &Kmip) -> Result<Vec<u8>, KmsError> {
    kms.wrap("a", CONTEXT, PAYLOAD)
}

fn unwrap(kms: &Kmip, wrapped: &[u8]) -> Result<Vec<u8>, KmsError> {
    kms.unwrap("a", CONTEXT, wrapped).map(|payload| payload.to_vec())
}

/// Asserts what an error says, and that it names server and key, and shows nothing of what is wrapped.
fn assert_says(error: &KmsError, class: Class, words: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.class(), class, "{text}");
    for word in words.iter().chain(&["kmip:127.0.0.1:", "key a"]) {
        assert!(text.contains(word), "no {word:?} in {text:?}");
    }
    assert!(!text.contains("magic") && !text.contains("master"), "{text}");
}

// With the real server.

#[test]
fn keys_survive_a_restart_of_the_server_and_its_absence_is_an_error_to_retry() {
    let pki = Pki::new();
    let mut server = PyKmip::start(&pki);
    let kms = server.kms();
    kms.create("a").unwrap();
    let wrapped = wrap(&kms).unwrap();
    server.stop();
    let started = Instant::now();
    for error in [
        unwrap(&kms, &wrapped).unwrap_err(),
        wrap(&kms).unwrap_err(),
        kms.create("a").unwrap_err(),
        kms.destroy("a").unwrap_err(),
    ] {
        assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
        assert_says(&error, Class::Unreachable, &["can't be reached", "try again"]);
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    server.run();
    assert_eq!(unwrap(&kms, &wrapped).unwrap(), PAYLOAD);
}

#[test]
fn a_server_that_comes_up_while_connecting_is_reached() {
    let pki = Arc::new(Pki::new());
    let port = free_port();
    let late = {
        let pki = Arc::clone(&pki);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(400));
            let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
            Peer::listen(listener, &pki, "server", Clients::Known, None, usable)
        })
    };
    wrap(&Kmip::new(&pki.config(port, false)).unwrap()).unwrap();
    assert_eq!(late.join().unwrap().served(), 1);
}

#[test]
fn the_server_encrypts_from_1_4_on_and_before_the_key_is_fetched_only_if_allowed() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    for (version, form) in [
        ((2, 0), BY_SERVER),
        ((1, 4), BY_SERVER),
        ((1, 3), BY_CLIENT),
        ((1, 2), BY_CLIENT),
        ((1, 1), BY_CLIENT),
        ((1, 0), BY_CLIENT),
    ] {
        let fetched = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&fetched);
        let peer = Peer::before(&pki, server.port(), move |asked| match asked.operation {
            DISCOVER_VERSIONS => Act::Answer(answer::versions(asked, &[version])),
            operation => {
                assert_eq!(asked.version, version);
                seen.fetch_add(usize::from(operation == GET), Ordering::SeqCst);
                Act::Forward
            }
        });
        let allowed = wrap(&peer.kms(true)).unwrap();
        assert_eq!(allowed[0], form, "{version:?}");
        assert_eq!(unwrap(&peer.kms(true), &allowed).unwrap(), PAYLOAD);
        assert_eq!(fetched.load(Ordering::SeqCst), if form == BY_CLIENT { 2 } else { 0 });
        // A key made in any version fits.
        peer.kms(false).create("b").unwrap();
        peer.kms(false).destroy("b").unwrap();
        if form == BY_SERVER {
            assert_eq!(wrap(&peer.kms(false)).unwrap()[0], BY_SERVER);
            continue;
        }
        assert_says(&wrap(&peer.kms(false)).unwrap_err(), Class::Failed, &["1.4", "allow_get"]);
        assert_says(&unwrap(&peer.kms(false), &allowed).unwrap_err(), Class::Failed, &["allow_get", "rekey --kek"]);
        // A server that learns to encrypt: what is wrapped anew is wrapped there.
        assert_eq!(unwrap(&Kmip::new(&pki.config(server.port(), true)).unwrap(), &allowed).unwrap(), PAYLOAD);
        assert_eq!(wrap(&Kmip::new(&pki.config(server.port(), true)).unwrap()).unwrap()[0], BY_SERVER);
        // And one that forgets how.
        let there = wrap(&server.kms()).unwrap();
        assert_says(&unwrap(&peer.kms(true), &there).unwrap_err(), Class::Failed, &["1.4"]);
    }
}

#[test]
fn a_server_that_knows_no_discover_versions_is_spoken_to_in_1_0() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let peer = Peer::before(&pki, server.port(), |asked| match asked.operation {
        DISCOVER_VERSIONS => Act::Answer(answer::refused(asked, 5, "DiscoverVersions is not supported by KMIP 1.0")),
        _ => {
            assert_eq!(asked.version, (1, 0));
            Act::Forward
        }
    });
    assert_eq!(wrap(&peer.kms(true)).unwrap()[0], BY_CLIENT);
}

#[test]
fn a_key_that_changed_behind_our_back_is_not_used() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    let kms = server.kms();
    let fresh = || {
        kms.create("a").unwrap();
        (wrap(&kms).unwrap(), locate(&pki, &server, "a"))
    };

    let (wrapped, id) = fresh();
    demand(&pki, &server, &Request::Revoke { id: &id });
    for error in [unwrap(&kms, &wrapped).unwrap_err(), wrap(&kms).unwrap_err()] {
        assert_says(&error, Class::Failed, &["it was revoked"]);
    }
    assert!(kms.create("a").unwrap_err().is_key_taken());
    // An erasure that was interrupted after the revocation.
    kms.destroy("a").unwrap();

    let (wrapped, id) = fresh();
    compromise(&pki, &server, &id);
    for error in [unwrap(&kms, &wrapped).unwrap_err(), wrap(&kms).unwrap_err()] {
        assert_says(&error, Class::Failed, &["compromised"]);
    }
    kms.destroy("a").unwrap();

    let (wrapped, id) = fresh();
    demand(&pki, &server, &Request::Revoke { id: &id });
    demand(&pki, &server, &Request::Destroy { id: &id });
    for error in [unwrap(&kms, &wrapped).unwrap_err(), wrap(&kms).unwrap_err(), kms.destroy("a").unwrap_err()] {
        assert!(error.is_key_missing(), "{error}");
        assert_says(&error, Class::Unreachable, &["has no key a"]);
    }
}

#[test]
fn a_key_that_is_not_active_yet_is_not_used_nor_made_again_but_can_be_destroyed() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    let kms = server.kms();
    create(&pki, &server, "a");
    assert_says(&wrap(&kms).unwrap_err(), Class::Failed, &["not active yet"]);
    assert!(kms.create("a").unwrap_err().is_key_taken());
    kms.destroy("a").unwrap();
    assert!(kms.destroy("a").unwrap_err().is_key_missing());
}

#[test]
fn of_two_keys_of_one_name_none_is_used_and_none_destroyed() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    let kms = server.kms();
    kms.create("a").unwrap();
    let wrapped = wrap(&kms).unwrap();
    let other = create(&pki, &server, "a");
    for error in [unwrap(&kms, &wrapped).unwrap_err(), wrap(&kms).unwrap_err(), kms.destroy("a").unwrap_err()] {
        assert_says(&error, Class::Failed, &["several keys have this name"]);
    }
    demand(&pki, &server, &Request::Destroy { id: &other });
    assert_eq!(unwrap(&kms, &wrapped).unwrap(), PAYLOAD);
}

#[test]
fn somebody_elses_key_is_none_of_ours() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let wrapped = wrap(&server.kms()).unwrap();
    let config = pki.config(server.port(), true);
    let somebody = Kmip::new(&KmipConfig { cert: pki.cert("somebody"), key: pki.key("somebody"), ..config }).unwrap();
    for error in [unwrap(&somebody, &wrapped).unwrap_err(), somebody.destroy("a").unwrap_err()] {
        assert!(error.is_key_missing(), "{error}");
    }
    somebody.create("a").unwrap();
    assert!(unwrap(&somebody, &wrapped).unwrap_err().is_not_opened());
    assert_eq!(unwrap(&server.kms(), &wrapped).unwrap(), PAYLOAD);
}

#[test]
fn a_certificate_that_the_server_does_not_take_is_denied() {
    let (pki, stranger) = (Pki::new(), Pki::new());
    let server = PyKmip::start(&pki);
    // Not for clients, and of another CA.
    for (cert, key) in [(pki.cert("server"), pki.key("server")), (stranger.cert("reseal"), stranger.key("reseal"))] {
        let kms = Kmip::new(&KmipConfig { cert, key, ..pki.config(server.port(), false) }).unwrap();
        let error = wrap(&kms).unwrap_err();
        assert!(matches!(error, KmsError::Denied { .. }), "{error}");
        assert_says(&error, Class::Unreachable, &["does not accept the client certificate"]);
    }
}

#[test]
fn answers_altered_beyond_tls_are_refused_or_as_long_as_they_should_be() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let wrapped = wrap(&server.kms()).unwrap();
    for seed in 0..150_usize {
        let countdown = AtomicUsize::new(1 + seed % 4);
        let peer = Peer::before(&pki, server.port(), move |_| {
            if countdown.fetch_sub(1, Ordering::SeqCst) != 1 {
                return Act::Forward;
            }
            // Any of the bytes, of which most are headers and lengths.
            Act::Alter(Box::new(move |answer| {
                let at = seed.wrapping_mul(0x9E37_79B9) % answer.len();
                answer[at] ^= 1 << (seed % 8);
            }))
        });
        match unwrap(&peer.impatient(Duration::from_millis(1500)), &wrapped) {
            // Only TLS protects a decrypted payload on its way here; a server can give any.
            Ok(payload) => assert_eq!(payload.len(), PAYLOAD.len(), "seed {seed}"),
            Err(error) => assert!(error.to_string().contains("key a"), "seed {seed}: {error}"),
        }
    }
}

// With servers that fail.

#[test]
fn nobody_there_is_an_error_after_a_few_attempts() {
    let pki = Pki::new();
    let kms = Kmip::new(&pki.config(free_port(), false)).unwrap();
    let started = Instant::now();
    let error = wrap(&kms).unwrap_err();
    assert!(matches!(error, KmsError::NotReached { .. }));
    assert_says(&error, Class::Unreachable, &["refused"]);
    assert!((Duration::from_millis(1200)..Duration::from_secs(5)).contains(&started.elapsed()));
}

#[test]
fn a_host_that_has_no_address_is_not_reached() {
    let pki = Pki::new();
    let kms = Kmip::new(&KmipConfig { address: "kms.invalid:5696".into(), ..pki.config(1, false) }).unwrap();
    let error = wrap(&kms).unwrap_err();
    assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
    assert!(error.to_string().contains("kmip:kms.invalid:5696"), "{error}");
}

#[test]
fn no_silence_and_no_slowness_outlasts_the_timeout() {
    let pki = Pki::new();
    let patience = Duration::from_millis(700);
    let in_time = |kms: &Kmip| {
        let started = Instant::now();
        let error = wrap(kms).unwrap_err();
        assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
        assert_says(&error, Class::Unreachable, &["in time"]);
        assert!(started.elapsed() < patience + Duration::from_millis(800), "{:?}", started.elapsed());
    };
    // Takes connections, and never says a word of TLS.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    in_time(
        &Kmip::new(&KmipConfig { timeout: patience, ..pki.config(mute.local_addr().unwrap().port(), false) }).unwrap(),
    );
    // The start of an answer, of which there seems to be always more.
    let drip = [&[0x42, 0x00, 0x7B, 0x01, 0, 0, 0xFF, 0][..], &[0; 1000]].concat();
    for stuck in [DISCOVER_VERSIONS, LOCATE, GET_ATTRIBUTES, ENCRYPT, DECRYPT] {
        let silent = move |asked: &Asked<'_>| if asked.operation == stuck { Act::Hang } else { usable(asked) };
        in_time(&Peer::new(&pki, silent).impatient(patience));
        let drip = drip.clone();
        let slow =
            move |asked: &Asked<'_>| if asked.operation == stuck { Act::Drip(drip.clone()) } else { usable(asked) };
        in_time(&Peer::new(&pki, slow).impatient(patience));
    }
}

#[test]
fn what_is_no_kmip_is_not_understood() {
    let pki = Pki::new();
    // Not even TLS.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = plain.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for socket in plain.incoming() {
            let mut socket = socket.unwrap();
            let _ = socket.read(&mut [0; 512]);
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let error = wrap(&Kmip::new(&pki.config(port, false)).unwrap()).unwrap_err();
    assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
    assert_says(&error, Class::Unreachable, &["no TLS"]);

    let huge = [&[0x42, 0x00, 0x7B, 0x01][..], &0x4000_0000_u32.to_be_bytes()].concat();
    let just_too_long = [&[0x42, 0x00, 0x7B, 0x01][..], &u32::try_from(MAX_MESSAGE).unwrap().to_be_bytes()].concat();
    let empty = vec![0x42, 0x00, 0x7B, 0x01, 0, 0, 0, 0];
    let garbage = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    for (bytes, words) in [
        (huge, "1073741824 bytes"),
        (just_too_long, "more than"),
        (empty, "has no item"),
        (garbage, "no KMIP response"),
    ] {
        for broken in [DISCOVER_VERSIONS, LOCATE, ENCRYPT, DECRYPT] {
            let bytes = bytes.clone();
            let peer =
                Peer::new(
                    &pki,
                    move |asked| {
                        if asked.operation == broken { Act::Answer(bytes.clone()) } else { usable(asked) }
                    },
                );
            let error = wrap(&peer.kms(false)).unwrap_err();
            assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
            assert_says(&error, Class::Unreachable, &[words]);
            assert_eq!(peer.served(), 1, "what is not understood is not asked again");
        }
    }
}

#[test]
fn an_answer_that_ends_early_anywhere_is_an_error() {
    let pki = Pki::new();
    for broken in [DISCOVER_VERSIONS, ENCRYPT] {
        for left in (0..200).step_by(13) {
            // The connection ends within the answer.
            let peer = Peer::new(&pki, move |asked| match usable(asked) {
                Act::Answer(answer) if asked.operation == broken => {
                    Act::Cut(answer[..left.min(answer.len() - 1)].to_vec())
                }
                act => act,
            });
            assert_says(&wrap(&peer.kms(false)).unwrap_err(), Class::Unreachable, &["ended the connection"]);
            // The answer says that it is as short as it is.
            let peer = Peer::new(&pki, move |asked| match usable(asked) {
                Act::Answer(mut answer) if asked.operation == broken => {
                    let left = left.min(answer.len() - 9);
                    answer.truncate(8 + left);
                    answer[4..8].copy_from_slice(&u32::try_from(left).unwrap().to_be_bytes());
                    Act::Answer(answer)
                }
                act => act,
            });
            let error = wrap(&peer.kms(false)).unwrap_err();
            assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
        }
    }
}

#[test]
fn only_the_server_that_the_ca_vouches_for_is_talked_to() {
    let pki = Pki::new();
    let peer = |identity: &str, clients| Peer::start(&pki, identity, clients, None, |_| panic!("a request was sent"));
    for (identity, clients, words) in [
        ("elsewhere", Clients::Known, "vouches"),
        ("server", Clients::Unasked, "does not ask for a client certificate"),
    ] {
        let error = wrap(&peer(identity, clients).kms(false)).unwrap_err();
        assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
        assert_says(&error, Class::Unreachable, &[words]);
    }
    let stranger = Pki::new();
    let server = Peer::start(&stranger, "server", Clients::Known, None, |_| panic!("a request was sent"));
    let kms = Kmip::new(&KmipConfig { address: server.address(), ..pki.config(1, false) }).unwrap();
    let error = wrap(&kms).unwrap_err();
    assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
    assert_says(&error, Class::Unreachable, &["vouches", "UnknownIssuer"]);

    let error = wrap(&peer("server", Clients::Refused).kms(false)).unwrap_err();
    assert!(matches!(error, KmsError::Denied { .. }), "{error}");
    assert_says(&error, Class::Unreachable, &["does not accept the client certificate"]);
}

#[test]
fn keys_that_do_not_fit_are_refused_before_anything_is_encrypted() {
    let pki = Pki::new();
    for (key, words) in [
        (Key { object_type: 7, ..Key::FIT }, "no symmetric key"),
        (Key { algorithm: 2, ..Key::FIT }, "no AES key"),
        (Key { length: 128, ..Key::FIT }, "256 bits"),
        (Key { usage: 4, ..Key::FIT }, "usage mask"),
        (Key { usage: 8, ..Key::FIT }, "usage mask"),
        (Key { state: Some(1), ..Key::FIT }, "not active yet"),
        (Key { state: Some(3), ..Key::FIT }, "revoked"),
        (Key { state: Some(4), ..Key::FIT }, "compromised"),
        (Key { state: Some(9), ..Key::FIT }, "does not say"),
        (Key { state: None, ..Key::FIT }, "does not say"),
    ] {
        let peer = Peer::new(&pki, move |asked| match asked.operation {
            GET_ATTRIBUTES => Act::Answer(key.answer(asked)),
            ENCRYPT | DECRYPT | GET => panic!("it was used"),
            _ => usable(asked),
        });
        let error = wrap(&peer.kms(true)).unwrap_err();
        assert!(matches!(error, KmsError::UnfitKey { .. }), "{error}");
        assert_says(&error, Class::Failed, &[words]);
    }
    // One that is destroyed, or that has another name than the one asked for, is none.
    for key in [Key { state: Some(5), ..Key::FIT }, Key { state: Some(6), ..Key::FIT }, Key { name: "A", ..Key::FIT }] {
        let peer = Peer::new(&pki, move |asked| match asked.operation {
            GET_ATTRIBUTES => Act::Answer(key.answer(asked)),
            _ => usable(asked),
        });
        assert!(wrap(&peer.kms(true)).unwrap_err().is_key_missing());
    }
}

#[test]
fn each_refusal_says_what_to_do_and_nothing_that_was_sent() {
    let pki = Pki::new();
    let words = "can't, about \u{1b}[2J what you sent";
    for (operation, reason, class, variant) in [
        (DISCOVER_VERSIONS, 0x03, Class::Unreachable, "Denied"),
        (LOCATE, 0x0C, Class::Unreachable, "Denied"),
        (LOCATE, 0x39, Class::Unreachable, "Denied"),
        (LOCATE, 0x100, Class::Unreachable, "NotReached"),
        (LOCATE, 0x777, Class::Unreachable, "Denied"),
        (ENCRYPT, 0x0C, Class::Unreachable, "Denied"),
        (ENCRYPT, 0x01, Class::Unreachable, "NoSuchKey"),
        (ENCRYPT, 0x36, Class::Unreachable, "NoSuchKey"),
        (ENCRYPT, 0x43, Class::Failed, "UnfitKey"),
        (ENCRYPT, 0x29, Class::Failed, "UnfitKey"),
        (ENCRYPT, 0x05, Class::Failed, "UnfitKey"),
        (ENCRYPT, 0x2A, Class::Unreachable, "NotReached"),
        (DECRYPT, 0x0A, Class::Unreachable, "BadAnswer"),
        (DECRYPT, 0x100, Class::Unreachable, "NotReached"),
    ] {
        let peer = Peer::new(&pki, move |asked| {
            if asked.operation == operation {
                Act::Answer(answer::refused(asked, reason, words))
            } else {
                usable(asked)
            }
        });
        let error = wrap(&peer.kms(false)).unwrap_err();
        assert_says(&error, class, &[]);
        assert!(format!("{error:?}").starts_with(variant), "{error:?}");
        let text = error.to_string();
        assert!(!text.contains('\u{1b}'), "{text}");
        let secret = matches!(operation, ENCRYPT | DECRYPT);
        assert!(!(secret && text.contains("you sent")), "{text}");
    }
}

#[test]
fn a_server_that_fails_to_decrypt_anything_is_not_blamed_on_the_record() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let wrapped = wrap(&server.kms()).unwrap();
    let failing = Peer::before(&pki, server.port(), |asked| match asked.operation {
        DECRYPT => Act::Answer(answer::refused(asked, 0x100, "")),
        _ => Act::Forward,
    });
    let error = unwrap(&failing.kms(false), &wrapped).unwrap_err();
    assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
    assert_says(&error, Class::Unreachable, &["General Failure"]);
}

#[test]
fn what_does_not_open_again_is_not_handed_out() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let first = AtomicBool::new(true);
    let peer = Peer::before(&pki, server.port(), move |asked| match asked.operation {
        // The last byte of the tag.
        ENCRYPT if first.swap(false, Ordering::SeqCst) => {
            Act::Alter(Box::new(|answer| *answer.last_mut().unwrap() ^= 1))
        }
        _ => Act::Forward,
    });
    let error = wrap(&peer.kms(false)).unwrap_err();
    assert_says(&error, Class::Unreachable, &["does not open what it just sealed"]);
}

#[test]
fn an_encryption_without_tag_or_iv_is_none() {
    let pki = Pki::new();
    for (iv, tag) in
        [(None, Some(16)), (Some(12), None), (Some(12), Some(12)), (Some(0), Some(16)), (Some(65), Some(16))]
    {
        let peer = Peer::new(&pki, move |asked| match asked.operation {
            ENCRYPT => Act::Answer(answer::done(asked, |w| {
                w.text(tags::UNIQUE_IDENTIFIER, "1");
                w.bytes(tags::DATA, asked.payload.bytes(tags::DATA).unwrap());
                if let Some(len) = iv {
                    w.bytes(tags::IV_COUNTER_NONCE, &vec![7; len]);
                }
                if let Some(len) = tag {
                    w.bytes(tags::AUTHENTICATED_ENCRYPTION_TAG, &vec![7; len]);
                }
            })),
            _ => usable(asked),
        });
        let error = wrap(&peer.kms(true)).unwrap_err();
        assert!(matches!(error, KmsError::BadAnswer { .. }), "{iv:?} {tag:?}: {error}");
    }
}

#[test]
fn parameters_are_always_sent_and_the_record_is_never_longer_than_allowed() {
    let pki = Pki::new();
    let peer = Peer::new(&pki, |asked| {
        if let ENCRYPT | DECRYPT = asked.operation {
            let parameters = asked.payload.structure(tags::CRYPTOGRAPHIC_PARAMETERS).unwrap();
            assert_eq!(parameters.enumeration(tags::BLOCK_CIPHER_MODE), Ok(tags::GCM));
            assert_eq!(parameters.enumeration(tags::CRYPTOGRAPHIC_ALGORITHM), Ok(tags::AES));
            assert_eq!(parameters.integer(tags::TAG_LENGTH), Ok(16));
            let additional = asked.payload.bytes(tags::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA).unwrap();
            assert!(additional.ends_with(CONTEXT));
        }
        usable(asked)
    });
    let wrapped = wrap(&peer.kms(false)).unwrap();
    assert!(wrapped.len() < MAX_WRAPPED);
    assert_eq!(unwrap(&peer.kms(false), &wrapped).unwrap(), PAYLOAD);
}

#[test]
fn a_key_that_another_made_at_the_same_time_is_left_alone_and_ours_is_withdrawn() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    let port = server.port();
    let theirs = Arc::new(Mutex::new(Vec::new()));
    let script = Arc::clone(&theirs);
    let rival = Mutex::new(Some(server.kms()));
    let peer = Peer::before(&pki, port, move |asked| {
        // Between our look and our Create, somebody makes one.
        if asked.operation == CREATE
            && let Some(rival) = rival.lock().unwrap().take()
        {
            rival.create("a").unwrap();
            script.lock().unwrap().push(rival.wrap("a", CONTEXT, PAYLOAD).unwrap());
        }
        Act::Forward
    });
    assert!(peer.kms(false).create("a").unwrap_err().is_key_taken());
    let wrapped = theirs.lock().unwrap().pop().unwrap();
    assert_eq!(unwrap(&server.kms(), &wrapped).unwrap(), PAYLOAD);
}

#[test]
fn a_key_that_can_not_be_activated_is_withdrawn() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    let peer = Peer::before(&pki, server.port(), |asked| match asked.operation {
        answer::ACTIVATE => Act::Answer(answer::refused(asked, 0x0C, "no")),
        _ => Act::Forward,
    });
    assert!(matches!(peer.kms(false).create("a"), Err(KmsError::Denied { .. })));
    assert!(wrap(&server.kms()).unwrap_err().is_key_missing());
    server.kms().create("a").unwrap();
}

#[test]
fn a_server_that_only_says_that_it_destroyed_a_key_is_not_believed() {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    server.kms().create("a").unwrap();
    let peer = Peer::before(&pki, server.port(), |asked| match asked.operation {
        DESTROY => Act::Answer(answer::ids(asked, &[asked.id()])),
        _ => Act::Forward,
    });
    assert_says(&peer.kms(false).destroy("a").unwrap_err(), Class::Unreachable, &["still has it"]);
}

#[test]
fn a_server_that_finds_too_much_is_not_followed() {
    let pki = Pki::new();
    let peer = Peer::new(&pki, |asked| match asked.operation {
        LOCATE => Act::Answer(answer::ids(asked, &["1"; 17])),
        _ => usable(asked),
    });
    assert_says(&wrap(&peer.kms(false)).unwrap_err(), Class::Unreachable, &["more than 16"]);
}

// Files.

#[test]
fn bad_files_and_addresses_are_named_at_once() {
    let pki = Pki::new();
    let file = |name: &str, text: &str| {
        let path = pki.folder().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let empty = file("empty", "");
    let broken = file("broken", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0!\n-----END PRIVATE KEY-----\n");
    let no_key = file("no-key", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n");
    let missing = PathBuf::from("/nonexistent/file");
    let good = pki.config(5696, false);
    for (config, path, words) in [
        (KmipConfig { ca: missing.clone(), ..good.clone() }, "/nonexistent/file", "is not there"),
        (KmipConfig { ca: empty.clone(), ..good.clone() }, "empty", "no certificate"),
        (KmipConfig { cert: empty, ..good.clone() }, "empty", "no certificate"),
        (KmipConfig { key: missing, ..good.clone() }, "/nonexistent/file", "is not there"),
        (KmipConfig { key: broken, ..good.clone() }, "broken", "no private key"),
        (KmipConfig { key: no_key, ..good.clone() }, "no-key", "of a kind"),
        (KmipConfig { key: pki.key("somebody"), ..good.clone() }, "somebody.key", "does not belong"),
        (KmipConfig { address: "kms.example.com".into(), ..good.clone() }, "kms.example.com", "HOST:PORT"),
    ] {
        let error = Kmip::new(&config).unwrap_err();
        assert_eq!(error.class(), Class::Usage, "{error}");
        let text = error.to_string();
        assert!(text.contains(path) && text.contains(words), "{text}");
        assert!(!text.contains("c2VjcmV0"), "{text}");
    }
    fs::set_permissions(pki.key("reseal"), fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(Kmip::new(&good), Err(KmsError::Exposed { .. })));
}

#[test]
fn a_renewed_certificate_is_used_at_once() {
    let pki = Pki::new();
    let peer = Peer::new(&pki, usable);
    let kms = peer.kms(false);
    wrap(&kms).unwrap();
    // Another CA's: refused.
    let stranger = Pki::new();
    let (cert, key) = (fs::read(pki.cert("reseal")).unwrap(), fs::read(pki.key("reseal")).unwrap());
    fs::copy(stranger.cert("reseal"), pki.cert("reseal")).unwrap();
    fs::copy(stranger.key("reseal"), pki.key("reseal")).unwrap();
    assert!(matches!(wrap(&kms), Err(KmsError::Denied { .. })));
    fs::write(pki.cert("reseal"), cert).unwrap();
    fs::write(pki.key("reseal"), key).unwrap();
    wrap(&kms).unwrap();
}

// What tests need.

/// Answers as a server of KMIP 2.0 does that has one key, named `a`. It encrypts by changing nothing.
fn usable(asked: &Asked<'_>) -> Act {
    Act::Answer(match asked.operation {
        DISCOVER_VERSIONS => answer::versions(asked, &[(9, 9), (2, 0), (1, 4)]),
        LOCATE => answer::ids(asked, &["1"]),
        GET_ATTRIBUTES => Key::FIT.answer(asked),
        ENCRYPT => answer::done(asked, |w| {
            w.text(tags::UNIQUE_IDENTIFIER, "1");
            w.bytes(tags::DATA, asked.payload.bytes(tags::DATA).unwrap());
            w.bytes(tags::IV_COUNTER_NONCE, &[7; 12]);
            w.bytes(tags::AUTHENTICATED_ENCRYPTION_TAG, &[7; 16]);
        }),
        DECRYPT => answer::done(asked, |w| {
            w.text(tags::UNIQUE_IDENTIFIER, "1");
            w.bytes(tags::DATA, asked.payload.bytes(tags::DATA).unwrap());
        }),
        _ => answer::refused(asked, 5, ""),
    })
}

/// Makes a key behind the adapter's back.
fn create(pki: &Pki, server: &PyKmip, name: &str) -> String {
    let request = Request::Create { name };
    let bytes = ask(pki, "reseal", server.port(), &request.encode(Version::V2_0));
    response::created(Response::parse(&bytes, &request).unwrap().result.unwrap()).unwrap()
}

/// The identifier of the key of a name, as another client of the same owner sees it.
fn locate(pki: &Pki, server: &PyKmip, name: &str) -> String {
    let request = Request::Locate { name };
    let bytes = ask(pki, "reseal", server.port(), &request.encode(Version::V2_0));
    response::located(Response::parse(&bytes, &request).unwrap().result.unwrap()).unwrap().remove(0)
}

/// Has the server do something behind the adapter's back.
fn demand(pki: &Pki, server: &PyKmip, request: &Request<'_>) {
    let bytes = ask(pki, "reseal", server.port(), &request.encode(Version::V2_0));
    Response::parse(&bytes, request).unwrap().result.unwrap();
}

/// Revokes a key as compromised, which the adapter itself never does.
fn compromise(pki: &Pki, server: &PyKmip, id: &str) {
    let revoke = Request::Revoke { id };
    let mut w = Writer::new();
    w.structure(tags::REQUEST_MESSAGE, |w| {
        w.structure(tags::REQUEST_HEADER, |w| {
            w.structure(tags::PROTOCOL_VERSION, |w| {
                w.integer(tags::PROTOCOL_VERSION_MAJOR, 2);
                w.integer(tags::PROTOCOL_VERSION_MINOR, 0);
            });
            w.integer(tags::BATCH_COUNT, 1);
        });
        w.structure(tags::BATCH_ITEM, |w| {
            w.enumeration(tags::OPERATION, revoke.operation());
            w.structure(tags::REQUEST_PAYLOAD, |w| {
                w.text(tags::UNIQUE_IDENTIFIER, id);
                w.structure(tags::REVOCATION_REASON, |w| w.enumeration(tags::REVOCATION_REASON_CODE, 2));
            });
        });
    });
    let bytes = ask(pki, "reseal", server.port(), &w.finish());
    Response::parse(&bytes, &revoke).unwrap().result.unwrap();
}
