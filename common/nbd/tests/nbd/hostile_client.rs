//! Clients that lie, flood, stall or vanish: each ends its own connection at most, and takes nothing from others.

use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reseal_nbd::server::{Limits, MAX_READ, ServeError, StartTls};
use reseal_nbd::{Export, Options};
use reseal_proto::nbd::serve::MAX_OPTIONS;
use reseal_proto::nbd::*;

use crate::reading::read_all;
use crate::served::{Answer, Model, Served, errno};
use crate::server::Place;

fn impatient() -> Limits {
    Limits { patience: Duration::from_secs(1), handshake: Duration::from_secs(1), threads: 3, ..Limits::default() }
}

fn served(model: Model) -> Served {
    Served::with(Place::new(), model, StartTls::Never, impatient())
}

/// Others are served while, and after, one does whatever it did.
fn others_are_served(served: &Served) {
    let export = Export::open(&served.place.uri("model"), &Options::default(), None).unwrap();
    assert!(read_all(&export, 1 << 20, |_| {}).unwrap().bytes == served.model.bytes);
}

#[test]
fn requests_that_make_no_sense_are_refused_one_by_one() {
    let served = Served::new(Model::new());
    let size = served.model.bytes.len() as u64;
    let none = CommandFlags::NONE;
    for structured in [true, false] {
        let mut talker = served.open(structured);
        for (command, flags, offset, length, expected) in [
            (Command::Read, none, size, 1, Errno::INVAL),
            (Command::Read, none, size - 1, 2, Errno::INVAL),
            (Command::Read, none, u64::MAX, u32::MAX, Errno::INVAL),
            (Command::Read, none, 0, MAX_READ + 1, Errno::INVAL),
            (Command::Read, CommandFlags::FUA, 0, 1, Errno::INVAL),
            (Command::Read, CommandFlags(1 << 15), 0, 1, Errno::INVAL),
            (Command::BlockStatus, none, 0, 0, Errno::INVAL),
            (Command::BlockStatus, none, size, 1, Errno::INVAL),
            (Command::BlockStatus, none, u64::MAX, 2, Errno::INVAL),
            (Command::Cache, none, size, 1, Errno::INVAL),
            (Command::Trim, none, 0, 4096, Errno::PERM),
            (Command::WriteZeroes, none, 0, 4096, Errno::PERM),
            (Command::Other(77), none, 0, 0, Errno::INVAL),
            (Command::Read, none, size, 0, Errno::NONE),
            (Command::Cache, none, 0, 4096, Errno::NONE),
            (Command::Flush, none, 0, 0, Errno::NONE),
        ] {
            let answer = talker.request(command, flags, offset, length);
            assert_eq!(errno(&answer), expected, "{command:?} {offset} {length} {answer:?}");
        }
        // What a write carries is dropped, and does not pass for a request.
        talker.send(Command::Write, none, 9, 0, 100_000);
        talker.say(&[0x25; 100_000]);
        assert_eq!(talker.answer(), Answer::Simple(9, Errno::PERM));
        if !structured {
            assert_eq!(errno(&talker.request(Command::BlockStatus, none, 0, 1)), Errno::INVAL, "not negotiated");
        }
        talker.send(Command::Disconnect, none, 0, 0, 0);
        served.end().unwrap();
    }
    assert!(served.heard.failed.lock().is_empty(), "none of it is the owner's concern");
}

#[test]
fn what_no_protocol_says_ends_the_connection() {
    let served = served(Model::new());
    let mut talker = served.open(true);
    talker.say(&[0xff; REQUEST_LENGTH]);
    assert!(talker.is_over());
    assert!(matches!(served.end(), Err(ServeError::Violation(Violation::Magic { .. }))));
    let mut talker = served.open(true);
    talker.send(Command::Write, CommandFlags::NONE, 1, 0, u32::MAX);
    assert!(talker.is_over(), "four gigabytes are not waited for");
    assert!(matches!(served.end(), Err(ServeError::Violation(Violation::TooLong { .. }))));
    others_are_served(&served);
}

#[test]
fn a_client_that_vanishes_is_forgotten() {
    let served = served(Model::new());
    // Between two requests: that is as good as a word.
    drop(served.open(true));
    served.end().unwrap();
    // In the middle of a request, and of a write.
    let mut talker = served.open(true);
    talker.say(&[0x25, 0x60]);
    talker.0.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(served.end(), Err(ServeError::Gone)));
    let mut talker = served.open(true);
    talker.send(Command::Write, CommandFlags::NONE, 1, 0, 4096);
    talker.0.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(served.end(), Err(ServeError::Gone)));
    // With answers on their way.
    let mut talker = served.open(true);
    for cookie in 0..50 {
        talker.send(Command::Read, CommandFlags::NONE, cookie, 0, 800_000);
    }
    drop(talker);
    assert!(matches!(served.end(), Err(ServeError::Gone)));
    others_are_served(&served);
}

