//! `--promote`: the disks of a VM that runs move to where they stay. Either this process serves the overlay meanwhile, or
//! another one does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Args;
use reseal_cli::{CommonArgs, Failure, Output, Progress, Status, harden, human_bytes, human_duration, parse_size};
use reseal_format::manifest::Manifest;
use reseal_format::names::DiskName;
use reseal_mountfs::boot::{DiskAt, Qemu, Record, RunFolder};
use reseal_mountfs::journal::Journal;
use reseal_mountfs::promote::{self, Keeper, Move, Options, PromoteError, Watch, lengths};
use reseal_mountfs::signals::StopSignals;
use reseal_mountfs::target::{Format, TargetSpec, read_secret};
use reseal_mountfs::writable::Folder;
use reseal_qmp::Client;
use reseal_vault::{PointSpec, Which};
use serde::Serialize;

use super::arguments::{BootArgs, failure};

/// How long a command of QEMU may take. One that has a disk stand still waits until an export that is gone is given up.
const ANSWER: Duration = Duration::from_secs(30);

/// A pause before a move is tried again.
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Args)]
pub(super) struct PromoteArgs {
    /// Moves the disk, while the VM runs, to where it stays: a file or a block device; of several disks each one that is to move.
    /// When none is left on the overlay, the VM runs on without this process. A VM that runs on the overlay already is the one that is
    /// meant
    #[arg(long, value_name = "[DISK=]TARGET")]
    promote: Vec<String>,
    /// How disks are moved: raw or qcow2
    #[arg(long, value_name = "FORMAT", default_value = "raw", requires = "promote")]
    promote_format: Format,
    /// Encrypts what they are moved to with LUKS; the first line of the file is its passphrase
    #[arg(long, value_name = "FILE", requires = "promote")]
    luks_secret: Option<PathBuf>,
    /// Overwrites what is at a target
    #[arg(long, requires = "promote")]
    force: bool,
    /// Most bytes a second that are copied of each disk, such as 50M, beside what the guest writes
    #[arg(long, value_name = "SIZE", requires = "promote", value_parser = parse_size)]
    limit_rate: Option<u64>,
}

/// A disk that was moved, as `--json` shows it.
#[derive(Debug, Serialize)]
struct MovedDisk {
    name: DiskName,
    target: PathBuf,
    format: String,
    /// With LUKS. What is not is in the clear.
    encrypted: bool,
    length: u64,
    #[serde(skip)]
    is_now: String,
}

/// What `--json` says when disks are at their targets.
#[derive(Serialize)]
struct Promoted<'a> {
    event: &'static str,
    disks: &'a [MovedDisk],
    seconds: f64,
    /// Disks that are still on the overlay.
    left: Vec<&'a DiskName>,
    pid: u32,
    qmp: PathBuf,
    /// Where what the guest wrote before is kept.
    overlay: Option<&'a PathBuf>,
}

fn usage(what: impl Into<String>) -> Failure {
    Failure::new(Status::Usage, what)
}

fn promote_failure(error: &PromoteError) -> Failure {
    Failure::of(error.class().into(), error)
}

impl PromoteArgs {
    /// Whether anything is to move.
    pub(super) fn is_wanted(&self) -> bool {
        !self.promote.is_empty()
    }

    /// Which of these disks go where.
    fn targets(&self, disks: &[&DiskName]) -> Result<Vec<(usize, PathBuf)>, Failure> {
        let mut targets: Vec<(usize, PathBuf)> = Vec::new();
        for text in &self.promote {
            let named = text
                .split_once('=')
                .and_then(|(name, path)| Some((disks.iter().position(|disk| disk.as_str() == name)?, path)));
            let (nth, path) = match (named, disks) {
                (Some(named), _) => named,
                (None, [_]) => (0, text.as_str()),
                (None, _) => {
                    let names: Vec<&str> = disks.iter().map(|disk| disk.as_str()).collect();
                    return Err(usage(format!(
                        "--promote {text}: which disk? The VM has {}: say DISK=TARGET for each that is to move",
                        names.join(", ")
                    )));
                }
            };
            let path = std::path::absolute(path).map_err(|e| usage(format!("--promote {text}: {e}")))?;
            if targets.iter().any(|(other, taken)| *other == nth || *taken == path) {
                return Err(usage(format!(
                    "--promote {text}: another --promote names the same disk or the same target"
                )));
            }
            targets.push((nth, path));
        }
        Ok(targets)
    }

