//! Images of every format, read through the real `qemu-nbd`.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_nbd::{Export, NbdUri, Options, Read, Request};
use reseal_writer::image::{Image, ImageError, ImageFormat, decide};
use tempfile::TempDir;
use zeroize::Zeroizing;

const LENGTH: u64 = 24 << 20;
const SECRET: &str = "data:image/secret, with=every ünusual char";

/// Runs a program that must succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let ended = Command::new(program).args(arguments).output().unwrap();
    assert!(ended.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
    String::from_utf8(ended.stdout).unwrap()
}

/// A folder with a raw disk of known content, and a file with a secret.
struct Place {
    folder: TempDir,
    raw: PathBuf,
    secret: PathBuf,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let (raw, secret) = (folder.path().join("disk.raw"), folder.path().join("secret"));
        let disk = File::create(&raw).unwrap();
        disk.set_len(LENGTH).unwrap();
        for (at, seed) in [(0, 1u32), (5 << 20, 2), (LENGTH - 70_000, 3)] {
            let mut state = seed;
            let mut byte = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            };
            let bytes: Vec<u8> = (0..70_000).map(|_| byte()).collect();
            disk.write_all_at(&bytes, at).unwrap();
        }
        fs::write(&secret, format!("{SECRET}\nand a second line")).unwrap();
        Place { folder, raw, secret }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The raw disk as an image; `options` are of the format.
    fn image(&self, name: &str, format: &str, options: &[&str]) -> PathBuf {
        let (image, link) = (self.path(name), self.path("image-being-made"));
        let (raw, to) = (self.raw.to_str().unwrap(), link.to_str().unwrap());
        run("qemu-img", &[&["convert", "-f", "raw", "-O", format], options, &[raw, to]].concat());
        fs::rename(link, &image).unwrap();
        image
    }

    fn luks(&self, name: &str, format: &str) -> PathBuf {
        let line = self.path("line");
        fs::write(&line, SECRET).unwrap();
        let object = format!("secret,id=s,file={}", line.display());
        let prefix = if format == "luks" { "" } else { "encrypt." };
        let kind = if format == "luks" { "" } else { "encrypt.format=luks," };
        let options = format!("{kind}{prefix}key-secret=s,{prefix}iter-time=10,{prefix}hash-alg=sha512");
        // QEMU measures the processor for the key slot; on a busy machine it can find that it took no time at all.
        for _ in 0..20 {
            let (raw, to) = (self.raw.to_str().unwrap(), self.path(name));
            let words = ["convert", "--object", &object, "-f", "raw", "-O", format, "-o", &options, raw];
            let ended = Command::new("qemu-img").args(words).arg(&to).output().unwrap();
            if ended.status.success() {
                return to;
            }
            assert!(String::from_utf8_lossy(&ended.stderr).contains("CPU usage"), "{ended:?}");
        }
        panic!("{name} could not be made");
    }

    fn serve(&self, image: &Path) -> Result<Image, ImageError> {
        self.serve_with(image, None)
    }

    fn serve_with(&self, image: &Path, secret: Option<&Path>) -> Result<Image, ImageError> {
        Image::serve(image, decide(image, None)?.unwrap(), secret)
    }
}

/// Checks that what is served is the disk, through a client that is not ours.
#[track_caller]
fn assert_served(image: &Image, raw: &Path) {
    let socket = image.socket().to_str().unwrap().replace("self", &std::process::id().to_string());
    let uri = format!("nbd+unix:///{}?socket={socket}", image.export());
    let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", raw.to_str().unwrap(), &uri]);
    assert!(said.contains("identical"), "{said}");
    let info = run("qemu-img", &["info", "-f", "raw", &uri]);
    assert!(info.contains(&format!("({LENGTH} bytes)")), "{info}");
}

/// The disk as our own client reads it.
fn read_by_ourselves(image: &Image) -> Vec<u8> {
    const UNIT: usize = 1 << 20;
    let uri = NbdUri::unix(image.socket(), image.export());
    let export = Export::open(&uri, &Options::default(), None).unwrap();
    assert!(export.has_allocation() && export.connections() > 1, "holes are skipped, by several connections");
    let mut disk = vec![0; usize::try_from(export.length()).unwrap()];
    let (request, requests) = crossbeam_channel::unbounded();
    let (answer, answers) = crossbeam_channel::unbounded();
    for offset in (0..disk.len()).step_by(UNIT) {
        let buffer = Zeroizing::new(vec![0; UNIT.min(disk.len() - offset)]);
        request.send(Request::Read(Read { offset: offset as u64, buffer, tag: () })).unwrap();
    }
    drop(request);
    std::thread::scope(|scope| {
        for _ in 0..export.connections() {
            scope.spawn(|| export.pump(&requests, &answer));
        }
    });
    drop(answer);
    for read in answers {
        let read = read.unwrap();
        let offset = usize::try_from(read.offset).unwrap();
        disk[offset..offset + read.buffer.len()].copy_from_slice(&read.buffer);
    }
    disk
}

