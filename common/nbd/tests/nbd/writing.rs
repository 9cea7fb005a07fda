//! A disk that is written to: by clients of our own words, by those that everybody uses, and by clients that lie.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command as Process;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use reseal_nbd::server::{
    Disk, DiskError, Exports, Limits, Listed, MAX_READ, NotOpened, ServeError, Service, StartTls, Stretch,
};
use reseal_proto::nbd::*;

use crate::served::{Answer, Heard, Talker, errno, listen};
use crate::server::{Place, run};

const LENGTH: usize = (1 << 20) + 700;

/// What a disk has, and what of it would survive.
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Which command fails, and how.
    refuse: Option<Errno>,
    trimmed: Vec<(u64, u64)>,
}

/// A disk in memory that is written to.
struct Slate(Mutex<Content>);

impl Slate {
    fn change(&self, offset: u64, length: usize, change: impl FnOnce(&mut [u8])) -> Result<(), DiskError> {
        let mut content = self.0.lock();
        if let Some(errno) = content.refuse {
            return Err(DiskError { errno, reason: "the test wants it so".into() });
        }
        let start = usize::try_from(offset).unwrap();
        change(&mut content.now[start..start + length]);
        Ok(())
    }

    fn now(&self) -> Vec<u8> {
        self.0.lock().now.clone()
    }

    fn durable(&self) -> Vec<u8> {
        self.0.lock().durable.clone()
    }
}

impl Disk for Slate {
    fn name(&self) -> &str {
        "slate"
    }

    fn length(&self) -> u64 {
        self.0.lock().now.len() as u64
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let start = usize::try_from(offset).unwrap();
        out.copy_from_slice(&self.0.lock().now[start..start + out.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.change(offset, bytes.len(), |part| part.copy_from_slice(bytes))
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.change(offset, usize::try_from(length).unwrap(), |part| part.fill(0))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.change(offset, usize::try_from(length).unwrap(), |part| part.fill(0))?;
        self.0.lock().trimmed.push((offset, length));
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        let mut content = self.0.lock();
        content.durable = content.now.clone();
        Ok(())
    }

    fn stretches(&self, _offset: u64, length: u64, _most: usize) -> Result<Vec<Stretch>, DiskError> {
        Ok(vec![Stretch { length, hole: false }])
    }
}

struct OneSlate(Arc<Slate>);

impl Exports for OneSlate {
    fn open(&self, _name: &str) -> Result<Arc<dyn Disk>, NotOpened> {
        Ok(self.0.clone())
    }

    fn list(&self) -> Result<Vec<Listed>, NotOpened> {
        Ok(vec![])
    }
}

struct Writing {
    place: Place,
    slate: Arc<Slate>,
    heard: Arc<Heard>,
    ends: Receiver<Result<(), ServeError>>,
}

impl Writing {
    fn new() -> Writing {
        let now: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at / 5 % 250 + 1).unwrap()).collect();
        let content = Content { durable: now.clone(), now, refuse: None, trimmed: Vec::new() };
        let (slate, heard) = (Arc::new(Slate(Mutex::new(content))), Arc::new(Heard::default()));
        let exports = Arc::new(OneSlate(slate.clone()));
        let limits = Limits { threads: 4, ..Limits::default() };
        let place = Place::new();
        let service = Service { exports, owner: heard.clone(), tls: StartTls::Never, limits };
        let (ends, _) = listen(&place, service);
        Writing { place, slate, heard, ends }
    }

    fn open(&self) -> Talker<UnixStream> {
        let mut talker = Talker::connect(&self.place);
        talker.greet(true);
        talker.go("slate", true);
        talker
    }
}

fn write(talker: &mut Talker<UnixStream>, flags: CommandFlags, offset: u64, bytes: &[u8]) -> Errno {
    talker.send(Command::Write, flags, 7, offset, u32::try_from(bytes.len()).unwrap());
    talker.say(bytes);
    errno(&talker.answer())
}

