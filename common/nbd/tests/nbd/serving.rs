//! The server with clients that mean well: our own, and those that everybody uses.

use std::net::{TcpListener, TcpStream};
use std::process::Command as Process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use reseal_nbd::server::{Connection, DiskError, Limits, ServerTls, Service, StartTls};
use reseal_nbd::{Export, NbdError, NbdUri, Options, Refusal};
use reseal_proto::nbd::*;

use crate::reading::{extents, read_all};
use crate::served::{Answer, BLOCK, Heard, Model, One, SINCE, Served, Talker, errno, wait_until};
use crate::server::run;
use crate::tls::Fixture;

/// All of the model, as what a program prints or writes.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Process::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn our_own_client_reads_what_the_disk_holds_and_no_holes() {
    let served = Served::new(Model::new());
    let export = Export::open(&served.place.uri("model"), &Options::default(), None).unwrap();
    assert!(export.has_allocation() && export.connections() > 1, "several connections are allowed");
    let whole = read_all(&export, 100_000, |_| {}).unwrap();
    assert!(whole.bytes == served.model.bytes);
    assert!(whole.read < served.model.bytes.len() as u64 * 3 / 4, "{} bytes were read", whole.read);
    let found: u64 = extents(&export, 5, 4 << 20).map(|all| all.iter().map(|extent| extent.length).sum()).unwrap_or(0);
    assert_eq!(found, 0, "past the end");
    assert!(served.heard.sent.load(Ordering::Relaxed) >= whole.read);
    assert!(served.heard.failed.lock().is_empty());
}

#[test]
fn the_tools_of_qemu_and_libnbd_read_it() {
    let served = Served::new(Model::new());
    let place = &served.place;
    std::fs::write(place.path("disk"), &served.model.bytes).unwrap();
    let (uri, disk, copy) = (place.uri("model").to_string(), place.path("disk"), place.path("copy"));
    let (disk, copy) = (disk.to_str().unwrap(), copy.to_str().unwrap());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", disk, &uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", &uri, copy]);
    // It rounds up to whole sectors.
    assert!(std::fs::read(copy).unwrap()[..served.model.bytes.len()] == served.model.bytes);
    let _ = std::fs::remove_file(copy);
    run("nbdcopy", &["--connections=4", "--requests=64", &uri, copy]);
    assert!(std::fs::read(copy).unwrap() == served.model.bytes);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 819200 819200", &uri]);
    let map = output("nbdinfo", &["--map", &uri]);
    assert_eq!(map.lines().filter(|line| line.contains("hole,zero")).count(), 2, "{map}");
    let list = output("nbdinfo", &["--list", &place.uri("").to_string()]);
    assert!(list.contains("export=\"model\"") && list.contains("a disk in memory"), "{list}");
    assert!(list.contains("can_multi_conn: true") && list.contains("is_read_only: true"), "{list}");
    let can = output("nbdinfo", &["--size", &uri]);
    assert_eq!(can.trim(), served.model.bytes.len().to_string());
}

#[test]
fn tls_is_offered_demanded_or_not_there() {
    for (client_ca, demanded) in [(false, false), (true, true)] {
        let fixture = Fixture::new("localhost");
        let ca = fixture.place.path("ca.pem");
        let (cert, key) = (fixture.place.path("pki/server-cert.pem"), fixture.place.path("pki/server-key.pem"));
        let tls = ServerTls { cert: &cert, key: &key, client_ca: client_ca.then_some(&*ca) }.config().unwrap();
        let tls = if demanded { StartTls::Demanded(tls) } else { StartTls::Offered(tls) };
        let options = if client_ca { fixture.with_certificate() } else { fixture.options() };
        let uri = fixture.uri("");
        let served = Served::with(fixture.place, Model::new(), tls, Limits::default());
        let export = Export::open(&uri, &options, None).unwrap();
        assert!(read_all(&export, 1 << 20, |_| {}).unwrap().bytes == served.model.bytes);
        let clear = Export::open(&served.place.uri(""), &options, None);
        match clear {
            Ok(_) => assert!(!demanded, "it was opened in the clear"),
            Err(e) => {
                assert!(demanded, "{e}");
                assert!(matches!(e, NbdError::Refused { refusal: Refusal::TlsRequired { .. }, .. }), "{e}");
            }
        }
        let mut stranger = options.clone();
        (stranger.tls.cert, stranger.tls.key) = (None, None);
        assert_eq!(Export::open(&uri, &stranger, None).is_err(), client_ca, "without a certificate");
    }
    let served = Served::new(Model::new());
    let fixture = Fixture::new("localhost");
    let uri: NbdUri = format!("nbds+unix:///?socket={}", served.place.socket().display()).parse().unwrap();
    let error = Export::open(&uri, &fixture.options(), None).map(drop).unwrap_err();
    assert!(matches!(error, NbdError::Refused { refusal: Refusal::NoTls { .. }, .. }), "{error}");
}

