//! Live sources: what reading over NBD costs, what a bitmap spares, and what a running VM feels of a backup.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use reseal_nbd::{Export, NbdUri, Options, Read, Request};
use reseal_tests::qmp::Qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Result;
use crate::contender::{Contender, renewed};
use crate::host::{DAYS, Disks};
use crate::plan::Plan;
use crate::process::{self, Server};
use crate::reseal::Reseal;
use crate::samples::{Quantity, Samples};

const CLUSTER: usize = 64 * 1024;
/// What the writer on the VM's disk writes, in MiB per second, and for how long, in seconds.
const WRITE_RATE: u64 = 20;
const WRITE_SECONDS: u64 = 10;
/// What the backup beside it may read, in MiB per second.
const LIMIT_RATE: u64 = 50;
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);

/// One figure, against its bound.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) bound: String,
    pub(crate) measured: String,
    /// `None` where there is no bound.
    pub(crate) met: Option<bool>,
}

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: live sources");
    samples.live.clear();
    crate::host::unmount_below(&plan.work.join("live"));
    let restic = samples.median("restic", Quantity::BackupDay2);
    let parts = [over_nbd(plan, disks), by_bitmap(plan, disks, restic), beside_a_writer(plan, disks)];
    // A QEMU that was ended leaves its file system behind.
    crate::host::unmount_below(&plan.work.join("live"));
    for part in parts {
        match part {
            Ok(figures) => samples.live.extend(figures),
            Err(error) => eprintln!("bench: live sources, a part is missing: {error}"),
        }
    }
    Ok(())
}