    /// Looks, before anything runs, whether the disks of a point can go where they are to.
    pub(super) fn check(&self, point: &Manifest) -> Result<(), Failure> {
        let names: Vec<&DiskName> = point.disks.iter().map(|disk| &disk.name).collect();
        for (nth, spec) in self.specs(&names)? {
            let refused = |e| promote_failure(&PromoteError::Target(e));
            spec.check(point.disks[nth].length, self.force).map_err(refused)?;
        }
        Ok(())
    }

    fn specs(&self, disks: &[&DiskName]) -> Result<Vec<(usize, TargetSpec)>, Failure> {
        let refused = |e| promote_failure(&PromoteError::Target(e));
        let secret = self.luks_secret.as_deref().map(read_secret).transpose().map_err(refused)?;
        let targets = self.targets(disks)?;
        let spec = |(nth, path): (usize, PathBuf)| {
            let spec = TargetSpec::new(&path, self.promote_format, secret.clone()).map_err(refused)?;
            spec.demand_rewritable().map_err(refused)?;
            Ok((nth, spec))
        };
        targets.into_iter().map(spec).collect()
    }
}

/// Disks that are to move, and the VM that has them.
pub(super) struct Promotion {
    folder: RunFolder,
    moves: Vec<Move>,
    options: Options,
    /// Until when a failure is tried again.
    retry_until: Option<Instant>,
}

impl Promotion {
    /// What is asked for, of the VM with that run folder and record. Disks that are where they are to be are left out.
    pub(super) fn new(arguments: &PromoteArgs, folder: &RunFolder, record: &Record) -> Result<Promotion, Failure> {
        let names: Vec<&DiskName> = record.disks.iter().map(|disk| &disk.name).collect();
        let mut moves = Vec::new();
        for (nth, target) in arguments.specs(&names)? {
            let disk = &record.disks[nth];
            match &disk.at {
                DiskAt::Moved { target: at } if Path::new(at) == target.path() => continue,
                DiskAt::Moved { target: at } => {
                    return Err(usage(format!("the disk {} was moved to {at} already", disk.name)));
                }
                DiskAt::Overlay => {}
            }
            let (name, device, node) = (disk.name.clone(), disk.device.clone(), disk.node.clone());
            moves.push(Move { disk: name, nth, device, node, target });
        }
        let options = Options { force: arguments.force, speed: arguments.limit_rate.unwrap_or(0) };
        Ok(Promotion { folder: folder.clone(), moves, options, retry_until: None })
    }

    /// The same of what is recorded in the run folder.
    pub(super) fn of(arguments: &PromoteArgs, folder: &RunFolder) -> Result<Promotion, Failure> {
        let record = folder.record().map_err(|e| failure(&e))?;
        let record = record.ok_or_else(|| Failure::new(Status::Failed, "nothing says what runs here"))?;
        Promotion::new(arguments, folder, &record)
    }

    /// Moves them all, or none.
    fn run(&self, output: Output, stop: &AtomicBool) -> Result<(), Failure> {
        let Some(_lock) = self.folder.lock_promotion().map_err(|e| failure(&e))? else {
            return Err(Failure::new(
                Status::Failed,
                "another process moves the disks of this VM; wait for it, or end it",
            ));
        };
        let began = Instant::now();
        let failed = |e: PromoteError| promote_failure(&e);
        let mut client = Client::connect(&self.folder.qmp_promote(), ANSWER).map_err(|e| failed(e.into()))?;
        let mut keeper = Keeper::new(&self.folder);
        // What one that died left behind would be in the way.
        keeper.settle(&mut client).map_err(failed)?;
        let lengths = lengths(&mut client, &self.moves).map_err(failed)?;
        let progress = Progress::bytes(output, "moved", lengths.iter().sum());
        let watch = Watch { progress: &|bytes| progress.add(bytes), stop };
        let moved = loop {
            let moved = promote::promote(&mut client, &self.moves, self.options, &mut keeper, &watch);
            let may_retry = self.retry_until.is_some_and(|until| Instant::now() < until);
            if !(may_retry && matches!(moved, Err(PromoteError::Failed { .. })) && !stop.load(Ordering::Relaxed)) {
                break moved;
            }
            thread::sleep(AGAIN);
        };
        progress.finish();
        moved.map_err(failed)?.iter().for_each(|warning| output.warn(warning));
        self.report(output, &lengths, began.elapsed())
    }