#[test]
fn a_connection_whose_tls_is_there_already_is_served() {
    let fixture = Fixture::new("localhost");
    let (cert, key) = (fixture.place.path("pki/server-cert.pem"), fixture.place.path("pki/server-key.pem"));
    let config = ServerTls { cert: &cert, key: &key, client_ca: None }.config().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let model = Arc::new(Model::new());
    let service = Service {
        exports: Arc::new(One(model.clone())),
        owner: Arc::new(Heard::default()),
        tls: StartTls::Never,
        limits: Limits::default(),
    };
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut tls = rustls::ServerConnection::new(config).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).unwrap();
        }
        Connection::tls(stream, tls).unwrap().serve(&service)
    });
    let stream = TcpStream::connect(address).unwrap();
    let mut talker = Talker(fixture.client(stream));
    talker.greet(true);
    // There is no TLS inside of TLS.
    let replies = talker.ask(&OptionRequest::StartTls);
    assert!(matches!(replies[..], [OptionReply::Error { error: OptionError::Invalid, .. }]), "{replies:?}");
    talker.go("model", true);
    // More than one record, and than the socket's buffers.
    let length = 1_500_000;
    match talker.request(Command::Read, CommandFlags::DF, 3, length) {
        Answer::Chunk(7, ChunkKind::Data, payload) => assert!(payload[8..] == model.bytes[3..3 + length as usize]),
        other => panic!("{:?}", errno(&other)),
    }
    talker.send(Command::Disconnect, CommandFlags::NONE, 8, 0, 0);
    assert!(talker.is_over());
    server.join().unwrap().unwrap();
}

#[test]
fn many_requests_are_under_way_and_replies_come_in_any_order() {
    let (release, released) = bounded::<()>(0);
    let served = Served::new(Model::with(move |offset, _| {
        if offset == 0 {
            let _ = released.recv();
        }
        Ok(())
    }));
    let mut talker = served.open(true);
    talker.send(Command::Read, CommandFlags::NONE, 1, 0, 512);
    for cookie in 2..100 {
        talker.send(Command::Read, CommandFlags::NONE, cookie, cookie * 512, 512);
    }
    let mut seen: Vec<u64> = (2..100).map(|_| cookie(&talker.answer())).collect();
    seen.sort_unstable();
    assert_eq!(seen, (2..100).collect::<Vec<_>>(), "a request that waits holds up no other");
    drop(release);
    assert_eq!(cookie(&talker.answer()), 1);
}