#[test]
fn our_own_client_reads_what_is_served() {
    let place = Place::new();
    let image = place.luks("d.qcow2", "qcow2");
    let served = place.serve_with(&image, Some(&place.secret)).unwrap();
    assert!(read_by_ourselves(&served) == fs::read(&place.raw).unwrap());
}

/// Processes whose parent is that one, with their command lines.
fn children(parent: u32) -> Vec<(u32, String)> {
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let of_parent = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // What follows the name in parentheses, which may hold anything.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.split_whitespace().nth(1) == Some(&parent.to_string()) && !rest.starts_with(" Z")
    };
    let line = |pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    processes.filter(of_parent).map(|pid| (pid, line(pid))).collect()
}

fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

#[test]
fn every_format_shows_the_disk_in_it() {
    let place = Place::new();
    let formats = [
        ("d.qcow2", "qcow2", &[][..]),
        ("compressed.qcow2", "qcow2", &["-c"]),
        ("sparse.vmdk", "vmdk", &[]),
        ("stream.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
        ("d.vhdx", "vhdx", &[]),
        ("d.vdi", "vdi", &[]),
        ("D.VHD", "vpc", &["-o", "force_size=on"]),
        ("fixed.vpc", "vpc", &["-o", "subformat=fixed,force_size=on"]),
    ];
    for (name, format, options) in formats {
        let image = place.image(name, format, options);
        let served = place.serve(&image).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_served(&served, &place.raw);
        assert_eq!(decide(&image, None).unwrap().unwrap().driver(), format);
        // Nothing is taken for a container because of its content.
        let renamed = place.path("renamed.img");
        fs::rename(&image, &renamed).unwrap();
        assert!(matches!(decide(&renamed, None), Err(ImageError::Unnamed { .. })), "{name}");
        drop(served);
        let explicit = Image::serve(&renamed, format.parse().unwrap(), None).unwrap();
        assert_served(&explicit, &place.raw);
    }
    // A VMDK of VMware's own kind: a descriptor, and beside it the raw bytes, which are no image.
    let flat = place.path("web01.vmdk");
    let words = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", place.raw.to_str().unwrap()];
    run("qemu-img", &[&words[..], &[flat.to_str().unwrap()]].concat());
    assert_served(&place.serve(&flat).unwrap(), &place.raw);
    assert_eq!(decide(&place.path("web01-flat.vmdk"), None).unwrap(), None);
    assert_eq!(decide(&place.raw, None).unwrap(), None);
}

#[test]
fn an_image_is_read_with_those_that_it_builds_on() {
    let place = Place::new();
    let base = place.image("base.qcow2", "qcow2", &[]);
    let (middle, top) = (place.path("middle.qcow2"), place.path("top.qcow2"));
    for (image, backing) in [(&middle, "base.qcow2"), (&top, "middle.qcow2")] {
        // A name relative to the image's own folder.
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, image.to_str().unwrap()]);
    }
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 64k", middle.to_str().unwrap()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 5M 4k", top.to_str().unwrap()]);
    let disk = OpenOptions::new().write(true).open(&place.raw).unwrap();
    disk.write_all_at(&[7; 65536], 1 << 20).unwrap();
    disk.write_all_at(&[9; 4096], 5 << 20).unwrap();
    assert_served(&place.serve(&top).unwrap(), &place.raw);

    fs::rename(&base, place.path("away.qcow2")).unwrap();
    let said = place.serve(&top).err().unwrap();
    assert!(matches!(said, ImageError::Backing { .. }) && said.to_string().contains("base.qcow2"), "{said}");

    // A base without a recorded format: QEMU would go by what a guest wrote there.
    let probing = place.path("probing.qcow2");
    let path = probing.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", path]);
    place.serve(&probing).unwrap();
    let mut bytes = fs::read(&probing).unwrap();
    // The header extension 0xE2792ACA names the format; as an unknown one it is passed over.
    let at = bytes.windows(4).position(|word| word == 0xE279_2ACA_u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x0101_0101_u32.to_be_bytes());
    fs::write(&probing, bytes).unwrap();
    let said = place.serve(&probing).err().unwrap();
    assert!(matches!(said, ImageError::Probed { .. }) && said.to_string().contains("rebase -u"), "{said}");
}