#[test]
fn a_client_that_ends_its_side_still_gets_its_answers() {
    let served = Served::new(Model::with(|_, _| {
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    }));
    let mut talker = served.open(true);
    talker.send(Command::Read, CommandFlags::NONE, 1, 0, 512);
    talker.send(Command::Read, CommandFlags::NONE, 2, 512, 512);
    talker.send(Command::Disconnect, CommandFlags::NONE, 3, 0, 0);
    for _ in 0..2 {
        assert!(matches!(talker.answer(), Answer::Chunk(1 | 2, ChunkKind::Data, _)));
    }
    assert!(talker.is_over());
    served.end().unwrap();
}

#[test]
fn a_client_that_takes_nothing_is_given_up() {
    let served = served(Model { bytes: vec![1; 16 << 20], ..Model::new() });
    let mut talker = served.open(true);
    let began = Instant::now();
    for cookie in 0..3 {
        talker.send(Command::Read, CommandFlags::NONE, cookie, 0, 16 << 20);
    }
    assert!(matches!(served.end(), Err(ServeError::Stalled(_))));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    others_are_served(&served);
}

#[test]
fn a_client_that_is_idle_may_stay() {
    let served = served(Model::new());
    let mut talker = served.open(true);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(errno(&talker.request(Command::Flush, CommandFlags::NONE, 0, 0)), Errno::NONE);
}

#[test]
fn a_client_that_opens_nothing_is_given_up() {
    let served = served(Model::new());
    let _silent = served.connect();
    assert!(matches!(served.end(), Err(ServeError::Slow)));
    // Nor does it help to say a byte now and then.
    let mut trickling = served.connect();
    let began = Instant::now();
    for _ in 0..8 {
        trickling.say(&[0]);
        std::thread::sleep(Duration::from_millis(250));
    }
    assert!(served.end().is_err());
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_flood_of_options_ends_the_connection() {
    let served = Served::new(Model::new());
    let mut talker = served.connect();
    talker.greet(true);
    for _ in 0..MAX_OPTIONS {
        let replies = talker.ask(&OptionRequest::Other(1234));
        assert!(matches!(replies[..], [OptionReply::Error { error: OptionError::Unsupported, .. }]));
    }
    talker.say(&OptionRequest::Other(1234).encode());
    assert!(talker.is_over());
    assert!(matches!(served.end(), Err(ServeError::Violation(Violation::TooManyOptions { .. }))));
    let mut talker = served.connect();
    talker.greet(true);
    let mut header = OptionRequest::List.encode();
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    talker.say(&header);
    assert!(talker.is_over());
    assert!(matches!(served.end(), Err(ServeError::Violation(Violation::TooLong { .. }))));
}

#[test]
fn exports_that_are_not_there_are_told_from_those_that_cannot_be_opened() {
    let served = Served::new(Model::new());
    let mut talker = served.connect();
    talker.greet(true);
    for (export, expected) in [
        ("nothing", OptionError::Unknown),
        ("secret", OptionError::Policy),
        ("broken", OptionError::Policy),
        ("late", OptionError::Shutdown),
    ] {
        for wanted in [OptionRequest::Info, OptionRequest::Go] {
            let replies = talker.ask(&wanted(InfoRequest { export: export.into(), wanted: vec![] }));
            let [OptionReply::Error { error, text }] = &replies[..] else { panic!("{replies:?}") };
            assert_eq!(*error, expected);
            assert!(!text.contains("the reason of the owner"));
        }
    }
    assert!(served.heard.failed.lock().iter().all(|said| said == "can't open broken: the reason of the owner"));
    assert_eq!(served.heard.failed.lock().len(), 2);
    talker.go("model", true);
}

#[test]
fn a_connection_is_stopped_whatever_it_does() {
    let served = Served::new(Model { bytes: vec![1; 16 << 20], ..Model::new() });
    let mut idle = served.open(true);
    served.stoppers.recv().unwrap().stop();
    served.end().unwrap();
    assert!(idle.is_over());
    // While the client takes nothing, and while it has said nothing.
    let mut stalled = served.open(true);
    stalled.send(Command::Read, CommandFlags::NONE, 1, 0, 16 << 20);
    std::thread::sleep(Duration::from_millis(100));
    served.stoppers.recv().unwrap().stop();
    served.end().unwrap();
    let _silent = served.connect();
    served.stoppers.recv().unwrap().stop();
    served.end().unwrap();
    assert_eq!(served.heard.sent.load(Ordering::Relaxed), 0);
}