pub(crate) fn median(mut taken: Vec<f64>) -> f64 {
    taken.sort_by(f64::total_cmp);
    taken.get(taken.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A server of NBD on a Unix socket.
struct Nbd {
    socket: PathBuf,
    _server: Server,
}

impl Nbd {
    fn start(folder: &Path, arguments: &[&str], image: &Path) -> Result<Nbd> {
        let socket = folder.join("nbd.socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--read-only", "--persistent", "--shared=16", "--socket"])
            .arg(&socket)
            .args(arguments)
            .arg(image);
        let mut server = Server::start(&mut command, &folder.join("nbd.log"))?;
        let began = Instant::now();
        while !socket.exists() {
            server.running()?;
            if began.elapsed() > START {
                return Err("qemu-nbd does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Nbd { socket, _server: server })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

/// The bench starts itself with this: the client of a backup alone, which reads an export into nothing.
pub(crate) fn read_into_nothing(arguments: &[String]) -> Result<()> {
    let uri: NbdUri = arguments.first().ok_or("which export?")?.parse().map_err(|e| format!("{e}"))?;
    let export = &Export::open(&uri, &Options::default(), None)?;
    let piece = 1 << 20;
    let in_flight = 24;
    let (requests, requested) = bounded::<Request<()>>(in_flight);
    let (filled, read) = bounded::<std::result::Result<Read<()>, _>>(in_flight);
    let (empty, pool) = bounded(in_flight);
    for _ in 0..in_flight {
        empty.send(zeroize::Zeroizing::new(vec![0; piece]))?;
    }
    std::thread::scope(|scope| {
        for _ in 0..export.connections() {
            let (requested, filled) = (requested.clone(), filled.clone());
            scope.spawn(move || export.pump(&requested, &filled));
        }
        drop((requested, filled));
        scope.spawn(move || -> Option<()> {
            let length = export.length();
            let mut at = 0;
            while at < length {
                let (answer, answers) = bounded(1);
                requests.send(Request::Status { offset: at, length: (length - at).min(1 << 30), answer }).ok()?;
                for extent in answers.recv().ok()?.ok()? {
                    let end = at + extent.length;
                    while at < end && !extent.zero {
                        let mut buffer = pool.recv().ok()?;
                        buffer.resize(usize::try_from(end - at).map_or(piece, |left| left.min(piece)), 0);
                        let next = at + buffer.len() as u64;
                        requests.send(Request::Read(Read { offset: at, buffer, tag: () })).ok()?;
                        at = next;
                    }
                    at = end;
                }
            }
            Some(())
        });
        let mut bytes = 0;
        for read in read {
            let read = read?;
            bytes += read.buffer.len();
            let _ = empty.send(read.buffer);
        }
        println!("{bytes}");
        Ok(())
    })
}

fn over_nbd(plan: &Plan, disks: &Disks) -> Result<Vec<Figure>> {
    let folder = plan.work.join("live");
    renewed(&folder)?;
    let base = disks.path(DAYS[0]);
    crate::host::warm(&base)?;
    let nbd = Nbd::start(&folder, &["--format=raw"], &base)?;
    let mut reseal = Reseal::at(plan, "reseal-live");
    let (mut copy, mut client, mut file, mut over) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.rounds.max(3) {
        copy.push(process::run(Command::new("nbdcopy").arg(nbd.uri()).arg("null:"))?.seconds);
        let own = std::env::current_exe()?;
        client.push(process::run(Command::new(own).arg("nbd-null").arg(nbd.uri()))?.seconds);
        reseal.renew()?;
        file.push(process::run(reseal.command().args(["backup", "web01"]).arg(&base))?.seconds);
        reseal.renew()?;
        over.push(process::run(reseal.command().args(["backup", "web01"]).arg(nbd.uri()))?.seconds);
    }
    let (copy, client, file, over) = (median(copy), median(client), median(file), median(over));
    let (limit, alone) = ((copy + file) / over, copy / client);
    Ok(vec![
        Figure {
            what: "First backup over NBD (qemu-nbd, Unix socket, raw file)".into(),
            bound: "0.9 × what `nbdcopy` and the backup from the file allow together".into(),
            measured: format!("{limit:.2} × ({over:.2} s; nbdcopy {copy:.2} s, from the file {file:.2} s)"),
            met: Some(limit >= 0.9),
        },
        Figure {
            what: "The NBD client alone, into nothing".into(),
            bound: "0.9 × `nbdcopy null:`".into(),
            measured: format!("{alone:.2} × ({client:.2} s; nbdcopy {copy:.2} s)"),
            met: Some(alone >= 0.9),
        },
    ])
}

/// Writes what differs between two disks into an image, through QEMU, so that its bitmaps see it.
fn write_difference(from: &Path, to: &Path, image: &Path, folder: &Path) -> Result<()> {
    let (from, to) = (File::open(from)?, File::open(to)?);
    let length = to.metadata()?.len();
    let (mut one, mut other) = (vec![0; CLUSTER], vec![0; CLUSTER]);
    let mut script = String::new();
    let mut files = Vec::new();
    for at in (0..length).step_by(CLUSTER) {
        from.read_exact_at(&mut one, at)?;
        to.read_exact_at(&mut other, at)?;
        if one != other {
            let file = folder.join(format!("piece-{at}"));
            std::fs::write(&file, &other)?;
            writeln!(script, "write -q -s {} {at} {CLUSTER}", file.display())?;
            files.push(file);
        }
    }
    writeln!(script, "quit")?;
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "qcow2"]).arg(image).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = writer.spawn()?;
    child.stdin.take().ok_or("qemu-io takes no input")?.write_all(script.as_bytes())?;
    if !child.wait()?.success() {
        return Err("qemu-io did not write the second day".into());
    }
    Ok(files.iter().try_for_each(std::fs::remove_file)?)
}

fn by_bitmap(plan: &Plan, disks: &Disks, restic: Option<f64>) -> Result<Vec<Figure>> {
    let folder = plan.work.join("live");
    renewed(&folder)?;
    let day = |nth: usize| disks.path(DAYS[nth]);
    let image = folder.join("vm.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(day(1)).arg(&image);
    process::run(&mut create)?;
    process::run(Command::new("qemu-img").args(["bitmap", "--add"]).arg(&image).arg("day1"))?;
    write_difference(&day(1), &day(2), &image, &folder)?;
    let nbd = Nbd::start(&folder, &["--format=qcow2", "--bitmap=day1"], &image)?;
    let map = process::output(Command::new("nbdinfo").args(["--json", "--map=qemu:dirty-bitmap:day1"]).arg(nbd.uri()))?;
    let map: Vec<BTreeMap<String, Value>> = serde_json::from_str(&map)?;
    let dirty: u64 = map.iter().filter(|area| area["type"] == 1).filter_map(|area| area["length"].as_u64()).sum();
    let mut reseal = Reseal::at(plan, "reseal-live");
    let (mut taken, mut checked, mut read) = (Vec::new(), Vec::new(), 0);
    for percent in ["0", "1"].repeat(plan.rounds.max(3)) {
        reseal.renew()?;
        for nth in 0..2 {
            process::run(reseal.command().args(["backup", "web01"]).arg(day(nth)))?;
        }
        let mut command = reseal.command();
        command.args(["backup", "web01", "--bitmap", "day1", "--since", "web01@latest", "--json"]);
        command.args(["--check-unchanged", percent]).arg(nbd.uri());
        let began = Instant::now();
        let point: Value = serde_json::from_str(&process::output(&mut command)?)?;
        let seconds = began.elapsed().as_secs_f64();
        if percent == "0" {
            taken.push(seconds);
            read = point["stats"]["read"].as_u64().ok_or("no count of bytes read")?;
        } else {
            checked.push(seconds);
        }
    }
    let (own, checked) = (median(taken), median(checked));
    let mut figures = vec![
        Figure {
            what: "Day 2 by a bitmap: bytes read".into(),
            bound: "those that the bitmap has".into(),
            measured: format!("{read} of {dirty}"),
            met: Some(read == dirty),
        },
        Figure {
            what: "Day 2 by a bitmap".into(),
            bound: "at most 0.4 s".into(),
            measured: format!("{own:.2} s ({checked:.2} s with 1 % of the rest checked)"),
            met: Some(own <= 0.4),
        },
    ];
    if let Some(restic) = restic {
        figures.push(Figure {
            what: "Day 2 by a bitmap".into(),
            bound: "15 × restic".into(),
            measured: format!("{:.1} × (restic {restic:.2} s)", restic / own),
            met: Some(restic / own >= 15.0),
        });
    }
    Ok(figures)
}

/// A VM of QEMU without a guest, whose disk is a file for `fio` as well.
fn beside_a_writer(plan: &Plan, disks: &Disks) -> Result<Vec<Figure>> {
    let folder = plan.work.join("live");
    renewed(&folder)?;
    let image = folder.join("vm.qcow2");
    let newest = disks.newest();
    process::run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&newest).arg(&image))?;
    let (qmp, mountpoint) = (folder.join("qmp.socket"), folder.join("disk.fuse"));
    File::create(&mountpoint)?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-S", "-qmp"]);
    qemu.arg(format!("unix:{},server=on,wait=off", qmp.display()));
    qemu.args(["-blockdev", &format!("driver=file,node-name=file,filename={}", image.display())]);
    qemu.args([
        "-blockdev",
        "driver=qcow2,node-name=disk,file=file",
        "-device",
        "virtio-blk-pci,drive=disk,share-rw=on",
    ]);
    let mut server = Server::start(&mut qemu, &folder.join("qemu.log"))?;
    let began = Instant::now();
    while !qmp.exists() {
        server.running()?;
        if began.elapsed() > START {
            return Err("QEMU does not listen".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let export = json!({"type": "fuse", "id": "fio", "node-name": "disk", "mountpoint": mountpoint, "writable": true});
    // A monitor serves one at a time: this connection ends before the backup's begins.
    Qmp::connect(&qmp).run("block-export-add", export);
    let write = || -> Result<(f64, f64)> {
        let mut fio = Command::new("fio");
        fio.args(["--name=w", "--rw=randwrite", "--bs=64k", "--ioengine=psync", "--size=1G", "--time_based"]);
        fio.args([format!("--runtime={WRITE_SECONDS}"), format!("--rate={WRITE_RATE}m"), "--randseed=7".into()]);
        fio.arg("--output-format=json").arg(format!("--filename={}", mountpoint.display()));
        let said: Value = serde_json::from_str(&process::output(&mut fio)?)?;
        let wrote = &said["jobs"][0]["write"];
        let rate = wrote["bw_bytes"].as_f64().ok_or("fio tells no rate")?;
        let p99 = wrote["clat_ns"]["percentile"]["99.000000"].as_f64().ok_or("fio tells no latency")?;
        Ok((rate / 1e6, p99 / 1e6))
    };
    let mut reseal = Reseal::at(plan, "reseal-live");
    let mut beside = |limit: Option<&str>| -> Result<(f64, f64)> {
        reseal.renew()?;
        let mut backup = reseal.command();
        backup
            .args(["backup", "web01", "--qmp"])
            .arg(&qmp)
            .args(limit.into_iter().flat_map(|rate| ["--limit-rate", rate]));
        backup.stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = backup.spawn()?;
        let written = write();
        // What a limited backup has not read when the writer ends is not waited for: the hypervisor is asked to end it as
        // for a writer that died.
        if child.try_wait()?.is_none() {
            child.kill()?;
        }
        child.wait()?;
        std::thread::sleep(Duration::from_secs(2));
        written
    };
    let mut alone = Vec::new();
    let (mut limited, mut unlimited) = (Vec::new(), Vec::new());
    let limit = format!("{LIMIT_RATE}M");
    for _ in 0..plan.rounds.max(3) {
        alone.push(write()?);
        limited.push(beside(Some(&limit))?);
        unlimited.push(beside(None)?);
    }
    server.running()?;
    let rate = |of: &[(f64, f64)]| median(of.iter().map(|one| one.0).collect());
    let p99 = |of: &[(f64, f64)]| median(of.iter().map(|one| one.1).collect());
    let kept = rate(&limited) / rate(&alone);
    let line = |of: &[(f64, f64)]| format!("{:.1} MB/s, p99 {:.1} ms", rate(of), p99(of));
    Ok(vec![
        Figure {
            what: format!("A writer of {WRITE_RATE} MiB/s on the VM's disk, beside a backup with --limit-rate {limit}"),
            bound: "0.8 × its rate without a backup".into(),
            measured: format!("{kept:.2} × ({}; alone {})", line(&limited), line(&alone)),
            met: Some(kept >= 0.8),
        },
        Figure {
            what: "The same beside a backup without a limit".into(),
            bound: "reported".into(),
            measured: format!("{:.2} × ({})", rate(&unlimited) / rate(&alone), line(&unlimited)),
            met: None,
        },
    ])
}