#[test]
fn a_client_that_waits_for_replies_is_answered_at_once_and_still_no_request_holds_up_another() {
    const SLOW: u64 = 100 << 10;
    let (release, released) = bounded::<()>(0);
    let model = Model::with(move |offset, _| match offset {
        SLOW => {
            let _ = released.recv();
            Ok(())
        }
        512 => Err(DiskError::io("pack 17 is damaged")),
        _ => Ok(()),
    });
    let served = Served::new(Model { waits_from: SLOW, ..model });
    for structured in [true, false] {
        let mut talker = served.open(structured);
        let before = served.model.at_once.load(Ordering::Relaxed);
        for nth in 0..200u64 {
            let at = usize::try_from(nth * 100 + 1000).unwrap();
            match talker.request(Command::Read, CommandFlags::NONE, nth * 100 + 1000, 700) {
                Answer::Chunk(7, ChunkKind::Data, payload) => assert!(payload[8..] == served.model.bytes[at..at + 700]),
                Answer::Simple(7, Errno::NONE) => assert!(talker.hear_of(700) == served.model.bytes[at..at + 700]),
                other => panic!("{other:?}"),
            }
        }
        let at_once = served.model.at_once.load(Ordering::Relaxed) - before;
        // How many depends on what else the machine does.
        assert!(at_once > 0, "{at_once} of 200");
        assert_eq!(errno(&talker.request(Command::Read, CommandFlags::NONE, 512, 700)), Errno::IO);
        assert_eq!(errno(&talker.request(Command::Read, CommandFlags::NONE, u64::MAX, 700)), Errno::INVAL);
        assert_eq!(errno(&talker.request(Command::Flush, CommandFlags::NONE, 0, 0)), Errno::NONE);
    }
    let mut talker = served.open(true);
    (0..50).for_each(|_| drop(talker.request(Command::Read, CommandFlags::NONE, 0, 512)));
    talker.send(Command::Read, CommandFlags::NONE, 1, SLOW, 512);
    for nth in 2..50 {
        talker.send(Command::Read, CommandFlags::NONE, nth, nth * 600, 512);
        assert_eq!(cookie(&talker.answer()), nth, "one that waits holds up no other");
    }
    drop(release);
    assert_eq!(cookie(&talker.answer()), 1);
}

fn cookie(answer: &Answer) -> u64 {
    match answer {
        Answer::Simple(cookie, _) | Answer::Chunk(cookie, ..) => *cookie,
    }
}

#[test]
fn a_client_from_before_structured_replies_is_served() {
    let served = Served::new(Model::new());
    let mut talker = served.connect();
    talker.greet(false);
    talker.say(&OptionRequest::ExportName("model".into()).encode());
    let opened = talker.hear::<{ 10 + 124 }>();
    assert_eq!(opened[..8], (served.model.bytes.len() as u64).to_be_bytes());
    let flags = ExportFlags(u16::from_be_bytes([opened[8], opened[9]]));
    assert!(flags.contains(ExportFlags::READ_ONLY) && !flags.contains(ExportFlags::SEND_DF));
    assert_eq!(talker.request(Command::Read, CommandFlags::NONE, 100, 5000), Answer::Simple(7, Errno::NONE));
    assert!(talker.hear_of(5000) == served.model.bytes[100..5100]);
    // There is no chunk to keep whole.
    assert_eq!(talker.request(Command::Read, CommandFlags::DF, 100, 5000), Answer::Simple(7, Errno::INVAL));
    talker.send(Command::Disconnect, CommandFlags::NONE, 8, 0, 0);
    served.end().unwrap();
}

#[test]
fn holes_are_told_and_not_sent() {
    let served = Served::new(Model::new());
    let mut talker = served.open(true);
    let hole = Hole { offset: 819_200, length: 800_000 };
    let expected = Answer::Chunk(7, ChunkKind::Hole, hole.encode().to_vec());
    assert!(talker.request(Command::Read, CommandFlags::DF, 819_200, 800_000) == expected);
    assert!(served.heard.sent.load(Ordering::Relaxed) < 1000);
    let all = talker.request(Command::BlockStatus, CommandFlags::NONE, 0, 2_000_000);
    let Answer::Chunk(7, ChunkKind::BlockStatus, payload) = all else { panic!("{all:?}") };
    let zero = state::HOLE | state::ZERO;
    let of = |length, flags| Descriptor { length, flags };
    let expected = [of(40_960, 0), of(4096, zero), of(774_144, 0), of(819_200, zero), of(361_600, 0)];
    assert_eq!(BlockStatus::decode(&payload).unwrap().descriptors, expected);
    let one = talker.request(Command::BlockStatus, CommandFlags::REQ_ONE, 1_000_000, 1000);
    let Answer::Chunk(7, ChunkKind::BlockStatus, payload) = one else { panic!("{one:?}") };
    assert_eq!(BlockStatus::decode(&payload).unwrap().descriptors, [of(1000, zero)]);
}

