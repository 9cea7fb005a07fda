//! Real servers: qemu-nbd and nbdkit.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_cli::Status;
use reseal_nbd::{Export, Extent, NbdError, NbdUri, Options, Read, Request};
use zeroize::Zeroizing;

use crate::reading::{extents, impatient, read_all, with_pumps};
use crate::server::{Place, Server, run};

const MIB: u64 = 1 << 20;

/// A sparse disk of some MiB with data in a few places, and what is in it.
fn disk(path: &Path, length: u64) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(length).unwrap();
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    for (at, size) in [(0, 3 * MIB), (7 * MIB, 64 << 10), (length - 5000, 5000)] {
        let range = usize::try_from(at).unwrap()..usize::try_from(at + size).unwrap();
        let mut value = at + 1;
        for byte in &mut bytes[range.clone()] {
            value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = value.to_be_bytes()[0];
        }
        file.write_all_at(&bytes[range], at).unwrap();
    }
    bytes
}

#[test]
fn a_sparse_disk_is_read_without_its_holes() {
    let place = Place::new();
    let bytes = disk(&place.path("disk"), 32 * MIB);
    let _server = place.qemu_nbd("raw", &place.path("disk"), &["-e", "0", "-x", "a b"]);
    let export = Export::open(&place.uri("a b"), &Options::default(), None).unwrap();
    assert!(export.has_allocation());
    assert_eq!((export.length(), export.connections()), (32 * MIB, 4));
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    assert!(whole.bytes == bytes);
    assert!(whole.read < 4 * MIB, "{} bytes read", whole.read);
    assert_eq!(export.reconnected(), 0);
    // Once more over the connections that are there, in other units.
    let whole = read_all(&export, 64 << 10, |_| {}).unwrap();
    assert!(whole.bytes == bytes);
}

#[test]
fn over_tcp_too() {
    let place = Place::new();
    let bytes = disk(&place.path("disk"), 16 * MIB);
    let pid = place.path("pid");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut command = Command::new("qemu-nbd");
    command.args(["-r", "-t", "-f", "raw", "-e", "0", "-b", "127.0.0.1", "-p", &port, "--pid-file"]);
    let _server = Server::start(command.arg(&pid).arg(place.path("disk")), &pid);
    let uri: NbdUri = format!("nbd://127.0.0.1:{port}/").parse().unwrap();
    let export = Export::open(&uri, &Options::default(), None).unwrap();
    assert!(read_all(&export, MIB, |_| {}).unwrap().bytes == bytes);
}