    fn report(&self, output: Output, lengths: &[u64], took: Duration) -> Result<(), Failure> {
        let disks = self.moves.iter().zip(lengths).map(|(wish, &length)| MovedDisk {
            name: wish.disk.clone(),
            target: wish.target.path().to_owned(),
            format: wish.target.format().to_string(),
            encrypted: !wish.target.is_clear(),
            length,
            is_now: wish.target.describe(),
        });
        let disks: Vec<_> = disks.collect();
        for disk in &disks {
            output.say(format!(
                "{} runs from {} ({}, {}) after {}",
                disk.name,
                disk.target.display(),
                human_bytes(disk.length),
                disk.is_now,
                human_duration(took)
            ));
        }
        let Some(record) = self.folder.record().map_err(|e| failure(&e))? else { return Ok(()) };
        let left = record.disks.iter().filter(|disk| disk.at == DiskAt::Overlay).map(|disk| &disk.name);
        output.json(&Promoted {
            event: "promoted",
            disks: &disks,
            seconds: took.as_secs_f64(),
            left: left.collect(),
            pid: record.qemu.pid,
            qmp: self.folder.qmp(),
            overlay: record.overlay_folder.as_ref(),
        });
        Ok(())
    }

    /// The same, of a VM that has its disks again only now: QEMU tries to connect at growing intervals.
    pub(super) fn trying_for(mut self, limit: Duration) -> Promotion {
        self.retry_until = Some(Instant::now() + limit);
        self
    }

    /// The same on a thread of its own.
    pub(super) fn start(self, output: Output) -> std::io::Result<Started> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = thread::Builder::new().name("promote".into()).spawn(move || self.run(output, &asked))?;
        Ok(Started { stop, thread: Some(thread), failed: None })
    }
}

/// Disks on their way, while this process serves the overlay.
pub(super) struct Started {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), Failure>>>,
    /// Why they stay, and whether that was said.
    failed: Option<(Failure, bool)>,
}

impl Started {
    /// Disks that could not even begin to move.
    pub(super) fn not(failure: Failure) -> Started {
        Started { stop: Arc::default(), thread: None, failed: Some((failure, false)) }
    }

    fn is_at_work(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes up the end of the thread, and waits for it.
    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let gone = || Err(Failure::new(Status::Failed, "the thread that moves the disks broke down"));
            self.failed = thread.join().unwrap_or_else(|_| gone()).err().map(|failure| (failure, false));
        }
    }
}

/// What the process that serves an overlay knows of disks that move, by its own doing or another process's.
pub(super) struct Moving<'a> {
    folder: &'a RunFolder,
    started: Option<Started>,
    /// The VM ends with this process.
    is_tied: bool,
    /// Somebody was at it when it was last looked; or may have been before this process was there.
    was_at_work: bool,
    is_said: bool,
}

/// What `--json` says when disks stay where they are.
#[derive(Serialize)]
struct NotPromoted<'a> {
    event: &'static str,
    error: &'a str,
}