#[test]
fn what_is_written_is_read_by_all_and_durable_when_any_of_them_flushes() {
    let writing = Writing::new();
    let (mut one, mut other) = (writing.open(), writing.open());
    let none = CommandFlags::NONE;
    assert_eq!(write(&mut one, none, 100, &[9; 5000]), Errno::NONE);
    let Answer::Chunk(7, ChunkKind::Data, read) = other.request(Command::Read, none, 100, 5000) else { panic!() };
    assert!(read[OFFSET_LENGTH..].iter().all(|byte| *byte == 9));
    assert_ne!(writing.slate.durable()[100], 9);
    assert_eq!(errno(&other.request(Command::Flush, none, 0, 0)), Errno::NONE);
    assert_eq!(writing.slate.durable()[100], 9);
    // Durable before the reply, each by itself.
    for (nth, command) in [Command::Write, Command::WriteZeroes, Command::Trim].into_iter().enumerate() {
        let at = 10_000 * (nth as u64 + 1);
        one.send(command, CommandFlags::FUA, 7, at, 4096);
        if command == Command::Write {
            one.say(&[0; 4096]);
        }
        assert_eq!(errno(&one.answer()), Errno::NONE);
        let at = usize::try_from(at).unwrap();
        assert!(writing.slate.durable()[at..at + 4096].iter().all(|byte| *byte == 0), "{command:?}");
    }
    assert_eq!(writing.slate.0.lock().trimmed, [(30_000, 4096)]);
    assert!(writing.slate.durable() == writing.slate.now());
}

#[test]
fn a_disk_that_can_be_written_to_says_so_and_one_that_cannot_too() {
    let writing = Writing::new();
    let flags = |replies: Vec<OptionReply>| {
        let found = replies.into_iter().find_map(|reply| match reply {
            OptionReply::Info(Info::Export { flags, .. }) => Some(flags),
            _ => None,
        });
        found.unwrap()
    };
    let of = |place: &Place, name: &str| {
        let mut talker = Talker::connect(place);
        talker.greet(true);
        flags(talker.go(name, true))
    };
    let writes = ExportFlags::SEND_FUA
        .with(ExportFlags::SEND_TRIM)
        .with(ExportFlags::SEND_WRITE_ZEROES)
        .with(ExportFlags::SEND_FAST_ZERO);
    let both = ExportFlags::SEND_FLUSH.with(ExportFlags::CAN_MULTI_CONN);
    let slate = of(&writing.place, "slate");
    assert!(slate.contains(writes.with(both)) && !slate.contains(ExportFlags::READ_ONLY), "{slate:?}");
    let served = crate::served::Served::new(crate::served::Model::new());
    let model = of(&served.place, "model");
    assert!(model.contains(ExportFlags::READ_ONLY.with(both)) && model.0 & writes.0 == 0, "{model:?}");
}

#[test]
fn writes_that_make_no_sense_are_refused_one_by_one_and_change_nothing() {
    let writing = Writing::new();
    let (before, size) = (writing.slate.now(), LENGTH as u64);
    let mut talker = writing.open();
    let (none, df) = (CommandFlags::NONE, CommandFlags::DF);
    for (flags, offset, length, expected) in [
        (none, size - 1, 2, Errno::NOSPC),
        (none, size, 40_000, Errno::NOSPC),
        (none, u64::MAX, 2, Errno::NOSPC),
        (df, 0, 100_000, Errno::INVAL),
        (CommandFlags::NO_HOLE, 0, 4096, Errno::INVAL),
        (CommandFlags(1 << 14), 0, 1, Errno::INVAL),
        (none, size, 0, Errno::NONE),
        (none, 0, 0, Errno::NONE),
    ] {
        // What it carries looks like requests, and is none.
        let payload = Request { command: Command::Trim, flags: none, cookie: 1, offset: 0, length: 4096 }.encode();
        let payload: Vec<u8> = payload.iter().copied().cycle().take(length).collect();
        assert_eq!(write(&mut talker, flags, offset, &payload), expected, "{offset} {length}");
    }
    for (command, flags, offset, length, expected) in [
        (Command::Trim, none, size, 1, Errno::INVAL),
        (Command::Trim, CommandFlags::NO_HOLE, 0, 1, Errno::INVAL),
        (Command::WriteZeroes, none, size - 1, 2, Errno::NOSPC),
        (Command::WriteZeroes, none, u64::MAX, u32::MAX, Errno::NOSPC),
        (Command::WriteZeroes, df, 0, 1, Errno::INVAL),
        (Command::WriteZeroes, none, 7, 0, Errno::NONE),
        (Command::Trim, none, 7, 0, Errno::NONE),
        (Command::Flush, CommandFlags::FUA, 0, 0, Errno::NONE),
        (Command::Read, CommandFlags::FUA, 0, 1, Errno::NONE),
        (Command::Other(9), none, 0, 0, Errno::INVAL),
    ] {
        assert_eq!(errno(&talker.request(command, flags, offset, length)), expected, "{command:?} {offset} {length}");
    }
    assert!(writing.slate.now() == before);
    assert!(writing.heard.failed.lock().is_empty(), "none of it is the owner's concern");
    let kept = CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO);
    assert_eq!(errno(&talker.request(Command::WriteZeroes, kept, 1, 9000)), Errno::NONE);
    assert!(writing.slate.now()[1..9001].iter().all(|byte| *byte == 0));
}