#[test]
fn encrypted_images_open_with_their_secret_alone() {
    let place = Place::new();
    let wrong = place.path("wrong");
    fs::write(&wrong, "another secret\n").unwrap();
    for (name, format) in [("d.qcow2", "qcow2"), ("d.luks", "luks")] {
        let image = place.luks(name, format);
        let said = place.serve(&image).err().unwrap();
        assert!(matches!(said, ImageError::NoSecret { .. }) && said.to_string().contains("--image-secret"), "{said}");
        let said = place.serve_with(&image, Some(&wrong)).err().unwrap();
        assert!(matches!(said, ImageError::WrongSecret { .. }), "{said}");
        assert!(!said.to_string().contains("another secret"));
        let served = place.serve_with(&image, Some(&place.secret)).unwrap();
        assert_served(&served, &place.raw);
        for line in ["cmdline", "environ"] {
            let shown = fs::read(format!("/proc/{}/{line}", served.process())).unwrap();
            assert!(!String::from_utf8_lossy(&shown).contains("unusual"), "{line}");
            assert!(!String::from_utf8_lossy(&shown).contains("data:image"), "{line}");
        }
    }
    // One secret may be given for several disks of which not all are encrypted.
    let plain = place.image("plain.qcow2", "qcow2", &[]);
    assert_served(&place.serve_with(&plain, Some(&place.secret)).unwrap(), &place.raw);
    let missing = place.serve_with(&plain, Some(&place.path("none"))).err().unwrap();
    assert!(matches!(missing, ImageError::SecretFile(_)), "{missing}");
    // What a guest encrypts itself lies in a raw file, and stays what it is.
    fs::rename(place.path("d.luks"), place.path("guest.raw")).unwrap();
    assert_eq!(decide(&place.path("guest.raw"), None).unwrap(), None);
}

/// A process that is ended with its guard.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(limit: Duration, what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "{what}");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_image_in_use_is_said_to_be() {
    let place = Place::new();
    for name in ["d.qcow2", "d.vdi"] {
        let format = name.rsplit_once('.').unwrap().1;
        let image = place.image(name, format, &[]);
        let socket = place.path("other");
        let mut other = Command::new("qemu-nbd");
        other.args(["-t", "-f", format, "-k", socket.to_str().unwrap(), image.to_str().unwrap()]);
        let other = Guard(other.stderr(Stdio::null()).spawn().unwrap());
        until(Duration::from_secs(10), "the other program serves", || socket.exists());
        let said = place.serve(&image).err().unwrap();
        assert!(matches!(said, ImageError::InUse { .. }), "{said}");
        let said = said.to_string();
        assert!(said.contains(image.to_str().unwrap()) && said.contains("--libvirt or --qmp"), "{said}");
        drop(other);
        let served = place.serve(&image).unwrap();
        // And as long as we read it, nobody writes.
        let writer = Command::new("qemu-io").args(["-f", format, "-c", "write 0 4k"]).arg(&image).output().unwrap();
        assert!(!writer.status.success(), "{writer:?}");
        drop(served);
        fs::remove_file(&socket).ok();
    }
}

#[test]
fn what_is_no_whole_image_is_refused() {
    let place = Place::new();
    let whole = place.image("d.qcow2", "qcow2", &[]);
    let bytes = fs::read(&whole).unwrap();
    let damaged = place.path("damaged.qcow2");
    // A copy that was cut off: QEMU alone would show zeros where the rest should be.
    fs::write(&damaged, &bytes[..bytes.len() - 300_000]).unwrap();
    let said = place.serve(&damaged).err().unwrap();
    assert!(matches!(said, ImageError::Corrupt { .. }), "{said}");
    // Tables that point nowhere.
    let mut broken = bytes.clone();
    let l1 = usize::try_from(u64::from_be_bytes(broken[40..48].try_into().unwrap())).unwrap();
    broken[l1 + 2] ^= 0x55;
    fs::write(&damaged, &broken).unwrap();
    let said = place.serve(&damaged).err().unwrap();
    assert!(matches!(said, ImageError::Corrupt { .. }), "{said}");
    // A header whose values make no sense.
    let mut header = bytes;
    header[20..24].copy_from_slice(&[0xff; 4]);
    fs::write(&damaged, &header).unwrap();
    let said = place.serve(&damaged).err().unwrap();
    assert!(said.to_string().contains("damaged.qcow2") && !said.to_string().contains("json:"), "{said}");
    for format in ["qcow2", "vmdk", "vhdx", "vdi", "vhd", "luks"] {
        let format: ImageFormat = format.parse().unwrap();
        let said = Image::serve(&place.raw, format, Some(&place.secret)).err().unwrap();
        assert!(matches!(said, ImageError::NotThat { .. }), "{format}: {said:?}");
    }
    let said = Image::serve(&place.path("none.qcow2"), ImageFormat::Qcow2, None).err().unwrap();
    assert!(matches!(said, ImageError::Io { .. }), "{said}");
}