#[test]
fn what_changed_since_a_restore_point_is_told_beside_the_holes_to_those_who_ask() {
    let served = Served::new(Model { is_written: true, ..Model::new() });
    let export = Export::open_asking_since(&served.place.uri("model"), &Options::default()).unwrap();
    assert_eq!((export.changed_since(), export.tells_changes()), (Some(SINCE), true));
    let (mut at, length) = (0, export.length());
    for extent in extents(&export, 0, length).unwrap() {
        for block in at / BLOCK as u64..(at + extent.length).div_ceil(BLOCK as u64) {
            assert_eq!(extent.dirty, block % 2 == 1, "block {block}");
            let is_hole = block == 10 || (200..400).contains(&block);
            assert_eq!(extent.zero, is_hole, "block {block}");
        }
        at += extent.length;
    }
    assert_eq!(at, length);
    // Other clients know it by its name, and those that don't ask see all as it was.
    let name = format!("{CHANGED_SINCE}{SINCE}");
    let map = output("nbdinfo", &[&format!("--map={name}"), &served.place.uri("model").to_string()]);
    assert_eq!(map.lines().count(), 601, "{map}");
    let plain = Export::open(&served.place.uri("model"), &Options::default(), None).unwrap();
    assert_eq!((plain.changed_since(), plain.tells_changes()), (None, false));
    // A server that knows of no changes is one as any.
    let other = Served::new(Model::new());
    let export = Export::open_asking_since(&other.place.uri("model"), &Options::default()).unwrap();
    assert_eq!((export.changed_since(), export.tells_changes(), export.has_allocation()), (None, false, true));
}

#[test]
fn what_cannot_be_read_is_an_error_with_a_reason_for_the_owner_only() {
    let served = Served::new(Model::with(|offset, _| match offset {
        4096 => Err(DiskError::io("pack 17 is damaged")),
        _ => Ok(()),
    }));
    for structured in [true, false] {
        let mut talker = served.open(structured);
        let answer = talker.request(Command::Read, CommandFlags::NONE, 4096, 5000);
        assert_eq!(errno(&answer), Errno::IO);
        if let Answer::Chunk(_, _, payload) = answer {
            assert_eq!(payload.len(), 6, "neither text nor bytes");
        }
        // The connection goes on.
        assert_eq!(errno(&talker.request(Command::Flush, CommandFlags::NONE, 0, 0)), Errno::NONE);
    }
    let said = served.heard.failed.lock().clone();
    assert_eq!(said, ["can't read bytes 4096 to 9096 of model: pack 17 is damaged"; 2]);
}

#[test]
fn reads_under_way_stay_within_their_bytes() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (reading, peak) = (now.clone(), most.clone());
    let model = Model {
        bytes: vec![1; 33 << 20],
        ..Model::with(move |_, length| {
            let under_way = reading.fetch_add(length, Ordering::SeqCst) + length;
            peak.fetch_max(under_way, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            reading.fetch_sub(length, Ordering::SeqCst);
            Ok(())
        })
    };
    let limits = Limits { threads: 16, in_flight: 1, ..Limits::default() };
    let served = Served::with(crate::server::Place::new(), model, StartTls::Never, limits);
    let mut talker = served.open(false);
    for cookie in 0..16 {
        talker.send(Command::Read, CommandFlags::NONE, cookie, 0, 12 << 20);
    }
    for _ in 0..16 {
        let Answer::Simple(_, Errno::NONE) = talker.answer() else { panic!("an error") };
        talker.hear_of(12 << 20);
    }
    let most = most.load(Ordering::SeqCst);
    assert!((12 << 20..=32 << 20).contains(&most), "{most} bytes at once");
    wait_until("all are done", || now.load(Ordering::SeqCst) == 0);
}