#[test]
fn a_bitmap_tells_what_was_written_since() {
    let place = Place::new();
    let (raw, image) = (place.path("raw"), place.path("disk.qcow2"));
    let bytes = disk(&raw, 16 * MIB);
    let name = image.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), name]);
    run("qemu-img", &["bitmap", "--add", "-g", "64k", name, "b1"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x11 1M 128k", "-c", "write -z 2M 64k", name]);
    let _server = place.qemu_nbd("qcow2", &image, &["-e", "0", "-B", "b1"]);
    let export = Export::open(&place.uri(""), &Options::default(), Some("b1")).unwrap();
    let found = extents(&export, 0, export.length()).unwrap();
    let mut at = 0;
    let mut dirty = Vec::new();
    for extent in &found {
        if extent.dirty {
            dirty.push((at, extent.length, extent.zero));
        }
        at += extent.length;
    }
    assert_eq!(dirty, [(MIB, 128 << 10, false), (2 * MIB, 64 << 10, true)]);
    assert!(found.iter().any(|extent| !extent.dirty && extent.zero));
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    assert_eq!(whole.read, 128 << 10);
    assert!(whole.bytes[1 << 20..][..128 << 10].iter().all(|byte| *byte == 0x11));
    // Parts of it, from anywhere.
    let some = extents(&export, MIB + 1000, MIB + (200 << 10)).unwrap();
    assert_eq!(some[0], Extent { length: (128 << 10) - 1000, zero: false, dirty: true });
    assert!(!some[1].dirty);
    // Without asking for it, all counts as dirty.
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    let mut now = bytes;
    now[1 << 20..][..128 << 10].fill(0x11);
    now[2 << 20..][..64 << 10].fill(0);
    assert!(whole.bytes == now);
    // Another is not offered; this one is named.
    let error = refused(Export::open(&place.uri(""), &Options::default(), Some("b2")));
    assert_eq!(error.status(), Status::Usage);
    let error = error.to_string();
    assert!(error.contains("qemu:dirty-bitmap:b2") && error.contains("it offers qemu:dirty-bitmap:b1"), "{error}");
}

fn refused(result: Result<Export, NbdError>) -> NbdError {
    match result {
        Ok(_) => panic!("it was opened"),
        Err(e) => e,
    }
}

#[test]
fn an_export_or_server_that_is_not_there_is_said() {
    let place = Place::new();
    let error = refused(Export::open(&place.uri("x"), &impatient(), None));
    assert!(matches!(error, NbdError::Unreachable { .. }) && error.status() == Status::Unreachable, "{error}");
    assert!(error.to_string().contains("nbd.sock"), "{error}");
    disk(&place.path("disk"), 16 * MIB);
    let _server = place.qemu_nbd("raw", &place.path("disk"), &["-x", "right"]);
    let error = refused(Export::open(&place.uri("wrong"), &Options::default(), None));
    assert!(matches!(error, NbdError::Refused { .. }) && error.status() == Status::Usage, "{error}");
}

#[test]
fn block_sizes_are_kept_to() {
    let place = Place::new();
    let arguments = ["blocksize-minimum=4096", "blocksize-preferred=64k", "blocksize-maximum=64k"];
    let mut command = vec!["--filter=blocksize-policy", "data", "data=@0x100000 (1 2 3 4)*131072 @0x300000 9*4096"];
    command.extend(arguments);
    command.push("blocksize-error-policy=error");
    command.push("size=4M");
    let _server = place.nbdkit(&command);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    assert_eq!(whole.bytes[0x10_0000..][..8], [1, 2, 3, 4, 1, 2, 3, 4]);
    assert_eq!(whole.bytes[0x30_0000..][..0x1000], [9; 0x1000]);
    assert_eq!(whole.bytes.len(), 4 << 20);
    // A question may be about any bytes; a read may not.
    assert_eq!(extents(&export, 1000, 1001).unwrap().len(), 1);
    let error = with_pumps(&export, |request, answers| {
        let buffer = Zeroizing::new(vec![0; 512]);
        request.send(Request::Read(Read { offset: 512, buffer, tag: () })).unwrap();
        answers.recv().unwrap().err().unwrap()
    });
    assert!(error.to_string().contains("4096") && error.status() == Status::Usage, "{error}");
}

#[test]
fn bytes_past_the_end_are_never_asked_for() {
    let place = Place::new();
    let _server = place.nbdkit(&["memory", "1M"]);
    for (offset, length) in [(MIB, 512), (MIB - 512, 1024), (u64::MAX, 2)] {
        let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
        let error = with_pumps(&export, |request, answers| {
            let buffer = Zeroizing::new(vec![0; length]);
            request.send(Request::Read(Read { offset, buffer, tag: () })).unwrap();
            answers.recv().unwrap().err().unwrap()
        });
        assert!(matches!(error, NbdError::Usage(_)), "{error}");
    }
}

#[test]
fn a_server_without_structured_replies_will_do() {
    let place = Place::new();
    let _server = place.nbdkit(&["--no-sr", "data", "data=@0x100000 7*524288", "size=2M"]);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    assert!(!export.has_allocation());
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    assert_eq!(whole.read, 2 * MIB);
    assert!(whole.bytes[0x10_0000..0x18_0000].iter().all(|byte| *byte == 7));
    let error = refused(Export::open(&place.uri(""), &Options::default(), Some("b")));
    assert!(matches!(error, NbdError::Refused { .. }), "{error}");
}

#[test]
fn an_error_of_the_disk_is_named_and_not_tried_again() {
    let place = Place::new();
    let _server = place.nbdkit(&["--filter=error", "pattern", "16M", "error-pread=EIO", "error-pread-rate=100%"]);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let began = Instant::now();
    let error = read_all(&export, MIB, |_| {}).unwrap_err();
    assert!(matches!(error, NbdError::Failed { .. }), "{error}");
    assert!(error.to_string().contains("EIO") && error.to_string().contains("bytes"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
    let _server = place.nbdkit(&["--filter=error", "memory", "16M", "error-extents=EIO", "error-extents-rate=100%"]);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    let error = extents(&export, 0, MIB).unwrap_err();
    assert!(error.to_string().contains("say what is in bytes 0"), "{error}");
}

#[test]
fn a_slow_server_is_not_a_silent_one() {
    let place = Place::new();
    let _server = place.nbdkit(&["--filter=delay", "pattern", "4M", "rdelay=500ms"]);
    let options = Options { timeout: Duration::from_secs(2), ..Options::default() };
    let export = Export::open(&place.uri(""), &options, None).unwrap();
    let whole = read_all(&export, MIB, |_| {}).unwrap();
    assert_eq!(whole.bytes[8..16], 8u64.to_be_bytes());
    assert_eq!(export.reconnected(), 0);
}

#[test]
fn a_server_that_is_killed_and_comes_back_is_read_to_the_end() {
    let place = Place::new();
    let bytes = disk(&place.path("disk"), 16 * MIB);
    let start = || place.qemu_nbd("raw", &place.path("disk"), &["-e", "0", "--detect-zeroes=off"]);
    let mut server = start();
    let options = Options { connections: 2, in_flight: 4, give_up: Duration::from_secs(20), ..Options::default() };
    let export = Export::open(&place.uri(""), &options, None).unwrap();
    let whole = read_all(&export, 64 << 10, |came| {
        if came == 5 || came == 30 {
            server.kill();
            std::thread::sleep(Duration::from_millis(300));
            server = start();
        }
    });
    assert!(whole.unwrap().bytes == bytes);
    assert!(export.reconnected() >= 2, "{}", export.reconnected());
}

#[test]
fn a_server_that_does_not_come_back_is_given_up() {
    let place = Place::new();
    disk(&place.path("disk"), 16 * MIB);
    let mut server = place.qemu_nbd("raw", &place.path("disk"), &["-e", "0"]);
    let export = Export::open(&place.uri(""), &impatient(), None).unwrap();
    let began = Instant::now();
    let error = read_all(&export, 64 << 10, |came| {
        if came == 5 {
            server.kill();
        }
    });
    let error = error.unwrap_err();
    assert!(matches!(error, NbdError::Unreachable { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_server_that_comes_back_with_another_disk_is_not_believed() {
    let place = Place::new();
    disk(&place.path("disk"), 16 * MIB);
    disk(&place.path("other"), 17 * MIB);
    let mut server = place.qemu_nbd("raw", &place.path("disk"), &["-e", "0"]);
    let options = Options { give_up: Duration::from_secs(20), connections: 1, in_flight: 2, ..Options::default() };
    let export = Export::open(&place.uri(""), &options, None).unwrap();
    let error = read_all(&export, 64 << 10, |came| {
        if came == 5 {
            server.kill();
            server = place.qemu_nbd("raw", &place.path("other"), &["-e", "0"]);
        }
    });
    let error = error.unwrap_err();
    assert!(matches!(error, NbdError::Changed { .. }), "{error}");
    assert!(error.to_string().contains("16777216") && error.to_string().contains("17825792"), "{error}");
}

#[test]
fn fewer_connections_than_hoped_for_will_do() {
    let place = Place::new();
    let bytes = disk(&place.path("disk"), 16 * MIB);
    // It says that several are fine, and then accepts two only.
    let _server = place.qemu_nbd("raw", &place.path("disk"), &["-e", "2"]);
    let export = Export::open(&place.uri(""), &Options::default(), None).unwrap();
    assert_eq!(export.connections(), 4);
    let began = Instant::now();
    assert!(read_all(&export, MIB, |_| {}).unwrap().bytes == bytes);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn pumps_that_are_stopped_do_not_wait_for_the_server() {
    let place = Place::new();
    let _server = place.nbdkit(&["--filter=delay", "pattern", "64M", "rdelay=60"]);
    let export = Export::open(&place.uri(""), &Options { connections: 3, ..Options::default() }, None).unwrap();
    let began = Instant::now();
    with_pumps(&export, |request, answers| {
        for at in 0..4 {
            let buffer = Zeroizing::new(vec![0; 4096]);
            request.send(Request::Read(Read { offset: at * 4096, buffer, tag: () })).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        export.stop();
        assert!(answers.recv().is_err(), "nothing is answered any more");
    });
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