#[test]
fn names_mean_nothing_to_qemu() {
    let place = Place::new();
    let names = [
        "a,b=c,,d.qcow2",
        "with a space.qcow2",
        "nbd:host:10809.qcow2",
        "json:{\"driver\":\"raw\"}.qcow2",
        "quote's \"double\" \\n.qcow2",
        "new\nline.qcow2",
        "-x --help.qcow2",
        "$(touch x) `id` %s ünï.qcow2",
    ];
    for name in names {
        let image = place.image(name, "qcow2", &[]);
        let served = place.serve(&image).unwrap_or_else(|e| panic!("{name:?}: {e}"));
        assert_served(&served, &place.raw);
    }
    let strange =
        place.folder.path().join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff.qcow2"));
    fs::copy(place.path(names[1]), &strange).unwrap();
    let said = Image::serve(&strange, ImageFormat::Qcow2, None).err().unwrap();
    assert!(matches!(said, ImageError::Name { .. }), "{said}");
}

#[test]
fn nothing_is_left_when_it_is_dropped_or_fails() {
    let place = Place::new();
    let image = place.image("d.qcow2", "qcow2", &[]);
    let (process, socket) = {
        let served = place.serve(&image).unwrap();
        assert_eq!(served.export(), "disk");
        let line = fs::read_to_string(format!("/proc/{}/cmdline", served.process())).unwrap();
        assert!(line.contains("qemu-nbd") && line.contains("--read-only"), "{line}");
        (served.process(), served.socket().to_owned())
    };
    assert!(!is_running(process));
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_err());
}

/// No test by itself: the process that another one kills. It serves an image and waits.
#[test]
fn helper_that_serves() {
    let Some(image) = std::env::var_os("RESEAL_TEST_IMAGE") else { return };
    let served = Image::serve(Path::new(&image), ImageFormat::Qcow2, None).unwrap();
    println!("serves {}", served.process());
    sleep(Duration::from_secs(60));
}

#[test]
fn nothing_is_left_when_the_parent_is_killed() {
    let place = Place::new();
    let image = place.image("d.qcow2", "qcow2", &[]);
    let temporary = place.path("tmp");
    fs::create_dir(&temporary).unwrap();
    // From the first moments, when programs look at the image, until it serves.
    for after in [Some(5), Some(15), Some(30), Some(60), None] {
        let mut helper = Command::new(std::env::current_exe().unwrap());
        helper.args(["--exact", "helper_that_serves", "--nocapture"]).stdout(Stdio::piped()).stderr(Stdio::null());
        helper.env("RESEAL_TEST_IMAGE", &image).env("TMPDIR", &temporary);
        let mut helper = Guard(helper.spawn().unwrap());
        let mut lines = BufReader::new(helper.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        match after {
            Some(millis) => sleep(Duration::from_millis(millis)),
            None => assert!(lines.any(|line| line.contains("serves ")), "it should serve"),
        }
        let pids = children(helper.0.id());
        assert!(after.is_some() || pids.iter().any(|(_, line)| line.contains("qemu-nbd")), "{pids:?}");
        drop(helper);
        until(Duration::from_secs(5), "its programs end with it", || !pids.iter().any(|(pid, _)| is_running(*pid)));
        for left in fs::read_dir(&temporary).unwrap() {
            // Killed in the moment in which the socket has a name, which it needs to get a handle.
            let left = left.unwrap().path();
            let within: Vec<_> = fs::read_dir(&left).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert!(after.is_some() && within.iter().all(|name| name == "s"), "after {after:?}: {within:?}");
            fs::remove_dir_all(left).unwrap();
        }
    }
    // It can be written to again at once.
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", image.to_str().unwrap()]);
}

#[test]
fn a_missing_program_is_named_with_its_package() {
    let place = Place::new();
    let image = place.image("d.qcow2", "qcow2", &[]);
    // A machine that has a shell and nothing of QEMU.
    let bin = place.path("bin");
    fs::create_dir(&bin).unwrap();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "helper_that_serves", "--nocapture"]).env("RESEAL_TEST_IMAGE", &image).env("PATH", &bin);
    let ended = helper.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned() + &String::from_utf8_lossy(&ended.stdout);
    assert!(!ended.status.success() && said.contains("Missing"), "{said}");
    let said = ImageError::from(reseal_qemu::Missing { program: "qemu-img" }).to_string();
    assert!(said.contains("qemu-utils"), "{said}");
}