#[test]
fn a_write_that_breaks_off_changes_nothing_and_one_too_long_is_not_waited_for() {
    let writing = Writing::new();
    let before = writing.slate.now();
    let mut talker = writing.open();
    talker.send(Command::Write, CommandFlags::NONE, 1, 0, 100_000);
    talker.say(&[3; 99_999]);
    talker.0.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(writing.ends.recv().unwrap(), Err(ServeError::Gone)));
    let mut talker = writing.open();
    talker.send(Command::Write, CommandFlags::NONE, 1, 0, MAX_READ + 1);
    assert!(talker.is_over());
    assert!(matches!(writing.ends.recv().unwrap(), Err(ServeError::Violation(Violation::TooLong { .. }))));
    // More than was said is taken for a request, and is none.
    let mut talker = writing.open();
    talker.send(Command::Write, CommandFlags::NONE, 1, 0, 10);
    talker.say(&[before[0]; 10 + REQUEST_LENGTH]);
    assert!(matches!(writing.ends.recv().unwrap(), Err(ServeError::Violation(Violation::Magic { .. }))));
    assert!(writing.slate.now()[10..] == before[10..]);
}

#[test]
fn the_client_is_told_that_there_is_no_room_and_the_owner_why() {
    let writing = Writing::new();
    let mut talker = writing.open();
    for refuse in [Errno::NOSPC, Errno::IO] {
        writing.slate.0.lock().refuse = Some(refuse);
        assert_eq!(write(&mut talker, CommandFlags::FUA, 0, &[1; 512]), refuse);
        assert_eq!(errno(&talker.request(Command::WriteZeroes, CommandFlags::NONE, 0, 512)), refuse);
        assert_eq!(errno(&talker.request(Command::Trim, CommandFlags::NONE, 0, 512)), refuse);
    }
    let said = writing.heard.failed.lock().clone();
    assert_eq!(said.len(), 6);
    assert!(said[0].starts_with("can't write bytes 0 to 512 of slate: the test wants it so"), "{said:?}");
}

#[test]
fn tools_that_everybody_uses_write_what_they_read_afterwards() {
    let writing = Writing::new();
    let uri = writing.place.uri("slate").to_string();
    let file = writing.place.path("image");
    let mut wanted: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at / 3 % 241).unwrap()).collect();
    wanted[50_000..400_000].fill(0);
    std::fs::write(&file, &wanted).unwrap();
    run("nbdcopy", &["--flush", "--connections=4", file.to_str().unwrap(), &uri]);
    assert!(writing.slate.now() == wanted && writing.slate.durable() == wanted);
    let commands = ["write -P 7 1000 3000", "aio_write -f -P 8 5000 70000", "write -z 300 100", "discard 8192 4096"];
    let mut qemu = Process::new("qemu-io");
    qemu.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command])).args(["-c", "flush"]).arg(&uri);
    let output = qemu.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    wanted[1000..4000].fill(7);
    wanted[5000..75_000].fill(8);
    wanted[300..400].fill(0);
    wanted[8192..12_288].fill(0);
    assert!(writing.slate.now() == wanted && writing.slate.durable() == wanted);
    let back = writing.place.path("back");
    run("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert!(std::fs::read(back).unwrap() == wanted);
}