impl<'a> Moving<'a> {
    pub(super) fn new(folder: &'a RunFolder, started: Option<Started>, is_tied: bool) -> Moving<'a> {
        Moving { folder, started, is_tied, was_at_work: true, is_said: false }
    }

    /// Looks, and brings to its end what one that died left in QEMU; whether nobody needs this process any more.
    pub(super) fn look(&mut self, qemu: &mut Qemu, journal: &Journal, output: Output) -> bool {
        if let Some(started) = &mut self.started
            && !started.is_at_work()
        {
            started.join();
            if let Some((failure, is_said @ false)) = &mut started.failed {
                *is_said = true;
                journal.say(&failure.message);
                output.json(&NotPromoted { event: "not-promoted", error: &failure.message });
            }
        }
        // Held for as long as this looks, so that nobody begins meanwhile.
        let lock = match self.was_at_work {
            true => self.folder.lock_promotion().ok().flatten(),
            false => None,
        };
        let is_taken = if self.was_at_work { lock.is_none() } else { self.folder.is_promoting() };
        if is_taken || self.started.as_ref().is_some_and(Started::is_at_work) {
            self.was_at_work = true;
            return false;
        }
        let record = match (self.was_at_work, qemu.monitor()) {
            (true, Ok(monitor)) => match Keeper::new(self.folder).settle(monitor) {
                Ok(record) => Some(record),
                Err(e) => {
                    journal.say(&format!("what a move of disks left in QEMU could not be taken away: {e}"));
                    None
                }
            },
            _ => self.folder.record().ok().flatten(),
        };
        self.was_at_work = false;
        let is_over = record.as_ref().is_some_and(Record::is_all_moved);
        if is_over && self.is_tied && !std::mem::replace(&mut self.is_said, true) {
            output.say("nothing is on the overlay any more; the VM ends with this process all the same");
        }
        is_over && !self.is_tied
    }

    /// Has this process's own move end; whether there is one.
    pub(super) fn stop(&self) -> bool {
        let at_work = self.started.as_ref().filter(|started| started.is_at_work());
        at_work.inspect(|started| started.stop.store(true, Ordering::Relaxed)).is_some()
    }

    /// Ends it; why disks that were to move stay where they are.
    pub(super) fn end(mut self) -> Option<Failure> {
        self.stop();
        let started = self.started.as_mut()?;
        started.join();
        self.started?.failed.map(|(failure, _)| failure)
    }
}

/// The run folder of a VM that another process serves from the overlay that is named, if there is one.
pub(super) fn served_elsewhere(arguments: &BootArgs) -> Result<Option<(RunFolder, Record)>, Failure> {
    let is_meant = |folder: &&Path| arguments.promote.is_wanted() && Folder::is_in_use(folder);
    let Some(overlay) = arguments.overlay().filter(is_meant) else { return Ok(None) };
    let Ok(Some(document)) = Folder::document(overlay) else { return Ok(None) };
    let folder = RunFolder::of(&document.id);
    let Some(record) = folder.record().map_err(|e| failure(&e))?.filter(|record| record.qemu.is_alive()) else {
        return Ok(None);
    };
    let spec = PointSpec::parse(&arguments.point)?;
    let is_other = match spec.which {
        Which::Number(number) => number != record.number,
        _ => false,
    };
    if spec.vm != record.vm || is_other {
        let (vm, number) = (&record.vm, record.number);
        return Err(usage(format!("what runs on {} is {vm}@{number}; name that", overlay.display())));
    }
    Ok(Some((folder, record)))
}

/// Moves disks of a VM that another process serves; that one ends when nothing is left for it.
pub(super) fn promote_served(
    common: &CommonArgs,
    arguments: &BootArgs,
    folder: &RunFolder,
    record: &Record,
) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    StopSignals::new()
        .and_then(|signals| signals.on_signal(move || asked.store(true, Ordering::Relaxed)))
        .map_err(|e| Failure::new(Status::Failed, e.to_string()))?;
    Promotion::new(&arguments.promote, folder, record)?.run(output, &stop)?;
    if let Some(record) = folder.record().map_err(|e| failure(&e))? {
        say_free(output, &record, folder);
    }
    Ok(())
}

/// Says what becomes of a VM and of its overlay when no disk of its is on that any more.
pub(super) fn say_free(output: Output, record: &Record, folder: &RunFolder) {
    if record.disks.iter().any(|disk| disk.at == DiskAt::Overlay) {
        return;
    }
    output.say(format!(
        "the VM runs on without reseal (QEMU {}, its monitor is {})",
        record.qemu.pid,
        folder.qmp().display()
    ));
    if let Some(overlay) = &record.overlay_folder {
        output
            .say(format!("nothing needs the overlay any more: `reseal overlay drop {}` removes it", overlay.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(promote: &[&str], disks: &[&str]) -> Result<Vec<(usize, PathBuf)>, Failure> {
        let disks: Vec<DiskName> = disks.iter().map(|name| DiskName::new(name).unwrap()).collect();
        let arguments = PromoteArgs {
            promote: promote.iter().map(|text| (*text).to_owned()).collect(),
            promote_format: Format::Raw,
            luks_secret: None,
            force: false,
            limit_rate: None,
        };
        arguments.targets(&disks.iter().collect::<Vec<_>>())
    }

    #[test]
    fn each_disk_has_one_target_and_an_only_one_needs_no_name() {
        assert_eq!(targets(&["/t"], &["a"]).unwrap(), [(0, "/t".into())]);
        assert_eq!(targets(&["/x=y"], &["a"]).unwrap(), [(0, "/x=y".into())]);
        assert_eq!(targets(&["a=/x=y"], &["a"]).unwrap(), [(0, "/x=y".into())]);
        assert_eq!(targets(&["b=/t", "a=/u"], &["a", "b"]).unwrap(), [(1, "/t".into()), (0, "/u".into())]);
        for bad in [&["/t"][..], &["c=/t"], &["a=/t", "a=/u"], &["a=/t", "b=/t"], &["a="]] {
            assert!(targets(bad, &["a", "b"]).is_err(), "{bad:?}");
        }
    }
}
